"""Writes checkpoints: packs several parts into one file, converts a file to safetensors."""

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, printable
from ..files import atomic_write, check_output, user_path
from ..models.tokenizer import Tokenizer, is_json
from .defaults import RECORD
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER, is_lora
from .load import check_loads
from .lora import Lora, read_lora
from .open import open_state_dict
from .parts import BUNDLED, CONFIG_KEYS, FORMAT, PREFIXES, Part, Parts
from .precision import Losses, cast
from .quantized import FP8, Quantization, is_large, quantize
from .read import read_parts
from .write import Entry, Report, entry, json_tensor, write_safetensors

STORAGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGE_DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}


def pack(
    parts, dst: str | Path, dtype=None, metadata: dict | None = None, keep_projector: bool = False, vae_dtype=None,
    report: Report | None = None,
) -> Path:
    """Writes whatever read_parts takes as a one-file checkpoint; equal parts and arguments give equal bytes.

    dtype: of the floating tensors of transformer and text model. float8_e4m3fn quantises the linear layers of the transformer's blocks,
    the rest of both becomes bfloat16. vae_dtype: of the autoencoder's. None keeps each tensor as it is stored. `metadata` adds to the
    record (latent_factor, training, ...). The file appears complete or not at all. TimError if the parts do not fit together, dtype
    cannot hold a value, or dst cannot be written.
    """
    parts = read_parts(parts)
    parts.check_fit((metadata or {}).get("latent_factor"))
    _check_vae_dtype(vae_dtype, parts.source, AUTOENCODER in parts)
    if vae_dtype == FP8:
        raise TimError("dtype: fp8 is for the transformer; choose bf16 or fp32 for the VAE")
    _warn_of_damage(parts)
    tensors: dict[str, Entry] = {}
    records, losses = {}, Losses()
    for kind in TITLES:
        if kind in parts:
            part = parts[kind].with_projector() if keep_projector else parts[kind]
            records[kind] = _record_of(part, parts, metadata or {})
            entries = _entries(part, vae_dtype if kind == AUTOENCODER else dtype, losses)
            tensors |= {PREFIXES[kind] + name: one for name, one in entries.items()}
            tensors[CONFIG_KEYS[kind]] = entry(json_tensor(records[kind]))
    if TEXT_ENCODER in parts and (tokenizer := parts[TEXT_ENCODER].tokenizer) is not None:
        name = "tokenizer_json" if is_json(tokenizer) else "spiece_model"
        if is_json(tokenizer):
            Tokenizer.from_json(tokenizer, f"{parts[TEXT_ENCODER].source}: tokenizer")  # TimError for a damaged one
        tensors[f"text_encoders.{name}"] = entry(torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8))
    dst = _write(tensors, dst, _whole_record(parts, records, metadata or {}), report)
    losses.report(parts.source)
    return dst


def convert(
    src, dst: str | Path, dtype=None, metadata: dict | None = None, vae_dtype=None, report: Report | None = None
) -> Path:
    """Writes a weight file as safetensors: several parts in the one-file layout, one part under its official names, a LoRA as ComfyUI's.

    The projector is kept; tensors that belong to no part are left out with a warning. dtype: also of an autoencoder or a LoRA alone; the
    rest, and the errors, as in `pack`.
    """
    if (lora := _open_lora(src)) is not None:
        _check_vae_dtype(vae_dtype, lora.source, False)
        return _write_lora(lora, dst, dtype, report)
    parts, extra = read_parts(src), metadata or {}
    _check_vae_dtype(vae_dtype, parts.source, AUTOENCODER in parts)
    check_output_path(dst)
    if dtype == FP8 and TRANSFORMER not in parts:
        raise TimError(f"{parts.source}: fp8 is for the transformer, which is not in it; choose bf16")
    if parts.rest:
        shown = ", ".join(parts.rest[:3]) + (", ..." if parts.rest[3:] else "")
        logging.warning(printable(f"{parts.source}: {len(parts.rest)} tensors belong to no part and are left out: {shown}"))
    if len(parts.parts) > 1 or TEXT_ENCODER in parts:  # a text model keeps its tokenizer in the same file
        return pack(parts, dst, dtype, extra, keep_projector=True, vae_dtype=vae_dtype, report=report)
    _warn_of_damage(parts)
    (part,) = (part.with_projector() for part in parts.parts.values())
    if part.kind == AUTOENCODER and vae_dtype is not None:
        dtype = vae_dtype
    records = {part.kind: _record_of(part, parts, extra)}
    losses = Losses()
    dst = _write(_entries(part, dtype, losses), dst, _whole_record(parts, records, extra), report)
    losses.report(parts.source)
    return dst


def _warn_of_damage(parts: Parts) -> None:
    """Log a line for a part that will not load from the new file either."""
    for part in parts.parts.values():
        try:
            check_loads(part)
        except TimError as error:
            logging.warning(printable(f"the new file will not load: {error}"))


def _check_vae_dtype(dtype, source: str, has_vae: bool) -> None:
    """TimError for a VAE dtype without a VAE."""
    if dtype is not None and not has_vae:
        raise TimError(f"{source}: has no VAE to write in {str(dtype).removeprefix('torch.')}; leave out --vae-dtype")


def _entries(part: Part, dtype, losses: Losses) -> dict[str, Entry]:
    """The tensors of a part to write, floating ones in dtype; `losses` takes note when they are written."""
    found: dict[str, Entry] = {}
    for name, tensor in part.tensors.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer in part.quantized and dtype in (None, FP8):
            found |= {name: entry(tensor), **{key: entry(value) for key, value in part.quantized[layer].tensors(layer).items()}}
        elif dtype == FP8 and part.kind == TRANSFORMER and is_large(name, tensor):
            found |= _quantized(part, name, losses)
        else:
            wanted = torch.bfloat16 if dtype == FP8 else dtype
            wanted = wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype
            found[name] = Entry(tuple(tensor.shape), wanted, partial(_cast_one, part, name, wanted, losses))
    return found


def _cast_one(part: Part, name: str, dtype: torch.dtype, losses: Losses) -> Tensor:
    return cast(name, part.weight(name), dtype, "cpu", losses)


def _quantized(part: Part, name: str, losses: Losses) -> dict[str, Entry]:
    """The entries of a weight that is quantised when it is written."""
    def scaled(index: int) -> Tensor:
        return quantize(name, part.weight(name), losses)[index]

    layer, shape = name.removesuffix(".weight"), tuple(part.tensors[name].shape)
    like = Quantization("float8_e4m3fn", torch.ones(())).tensors(layer)
    found = {key: entry(value) for key, value in like.items()}
    found[f"{layer}.weight_scale"] = Entry((), torch.float32, lambda: scaled(1))
    return {**found, name: Entry(shape, FP8, lambda: scaled(0))}


def _open_lora(src) -> Lora | None:
    """The LoRA in a file; None if `src` is not the name of one."""
    if not isinstance(src, (str, Path)) or str(src) in BUNDLED or not os.path.isfile(user_path(src)):
        return None
    return read_lora(src) if is_lora(open_state_dict(user_path(src), checksums=False)[0]) else None


def _write_lora(lora: Lora, dst: str | Path, dtype, report: Report | None) -> Path:
    """Writes a LoRA under the names that ComfyUI reads; its alphas keep their dtype."""
    if dtype == FP8:
        raise TimError(f"{lora.source}: dtype fp8 is for transformers, not for a LoRA; choose bf16")
    losses = Losses()
    tensors = {key: cast(key, value, None if key.endswith(".alpha") else dtype, "cpu", losses) for key, value in lora.state_dict().items()}
    dst = _save({key: entry(value) for key, value in tensors.items()}, dst, lora.metadata, report)
    losses.report(lora.source)
    return dst


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


def check_output_path(dst: str | Path) -> Path:
    """The path of a checkpoint to write. TimError for another ending than .safetensors, or as in check_output."""
    dst = user_path(dst)
    if dst.suffix != ".safetensors" and not dst.is_dir():
        raise TimError(f"{dst}: the name must end in .safetensors")
    check_output(dst)
    return dst


def _write(tensors: Mapping[str, Entry], dst: str | Path, record: dict, report: Report | None) -> Path:
    return _save(tensors, dst, {"tim": json.dumps(record, sort_keys=True)}, report)


def _save(tensors: Mapping[str, Entry], dst: str | Path, metadata: dict[str, str], report: Report | None) -> Path:
    dst = check_output_path(dst)
    atomic_write(dst, lambda tmp: write_safetensors(tmp, tensors, {**metadata, "format": "pt"}, report))
    return dst
