"""Writes files atomically, makes folders, hashes tensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TimError, one_line

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls write(tmp) and renames the result to `path`; a failure leaves the old file as it was. TimError for an OSError."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.part")
    try:
        tmp.unlink(missing_ok=True)
        tmp.touch()
        mode = stat.S_IMODE(tmp.stat().st_mode)
        write(tmp)
        tmp.chmod(mode)  # some writers (safetensors) allow the owner alone
        os.replace(tmp, path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise TimError(f"{path}: cannot be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. TimError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TimError(f"{path}: cannot make this folder ({error.strerror})") from None


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named tensors: their names, shapes, dtypes and bytes."""
    import torch

    found = hashlib.sha256()
    for name, value in tensors:
        found.update(repr((name, tuple(value.shape), value.dtype)).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
