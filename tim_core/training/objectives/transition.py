"""The training objective of Transition Models (arXiv 2509.04394): Eq. 8-13, Alg. 1, Tab. 8; model guidance, Eq. 51."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import TimError
from ...transport import Transport

Model = Callable[..., Any]

TIME_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda delta, sigma_d: torch.ones_like(delta),
    "reciprocal": lambda delta, sigma_d: 1 / (delta + sigma_d),
    "sqrt": lambda delta, sigma_d: 1 / (delta + sigma_d).sqrt(),
    "square": lambda delta, sigma_d: 1 / (delta + sigma_d) ** 2,
    "Soft-Min-SNR": lambda delta, sigma_d: 1 / (delta**2 + sigma_d**2),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The settings of the loss; the distribution of times lives on the transport. Defaults: the official text-to-image training."""

    diffusion_ratio: float = 0.5  # share of the batch, from its start, with r = t
    consistency_ratio: float = 0.1  # share of the batch, from its end, with r = T_min
    near: float = 1.0  # of T_max: transitions from above it are shortened to 1 - near of their length (1: none); ours
    derivative: str = "dde"  # "dde", the central difference of Eq. 10, or "jvp", forward-mode differentiation
    epsilon: float = 0.005  # half the width of the central difference
    # of transitions: Eq. 9, or "composed", F(t, r) from F(t, s) and F(s, r), ours; or of all items "teacher", what another network answers
    target: str = "differential"
    adaptive_floor: float = 1e-5  # added to an item's loss before its inverse is taken as the item's weight
    weight_time_type: str = "sqrt"
    weight_time_tangent: bool = True  # weigh tan t - tan r (wins over the sigmoid)
    weight_time_sigmoid: bool = False  # weigh t / (1 - t) - r / (1 - r)
    weight_t_and_r: bool = True  # weigh the interval; else t alone
    use_dir_loss: bool = True  # add 1 - cosine over channels
    proj_coeff: float = 1.0  # of the REPA term, used when h_target is given
    enhance_target: bool = False  # model guidance, for w_start <= t <= w_end
    w_gt: float = 1.0
    w_cond: float = 0.0
    w_start: float = 0.0
    w_end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.near <= 1:
            raise TimError(f"objective: near is {self.near}, expected more than 0 and up to 1")
        if self.derivative not in ("dde", "jvp"):
            raise TimError(f"objective: derivative is '{self.derivative}', expected 'dde' or 'jvp'")
        if self.target not in ("differential", "composed", "teacher"):
            raise TimError(f"objective: target is '{self.target}', expected 'differential', 'composed' or 'teacher'")
        if self.target == "teacher" and self.enhance_target:
            raise TimError("objective: enhance_target is on with target 'teacher', expected off: what a teacher answers is not guided")
        if self.weight_time_type not in TIME_WEIGHTS:
            expected = ", ".join(repr(name) for name in TIME_WEIGHTS)
            raise TimError(f"objective: weight_time_type is '{self.weight_time_type}', expected one of {expected}")
        for name in ("diffusion_ratio", "consistency_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise TimError(f"objective: {name} is {getattr(self, name)}, expected 0 to 1")
        if not self.adaptive_floor > 0:
            raise TimError(f"objective: adaptive_floor is {self.adaptive_floor}, expected more than 0")
        if not 0 < self.epsilon < 0.5:
            raise TimError(f"objective: epsilon is {self.epsilon}, expected more than 0 and less than 0.5, half the path")
        for name in ("proj_coeff", "w_gt", "w_cond"):
            if not getattr(self, name) >= 0:
                raise TimError(f"objective: {name} is {getattr(self, name)}, expected 0 or more")
        if not self.w_start <= self.w_end:
            raise TimError(f"objective: w_start is {self.w_start} and w_end {self.w_end}, expected w_start to be no greater")


@dataclass(frozen=True)
class Losses:
    """`total` is what to backpropagate; the rest is for logs and tests. t and r are (B, 1, 1, 1), weights and losses (B,)."""

    total: Tensor
    weighted_loss: Tensor
    proj_loss: Tensor | None
    denoising_loss: Tensor
    time_weight: Tensor
    adaptive_weight: Tensor
    t: Tensor
    r: Tensor
    n_diffusion: int
    x_t: Tensor
    v_t: Tensor
    F_pred: Tensor
    projection: Tensor | None
    dF_dt: Tensor
    F_target: Tensor
    F_cond: Tensor | None
    F_null: Tensor | None


def draw_times(batch: int, transport: Transport, generator: torch.Generator | None = None, device: Any = None) -> tuple[Tensor, Tensor]:
    """The two raw draws (B,) float32 of `sample_times`, on the generator's device and then moved to `device`."""
    draw = torch.randn if transport.time_distribution == "normal" else torch.rand
    where = generator.device if generator is not None else device
    first = draw(batch, generator=generator, device=where)
    second = draw(batch, generator=generator, device=where)
    return first.to(device), second.to(device)


def sample_times(
    draws: tuple[Tensor, Tensor], transport: Transport, config: ObjectiveConfig, shift: float = 1.0
) -> tuple[Tensor, Tensor, int]:
    """t, r (B,) and how many items, from the first on, have r = t. Ratios round half to even; the two groups may overlap.

    shift: s of the resolution-dependent time shift t -> s t / (1 + (s - 1) t) (Eq. 50), for times in [0, 1].
    config.near leaves out the long transitions from near noise, where distribution matching gives another answer than a teacher.
    """
    first, second = (shift * t / (1 + (shift - 1) * t) for t in map(transport.times, draws))
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    n_diffusion = round(config.diffusion_ratio * len(t))
    n_consistency = round(config.consistency_ratio * len(t))
    item = torch.arange(len(t), device=t.device)
    r = torch.where(item < n_diffusion, t, r)
    r = torch.where(item >= len(t) - n_consistency, torch.full_like(r, transport.T_min), r)
    if config.near < 1:  # some transports draw times beyond T_max
        r = torch.where(t > config.near * transport.T_max, t - (1 - config.near) * (t - r), r)
    return t, r, n_diffusion


def time_weight(t: Tensor, r: Tensor, n_diffusion: int, sigma_d: float, config: ObjectiveConfig) -> Tensor:
    """w(t, r) (B,) of Eq. 12 and its relatives; 1 where r = t by construction, 0 where the formula has no value (tan beyond pi/2)."""
    t, r = t.flatten(), r.flatten()
    if config.weight_time_tangent:
        t, r = t.tan(), r.tan()
    elif config.weight_time_sigmoid:
        t, r = t / (1 - t), r / (1 - r)
    delta = t - r if config.weight_t_and_r else t
    weight = TIME_WEIGHTS[config.weight_time_type](delta, sigma_d).nan_to_num(nan=0.0)
    return torch.where(torch.arange(len(weight), device=weight.device) < n_diffusion, torch.ones_like(weight), weight)


def transition_loss(
    model: Model,
    x: Tensor,
    noise: Tensor,
    y: Tensor,
    *,
    transport: Transport,
    config: ObjectiveConfig,
    draws: tuple[Tensor, Tensor] | None = None,
    times: tuple[Tensor, Tensor, int] | None = None,
    transitions: bool | None = None,
    between: Tensor | None = None,
    generator: torch.Generator | None = None,
    y_null: Tensor | None = None,
    ema_model: Model | None = None,
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    h_target: Tensor | None = None,
    plain_model: Model | None = None,
) -> Losses:
    """One batch of clean latents x (B, C, H, W) with noise of the same shape and conditions y (B, ...).

    draws: the two raw draws (B,), else made with `generator`. times: what sample_times made of them, where x is a part of a batch;
    transitions: whether the whole batch has any. Then every part runs the network as often: where weights are shared they have to.
    between: uniform numbers (B,) for the times that composed targets go over, else made with `generator`.
    ema_model: for config.enhance_target, which also asks for y_null (B, ...), and in place of the model for composed targets.
    teacher(x_t, t, r) -> F: for target "teacher", with its own conditions inside.
    h_target (B, N, z_dim): asks for the REPA term. plain_model: the same weights without a training wrapper (DDP), for the derivative.
    """
    if config.target == "teacher" and teacher is None:
        raise TimError("objective: target is 'teacher' and teacher is missing, expected the network that answers")
    if times is None:
        times = sample_times(draws or draw_times(len(x), transport, generator, x.device), transport, config)
    flat_t, flat_r, n_diffusion = times
    t, r = flat_t.view(-1, 1, 1, 1), flat_r.view(-1, 1, 1, 1)
    x_t, v_t = transport.interpolate(x, noise, t), transport.velocity(x, noise, t)

    projection = None
    arguments = (x_t, transport.c_noise(flat_t), transport.c_noise(flat_r), y)
    if h_target is None:
        F_pred = model(*arguments)
    else:
        F_pred, projection = model(*arguments, return_projection=True)
    F_pred = _wide(F_pred)

    with torch.no_grad():
        dF_dt = torch.zeros_like(F_pred)
        rest, composed, taught = slice(n_diffusion, None), config.target == "composed", config.target == "teacher"
        some = slice(min(n_diffusion, len(x) - 1), None)  # the rest, or one item whose answer nobody needs
        if transitions is None:
            transitions = n_diffusion < len(x)
        if transitions and not composed and not taught:
            derive = _difference if config.derivative == "dde" else _forward_mode
            found = derive(plain_model or model, x[some], noise[some], t[some], r[some], y[some], transport, config)
            dF_dt[rest] = found[n_diffusion - some.start :].to(dF_dt.dtype)

        diffusion = F_cond = F_null = None
        if config.enhance_target:
            F_cond, F_null = _ema_predictions(ema_model, x_t, t, y, y_null, transport, config)
            diffusion = guided_target(transport.diffusion_target(x, noise, t), F_cond, F_null, t, config)
        F_target = transport.target(x, noise, t, r, dF_dt, diffusion)
        if transitions and composed:
            leader = ema_model or plain_model or model
            if between is None:
                between = torch.rand(len(x), generator=generator, device=x.device if generator is None else generator.device)
            s = r + (t - r) * between.to(t).view(-1, 1, 1, 1)
            found = _composed(leader, x_t[some], t[some], s[some], r[some], y[some], transport)
            F_target[rest] = found[n_diffusion - some.start :].to(F_target.dtype)
        if taught:
            F_target = _wide(teacher(*arguments[:3]))

    # Where a transport has no finite target the item counts as learned: its loss and its gradient are 0, not NaN.
    goal = torch.where(F_target.isfinite(), F_target, F_pred.detach())
    denoising_loss = _finite(((F_pred - goal) ** 2).flatten(1).mean(1))
    if config.use_dir_loss:
        denoising_loss = denoising_loss + _finite((1 - F.cosine_similarity(F_pred, goal, dim=1)).flatten(1).mean(1))
    weight = time_weight(t, r, n_diffusion, transport.sigma_d, config)
    adaptive = 1 / (denoising_loss.detach() + config.adaptive_floor)
    weighted_loss = (weight * adaptive * denoising_loss).mean()

    total, proj_loss = weighted_loss, None
    if h_target is not None:
        proj_loss = _finite((1 - F.cosine_similarity(_wide(projection), h_target, dim=-1)).flatten(1).mean(1)).mean()
        total = total + config.proj_coeff * proj_loss
    return Losses(
        total=total,
        weighted_loss=weighted_loss,
        proj_loss=proj_loss,
        denoising_loss=denoising_loss,
        time_weight=weight,
        adaptive_weight=adaptive,
        t=t,
        r=r,
        n_diffusion=n_diffusion,
        x_t=x_t,
        v_t=v_t,
        F_pred=F_pred,
        projection=projection,
        dF_dt=dF_dt,
        F_target=F_target,
        F_cond=F_cond,
        F_null=F_null,
    )


def _difference(
    model: Model, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, y: Tensor, transport: Transport, config: ObjectiveConfig
) -> Tensor:
    """dF/dt along the path by the central difference (Eq. 10), r fixed."""
    epsilon = torch.full_like(t, config.epsilon)
    if transport.positive_times:
        # A step below t = 0 has no value, so the difference is narrower there.
        epsilon = torch.where(t > epsilon, epsilon, t / 2)
    r_input = transport.c_noise(r.flatten())

    def along(time: Tensor) -> Tensor:
        return _wide(model(transport.interpolate(x, noise, time), transport.c_noise(time.flatten()), r_input, y))

    return (along(t + epsilon) - along(t - epsilon)) / (2 * epsilon)


def _forward_mode(
    model: Model, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, y: Tensor, transport: Transport, config: ObjectiveConfig
) -> Tensor:
    """dF/dt along the path by forward-mode differentiation, r fixed."""
    r_input = transport.c_noise(r.flatten())

    def along(x_t: Tensor, time: Tensor) -> Tensor:
        return _wide(model(x_t, transport.c_noise(time.flatten()), r_input, y))

    # Of torch's attention kernels only the plain one has forward-mode derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        _, dF_dt = torch.func.jvp(
            along, (transport.interpolate(x, noise, t), t), (transport.velocity(x, noise, t), torch.ones_like(t))
        )
    return dF_dt


def _composed(model: Model, x_t: Tensor, t: Tensor, s: Tensor, r: Tensor, y: Tensor, transport: Transport) -> Tensor:
    """The F that jumps from t to r as the model does over the time s between them.

    The transition identity over a finite distance, as in shortcut models (arXiv 2410.12557): no derivative, so nothing blows up where
    the trajectories bend sharply.
    """

    def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        F = _wide(model(x.to(x_t.dtype), transport.c_noise(t.flatten()), transport.c_noise(r.flatten()), y))
        return transport.step(_wide(x), F, t, r)

    return transport.solve_F(_wide(x_t), jump(jump(x_t, t, s), s, r), t, r)


def guided_target(plain: Tensor, F_cond: Tensor, F_null: Tensor, t: Tensor, config: ObjectiveConfig) -> Tensor:
    """The diffusion target `plain` with model guidance (Eq. 51) where w_start <= t <= w_end."""
    guided = config.w_gt * plain + config.w_cond * F_cond + (1 - config.w_gt - config.w_cond) * F_null
    return torch.where((t >= config.w_start) & (t <= config.w_end), guided, plain)


def _ema_predictions(
    ema_model: Model | None, x_t: Tensor, t: Tensor, y: Tensor, y_null: Tensor | None, transport: Transport, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """The EMA network at r = t, with and without the condition. What w_cond = 0 makes useless is not computed."""
    if ema_model is None or y_null is None:
        missing = "ema_model" if ema_model is None else "y_null"
        raise TimError(f"objective: enhance_target is on and {missing} is missing, expected the EMA network and the null condition")
    time = transport.c_noise(t.flatten())
    F_null = _wide(ema_model(x_t, time, time, y_null))
    F_cond = _wide(ema_model(x_t, time, time, y)) if config.w_cond > 0 else torch.zeros_like(F_null)
    return F_cond, F_null


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _finite(loss: Tensor) -> Tensor:
    return loss.nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
