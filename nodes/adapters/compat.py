"""What differs between the supported versions of ComfyUI, 0.3.64 and newer."""

import inspect

from comfy_api.latest import io


def supported_kwargs(function, **keywords) -> dict:
    """Those of the keywords that this version's function knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in known}


def Schema(**keywords) -> io.Schema:
    """io.Schema without the keywords that an older version does not know (search_aliases). Named so that the Manager finds the node ids."""
    return io.Schema(**supported_kwargs(io.Schema, **keywords))
