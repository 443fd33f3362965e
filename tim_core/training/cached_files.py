"""Safetensors files of encoded training data, with a hash that shows damage."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import TimError
from ..files import digest
from .writing import write_tensors

CONTENT_DIGEST = "content"  # key in the metadata


def write_cached(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors and their hash."""
    write_tensors(file, tensors, {**(metadata or {}), CONTENT_DIGEST: digest(sorted(tensors.items()))})


def read_cached(file: Path) -> dict[str, Tensor]:
    """The tensors of a cached file. TimError unless they are those that were written."""
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            whole = (opened.metadata() or {}).get(CONTENT_DIGEST) == digest(sorted(tensors.items()))
    except (OSError, SafetensorError):
        whole = False
    if not whole:
        raise damaged(file)
    return tensors


def damaged(file: Path) -> TimError:
    """The error for a file that is not as it was written."""
    return TimError(f"{file}: cached file is damaged or missing; remove it and repeat the command to encode it again")
