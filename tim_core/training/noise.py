"""The random numbers of a step of a transformer's training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..processes import Shard
from ..transport import Transport
from .objectives.transition import ObjectiveConfig, draw_times, sample_times


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of a batch or of a shard of it.

    dropped (B,): captions or classes to drop; noise (B, C, h, w); times t and r (B,), equal for the first `n_diffusion` items;
    between (B,): uniform numbers that place the middle time of composed targets.
    """

    dropped: list[bool]
    noise: Tensor
    t: Tensor
    r: Tensor
    n_diffusion: int
    between: Tensor

    def take(self, shard: Shard, device: torch.device) -> "StepNoise":
        """The numbers of a shard, on its device."""
        tensors = {name: shard.take(getattr(self, name)).to(device) for name in ("noise", "t", "r", "between")}
        return replace(self, dropped=shard.take(self.dropped), n_diffusion=len(shard.take(range(self.n_diffusion))), **tensors)

    def mean_errors(self, error: Tensor, shard: Shard) -> dict[str, Tensor]:
        """Unweighted errors of a shard's items -> mean errors of the batch's items with r = t and of its transitions.

        The mean over shards of what this returns is the mean over the batch.
        """
        first, total = len(shard.take(range(self.n_diffusion))), len(self.dropped)
        diffusion, transition = error.detach()[:first].sum(), error.detach()[first:].sum()
        return {"diffusion": diffusion * shard.count / max(1, self.n_diffusion),
                "transition": transition * shard.count / max(1, total - self.n_diffusion)}


def draw_noise(shape: Sequence[int], dropout: float, transport: Transport, objective: ObjectiveConfig, shift: float) -> StepNoise:
    """Draws for latents of `shape`, from torch's global CPU generator: the same numbers on every device and in every process."""
    dropped = (torch.rand(shape[0]) < dropout).tolist()
    noise = torch.randn(*shape)
    t, r, n_diffusion = sample_times(draw_times(shape[0], transport), transport, objective, shift)
    return StepNoise(dropped, noise, t, r, n_diffusion, torch.rand(shape[0]))
