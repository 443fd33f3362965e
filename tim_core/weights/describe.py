"""Describes a weight file, for `tim inspect`."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import TimError, printable
from ..files import parse_json
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER, describe_unknown, find_part
from .load import load_autoencoder, load_text_encoder, load_transformer
from .lora import read_lora
from .open import open_state_dict
from .parts import GEMMA_1B_WIDTH, Parts, read_parts, resolve


@dataclass(frozen=True)
class PartDescription:
    """One part of a file. `parameters` does not count the REPA projector. `problem`: why it does not load, else empty."""

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
    """A weight file: `str()` is the text that `tim inspect` prints."""

    path: str
    kind: str
    parts: tuple[PartDescription, ...]
    latent_factor: int | None
    escape_prompts: bool | None
    tokenizer: bool
    metadata: dict
    previews: float | None = None  # share of the colour variance that live previews explain
    rest: tuple[str, ...] = ()  # names of tensors that belong to no part

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
        if self.rest:
            lines.append(f"  other tensors: {len(self.rest)} ({', '.join(self.rest[:3])}{', ...' if self.rest[3:] else ''})")
        if self.latent_factor:
            lines.append(f"  latent factor: {self.latent_factor}")
        if any(part.part == TEXT_ENCODER for part in self.parts):
            lines.append(f"  tokenizer: {'yes' if self.tokenizer else 'none'}")
            lines.append(f"  prompts: {'unicode-escaped' if self.escape_prompts else 'not escaped'}")
        if self.previews is not None:
            lines.append(f"  live previews: {100 * self.previews:.0f} % of the colour variance")
        if "format" in self.metadata:
            lines.append(f"  format: {json.dumps(self.metadata['format'])}")
        training = self.metadata.get("training")
        if isinstance(training, dict) and isinstance(training.get("configuration"), dict):
            lines.append(f"  trained for {json.dumps(training.get('step'))} steps; its configuration, in the key names of that version:")
            lines += [f"    {key}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(training["configuration"].items())]
            if isinstance(changed := training.get("changed"), dict):
                lines.append("  changed during training, at step: key: before, since")
                lines += [f"    {step}: {json.dumps(keys)}" for step, keys in changed.items()]
        elif training is not None:
            lines.append(f"  training: {json.dumps(training, sort_keys=True)}")
        return "\n".join(line[: len(line) - len(line.lstrip())] + printable(line.lstrip()) for line in lines)


def describe(path: str | Path) -> Description:
    """Describes a file, folder or bundled name; a file of another model is named as such. TimError if it cannot be opened."""
    place = resolve(path)
    try:
        parts = read_parts(path)
    except TimError:
        if place.is_dir():
            raise
        tensors, metadata = open_state_dict(place)
        if any(find_part(tensors, part) for part in TITLES):
            raise
        kind = _lora_kind(place, tensors)
        return Description(str(path), kind, (), None, None, False, {**metadata, **_lora_record(metadata)})
    described = tuple(_describe_part(parts, kind) for kind in TITLES if kind in parts)
    kind = "TiM checkpoint" if TRANSFORMER in parts and len(described) > 1 else " + ".join(part.title for part in described)
    if TRANSFORMER in parts:
        to_image = "text-to-image" if parts[TRANSFORMER].config.text_dim is not None else "class-conditional"
        kind = f"{kind}, {to_image}"
    return Description(
        str(path),
        kind,
        described,
        parts.latent_factor if TRANSFORMER in parts or AUTOENCODER in parts else None,
        parts.escape if TEXT_ENCODER in parts else None,
        TEXT_ENCODER in parts and parts[TEXT_ENCODER].tokenizer is not None,
        parts.metadata,
        (parts[TRANSFORMER].record.get("preview") or {}).get("r2") if TRANSFORMER in parts else None,
        tuple(parts.rest),
    )


def _lora_kind(path: Path, tensors: Mapping) -> str:
    """What a LoRA adapts and where it loads; else what kind of state dict it looks like."""
    try:
        lora = read_lora(path)
    except TimError:
        return describe_unknown(tensors)
    where = "load it with LoraLoaderModelOnly (models/loras) or --lora"
    return f"{lora.title}; {where if lora.core_names else 'rename its keys for ComfyUI with tim convert, or use --lora'}"


def _lora_record(metadata: Mapping[str, str]) -> dict:
    """The training record of a LoRA made by `tim train`."""
    try:
        return {"training": parse_json(metadata["tim_lora"], "tim_lora")}
    except (LookupError, TimError):
        return {}


def _describe_part(parts: Parts, kind: str) -> PartDescription:
    part, dtypes = parts[kind], Counter()
    for tensor in part.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    unknown = kind == TEXT_ENCODER and part.record.keys() <= {"escape_prompts"}
    no_config = unknown and part.tensors["embed_tokens.weight"].shape[1] != GEMMA_1B_WIDTH
    return PartDescription(
        kind,
        TITLES[kind],
        part.prefix,
        None if no_config else part.config,
        len(part.tensors) + len(part.projector),
        sum(dtypes.values()),
        sum(tensor.numel() for tensor in part.projector.values()),
        dict(dtypes.most_common()),
        "" if no_config else _problem(parts, kind),
    )


def _problem(parts: Parts, kind: str) -> str:
    """The error that loading a part would raise, found without reading weights; empty if it loads."""
    part = parts[kind]
    shapes = replace(part, tensors={name: tensor.to("meta") for name, tensor in part.tensors.items()})
    try:
        {TRANSFORMER: load_transformer, TEXT_ENCODER: load_text_encoder, AUTOENCODER: load_autoencoder}[kind](
            replace(parts, parts={**parts.parts, kind: shapes}), device="meta")
    except TimError as error:
        return str(error).removeprefix(f"{part.source}: ")
    return ""


def _summary(part: PartDescription) -> str:
    c = part.architecture
    if c is None:
        return "no config.json in the file or its folder"
    if part.part == TEXT_ENCODER:
        return f"{c['num_hidden_layers']} layers of width {c['hidden_size']}, {c['vocab_size']:,} tokens"
    if part.part == AUTOENCODER:
        return f"{c.latent_channels} latent channels, factor {c.factor}, scaling factor {c.scaling_factor}"
    condition = f"text features of width {c.text_dim}" if c.text_dim is not None else f"{c.num_classes} classes"
    return (
        f"{c.depth} blocks of width {c.hidden_size}, {c.num_heads} heads, {c.in_channels} channels in patches of {c.patch_size}, "
        f"{condition}, interval embedded as {c.new_condition}"
    )
