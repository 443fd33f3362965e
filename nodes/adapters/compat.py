"""What differs between the supported versions of ComfyUI, 0.3.64 and newer."""

import inspect

from comfy_api.latest import io


def supported_kwargs(function, **keywords) -> dict:
    """The keywords that this version's function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in known}


def Schema(**keywords) -> io.Schema:
    """io.Schema for every supported version. Named so that the Manager finds the node ids.

    A version without search aliases searches names alone, so the first alias goes there: "TiM Scheduler (sigmas)".
    """
    known = supported_kwargs(io.Schema, **keywords)
    if "search_aliases" not in known:
        known["display_name"] += f" ({keywords['search_aliases'][0]})"
    return io.Schema(**known)
