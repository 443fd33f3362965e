"""Writes checkpoints: packs several parts into one file, converts a file to safetensors."""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, printable
from ..files import atomic_write, check_output, user_path
from ..models.text_encoder import Tokenizer, is_json
from .defaults import RECORD
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER, is_lora
from .load import cast
from .lora import Lora, read_lora
from .open import StateDict, open_state_dict
from .parts import BUNDLED, CONFIG_KEYS, FORMAT, PREFIXES, Part, Parts, read_parts


def pack(parts, dst: str | Path, dtype=None, metadata: dict | None = None, keep_projector: bool = False) -> Path:
    """Writes whatever read_parts takes as a one-file checkpoint. dtype: of floating tensors, None keeps theirs.

    `metadata` adds to the record (latent_factor, training, ...). The file appears complete or not at all. TimError if the parts do not
    fit together, dtype cannot hold a value, or dst cannot be written.
    """
    parts = read_parts(parts)
    parts.check_fit((metadata or {}).get("latent_factor"))
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
        if is_json(tokenizer):
            Tokenizer.from_json(tokenizer, f"{parts[TEXT_ENCODER].source}: tokenizer")  # TimError for a damaged one
        tensors[f"text_encoders.{name}"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    return _write(tensors, dst, _whole_record(parts, records, metadata or {}))


def convert(src, dst: str | Path, dtype=None, metadata: dict | None = None) -> Path:
    """Writes a weight file as safetensors: several parts in the one-file layout, one part under its official names, a LoRA as ComfyUI's.

    The projector is kept; tensors that belong to no part are left out with a warning. dtype, metadata and errors as in `pack`.
    """
    if (lora := _open_lora(src)) is not None:
        return _write_lora(lora, dst, dtype)
    parts, extra = read_parts(src), metadata or {}
    check_output_path(dst)
    if parts.rest:
        shown = ", ".join(parts.rest[:3]) + (", ..." if parts.rest[3:] else "")
        logging.warning(printable(f"{parts.source}: {len(parts.rest)} tensors belong to no part and are left out: {shown}"))
    if len(parts.parts) > 1 or TEXT_ENCODER in parts:  # a text model keeps its tokenizer in the same file
        return pack(parts, dst, dtype, extra, keep_projector=True)
    (part,) = (part.with_projector() for part in parts.parts.values())
    records = {part.kind: _record_of(part, parts, extra)}
    return _write(_cast(part.tensors, dtype), dst, _whole_record(parts, records, extra))


def _open_lora(src) -> Lora | None:
    """The LoRA in a file; None if `src` is not the name of one."""
    if not isinstance(src, (str, Path)) or str(src) in BUNDLED or not user_path(src).is_file():
        return None
    return read_lora(src) if is_lora(open_state_dict(user_path(src))[0]) else None


def _write_lora(lora: Lora, dst: str | Path, dtype) -> Path:
    """Writes a LoRA under the names that ComfyUI reads; its alphas keep their dtype."""
    tensors = lora.state_dict()
    alphas = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    return _save(_cast(tensors, dtype) | alphas, dst, lora.metadata)


def json_tensor(record: dict) -> Tensor:
    """A record as a uint8 tensor, which survives programs that copy tensors alone."""
    return torch.frombuffer(bytearray(json.dumps(record, sort_keys=True).encode("utf-8")), dtype=torch.uint8)


def _record_of(part: Part, parts: Parts, extra: dict) -> dict:
    """The record to write with a part: the settings that its shapes do not determine. `extra` overrides what its file says."""
    config = part.config
    if part.kind == TEXT_ENCODER:
        return {**config, "escape_prompts": bool(extra.get("escape_prompts", parts.escape))}
    record = config.record()
    if part.kind == TRANSFORMER:
        record["latent_factor"] = int(extra.get("latent_factor") or parts.latent_factor)
        if preview := extra.get("preview", part.record.get("preview")):
            record["preview"] = preview
        record |= {name: extra.get(name, part.record.get(name)) for name in RECORD if name in extra or name in part.record}
        if config.text_dim is not None:
            record["escape_prompts"] = bool(extra.get("escape_prompts", parts.escape))
    return record


def _whole_record(parts: Parts, records: dict[str, dict], extra: dict) -> dict:
    record = {"format": FORMAT, **parts.metadata}
    record |= records.get(TRANSFORMER, {})
    record |= records.get(AUTOENCODER, {})
    if TEXT_ENCODER in records:
        record["escape_prompts"] = records[TEXT_ENCODER]["escape_prompts"]
    return {**record, **extra}


def _cast(tensors: StateDict, dtype) -> StateDict:
    """Floating tensors in dtype, each with its own storage, as the format needs. TimError naming a tensor that dtype cannot hold."""
    seen, out = set(), {}
    for key, tensor in tensors.items():
        tensor = cast(key, tensor.detach(), dtype, "cpu").contiguous()
        out[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


def check_output_path(dst: str | Path) -> Path:
    """The path of a checkpoint to write. TimError for another ending than .safetensors, or as in check_output."""
    dst = user_path(dst)
    if dst.suffix != ".safetensors" and not dst.is_dir():
        raise TimError(f"{dst}: the name must end in .safetensors")
    check_output(dst)
    return dst


def _write(tensors: StateDict, dst: str | Path, record: dict) -> Path:
    return _save(tensors, dst, {"tim": json.dumps(record, sort_keys=True)})


def _save(tensors: StateDict, dst: str | Path, metadata: dict[str, str]) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def save(tmp: Path) -> None:
        try:
            save_file(tensors, tmp, metadata={**metadata, "format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error

    dst = check_output_path(dst)
    atomic_write(dst, save)
    return dst
