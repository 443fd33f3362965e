"""Lists and ranges of numbers as users write them."""

import numpy as np
import pytest

from tests.support import mentions
from tim_core.errors import TimError
from tim_core.ranges import MOST_NUMBERS, check_counts, parse_counts, parse_numbers


@pytest.mark.parametrize("text, numbers", [
    ("1, 2, 4", [1, 2, 4]), ("1 2;4,", [1, 2, 4]), ("[8, 4]", [8, 4]), (4, [4]), (2.5, [2.5]), ("1-8", list(range(1, 9))),
    ("1-32 x2", [1, 2, 4, 8, 16, 32]), ("1-32x2", [1, 2, 4, 8, 16, 32]), ("1 - 40 X 2", [1, 2, 4, 8, 16, 32]),
    ("1-27*3, 100", [1, 3, 9, 27, 100]),
    ("1-3 +0.5", [1, 1.5, 2, 2.5, 3]), ("0-1+0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]), ("0.5-4x2", [0.5, 1, 2, 4]),
    ("5-5", [5]), ("18446744073709551615", [2**64 - 1]),
])
def test_numbers(text, numbers):
    assert parse_numbers(text, "values") == pytest.approx(numbers, rel=0, abs=0)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "8-1", "1-8 x1", "0-8 x2", "1-8 +0", "1--8", "1-2-3", "nan", "1e5", "x2",
                                  "\u0663", "1_0", "9" * 50])
def test_what_is_no_list_is_named(text):
    with pytest.raises(TimError, match="^values: "):
        parse_numbers(text, "values")


@pytest.mark.parametrize("text", ["1-1000000000", "0-1 +0.0001", "1-60, 1-60", "1," * 150, "1 " + " " * 10**6 + "1-200"])
def test_long_lists_are_refused(text):
    with pytest.raises(TimError, match=f"values: .* {MOST_NUMBERS} "):
        parse_numbers(text, "values")


def test_counts_are_whole_and_at_least_1():
    assert parse_counts("1-3", "steps") == [1, 2, 3]
    for text, number in (("0, 1", "0"), ("1.5", "1.5"), ("1-2 +0.5", "1.5")):
        with pytest.raises(TimError, match=f"steps: {number} "):
            parse_counts(text, "steps")


@pytest.mark.parametrize("counts, named", [
    ([], ("none",)), ([10_001], ("10001", 10_000)), ([4, 0], ("0", "4,0", 10_000)), ([True], ("True",)), ([2.5], ("2.5",)),
    ([4, 8, 4], ("4,8,4", "twice")), ([6000, 5000], ("11000", "6000,5000", 10_000)), (list(range(1, 102)), (101, MOST_NUMBERS)),
])
def test_step_counts_are_bounded_one_by_one_and_in_all(counts, named):
    with pytest.raises(TimError) as error:
        check_counts(counts, "--steps")
    assert mentions(str(error.value), "--steps", *named)


def test_numbers_are_listed_once_unless_each_has_a_place():
    with pytest.raises(TimError) as error:
        parse_numbers("1-8, 4", "values")
    assert mentions(str(error.value), "values", "1-8, 4", 4, "twice")
    assert parse_numbers("8, 8", "steps", distinct=False) == parse_counts("8, 8", "steps", distinct=False) == [8, 8]


def test_whole_numbers_of_other_types_are_counts():
    assert check_counts([np.int64(4), 2], "steps") == [4, 2] and type(check_counts([np.int64(4)], "steps")[0]) is int
