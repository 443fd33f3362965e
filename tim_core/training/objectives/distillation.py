"""Distillation of guided steps into the first jumps from noise (after arXiv 2210.03142); not in the TiM paper.

Guidance is off at t = 1, so the first of few steps places objects without it, and later steps cannot move them. Here the jumps that start
at t = 1 learn the end point of several teacher steps from the same noise, guided from the first one on. Other jumps are not trained; the
objective's target "teacher" keeps the network as it is there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import TimError
from ...limits import MAX_CFG
from ...transport import OTFM, guide

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ENDS = 2  # jumps trained per trajectory


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation of the weights in `start`, beside the objective."""

    batch_fraction: float = 0.25                 # trajectories per step, as a fraction of the batch
    times: tuple[float, ...] = (1.0, 0.9375, 0.875, 0.8125, 0.75, 0.5)   # steps of the teacher; jumps end at two of these times
    cfg: float = 2.5                             # guidance of the teacher, at every step
    weight: float = 1.0                          # of the loss
    knee: float = 0.1                            # the loss is quadratic below this error (RMS over channels) and linear above it

    def __post_init__(self) -> None:
        for name, (least, most) in {"batch_fraction": (1e-6, 1), "cfg": (0, MAX_CFG), "weight": (1e-6, 1e6), "knee": (1e-6, 1e6)}.items():
            if not least <= getattr(self, name) <= most:
                raise TimError(f"distillation.{name} is {getattr(self, name)}; use {least:g} to {most:g}")
        falling = all(0 <= after < before <= 1 for before, after in zip(self.times, self.times[1:]))
        if len(self.times) <= ENDS or not falling or self.times[0] != 1:
            raise TimError(f"distillation.times is {list(self.times)}; use {ENDS + 1} or more decreasing times, the first one 1")


@dataclass(frozen=True)
class DistillationNoise:
    """The random tensors of a step: noise (B, C, H, W), and the indices in `times` at which two jumps end (B, 2)."""

    noise: Tensor
    ends: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "DistillationNoise":
        """Applies a function to every tensor."""
        return DistillationNoise(*(change(value) for value in vars(self).values()))


def draw_distillation_noise(shape: Sequence[int], config: DistillationConfig) -> DistillationNoise:
    """Draws for latents of `shape`, from torch's global generator."""
    ends = torch.rand(shape[0], len(config.times) - 1).argsort(1)[:, :ENDS] + 1
    return DistillationNoise(torch.randn(*shape), ends)


def distillation_loss(
    model: Network, teacher: Network, y: Tensor, y_null: Tensor, *, transport: OTFM, config: DistillationConfig,
    noise: DistillationNoise, teacher_conditions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Loss (B,) for conditions y and y_null (B, ...), with gradients for the model only, not for the teacher or y.

    teacher_conditions: y and y_null of the teacher, where it has another text model.
    """
    x_1 = x_t = noise.noise
    count, states = len(x_1), []
    times = torch.tensor(config.times, device=x_1.device)
    condition, null = teacher_conditions or (y, y_null)
    both = torch.cat((condition, null.expand_as(condition)))
    with torch.no_grad():
        for t, r in zip(times, times[1:]):
            t_input, r_input = (transport.c_noise(time.expand(2 * count)) for time in (t, r))
            x_t = transport.step(x_t, guide(teacher(torch.cat((x_t, x_t)), t_input, r_input, both).float(), config.cfg), t, r)
            states.append(x_t)
        # times (B, ENDS) and states (T - 1, B, C, H, W) -> (ENDS * B,) and (ENDS * B, C, H, W)
        ends, item = noise.ends.T.flatten(), torch.arange(count, device=x_1.device).repeat(ENDS)
        start, r, x_r = times[:1].expand(len(ends)), times[ends], torch.stack(states)[ends - 1, item]
        target = transport.solve_F(x_1[item], x_r, start.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1))
    F = model(x_1[item], transport.c_noise(start), transport.c_noise(r), y[item].detach()).float()
    error = ((F - target).square().mean(1) + config.knee**2).sqrt() - config.knee
    return error.mean((1, 2)).unflatten(0, (ENDS, count)).mean(0)
