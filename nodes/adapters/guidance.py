"""The guidance interval: at which times CFG acts."""

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ...tim_core.errors import TimError
from ...tim_core.sampler import check_guidance
from .trace import TRACE

INTERVAL = "tim_interval"  # key of the guidance interval's wrapper
ROUNDING = 1e-6  # of times that core computes in float32: its first time of a shifted schedule may be a little below 1
UNGUIDED = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}  # attributes of core's guiders, at values without guidance


class IntervalWrapper:
    """PREDICT_NOISE wrapper: guidance only at times low < t < high, for the guiders CFG, Dual CFG and Perp-Neg.

    Outside the interval the negatives have no weight and are not evaluated, except by nested Dual CFG, which always does.
    """

    def __init__(self, low: float, high: float):
        self.low, self.high = torch.tensor([low, high], dtype=torch.float32).tolist()  # the precision of the times

    def holds(self, time: float) -> bool:
        """Whether guidance acts at this time."""
        return self.low + ROUNDING < time < self.high - ROUNDING

    def __call__(self, executor, x, timestep, model_options={}, *args, **kwargs):
        guider, trace = executor.class_obj, model_options.get("transformer_options", {}).get(TRACE)
        time = None if trace is None else trace.time
        if time is None:  # reading it waits for the device
            time = float(timestep.flatten()[0])
        if self.holds(time):
            return executor(x, timestep, model_options, *args, **kwargs)
        strengths = {name: getattr(guider, name) for name in UNGUIDED if hasattr(guider, name)}
        try:
            for name in strengths:
                setattr(guider, name, UNGUIDED[name])
            return executor(x, timestep, model_options, *args, **kwargs)
        finally:
            for name, strength in strengths.items():
                setattr(guider, name, strength)


def with_interval(model: comfy.model_patcher.ModelPatcher, low: float, high: float) -> comfy.model_patcher.ModelPatcher:
    """A clone with guidance only at times low < t < high, instead of the model's own interval. TimError for an interval without times."""
    try:
        check_guidance(1.0, (low, high))
    except TimError as error:
        raise TimError(f"guidance_low, guidance_high: {error}") from None
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, INTERVAL)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, INTERVAL, IntervalWrapper(low, high))
    return model


def with_limits(model: comfy.model_patcher.ModelPatcher, low: float, high: float) -> comfy.model_patcher.ModelPatcher:
    """A clone with the guidance interval of a sampler node: a low of 0 and a high of 1, its defaults, keep the model's own limits.

    TimError if the limits leave no interval.
    """
    (own,) = model.get_wrappers(WrappersMP.PREDICT_NOISE, INTERVAL)
    if low > 0 and high >= 1 and low >= own.high or low <= 0 and high < 1 and high <= own.low:
        raise TimError(f"guidance_low, guidance_high: {low:g}, {high:g} leave nothing of the model's {own.low:g} to {own.high:g}; "
                       "set both limits, or to turn CFG off, set cfg to 1")
    return with_interval(model, low if low > 0 else own.low, high if high < 1 else own.high)
