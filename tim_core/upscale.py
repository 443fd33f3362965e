"""Upscaling at native resolution: enlarge an image, add noise up to the time `strength`, and sample it at the new size.

The network sees the whole image; the paper trains at native sizes up to 4096 (section 4.1). What does not fit in memory is evaluated in
overlapping tiles, which are blended in every step. With several stages the image grows by the same factor in each, and each has its own
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import schedule
from .errors import TimError
from .images import to_pil, to_tensor
from .limits import MAX_FACTOR, MAX_SIDE, MAX_STAGES, MIN_FACTOR
from .ranges import check_counts, parse_numbers

RESIZE_METHODS = ("bicubic", "lanczos", "bilinear", "area", "nearest-exact")  # as in ComfyUI's node Upscale Image


def target_size(width: int, height: int, new_width: int = 0, new_height: int = 0, factor: float = 2.0) -> tuple[int, int]:
    """The target (width, height): as given; a side of 0 keeps the aspect ratio; both 0 multiply by `factor`.

    TimError if it is less than MIN_FACTOR times the size.
    """
    for name, side in (("width", new_width), ("height", new_height)):
        if isinstance(side, bool) or not isinstance(side, int) or side < 0:
            raise TimError(f"{name}: {side} is not a whole number of pixels, or 0")
    if not new_width and not new_height:
        if not MIN_FACTOR <= factor <= MAX_FACTOR:
            raise TimError(f"factor: {factor} is outside {MIN_FACTOR:g} to {MAX_FACTOR:g}")
        return round(width * factor), round(height * factor)
    target = new_width or round(width * new_height / height), new_height or round(height * new_width / width)
    least = math.ceil(width * MIN_FACTOR), math.ceil(height * MIN_FACTOR)
    if target[0] < least[0] or target[1] < least[1]:
        raise TimError(f"size: {target[0]}x{target[1]} is too small for an image of {width}x{height}; use at least {least[0]}x{least[1]}")
    return target


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
    scale = max(after / before for before, after in zip(size, target))
    if min(round(after / scale) for after in target) < 1:
        shape = f"{target[0]}x{target[1]} keeps less than a pixel of an image of {size[0]}x{size[1]}"
        raise TimError(f"size: {shape}; use a similar aspect ratio")

    def between(before: int, after: int, part: float) -> int:
        side = after if part == 1 else before * (after / before) ** part  # exactly `before` where the two are equal
        cells = int(side / multiple + 0.5)
        return min(max(1, cells), MAX_SIDE // multiple) * multiple

    sides = [[between(before, after, k / stages) for k in range(1, stages + 1)] for before, after in zip(size, target)]
    return list(zip(*sides))


def check_stages(stages: int) -> None:
    """TimError unless `stages` is a whole number from 1 to MAX_STAGES."""
    if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= MAX_STAGES:
        raise TimError(f"stages: {stages} is not a whole number from 1 to {MAX_STAGES}")


def check_images(images: Tensor) -> None:
    """TimError unless images are (B, H, W, 3) floats in [0, 1]."""
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise TimError(f"images: shape {list(images.shape)} is not (B, H, W, 3)")
    low, high = (value.item() for value in images.aminmax())
    if not images.is_floating_point() or not (low >= -0.01 and high <= 1.01):
        raise TimError(f"images: {images.dtype} values from {low:g} to {high:g}; give floats from 0 to 1")


def check_strength(strength: float) -> None:
    """TimError unless `strength` is above 0 and at most 1."""
    if not 0 < strength <= 1:
        raise TimError(f"strength: {strength} is not above 0 and at most 1")


def stage_steps(steps: int | str | Sequence[int], stages: int, name: str = "steps") -> list[int]:
    """Step counts per stage, from one number for all or one per stage ("8, 4"). TimError for unusable values.

    name: of the setting, for the error.
    """
    check_stages(stages)
    counts = parse_numbers(steps, name, distinct=False) if isinstance(steps, str) else [steps] if isinstance(steps, int) else list(steps)
    if len(counts) not in (1, stages):
        wanted = f"one, or {stages} of them, one per stage" if stages > 1 else "one, or set stages"
        raise TimError(f"{name}: '{steps}' has {len(counts)} numbers; use {wanted}")
    return check_counts(counts * stages if len(counts) == 1 else counts, name, distinct=False)


def enlarge(images: Tensor, width: int, height: int, method: str = "bicubic") -> Tensor:
    """Resize (B, h, w, 3) in [0, 1] to (B, height, width, 3), cropped at both ends if the aspect ratio differs.

    Equal to ComfyUI's node Upscale Image with this method and crop "center"; bicubic overshoots [0, 1] at edges. TimError for an unknown
    method.
    """
    if method not in RESIZE_METHODS:
        raise TimError(f"resize_method: '{method}' is not offered; choose {', '.join(RESIZE_METHODS)}")
    rows, columns = _crop(images.shape[1], images.shape[2], height, width)
    images = images[:, rows, columns]
    if method == "lanczos":
        return torch.cat([to_tensor(to_pil(image).resize((width, height), Image.Resampling.LANCZOS)) for image in images]).to(images.device)
    return F.interpolate(images.movedim(-1, 1).float(), (height, width), mode=method).movedim(1, -1)


def crop_mask(mask: Tensor, size: tuple[int, int], width: int, height: int) -> Tensor:
    """The part of a mask (B, h, w) that `enlarge` keeps for width x height of an image of `size`, over which the mask is stretched."""
    rows, columns = _crop(size[1], size[0], height, width)
    top = min(round(rows.start * mask.shape[1] / size[1]), (mask.shape[1] - 1) // 2)
    left = min(round(columns.start * mask.shape[2] / size[0]), (mask.shape[2] - 1) // 2)
    return mask[:, top : mask.shape[1] - top, left : mask.shape[2] - left]


def _crop(old_height: int, old_width: int, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that have the new aspect ratio, in the middle; at least one of each."""
    old_aspect, aspect = old_width / old_height, width / height
    left = round((old_width - old_width * aspect / old_aspect) / 2) if old_aspect > aspect else 0
    top = round((old_height - old_height * old_aspect / aspect) / 2) if old_aspect < aspect else 0
    top, left = min(top, (old_height - 1) // 2), min(left, (old_width - 1) // 2)
    return slice(top, old_height - top), slice(left, old_width - left)


def paste(below: Tensor, above: Tensor, mask: Tensor) -> Tensor:
    """`above` where the mask (b, h, w), resized to them, is 1, and `below` where it is 0; both are (B, H, W, 3).

    Masks for fewer images are repeated in order, those beyond B are left out, as in ComfyUI.
    """
    mask = mask[[i % len(mask) for i in range(len(below))]]
    mask = F.interpolate(mask[:, None].float(), below.shape[1:3], mode="bilinear").movedim(1, -1).to(below)
    return above.to(below) * mask + below * (1 - mask)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `length` evenly, neighbours sharing at least `overlap`; 0 alone if one is enough."""
    count = 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """A function of (B, C, h, w) on overlapping tiles of at most tile x tile cells -> (B, C, H, W), blended where they overlap.

    Neighbours share at least a quarter of a tile, over which their weights rise and fall linearly.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return function(x)
    overlap = max(1, tile // 4)
    total, weights = torch.zeros(x.shape, dtype=torch.float32, device=x.device), torch.zeros(height, width, device=x.device)
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            rows, columns = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
            made = function(x[..., rows, columns])
            weight = (_ramp(rows, height, overlap)[:, None] * _ramp(columns, width, overlap)).to(x.device)
            total[..., rows, columns] += made * weight
            weights[rows, columns] += weight
    return (total / weights).to(x.dtype)


def _ramp(part: slice, length: int, overlap: int) -> Tensor:
    """Weights of a tile's cells along one side: 1, falling to 1 / (overlap + 1) at an end that is not the image's."""
    cells = torch.arange(part.start, part.stop)
    before = cells - part.start if part.start > 0 else torch.full_like(cells, overlap)
    after = part.stop - 1 - cells if part.stop < length else torch.full_like(cells, overlap)
    return (torch.minimum(before, after).clamp(max=overlap) + 1) / (overlap + 1)


def upscale(
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    steps: Sequence[int],
    strength: float,
    *,
    encode: Callable[[Tensor], Tensor],
    sample: Callable[[Tensor, Tensor, int], Tensor],
    decode: Callable[[Tensor], Tensor],
    resize: Callable[[Tensor, int, int], Tensor] = enlarge,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run images (B, h, w, 3) in [0, 1] through the stages -> images of the last size, and their latents.

    encode: images -> clean latents. sample(latents, times, stage): adds noise up to times[0] and samples to times[-1] = 0. decode:
    latents -> images. resize(images, width, height) enlarges. mask (b, h, w) of the given images: what is 0 shows the enlarged image.
    strength is times[0]; all steps run, whatever it is. TimError unless it is above 0 and at most 1.
    """
    check_strength(strength)
    latents, size = torch.empty(0), (images.shape[2], images.shape[1])
    for stage, ((width, height), count) in enumerate(zip(sizes, steps, strict=True)):
        enlarged = resize(images, width, height)
        latents = sample(encode(enlarged), schedule.uniform(count, strength), stage)
        images = decode(latents)
        if mask is not None:
            images = paste(enlarged, images, crop_mask(mask, size, width, height))
    return images, latents
