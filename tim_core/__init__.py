"""Transition Models (TiM, arXiv 2509.04394): any-step generation, and training, without ComfyUI."""

from .errors import TimError

__version__ = "0.1.0"
__all__ = ["Pipeline", "TimError", "__version__"]


def __getattr__(name: str):
    if name == "Pipeline":  # on first use: it brings torch
        from .pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
