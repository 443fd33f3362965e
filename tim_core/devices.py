"""The device and the dtypes that a checkpoint runs on and in."""

from __future__ import annotations

import torch

from .errors import TimError
from .weights.detect import AUTOENCODER, TEXT_ENCODER, TITLES
from .weights.parts import Parts
from .weights.precision import main_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 2**30  # bytes of weights in float32; below, bfloat16 gains a CPU little, and float32 is what ComfyUI computes in there
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # names of torch.cpu.get_capabilities


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """A torch device; "auto" is the GPU if there is one. TimError for one that this computer, or this torch, does not have."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise TimError(f"device: '{device}' is not available ({reason}); use auto, cpu or a GPU of this computer") from None
    return device


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype; "auto" is bfloat16 on a GPU that computes in it, else float32. TimError for an unknown name."""
    if dtype == "auto":
        return torch.bfloat16 if device.type != "cpu" and _has_bfloat16(device) else torch.float32
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise TimError(f"dtype: '{dtype}' is unknown; use auto, float32, bfloat16 or float16")
    return dtype


def pick_dtypes(dtype: str | torch.dtype, device: torch.device, parts: Parts) -> dict[str, torch.dtype]:
    """The dtype that each part of a checkpoint computes in, by kind: float16 is for the transformer alone; see `Pipeline.load`."""
    chosen = dict.fromkeys(TITLES, pick_dtype(dtype, device))
    if dtype == "auto" and device.type == "cpu" and _has_bfloat16(device) and _float32_bytes(parts) >= LARGE:
        half = [kind for kind in TITLES if kind in parts and main_dtype(parts[kind].tensors) == torch.bfloat16]
        chosen |= dict.fromkeys(half, torch.bfloat16)
    for kind in (TEXT_ENCODER, AUTOENCODER):
        if chosen[kind] == torch.float16 or kind == AUTOENCODER and kind in parts and parts[kind].config.force_upcast:
            chosen[kind] = torch.float32
    return chosen


def _float32_bytes(parts: Parts) -> int:
    return sum(4 * tensor.numel() for kind in TITLES if kind in parts for tensor in parts[kind].tensors.values())


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.10
        return any(found.get(name) for name in CPU_BFLOAT16)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        torch.ones(1, 1, device=device, dtype=torch.bfloat16).mm(torch.ones(1, 1, device=device, dtype=torch.bfloat16))
    except (RuntimeError, TypeError):
        return False
    return True
