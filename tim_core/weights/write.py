"""Writes safetensors files whose bytes depend on their contents alone, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError

CHUNK = 2**26  # bytes between two reports
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip

Report = Callable[[int, int], None]  # bytes written so far, bytes in all


@dataclass(frozen=True)
class Entry:
    """A tensor that `make` returns when it is written, of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entry(tensor: Tensor) -> Entry:
    """The entry of a tensor that is there."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_safetensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], report: Report | None = None) -> None:
    """Writes named tensors, sorted by item size and name as the safetensors library does.

    TimError naming a tensor of a dtype that it does not know, or that is made with another shape or dtype than its entry's.
    """
    # The library writes its metadata in an order of its own, which differs from process to process.
    order = sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict = {"__metadata__": dict(sorted(metadata.items()))}
    done = 0
    for name, one in order:
        if one.dtype not in DTYPES:
            raise TimError(f"tensor {name}: safetensors cannot hold {str(one.dtype).removeprefix('torch.')}; use --dtype bf16")
        header[name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": [done, done + one.bytes]}
        done += one.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        for name, one in order:
            made = one.make()
            if (tuple(made.shape), made.dtype) != (one.shape, one.dtype):
                raise TimError(f"tensor {name}: is {_kind(made)}, where the header says {_kind(one)}; please report this")
            data = memoryview(made.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            for start in range(0, len(data), CHUNK):
                written += file.write(data[start : start + CHUNK])
                if report is not None:
                    report(written, done)


def _kind(tensor: Tensor | Entry) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def json_tensor(value: dict) -> Tensor:
    """A JSON object as a uint8 tensor, which survives programs that copy tensors alone."""
    return torch.frombuffer(bytearray(json.dumps(value, sort_keys=True).encode("utf-8")), dtype=torch.uint8)
