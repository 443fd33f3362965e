"""TiM's own sampler as a SAMPLER, the LATENTs that it samples through core's guider, progress and counts."""

import logging

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.sampler import MODES, fresh_noise, sample
from .compat import supported_kwargs
from .model import TARGET, size_multiple, tim_model, with_interval


def with_target(extra_args: dict, r: float) -> dict:
    """A sampler's extra_args, as a copy, with the time that this evaluation goes to."""
    model_options = dict(extra_args.get("model_options", {}))
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), TARGET: r}
    return {**extra_args, "model_options": model_options}


@torch.no_grad()
def sample_transitions(model, x, sigmas, extra_args=None, callback=None, disable=None, mode="transition", stochasticity=0.0):
    """tim_core's sampler in the form of a k-diffusion sampler; `model` guides, so one evaluation here is a guided one."""
    extra_args = extra_args or {}

    def network(x, t, r, _):
        mm.throw_exception_if_processing_interrupted()
        return (x - model(x, t, **with_target(extra_args, r[0].item()))) / t[0]

    fresh = fresh_noise(x.shape, extra_args.get("seed") or 0)
    options = dict(mode=mode, stochasticity=stochasticity, noise_sampler=fresh)
    return sample(network, x, sigmas, None, callback=callback, disable=bool(disable), **options)[0]


def transition_sampler(mode: str = "transition", stochasticity: float = 0.0) -> comfy.samplers.KSAMPLER:
    """The SAMPLER that takes TiM's steps; TimError for a mode or a share of noise that there is not."""
    if mode not in MODES:
        raise TimError(f"mode: found '{mode}', expected {' or '.join(MODES)}")
    if not 0 <= stochasticity <= 1:
        raise TimError(f"stochasticity: found {stochasticity}, expected 0 to 1")
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
    """A LATENT at times[0] (noise is mixed in) to a LATENT at times[-1]; unfinished ones are scaled as core's samplers scale them.

    Through core's guider: masks, areas, hooks, LoRAs and previews work as in KSampler. Without add_noise the latent is one that another
    sampler left unfinished at times[0]. `callback` in place of the progress bar and previews of core.
    """
    tim_model(model)
    model = with_interval(model, *interval)
    ratio = {"downscale_ratio_spacial": latent.get("downscale_ratio_spacial")}
    samples = latent["samples"]
    samples = comfy.sample.fix_empty_latent_channels(model, samples, **supported_kwargs(comfy.sample.fix_empty_latent_channels, **ratio))
    samples = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")) if add_noise else torch.zeros_like(samples),
        cfg,
        transition_sampler(stochasticity=stochasticity),
        times.float(),
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


def shared_progress(model, steps: int):
    """One progress bar over several samplings of `steps` steps in all -> the callback of the sampling after `done` steps."""
    shown = latent_preview.prepare_callback(model, steps)
    return lambda done: lambda step, x0, x, total: shown(done + step, x0, x, steps)


def count_evaluations(model) -> tuple[comfy.model_patcher.ModelPatcher, list[int]]:
    """A clone of the model, and a list to which each of its network calls adds the number of pictures that it evaluated."""
    rows: list[int] = []

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "tim_count", count)
    return model, rows


def empty_latent(model, width: int, height: int, batch_size: int) -> dict:
    """A LATENT of zeros for pictures of width x height pixels, rounded to what the model can draw, with a line in the log."""
    inner = tim_model(model)
    factor, multiple = inner.latent_format.spacial_downscale_ratio, size_multiple(model)
    rounded = [max(1, int(side / multiple + 0.5)) * multiple for side in (width, height)]
    if rounded != [width, height]:
        logging.info(f"TiMEmptyLatent: {width}x{height} becomes {rounded[0]}x{rounded[1]}, multiples of {multiple}")
    shape = (batch_size, inner.latent_format.latent_channels, rounded[1] // factor, rounded[0] // factor)
    return {"samples": torch.zeros(shape, device=mm.intermediate_device()), "downscale_ratio_spacial": factor}


def first_of_batch(latent: dict) -> dict:
    """The first of a batch of latents, with its own noise."""
    first = {name: latent[name][:1] for name in ("samples", "noise_mask", "batch_index") if name in latent}
    return {**latent, **first}


def as_batch(images: list[Tensor]) -> Tensor:
    """Pictures (H, W, 3) as an IMAGE."""
    return torch.stack(images)
