"""Dtypes of weights: the main one of a part, and what a narrower one can hold."""

import logging
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import TimError, printable

MOST_LOST, FEW = 0.01, 16  # share and number of a tensor's values that may become 0 without a line


class Losses:
    """Collects the tensors of which a narrower dtype makes zeros: `report` logs one line if it is more than a few values."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, torch.dtype]] = {}  # by name: the share of the values, and the dtype

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Compare a tensor with what it became. TimError if all its values became 0."""
        counted = after.to(torch.bfloat16) if after.dtype.itemsize == 1 else after  # torch counts no 8-bit floats
        zeros = after.numel() - int(counted.count_nonzero())
        if zeros <= MOST_LOST * after.numel():
            return
        values = int(before.count_nonzero())
        lost = zeros - (before.numel() - values)
        if lost and lost == values:
            largest = float(before.abs().max())
            problem = f"all its values, up to {largest:.3g}, are too small for {_name(after.dtype)} and would become 0"
            raise TimError(f"tensor {name}: {problem}; use {_wider(after.dtype)}")
        if lost > max(MOST_LOST * after.numel(), FEW):
            self.found[name] = lost / after.numel(), after.dtype

    def report(self, source: str) -> None:
        """Log a line that names the tensor with the largest share."""
        if not self.found:
            return
        name, (share, dtype) = max(self.found.items(), key=lambda item: item[1][0])
        others = f" (and over {MOST_LOST:.0%} of {len(self.found) - 1} more)" if len(self.found) > 1 else ""
        logging.warning(
            printable(
                f"{source}: {share:.1%} of the values of tensor {name}{others} are too small for {_name(dtype)} "
                f"and become 0; use {_wider(dtype)}"
            )
        )


def cast(name: str, tensor: Tensor, dtype, device, losses: Losses) -> Tensor:
    """A tensor on a device, in dtype if it is floating and dtype is not None.

    TimError naming it if a value overflows, or all become 0; `losses` takes note if many do.
    """
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.to(device)
    out = tensor.to(device=device, dtype=dtype)
    if not out.is_meta and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and out.isinf().any():
        tensor = tensor.to(device)
        if (lost := tensor[out.isinf() & tensor.isfinite()]).numel():
            raise TimError(f"tensor {name}: {lost[0].item():g} does not fit in {_name(dtype)}; use {_wider(dtype)}")
    if not out.is_meta and torch.finfo(dtype).tiny > torch.finfo(tensor.dtype).tiny:
        losses.add(name, tensor, out)
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wider(dtype: torch.dtype) -> str:
    return "float32" if dtype in (torch.bfloat16, torch.float32) else "bfloat16 or float32"


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most weights; bfloat16 for 8-bit floats, in which torch's layers do not compute."""
    counts = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    dtype = counts.most_common(1)[0][0] if counts else torch.float32
    return torch.bfloat16 if dtype.itemsize == 1 else dtype
