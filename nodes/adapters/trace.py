"""At which step of a run its values stopped being finite: recorded on the device, read only for the error."""

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
    """The evaluations of one run. own: whether our sampler makes them."""

    def __init__(self, sigmas: Tensor):
        self.sigmas, self.evaluations, self.own = sigmas, [], False

    def __deepcopy__(self, memo):
        return self  # version 0.3.64 copies a run's options

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
        count = len(self.sigmas) - 1
        number = min(max(int((self.sigmas.float().cpu() >= t - 1e-5).sum()), 1), count)
        return f"step {number} of {count} (t = {t:.4g}, r = {r:.4g})"


def check_result(latent: Tensor, trace: Trace, patcher: comfy.model_patcher.ModelPatcher, options: dict) -> None:
    """TimError if the sampled latent has NaN or infinite values; one log line if a stock sampler made it."""
    model = patcher.model
    dtype = model.manual_cast_dtype or model.get_dtype()
    repair = "download or convert its file again" + (", or leave out the LoRA" if patcher.patches else "")
    words = dict(float32="ComfyUI's option --force-fp32", repair=repair)
    try:
        check_finite(latent, trace.first_bad, model.diffusion_model, ["a lower cfg"], dtype=dtype, **words)
    except TimError as error:
        if trace.own:
            raise
        say(options, str(error))
