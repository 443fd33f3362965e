"""ComfyUI's syntax in prompts, (words:weight) and embedding:name, which TiM has no use for."""

from __future__ import annotations

import re

from .errors import printable

EMBEDDING = re.compile(r"embedding:\S+")
EXPONENT = r"(?:e[-+]?[0-9]+)?"
# a whole number after a digit is no weight but a time or a ratio, as in (10:30)
WEIGHT = re.compile(
    rf"[^\s(:]\s*:\s*[-+]?(?:[0-9]*\.[0-9]+|[0-9]+\.){EXPONENT}\s*\)|[^\s\d(:]\s*:\s*[-+]?[0-9]+{EXPONENT}\s*\)"
)
LONGEST_WEIGHT = 32  # characters


def has_syntax(text: str) -> bool:
    """Whether a text has weights or embeddings, and not only parentheses, escaped or not."""
    return bool(EMBEDDING.search(text) or "(" in text and WEIGHT.search(re.sub(r"\\[()]", "", text)))


def take_off_syntax(text: str) -> tuple[str, str | None]:
    r"""The text without pairs of parentheses, their weights, and embeddings, as core reads it; \( and \) become parentheses.

    -> the text, and a line that shows it if anything was taken off.
    """
    inner, groups, removed = re.sub(r"\\([()])", "\0\\1", text), [], set()
    for place, letter in enumerate(inner):
        if place and inner[place - 1] == "\0":
            continue
        if letter == "(":
            groups.append(place)
        elif letter == ")" and groups:
            start = groups.pop()
            removed |= {start, place}
            colon = inner.rfind(":", max(start + 2, place - LONGEST_WEIGHT), place)
            if colon > 0 and _is_number(inner[colon + 1 : place]):
                removed |= set(range(colon, place))
    plain = "".join(letter for place, letter in enumerate(inner) if place not in removed)
    words = EMBEDDING.sub("", plain)
    found, words = words != inner, words.replace("\0(", "(").replace("\0)", ")")
    return words, f"prompt weights and embeddings have no effect: read as '{printable(words)}'" if found else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
