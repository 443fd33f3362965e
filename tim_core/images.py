"""Images as files, tensors and PIL images; labelled contact sheets."""

from __future__ import annotations

import logging
import math
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from .errors import TimError
from .files import check_file

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # Pillow would start Ghostscript for PostScript under any name
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm", ".pnm", ".pfm")
MOST_PIXELS, MOST_BYTES = 2**26, 2**29
MOST_MADE = 2**28  # pixels of the images that are in memory together: 3.2 GB
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # that make an image of this EXIF orientation upright
TO_8_BITS = {"L;2": lambda key: key * 85, "L;4": lambda key: key * 17, "RGB;16B": lambda key: tuple(part >> 8 for part in key)}
MIN_WIDTH = 192  # pixels of a cell; smaller images are enlarged by a whole factor, so that pixels stay sharp and the label fits
MARGIN = 8
SHEET_PIXELS = 2**24
PAPER, INK = (24, 24, 28), (235, 235, 235)


def step_label(steps: int, nfe: int, seconds: float) -> str:
    """The label of an image on a sheet: steps, network evaluations and seconds."""
    return f"{steps} step{'s' if steps > 1 else ''} · {nfe} NFE · {seconds:.2f} s"


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright by its EXIF orientation; transparent areas become white.

    Values of more bits are scaled to 8. TimError naming a file that is not an image of FORMATS, is damaged, or has more than
    MOST_PIXELS.
    """
    with _opened(path) as image:
        if image.format == "PNG":
            _check_sums(Path(path))
        return to_rgb(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image file, upright; reads its header alone. TimError as open_image."""
    with _opened(path) as image:
        return image.size[::-1] if 5 <= _orientation(image) <= 8 else image.size


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose format and size are allowed. What Pillow raises on damaged files becomes a TimError."""
    check_file(path)
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise TimError(f"{path}: has more than {MOST_BYTES / 2**20:g} MiB; save it again, without its metadata")
        with _quiet(), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise TimError(f"{path}: has {width}x{height} pixels; at most {MOST_PIXELS / 1e6:.0f} megapixels are read")
            yield image
    except (TimError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise TimError(f"{path}: has too many pixels; at most {MOST_PIXELS / 1e6:.0f} megapixels are read") from None
    except UnidentifiedImageError:
        raise TimError(f"{path}: not an image that can be read; use a PNG, JPEG, WebP, TIFF, BMP, GIF or PNM file") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise TimError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'damaged image'})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Pillow logs and libtiff writes to stderr about damaged files, large images and odd metadata."""
    logger = logging.getLogger("PIL")
    level, kept = logger.level, None
    logger.setLevel(logging.CRITICAL)
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (AttributeError, OSError, ValueError):  # no stderr
        pass
    try:
        with warnings.catch_warnings(), tempfile.TemporaryFile() as nowhere:
            warnings.simplefilter("ignore")
            if kept is not None:
                os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        logger.setLevel(level)
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)


def _check_sums(path: Path) -> None:
    """ValueError if the pixel data of a PNG are not those that were written; Pillow checks the metadata alone."""
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind != b"IDAT":
                file.seek(length + 4, os.SEEK_CUR)
            elif struct.pack(">I", zlib.crc32(file.read(length), zlib.crc32(kind))) != file.read(4):
                raise ValueError("checksum")


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as upright 8-bit RGB; transparent areas become white."""
    tile = getattr(image, "tile", None)
    raw = tile[0][3] if tile else ""  # how the file stores a pixel; gone once it is loaded
    orientation = _orientation(image)
    alpha = None
    scaled = TO_8_BITS.get(raw) if isinstance(raw, str) else None
    if scaled and (key := image.info.get("transparency")) is not None:  # Pillow scales the pixels, not the transparent colour
        image.info["transparency"] = scaled(key)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        key = image.info.get("transparency")
        alpha = Image.fromarray((values != key).astype(np.uint8) * 255) if isinstance(key, int) else None
        image = Image.fromarray(_to_8_bits(values, image))
    elif image.mode == "LAB":
        from PIL import ImageCms  # littleCMS, which ComfyUI does not load at start

        image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, the EXIF data are damaged, or Pillow heeds it by itself, as in TIFF."""
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of many kinds; the image itself may be whole
        return 1
    return found if isinstance(found, int) else 1


def _to_8_bits(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits, or floats -> uint8.

    White is the largest number of the file's bit depth. A float or 32-bit file does not say what white is: it is the first of 1, 255, 65535
    and the largest 32-bit integer that no value exceeds, and 1 for floats below 16 that are not whole (highlights). TimError if
    values are not finite.
    """
    tags = getattr(image, "tag_v2", {})
    bits, signed = _first(tags.get(258, 16)), _first(tags.get(339, 1)) == 2
    if not np.isfinite(values).all():
        raise TimError(f"{getattr(image, 'filename', 'image')}: has values that are not finite")
    top = float(values.max(initial=0))
    if values.dtype.kind == "f":
        highlights = top < 16 and bool((values % 1 != 0).any())
        white = 1.0 if top <= 1 or highlights else next((white for white in (255.0, 65535.0) if top <= white), top)
    elif bits == 32:
        if not signed:
            values = values.astype(np.int32).view(np.uint32)
            top = float(values.max(initial=0))
        white = next((white for white in (255.0, 65535.0) if top <= white), 2.0**31 - 1 if signed else 2.0**32 - 1)
    else:
        white = 2.0 ** (bits - signed) - 1
    grey = values.astype(np.float32) * np.float32(255 / white)
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow heeds in 8 bits alone
        grey = 255 - grey
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def to_pil(image: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] -> 8 bits, rounded down as ComfyUI does when it saves images."""
    return Image.fromarray(np.clip(255.0 * image.detach().cpu().float().numpy(), 0, 255).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image -> (1, H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), np.float32)).div_(255)[None]


def check_pixels(name: str, count: int, width: int, height: int, advice: str) -> None:
    """TimError if `count` images, made together, would take more memory than MOST_MADE. name: of what asks for them."""
    if count * width * height > MOST_MADE:
        raise TimError(f"{name}: {count} images of {width}x{height} are over {MOST_MADE / 1e6:.0f} megapixels; use {advice}")


def contact_sheet(images: Sequence[Tensor] | Tensor, labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Images (H, W, 3) in [0, 1], or batches of them (B, H, W, 3), in a grid, each above its label.

    columns: cells per row; None makes even rows of at most four. Long labels wrap. Small images are enlarged, and all are shrunk if the
    sheet were over SHEET_PIXELS; labels grow with the cells. Reads one cell at a time. ValueError unless there is one label per image,
    and at least one image.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"contact sheet: {len(images)} images and {len(labels)} labels; give one label per image, and at least one image")
    columns = min(columns or math.ceil(len(images) / math.ceil(len(images) / 4)), len(images))
    layout = SheetLayout(images, labels, columns, 1.0)
    while layout.width * layout.height > SHEET_PIXELS:
        layout = SheetLayout(images, labels, columns, layout.scale * min(0.95, (SHEET_PIXELS / (layout.width * layout.height)) ** 0.5))
    sheet = Image.new("RGB", (layout.width, layout.height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, cell in enumerate(images):
        (left, top), size = layout.place(i), layout.sizes[i]
        image = to_pil(_side_by_side(cell))
        method = Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.LANCZOS
        sheet.paste(image.resize(size, method), (left, top))
        pen.multiline_text((left, top + size[1] + MARGIN // 2), layout.texts[i], INK, layout.font)
    return sheet


class SheetLayout:
    """Where the cells of a contact sheet stand, with images at `scale` times the size at which they are shown without a limit."""

    def __init__(self, images: Sequence[Tensor] | Tensor, labels: Sequence[str], columns: int, scale: float):
        self.scale, self.columns = scale, columns
        shown = []
        for cell in images:
            across, down = _grid(len(cell) if cell.ndim == 4 else 1)
            width, height = across * cell.shape[-2], down * cell.shape[-3]
            shown.append((width, height, math.ceil(MIN_WIDTH / width)))
        self.sizes = [tuple(max(1, round(side * factor * scale)) for side in (width, height)) for width, height, factor in shown]
        self.font = ImageFont.load_default(size=max(15, max(width for width, _ in self.sizes) // 24))
        self.texts = [_wrap(label, width, self.font) for label, (width, _) in zip(labels, self.sizes)]
        pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        heights = [height + math.ceil(pen.multiline_textbbox((0, 0), text, self.font)[3]) + MARGIN
                   for (_, height), text in zip(self.sizes, self.texts)]
        self.widths = [max(width for width, _ in self.sizes[j::columns]) for j in range(columns)]
        self.heights = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
        self.width = sum(self.widths) + MARGIN * (columns + 1)
        self.height = sum(self.heights) + MARGIN * (len(self.heights) + 1)

    def place(self, i: int) -> tuple[int, int]:
        """Left and top of cell i."""
        row, column = divmod(i, self.columns)
        return sum(self.widths[:column]) + MARGIN * (column + 1), sum(self.heights[:row]) + MARGIN * (row + 1)


def _grid(count: int) -> tuple[int, int]:
    """Images per row and rows of a cell that shows `count` of them."""
    across = math.ceil(count**0.5)
    return across, math.ceil(count / across)


def _side_by_side(cell: Tensor) -> Tensor:
    """A cell (H, W, 3) or (B, H, W, 3) as one image (H, W, 3); what a last row lacks is paper."""
    if cell.ndim == 3:
        return cell
    across, down = _grid(len(cell))
    paper = torch.tensor(PAPER, dtype=cell.dtype) / 255
    whole = paper.expand(across * down, *cell.shape[1:3], 3).clone()
    whole[: len(cell)] = cell
    return whole.unflatten(0, (down, across)).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _wrap(label: str, width: int, font) -> str:
    """The label in lines of at most `width` pixels where its words allow that."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
