from collections.abc import Collection, Mapping


class TimError(ValueError):
    """Something the user gave cannot be used; the message is one line: the thing, what was found, what was expected."""

    __module__ = "tim_core.errors"  # ComfyUI imports the pack under its path, and shows an error's module to the user


def one_line(error: Exception, limit: int | None = 160) -> str:
    """Another library's message, fit to stand inside ours."""
    return " ".join(str(error).split())[:limit]


def state_dict_mismatch(own: Mapping, found: Mapping, optional: Collection[str] = ()) -> str:
    """How the tensors `found` differ from a model's `own`; empty if they agree. `optional` ones may be missing.

    They must agree in names and shapes, and be floating where the model's are.
    """
    both = [name for name in own if name in found]
    kinds = {
        "no": sorted(own.keys() - found.keys() - set(optional)),
        "unknown": sorted(found.keys() - own.keys()),
        "another shape of": [name for name in both if own[name].shape != found[name].shape],
        "whole numbers in": [name for name in both if own[name].is_floating_point() and not found[name].is_floating_point()],
    }
    return ", ".join(f"{kind} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for kind, names in kinds.items() if names)
