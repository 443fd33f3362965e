"""Images as files, tensors and PIL images; labelled contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import TimError

MIN_WIDTH = 192  # pixels of a cell; smaller images are enlarged by a whole factor, so that pixels stay sharp and the label fits
MARGIN = 8
PAPER, INK = (24, 24, 28), (235, 235, 235)


def step_label(steps: int, nfe: int, seconds: float) -> str:
    return f"{steps} step{'s' if steps > 1 else ''} · {nfe} NFE · {seconds:.2f} s"


def open_image(path: Path) -> Image.Image:
    """Read an image file as RGB, upright by its EXIF orientation, without alpha. TimError if Pillow cannot read it."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise TimError(f"{path}: not an image that Pillow can read; use a PNG, JPEG or WebP file") from None
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror or 'damaged image'})") from None


def to_pil(image: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] -> 8 bits, rounded down as ComfyUI does when it saves images."""
    return Image.fromarray(np.clip(255.0 * image.detach().cpu().float().numpy(), 0, 255).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image -> (1, H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255.0)[None]


def contact_sheet(images: Sequence[Tensor] | Tensor, labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Images (H, W, 3) in [0, 1] in a grid, each above its label.

    columns: images per row; None makes even rows of at most four. Long labels wrap. ValueError unless there is one label per image, and
    at least one image.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"contact sheet: {len(images)} images and {len(labels)} labels; give one label per image, and at least one image")
    columns = min(columns or math.ceil(len(images) / math.ceil(len(images) / 4)), len(images))
    font = ImageFont.load_default(size=15)
    tiles = [_tile(to_pil(image), label, font) for image, label in zip(images, labels)]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    widths = [max(tile.width for tile in tiles[j::columns]) for j in range(columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + MARGIN * (columns + 1), sum(heights) + MARGIN * (len(rows) + 1)), PAPER)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (sum(widths[:j]) + MARGIN * (j + 1), sum(heights[:i]) + MARGIN * (i + 1)))
    return sheet


def _tile(image: Image.Image, label: str, font) -> Image.Image:
    """The image, enlarged if it is narrower than a cell, above its label."""
    factor = math.ceil(MIN_WIDTH / image.width)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= image.width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    text = "\n".join(lines)
    pen = ImageDraw.Draw(image)
    bottom = pen.multiline_textbbox((0, 0), text, font)[3]
    tile = Image.new("RGB", (image.width, image.height + math.ceil(bottom) + MARGIN), PAPER)
    tile.paste(image)
    ImageDraw.Draw(tile).multiline_text((0, image.height + MARGIN // 2), text, INK, font)
    return tile
