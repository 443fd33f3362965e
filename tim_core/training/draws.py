"""What is random in a step of a transformer's training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..processes import Shard
from ..transport import Transport
from .objectives.transition import ObjectiveConfig, draw_times, sample_times


@dataclass(frozen=True)
class Draws:
    """Of a batch or a part of it: which prompts are dropped (B,), noise (B, C, h, w), times t and r (B,), of which the first
    `n_diffusion` are equal, and `between` (B,) in [0, 1), where a composed target divides its transition."""

    dropped: list[bool]
    noise: Tensor
    t: Tensor
    r: Tensor
    n_diffusion: int
    between: Tensor

    def of(self, shard: Shard, device: torch.device) -> "Draws":
        """The part's own, on its device."""
        tensors = {name: shard.take(getattr(self, name)).to(device) for name in ("noise", "t", "r", "between")}
        return replace(self, dropped=shard.take(self.dropped), n_diffusion=len(shard.take(range(self.n_diffusion))), **tensors)

    def errors(self, error: Tensor, shard: Shard) -> dict[str, Tensor]:
        """Mean errors of the whole batch's items with r = t, and of its transitions, from those of a part's items, before their weights."""
        first, total = len(shard.take(range(self.n_diffusion))), len(self.dropped)
        diffusion, transition = error.detach()[:first].sum(), error.detach()[first:].sum()
        return {"diffusion": diffusion * shard.count / max(1, self.n_diffusion),
                "transition": transition * shard.count / max(1, total - self.n_diffusion)}


def draw(shape: Sequence[int], dropout: float, transport: Transport, objective: ObjectiveConfig, shift: float) -> Draws:
    """For latents of `shape`, from torch's own generator, on the CPU: the same numbers whatever the processes and devices."""
    dropped = (torch.rand(shape[0]) < dropout).tolist()
    noise = torch.randn(*shape)
    t, r, n_diffusion = sample_times(draw_times(shape[0], transport), transport, objective, shift)
    return Draws(dropped, noise, t, r, n_diffusion, torch.rand(shape[0]))
