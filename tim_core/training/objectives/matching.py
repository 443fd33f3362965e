"""Distribution matching for jumps (DMD, arXiv 2311.18828, and DMD2, arXiv 2405.14867); not in the TiM paper.

The regression target of a transition is one point. Where the network cannot reach it, it predicts a mean, and a single step is blurred.
Distribution matching gives the result of a jump a gradient towards results of higher likelihood instead. The result is noised to a time
t, and two networks predict what it was noised from. The teacher is a guided flow (r = t), of the EMA network or of the weights in `start`.
The critic is a copy of the network that is trained on results of jumps only. The difference of the two predictions is the gradient.

A jump may end at any time r. The origin of a noised result is then x_r; the teacher predicts a clean latent, from which
`Transport.posterior_mean` gives x_r. A jump may start where the network's own steps end (backward simulation of DMD2), so that it learns to
correct their errors. Guided steps are guided as in sampling, and a guided jump trains both of its predictions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import TimError
from ...limits import MAX_CFG
from ...transport import OTFM, guide

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchingConfig:
    """Distribution matching beside the objective."""

    batch_fraction: float = 0.25                 # jumps per step, as a fraction of the batch
    paths: tuple[tuple[float, ...], ...] = ((1.0, 0.0),)   # times of sampling steps, equally often; the last step is the jump that learns
    rollout_cfg: float = 1.0                     # guidance of all these steps, where they start below time 1
    teacher: str = "average"                     # whose flow is matched: the EMA network's, or "start", that of the weights in `start`
    cfg: float = 2.0                             # guidance of the teacher
    weight: float = 1.0                          # of the loss
    critic_lr: float = 3e-4
    critic_muon_lr: float = 3e-3                 # with loop.optimizer muon, for weight matrices of blocks
    critic_warmup_steps: int = 0                 # first steps of the run, in which only the critic is trained
    p_mean: float = 0.2                          # of the logit-normal comparison times, from 0 at the end of a jump to 1 at t = 1
    p_std: float = 1.2

    def __post_init__(self) -> None:
        limits = {"batch_fraction": (1e-6, 1), "weight": (1e-6, 1e6), "critic_lr": (1e-12, 10), "critic_muon_lr": (1e-12, 10),
                  "p_mean": (-20, 20), "p_std": (1e-6, 20), "rollout_cfg": (1, MAX_CFG), "cfg": (0, MAX_CFG)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise TimError(f"matching.{name} is {getattr(self, name)}; use {least:g} to {most:g}")
        if not self.paths:
            raise TimError("matching.paths is empty; use one or more lists of times, such as [[1, 0]]")
        for path in self.paths:
            if len(path) < 2 or not all(0 <= after < before <= 1 for before, after in zip(path, path[1:])):
                raise TimError(f"matching.paths has {list(path)}; use two or more decreasing times from 1 to 0")
        if self.critic_warmup_steps < 0:
            raise TimError(f"matching.critic_warmup_steps is {self.critic_warmup_steps}; use 0 or more")
        if self.teacher not in ("average", "start"):
            raise TimError(f"matching.teacher is '{self.teacher}'; use 'average' or 'start'")


@dataclass(frozen=True)
class MatchingNoise:
    """The random tensors of a step, for B jumps: comparison times t and t_critic (B,), and three noises (B, C, H, W).

    path: (B, T), the times of the steps up to the end of the jump. Shorter paths repeat their first time to have the length of the longest.
    """

    path: Tensor
    t: Tensor
    t_critic: Tensor
    noise: Tensor
    noise_t: Tensor
    noise_critic: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "MatchingNoise":
        """Applies a function to every tensor."""
        return MatchingNoise(*(change(value) for value in vars(self).values()))


def draw_matching_noise(shape: Sequence[int], config: MatchingConfig) -> MatchingNoise:
    """Draws for latents of `shape`, from torch's global generator; times in [0, 1], as on OT-FM."""
    length = max(map(len, config.paths))
    paths = torch.tensor([path[:1] * (length - len(path)) + path for path in config.paths])
    path = paths[(torch.arange(shape[0]) + torch.randint(len(paths), ())) % len(paths)]
    t, t_critic = ((torch.randn(shape[0]) * config.p_std + config.p_mean).sigmoid().clamp(0.02, 0.98) for _ in range(2))
    noises = [torch.randn(*shape) for _ in range(3)]
    end = path[:, -1]
    return MatchingNoise(path, *(end + (1 - end) * time for time in (t, t_critic)), *noises)


def sample_step(model: Network, x_t: Tensor, t: Tensor, r: Tensor, y: Tensor, y_null: Tensor, transport: OTFM, cfg: float) -> Tensor:
    """One sampling step: x_r (B, C, H, W) from x_t, for times t and r (B,) in [0, 1] and conditions y and y_null (B, ...).

    Guided by cfg where t < 1, the published interval. At cfg 1 the network is not evaluated for y_null.
    """
    guided = ((t < 1) & (cfg > 1)).nonzero().flatten()
    t_input, r_input = (transport.c_noise(torch.cat((time, time[guided]))) for time in (t, r))
    F = model(torch.cat((x_t, x_t[guided])), t_input, r_input, torch.cat((y, y_null[guided]))).float()
    F, F_null = F.split((len(t), len(guided)))
    F = F.index_copy(0, guided, guide(torch.cat((F[guided], F_null)), cfg))
    return transport.step(x_t, F, t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1))


def matching_losses(
    model: Network, teacher: Network, critic: Network, x: Tensor, y: Tensor, y_null: Tensor, *,
    transport: OTFM, config: MatchingConfig, noise: MatchingNoise, teacher_conditions: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) of the model and of the critic, for clean latents x (B, C, H, W) with conditions y and y_null (B, ...).

    The first has gradients for the model only, the second for the critic only; the teacher gets none.
    teacher_conditions: y and y_null of the teacher, where it has another text model.
    """
    y_null = y_null.expand_as(y)
    *_, t_start, t_end = noise.path.T
    start, end, t, t_critic = (time.view(-1, 1, 1, 1) for time in (t_start, t_end, noise.t, noise.t_critic))
    x_t = transport.interpolate(x, noise.noise, noise.path[:, 0].view(-1, 1, 1, 1))
    with torch.no_grad():
        for before, after in zip(noise.path.T, noise.path.T[1:-1]):
            some = (before > after).nonzero().flatten()
            if not len(some):
                some = some.new_zeros(1)  # under FSDP every process must make the same calls; a step of length 0 changes nothing
            x_t[some] = sample_step(model, x_t[some], before[some], after[some], y[some], y_null[some], transport, config.rollout_cfg)
    result = sample_step(model, x_t, t_start, t_end, y, y_null, transport, config.rollout_cfg)  # x_r at r = end

    def critic_prediction(noised: Tensor, time: Tensor) -> Tensor:
        """The critic's F from x_t to its origin. Its r is t - end: the interval encodes `end`; end = 0 is the flow it was copied from."""
        return critic(noised, transport.c_noise(time), transport.c_noise(time - t_end), y.detach()).float()

    with torch.no_grad():
        noised, time = transport.renoise(result, noise.noise_t, end, t), transport.c_noise(noise.t)
        condition, null = teacher_conditions or (y, y_null)
        both = torch.cat((condition, null.expand_as(condition)))
        flow = guide(teacher(torch.cat((noised, noised)), time.repeat(2), time.repeat(2), both).float(), config.cfg)
        real = transport.posterior_mean(noised, transport.denoise(noised, flow, t), t, end)
        fake = transport.step(noised, critic_prediction(noised, noise.t), t, end)
        size = (result - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        target = result - (fake - real) / size
    # F moves the result by the length of the jump. Divided by it, short and long jumps have gradients of equal size
    # (in a guided jump the two predictions have rollout_cfg and rollout_cfg - 1 times this gradient).
    length = transport.step(torch.zeros_like(start), torch.ones_like(start), start, end).abs().flatten()
    loss = 0.5 * (result - target).square().mean((1, 2, 3)) / length

    result = result.detach()
    # Just after an end > 0 most of this error is irreducible noise: compare it between runs, not with 0.
    noised = transport.renoise(result, noise.noise_critic, end, t_critic)
    error = (critic_prediction(noised, noise.t_critic) - transport.solve_F(noised, result, t_critic, end)).square().mean((1, 2, 3))
    return loss, error / (error.detach() + 0.05)
