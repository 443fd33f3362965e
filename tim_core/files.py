"""Reads regular files of bounded size, writes files atomically, makes folders, hashes tensors."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
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

PART_ENDINGS = (".safetensors", ".bin", ".pt", ".json", ".model")  # of the files in a folder of parts
LONGEST_PATH = 4000  # bytes; Linux takes 4095, and temporary files need some
MOST_TEXT = 2**24  # bytes of a text or JSON file; a parsed value takes up to 30 times as much memory


def is_file(path: str | Path) -> bool:
    """Whether a file exists. TimError if it exists and is not regular: opening a FIFO waits for ever, and a device has no end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # no such file, or no legal name
        return False
    if stat.S_ISDIR(mode):
        raise TimError(f"{path}: is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise TimError(f"{path}: not a regular file; copy its contents to a file")
    return True


def check_file(path: str | Path) -> None:
    """TimError unless `path` is a regular file, or a link to one. Nothing is opened."""
    if not is_file(path):
        raise TimError(f"{path or repr('')}: no such file; check the path")


def check_output(path: str | Path, kind: str = "file") -> None:
    """TimError if no file can be written to `path`: a folder, something that is no regular file, or no place for one. Nothing is opened.

    kind: what is to be written.
    """
    try:
        target = Path(os.path.realpath(path, strict=False))  # of a link, what it leads to is replaced
        mode = target.stat().st_mode if target.exists() else None
        parent = target.parent
        has_parent = parent.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # no legal name
        raise TimError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or one_line(error)}); use another name") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise TimError(f"{path}: is a folder; give the name of a {kind}")
    if mode is not None and not stat.S_ISREG(mode) or target.is_symlink():
        raise TimError(f"{path}: not a regular file, and would be replaced; give another name")
    if not has_parent:
        raise TimError(f"{path}: folder {Path(path).parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise TimError(f"{path}: folder {Path(path).parent} is not writable")
    if mode is not None and not os.access(target, os.W_OK):
        raise TimError(f"{path}: is write-protected; make it writable, or give another name")
    if len(os.fsencode(target.name)) > _longest_name(parent):
        raise TimError(f"{path}: its name is too long; use another name")


def check_new_output(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """As check_output and check_separate, for a file whose folders may still have to be made."""
    above = next(one for one in (path.parent, *path.absolute().parents) if os.path.lexists(one))
    longest = _longest_name(above)
    if len(os.fsencode(path.absolute())) > LONGEST_PATH or any(len(os.fsencode(part)) > longest for part in path.parts):
        raise TimError(f"{path}: its name is too long; use another name")
    if not above.is_dir():
        raise TimError(f"{above}: is not a folder; name another one")
    if above == path.parent:
        check_output(path)
        check_separate(path, inputs)
    elif not os.access(above, os.W_OK):
        raise TimError(f"{above}: folder is not writable; name another one")


def check_separate(path: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """TimError if writing `path` would replace an input: the same file under any name, or a weight file of a folder. Opens nothing."""
    for source in inputs if os.path.exists(path) else ():
        for file in _files_of(source):
            if _is_same(path, file):
                raise TimError(f"{path}: is the same file as the input {file}, which it would replace; give another name")


def _files_of(source: str | Path | None) -> list[Path]:
    """The file that an input is, or the files that a folder of parts is read from."""
    if source is None:
        return []
    source = user_path(source)
    try:
        if not source.is_dir():
            return [source]
        return [file for pattern in ("*", "*/*") for file in source.glob(pattern) if file.suffix in PART_ENDINGS]
    except (OSError, ValueError):  # no legal name
        return []


def _is_same(path: str | Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one of them is not there
        return False


def _longest_name(folder: Path) -> int:
    """The most bytes of a file name."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # as on Windows
        return 255


def user_path(path: str | Path) -> Path:
    """The path, with a leading ~ as the home folder. A user who does not exist stays as written."""
    return Path(os.path.expanduser(path))


def read_bytes(path: str | Path, most: int = MOST_TEXT) -> bytes:
    """The contents of a regular file. TimError if it cannot be read, or has more than `most` bytes."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise TimError(f"{path}: has more than {most / 2**20:g} MiB; give another file")
    return data


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """The text of a regular file in UTF-8, without a byte order mark. TimError as in read_bytes, or if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise TimError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def parse_json(data: str | bytes, name: str, most: int = MOST_TEXT):
    """A JSON value. TimError naming the source for malformed, deeply nested or very long JSON."""
    if len(data) > most:
        raise TimError(f"{name}: has more than {most / 2**20:g} MiB of JSON")
    try:
        return json.loads(data)
    except RecursionError:
        raise TimError(f"{name}: JSON nested too deeply") from None
    except ValueError as error:
        raise TimError(f"{name}: not valid JSON ({one_line(error)})") from None


def parse_object(data: str | bytes, name: str) -> dict:
    """A JSON object. TimError naming the source for any other JSON value, and as `parse_json`."""
    value = parse_json(data, name)
    if not isinstance(value, dict):
        raise TimError(f"{name}: holds a JSON {type(value).__name__}; it must be an object")
    return value


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls write(tmp) and renames the result to `path`; a failure leaves the old file as it was. TimError for an OSError.

    Every writer has a folder of its own beside `path`. Folders of writers that were killed are removed. A link stays; the file that it
    leads to is replaced.
    """
    check_output(path)
    path = Path(os.path.realpath(path))
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
    except (OSError, ValueError, RecursionError) as error:
        raise TimError(f"{path}: cannot make this folder ({getattr(error, 'strerror', None) or one_line(error)})") from None


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of named tensors: their names, shapes, dtypes and bytes."""
    import torch

    found = hashlib.sha256()
    for name, value in tensors:
        found.update(repr((name, tuple(value.shape), value.dtype)).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
