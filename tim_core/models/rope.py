"""Two-dimensional axial rotary positions (theta 10000), in the order the released weights were trained with."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0
_KEPT_TABLES = 16
_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


def inverse_frequencies(head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """THETA^(-2i/d) with d = head_dim / 2, for one axis -> (head_dim / 4,) float32."""
    half = head_dim // 2
    return 1.0 / THETA ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)


def positions(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The two positions of every token of a height x width grid, tokens in row-major order -> (2, height * width) int64.

    Token n is at row n // width, but it gets (n % height, n // height). The official code flattens a transposed grid; on a square
    this only swaps the axes, elsewhere it is not the token's place at all. Training used it, so the weights expect it.
    """
    n = torch.arange(height * width, device=device)
    return torch.stack((n % height, torch.div(n, height, rounding_mode="floor")))


def angles(head_dim: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Angle of every pair of channels, always float32: first position in the first half, second in the second -> (N, head_dim / 2)."""
    frequencies = inverse_frequencies(head_dim, device)
    first, second = positions(height, width, device).float()
    return torch.cat((first[:, None] * frequencies, second[:, None] * frequencies), dim=-1)


def rotary_table(head_dim: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles in `dtype` (float32 or float64), (N, head_dim / 2) each. Kept between calls."""
    if torch.compiler.is_compiling():
        return _build(head_dim, height, width, device, dtype)
    key = (head_dim, height, width, device, dtype)
    table = _tables.get(key)
    if table is None:
        # A table made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            table = _build(head_dim, height, width, device, dtype)
        if _has_memory(table[0]):
            if len(_tables) >= _KEPT_TABLES:
                _tables.clear()
            _tables[key] = table
    return table


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each neighbouring pair of channels of x (..., N, head_dim) by its angle, in the table's dtype; the result has x's dtype."""
    cos, sin = table
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def _build(head_dim: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turn = angles(head_dim, height, width, device).to(dtype)
    return turn.cos(), turn.sin()


def _has_memory(tensor: Tensor) -> bool:
    """False for the wrapped tensors of function transforms (torch.func.jvp) and fake tensors, which must not outlive their call."""
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False
