"""ComfyUI's syntax in prompts: what is taken off, and when."""

import logging
import time

import pytest

from tests.support import mentions
from tim_core import Pipeline
from tim_core.prompts import has_syntax, take_off_syntax

WITH_SYNTAX = {
    "a (red:1.3) circle": "a red circle",
    "((a:1.2) red:0.5) circle": "a red circle",
    "(a ((red) circle):.8)": "a red circle",
    "a (red : 1.3 ) circle": "a red  circle",
    r"a \(red\) (circle:-2)": "a (red) circle",
    "a (red:1.3) circle (": "a red circle (",
    "a (red 5:1.3) circle": "a red 5 circle",
    "(red:1e1) circle": "red circle",
    "(phone 15:.8)": "phone 15",
    "a red, embedding:bad:1.2 circle": "a red,  circle",
}
PLAIN = [
    "a red circle",
    "a (red) circle",
    "((red))",
    r"a \(red:1.3\) circle",
    "a red :)",
    "a clock (10:30)",
    "wide (16:9)",
    "(a: red)",
    "a:1.3)",
    "(red:1.3",
    "",
    "((",
    "a (red:x) circle",
]


@pytest.mark.parametrize("text, words", WITH_SYNTAX.items())
def test_weights_and_embeddings_are_taken_off(text, words):
    found, line = take_off_syntax(text)
    assert has_syntax(text) and found == words and mentions(line, "weights", "no effect", words)


@pytest.mark.parametrize("text", PLAIN)
def test_parentheses_times_and_ratios_are_no_weights(text):
    assert not has_syntax(text)


@pytest.mark.parametrize(
    "text, words",
    {
        "a ((red)) circle": "a red circle",
        r"a \(red\) circle": "a (red) circle",
        "a (red circle": "a (red circle",
        ") a (red)": ") a red",
    }.items(),
)
def test_the_graph_takes_all_pairs_off(text, words):
    found, line = take_off_syntax(text)
    assert found == words and (line is None) == ("\\" in text or text == words)


@pytest.mark.parametrize("text", ["(" * 50_000 + "a:1)" * 50_000, "(a:1" * 50_000, ":" * 100_000 + ")", "(" + " " * 100_000 + ":"])
def test_long_prompts_take_no_time(text):
    started = time.perf_counter()
    has_syntax(text)
    take_off_syntax(text)
    assert time.perf_counter() - started < 2


def test_the_pipeline_reads_a_weighted_prompt_as_the_graph_does(tiny, caplog):
    pipe = Pipeline.load(tiny, device="cpu")
    plain = pipe("a red circle", "a square", steps=2)
    assert not caplog.records
    assert pipe("a (red:1.3) circle", "(a square:2)", steps=2).equal(plain)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert mentions(caplog.records[0].message, "prompt weights", "a red circle") and mentions(caplog.records[1].message, "a square")
