"""One sampler for every grid, transport and mode: transitions x_t -> x_r (arXiv 2509.04394, Alg. 2)."""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .errors import TimError
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
    """Take x (B, C, H, W) at times[0] along the falling `times` -> (x at times[-1], float32; network evaluations per image).

    model(x, t (B,), r (B,), y) -> F. It gets x in x's dtype, and t and r, through the transport's c_noise, in float32 or float64.
    mode: "transition" tells the network the next time (r = next), "diffusion" that there is no interval (r = t).
    cfg: F_null + cfg * (F_cond - F_null) while low * T_max < t < high * T_max, if cfg > 1. Ends are excluded, so a first step at T_max is
    never guided. A guided step counts two evaluations: one call with the batch doubled, cond first, then null.
    stochasticity: share of fresh noise per step (OT-FM only), where t < T_max and r > T_min. noise_sampler(t, r) -> standard normal like x.
    T_max, T_min: the ends of time, the transport's own by default.
    callback: gets k-diffusion's {"x", "i", "sigma", "sigma_hat", "denoised"} and "sigma_next" and "F", before each step.
    TimError for a grid that does not fall, an unknown mode, guidance without null, or a time without a finite condition.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise TimError(f"times: found {_short(times)}, expected at least two times, each smaller than the one before")
    if mode not in MODES:
        raise TimError(f"mode: found '{mode}', expected {' or '.join(MODES)}")
    if cfg > 1 and null is None:
        raise TimError(f"guidance: found cfg {cfg:g} and no null condition, expected both or cfg 1")
    seen = times if mode == "transition" else times[:-1]
    finite = transport.c_noise(seen).isfinite()
    if not bool(finite.all()):
        raise TimError(f"times: found {seen[~finite][0].item():g}, expected times that {type(transport).__name__} can condition on")
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
        told = r if mode == "transition" else t
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
        if transport.stochastic and stochasticity > 0 and _below(t, T_max) and _below(T_min, told):
            fresh = torch.randn_like(state) if noise_sampler is None else noise_sampler(times[i], times[i + 1]).to(state)
            state = transport.step(state, F, t, r, stochasticity, fresh)
        else:
            state = transport.step(state, F, t, r)
    return state.float(), evaluations


def fresh_noise(shape: Sequence[int], seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise sampler of a seed: float32 on the CPU, another stream than the first noise's (seed + 1, as k-diffusion does)."""
    generator = torch.Generator().manual_seed((check_seed(seed) + 1) % 2**64)
    return lambda t, r: torch.randn(tuple(shape), generator=generator)


def check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise TimError(f"seed: found {seed}, expected a whole number from 0 to 2^64 - 1")
    return int(seed)


def _steps(count: int, disable: bool) -> Any:
    if disable:
        return range(count)
    from tqdm.auto import trange

    return trange(count)


def _below(a: Any, b: Any) -> bool:
    """a < b in float32, where 0.6 and a grid's 0.6 are the same time."""
    return bool(torch.as_tensor(a, dtype=torch.float32) < torch.as_tensor(b, dtype=torch.float32))


@lru_cache(maxsize=None)
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.float64, device=device) + 1
    except (TypeError, RuntimeError):
        return False
    return True


def _short(times: Tensor) -> str:
    if times.ndim != 1:
        return f"a tensor of shape {list(times.shape)}"
    shown = ", ".join(f"{time:g}" for time in times[:8].tolist())
    return f"'{shown}, ...'" if len(times) > 8 else f"'{shown}'"
