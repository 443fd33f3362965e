"""Opens weight files without running code from them."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, one_line
from ..files import check_file
from .torch_file import check_torch_file, leaves

StateDict = dict[str, Tensor]
MOST_HEADER = 2**24  # bytes of a safetensors header; that of 1000 tensors has 100,000
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, activation checkpointing


def open_state_dict(path: str | Path, checksums: bool = True) -> tuple[StateDict, dict[str, str]]:
    """Reads a weight file -> its tensors and its safetensors metadata.

    Nested dicts become dotted keys. Tensors are memory-mapped where the format allows. The format is detected by content; torch files
    are read by the weights-only loader alone. checksums: see `check_torch_file`. TimError naming the file if it cannot be opened, or
    contains code.
    """
    path = Path(path)
    check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror})") from None
    if not start:
        raise TimError(f"{path}: the file is empty")
    if start[8:9] == b"{":
        if MOST_HEADER < (size := int.from_bytes(start[:8], "little")) < path.stat().st_size:
            raise TimError(f"{path}: its header has {size} bytes; those of models have at most {MOST_HEADER}")
        return _open_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        check_torch_file(path, checksums)
        return flatten(_open_torch(path), str(path)), {}
    other_formats = {
        b"GGUF": "a GGUF file",
        b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
        b"<": "a web page, not the file itself",
        b"{": "a JSON file",
    }
    found = next((title for magic, title in other_formats.items() if start.lstrip().startswith(magic)), "an unknown or damaged file")
    raise TimError(f"{path}: this is {found}; give a safetensors or torch weight file (.safetensors, .bin, .pt, .pth)")


def _open_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _unique(((key, file.get_tensor(key)) for key in file.keys()), str(path)), dict(file.metadata() or {})
    except TimError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise TimError(f"{path}: damaged or truncated safetensors file ({one_line(error)}); download or copy it again") from None


def _open_torch(path: Path):
    """torch.load(weights_only=True), memory-mapped unless the file has torch's old format or ends in .safetensors, which torch checks."""
    for mmap in (True, False) if path.suffix != ".safetensors" else (False,):
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual pickle protocol
            try:
                return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
            except Exception as error:  # UnpicklingError, RuntimeError, EOFError, and whatever a damaged pickle provokes
                text = one_line(error, limit=None)
        if mmap and "mmap" in text.replace(str(path), ""):
            continue
        named = re.search(r"GLOBAL [\w.]+", text) or re.search(r"Unsupported (class|global|operand|type)\S* [\w.]+|TorchScript", text)
        if named:
            raise TimError(f"{path}: contains code or objects ({named[0]}), not tensors alone; it was not opened")
        raise TimError(f"{path}: damaged or truncated torch file ({text[:120]}); download or copy it again")


def flatten(value, name: str) -> StateDict:
    """Flattens nested dicts to dotted keys; keeps tensors, and the plain numbers that some LoRAs have as alpha, alone.

    TimError naming the source if it is not a dict or repeats a key.
    """
    if not isinstance(value, Mapping):
        raise TimError(f"{name}: holds a {type(value).__name__}, not a state dict; give a file of weights")
    items = leaves(value, (Tensor, int, float), name)
    return _unique(((key, _as_tensor(item)) for key, item in items if isinstance(item, Tensor) or key.endswith(".alpha")), name)


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(max(min(value, 1e300), -1e300)))  # of huge whole numbers inf


def _unique(items: Iterable[tuple[str, Tensor]], name: str) -> StateDict:
    """Tensors by their keys without wrappers. TimError naming a key that occurs twice."""
    tensors: StateDict = {}
    for key, tensor in items:
        if (key := _unwrapped(key)) in tensors:
            raise TimError(f"{name}: tensor '{key}' occurs twice, once under a wrapper's name; save the file again")
        tensors[key] = tensor
    return tensors


def _unwrapped(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key
