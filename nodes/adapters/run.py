"""What our MODEL adds to a sampling run of core's: the end time of each step, conditionings that fit, and checks.

What cannot act, or cannot be right, is an error or one log line a run.
"""

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.finite import check_finite
from .checks import check_areas, check_cfg, check_coverage, check_latent, check_size, check_start, outside_times
from .guidance import INTERVAL, with_interval
from .log import SAID, Said, say
from .trace import TRACE, Trace, check_result

PADDED = "tim_padded"  # conditioning key: the 256 rows of a prompt, padding included
TARGET = "tim_target"  # transformer option: end time of the current step
TRANSITION = "tim_transition"  # transformer option: each step ends at the next time of the schedule
FLOW_STEPS = 30  # from time 1 to 0, for samplers that give the network no end time
CFG_PP = 1.0  # guidance scale that suits samplers with CFG++: of 8 images 6 to 8 are right; at 1.5 2 to 8, 30 steps
OWN_SAMPLERS = set()  # sampler functions that set TARGET themselves
WITHOUT_EFFECT = {"control": "ControlNet", "gligen": "GLIGEN", "reference_latents": "ReferenceLatent", "guidance": "FluxGuidance",
                  "unclip_conditioning": "unCLIPConditioning"}  # keys of conditionings -> what sets them
KNOWN_KEYS = {  # of conditionings: what core and we read of them, whatever the model
    "area", "clip_end_percent", "clip_start_percent", "control_apply_to_uncond", "cross_attn", "default", "end_percent", "hooks", "mask",
    "mask_strength", "model_conds", "pooled_output", "prompt_type", "set_area_to_bounds", "start_percent", "strength", "timestep_end",
    "timestep_start", "uuid", PADDED,
}
IMAGE_KEYS = {"concat_latent_image", "concat_mask"}  # of models for inpainting and editing


def resolve_r(t: Tensor, options: dict) -> Tensor:
    """End times (B,), float32, of the step that evaluates the network at t (B,).

    Our sampler sets it; for stock lcm it is 0. A step of stock euler is a transition to the next time of the schedule, since
    x + (x - denoised) / t * (r - t) is x - (t - r) F. For every other sampler r = t: ordinary flow matching.
    """
    t = t.float()
    if options.get(TARGET) is not None:
        return torch.full_like(t, options[TARGET])
    if not options.get(TRANSITION) or options.get("sample_sigmas") is None:
        return t
    sigmas = options["sample_sigmas"].to(t)
    distance, index = (sigmas[:-1] - t[:, None]).abs().min(dim=1)
    return torch.where(distance <= 1e-5, torch.minimum(sigmas[1:][index], t), t)


def _start_sampler(executor, guider, sigmas, extra_args, callback, *args, **kwargs):
    """SAMPLER_SAMPLE wrapper: tells the network the end times of stock samplers, and the user what a sampler cannot do.

    euler without churn, and ddim, which equals it, take exact transitions. lcm jumps to time 0 and adds noise again. All others
    treat the network as ordinary flow matching.
    """
    sampler = executor.class_obj
    function = getattr(sampler, "sampler_function", None)
    options = extra_args["model_options"].setdefault("transformer_options", {})
    on_host, trace = sigmas.cpu(), options.get(TRACE)
    own, cfg, times = function in OWN_SAMPLERS, getattr(guider, "cfg", 1.0), on_host.tolist()
    if not own:
        _check_stock_run(sampler, function, on_host, cfg, options)
    elif sampler.extra_options["mode"] == "diffusion" and (fault := _too_few(on_host)):
        say(options, f"mode: diffusion treats TiM as ordinary flow matching and {fault}; for few steps use transition")
    exact = TRANSITION in options or own and sampler.extra_options["mode"] == "transition"
    if outside_times(on_host) is None:
        check_cfg(cfg, guider.model_patcher.model.model_config.defaults.cfg, _interval(guider), times, exact, options)
    if trace is not None:
        trace.own, trace.time = own, None
        if own or TRANSITION in options or TARGET in options:
            callback = trace.follow(times, callback)
    return executor(guider, sigmas, extra_args, callback, *args, **kwargs)


def _check_stock_run(sampler, function, sigmas: Tensor, cfg: float, options: dict) -> None:
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_").removesuffix("_function")
    steps, span = len(sigmas) - 1, float(sigmas[0] - sigmas[-1])
    if "cfg_pp" in name and cfg > CFG_PP:
        say(options, f"cfg: {cfg:g} is too much for {name}, whose guidance is stronger (CFG++); choose {CFG_PP:g}")
    rising = bool((sigmas[1:] > sigmas[:-1]).any())
    if (outside := outside_times(sigmas)) is not None:
        say(options, f"sigmas: {outside:g} is outside 0 to 1, the times of a TiM model; use TiM Scheduler, or BasicScheduler with simple")
    elif rising and steps < round(FLOW_STEPS * abs(span)):
        say(options, f"sigmas: they rise, and {name} treats rising steps as ordinary flow matching, which needs {FLOW_STEPS} steps or more "
                     f"between time 0 and 1, not {steps}")
    if function is comfy.k_diffusion.sampling.sample_euler and not sampler.extra_options:
        options[TRANSITION] = True
    elif function is comfy.k_diffusion.sampling.sample_lcm:
        options[TARGET] = 0.0
    elif name != "dpm_adaptive" and (fault := _too_few(sigmas)):  # that one chooses its number of steps itself
        say(options, f"sampler: {name} treats TiM as ordinary flow matching and {fault}; for few steps use TiM Sampler, euler with simple, "
                     "or lcm")


def _too_few(sigmas: Tensor) -> str | None:
    """What ordinary flow matching needs, if these are too few steps for it."""
    steps, span = len(sigmas) - 1, float(sigmas[0] - sigmas[-1])
    if steps >= round(FLOW_STEPS * min(span, 1.0)):
        return None
    return f"needs {FLOW_STEPS} steps or more from time 1 to 0, not {steps}"


def _interval(guider):
    """The guidance interval of the run's model."""
    (interval,) = guider.model_patcher.get_wrappers(WrappersMP.PREDICT_NOISE, INTERVAL)
    return interval


def _start_run(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
    """OUTER_SAMPLE wrapper: checks what the run was given and what it gives, and fits its conditionings.

    TimError for what cannot be right.
    """
    guider = executor.class_obj
    model = guider.model_patcher
    latent_format = model.get_model_object("latent_format")
    options = guider.model_options.setdefault("transformer_options", {})
    options.setdefault(SAID, Said())
    check_latent(noise, latent_format.latent_channels)
    sampling, on_host = model.get_model_object("model_sampling"), sigmas.cpu()
    if type(sampling).calculate_denoised is not comfy.model_sampling.CONST.calculate_denoised:
        kind = next(base.__name__ for base in type(sampling).__mro__ if base.__module__ == comfy.model_sampling.__name__)
        raise TimError(f"model sampling: {kind} is not for flow models such as TiM; remove the node that sets it, or use ModelSamplingSD3")
    if getattr(sampling, "noise_scale", 1.0) != 1:
        say(options, f"noise scale: {sampling.noise_scale:g}, but TiM is trained with 1; remove ModelNoiseScale")
    _check_sigmas(on_host, sampling)
    if len(on_host) < 2:
        say(options, "sigmas: one time gives no step; the sampler returns the latent as it is")
    check_size(model.model.model_config, latent_image, on_host, options)
    check_start(noise, latent_image, on_host, denoise_mask, options)
    windows = guider.model_options.pop("context_handler", None)  # the run's own copy
    if windows is not None and noise.shape[windows.dim] > windows.context_length:
        say(options, "context windows have no effect: they are for videos, and this model takes an image whole")
    conds = [cond for conds in guider.conds.values() for cond in conds]
    _check_keys(conds, denoise_mask is not None, options)
    _fit_conditionings(conds, latent_format.spacial_downscale_ratio)
    check_areas(conds, *noise.shape[2:], latent_format.spacial_downscale_ratio)
    _check_coverage(guider, on_host, sampling, tuple(noise.shape[2:]), options)
    check_finite(latent_image, "latent before sampling", advice=["a lower cfg or float32 in the node that made it"])
    for cond in conds:
        if cond.get("cross_attn") is not None:
            check_finite(cond["cross_attn"], "conditioning", advice=["CLIP Text Encode with the CLIP of this checkpoint"])
    options[TRACE] = trace = Trace(on_host.tolist())
    try:
        latent = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        options.pop(TRACE, None)  # ComfyUI keeps a GUIDER, with its options, after the run
    check_result(latent, trace, model, options)
    return latent


def _check_sigmas(sigmas: Tensor, sampling) -> None:
    """TimError for times that no sampler can use."""
    if not bool(sigmas.isfinite().all()):
        if not getattr(sampling, "shift", 1.0) > 0:
            raise TimError(f"shift: {sampling.shift:g} gives no falling times; use a shift above 0, such as 3")
        found = ", ".join(f"{sigma:g}" for sigma in sigmas[:4].tolist())
        raise TimError(f"sigmas: {found} are not times from 0 to 1; use another scheduler, or more steps")
    if float(sigmas[-1]) >= 1 - 1e-6:
        raise TimError(f"sigmas: they end at {float(sigmas[-1]):g}, pure noise, from which ComfyUI cannot make a latent; end below 1")


def _check_keys(conds: list[dict], masked: bool, options: dict) -> None:
    """Takes off the run's copies of the conditionings what has no effect, with a log line for each kind."""
    unknown = set()
    for cond in conds:
        for key in WITHOUT_EFFECT.keys() & cond.keys():
            del cond[key]
            say(options, f"{WITHOUT_EFFECT[key]} has no effect: this model has no input for it")
        if not masked and IMAGE_KEYS & cond.keys():
            say(options, "the image in the conditioning has no effect: this model has no input for it; for inpainting give the sampler's "
                         "latent a noise mask")
        unknown |= cond.keys() - KNOWN_KEYS - IMAGE_KEYS
    if names := sorted(str(key) for key in unknown):
        say(options, f"conditioning: {', '.join(names)} has no effect: this model has no input for it")


def _check_coverage(guider, sigmas: Tensor, sampling, size: tuple[int, int], options: dict) -> None:
    """Logs a line for a positive or negative that leaves out a part of the image or of the run."""
    interval = _interval(guider)
    times = sigmas[:-1].tolist()
    guided = [] if getattr(guider, "cfg", 2.0) == 1 else [time for time in times if interval.holds(time)]
    for name, conds in guider.conds.items():
        check_coverage(name, conds, times if name == "positive" else guided, sampling.percent_to_sigma, size, options)


def _fit_conditionings(conds: list[dict], factor: int) -> None:
    """Fits the run's copies of the conditionings to each other and to the latent, of `factor` pixels per cell.

    Texts are padded to the longest with their own pad rows, as the official code does inside a batch, so the null text is as long as
    the prompt. Areas in pixels, which core divides by 8 for every model, are converted to the latent's own grid.
    """
    texts = [cond for cond in conds if cond.get("cross_attn") is not None]
    longest = max((cond["cross_attn"].shape[1] for cond in texts), default=0)
    for cond in texts:
        rows, padded = cond["cross_attn"], cond.get(PADDED)
        # not equal if a node (ConditioningConcat, ConditioningAverage, ...) has changed the rows
        if padded is not None and rows.shape[1] < longest and torch.equal(padded[:, : rows.shape[1]], rows):
            cond["cross_attn"] = padded[:, :longest]
    for cond in conds:
        area = cond.get("area")
        if area is not None and area[0] != "percentage":
            height, width, y, x = (side * 8 // factor for side in area)
            cond["area"] = (max(height, 1), max(width, 1), y, x)


def install(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Adds the wrappers to a new patcher -> a clone with the guidance interval that the checkpoint is made for."""
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "tim", _start_sampler)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "tim", _start_run)
    return with_interval(patcher, *patcher.model.model_config.defaults.guidance_interval)
