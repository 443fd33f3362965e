"""What the test run says at its end."""

from collections import Counter

import pytest

REPLAYED = pytest.StashKey[Counter]()
DEVIATED = pytest.StashKey[Counter]()


def pytest_configure(config):
    config.stash[REPLAYED] = Counter()
    config.stash[DEVIATED] = Counter()


@pytest.fixture
def replayed(request):
    """Count of the reference cases replayed, by kind."""
    return request.config.stash[REPLAYED]


@pytest.fixture
def deviated(request):
    """Count of the reference cases that met a declared deviation, by rule."""
    return request.config.stash[DEVIATED]


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash[REPLAYED]
    if counts:
        terminalreporter.write_sep("-", "reference cases replayed")
        for kind in sorted(counts):
            terminalreporter.write_line(f"{counts[kind]:5d} {kind}")
        terminalreporter.write_line(f"{sum(counts.values()):5d} in all")
    for rule, count in sorted(config.stash[DEVIATED].items()):
        terminalreporter.write_line(f"{count:5d} differ from the official code by rule: {rule}")
