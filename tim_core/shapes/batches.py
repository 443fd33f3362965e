"""Batches of the small world, drawn anew for every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import TimError
from . import scenes

if TYPE_CHECKING:
    from .config import SizesConfig  # needs pydantic, which renders for inference do without


class ShapesBatches(torch.utils.data.Dataset):
    """batches[k] -> (pictures (B, 3, H, W) float32 in [-1, 1], captions): a pure function of (seed, k)."""

    def __init__(self, sizes: SizesConfig, batch: int, seed: int, parts: int = 1):
        """TimError where a batch of some size would have fewer pictures than the `parts` that it is cut into."""
        self.sizes, self.weights = sizes.table()
        self.forms, self.relations, self.batch, self.seed = sizes.forms, sizes.relations, batch, seed

        for (width, height), count in zip(self.sizes, map(self.count, self.sizes)):
            if count < parts:
                raise TimError(f"training config: loop.batch: {count} images of {width}x{height} for {parts} processes or accumulated "
                               "parts; use at least one each")

    def count(self, size: tuple[int, int]) -> int:
        """Pictures in a batch: as many tokens in every one, so that large pictures cost no more than small ones."""
        reference = self.sizes[int(np.argmax(self.weights))]
        return max(1, round(self.batch * reference[0] * reference[1] / (size[0] * size[1])))

    def __getitem__(self, step: int) -> tuple[Tensor, list[str]]:
        rng = np.random.default_rng([self.seed, step])
        width, height = self.sizes[rng.choice(len(self.sizes), p=self.weights)]
        count = self.count((width, height))
        # half of the batches hold one form of prompt, so that prompts are also seen without the padding of longer neighbours
        form = scenes.sample_training_prompt(rng, self.forms).task if rng.random() < 0.5 else None
        prompts = [scenes.sample_prompt(rng, form, self.relations) if form
                   else scenes.sample_training_prompt(rng, self.forms, self.relations) for _ in range(count)]
        pictures = np.stack([scenes.render(scenes.place(rng, p, width, height), width, height) for p in prompts])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1, [p.text for p in prompts]


def render_samples(count: int, side: int, seed: int = 0) -> Iterable[Tensor]:
    """Images of the small world, (3, side, side) in [-1, 1], for `count` random training prompts."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        prompt = scenes.sample_training_prompt(rng)
        picture = scenes.render(scenes.place(rng, prompt, side, side), side, side)
        yield torch.from_numpy(picture).permute(2, 0, 1) * 2 - 1
