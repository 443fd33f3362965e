"""Distribution matching for jumps to a clean latent (DMD, arXiv 2311.18828, and DMD2, arXiv 2405.14867): ours, no part of the TiM paper.

A transition's regression target is one point; where the network cannot hit it, it answers with a mean, and one step is blurred. Here
the result of a jump is told instead which way pictures become likelier: the difference between where two flows (r = t) would take it
from a noised copy. One is a teacher's, guided: the network's own averaged one, or that of the weights it began from. The other is a
critic's, the same network trained on nothing but results of jumps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import TimError
from .transport import Transport, guide

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchingConfig:
    """Defaults: what suits tim-shapes."""

    share: float = 0.25                          # jumps a step, of the batch
    starts: tuple[float, ...] = (1.0,)           # the times that jumps begin at, each as likely
    teacher: str = "average"                     # whose flow is matched: the averaged network's, or "start", that of the weights begun from
    cfg: float = 2.0                             # guidance of the flow that is matched
    weight: float = 1.0                          # of the loss, beside that of the transitions
    critic_lr: float = 3e-4
    p_mean: float = 0.2                          # of the logit-normal times at which the two flows are compared
    p_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("share", "weight", "critic_lr", "p_std"):
            if not getattr(self, name) > 0:
                raise TimError(f"matching: {name} is {getattr(self, name)}, expected more than 0")
        if not self.starts or not all(0 < start <= 1 for start in self.starts):
            raise TimError(f"matching: starts is {list(self.starts)}, expected times above 0 and up to 1")
        if self.teacher not in ("average", "start"):
            raise TimError(f"matching: teacher is '{self.teacher}', expected 'average' or 'start'")
        if self.share > 1:
            raise TimError(f"matching: share is {self.share}, expected up to 1")


@dataclass(frozen=True)
class MatchingDraws:
    """What is random in a step, (B,) times and (B, C, H, W) noise: of the jump, of the comparison, of the critic's lesson."""

    start: Tensor
    t: Tensor
    t_critic: Tensor
    noise: Tensor
    noise_t: Tensor
    noise_critic: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "MatchingDraws":
        return MatchingDraws(*(change(value) for value in vars(self).values()))


def draw_matching(shape: Sequence[int], config: MatchingConfig) -> MatchingDraws:
    """For latents of `shape`, from torch's own generator."""
    starts = torch.tensor(config.starts)[torch.randint(len(config.starts), shape[:1])]
    t, t_critic = ((torch.randn(shape[0]) * config.p_std + config.p_mean).sigmoid().clamp(0.02, 0.98) for _ in range(2))
    return MatchingDraws(starts, t, t_critic, *(torch.randn(*shape) for _ in range(3)))


def matching_losses(
    model: Network, teacher: Network, critic: Network, x: Tensor, y: Tensor, y_null: Tensor, *,
    transport: Transport, config: MatchingConfig, draws: MatchingDraws, told: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) of the model and of the critic, for clean latents x (B, C, H, W) with conditions y and y_null (B, ...).

    The first reaches the model alone, the second the critic alone; the teacher learns from neither. told: y and y_null as the teacher reads
    them, where its text model is another.
    """
    start, t, t_critic = (time.view(-1, 1, 1, 1) for time in (draws.start, draws.t, draws.t_critic))
    x_t = transport.interpolate(x, draws.noise, start)
    F = model(x_t, transport.c_noise(draws.start), transport.c_noise(torch.zeros_like(draws.start)), y).float()
    made = transport.step(x_t, F, start, torch.zeros_like(start))
    with torch.no_grad():
        noised, time = transport.interpolate(made, draws.noise_t, t), transport.c_noise(draws.t)

        def cleaned(flow: Tensor) -> Tensor:
            return transport.step(noised, flow, t, torch.zeros_like(t))

        condition, null = told or (y, y_null)
        both = torch.cat((condition, null.expand_as(condition)))
        real = cleaned(guide(teacher(torch.cat((noised, noised)), time.repeat(2), time.repeat(2), both).float(), config.cfg))
        fake = cleaned(critic(noised, time, time, y).float())
        size = (made - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        goal = made - (fake - real) / size
    loss = 0.5 * (made - goal).square().mean((1, 2, 3))

    made, time = made.detach(), transport.c_noise(draws.t_critic)
    flow = critic(transport.interpolate(made, draws.noise_critic, t_critic), time, time, y.detach()).float()
    error = (flow - transport.velocity(made, draws.noise_critic, t_critic)).square().mean((1, 2, 3))
    return loss, error / (error.detach() + 0.05)
