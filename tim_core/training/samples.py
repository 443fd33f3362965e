"""The sample images that a run writes beside its checkpoints."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from ..finite import check_finite
from ..sampler import sample
from ..schedule import uniform
from ..transport import Transport

STEPS = (1, 4, 16)


def grid(rows: list[Tensor]) -> Image.Image:
    """One image from rows of images (B, 3, H, W) in [-1, 1]. TimError for values that are not finite."""
    check_finite([row.detach() for row in rows], "VAE decoder, sample images")
    lines = torch.cat([torch.cat(list(row.cpu()), -1) for row in rows], -2)
    return Image.fromarray(lines.add(1).mul(127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def sample_grid(transformer: nn.Module, decode: Callable[[Tensor], Tensor], noise: Tensor, cond: Tensor, null: Tensor,
                transport: Transport, autocast: bool, cfg: float = 2.5) -> Image.Image:
    """Samples noise (B, C, h, w) in 1, 4 and 16 steps, one row each; the transformer runs in bfloat16 if `autocast`."""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=autocast):
        latents = [sample(transformer, noise, uniform(steps), cond, null, transport=transport, cfg=cfg)[0] for steps in STEPS]
    check_finite(latents, "transformer, sample images", transformer)
    return grid([decode(latent.float()) for latent in latents])
