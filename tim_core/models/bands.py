"""Inference in bands of rows, each of which takes little memory: the image is written over, band by band."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU_BAND, GPU_BAND = 8 * 2**20, 128 * 2**20  # bytes of the widest tensor of a band; on a CPU it stays in the cache


def band_bytes(device: torch.device) -> int:
    """Bytes that the widest tensor of a band may take on a device."""
    return CPU_BAND if device.type == "cpu" else GPU_BAND


def infers(module: nn.Module) -> bool:
    """Whether tensors may be overwritten and work be done in bands of rows: nothing is differentiated, no batch norm learns."""
    return not torch.is_grad_enabled() and not module.training


def bands(x: Tensor, channels: int) -> Iterator[tuple[slice, int, int]]:
    """Images, top and bottom row of the bands of x, in each of which a tensor of `channels` channels takes CPU_BAND or GPU_BAND bytes."""
    height = x.shape[-2]
    row = channels * x.shape[-1] * x.element_size()
    budget = band_bytes(x.device)
    if len(x) * height * row <= budget:
        yield slice(None), 0, height
        return
    count = -(-height // max(4, budget // row))
    for image in range(len(x)):
        for i in range(count):
            yield slice(image, image + 1), i * height // count, (i + 1) * height // count


def take_rows(x: Tensor, top: int, bottom: int) -> Tensor:
    """Rows top to bottom of x, zero where they lie outside."""
    above, below = max(-top, 0), max(bottom - x.shape[-2], 0)
    return pad_rows(x[..., top + above : bottom - below, :], above, below)


def pad_rows(x: Tensor, above: int = 1, below: int = 1) -> Tensor:
    """x with rows of zeros above and below."""
    return F.pad(x, (0, 0, above, below)) if above or below else x


def overwrite(x: Tensor, expand: Callable[[Tensor], Tensor], contract: Callable[[Tensor], Tensor], halo: int, channels: int) -> Tensor:
    """x + contract(expand(x)), written over x band by band.

    expand: rows of x, with `halo` more above and below -> rows of up to `channels` channels; contract: these, with one more row above
    and below -> what is added to x. Rows outside the image are zero for both.
    """
    height, held = x.shape[-2], x[..., :0, :]
    for images, top, bottom in bands(x, channels):
        band, end = x[images], min(bottom + 1, height)
        start = top + 1 if top else 0  # rows before were expanded for the band above
        expanded = pad_rows(expand(take_rows(band, start - halo, end + halo)), not top, bottom == height)
        if top:
            expanded = torch.cat((held, expanded), -2)
        held = expanded[..., -2:, :].clone()  # the band below needs them, and not the rest
        band[..., top:bottom, :].add_(contract(expanded))
    return x


def empty_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Memory for a tensor of another size in x's layout."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.empty((len(x), channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
