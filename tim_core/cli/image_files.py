"""Image files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import TimError
from ..files import atomic_write

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_output_image(path: Path) -> None:
    """TimError if no image can be written to `path`; called before the work."""
    if path.suffix.lower() not in FORMATS:
        problem = f"format {path.suffix} is not supported" if path.suffix else "has no file extension"
        raise TimError(f"{path}: {problem}; use {', '.join(FORMATS)}")
    if path.is_dir():
        raise TimError(f"{path}: is a folder; name an image file in it")
    if not path.parent.is_dir():
        raise TimError(f"{path}: folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise TimError(f"{path}: folder {path.parent} is not writable")


def write_image(image, path: Path) -> None:
    """Write a PIL image in the format of the file extension."""
    kind = FORMATS[path.suffix.lower()]
    atomic_write(path, lambda tmp: image.save(tmp, format=kind, **({} if kind == "PNG" else {"quality": 95})))
