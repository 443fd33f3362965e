"""What our MODEL adds to a sampling run of core's: exact transitions, conditionings that fit, the guidance interval, and checks.

What cannot act, or cannot be right, is an error or one log line a run.
"""

import inspect
import logging

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.weights.defaults import RELEASED_SIDES, find_defaults

PADDED = "tim_padded"  # conditioning key: the 256 rows of a prompt, padding included
TARGET = "tim_target"  # transformer option: end time of the current step
TRANSITION = "tim_transition"  # transformer option: each step ends at the next time of the schedule
SAID = "tim_said"  # transformer option: the lines that this run has logged
INTERVAL = "tim_interval"  # key of the guidance interval's wrapper
PUBLISHED_INTERVAL = (0.0, 1.0)
FLOW_STEPS = 30  # from time 1 to 0, for samplers that give the network no end time
UNGUIDED = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}  # attributes of core's guiders, at values without guidance
OWN_SAMPLERS = set()  # sampler functions that set TARGET themselves
WITHOUT_EFFECT = {"control": "ControlNet", "gligen": "GLIGEN", "reference_latents": "ReferenceLatent", "guidance": "FluxGuidance",
                  "unclip_conditioning": "unCLIPConditioning"}  # keys of conditionings -> what sets them
ATTENTIONS = ("attn1", "attn2")


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
    return torch.where(distance <= 1e-5, sigmas[1:][index], t)


class Said(set):
    """The lines that runs have logged; shared by all clones of a patcher, which version 0.3.64 makes with deepcopy."""

    def __deepcopy__(self, memo):
        return self


def say(options: dict, text: str) -> None:
    """Logs a line, once in the run that the transformer options belong to."""
    said = options.get(SAID, set())
    if text not in said:
        said.add(text)
        logging.warning(f"TiM: {text}")


def log_once(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone whose runs, several in one node, log each line once between them."""
    model = model.clone()
    model.model_options["transformer_options"][SAID] = Said()
    return model


def usable_patches(options: dict, depth: int, has_text: bool) -> dict:
    """The transformer options without the patches that a transformer of `depth` blocks has no place for; the log names their nodes."""
    lists, tables = options.get("patches", {}), options.get("patches_replace", {})
    if not lists and not tables and "rope_options" not in options:
        return options
    outputs = lists.get("attn1_output_patch", [])
    if guidance := [patch for patch in outputs if _owner(patch) == "NAGuidance"]:
        # It compares prompts, so it belongs where the image meets the text: in attn1 for core's joint transformers, in attn2 here.
        rest = [patch for patch in outputs if patch not in guidance]
        lists = {**lists, "attn1_output_patch": rest, "attn2_output_patch": [*lists.get("attn2_output_patch", []), *guidance]}
    foreign = {}  # owner -> the place it patches
    if "rope_options" in options:
        foreign["ScaleROPE"] = "rope_options"
    for name, patches in lists.items():
        if name != "double_block" and not name.startswith(ATTENTIONS):
            foreign |= {_owner(patch): name for patch in patches}
        elif name.startswith("attn2") and not has_text:
            foreign |= {_owner(patch): name for patch in patches}
        elif name in ("attn1_patch", "attn2_patch"):
            foreign |= {_owner(patch): name for patch in patches if not _is_for_transformers(patch)}
    kept = {name: [patch for patch in patches if _owner(patch) not in foreign] for name, patches in lists.items()}

    replaced = {name: dict(table) for name, table in tables.items()}
    for name, table in tables.items():
        known = {("double_block", i) for i in range(depth if has_text or name != "attn2" else 0)}
        known |= {("middle", 0), ("middle", 0, 0)} if name == "attn1" else set()
        if name in ("dit", *ATTENTIONS) and not known.isdisjoint(table):
            known |= {key for key in table if key[0] == "single_block"}  # nodes for any model name both kinds
        for key in table:
            if name not in ("dit", *ATTENTIONS) or key not in known:
                del replaced[name][key]
                foreign.setdefault(_owner(table[key]), f"{name} {' '.join(map(str, key))}")
    for owner, place in foreign.items():
        say(options, f"{owner} has no effect on {place}: this model has the blocks 0 to {depth - 1} and nothing else to patch")
    return {**options, "patches": kept, "patches_replace": replaced}


def _owner(patch) -> str:
    """The node that a patch comes from: the class that it was defined in, or its own."""
    return getattr(patch, "__qualname__", type(patch).__qualname__).split(".")[0]


def _is_for_transformers(patch) -> bool:
    """Whether an attention patch takes what core's transformers pass, and not what U-Nets or Wan pass."""
    try:
        inspect.signature(patch).bind(None, None, None, pe=None, attn_mask=None, extra_options={})
    except (TypeError, ValueError):
        return False
    return True


def check_latent(latent: Tensor, channels: int) -> None:
    """TimError unless the latent is (B, channels, H, W)."""
    if latent.ndim != 4 or latent.shape[1] != channels:
        shape = "x".join(map(str, latent.shape))
        raise TimError(f"latent: {shape} is not one of this model, which has 4 dimensions, {channels} of them channels; "
                       "use Empty TiM Latent, or VAE Encode with the VAE of the same checkpoint")


def _start_sampler(executor, guider, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE wrapper: tells the network the end times of stock samplers, and the user what a sampler cannot do.

    euler without churn, and ddim, which equals it, take exact transitions. lcm jumps to time 0 and adds noise again. All others take
    the network as ordinary flow matching.
    """
    sampler = executor.class_obj
    function = getattr(sampler, "sampler_function", None)
    options = extra_args["model_options"].setdefault("transformer_options", {})
    if function not in OWN_SAMPLERS:
        _check_stock_run(sampler, function, sigmas, options)
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _check_stock_run(sampler, function, sigmas: Tensor, options: dict) -> None:
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_").removesuffix("_function")
    steps, span = len(sigmas) - 1, float(sigmas[0] - sigmas[-1])
    if (outside := outside_times(sigmas)) is not None:
        say(options, f"sigmas: {outside:g} is outside 0 to 1, the times of a TiM model; use TiM Scheduler, or BasicScheduler with simple")
    if function is comfy.k_diffusion.sampling.sample_euler and not sampler.extra_options:
        options[TRANSITION] = True
    elif function is comfy.k_diffusion.sampling.sample_lcm:
        options[TARGET] = 0.0
    elif name != "dpm_adaptive" and steps < round(FLOW_STEPS * min(span, 1.0)):  # that one chooses its number of steps itself
        say(options, f"sampler: {name} takes TiM as ordinary flow matching and needs {FLOW_STEPS} steps or more from time 1 to 0, "
                     f"not {steps}; for few steps use TiM Sampler, euler with simple, or lcm")


def outside_times(sigmas: Tensor) -> float | None:
    """The first sigma outside 0 to 1, None if there is none."""
    return next((sigma for sigma in sigmas.tolist() if not -1e-6 <= sigma <= 1 + 1e-6), None)


def _start_run(executor, noise, latent_image, *args, **kwargs):
    """OUTER_SAMPLE wrapper: checks what the run was given, and fits its conditionings. TimError for what cannot be right."""
    guider = executor.class_obj
    model = guider.model_patcher
    latent_format = model.get_model_object("latent_format")
    options = guider.model_options.setdefault("transformer_options", {})
    options.setdefault(SAID, Said())
    check_latent(noise, latent_format.latent_channels)
    sampling = model.get_model_object("model_sampling")
    if type(sampling).calculate_denoised is not comfy.model_sampling.CONST.calculate_denoised:
        kind = next(base.__name__ for base in type(sampling).__mro__ if base.__module__ == comfy.model_sampling.__name__)
        raise TimError(f"model sampling: {kind} is not for flow models such as TiM; remove the node that sets it, or use ModelSamplingSD3")
    _check_size(model.model, noise, options)
    conds = [cond for conds in guider.conds.values() for cond in conds]
    for cond in conds:
        for key in WITHOUT_EFFECT.keys() & cond.keys():
            del cond[key]  # the run's own copy
            say(options, f"{WITHOUT_EFFECT[key]} has no effect: this model has no input for it")
    _fit_conditionings(conds, latent_format.spacial_downscale_ratio)
    return executor(noise, latent_image, *args, **kwargs)


def _check_size(model, noise: Tensor, options: dict) -> None:
    config, record = model.diffusion_model.config, model.model_config.record
    factor = model.latent_format.spacial_downscale_ratio
    made_for = find_defaults(record, config.in_channels, factor, config.patch_size)
    width, height = noise.shape[3] * factor, noise.shape[2] * factor
    released = config.in_channels in RELEASED_SIDES and "native_size" not in record
    reach = 16 if released else 4  # the released model was trained from 256 to 4096 pixels a side
    ratio = width * height / (made_for.width * made_for.height)
    if not 1 / reach <= ratio <= reach:
        say(options, f"size: {width}x{height} is far from {made_for.width}x{made_for.height}, which this model is made for; "
                     "expect a broken image, or use TiM Native Upscale")


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
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "tim", _start_sampler)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "tim", _start_run)
    return with_interval(patcher, *PUBLISHED_INTERVAL)
