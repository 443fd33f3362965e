"""Writes files atomically, makes folders, hashes tensors."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TimError, one_line

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls write(tmp) and renames the result to `path`; a failure leaves the old file as it was. TimError for an OSError.

    Every writer has a folder of its own beside `path`. Folders of writers that were killed are removed.
    """
    path = Path(path)
    try:
        with _own_folder(path) as folder:
            tmp = folder / "file"
            tmp.touch()
            mode = stat.S_IMODE(tmp.stat().st_mode)
            write(tmp)
            tmp.chmod(mode)  # some writers (safetensors) allow the owner alone
            os.replace(tmp, path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise TimError(f"{path}: cannot be written ({reason})") from error


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked while in use and removed afterwards."""
    start = path.name[:32]  # short, so that every legal name can be written
    for other in path.parent.glob(f"{glob.escape(start)}.????????.part"):
        with contextlib.suppress(FileNotFoundError), _locked(other) as abandoned:
            if abandoned and time.time() - other.stat().st_mtime > 3:  # a new folder may not be locked yet
                shutil.rmtree(other, ignore_errors=True)
    folder = path.with_name(f"{start}.{secrets.token_hex(4)}.part")
    folder.mkdir()
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder -> whether nobody else does. False where folders cannot be locked (Windows)."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError):
            yield False
        else:
            yield True


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
