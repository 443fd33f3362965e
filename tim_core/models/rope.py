"""Two-dimensional axial rotary positions (theta 10000)."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0
COMPLEX_DEVICES = ("cpu", "cuda", "meta")  # one product of complex numbers there; elsewhere, and for the compiler, real ones
_KEPT_TABLES = 16
_tables: dict[tuple, Tensor] = {}


def inverse_frequencies(head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """THETA^(-2i/d) with d = head_dim / 2, for one axis -> (head_dim / 4,) float32."""
    half = head_dim // 2
    return 1.0 / THETA ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)


def positions(height: int, width: int, device: torch.device | str | None = None, *, order: str) -> Tensor:
    """The two positions of each token of an image of height x width tokens, in row-major order -> (2, height * width) int64.

    order "grid": token n gets its column and its row, (n % width, n // width). "official": (n % height, n // height), as the official
    code flattens a transposed grid. The two are equal in square images. In others, official positions are not the places of the tokens,
    but the released weights were trained with them and need them.
    """
    n = torch.arange(height * width, device=device)
    length = width if order == "grid" else height
    return torch.stack((n % length, torch.div(n, length, rounding_mode="floor")))


def angles(head_dim: int, height: int, width: int, device: torch.device | str | None = None, *, order: str) -> Tensor:
    """Angles of the channel pairs, in float32: first position in the first half, second in the second -> (N, head_dim / 2)."""
    frequencies = inverse_frequencies(head_dim, device)
    first, second = positions(height, width, device, order=order).float()
    return torch.cat((first[:, None] * frequencies, second[:, None] * frequencies), dim=-1)


def rotary_table(head_dim: int, height: int, width: int, device: torch.device, dtype: torch.dtype, order: str) -> Tensor:
    """cos and sin of the angles in `dtype` (float32 or float64), (N, head_dim / 2, 2). Cached."""
    key = (head_dim, height, width, device, dtype, order)
    if torch.compiler.is_compiling():
        return _build(*key)
    table = _tables.get(key)
    if table is None:
        # Tables made in inference mode cannot be used in training.
        with torch.inference_mode(False), torch.no_grad():
            table = _build(*key)
        if _has_memory(table):
            if len(_tables) >= _KEPT_TABLES:
                _tables.clear()
            _tables[key] = table
    return table


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels of x (..., head_dim) by its angle, in the dtype of the table -> in that of x.

    table: (..., head_dim / 2, 2), broadcast over the leading dimensions of x.
    """
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))
    if pairs.device.type in COMPLEX_DEVICES and not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    else:
        even, odd = pairs.unbind(-1)
        cos, sin = table.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _build(head_dim: int, height: int, width: int, device: torch.device, dtype: torch.dtype, order: str) -> Tensor:
    turn = angles(head_dim, height, width, device, order=order).to(dtype)
    return torch.stack((turn.cos(), turn.sin()), dim=-1)


def _has_memory(tensor: Tensor) -> bool:
    """False for fake tensors and those of function transforms (torch.func.jvp), which must not be cached."""
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False
