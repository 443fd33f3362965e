"""The benchmarks of speed and memory run, on tiny networks, and measure what they say."""

import json
import math
import sys
import time

import pytest
import torch

from benchmarks import decoder, finite, gpu, measure, memory, network


def rows_of(monkeypatch, tmp_path, module, *arguments: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--json", str(tmp_path / "rows.json")])
    module.main()
    return json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_the_plain_reading_of_the_network_is_the_same_network(monkeypatch, tmp_path):
    exact, rounded = rows_of(monkeypatch, tmp_path, network, "--small", "--tokens", "64", "--pairs", "2")
    assert exact["difference"] < 1e-5 and rounded["difference"] < 0.06  # the golden tolerances
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16") and exact["ratio"] == exact["ours_s"] / exact["plain_s"]


def test_the_decoders_are_compared_on_the_same_weights(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    (row,) = rows_of(monkeypatch, tmp_path, decoder, "--small", "--size", "64", "--dtype", "float32", "--pairs", "1")
    assert row["difference"] < 1e-4 and 0 < row["counted_GiB"] < row["counted_diffusers_GiB"] and row["seen_GiB"] > 0


def test_the_gpu_script_makes_every_row_on_a_cpu(monkeypatch, tmp_path):
    """What ten minutes of a card will be spent on must not fail there."""
    pytest.importorskip("diffusers")
    rows = rows_of(monkeypatch, tmp_path, gpu, "--dry-run")
    kinds = {(row["what"].rpartition(", ")[2], row.get("steps"), row.get("batch")) for row in rows}
    assert {(way, steps, batch) for way in ("eager", "compiled", "baseline") for steps in (1, 4) for batch in (1, 2)} < kinds
    (share,) = (row["share"] for row in rows if row["what"].startswith("network"))
    (held,) = (row["GiB"] for row in rows if "GiB" in row)
    assert 0 < share < 1 and held > 0
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            rows_of(monkeypatch, tmp_path, gpu)


def test_an_image_end_to_end_says_what_it_held():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    made = memory.run(512, small=True)
    assert made["size"] == "512x512" and made["held_GiB"] > made["weights_GiB"] > 0


def test_ratios_are_of_medians():
    found = measure.ratio([(1, 2), (3, 4), (8, 4)], "a", "b")
    assert (found["a_s"], found["b_s"], found["ratio"]) == (3, 4, 0.75) and found["quartiles"] == [0.5, 2.0]
    calls = []
    times = measure.pairs(lambda: calls.append("a"), lambda: calls.append("b"), 2)
    assert calls == list("abba") and len(times) == 2 and all(math.isfinite(t) for pair in times for t in pair)


def test_the_checks_are_timed_alone(monkeypatch, tmp_path, tiny):
    file = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["finite", "--model", str(tiny), "--pairs", "2", "--json", str(file)])
    with monkeypatch.context() as patch:
        slow = finite.pipeline.check_finite
        for module in (finite.pipeline, finite.codec):
            patch.setattr(module, "check_finite", lambda *args, **options: (time.sleep(0.05), slow(*args, **options)))
        finite.main()
    report = json.loads(file.read_text())
    assert report["checks"] >= 0.15  # features, latent and pixels
    assert report["share"] == pytest.approx(report["checks"] / report["unchecked"])
