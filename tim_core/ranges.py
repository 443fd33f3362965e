"""Lists of numbers as users write them: "1, 2, 4", "1-8", "1-32 x2", "1-4 +0.5"."""

from __future__ import annotations

import re

from .errors import TimError

MOST_NUMBERS = 100
NUMBER = r"\d+(?:\.\d+)?"
ENTRY = re.compile(rf"({NUMBER})(?:-({NUMBER})(?:([x+])({NUMBER}))?)?")


def parse_numbers(text: str | int | float, name: str) -> list[int | float]:
    """Numbers from 0 on, as ints where they are whole; commas, semicolons or spaces separate them.

    "1-8" is every whole step, "1-32 x2" doubles from 1 to 32, "1-4 +0.5" adds. name: of the setting, for the TimError of a text that is
    no such list, or of more than MOST_NUMBERS numbers.
    """
    words = re.sub(r"\s*([-x+*×])\s*", lambda found: found[1].replace("*", "x").replace("×", "x"), str(text).strip().strip("[]()").lower())
    numbers: list[int | float] = []
    for word in re.split(r"[\s,;]+", words.strip(" ,;")):
        if (entry := ENTRY.fullmatch(word)) is None:
            raise TimError(f"{name}: '{word}' is not a number or a range; write a list such as 1, 2, 4, or 1-8, or 1-32 x2")
        numbers += _expand(name, *entry.groups())
        if len(numbers) > MOST_NUMBERS:
            raise TimError(f"{name}: '{text}' has more than {MOST_NUMBERS} numbers; use a larger step, such as 1-64 x2")
    return numbers


def parse_counts(text: str | int, name: str) -> list[int]:
    """As parse_numbers, for whole numbers of at least 1."""
    counts = []
    for number in parse_numbers(text, name):
        if not isinstance(number, int) or number < 1:
            raise TimError(f"{name}: {number:g} is not a whole number of at least 1")
        counts.append(number)
    return counts


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
