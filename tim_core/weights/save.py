"""Write checkpoints: pack several parts into one file, convert one file."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError
from ..files import atomic_write
from ..models.text_encoder import is_json
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER
from .open import StateDict
from .parts import CONFIG_KEYS, FORMAT, PREFIXES, Part, Parts, read_parts


def pack(parts, dst: str | Path, dtype=None, metadata: dict | None = None, keep_projector: bool = False) -> Path:
    """Writes the one-file checkpoint from a dict of parts (files, folders or modules), Parts, or a file. Floating tensors become dtype.

    `metadata` adds to the record (latent_factor, training, ...). The file appears whole or not at all. TimError if dst cannot be written.
    """
    parts = read_parts(parts)
    parts.check_fit()
    tensors: StateDict = {}
    records = {}
    for kind in TITLES:
        if kind in parts:
            part = parts[kind].with_projector() if keep_projector else parts[kind]
            records[kind] = _record_of(part, parts, metadata or {})
            tensors |= {PREFIXES[kind] + name: tensor for name, tensor in part.tensors.items()}
    tensors = _cast(tensors, dtype)
    for kind, record in records.items():
        tensors[CONFIG_KEYS[kind]] = json_tensor(record)
    if TEXT_ENCODER in parts and (tokenizer := parts[TEXT_ENCODER].tokenizer) is not None:
        name = "tokenizer_json" if is_json(tokenizer) else "spiece_model"
        tensors[f"text_encoders.{name}"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    return _write(tensors, dst, _whole_record(parts, records, metadata or {}))


def convert(src, dst: str | Path, dtype=None, metadata: dict | None = None) -> Path:
    """Any file of ours as safetensors: several parts in the one-file layout, a lone part under its official names; nothing is dropped.

    `metadata` adds to the record.
    """
    parts, extra = read_parts(src), metadata or {}
    if len(parts.parts) > 1 or TEXT_ENCODER in parts:  # a lone text model keeps its tokenizer with it
        return pack(parts, dst, dtype, extra, keep_projector=True)
    (part,) = (part.with_projector() for part in parts.parts.values())
    records = {part.kind: _record_of(part, parts, extra)}
    return _write(_cast(part.tensors, dtype), dst, _whole_record(parts, records, extra))


def json_tensor(record: dict) -> Tensor:
    """A record as uint8, the form in which it survives every program that copies tensors only."""
    return torch.frombuffer(bytearray(json.dumps(record, sort_keys=True).encode("utf-8")), dtype=torch.uint8)


def _record_of(part: Part, parts: Parts, extra: dict) -> dict:
    """What is written beside a part: what its shapes cannot tell; `extra` goes before what its file said."""
    config = part.config
    if part.kind == TEXT_ENCODER:
        return {**config, "escape_prompts": bool(extra.get("escape_prompts", parts.escape))}
    record = config.record()
    if part.kind == TRANSFORMER:
        record["latent_factor"] = int(extra.get("latent_factor") or parts.latent_factor)
        if preview := extra.get("preview", part.record.get("preview")):
            record["preview"] = preview
        if config.text_dim is not None:
            record["escape_prompts"] = bool(extra.get("escape_prompts", parts.escape))
    return record


def _whole_record(parts: Parts, records: dict[str, dict], extra: dict) -> dict:
    whole = {"format": FORMAT, **parts.metadata}
    whole |= records.get(TRANSFORMER, {})
    whole |= records.get(AUTOENCODER, {})
    if TEXT_ENCODER in records:
        whole["escape_prompts"] = records[TEXT_ENCODER]["escape_prompts"]
    return {**whole, **extra}


def _cast(tensors: StateDict, dtype) -> StateDict:
    """Floating tensors in dtype, each with storage of its own (the format shares none)."""
    seen, out = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to(device="cpu", dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        tensor = tensor.contiguous()
        out[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


def check_output_path(dst: str | Path) -> Path:
    """A path that a checkpoint can be written to; TimError for a folder, another ending, or a folder that is not there."""
    dst = Path(dst).expanduser()
    if dst.is_dir():
        raise TimError(f"{dst}: found a folder, expected the name of a file to write")
    if dst.suffix != ".safetensors":
        raise TimError(f"{dst}: found the ending '{dst.suffix}', expected .safetensors")
    if not dst.parent.is_dir():
        raise TimError(f"{dst}: found no folder {dst.parent}, expected one to write into")
    return dst


def _write(tensors: StateDict, dst: str | Path, record: dict) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def save(tmp: Path) -> None:
        try:
            save_file(tensors, tmp, metadata={"format": "pt", "tim": json.dumps(record, sort_keys=True)})
        except SafetensorError as error:  # so it reports a full disk
            raise OSError(str(error)) from error

    dst = check_output_path(dst)
    atomic_write(dst, save)
    return dst
