"""The values that sampling takes: the same on the command line, in `Pipeline`, in the nodes and in training."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from .errors import TimError

MAX_SIDE = 4096  # pixels: the largest native size the released model was trained on
MAX_STEPS = 10_000
MAX_BATCH = 4096  # images, as in ComfyUI
MAX_CFG = 100.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MIN_FACTOR, MAX_FACTOR = 0.5, 16.0  # of an enlargement
MAX_STAGES = 8
MAX_LORA_STRENGTH = 100.0  # up and down, as in ComfyUI's LoRA loaders
MIN_TILE = 256  # pixels


def check_batch(batch: int, name: str = "batch") -> None:
    """TimError unless `batch` is a number of images from 1 to MAX_BATCH."""
    if isinstance(batch, bool) or not isinstance(batch, Integral) or not 1 <= batch <= MAX_BATCH:
        raise TimError(f"{name}: {batch} is not a whole number from 1 to {MAX_BATCH}")


def check_lora_strength(strength: float, source: str) -> None:
    """TimError naming the source unless `strength` is a number from -MAX_LORA_STRENGTH to MAX_LORA_STRENGTH."""
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not -MAX_LORA_STRENGTH <= strength <= MAX_LORA_STRENGTH:
        raise TimError(f"{source}: strength {strength!r} is not a number from {-MAX_LORA_STRENGTH:g} to {MAX_LORA_STRENGTH:g}")


def check_size(width: Any, height: Any, multiple: int) -> None:
    """TimError unless both sides are whole multiples of `multiple` pixels up to MAX_SIDE; it names the nearest size that is."""
    sides, most = (width, height), MAX_SIDE // multiple * multiple
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and side >= multiple and side % multiple == 0 for side in sides)
    if whole and max(sides) <= most:
        return
    numbers = [min(side, most) if isinstance(side, (int, float)) and side == side else multiple for side in sides]
    nearest = "x".join(str(max(1, round(max(number, 0) / multiple)) * multiple) for number in numbers)
    problem = f"over {MAX_SIDE} pixels a side" if whole else f"not a multiple of {multiple}"
    raise TimError(f"size: {width}x{height} is {problem}; nearest is {nearest}")


def check_tile(tile: Any, factor: int) -> None:
    """TimError unless `tile` is "auto", "off", or a multiple of `factor` of at least MIN_TILE pixels."""
    whole = isinstance(tile, Integral) and not isinstance(tile, bool)
    if tile not in ("auto", "off") and not (whole and int(tile) >= MIN_TILE and int(tile) % factor == 0):
        raise TimError(f"tile: {tile!r} is not auto, off, or a multiple of {factor} of at least {MIN_TILE} pixels")
