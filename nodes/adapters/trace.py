"""Where a run is, and at which step its values stopped being finite: nothing waits for the device, except for the error."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_patcher
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.finite import check_finite
from .log import say

TRACE = "tim_trace"  # transformer option: the Trace of the run


@dataclass
class Evaluation:
    """Times (B,) of an evaluation, and the sums of its input and output, which are finite as long as all their values are."""

    t: Tensor
    r: Tensor
    sum_in: Tensor
    sum_out: Tensor


class Trace:
    """The times and evaluations of one run. own: whether our sampler makes them.

    time: of the next evaluation, if the sampler evaluates at the run's times alone (`follow`), else None.
    """

    def __init__(self, times: list[float]):
        self.times, self.evaluations, self.own = times, [], False
        self.time: float | None = None

    def __deepcopy__(self, memo):
        return self  # version 0.3.64 copies a run's options

    def follow(self, times: list[float], callback: Callable | None) -> Callable:
        """The callback for a sampler that evaluates only at `times` and calls it after each step; `callback` is called in turn."""
        self.times, self.time = times, times[0]

        def after_step(step: int, *args):
            self.time = times[step + 1]
            if callback is not None:
                callback(step, *args)

        return after_step

    def add(self, t: Tensor, r: Tensor, x: Tensor, denoised: Tensor) -> None:
        """Records an evaluation without waiting for the device."""
        self.evaluations.append(Evaluation(t, r, x.sum(), denoised.sum()))

    def first_bad(self) -> str:
        """The stage and step of the first values that are not finite."""
        previous = None
        for evaluation in self.evaluations:
            if previous is not None and not bool(evaluation.sum_in.isfinite()):
                return f"guidance or sampler, {self._step(previous)}"
            if not bool(evaluation.sum_out.isfinite()):
                return f"transformer, {self._step(evaluation)}"
            previous = evaluation
        return "sampling" if previous is None else f"guidance or sampler, {self._step(previous)}"

    def _step(self, evaluation: Evaluation) -> str:
        t, r = float(evaluation.t.flatten()[0]), float(evaluation.r.flatten()[0])
        count = len(self.times) - 1
        number = min(max(sum(time >= t - 1e-5 for time in self.times), 1), count)
        return f"step {number} of {count} (t = {t:.4g}, r = {r:.4g})"


def check_result(latent: Tensor, trace: Trace, patcher: comfy.model_patcher.ModelPatcher, options: dict) -> None:
    """TimError if the sampled latent has NaN or infinite values; one log line if a stock sampler made it."""
    model = patcher.model
    stored = model.get_dtype()
    repair = ["download or convert its file again"]
    if patcher.patches:
        repair.append("leave out the LoRA")
    if stored.itemsize == 1:
        repair.append("choose another weight_dtype")
    words = dict(dtype=model.manual_cast_dtype or stored, float32="ComfyUI's option --force-fp32", repair=", or ".join(repair))
    try:
        check_finite(latent, trace.first_bad, model.diffusion_model, ["a lower cfg"], **words)
    except TimError as error:
        if trace.own:
            raise
        say(options, str(error))
