"""Image files that commands write."""

from __future__ import annotations

from pathlib import Path

from ..errors import TimError, one_line
from ..files import atomic_write, check_output

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_output_image(path: Path) -> None:
    """TimError if no image can be written to `path`; called before the work."""
    if path.suffix.lower() not in FORMATS:
        problem = f"format {path.suffix} is not supported" if path.suffix else "has no file extension"
        raise TimError(f"{path}: {problem}; use {', '.join(FORMATS)}")
    check_output(path, "image file")


def write_image(image, path: Path) -> None:
    """Write a PIL image in the format of the file extension."""
    kind = FORMATS[path.suffix.lower()]
    try:
        atomic_write(path, lambda tmp: image.save(tmp, format=kind, **({} if kind == "PNG" else {"quality": 95})))
    except ValueError as error:  # WebP has at most 16383 pixels a side
        if isinstance(error, TimError):
            raise
        raise TimError(f"{path}: {image.width}x{image.height} pixels cannot be written as {kind} ({one_line(error)}); use .png") from None
