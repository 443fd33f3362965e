"""Folders in Hugging Face layout: weights in one file or in shards, and what stands beside them in files of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import TimError
from ..files import is_file, parse_object, read_bytes
from ..models.config import AutoencoderConfig
from ..models.kl_autoencoder import KLAutoencoderConfig
from ..models.tokenizer import MOST_TOKENIZER, is_json, tokenizer_file
from .detect import AUTOENCODER, TEXT_ENCODER
from .open import StateDict, open_state_dict
from .parts import Part, autoencoder_config, naming

WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")


def open_folder(folder: Path, checksums: bool) -> tuple[StateDict, dict[str, str]]:
    """The tensors and metadata of a folder in Hugging Face layout: of one file, or of the shards that an index names, without metadata.

    checksums: as for `read_parts`. TimError naming the folder or the file if there are no weights, several candidates, or a bad index.
    """
    for index in sorted(folder.glob("*.index.json")):
        weight_map = parse_object(read_bytes(index), str(index)).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TimError(f"{index}: weight_map must map names of tensors to file names; download the index again")
        if weight_map:
            return _open_shards(folder, sorted({Path(shard).name for shard in weight_map.values()}), checksums), {}
    files = [folder / f"{stem}{end}" for stem in WEIGHT_FILES for end in (".safetensors", ".bin")]
    files = [file for file in files if is_file(file)] or sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(files) > 1 and files[0].stem not in WEIGHT_FILES:
        raise TimError(f"{folder}: holds {len(files)} weight files; name one ({', '.join(f.name for f in files[:3])}, ...)")
    if not files:
        raise TimError(f"{folder}: no weights in this folder; it needs model.safetensors or another file of the Hugging Face layout")
    return open_state_dict(files[0], checksums)


def _open_shards(folder: Path, names: list[str], checksums: bool) -> StateDict:
    """The tensors of several files. TimError naming a tensor that two of them hold."""
    tensors: StateDict = {}
    for name in names:
        shard = open_state_dict(folder / name, checksums)[0]
        if twice := next((key for key in shard if key in tensors), None):
            raise TimError(f"{folder / name}: tensor '{twice}' is in another shard, too; download the folder again")
        tensors |= shard
    return tensors


def complete_from_folder(part: Part, folder: Path) -> Part:
    """The part with what its file lacks: a record from config.json, and the tokenizer, of the same folder. TimError naming a bad file."""
    file, record, tokenizer = folder / "config.json", part.record, part.tokenizer
    if part.kind == TEXT_ENCODER and record.keys() <= {"escape_prompts"} and is_file(file):
        config = parse_object(read_bytes(file), str(file))
        inner = config.get("text_config", config)
        if isinstance(inner, dict) and inner.get("model_type") == "gemma3_text":
            record = {**inner, **record}
    if part.kind == AUTOENCODER and not record and is_file(file):
        config, own = parse_object(read_bytes(file), str(file)), autoencoder_config(part.tensors)
        name, key = own.DIFFUSERS
        kind = config.get("_class_name", name)
        if kind != name and (key in config or str(kind).startswith(("Autoencoder", "VQ"))):
            found = f"_class_name is {kind!r}, but the weights are of a {own.TITLE}, {name}"
            raise TimError(f"{file}: {found}; use the config.json of these weights")
        if key in config:
            with naming(str(file), part.kind):
                record = _record_of_config(own.from_diffusers(config), part.tensors)
    if part.kind == TEXT_ENCODER and tokenizer is None and (found := tokenizer_file(folder)):
        tokenizer = not_empty(read_bytes(found, MOST_TOKENIZER), str(found))
        if found.suffix == ".json" and not is_json(tokenizer):
            raise TimError(f"{found}: not a valid tokenizer.json; download it again")
    return replace(part, record=record, tokenizer=tokenizer)


def _record_of_config(config: AutoencoderConfig | KLAutoencoderConfig, tensors: StateDict) -> dict:
    """The record of an autoencoder's config.json. TimError if an SD VAE's tensors have other widths or layers."""
    record = config.record()
    if isinstance(config, KLAutoencoderConfig):
        found = KLAutoencoderConfig.from_state_dict(tensors, record)
        for name, own, other in (("block_out_channels", found.widths, config.widths), ("layers_per_block", found.layers, config.layers)):
            if own != other:
                raise TimError(f"SD VAE: {name} is {other}, the tensors have {own}; use the config.json of these weights")
    return record


def not_empty(data: bytes, name: str) -> bytes:
    """The data. TimError naming the source if there is nothing but white space in it."""
    if not data.strip():
        raise TimError(f"{name}: is empty; download it again")
    return data
