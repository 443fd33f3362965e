"""Distillation of guided steps into the first jumps from noise (after arXiv 2210.03142): ours, no part of the TiM paper.

Guidance is closed at the first time, so that the first of few steps decides without it what goes where, and no later step can mend
that. Here that step learns where a teacher, guided from the first time on, gets in several steps from the same noise. Only jumps that
begin at the first time are taught; what keeps the rest of the network where it is, is the objective's target "teacher".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import TimError
from ...transport import OTFM, guide

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ENDS = 2  # jumps that each trajectory teaches


@dataclass(frozen=True)
class DistillationConfig:
    """Defaults: the run in configs/tim-shapes-guided.yaml."""

    share: float = 0.25                          # trajectories a step, of the batch
    times: tuple[float, ...] = (1.0, 0.9375, 0.875, 0.8125, 0.75, 0.5)   # the teacher's; jumps end at two of them
    cfg: float = 2.5                             # guidance of the teacher, at every step
    weight: float = 1.0                          # of the loss, beside that of the transitions
    knee: float = 0.1                            # errors below this one, each over the channels of a place, count as squares

    def __post_init__(self) -> None:
        for name in ("share", "weight", "knee"):
            if not getattr(self, name) > 0:
                raise TimError(f"distillation: {name} is {getattr(self, name)}, expected more than 0")
        if self.share > 1:
            raise TimError(f"distillation: share is {self.share}, expected up to 1")
        falling = all(0 <= after < before <= 1 for before, after in zip(self.times, self.times[1:]))
        if len(self.times) <= ENDS or not falling or self.times[0] != 1:
            raise TimError(f"distillation: times is {list(self.times)}, expected {ENDS + 1} or more, falling from 1")


@dataclass(frozen=True)
class DistillationDraws:
    """What is random in a step: noise (B, C, H, W), and which of `times` two jumps end at (B, 2)."""

    noise: Tensor
    ends: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "DistillationDraws":
        return DistillationDraws(*(change(value) for value in vars(self).values()))


def draw_distillation(shape: Sequence[int], config: DistillationConfig) -> DistillationDraws:
    """For latents of `shape`, from torch's own generator."""
    ends = torch.rand(shape[0], len(config.times) - 1).argsort(1)[:, :ENDS] + 1
    return DistillationDraws(torch.randn(*shape), ends)


def distillation_loss(
    model: Network, teacher: Network, y: Tensor, y_null: Tensor, *, transport: OTFM, config: DistillationConfig,
    draws: DistillationDraws, told: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Loss (B,) of the model for conditions y and y_null (B, ...). It reaches the model alone: neither the teacher nor y learns from it.

    told: y and y_null as the teacher reads them, where its text model is another.
    """
    state = noise = draws.noise  # x_t at t = 1
    count, states = len(noise), []
    times = torch.tensor(config.times, device=noise.device)
    condition, null = told or (y, y_null)
    both = torch.cat((condition, null.expand_as(condition)))
    with torch.no_grad():
        for t, r in zip(times, times[1:]):
            told_t, told_r = (transport.c_noise(time.expand(2 * count)) for time in (t, r))
            state = transport.step(state, guide(teacher(torch.cat((state, state)), told_t, told_r, both).float(), config.cfg), t, r)
            states.append(state)
        # times (B, ENDS) and states (T - 1, B, C, H, W) -> (ENDS * B,) and (ENDS * B, C, H, W)
        ends, item = draws.ends.T.flatten(), torch.arange(count, device=noise.device).repeat(ENDS)
        start, r, goal = times[:1].expand(len(ends)), times[ends], torch.stack(states)[ends - 1, item]
        target = transport.solve_F(noise[item], goal, start.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1))
    F = model(noise[item], transport.c_noise(start), transport.c_noise(r), y[item].detach()).float()
    error = ((F - target).square().mean(1) + config.knee**2).sqrt() - config.knee
    return error.mean((1, 2)).unflatten(0, (ENDS, count)).mean(0)
