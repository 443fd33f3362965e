"""Upscaling at native resolution: enlarge an image, add noise up to the time `strength`, and sample it at the new size.

The network sees the whole image, without tiles; the paper trains at native sizes up to 4096 (section 4.1). With several stages the image
grows by the same factor in each, and each has its own steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import schedule
from .errors import TimError
from .limits import MAX_FACTOR, MAX_SIDE, MAX_STAGES, MAX_STEPS, MIN_FACTOR


def target_size(width: int, height: int, new_width: int = 0, new_height: int = 0, factor: float = 2.0) -> tuple[int, int]:
    """The target (width, height): as given; a side of 0 keeps the aspect ratio; both 0 multiply by `factor`."""
    for name, side in (("width", new_width), ("height", new_height)):
        if isinstance(side, bool) or not isinstance(side, int) or side < 0:
            raise TimError(f"{name}: {side} is not a whole number of pixels, or 0")
    if not new_width and not new_height:
        if not MIN_FACTOR <= factor <= MAX_FACTOR:
            raise TimError(f"factor: {factor} is outside {MIN_FACTOR:g} to {MAX_FACTOR:g}")
        return round(width * factor), round(height * factor)
    return new_width or round(width * new_height / height), new_height or round(height * new_width / width)


def stage_sizes(size: tuple[int, int], target: tuple[int, int], stages: int, multiple: int) -> list[tuple[int, int]]:
    """The (width, height) after each stage, rounded to multiples of `multiple` pixels; every stage enlarges by the same factor.

    TimError unless stages is from 1 to MAX_STAGES, the target at least one pixel and at most MAX_SIDE a side, and its aspect ratio leaves
    something of the image.
    """
    check_stages(stages)
    if min(target) < 1:
        raise TimError(f"size: {target[0]}x{target[1]} is too small; use at least {multiple}x{multiple}")
    if max(target) > MAX_SIDE:
        raise TimError(f"size: {target[0]}x{target[1]} is over {MAX_SIDE} pixels a side; reduce factor, width or height")
    if min(_crop(size, target)) < 1:
        shape = f"{target[0]}x{target[1]} keeps less than a pixel of an image of {size[0]}x{size[1]}"
        raise TimError(f"size: {shape}; use a similar aspect ratio")

    def between(before: int, after: int, part: float) -> int:
        cells = int(before ** (1 - part) * after**part / multiple + 0.5)
        return min(max(1, cells), MAX_SIDE // multiple) * multiple

    sides = [[between(before, after, k / stages) for k in range(1, stages + 1)] for before, after in zip(size, target)]
    return list(zip(*sides))


def check_stages(stages: int) -> None:
    """TimError unless `stages` is a whole number from 1 to MAX_STAGES."""
    if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= MAX_STAGES:
        raise TimError(f"stages: {stages} is not a whole number from 1 to {MAX_STAGES}")


def check_strength(strength: float) -> None:
    """TimError unless `strength` is above 0 and at most 1."""
    if not 0 < strength <= 1:
        raise TimError(f"strength: {strength} is not above 0 and at most 1")


def stage_steps(steps: int | str | Sequence[int], stages: int) -> list[int]:
    """Step counts per stage, from one number for all or one per stage ("8, 4"). TimError for unusable values."""
    check_stages(stages)
    words = steps.replace(",", " ").split() if isinstance(steps, str) else [steps] if isinstance(steps, int) else list(steps)
    counts = [int(word) for word in words if re.fullmatch(r"[0-9]{1,9}", str(word))]
    if not len(counts) == len(words) in (1, stages) or not all(1 <= count <= MAX_STEPS for count in counts):
        raise TimError(f"steps: '{steps}' is not a whole number from 1 to {MAX_STEPS}, or {stages} of them, one per stage")
    return counts * stages if len(counts) == 1 else counts


def enlarge(images: Tensor, width: int, height: int) -> Tensor:
    """Resize (B, h, w, 3) in [0, 1] to (B, height, width, 3), bicubic; cropped at both ends if the aspect ratio differs."""
    old_height, old_width = images.shape[1:3]
    cut_width, cut_height = _crop((old_width, old_height), (width, height))
    top, left = (old_height - cut_height) // 2, (old_width - cut_width) // 2
    kept = images[:, top : top + cut_height, left : left + cut_width].movedim(-1, 1)
    return F.interpolate(kept.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1).movedim(1, -1)


def _crop(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that is left of an image at the aspect ratio of `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return min(size[0], round(target[0] / scale)), min(size[1], round(target[1] / scale))


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
    """Run images (B, h, w, 3) in [0, 1] through the stages -> images of the last size, and their latents.

    encode: images -> clean latents. sample(latents, times, stage): adds noise up to times[0] and samples to times[-1] = 0. decode:
    latents -> images. strength is times[0]; all steps run, whatever it is. TimError unless it is above 0 and at most 1.
    """
    check_strength(strength)
    latents = torch.empty(0)
    for stage, ((width, height), count) in enumerate(zip(sizes, steps, strict=True)):
        latents = sample(encode(enlarge(images, width, height)), schedule.uniform(count, strength), stage)
        images = decode(latents)
    return images, latents
