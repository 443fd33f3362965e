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
    """Settings of the loss; defaults as in the official text-to-image training. The transport has the distribution of times."""

    diffusion_ratio: float = 0.5  # fraction of the batch, its first items, with r = t
    consistency_ratio: float = 0.1  # fraction of the batch, its last items, with r = T_min
    # fraction of T_max: transitions from above it are shortened to 1 - shorten_above of their length (1: none); not in the paper
    shorten_above: float = 1.0
    derivative: str = "dde"  # "dde", the central difference of Eq. 10, or "jvp", forward-mode differentiation
    epsilon: float = 0.005  # half the width of the central difference
    # "differential", Eq. 9; not in the paper: "composed", F(t, r) from F(t, s) and F(s, r), or "teacher", another network's prediction
    target: str = "differential"
    adaptive_floor: float = 1e-5  # the weight of an item is 1 / (its loss + adaptive_floor)
    weight_time_type: str = "sqrt"
    weight_time_tangent: bool = True  # weight as a function of tan t - tan r; overrides weight_time_sigmoid
    weight_time_sigmoid: bool = False  # weight as a function of t / (1 - t) - r / (1 - r)
    weight_t_and_r: bool = True  # weight as a function of the interval, else of t
    use_dir_loss: bool = True  # add 1 - cosine over channels
    proj_coeff: float = 1.0  # weight of the REPA term
    enhance_target: bool = False  # model guidance, for w_start <= t <= w_end
    w_gt: float = 1.0
    w_cond: float = 0.0
    w_start: float = 0.0
    w_end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shorten_above <= 1:
            raise TimError(f"objective.shorten_above is {self.shorten_above}; use more than 0 and at most 1")
        if self.derivative not in ("dde", "jvp"):
            raise TimError(f"objective.derivative is '{self.derivative}'; use 'dde' or 'jvp'")
        if self.target not in ("differential", "composed", "teacher"):
            raise TimError(f"objective.target is '{self.target}'; use 'differential', 'composed' or 'teacher'")
        if self.target == "teacher" and self.enhance_target:
            raise TimError("objective.enhance_target is true; use false with target 'teacher', whose predictions are not guided")
        if self.weight_time_type not in TIME_WEIGHTS:
            names = ", ".join(repr(name) for name in TIME_WEIGHTS)
            raise TimError(f"objective.weight_time_type is '{self.weight_time_type}'; use one of {names}")
        for name in ("diffusion_ratio", "consistency_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise TimError(f"objective.{name} is {getattr(self, name)}; use 0 to 1")
        # below the lower limits float32 loses all digits of a difference or of a weight
        limits = {"adaptive_floor": (1e-8, 1e3), "epsilon": (1e-6, 0.49), "proj_coeff": (0, 1e3), "w_gt": (0, 1e3), "w_cond": (0, 1e3),
                  "w_start": (-1e3, 1e3), "w_end": (-1e3, 1e3)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise TimError(f"objective.{name} is {getattr(self, name)}; use {least:g} to {most:g}")
        if not self.w_start <= self.w_end:
            raise TimError(f"objective.w_start is {self.w_start}; use at most w_end, {self.w_end}")


@dataclass(frozen=True)
class Losses:
    """`total` is the loss to minimise; the rest are the intermediate values that recordings of the official code hold.

    t and r are (B, 1, 1, 1), weights and losses (B,).
    """

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


def draw_times(batch: int, transport: Transport) -> tuple[Tensor, Tensor]:
    """The two raw draws (B,) float32 for `sample_times`, from torch's global CPU generator."""
    draw = torch.randn if transport.time_distribution == "normal" else torch.rand
    return draw(batch), draw(batch)


def sample_times(
    raw_times: tuple[Tensor, Tensor], transport: Transport, config: ObjectiveConfig, shift: float = 1.0
) -> tuple[Tensor, Tensor, int]:
    """t and r (B,), and the number of first items with r = t. Ratios round half to even; the two groups may overlap.

    shift: s of the resolution-dependent time shift t -> s t / (1 + (s - 1) t) (Eq. 50), for times in [0, 1].
    config.shorten_above leaves out long transitions from high noise, for which distribution matching and a teacher disagree.
    """
    first, second = (shift * t / (1 + (shift - 1) * t) for t in map(transport.times, raw_times))
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    n_diffusion = round(config.diffusion_ratio * len(t))
    n_consistency = round(config.consistency_ratio * len(t))
    item = torch.arange(len(t), device=t.device)
    r = torch.where(item < n_diffusion, t, r)
    r = torch.where(item >= len(t) - n_consistency, torch.full_like(r, transport.T_min), r)
    if config.shorten_above < 1:  # at 1 nothing is shortened, though some transports draw times above T_max
        r = torch.where(t > config.shorten_above * transport.T_max, t - (1 - config.shorten_above) * (t - r), r)
    return t, r, n_diffusion


def time_weight(t: Tensor, r: Tensor, n_diffusion: int, sigma_d: float, config: ObjectiveConfig) -> Tensor:
    """w(t, r) (B,) of Eq. 12 and its variants; 1 for the first n_diffusion items, 0 where undefined (tan beyond pi/2)."""
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
    raw_times: tuple[Tensor, Tensor] | None = None,
    times: tuple[Tensor, Tensor, int] | None = None,
    transitions: bool | None = None,
    between: Tensor | None = None,
    y_null: Tensor | None = None,
    ema_model: Model | None = None,
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    h_target: Tensor | None = None,
) -> Losses:
    """The objective (paper Alg. 1) for clean latents x (B, C, H, W), noise of the same shape and conditions y (B, ...).

    Times: from `times`, what sample_times returned, cut to this part of a batch; else from `raw_times`, the two draws of draw_times;
    else drawn.
    transitions: whether the whole batch has items with r < t (default: whether x has). If so, every part of the batch evaluates the
    network equally often, as FSDP needs it.
    between: uniform numbers (B,) that place the middle time of composed targets; else drawn.
    ema_model: for config.enhance_target, with y_null (B, ...), and for composed targets, for which it replaces the model.
    teacher(x_t, t, r) -> F: for target "teacher"; it has its own conditions.
    h_target (B, N, z_dim): adds the REPA term.
    """
    if config.target == "teacher" and teacher is None:
        raise TimError("objective.target is 'teacher', and the teacher is missing; pass teacher")
    if times is None:
        first, second = raw_times or draw_times(len(x), transport)
        times = sample_times((first.to(x.device), second.to(x.device)), transport, config)
    flat_t, flat_r, n_diffusion = times
    t, r = flat_t.view(-1, 1, 1, 1), flat_r.view(-1, 1, 1, 1)
    x_t, v_t = transport.interpolate(x, noise, t), transport.velocity(x, noise, t)

    projection = None
    arguments = (x_t, transport.c_noise(flat_t), transport.c_noise(flat_r), y)
    if h_target is None:
        F_pred = model(*arguments)
    else:
        F_pred, projection = model(*arguments, return_projection=True)
    F_pred = _to_float32(F_pred)

    with torch.no_grad():
        dF_dt = torch.zeros_like(F_pred)
        rest, composed, use_teacher = slice(n_diffusion, None), config.target == "composed", config.target == "teacher"
        some = slice(min(n_diffusion, len(x) - 1), None)  # the rest, or one item whose result is not used
        if transitions is None:
            transitions = n_diffusion < len(x)
        if transitions and not composed and not use_teacher:
            derive = _difference if config.derivative == "dde" else _forward_mode
            found = derive(model, x[some], noise[some], t[some], r[some], y[some], transport, config)
            dF_dt[rest] = found[n_diffusion - some.start :].to(dF_dt.dtype)

        diffusion = F_cond = F_null = None
        if config.enhance_target:
            F_cond, F_null = _ema_predictions(ema_model, x_t, t, y, y_null, transport, config)
            diffusion = guided_target(transport.diffusion_target(x, noise, t), F_cond, F_null, t, config)
        F_target = transport.target(x, noise, t, r, dF_dt, diffusion)
        if transitions and composed:
            target_model = ema_model or model
            if between is None:
                between = torch.rand(len(x))
            s = r + (t - r) * between.to(t).view(-1, 1, 1, 1)
            found = _composed(target_model, x_t[some], t[some], s[some], r[some], y[some], transport)
            F_target[rest] = found[n_diffusion - some.start :].to(F_target.dtype)
        if use_teacher:
            F_target = _to_float32(teacher(*arguments[:3]))

    # Where the target of a transport is not finite, loss and gradient are 0 instead of NaN.
    target = torch.where(F_target.isfinite(), F_target, F_pred.detach())
    denoising_loss = _finite(((F_pred - target) ** 2).flatten(1).mean(1))
    if config.use_dir_loss:
        denoising_loss = denoising_loss + _finite((1 - F.cosine_similarity(F_pred, target, dim=1)).flatten(1).mean(1))
    weight = time_weight(t, r, n_diffusion, transport.sigma_d, config)
    adaptive = 1 / (denoising_loss.detach() + config.adaptive_floor)
    weighted_loss = (weight * adaptive * denoising_loss).mean()

    total, proj_loss = weighted_loss, None
    if h_target is not None:
        proj_loss = _finite((1 - F.cosine_similarity(_to_float32(projection), h_target, dim=-1)).flatten(1).mean(1)).mean()
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
        # t - epsilon must stay above 0.
        epsilon = torch.where(t > epsilon, epsilon, t / 2)
    r_input = transport.c_noise(r.flatten())

    def along(time: Tensor) -> Tensor:
        return _to_float32(model(transport.interpolate(x, noise, time), transport.c_noise(time.flatten()), r_input, y))

    return (along(t + epsilon) - along(t - epsilon)) / (2 * epsilon)


def _forward_mode(
    model: Model, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, y: Tensor, transport: Transport, config: ObjectiveConfig
) -> Tensor:
    """dF/dt along the path by forward-mode differentiation, r fixed."""
    r_input = transport.c_noise(r.flatten())

    def along(x_t: Tensor, time: Tensor) -> Tensor:
        return _to_float32(model(x_t, transport.c_noise(time.flatten()), r_input, y))

    # Only this attention kernel of torch has forward-mode derivatives.
    with sdpa_kernel(SDPBackend.MATH):
        _, dF_dt = torch.func.jvp(
            along, (transport.interpolate(x, noise, t), t), (transport.velocity(x, noise, t), torch.ones_like(t))
        )
    return dF_dt


def _composed(model: Model, x_t: Tensor, t: Tensor, s: Tensor, r: Tensor, y: Tensor, transport: Transport) -> Tensor:
    """The F of the jump from t to r that arrives where the model's jumps from t to s and from s to r do.

    The transition identity over a finite distance, as in shortcut models (arXiv 2410.12557). Without a derivative, targets stay bounded
    where trajectories bend sharply.
    """

    def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        F = _to_float32(model(x.to(x_t.dtype), transport.c_noise(t.flatten()), transport.c_noise(r.flatten()), y))
        return transport.step(_to_float32(x), F, t, r)

    return transport.solve_F(_to_float32(x_t), jump(jump(x_t, t, s), s, r), t, r)


def guided_target(plain: Tensor, F_cond: Tensor, F_null: Tensor, t: Tensor, config: ObjectiveConfig) -> Tensor:
    """The diffusion target `plain` with model guidance (Eq. 51) where w_start <= t <= w_end."""
    guided = config.w_gt * plain + config.w_cond * F_cond + (1 - config.w_gt - config.w_cond) * F_null
    return torch.where((t >= config.w_start) & (t <= config.w_end), guided, plain)


def _ema_predictions(
    ema_model: Model | None, x_t: Tensor, t: Tensor, y: Tensor, y_null: Tensor | None, transport: Transport, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """The EMA network at r = t with the condition (zeros if w_cond is 0) and without it."""
    if ema_model is None or y_null is None:
        missing = "ema_model" if ema_model is None else "y_null"
        raise TimError(f"objective.enhance_target is true, and {missing} is missing; pass the EMA network and the null condition")
    time = transport.c_noise(t.flatten())
    F_null = _to_float32(ema_model(x_t, time, time, y_null))
    F_cond = _to_float32(ema_model(x_t, time, time, y)) if config.w_cond > 0 else torch.zeros_like(F_null)
    return F_cond, F_null


def _to_float32(x: Tensor) -> Tensor:
    """float64 as it is, all other dtypes as float32."""
    return x if x.dtype == torch.float64 else x.float()


def _finite(loss: Tensor) -> Tensor:
    return loss.nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
