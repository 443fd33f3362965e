"""A corpus of hostile inputs, made from a seed: each gives the right result, or one error line that names the thing."""

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits of POSIX")

from tests.corpus.case import SEED, all_cases, run_case  # noqa: E402
from tests.corpus.originals import Originals  # noqa: E402

for module in sorted(Path(__file__).with_name("corpus").glob("*.py")):
    importlib.import_module(f"tests.corpus.{module.stem}")  # registers its cases
CASES = all_cases()
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, originals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_case(case, tmp_path, originals)


def test_names_are_unique():
    assert not [name for name, count in Counter(case.name for case in CASES).items() if count > 1]


def test_another_seed_has_other_values():
    assert {case.name for case in all_cases(SEED + 1)} != {case.name for case in CASES} and len(CASES) >= 300
