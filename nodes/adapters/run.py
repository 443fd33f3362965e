"""What our MODEL adds to a sampling run of core's: exact transitions, conditionings that fit, and the guidance interval."""

import comfy.k_diffusion.sampling
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...tim_core.errors import TimError

PADDED = "tim_padded"  # conditioning key: the 256 rows of a prompt, padding included
TARGET = "tim_target"  # transformer option: end time of the step of our own sampler
TRANSITION = "tim_transition"  # transformer option: each step ends at the next time of the schedule
INTERVAL = "tim_interval"  # key of the guidance interval's wrapper
PUBLISHED_INTERVAL = (0.0, 1.0)
UNGUIDED = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}  # attributes of core's guiders, at values without guidance


def resolve_r(t: Tensor, options: dict) -> Tensor:
    """End times (B,), float32, of the step that evaluates the network at t (B,).

    Our sampler sets it. A step of stock euler is a transition to the next time of the schedule, since x + (x - denoised) / t * (r - t)
    is x - (t - r) F. For every other sampler r = t: ordinary flow matching.
    """
    t = t.float()
    if options.get(TARGET) is not None:
        return torch.full_like(t, options[TARGET])
    if not options.get(TRANSITION) or options.get("sample_sigmas") is None:
        return t
    sigmas = options["sample_sigmas"].to(t)
    distance, index = (sigmas[:-1] - t[:, None]).abs().min(dim=1)
    return torch.where(distance <= 1e-5, sigmas[1:][index], t)


def _mark_transitions(executor, guider, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE wrapper: marks stock euler, and ddim, which equals it, without churn as taking exact transitions."""
    sampler = executor.class_obj
    is_euler = getattr(sampler, "sampler_function", None) is comfy.k_diffusion.sampling.sample_euler
    if is_euler and not sampler.extra_options:
        extra_args["model_options"].setdefault("transformer_options", {})[TRANSITION] = True
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _fit_conditionings(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: fits the run's copies of the conditionings to each other and to the latent.

    Texts are padded to the longest with their own pad rows, as the official code does inside a batch, so the null text is as long as
    the prompt. Areas in pixels, which core divides by 8 for every model, are converted to the latent's own grid.
    """
    guider = executor.class_obj
    factor = guider.model_patcher.model.latent_format.spacial_downscale_ratio
    conds = [cond for conds in guider.conds.values() for cond in conds]
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
    return executor(*args, **kwargs)


def with_interval(model: comfy.model_patcher.ModelPatcher, low: float, high: float) -> comfy.model_patcher.ModelPatcher:
    """A clone with guidance only at times low < t < high, for the guiders CFG, Dual CFG and Perp-Neg. TimError if low >= high.

    Outside the interval the negatives have no weight and are not evaluated, except by nested Dual CFG, which always does.
    """
    if low >= high:
        raise TimError(f"guidance_low: {low:g} is not below guidance_high {high:g}; to turn CFG off, set cfg to 1")
    low, high = torch.tensor([low, high], dtype=torch.float32).tolist()  # the precision of the times they are compared with

    def guide_inside(executor, x, timestep, *args, **kwargs):
        guider = executor.class_obj
        if low < float(timestep.flatten()[0]) < high:
            return executor(x, timestep, *args, **kwargs)
        strengths = {name: getattr(guider, name) for name in UNGUIDED if hasattr(guider, name)}
        try:
            for name in strengths:
                setattr(guider, name, UNGUIDED[name])
            return executor(x, timestep, *args, **kwargs)
        finally:
            for name, strength in strengths.items():
                setattr(guider, name, strength)

    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, INTERVAL)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, INTERVAL, guide_inside)
    return model


def install(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Adds the wrappers to a new patcher -> a clone with the published guidance interval."""
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "tim", _mark_transitions)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "tim", _fit_conditionings)
    return with_interval(patcher, *PUBLISHED_INTERVAL)
