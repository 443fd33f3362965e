"""Time grids."""

import pytest
import torch

from tim_core import schedule
from tim_core.errors import TimError


def test_uniform_is_the_official_grid():
    times = schedule.uniform(4)
    assert times.dtype == torch.float64
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule.uniform(1).tolist() == [1.0, 0.0]
    assert schedule.uniform(2, 0.5).tolist() == [0.5, 0.25, 0.0]
    assert torch.equal(schedule.uniform(50, 80.0, 0.01), torch.linspace(80.0, 0.01, 51, dtype=torch.float64))


def test_shifted_keeps_its_ends_and_moves_the_middle():
    assert torch.allclose(schedule.shifted(5, 1.0), schedule.uniform(5))
    assert schedule.shifted(2, 2.0).tolist() == pytest.approx([1, 2 / 3, 0])
    assert (schedule.shifted(8, 3.0)[1:-1] > schedule.uniform(8)[1:-1]).all()
    assert (schedule.shifted(8, 0.5)[1:-1] < schedule.uniform(8)[1:-1]).all()
    for shift in (0.25, 1.0, 4.0):
        times = schedule.shifted(7, shift, 0.6, 0.1)
        assert (times[0], times[-1]) == (0.6, 0.1) and (times.diff() < 0).all()


def test_a_shifted_segment_is_a_part_of_the_whole():
    whole = schedule.shifted(8, 2.0)
    assert torch.allclose(schedule.shifted(4, 2.0, end=whole[4].item()), whole[:5])
    assert torch.allclose(schedule.shifted(4, 2.0, start=whole[4].item()), whole[4:])


@pytest.mark.parametrize("text", ["1, 0.7, 0.3, 0", "1 .7 .3 0", "[1.0,0.7,0.3,0]", " 1;0.7;0.3;0 ", "1,0.7,\n0.3,0,"])
def test_parse(text):
    times = schedule.parse(text)
    assert times.dtype == torch.float64 and times.tolist() == [1.0, 0.7, 0.3, 0.0]


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: schedule.uniform(0), "steps: 0 "),
        (lambda: schedule.uniform(2.5), "steps: 2.5 "),
        (lambda: schedule.uniform(4, 0.2, 0.5), "start 0.2 must be greater than the end 0.5"),
        (lambda: schedule.uniform(4, float("nan")), "nan"),
        (lambda: schedule.shifted(4, 0.0), "shift: 0.0 "),
        (lambda: schedule.shifted(4, 2.0, 1.5), "1.5 to 0.0"),
        (lambda: schedule.parse("1"), "'1' has fewer than two"),
        (lambda: schedule.parse(""), "'' has fewer than two"),
        (lambda: schedule.parse("1, x, 0"), "times: 'x' "),
        (lambda: schedule.parse("1, 0.5, 0.5, 0"), "0.5 follows 0.5"),
        (lambda: schedule.parse("2, 1, 0"), "times: 2 "),
        (lambda: schedule.parse("1, nan"), "times: nan "),
        (lambda: schedule.parse("1, -0.5"), "times: -0.5 "),
    ],
)
def test_errors_name_the_value_in_one_line(call, named):
    with pytest.raises(TimError) as error:
        call()
    assert named in str(error.value) and "\n" not in str(error.value)
