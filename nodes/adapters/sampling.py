"""TiM's sampler as a SAMPLER, sampling of LATENTs through core's guider, progress, and latent helpers."""

import logging

import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...tim_core import schedule
from ...tim_core.errors import TimError
from ...tim_core.limits import MAX_SHIFT, MIN_SHIFT
from ...tim_core.sampler import MODES, check_guidance, fresh_noise, sample
from .checks import outside_times
from .compat import supported_kwargs
from .guidance import with_limits
from .model import size_multiple, tim_model
from .run import OWN_SAMPLERS, TARGET


class ShiftedSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The model sampling of a flow model whose times are shifted."""


def with_target(extra_args: dict, r: float) -> dict:
    """A copy of a sampler's extra_args with the end time r of the current step."""
    model_options = dict(extra_args.get("model_options", {}))
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), TARGET: r}
    return {**extra_args, "model_options": model_options}


@torch.no_grad()
def sample_transitions(model, x, sigmas, extra_args=None, callback=None, disable=None, mode="transition", stochasticity=0.0):
    """tim_core's sampler with the signature of a k-diffusion sampler; `model` applies the guidance itself."""
    extra_args = extra_args or {}
    tim_model(model.inner_model.model_patcher)
    times = check_sigmas(sigmas).tolist()
    ends = iter(times[1:] if mode == "transition" else times)

    def network(x, t, r, _):
        mm.throw_exception_if_processing_interrupted()
        return (x - model(x, t, **with_target(extra_args, next(ends)))) / t[0]

    fresh = fresh_noise(x.shape, extra_args.get("seed") or 0)
    options = dict(mode=mode, stochasticity=stochasticity, noise_sampler=fresh)
    return sample(network, x, sigmas, None, callback=callback, disable=bool(disable), **options)[0]


OWN_SAMPLERS.add(sample_transitions)


def transition_sampler(mode: str = "transition", stochasticity: float = 0.0) -> comfy.samplers.KSAMPLER:
    """TiM's SAMPLER. TimError for an unknown mode or a stochasticity outside 0 to 1."""
    if mode not in MODES:
        raise TimError(f"mode: '{mode}' is not offered; choose {' or '.join(MODES)}")
    check_guidance(1.0, stochasticity=stochasticity)
    return comfy.samplers.KSAMPLER(sample_transitions, {"mode": mode, "stochasticity": stochasticity})


def sample_latent(
    model,
    positive,
    negative,
    latent: dict,
    seed: int,
    cfg: float,
    times: Tensor,
    interval: tuple[float, float],
    stochasticity: float = 0.0,
    add_noise: bool = True,
    callback=None,
) -> dict:
    """Samples a LATENT from times[0], to which noise is added, to times[-1]; unfinished latents are scaled as core scales them.

    interval: limits of the guidance interval; 0 and 1 keep the model's own, see `with_limits`.
    times: of the steps, as they are; see `time_grid`.
    Runs through core's guider: masks, areas, hooks, LoRAs and previews work as in KSampler. With add_noise off the latent must come
    from another sampler that stopped at times[0]. `callback` replaces core's progress bar and previews.
    """
    tim_model(model)
    model = with_limits(model, *interval)
    ratio = {"downscale_ratio_spacial": latent.get("downscale_ratio_spacial")}
    samples = latent["samples"]
    samples = comfy.sample.fix_empty_latent_channels(model, samples, **supported_kwargs(comfy.sample.fix_empty_latent_channels, **ratio))
    samples = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")) if add_noise else torch.zeros_like(samples),
        cfg,
        transition_sampler(stochasticity=stochasticity),
        times,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=callback or latent_preview.prepare_callback(model, len(times) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    rest = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"}
    return {**rest, "samples": samples}


def time_grid(model, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Equal steps, shifted as the MODEL's sampling shifts them (ModelSamplingSD3), float32. TimError if the shift leaves no falling times.

    Equal to KSampler's `simple` times, bit for bit, on the grid that both have.
    """
    tim_model(model)
    sampling, times = model.get_model_object("model_sampling"), schedule.uniform(steps, start, end).float()
    if not hasattr(sampling, "shift"):
        return times  # not a flow model's: refused when the run starts
    shifted = sampling.sigma(sampling.timestep(times))
    if not bool((shifted[1:] < shifted[:-1]).all()):
        raise TimError(f"shift: {sampling.shift:g} gives no falling times; use a shift above 0, such as 3")
    return shifted


def with_shift(model, shift: float) -> comfy.model_patcher.ModelPatcher:
    """The model for shift 1, else a clone that samples with this shift, as ModelSamplingSD3 makes one."""
    inner = tim_model(model)
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise TimError(f"shift: {shift} is outside {MIN_SHIFT:g} to {MAX_SHIFT:g} (1: the model's own times)")
    before = model.get_model_object("model_sampling")
    if shift == 1 or not hasattr(before, "shift"):  # not a flow model's: refused when the run starts
        return model
    sampling = ShiftedSampling(inner.model_config)
    sampling.set_parameters(shift=shift)
    if hasattr(before, "noise_scale"):
        sampling.set_noise_scale(before.noise_scale)
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


def check_sigmas(sigmas: Tensor) -> Tensor:
    """A SIGMAS as times. TimError unless they are at least two, falling, and from 0 to 1."""
    if (outside := outside_times(sigmas)) is not None:
        raise TimError(f"sigmas: {outside:g} is outside 0 to 1, the times of a TiM model; use TiM Scheduler, or BasicScheduler with simple")
    if len(sigmas) < 2:
        raise TimError(f"sigmas: {len(sigmas)} given; at least two are needed, for one step")
    times = sigmas.tolist()
    for before, after in zip(times, times[1:]):
        if after >= before:
            raise TimError(f"sigmas: {after:g} follows {before:g}; each must be smaller than the one before")
    return sigmas


def shared_progress(model, steps: int):
    """One progress bar for several samplings, `steps` in total -> function from the steps done so far to the next callback."""
    shown = latent_preview.prepare_callback(model, steps)
    return lambda done: lambda step, x0, x, total: shown(done + step, x0, x, steps)


def count_evaluations(model) -> tuple[comfy.model_patcher.ModelPatcher, list[int]]:
    """A clone of the model, and a list to which each network call appends its batch size."""
    rows: list[int] = []

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "tim_count", count)
    return model, rows


def fitting_size(model, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels, rounded to multiples of size_multiple, at least one of it."""
    multiple = size_multiple(model)
    return max(1, int(width / multiple + 0.5)) * multiple, max(1, int(height / multiple + 0.5)) * multiple


def empty_latent(model, width: int, height: int, batch_size: int) -> dict:
    """A LATENT of zeros for images of width x height pixels, rounded to fit; the log says when that changes the size."""
    inner = tim_model(model)
    factor, size = inner.latent_format.spacial_downscale_ratio, fitting_size(model, width, height)
    if size != (width, height):
        logging.info(f"Empty TiM Latent: {width}x{height} rounded to {size[0]}x{size[1]}, multiples of {size_multiple(model)}")
    shape = (batch_size, inner.latent_format.latent_channels, size[1] // factor, size[0] // factor)
    return {"samples": torch.zeros(shape, device=mm.intermediate_device()), "downscale_ratio_spacial": factor}
