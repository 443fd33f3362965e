"""The settings that a checkpoint is made for: from its record, else from its shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import TimError
from ..limits import MAX_CFG, MAX_SIDE
from ..models.released import find_release
from .parts import TRANSFORMER, Parts

RECORD = ("native_size", "steps", "cfg", "guidance_interval", "strength")  # keys of a transformer's record
MOST_STEPS = 1000  # of a default
# where neither record nor channels tell: as suits tim-shapes, of factor 8, which was trained mostly at 64x64
OTHER_CELLS = 8  # latent cells per side
OTHER_STRENGTH = 0.3
IMAGE_START, IMAGE_REACH = 0.5, 2


@dataclass(frozen=True)
class Defaults:
    """Image size in pixels, number of steps, guidance scale, times between which guidance acts, and start time of upscaling.

    reach: `far_size` accepts images from noise whose sides are longer or shorter by up to this factor. any_shape: whether it accepts other
    aspect ratios. tim-shapes, whose positions are official (`rope.positions`), draws only those that it was trained on.
    """

    width: int
    height: int
    steps: int = 4
    cfg: float = 2.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    strength: float = 0.5
    reach: float = 1.25
    any_shape: bool = False

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height in pixels, where None is the checkpoint's own."""
        return self.width if width is None else width, self.height if height is None else height

    def far_size(self, width: int, height: int, start: float = 1.0) -> str | None:
        """A warning about a size in pixels that the checkpoint is not made for; None for a size that it is made for.

        start: the time that sampling starts at. From IMAGE_START down the layout comes from an image, and more sizes work.
        """
        from_image = start <= IMAGE_START
        reach = max(self.reach, IMAGE_REACH) if from_image else self.reach
        any_shape = self.any_shape or from_image
        near = all(own <= side * reach and side <= own * reach for side, own in ((width, self.width), (height, self.height)))
        if near and (any_shape or width * self.height == height * self.width):
            return None
        low = f"{math.ceil(self.width / reach)}x{math.ceil(self.height / reach)}"
        high = f"{math.floor(self.width * reach)}x{math.floor(self.height * reach)}"
        wanted = f"or any size from {low} to {high}" if any_shape else f"or the same aspect ratio from {low} to {high}"
        return f"size: {width}x{height} is likely to give a wrong image; this model is made for {self.width}x{self.height}, {wanted}"


def find_defaults(
    record: Mapping[str, Any], channels: int, factor: int, patch_size: int = 1, class_conditional: bool = False
) -> Defaults:
    """The defaults of a transformer with `channels` latent channels, `factor` pixels per latent cell, `patch_size` cells per patch.

    Without a record they are those of the official scripts, which sample classes at 256x256 and 512x512 with guidance intervals of their
    own. TimError naming a key of the record whose value cannot be used.
    """
    multiple = factor * patch_size
    found: dict[str, Any] = {}
    release = find_release(channels, class_conditional)
    side = OTHER_CELLS * factor if release is None else release.side
    if release is None:
        found["strength"] = OTHER_STRENGTH
    elif release.reads(class_conditional):
        found |= {"cfg": release.cfg, "guidance_interval": release.guidance_interval}
        found |= {"any_shape": release.any_shape, "reach": release.reach}
        if "native_size" in record:  # other weights of its architecture
            found["reach"] = min(release.reach, IMAGE_REACH)
    if (size := record.get("native_size")) is None:
        size = (math.ceil(side / multiple) * multiple,) * 2
    elif not (isinstance(size, (list, tuple)) and len(size) == 2
              and all(_is_whole(side, MAX_SIDE) and side % multiple == 0 for side in size)):
        wanted = f"[width, height] in multiples of {multiple} up to {MAX_SIDE}"
        raise TimError(f"native_size: {size!r} is not {wanted}; correct the file's metadata")
    if (steps := record.get("steps")) is not None:
        if not _is_whole(steps, MOST_STEPS):
            raise TimError(f"steps: {steps!r} is not a whole number from 1 to {MOST_STEPS}; correct the file's metadata")
        found["steps"] = steps
    if (cfg := record.get("cfg")) is not None:
        if not _is_number(cfg) or not 1 <= cfg <= MAX_CFG:
            raise TimError(f"cfg: {cfg!r} is not a number from 1 to {MAX_CFG:g}; correct the file's metadata")
        found["cfg"] = float(cfg)
    if (interval := record.get("guidance_interval")) is not None:
        pair = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(_is_number, interval))
        if not (pair and interval[0] < min(interval[1], 1)):
            raise TimError(f"guidance_interval: {interval!r} is not [low, high] with 0 <= low < high and low < 1; "
                           "correct the file's metadata")
        found["guidance_interval"] = (float(interval[0]), float(interval[1]))
    if (strength := record.get("strength")) is not None:
        if not _is_number(strength) or not 0 < strength <= 1:
            raise TimError(f"strength: {strength!r} is not a number above 0 and at most 1; correct the file's metadata")
        found["strength"] = float(strength)
    return Defaults(int(size[0]), int(size[1]), **found)


def read_defaults(parts: Parts) -> Defaults:
    """The settings that a checkpoint is made for; TimError naming the source if its record cannot be used."""
    transformer = parts[TRANSFORMER]
    config = transformer.config
    try:
        return find_defaults(transformer.record, config.in_channels, parts.latent_factor, config.patch_size, config.text_dim is None)
    except TimError as error:
        raise TimError(f"{transformer.source}: {error}") from None


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
