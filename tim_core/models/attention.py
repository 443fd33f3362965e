"""Attention backends behind one signature: (q, k, v), each (B, heads, N, head_dim), to (B, N, heads * head_dim)."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TimError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled dot-product attention; torch picks the kernel."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out: it has forward-mode derivatives, and on a CPU a bfloat16 training step is a third shorter."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (weights.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package. TimError if it is missing or the tensors are not half precision on a GPU."""
    flash_attn_func = _flash_attn_func()
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise TimError(f"attention 'flash': found {q.dtype} on {q.device.type}, expected torch.float16 or torch.bfloat16 on cuda")
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)


BACKENDS: dict[str, Attention] = {"eager": eager, "sdpa": sdpa, "flash": flash}


def get_attention(name: str) -> Attention:
    """The backend of a name; "auto" is "sdpa". TimError for another name, or flash without its package."""
    if name != "auto" and name not in BACKENDS:
        raise TimError(f"attention: found '{name}', expected 'auto', 'sdpa', 'flash' or 'eager'")
    if name == "flash":
        _flash_attn_func()
    return sdpa if name == "auto" else BACKENDS[name]


def _flash_attn_func() -> Callable[..., Tensor]:
    """Imported when first asked for: ComfyUI, which never asks, should not wait for it at start."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        raise TimError("attention 'flash': the flash-attn package is not installed, expected it from: pip install flash-attn") from None
    return flash_attn_func
