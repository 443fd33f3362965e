"""Lists of numbers as users write them: "1, 2, 4", "1-8", "1-32 x2", "1-4 +0.5"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral

from .errors import TimError
from .limits import MAX_STEPS

MOST_NUMBERS = 100
NUMBER = r"[0-9]{1,40}(?:\.[0-9]{1,40})?"
ENTRY = re.compile(rf"({NUMBER})(?:-({NUMBER})(?:([x+])({NUMBER}))?)?")


def parse_numbers(text: str | int | float, name: str, distinct: bool = True) -> list[int | float]:
    """Numbers from 0 on, as ints where they are whole; commas, semicolons or spaces separate them.

    "1-8" is every whole step, "1-32 x2" doubles from 1 to 32, "1-4 +0.5" adds. name: of the setting, for the TimError of a text that is
    no such list, of more than MOST_NUMBERS numbers, or, where they must be distinct, of a number that is there twice.
    """
    text = " ".join(str(text).split())
    words = re.sub(r" ?([-x+*×]) ?", lambda found: found[1].replace("*", "x").replace("×", "x"), text.strip("[]()").lower())
    numbers: list[int | float] = []
    for word in re.split(r"[\s,;]+", words.strip(" ,;")):
        if (entry := ENTRY.fullmatch(word)) is None:
            raise TimError(f"{name}: '{word}' is not a number or a range; write a list such as 1, 2, 4, or 1-8, or 1-32 x2")
        numbers += _expand(name, *entry.groups())
        if len(numbers) > MOST_NUMBERS:
            raise TimError(f"{name}: '{text}' has more than {MOST_NUMBERS} numbers; use fewer, or a larger step, such as 1-64 x2")
    if distinct and len(set(numbers)) < len(numbers):
        twice = next(number for place, number in enumerate(numbers) if number in numbers[:place])
        raise TimError(f"{name}: '{text}' has {twice} twice; list each number once")
    return numbers


def parse_counts(text: str | int, name: str, distinct: bool = True) -> list[int]:
    """As parse_numbers, for step counts; TimError as in check_counts."""
    return check_counts(parse_numbers(text, name, distinct), name, distinct)


def check_counts(counts: Sequence[int | float], name: str, distinct: bool = True) -> list[int]:
    """The step counts of a list of runs. TimError unless they are whole numbers of at least 1, with MAX_STEPS or fewer in all."""
    where = f" in {','.join(map(str, counts))}" if len(counts) > 1 else ""
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= count <= MAX_STEPS:
            raise TimError(f"{name}: {count}{where} is not a whole number from 1 to {MAX_STEPS}; use numbers such as 1,2,4")
    if not counts:
        raise TimError(f"{name}: none given; use a list such as 1,2,4")
    if len(counts) > MOST_NUMBERS:
        raise TimError(f"{name}: {len(counts)} step counts; use at most {MOST_NUMBERS}")
    if distinct and len(set(counts)) < len(counts):
        raise TimError(f"{name}: a step count{where} occurs twice; list each once")
    if sum(counts) > MAX_STEPS:
        raise TimError(f"{name}: {sum(counts)} steps in all{where}; use at most {MAX_STEPS}")
    return [int(count) for count in counts]


def _expand(name: str, first: str, last: str | None, operation: str | None, step: str | None) -> list[int | float]:
    """The numbers of one entry, at most one more than MOST_NUMBERS."""
    start = _number(first)
    if last is None:
        return [start]
    end, by = _number(last), _number(step) if step else 1
    if end < start or by <= (1 if operation == "x" else 0) or (operation == "x" and start <= 0):
        written = f"{first}-{last} {operation}{step}" if step else f"{first}-{last}"
        raise TimError(f"{name}: '{written}' does not rise; write a range as 1-8, 1-32 x2 or 1-4 +0.5")
    numbers: list[int | float] = []
    while len(numbers) <= MOST_NUMBERS:
        k = len(numbers)
        value = start * by**k if operation == "x" else start + k * by
        if value > end + 1e-9:
            break
        numbers.append(_whole(value))
    return numbers


def _number(text: str) -> int | float:
    return _whole(float(text)) if "." in text else int(text)


def _whole(value: int | float) -> int | float:
    """An int if it is one up to rounding."""
    value = value if isinstance(value, int) else round(value, 9)
    return int(value) if value == int(value) else value
