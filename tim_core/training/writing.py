"""Writes the files of a run atomically. A failure, such as a full disk, is a TimError that names the file."""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import one_line, printable
from ..files import atomic_write


def say(text: str) -> None:
    """Prints `tim: TEXT` as one line on stderr, above the progress bar."""
    tqdm.write(f"tim: {printable(text)}", file=sys.stderr)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file."""

    def write(tmp: Path) -> None:
        try:
            save_file(tensors, tmp, metadata)
        except SafetensorError as error:
            raise OSError(one_line(error)) from error

    atomic_write(path, write)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a torch file."""

    def write(tmp: Path) -> None:
        with tmp.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # its writer complains about its position after the file has failed
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    atomic_write(path, write)


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG."""
    atomic_write(path, functools.partial(image.save, format="PNG"))
