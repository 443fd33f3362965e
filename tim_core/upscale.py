"""Upscaling at native resolution: a picture is enlarged, re-noised, and sampled again at the size it is to have.

The network sees the whole picture, no tiles (the paper trains at native sizes up to 4096, section 4.1): what the enlargement could
not know, transitions from `strength` to 0 draw. Several stages double a picture time and again, each with steps of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import schedule
from .errors import TimError

MAX_STAGES = 8


def target_size(width: int, height: int, new_width: int = 0, new_height: int = 0, factor: float = 2.0) -> tuple[int, int]:
    """The size to reach: the one asked for; with one side 0, that side by the picture's proportions; with both 0, by the factor."""
    for name, side in (("width", new_width), ("height", new_height)):
        if isinstance(side, bool) or not isinstance(side, int) or side < 0:
            raise TimError(f"{name}: found {side}, expected a number of pixels, or 0")
    if not new_width and not new_height:
        if not (math.isfinite(factor) and factor > 0):
            raise TimError(f"factor: found {factor}, expected a number greater than 0")
        return round(width * factor), round(height * factor)
    return new_width or round(width * new_height / height), new_height or round(height * new_width / width)


def stage_sizes(size: tuple[int, int], target: tuple[int, int], stages: int, unit: int) -> list[tuple[int, int]]:
    """The (width, height) after each stage, multiples of `unit` pixels, every stage enlarging by the same factor; the last is the target.

    TimError for a number of stages that makes no sense, or a target smaller than one unit.
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= MAX_STAGES:
        raise TimError(f"stages: found {stages}, expected a whole number from 1 to {MAX_STAGES}")
    if min(target) < 1:
        raise TimError(f"size: found {target[0]}x{target[1]} pixels, expected at least {unit}x{unit}")

    def between(before: int, after: int, part: float) -> int:
        return max(1, int(before ** (1 - part) * after**part / unit + 0.5)) * unit

    sides = [[between(before, after, k / stages) for k in range(1, stages + 1)] for before, after in zip(size, target)]
    return list(zip(*sides))


def stage_steps(steps: int | str | Sequence[int], stages: int) -> list[int]:
    """How many steps each stage takes: one number for all of them, or as many as there are stages ("8, 4")."""
    words = steps.replace(",", " ").split() if isinstance(steps, str) else [steps] if isinstance(steps, int) else list(steps)
    try:
        counts = [int(word) for word in words]
    except (TypeError, ValueError):
        counts = []
    if len(counts) == 1:
        counts *= stages
    if len(counts) != stages or min(counts, default=0) < 1:
        raise TimError(f"steps: found '{steps}', expected a whole number of at least 1, or {stages} of them, one for each stage")
    return counts


def enlarge(images: Tensor, width: int, height: int) -> Tensor:
    """(B, h, w, 3) in [0, 1] to (B, height, width, 3), bicubic; what other proportions leave over is cut off at both ends."""
    old_height, old_width = images.shape[1:3]
    scale = max(width / old_width, height / old_height)
    cut_width, cut_height = min(old_width, round(width / scale)), min(old_height, round(height / scale))
    top, left = (old_height - cut_height) // 2, (old_width - cut_width) // 2
    kept = images[:, top : top + cut_height, left : left + cut_width].movedim(-1, 1)
    return F.interpolate(kept.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1).movedim(1, -1)


def upscale(
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    steps: Sequence[int],
    strength: float,
    *,
    encode: Callable[[Tensor], Tensor],
    sample: Callable[[Tensor, Tensor, int], Tensor],
    decode: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Pictures (B, h, w, 3) in [0, 1] through the stages -> pictures of the last size, and their latents.

    encode: pictures -> clean latents; sample(latents, times, stage): mixes noise in at times[0] and goes to times[-1] = 0; decode:
    latents -> pictures. strength is times[0], and all steps run, whatever it is. TimError if it is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise TimError(f"strength: found {strength}, expected more than 0 and at most 1")
    latents = torch.empty(0)
    for stage, ((width, height), count) in enumerate(zip(sizes, steps, strict=True)):
        latents = sample(encode(enlarge(images, width, height)), schedule.uniform(count, strength), stage)
        images = decode(latents)
    return images, latents
