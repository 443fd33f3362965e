"""Weight files, opened without running code from them."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, one_line

StateDict = dict[str, Tensor]
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, activation checkpointing


def open_state_dict(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """A weight file -> its tensors (nested dicts flattened to dotted keys; memory-mapped where the format allows) and safetensors metadata.

    The format is told by content. Torch files go through the weights-only loader alone. TimError naming the file if it cannot be
    opened, or would run code.
    """
    path = Path(path)
    if path.is_dir():
        raise TimError(f"{path}: found a folder, expected a weight file")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise TimError(f"{path}: found no such file, expected a weight file") from None
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror}), expected a weight file") from None
    if not start:
        raise TimError(f"{path}: found an empty file, expected a weight file")
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return flatten(_open_torch(path), str(path)), {}
    strangers = {
        b"GGUF": "a GGUF file",
        b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
        b"<": "a web page, not the file itself",
        b"{": "a JSON file",
    }
    found = next((title for magic, title in strangers.items() if start.lstrip().startswith(magic)), "an unknown or damaged file")
    raise TimError(f"{path}: found {found}, expected safetensors or a torch weight file (.bin, .pt, .pth)")


def _open_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {_unwrapped(key): file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise TimError(f"{path}: found a truncated or damaged safetensors file ({one_line(error)}), expected a whole one") from None


def _open_torch(path: Path):
    """torch.load(weights_only=True), memory-mapped unless the file is of torch's old format (or misnamed: torch goes by .safetensors)."""
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
            raise TimError(f"{path}: found code or objects in the file ({named[0]}), expected tensors only; it was not opened")
        raise TimError(f"{path}: found a truncated or damaged torch file ({text[:120]}), expected a whole one")


def flatten(value, name: str) -> StateDict:
    """Nested dicts to dotted keys; anything but tensors (step counts, settings) is left out."""
    if not isinstance(value, Mapping):
        raise TimError(f"{name}: found a {type(value).__name__}, expected a state dict")
    tensors = {}

    def walk(mapping: Mapping, prefix: str) -> None:
        for key, item in mapping.items():
            if isinstance(item, Tensor):
                tensors[_unwrapped(f"{prefix}{key}")] = item
            elif isinstance(item, Mapping):
                walk(item, f"{prefix}{key}.")

    walk(value, "")
    return tensors


def _unwrapped(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key
