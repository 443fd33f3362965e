"""Errors that name where NaN or infinite values arose, and weights that cannot be right, so that no broken image comes silently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import TimError

MOST_WEIGHT = 1e18  # the squares of larger ones overflow float32
DAMAGE = f"values that are NaN, infinite or beyond {MOST_WEIGHT:g}"


class StepRecorder:
    """A network that remembers at which steps its output was finite: one flag per call, on its device until `first_bad` is called."""

    def __init__(self, model: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]):
        self.model = model
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        F = self.model(x, t, r, y)
        self.calls.append((t[0], r[0], F.isfinite().all()))
        return F

    def first_bad(self) -> str:
        """The first step with values that are not finite, with its t and r; "sampling" if the network gave none."""
        for number, (t, r, finite) in enumerate(self.calls, 1):
            if not bool(finite):
                return f"transformer, step {number} (t = {float(t):.4g}, r = {float(r):.4g})"
        return "sampling"


def check_finite(
    values: Tensor | Sequence[Tensor],
    stage: str | Callable[[], str],
    network: nn.Module | None = None,
    advice: Sequence[str] = (),
    *,
    dtype: torch.dtype | None = None,
    float32: str = "dtype float32",
    repair: str = "download or convert its file again",
) -> None:
    """TimError naming the stage, the network's dtype and what helps if a value is NaN or infinite.

    values: one tensor, or several of one device. stage: its name, or a function that finds it, called only for the error.
    network: whose weights are searched for the damage, only for the error. advice: what may help, besides another dtype.
    dtype: what the network computes in, by default what its weights are in. float32: how to compute in it. repair: for a damaged weight.
    A network whose file had a damaged weight (`damaged_weight`) raises even if the values are finite.
    """
    damaged = getattr(network, "damaged_weight", None)
    flags = [value.isfinite().all() for value in ([values] if isinstance(values, Tensor) else values)]
    finite = bool(flags[0] if len(flags) == 1 else torch.stack(flags).all())
    if finite and damaged is None:
        return
    name = stage if isinstance(stage, str) else "transformer" if finite else stage()
    if network is not None:
        dtype = dtype or next(network.parameters()).dtype
        name = f"{name} in {str(dtype).removeprefix('torch.')}"
        if damaged := damaged or damaged_weight(network.state_dict()):
            raise TimError(f"{name}: the weight '{damaged}' has {DAMAGE}; {repair}")
        advice = [*advice, *([float32] if dtype.itemsize < 4 else [])]
    help_ = f"try {' or '.join(advice)}" if advice else "the checkpoint's weights or settings are wrong"
    raise TimError(f"{name}: NaN or infinite values; {help_}")


def damaged_weight(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with a value that is NaN, infinite or beyond MOST_WEIGHT; None if there is none.

    Loaders remember it in the network's attribute of this name: on CPUs torch's attention turns NaN into zeros, so not every such weight
    shows in the results. Reads each value once, at the speed of memory.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        low, high = (value.to(torch.bfloat16) if value.dtype.itemsize == 1 else value).aminmax()  # NaN if one is
        if not (bool(low >= -MOST_WEIGHT) and bool(high <= MOST_WEIGHT)):
            return name
    return None
