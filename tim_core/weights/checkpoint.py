"""Weight files in use: parts loaded as models, packed into one file, converted, described."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, misfits, one_line
from ..files import write_whole
from ..models.text_encoder import TextEncoder, Tokenizer, is_json
from .open import StateDict, open_state_dict
from .parts import (
    AUTOENCODER,
    BUNDLED,
    CONFIG_KEYS,
    FORMAT,
    GEMMA_1B_WIDTH,
    PREFIXES,
    TEXT_ENCODER,
    TITLES,
    TRANSFORMER,
    Parts,
    find,
    guess,
    read_parts,
    resolve,
)

__all__ = [
    "AUTOENCODER", "BUNDLED", "TEXT_ENCODER", "TITLES", "TRANSFORMER", "Checkpoint", "Description", "PartDescription", "Parts", "convert",
    "describe", "json_tensor", "load_autoencoder", "load_checkpoint", "load_text_encoder", "load_transformer", "open_state_dict", "pack",
    "read_parts", "resolve",
]


@dataclass
class Checkpoint:
    """The loaded parts of a model; None for a part that the file does not have."""

    transformer: torch.nn.Module
    text_encoder: torch.nn.Module | None
    autoencoder: torch.nn.Module | None
    latent_factor: int
    metadata: dict


# Loading


def load_transformer(source, operations=torch.nn, attention=None, dtype=None, device="cpu", projector=False):
    """TransitionTransformer from a file, a bundled name or Parts. dtype None keeps the stored one. REPA's `projector.*` only if asked."""
    from ..models.attention import sdpa
    from ..models.transformer import TransitionTransformer

    parts = read_parts(source)
    tensors = {key: tensor for key, tensor in parts.tensors(TRANSFORMER).items() if projector or not key.startswith("projector.")}
    config = replace(parts, transformer=tensors).config(TRANSFORMER)
    dtype = dtype or _main_dtype(tensors)
    model = TransitionTransformer(config, operations, attention or sdpa, device="meta", dtype=dtype)
    return _fill(model, tensors, dtype, device, parts.source, TRANSFORMER)


def load_autoencoder(source, operations=torch.nn, dtype=None, device="cpu"):
    """Autoencoder from a file, a folder in diffusers' layout, a bundled name or Parts. Never float16: the deep stages overflow."""
    from ..models.autoencoder import Autoencoder

    parts = read_parts(source)
    tensors = parts.tensors(AUTOENCODER)
    if dtype == torch.float16:
        raise TimError("autoencoder: float16 overflows in its deep stages, expected float32 or bfloat16")
    dtype = dtype or _main_dtype(tensors)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    model = Autoencoder(parts.config(AUTOENCODER), operations, device="meta", dtype=dtype)
    return _fill(model, tensors, dtype, device, parts.source, AUTOENCODER)


def load_text_encoder(source, dtype=None, device="cpu", escape=None):
    """TextEncoder from a file with the tokenizer in it (or beside it), a folder in Hugging Face layout, a bundled name or Parts.

    escape None takes what the file says, and True where it says nothing (the released weights were trained so).
    """
    parts = read_parts(source)
    tensors = parts.tensors(TEXT_ENCODER)
    if parts.tokenizer is None:
        raise TimError(f"{parts.source}: found no tokenizer in the file or beside it, expected tokenizer.json or tokenizer.model")
    tokenizer = Tokenizer.from_bytes(parts.tokenizer, f"{parts.source}: tokenizer")
    config = parts.config(TEXT_ENCODER)
    try:
        model = TextEncoder(config, tokenizer, parts.escape if escape is None else escape, device="meta")
    except TimError:
        raise
    except Exception as error:  # transformers' own checks, of many kinds
        raise TimError(f"{parts.source}: found a Gemma config that cannot be built ({one_line(error)}), expected gemma3_text's") from None
    try:
        # .to, for what is no weight: the rotary tables and the embedding scale
        return model.load(_placed(tensors, dtype or _main_dtype(tensors), device)).to(device).eval()
    except TimError as error:
        raise TimError(f"{parts.source}: {error}") from None


def load_checkpoint(source, operations=torch.nn, attention=None, dtype=None, device="cpu") -> Checkpoint:
    """All parts of a one-file checkpoint (or of a dict of parts); text encoder and autoencoder are None where there is none."""
    parts = read_parts(source)
    parts.tensors(TRANSFORMER)
    parts.check_fit()
    return Checkpoint(
        load_transformer(parts, operations, attention, dtype, device),
        load_text_encoder(parts, dtype, device) if TEXT_ENCODER in parts else None,
        load_autoencoder(parts, operations, dtype, device) if AUTOENCODER in parts else None,
        parts.latent_factor,
        parts.metadata,
    )


def _fill(model: torch.nn.Module, tensors: StateDict, dtype, device, source: str, part: str) -> torch.nn.Module:
    """A model built on the meta device takes over the tensors; TimError unless every key and shape agrees."""
    own = model.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    if wrong := misfits(own, tensors, optional):
        raise TimError(f"{source}: found {wrong}, expected the tensors of the {TITLES[part]} that its shapes describe")
    tensors = _placed(tensors, dtype, device)
    tensors |= {key: torch.zeros((), dtype=torch.int64, device=device) for key in optional - tensors.keys()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _placed(tensors: StateDict, dtype, device) -> StateDict:
    """Tensors on the device; floating ones in dtype."""
    return {key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype) for key, tensor in tensors.items()}


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the weights; bfloat16 for 8-bit floats, in which torch's own layers do not compute."""
    counts = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    dtype = counts.most_common(1)[0][0] if counts else torch.float32
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


# Saving


def pack(parts, dst: str | Path, dtype=None, metadata: dict | None = None, keep_projector: bool = False) -> Path:
    """Writes the one-file checkpoint from a dict of parts (files, folders or modules), Parts, or a file. Floating tensors become dtype.

    `metadata` adds to the record (latent_factor, training, ...). The file appears whole or not at all. TimError if dst cannot be written.
    """
    parts = read_parts(parts)
    parts.check_fit()
    tensors: StateDict = {}
    records = {part: _record_of(parts, part, metadata or {}) for part in TITLES if part in parts}
    for part in records:
        for key, tensor in parts.tensors(part).items():
            if keep_projector or part != TRANSFORMER or not key.startswith("projector."):
                tensors[PREFIXES[part] + key] = tensor
    tensors = _cast(tensors, dtype)
    for part, record in records.items():
        tensors[CONFIG_KEYS[part]] = json_tensor(record)
    if parts.tokenizer is not None and TEXT_ENCODER in parts:
        name = "tokenizer_json" if is_json(parts.tokenizer) else "spiece_model"
        tensors[f"text_encoders.{name}"] = torch.frombuffer(bytearray(parts.tokenizer), dtype=torch.uint8)
    return _write(tensors, dst, _whole_record(parts, records, metadata or {}))


def convert(src, dst: str | Path, dtype=None, metadata: dict | None = None) -> Path:
    """Any file of ours as safetensors: several parts in the one-file layout, a lone part under its official names; nothing is dropped.

    `metadata` adds to the record.
    """
    parts, extra = read_parts(src), metadata or {}
    there = [part for part in TITLES if part in parts]
    if len(there) > 1 or there == [TEXT_ENCODER]:  # a lone text model keeps its tokenizer with it
        return pack(parts, dst, dtype, extra, keep_projector=True)
    records = {part: _record_of(parts, part, extra) for part in there}
    return _write(_cast(dict(parts.tensors(there[0])), dtype), dst, _whole_record(parts, records, extra))


def json_tensor(record: dict) -> Tensor:
    """A record as uint8, the form in which it survives every program that copies tensors only."""
    return torch.frombuffer(bytearray(json.dumps(record, sort_keys=True).encode("utf-8")), dtype=torch.uint8)


def _record_of(parts: Parts, part: str, extra: dict) -> dict:
    config = parts.config(part)
    if part == TEXT_ENCODER:
        return {**config, "escape_prompts": bool(extra.get("escape_prompts", parts.escape))}
    record = config.record()
    if part == TRANSFORMER:
        record["latent_factor"] = int(extra.get("latent_factor") or parts.latent_factor)
        if preview := extra.get("preview", parts.record(TRANSFORMER).get("preview")):
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


def check_target(dst: str | Path) -> Path:
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

    def save(beside: Path) -> None:
        try:
            save_file(tensors, beside, metadata={"format": "pt", "tim": json.dumps(record, sort_keys=True)})
        except SafetensorError as error:  # so it reports a full disk
            raise OSError(str(error)) from error

    dst = check_target(dst)
    write_whole(dst, save)
    return dst


# Describing


@dataclass(frozen=True)
class PartDescription:
    """One part of a file; `parameters` leaves out the REPA projector, which is counted apart. `problem`: why it does not load, or none."""

    part: str
    title: str
    prefix: str
    architecture: object  # TransformerConfig, AutoencoderConfig, or a Gemma config (a dict; None where the file has none)
    tensors: int
    parameters: int
    projector_parameters: int
    dtypes: dict[str, int]  # name -> parameters
    problem: str


@dataclass(frozen=True)
class Description:
    """What `tim inspect` prints."""

    path: str
    kind: str
    parts: tuple[PartDescription, ...]
    latent_factor: int | None
    escape_prompts: bool | None
    tokenizer: bool
    metadata: dict
    previews: float | None = None  # share of the colours' variance that live previews explain

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}"]
        for part in self.parts:
            dtypes = ", ".join(part.dtypes)
            extra = f" (+ {part.projector_parameters:,} in the projector)" if part.projector_parameters else ""
            under = f" under {part.prefix}" if part.prefix else ""
            lines.append(f"  {part.title}: {part.parameters:,} parameters{extra}, {part.tensors} tensors, {dtypes}{under}")
            lines.append(f"    {_summary(part)}")
            if part.problem:
                lines.append(f"    does not load: {part.problem}")
        if self.latent_factor:
            lines.append(f"  latent factor: {self.latent_factor}")
        if any(part.part == TEXT_ENCODER for part in self.parts):
            lines.append(f"  tokenizer: {'in the file or beside it' if self.tokenizer else 'none'}")
            lines.append(f"  prompts: {'unicode-escaped' if self.escape_prompts else 'as they are'}")
        if self.previews is not None:
            lines.append(f"  live previews: {100 * self.previews:.0f} % of the colours' variance")
        if "format" in self.metadata:
            lines.append(f"  format: {json.dumps(self.metadata['format'])}")
        training = self.metadata.get("training")
        if isinstance(training, dict) and isinstance(training.get("configuration"), dict):
            lines.append(f"  training, {json.dumps(training.get('step'))} steps of:")
            lines += [f"    {key}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(training["configuration"].items())]
            if isinstance(changed := training.get("changed"), dict):
                lines.append("  changed on the way, at step: key: before, since")
                lines += [f"    {step}: {json.dumps(keys)}" for step, keys in changed.items()]
        elif training is not None:
            lines.append(f"  training: {json.dumps(training, sort_keys=True)}")
        return "\n".join(lines)


def describe(path: str | Path) -> Description:
    """What a file (or folder, or bundled name) holds; another model's is described as such. TimError if it cannot be opened."""
    place = resolve(path)
    try:
        parts = read_parts(path)
    except TimError:
        if place.is_dir():
            raise
        tensors, metadata = open_state_dict(place)
        if any(find(tensors, part) for part in TITLES):
            raise
        return Description(str(path), guess(tensors), (), None, None, False, {**metadata, **_lora_record(metadata)})
    described = tuple(_describe_part(parts, part) for part in TITLES if part in parts)
    kind = "TiM checkpoint" if TRANSFORMER in parts and len(described) > 1 else " + ".join(part.title for part in described)
    if TRANSFORMER in parts:
        to_image = "text-to-image" if parts.config(TRANSFORMER).text_dim is not None else "class-conditional"
        kind = f"{kind}, {to_image}"
    return Description(
        str(path),
        kind,
        described,
        parts.latent_factor if TRANSFORMER in parts or AUTOENCODER in parts else None,
        parts.escape if TEXT_ENCODER in parts else None,
        parts.tokenizer is not None,
        parts.metadata,
        (parts.record(TRANSFORMER).get("preview") or {}).get("r2") if TRANSFORMER in parts else None,
    )


def _lora_record(metadata: Mapping[str, str]) -> dict:
    """How a LoRA of ours was trained, from its metadata."""
    try:
        return {"training": json.loads(metadata["tim_lora"])}
    except (LookupError, ValueError, TypeError):
        return {}


def _describe_part(parts: Parts, part: str) -> PartDescription:
    tensors = parts.tensors(part)
    dtypes, projector = Counter(), 0
    for key, tensor in tensors.items():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        projector += tensor.numel() if part == TRANSFORMER and key.startswith("projector.") else 0
    no_config = part == TEXT_ENCODER and parts.gemma_config is None and tensors["embed_tokens.weight"].shape[1] != GEMMA_1B_WIDTH
    return PartDescription(
        part,
        TITLES[part],
        parts.prefixes.get(part, ""),
        None if no_config else parts.config(part),
        len(tensors),
        sum(dtypes.values()) - projector,
        projector,
        dict(dtypes.most_common()),
        "" if no_config else _problem(parts, part),
    )


def _problem(parts: Parts, part: str) -> str:
    """What loading a part would say, without its weights; empty if it loads."""
    meta = {name: tensor.to("meta") for name, tensor in parts.tensors(part).items()}
    try:
        {TRANSFORMER: load_transformer, TEXT_ENCODER: load_text_encoder, AUTOENCODER: load_autoencoder}[part](
            replace(parts, **{part: meta}), device="meta")
    except TimError as error:
        return str(error).removeprefix(f"{parts.source}: ")
    return ""


def _summary(part: PartDescription) -> str:
    c = part.architecture
    if c is None:
        return "no config.json in the file or beside it"
    if part.part == TEXT_ENCODER:
        return f"{c['num_hidden_layers']} layers of width {c['hidden_size']}, {c['vocab_size']:,} tokens"
    if part.part == AUTOENCODER:
        return f"{c.latent_channels} latent channels, factor {c.factor}, scaling factor {c.scaling_factor}"
    condition = f"text features of width {c.text_dim}" if c.text_dim is not None else f"{c.num_classes} classes"
    return (
        f"{c.depth} blocks of width {c.hidden_size}, {c.num_heads} heads, {c.in_channels} channels in patches of {c.patch_size}, "
        f"{condition}, interval embedded as {c.new_condition}"
    )
