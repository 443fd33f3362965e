"""Image files that commands read and write."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import TimError
from ..files import atomic_write

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_picture(path: Path) -> None:
    """Before the work: can a picture be written there?"""
    if path.suffix.lower() not in FORMATS:
        raise TimError(f"{path}: found {f'the ending {path.suffix}' if path.suffix else 'no ending'}, expected {', '.join(FORMATS)}")
    if path.is_dir():
        raise TimError(f"{path}: found a folder, expected the name of a picture to write")
    if not path.parent.is_dir():
        raise TimError(f"{path}: found no folder {path.parent}, expected one to write into")
    if not os.access(path.parent, os.W_OK):
        raise TimError(f"{path}: cannot be written, expected a folder that allows it")


def read_picture(path: Path):
    """-> (1, H, W, 3) in [0, 1], upright; an alpha channel is left out."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..images import to_tensor

    try:
        with Image.open(path) as picture:
            return to_tensor(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise TimError(f"{path}: found no picture, expected a file that Pillow reads, such as a PNG") from None
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror or 'a damaged picture'}), expected a picture") from None


def write_picture(picture, path: Path) -> None:
    kind = FORMATS[path.suffix.lower()]
    atomic_write(path, lambda tmp: picture.save(tmp, format=kind, **({} if kind == "PNG" else {"quality": 95})))
