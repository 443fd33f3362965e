"""Labelled pictures in a grid: what a sweep of steps shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_WIDTH = 192  # pixels of a cell: smaller pictures grow by a whole factor, so that their pixels stay crisp and a label fits
MARGIN = 8
PAPER, INK = (24, 24, 28), (235, 235, 235)


def step_label(steps: int, nfe: int, seconds: float) -> str:
    return f"{steps} step{'s' if steps > 1 else ''} · {nfe} NFE · {seconds:.2f} s"


def to_pil(image: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] -> 8 bits, cut off rather than rounded, as ComfyUI saves pictures."""
    return Image.fromarray(np.clip(255.0 * image.detach().cpu().float().numpy(), 0, 255).astype(np.uint8))


def to_tensor(picture: Image.Image) -> Tensor:
    """-> (1, H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255.0)[None]


def contact_sheet(images: Sequence[Tensor] | Tensor, labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures, each (H, W, 3) in [0, 1], with a label under each; in even rows of at most four unless `columns` says otherwise.

    A long label is broken between words. ValueError if the numbers of pictures and labels differ, or there are none.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"contact sheet: found {len(images)} pictures and {len(labels)} labels, expected as many of each, at least one")
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


def _tile(picture: Image.Image, label: str, font) -> Image.Image:
    """The picture, enlarged if it is tiny, above its label."""
    factor = math.ceil(MIN_WIDTH / picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= picture.width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    text = "\n".join(lines)
    pen = ImageDraw.Draw(picture)
    bottom = pen.multiline_textbbox((0, 0), text, font)[3]
    tile = Image.new("RGB", (picture.width, picture.height + math.ceil(bottom) + MARGIN), PAPER)
    tile.paste(picture)
    ImageDraw.Draw(tile).multiline_text((0, picture.height + MARGIN // 2), text, INK, font)
    return tile
