"""The guidance interval: at which times CFG acts."""

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ...tim_core.errors import TimError

INTERVAL = "tim_interval"  # key of the guidance interval's wrapper
PUBLISHED_INTERVAL = (0.0, 1.0)
UNGUIDED = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}  # attributes of core's guiders, at values without guidance


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
