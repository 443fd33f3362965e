"""Distribution matching for jumps (DMD, arXiv 2311.18828, and DMD2, arXiv 2405.14867): ours, no part of the TiM paper.

A transition's regression target is one point; where the network cannot hit it, it answers with a mean, and one step is blurred. Here
the result of a jump is told instead which way it becomes likelier: a copy is noised further, and two networks say where that came
from. One is a teacher's flow (r = t), guided: of the averaged network, or of the weights the run began from. The other is a critic, the
same network trained on nothing but results of jumps. A jump may end at any time r, not at a clean latent alone: what a copy at t came
from is then x_r, and the teacher's answer, a clean latent, gives it by Bayes' rule (`Transport.posterior_mean`).
It may begin where the network's own steps end (DMD2's backward simulation), and so learns to mend what those got wrong. Guided steps are
guided as the samplers guide them; of a guided jump both answers learn, with the condition and without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import TimError
from ...transport import OTFM, guide

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchingConfig:
    """Defaults: what a first matching of tim-shapes had; configs/tim-shapes-sharp.yaml is a longer one."""

    share: float = 0.25                          # jumps a step, of the batch
    paths: tuple[tuple[float, ...], ...] = ((1.0, 0.0),)   # times of a sampler's steps, each as often; the last is the jump that learns
    path_cfg: float = 1.0                        # guidance of all these steps, the last one too, where they begin below 1
    teacher: str = "average"                     # whose flow is matched: the averaged network's, or "start", that of the weights begun from
    cfg: float = 2.0                             # guidance of the flow that is matched
    weight: float = 1.0                          # of the loss, beside that of the transitions
    critic_lr: float = 3e-4
    critic_muon_lr: float = 3e-3                 # of its matrices, where loop.optimizer is muon
    critic_first: int = 0                        # steps at the beginning in which the critic alone learns, of loop.steps
    p_mean: float = 0.2                          # of the logit-normal times of comparison, from 0 at a jump's end to 1 at t = 1
    p_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("share", "weight", "critic_lr", "critic_muon_lr", "p_std"):
            if not getattr(self, name) > 0:
                raise TimError(f"matching: {name} is {getattr(self, name)}, expected more than 0")
        if not self.paths:
            raise TimError("matching: paths is empty, expected the times of one or more, like [[1, 0]]")
        for path in self.paths:
            if len(path) < 2 or not all(0 <= after < before <= 1 for before, after in zip(path, path[1:])):
                raise TimError(f"matching: paths has {list(path)}, expected two times or more, falling from at most 1 to at least 0")
        if not self.path_cfg >= 1:
            raise TimError(f"matching: path_cfg is {self.path_cfg}, expected 1 (no guidance) or more")
        if self.critic_first < 0:
            raise TimError(f"matching: critic_first is {self.critic_first}, expected 0 or more")
        if self.teacher not in ("average", "start"):
            raise TimError(f"matching: teacher is '{self.teacher}', expected 'average' or 'start'")
        if self.share > 1:
            raise TimError(f"matching: share is {self.share}, expected up to 1")


@dataclass(frozen=True)
class MatchingDraws:
    """What is random in a step, times and (B, C, H, W) noise: of the jump, of the comparison, of the critic's lesson.

    path (B, T) are the times of the steps up to the jump's end. All have the length of the longest: a shorter one stays at its first time.
    """

    path: Tensor
    t: Tensor
    t_critic: Tensor
    noise: Tensor
    noise_t: Tensor
    noise_critic: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "MatchingDraws":
        return MatchingDraws(*(change(value) for value in vars(self).values()))


def draw_matching(shape: Sequence[int], config: MatchingConfig) -> MatchingDraws:
    """For latents of `shape`, from torch's own generator; times in [0, 1], as on OT-FM."""
    longest = max(map(len, config.paths))
    paths = torch.tensor([path[:1] * (longest - len(path)) + path for path in config.paths])
    path = paths[(torch.arange(shape[0]) + torch.randint(len(paths), ())) % len(paths)]
    t, t_critic = ((torch.randn(shape[0]) * config.p_std + config.p_mean).sigmoid().clamp(0.02, 0.98) for _ in range(2))
    noises = [torch.randn(*shape) for _ in range(3)]
    end = path[:, -1]
    return MatchingDraws(path, *(end + (1 - end) * time for time in (t, t_critic)), *noises)


def sample_step(model: Network, x_t: Tensor, t: Tensor, r: Tensor, y: Tensor, y_null: Tensor, transport: OTFM, cfg: float) -> Tensor:
    """x_r (B, C, H, W) of one step from x_t, times t to r (B,) in [0, 1], conditions y and y_null (B, ...).

    Guided by cfg where t is below 1, as the samplers are in the published interval; of cfg 1 nothing is asked without the condition.
    """
    guided = ((t < 1) & (cfg > 1)).nonzero().flatten()
    told_t, told_r = (transport.c_noise(torch.cat((time, time[guided]))) for time in (t, r))
    F = model(torch.cat((x_t, x_t[guided])), told_t, told_r, torch.cat((y, y_null[guided]))).float()
    F, F_null = F.split((len(t), len(guided)))
    F = F.index_copy(0, guided, guide(torch.cat((F[guided], F_null)), cfg))
    return transport.step(x_t, F, t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1))


def matching_losses(
    model: Network, teacher: Network, critic: Network, x: Tensor, y: Tensor, y_null: Tensor, *,
    transport: OTFM, config: MatchingConfig, draws: MatchingDraws, told: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) of the model and of the critic, for clean latents x (B, C, H, W) with conditions y and y_null (B, ...).

    The first reaches the model alone, the second the critic alone; the teacher learns from neither. told: y and y_null as the teacher reads
    them, where its text model is another.
    """
    y_null = y_null.expand_as(y)
    *_, begins, ends = draws.path.T
    start, end, t, t_critic = (time.view(-1, 1, 1, 1) for time in (begins, ends, draws.t, draws.t_critic))
    x_t = transport.interpolate(x, draws.noise, draws.path[:, 0].view(-1, 1, 1, 1))
    with torch.no_grad():
        for before, after in zip(draws.path.T, draws.path.T[1:-1]):
            some = (before > after).nonzero().flatten()
            if not len(some):
                some = some.new_zeros(1)  # a call all the same, as in the processes that share a sliced network; it stays where it is
            x_t[some] = sample_step(model, x_t[some], before[some], after[some], y[some], y_null[some], transport, config.path_cfg)
    made = sample_step(model, x_t, begins, ends, y, y_null, transport, config.path_cfg)  # x_r at r = end

    def answer(noised: Tensor, time: Tensor) -> Tensor:
        """The critic's F from x_t to its origin. Told r = t - end, it hears `end` as the interval and, at 0, begins as the flow."""
        return critic(noised, transport.c_noise(time), transport.c_noise(time - ends), y.detach()).float()

    with torch.no_grad():
        noised, time = transport.renoise(made, draws.noise_t, end, t), transport.c_noise(draws.t)
        condition, null = told or (y, y_null)
        both = torch.cat((condition, null.expand_as(condition)))
        flow = guide(teacher(torch.cat((noised, noised)), time.repeat(2), time.repeat(2), both).float(), config.cfg)
        real = transport.posterior_mean(noised, transport.denoise(noised, flow, t), t, end)
        fake = transport.step(noised, answer(noised, draws.t), t, end)
        size = (made - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        goal = made - (fake - real) / size
    # F moves the result of a jump by its length: over that, a short jump moves F as far as a long one (each answer of
    # a guided one is pulled path_cfg, or path_cfg - 1, times as hard)
    length = transport.step(torch.zeros_like(start), torch.ones_like(start), start, end).abs().flatten()
    loss = 0.5 * (made - goal).square().mean((1, 2, 3)) / length

    made = made.detach()
    # close after an end above 0 nearly all of this error is noise, whatever the critic knows: compare it between runs, not with 0
    noised = transport.renoise(made, draws.noise_critic, end, t_critic)
    error = (answer(noised, draws.t_critic) - transport.solve_F(noised, made, t_critic, end)).square().mean((1, 2, 3))
    return loss, error / (error.detach() + 0.05)
