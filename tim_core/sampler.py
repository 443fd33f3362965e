"""One sampler for every grid, transport and mode: transitions x_t -> x_r (arXiv 2509.04394, Alg. 2)."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .errors import TimError
from .limits import MAX_CFG
from .transport import OTFM, Transport, guide

MODES = ("transition", "diffusion")
Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def sample(
    model: Model,
    x: Tensor,
    times: Tensor | Sequence[float],
    cond: Tensor,
    null: Tensor | None = None,
    *,
    transport: Transport = OTFM(),
    mode: str = "transition",
    cfg: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    stochasticity: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    T_max: float | None = None,
    T_min: float | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool = True,
) -> tuple[Tensor, int]:
    """Sample from x (B, C, H, W) at times[0] to times[-1] -> (x at times[-1], float32; network evaluations per image).

    model(x, t (B,), r (B,), y) -> F. It receives x in x's dtype, and t and r through the transport's c_noise, in float32 or float64.
    mode: "transition" passes the next time as r, "diffusion" passes r = t.
    cfg: if above 1, F = F_null + cfg * (F_cond - F_null) while low * T_max < t < high * T_max. Ends are excluded: a first step at T_max is
    not guided. A guided step counts two evaluations: one call with the batch doubled, cond first, then null.
    stochasticity: share of fresh noise per step (OT-FM only), where t < T_max and r > T_min. noise_sampler(t, r) -> standard normal like x.
    T_max, T_min: the transport's own by default.
    callback: called before each step with k-diffusion's {"x", "i", "sigma", "sigma_hat", "denoised"}, "sigma_next" and "F".
    TimError for times that do not fall, an unknown mode, values that `check_guidance` refuses, guidance without null,
    or a time at which c_noise is not finite.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise TimError(f"times: {_format_times(times)} is not a list of at least two falling times")
    if mode not in MODES:
        raise TimError(f"mode: '{mode}' is unknown; choose from {', '.join(MODES)}")
    check_guidance(cfg, guidance_interval, stochasticity)
    if cfg > 1 and null is None:
        raise TimError(f"cfg: {cfg:g} needs a null condition; give one, or use cfg 1")
    conditioned = times if mode == "transition" else times[:-1]
    finite = transport.c_noise(conditioned).isfinite()
    if not bool(finite.all()):
        name, time = type(transport).__name__, conditioned[~finite][0].item()
        raise TimError(f"times: {name} cannot condition the network on {time:g} (c_noise is not finite); remove this time")
    T_max = transport.T_max if T_max is None else T_max
    T_min = transport.T_min if T_min is None else T_min
    low, high = guidance_interval[0] * T_max, guidance_interval[1] * T_max

    state_dtype = torch.float64 if _has_float64(x.device) else torch.float32
    time_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grid = times.to(state_dtype)
    inputs = transport.c_noise(times).to(time_dtype).to(x.device)
    state = x.to(state_dtype)
    doubled = torch.cat((cond, null)) if cfg > 1 else None
    evaluations = 0

    for i in _steps(len(times) - 1, disable):
        t, r = grid[i], grid[i + 1]
        r_network = r if mode == "transition" else t
        t_input, r_input = inputs[i], inputs[i + 1 if mode == "transition" else i]
        network_x = state.to(x.dtype)
        if cfg > 1 and _below(low, t) and _below(t, high):
            batch = 2 * len(x)
            F = model(torch.cat((network_x, network_x)), t_input.expand(batch), r_input.expand(batch), doubled).to(state_dtype)
            F = guide(F, cfg)
            evaluations += 2
        else:
            F = model(network_x, t_input.expand(len(x)), r_input.expand(len(x)), cond).to(state_dtype)
            evaluations += 1

        if callback is not None:
            callback(
                {
                    "x": state.float(),
                    "i": i,
                    "sigma": times[i],
                    "sigma_hat": times[i],
                    "sigma_next": times[i + 1],
                    "denoised": transport.denoise(state, F, t).float(),
                    "F": F.float(),
                }
            )
        if transport.stochastic and stochasticity > 0 and _below(t, T_max) and _below(T_min, r_network):
            fresh = torch.randn_like(state) if noise_sampler is None else noise_sampler(times[i], times[i + 1]).to(state)
            state = transport.step(state, F, t, r, stochasticity, fresh)
        else:
            state = transport.step(state, F, t, r)
    return state.float(), evaluations


def initial_noise(shape: Sequence[int], seed: int | Sequence[int]) -> Tensor:
    """The noise that ComfyUI draws: float32 on the CPU, the whole batch at once; or with one seed per item."""
    if isinstance(seed, (list, tuple)):
        _check_seed_count(seed, shape[0])
        return torch.cat([initial_noise((1, *shape[1:]), one) for one in seed])
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(check_seed(seed)))


def fresh_noise(shape: Sequence[int], seed: int | Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """A noise sampler for a seed: float32 on the CPU, from seed + 1, so that it differs from the initial noise, as in k-diffusion.

    With one seed per item of the batch, the noise of an item does not depend on the others.
    """
    if isinstance(seed, (list, tuple)):
        _check_seed_count(seed, shape[0])
    seeds = seed if isinstance(seed, (list, tuple)) else [seed]
    generators = [torch.Generator().manual_seed((check_seed(one) + 1) % 2**64) for one in seeds]
    if len(generators) == 1:
        return lambda t, r: torch.randn(tuple(shape), generator=generators[0])
    return lambda t, r: torch.stack([torch.randn(tuple(shape[1:]), generator=generator) for generator in generators])


def check_guidance(cfg: float, guidance_interval: tuple[float, float] = (0.0, 1.0), stochasticity: float = 0.0) -> None:
    """TimError unless cfg is 1 to MAX_CFG, 0 <= low < 1, low < high, and stochasticity 0 to 1: the rules of every way to sample."""
    if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
        raise TimError(f"guidance interval: {guidance_interval!r} is not two numbers, such as (0, 1)")
    for name, value in (("cfg", cfg), *(("guidance interval", end) for end in guidance_interval), ("stochasticity", stochasticity)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TimError(f"{name}: {value!r} is not a number")
    if not 1 <= cfg <= MAX_CFG:
        raise TimError(f"cfg: {cfg:.10g} is outside 1 (no guidance) to {MAX_CFG:g}")
    low, high = guidance_interval
    for value in (low, high):
        if not math.isfinite(value) or value < 0:
            raise TimError(f"guidance interval: {value:g} is not a number of at least 0")
    if low >= high:
        raise TimError(f"guidance interval: {low:g} to {high:g} is empty; the first must be smaller (for no guidance use cfg 1)")
    if low >= 1:
        raise TimError(f"guidance interval: {low:g} to {high:g} holds no time of a run; start below 1 (for no guidance use cfg 1)")
    if not 0 <= stochasticity <= 1:
        raise TimError(f"stochasticity: {stochasticity:g} is outside 0 to 1")


def check_seed(seed: int) -> int:
    """The seed as an int. TimError unless it is a whole number from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise TimError(f"seed: {seed} is not a whole number from 0 to 2^64 - 1")
    return int(seed)


def _check_seed_count(seeds: Sequence[int], batch: int) -> None:
    """TimError unless there are as many seeds as images."""
    if len(seeds) != batch:
        raise TimError(f"seed: {len(seeds)} seeds for {batch} images; give one, or one per image")


def _steps(count: int, disable: bool) -> Any:
    if disable:
        return range(count)
    from tqdm.auto import trange

    return trange(count)


def _below(a: Any, b: Any) -> bool:
    """a < b in float32, in which 0.6 equals the 0.6 of a grid."""
    return bool(torch.as_tensor(a, dtype=torch.float32) < torch.as_tensor(b, dtype=torch.float32))


@lru_cache(maxsize=None)
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.float64, device=device) + 1
    except (TypeError, RuntimeError):
        return False
    return True


def _format_times(times: Tensor) -> str:
    if times.ndim != 1:
        return f"a tensor of shape {list(times.shape)}"
    shown = ", ".join(f"{time:g}" for time in times[:8].tolist())
    return f"'{shown}, ...'" if len(times) > 8 else f"'{shown}'"
