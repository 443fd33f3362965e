"""The pictures that a run draws beside its checkpoints."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from ..sampler import sample
from ..schedule import uniform
from ..transport import Transport

STEPS = (1, 4, 16)


def grid(rows: list[Tensor]) -> Image.Image:
    """Rows (B, 3, H, W) of pictures in [-1, 1], one under another."""
    lines = torch.cat([torch.cat(list(row.cpu()), -1) for row in rows], -2)
    return Image.fromarray(lines.add(1).mul(127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def show_steps(transformer: nn.Module, decode: Callable[[Tensor], Tensor], noise: Tensor, cond: Tensor, null: Tensor,
               transport: Transport, autocast: bool) -> Image.Image:
    """The pictures of noise (B, C, h, w) in 1, 4 and 16 steps (cfg 2.5), a row each; the transformer in bfloat16 where `autocast`."""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=autocast):
        latents = [sample(transformer, noise, uniform(steps), cond, null, transport=transport, cfg=2.5)[0] for steps in STEPS]
    return grid([decode(latent.float()) for latent in latents])
