"""The 1000 classes of ImageNet-1K, in the order of their numbers."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path

from .errors import TimError

NULL_CLASS = -1


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The name of each class, by number."""
    return tuple((Path(__file__).parent / "imagenet.txt").read_text(encoding="utf-8").splitlines())


def class_number(text: str) -> int:
    """The number of a class, from "207", "golden retriever" or "Golden_Retriever"; NULL_CLASS for an empty text or "null".

    Case matters only for Cardigan (the dog) and cardigan (the garment). TimError names the nearest classes.
    """
    text = " ".join(text.replace("_", " ").split())
    if text.lower() in ("", "null", "none"):
        return NULL_CLASS
    if text.isascii() and text.isdecimal() and len(text) < 20:
        return int(text)
    known = names()
    if text in known:
        return known.index(text)
    small = [name.lower() for name in known]
    if text.lower() in small:
        return small.index(text.lower())
    close = difflib.get_close_matches(text.lower(), small, 3) or [name for name in small if text.lower() in name][:3]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise TimError(f"class label: '{text}' is not a number or the name of an ImageNet class{hint}")
