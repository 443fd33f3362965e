"""The one error for inputs that cannot be used, and how messages become one printable line."""

import re
from collections.abc import Collection, Mapping

LONGEST_WORD, LONGEST_LINE = 300, 2000


class TimError(ValueError):
    """An input cannot be used. The message is one printable line: what is wrong, with its value, and what to do."""

    __module__ = "tim_core.errors"  # ComfyUI imports the pack under its path, and shows an error's module to the user

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` as one line for a terminal: control characters escaped, long words (such as keys) and long lines cut in the middle."""
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _cut(word[0], LONGEST_WORD), text)
    return escaped(_cut(text, LONGEST_LINE))


def escaped(text: str) -> str:
    """`text` with characters that a terminal does not show, or acts on, as Python escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[-limit // 3 :]}"


def one_line(error: BaseException, limit: int | None = 160) -> str:
    """The message of another library's error as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def state_dict_mismatch(own: Mapping, found: Mapping, optional: Collection[str] = ()) -> str:
    """How the tensors `found` differ from a model's `own`, by name, shape, and floating or integer; empty if they agree.

    `optional` names may be missing.
    """
    both = [name for name in own if name in found]
    kinds = {
        "missing": sorted(own.keys() - found.keys() - set(optional)),
        "unknown": sorted(found.keys() - own.keys()),
        "wrong shape of": [name for name in both if own[name].shape != found[name].shape],
        "integers instead of floats in": [name for name in both if own[name].is_floating_point() and not found[name].is_floating_point()],
    }
    return ", ".join(f"{kind} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for kind, names in kinds.items() if names)
