"""Batches of coloured shapes, drawn again for every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import TimError
from ..processes import Shard
from . import scenes

if TYPE_CHECKING:
    from .config import SizesConfig  # needs pydantic, which renders for inference do without


MOST_PIXELS = 2**27  # of a batch


class ShapesPart(NamedTuple):
    """A shard of a batch: its images (B, 3, H, W) float32 in [-1, 1], and the captions of the whole batch."""

    images: Tensor
    captions: list[str]

    @property
    def total(self) -> int:
        """The number of items in the whole batch."""
        return len(self.captions)


class ShapesBatches(torch.utils.data.Dataset):
    """batches[k]: the `shards` of batch k. An image is a pure function of (seed, k, its position in the batch)."""

    def __init__(self, sizes: SizesConfig, batch: int, seed: int, shards: Sequence[Shard] = (Shard(),)):
        """TimError if a batch of some size would have fewer images than shards, or more than MOST_PIXELS in all."""
        (self.sizes, self.weights), self.native_size = sizes.table(), sizes.native_size
        self.forms, self.relations, self.batch, self.seed, self.shards = sizes.forms, sizes.relations, batch, seed, shards
        for (width, height), count in zip(self.sizes, map(self.count, self.sizes)):
            if count * width * height > MOST_PIXELS:
                raise TimError(f"training config: loop.batch: {count} images of {width}x{height} have more than {MOST_PIXELS / 1e6:.0f} "
                               "megapixels; use a smaller batch or smaller data.sizes")
            if count < shards[0].count:
                raise TimError(f"training config: loop.batch: {count} images of {width}x{height} cannot be split over "
                               f"{shards[0].count} parts (processes x loop.accumulate); increase it")

    def count(self, size: tuple[int, int]) -> int:
        """The number of images in a batch. Batches of all sizes have about as many tokens."""
        width, height = self.native_size
        return max(1, round(self.batch * width * height / (size[0] * size[1])))

    def __getitem__(self, step: int) -> list[ShapesPart]:
        (width, height), prompts = self._draw(step)

        def render(position: int) -> np.ndarray:
            own = np.random.default_rng([self.seed, step, position + 1])  # numpy reads [seed, step, 0] as [seed, step]
            return scenes.render(scenes.place(own, prompts[position], width, height), width, height)

        images = [np.stack([render(position) for position in shard.take(range(len(prompts)))]) for shard in self.shards]
        captions = [prompt.text for prompt in prompts]
        return [ShapesPart(torch.from_numpy(one).permute(0, 3, 1, 2) * 2 - 1, captions) for one in images]

    def captions(self, step: int) -> list[str]:
        """The captions of batch `step`, without its images."""
        return [prompt.text for prompt in self._draw(step)[1]]

    def _draw(self, step: int) -> tuple[tuple[int, int], list[scenes.Prompt]]:
        """The (width, height) of the images of a batch, and what is in them."""
        rng = np.random.default_rng([self.seed, step])
        size = self.sizes[rng.choice(len(self.sizes), p=self.weights)]
        # half of the batches hold one form of prompt, so that prompts are also seen without the padding of longer neighbours
        form = scenes.sample_training_prompt(rng, self.forms).task if rng.random() < 0.5 else None
        return size, [scenes.sample_prompt(rng, form, self.relations) if form
                      else scenes.sample_training_prompt(rng, self.forms, self.relations) for _ in range(self.count(size))]


def render_samples(count: int, side: int, seed: int = 0) -> Iterable[Tensor]:
    """Images of coloured shapes, (3, side, side) in [-1, 1], for `count` random training prompts."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        prompt = scenes.sample_training_prompt(rng)
        image = scenes.render(scenes.place(rng, prompt, side, side), side, side)
        yield torch.from_numpy(image).permute(2, 0, 1) * 2 - 1
