"""Batches of the small world, drawn anew for every step."""

import numpy as np
import torch
from torch import Tensor

from .. import shapes
from .config import SizesConfig


class ShapesBatches(torch.utils.data.Dataset):
    """batches[k] -> (pictures (B, 3, H, W) float32 in [-1, 1], captions): a pure function of (seed, k)."""

    def __init__(self, sizes: SizesConfig, batch: int, seed: int):
        self.sizes, self.weights = sizes.table()
        self.forms, self.batch, self.seed = sizes.forms, batch, seed

    def __getitem__(self, step: int) -> tuple[Tensor, list[str]]:
        rng = np.random.default_rng([self.seed, step])
        width, height = self.sizes[rng.choice(len(self.sizes), p=self.weights)]
        # as many tokens in every batch, so that large pictures cost no more than small ones
        reference = self.sizes[int(np.argmax(self.weights))]
        count = max(1, round(self.batch * reference[0] * reference[1] / (width * height)))
        # half of the batches hold one form of prompt, so that prompts are also seen without the padding of longer neighbours
        form = shapes.sample_training_prompt(rng, self.forms).task if rng.random() < 0.5 else None
        prompts = [shapes.sample_prompt(rng, form) if form else shapes.sample_training_prompt(rng, self.forms) for _ in range(count)]
        pictures = np.stack([shapes.render(shapes.place(rng, p, width, height), width, height) for p in prompts])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1, [p.text for p in prompts]
