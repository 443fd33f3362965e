"""The 1000 classes of ImageNet-1K, in the order of their numbers."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path

from .errors import TimError

NULL_CLASS = -1


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "imagenet.txt").read_text(encoding="utf-8").splitlines())


def class_number(text: str) -> int:
    """A class by number ("207") or name ("golden retriever", "Golden_Retriever"); NULL_CLASS for nothing or "null".

    Two classes differ by capitals alone: Cardigan, the dog, and cardigan, the garment. TimError, with the nearest names, for what is
    neither.
    """
    text = " ".join(text.replace("_", " ").split())
    if text.lower() in ("", "null", "none"):
        return NULL_CLASS
    if text.isdecimal():
        return int(text)
    known = names()
    if text in known:
        return known.index(text)
    small = [name.lower() for name in known]
    if text.lower() in small:
        return small.index(text.lower())
    near = difflib.get_close_matches(text.lower(), small, 3) or [name for name in small if text.lower() in name][:3]
    hint = f", perhaps {', '.join(near)}" if near else ""
    raise TimError(f"class label: found '{text}', expected a number or a name of ImageNet's 1000 classes{hint}")
