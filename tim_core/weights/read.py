"""Reads weight files, folders and modules, and takes them apart into parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TimError, printable
from ..files import parse_object, user_path
from ..models.config import AutoencoderConfig
from ..models.kl_autoencoder import KLAutoencoderConfig, diffusers_names
from .detect import AUTOENCODER, BYTE_KEYS, TEXT_ENCODER, TITLES, TRANSFORMER, describe_unknown, find_copies, find_part, other_model
from .folders import complete_from_folder, not_empty, open_folder
from .open import StateDict, flatten, open_state_dict
from .parts import BUNDLED, FORMAT, Part, Parts, autoencoder_config, naming
from .quantized import MARKER, separate, with_layer_keys

PART_FOLDERS = {"transformer": "model", "text_encoder": "text-encoder", "vae": "vae"}  # of a folder of parts
PART_NAMES = {"model": TRANSFORMER, "text-encoder": TEXT_ENCODER, "clip": TEXT_ENCODER, "vae": AUTOENCODER} | {n: n for n in TITLES}

DIMENSIONS = {
    "embed_tokens.weight": 2, "layers.0.self_attn.q_norm.weight": 1, "layers.0.self_attn.q_proj.weight": 2,
    "layers.0.self_attn.k_proj.weight": 2, "layers.0.mlp.gate_proj.weight": 2, "x_embedder.proj.weight": 4,
}


class NoPart(TimError):
    """A file that holds no part of a TiM checkpoint."""


def resolve(name: str | Path) -> Path:
    """The path of a bundled name or of a file. TimError listing the bundled names if there is no such file."""
    if str(name) in BUNDLED:
        path = BUNDLED[str(name)]
        if not path.is_file():
            raise TimError(f"{name}: the bundled model is missing from this installation ({path}); install the package again")
        return path
    path = user_path(name)
    if not str(name).strip() or not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise TimError(f"{name or repr('')}: no such file; give a path or a bundled model ({', '.join(BUNDLED)})")
    return path


def read_parts(source, checksums: bool = True) -> Parts:
    """Reads the parts of a weight file, a folder, a bundled name, or a dict {"model": ..., "vae": ...}.

    A folder holds one model in Hugging Face layout, or folders transformer, text_encoder and vae that each hold one. The values of a dict
    are files, folders or modules. checksums: whether to compare the checksums of torch files; only what reads no weights may do without.
    NoPart or TimError naming the source if it holds no part of a TiM checkpoint.
    """
    if isinstance(source, Parts):
        return source
    if isinstance(source, Mapping):
        return _gather(source, checksums)
    path = resolve(source)
    if folders := {name: path / folder for folder, name in PART_FOLDERS.items() if (path / folder).is_dir()}:
        return replace(_gather(folders, checksums), source=str(source), path=str(source))
    tensors, metadata = (open_folder if path.is_dir() else open_state_dict)(path, checksums)
    tensors = with_layer_keys(tensors, metadata, str(source))
    parts = _take_apart(tensors, _tim_record(metadata, str(source)), str(source))
    if not parts.parts or _is_of_another_model(parts):
        wanted = " or ".join(TITLES.values())
        raise NoPart(f"{source}: no {wanted} in it; this is {describe_unknown(tensors)}")
    folder = path if path.is_dir() else path.parent
    parts.parts = {kind: complete_from_folder(part, folder) for kind, part in parts.parts.items()}
    return parts


def _is_of_another_model(parts: Parts) -> bool:
    """Whether all there is of TiM is a KL autoencoder in a checkpoint of another model, whose latents may have another scale."""
    kinds = {kind: part.title for kind, part in parts.parts.items()}
    return kinds == {AUTOENCODER: KLAutoencoderConfig.TITLE} and other_model(parts.rest) is not None


def _take_apart(tensors: Mapping[str, Tensor], metadata: dict, source: str) -> Parts:
    parts = Parts(source, metadata=metadata)
    rest = dict(tensors)
    for kind in (AUTOENCODER, TEXT_ENCODER, TRANSFORMER):  # last the transformer, which takes every key under its prefix
        if (found := find_part(rest, kind)) is None:
            continue
        prefix, own = found
        if copies := find_copies(rest, kind):
            names = ", ".join(f"'{copy}'" for copy in copies)
            advice = f"'{prefix}' is used; to use another, save it in a file of its own"
            logging.warning(printable(f"{source}: holds a {TITLES[kind]} {len(copies)} times, with the prefixes {names}; {advice}"))
        for name in own:
            del rest[prefix + name]
        if kind == AUTOENCODER and autoencoder_config(own) is KLAutoencoderConfig:
            with naming(source, kind):
                own = diffusers_names(own)
        own, quantized = separate(own, rest.pop(prefix + MARKER, None), source)
        places = (prefix, prefix.removesuffix("transformer.")) if kind == TEXT_ENCODER else (prefix,)
        config = next((rest.pop(place + "config_json") for place in places if place + "config_json" in rest), None)
        record = _record_of(kind, metadata)
        if config is not None:
            record |= parse_object(_bytes(config), f"{source}: {prefix}config_json")
        if kind == TRANSFORMER and "preview" in record and not _is_preview(record["preview"], own["x_embedder.proj.weight"]):
            logging.warning(f"{source}: the preview in the metadata is malformed and ignored; tim previews makes a new one")
            del record["preview"]
            metadata.pop("preview", None)
        parts.parts[kind] = replace(_part(kind, source, own, record, prefix), quantized=quantized)
    tokenizers = [_bytes(tensor) for key, tensor in rest.items() if key.rpartition(".")[2] in ("tokenizer_json", "spiece_model")]
    if tokenizers and TEXT_ENCODER in parts:
        parts.parts[TEXT_ENCODER] = replace(parts[TEXT_ENCODER], tokenizer=not_empty(tokenizers[-1], f"{source}: tokenizer"))
    parts.rest = [key for key in rest if key.rpartition(".")[2] not in BYTE_KEYS]
    return parts


def _is_preview(value: Any, x_embedder: Tensor) -> bool:
    """Whether a record's preview is as `previews.fit` makes it for the latent channels of this weight."""
    try:
        numbers = torch.tensor([*value["factors"], value["bias"]], dtype=torch.float64)
        return numbers.shape == (x_embedder.shape[1] + 1, 3) and bool(numbers.isfinite().all()) and 0 <= value["r2"] <= 1
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError):
        return False


def _part(kind: str, source: str, tensors: StateDict, record: dict, prefix: str = "", tokenizer: bytes | None = None) -> Part:
    """A Part, with the transformer's projector kept apart. TimError for a tensor whose shape nothing can be read from."""
    for name, dimensions in DIMENSIONS.items():
        if name in tensors and tensors[name].ndim != dimensions:
            raise TimError(f"{source}: tensor '{prefix}{name}' has shape {list(tensors[name].shape)}; it must have {dimensions} dimensions")
    projector = {name: tensor for name, tensor in tensors.items() if kind == TRANSFORMER and name.startswith("projector.")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in projector}
    return Part(kind, source, tensors, record, prefix, projector, tokenizer)


def _record_of(kind: str, metadata: dict) -> dict:
    """The keys of a file's metadata that describe one of its parts."""
    if kind == TRANSFORMER:
        return {key: value for key, value in metadata.items() if key not in AutoencoderConfig.RECORD}
    keys = AutoencoderConfig.RECORD if kind == AUTOENCODER else ("escape_prompts",)
    return {key: metadata[key] for key in keys if key in metadata}


def _gather(sources: Mapping, checksums: bool) -> Parts:
    parts = Parts(" + ".join(str(s) if isinstance(s, (str, Path)) else type(s).__name__ for s in sources.values()))
    for name, source in sources.items():
        if name not in PART_NAMES:
            raise TimError(f"parts: unknown name '{name}'; use {', '.join(map(repr, PART_NAMES))}")
        kind = PART_NAMES[name]
        if isinstance(source, torch.nn.Module):
            parts.parts[kind] = _from_module(source, kind)
        elif source is not None:
            one = read_parts(source, checksums)
            parts.parts[kind] = one[kind]
            if kind == TRANSFORMER:
                parts.metadata = _record_of(kind, one.metadata)
    return parts


def _from_module(module: torch.nn.Module, kind: str) -> Part:
    source = type(module).__name__
    found = find_part(flatten(module.state_dict(), source), kind)  # a compiled or distributed module wraps its names
    if found is None:
        raise TimError(f"{source}: this module is not a {TITLES[kind]}")
    inner: Any = getattr(module, "module", module)
    if kind == TEXT_ENCODER:
        record = {**inner.gemma_config, "escape_prompts": inner.escape}
        return _part(kind, source, found[1], record, tokenizer=inner.tokenizer.data)
    return _part(kind, source, found[1], inner.config.record())


def _tim_record(metadata: Mapping[str, str], source: str) -> dict:
    record = parse_object(metadata["tim"].encode("utf-8"), f"{source}: metadata") if "tim" in metadata else {}
    form = record.get("format", FORMAT)
    if not isinstance(form, int) or form > FORMAT:
        raise TimError(f"{source}: checkpoint format {form!r} is not known; update this package (it reads format {FORMAT})")
    return record


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(device="cpu", dtype=torch.uint8).numpy().tobytes()
