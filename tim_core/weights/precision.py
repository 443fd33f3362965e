"""Dtypes of weights: the main one of a part, and what a narrower one can hold."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import TimError


def cast(name: str, tensor: Tensor, dtype, device) -> Tensor:
    """A tensor on a device, in dtype if it is floating and dtype is not None. TimError naming it if a value overflows."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.to(device)
    out = tensor.to(device=device, dtype=dtype)
    if not out.is_meta and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and out.isinf().any():
        tensor = tensor.to(device)
        if (lost := tensor[out.isinf() & tensor.isfinite()]).numel():
            wanted, wider = str(dtype).removeprefix("torch."), "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
            raise TimError(f"tensor {name}: {lost[0].item():g} does not fit in {wanted}; use {wider}")
    return out


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most weights; bfloat16 for 8-bit floats, in which torch's layers do not compute."""
    counts = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    dtype = counts.most_common(1)[0][0] if counts else torch.float32
    return torch.bfloat16 if dtype.itemsize == 1 else dtype
