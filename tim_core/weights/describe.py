"""Describes a weight file, for `tim inspect`: what it holds, where it belongs, and what an image still needs."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import TimError, printable
from ..files import parse_json
from ..models.config import AutoencoderConfig
from ..models.gemma import GEMMA_1B_WIDTH
from ..models.kl_autoencoder import KLAutoencoderConfig
from ..models.released import DC_AE_CHANNELS, SD_VAE, find_release
from .defaults import Defaults, read_defaults
from .detect import AUTOENCODER, KL_AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER, describe_unknown
from .load import check_loads
from .lora import Lora, read_lora
from .open import open_state_dict
from .parts import BUNDLED, Part, Parts
from .read import PART_FOLDERS, NoPart, read_parts, resolve


@dataclass(frozen=True)
class Place:
    """Where a file belongs. folder: of ComfyUI's models folder, empty if it needs none. option: of the command line."""

    node: str  # as ComfyUI shows its name
    folder: str
    option: str


ONE_FILE = Place("Load TiM Checkpoint", "checkpoints", "--model")
PLACES = {
    TRANSFORMER: Place("Load TiM Model", "diffusion_models", "tim pack --model"),
    TEXT_ENCODER: Place("Load TiM Text Encoder", "text_encoders", "tim pack --text-encoder"),
    AUTOENCODER: Place("Load TiM VAE", "vae", "tim pack --vae"),
}
LORA = Place("LoraLoaderModelOnly", "loras", "--lora")
CORE_VAE = Place("Load VAE", "vae", "")  # of VAEs that core has


@dataclass(frozen=True)
class Stored:
    """How much of a part has one dtype."""

    tensors: int
    parameters: int


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
    bytes: int  # of its tensors, the projector among them
    dtypes: dict[str, Stored]  # by name, the most frequent first
    quantized_layers: int  # whose weights are 8-bit floats with a scale
    problem: str


@dataclass(frozen=True)
class Description:
    """A weight file: `str()` is the text that `tim inspect` prints, `as_json()` what it prints with --json."""

    path: str
    kind: str
    bytes: int  # of the file, or of all files of a folder
    parts: tuple[PartDescription, ...] = ()
    places: tuple[Place, ...] = ()
    missing: tuple[str, ...] = ()  # what an image still needs
    latent_factor: int | None = None
    escape_prompts: bool | None = None
    tokenizer: bool = False
    metadata: dict | None = None
    defaults: Defaults | None = None
    previews: float | None = None  # share of the colour variance that live previews explain
    rest: tuple[str, ...] = ()  # names of tensors that belong to no part
    advice: str = ""

    def as_json(self) -> str:
        """Everything, as one line of JSON."""
        return json.dumps(_finite(asdict(self)), sort_keys=True)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, {format_bytes(self.bytes)}"]
        for part in self.parts:
            extra = f" (+ {part.projector_parameters:,} in the projector)" if part.projector_parameters else ""
            under = f" under {part.prefix}" if part.prefix else ""
            lines.append(f"  {part.title}: {part.parameters:,} parameters{extra}, {part.tensors} tensors, {_dtypes(part)}{under}")
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
        if self.defaults is not None:
            own = self.defaults
            low, high = own.guidance_interval
            lines.append(f"  defaults: {own.width}x{own.height}, {own.steps} steps, cfg {own.cfg:g}, guidance from {low:g} to {high:g}")
        if self.previews is not None:
            lines.append(f"  live previews: {100 * self.previews:.0f} % of the colour variance")
        nodes = "; ".join(f"models/{place.folder}, {place.node}" if place.folder else place.node for place in self.places)
        if nodes:
            lines.append(f"  in ComfyUI: {nodes}")
        if options := list(dict.fromkeys(place.option for place in self.places if place.option)):
            lines.append(f"  on the command line: {', '.join(options)}")
        if self.missing:
            lines.append(f"  still missing for an image: {'; '.join(self.missing)}")
        if self.advice:
            lines.append(f"  {self.advice}")
        metadata = self.metadata or {}
        if "format" in metadata:
            lines.append(f"  format: {json.dumps(metadata['format'])}")
        training = metadata.get("training")
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
        parts = read_parts(path, checksums=False)  # reads no weights
    except NoPart:
        if place.is_dir():
            raise
        tensors, metadata = open_state_dict(place, checksums=False)
        return _describe_other(str(path), place, _size(place), tensors, metadata)
    described = tuple(_describe_part(parts, kind) for kind in TITLES if kind in parts)
    kind = "TiM checkpoint" if TRANSFORMER in parts and len(described) > 1 else " + ".join(part.title for part in described)
    has_transformer = TRANSFORMER in parts
    if has_transformer:
        kind = f"{kind}, {'class-conditional' if _reads_classes(parts) else 'text-to-image'}"
    missing = tuple(_missing(parts))
    return Description(
        str(path),
        kind,
        _size(place),
        described,
        tuple(_places(parts, place, complete=not missing)),
        missing,
        parts.latent_factor if has_transformer or AUTOENCODER in parts else None,
        parts.escape if TEXT_ENCODER in parts else None,
        TEXT_ENCODER in parts and parts[TEXT_ENCODER].tokenizer is not None,
        parts.metadata,
        _defaults(parts),
        (parts[TRANSFORMER].record.get("preview") or {}).get("r2") if has_transformer else None,
        tuple(parts.rest),
        _advice(parts, missing),
    )


def _finite(value):
    """A value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_bytes(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name} ({size:,} bytes)"
    return f"{size} bytes"


def _size(place: Path) -> int:
    """Bytes of a file, or of the regular files of a folder and its subfolders, hidden ones left out."""
    files = [place] if place.is_file() else [file for inside in ("[!.]*", "[!.]*/[!.]*") for file in place.glob(inside) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _reads_classes(parts: Parts) -> bool:
    return parts[TRANSFORMER].config.text_dim is None


def _missing(parts: Parts) -> list[str]:
    """What has to be added to these parts for an image."""
    missing = []
    transformer = parts[TRANSFORMER].config if TRANSFORMER in parts else None
    vae = parts[AUTOENCODER] if AUTOENCODER in parts else None
    text = parts[TEXT_ENCODER] if TEXT_ENCODER in parts else None
    if transformer is None:
        channels = "" if vae is None else f" with {vae.config.latent_channels} latent channels"
        width = "" if text is None else f" that reads text features of width {_width(text)}"
        missing.append(f"a {TITLES[TRANSFORMER]}{channels}{width}")
    if text is None and not (transformer is not None and transformer.text_dim is None):
        known = "" if transformer is None else f" of width {transformer.text_dim}, with its tokenizer"
        missing.append(f"a {TITLES[TEXT_ENCODER]}{known or ' (text-to-image models only)'}")
    if text is not None:
        if _lacks_config(text):
            missing.append("config.json of the text model, in the same folder")
        if text.tokenizer is None:
            missing.append("tokenizer.json or tokenizer.model of the text model, in the same folder")
    if vae is None:
        release = None if transformer is None else find_release(transformer.in_channels, transformer.text_dim is None)
        if release is not None and release.sd_vae:
            missing.append(f"Stable Diffusion's VAE ({SD_VAE}); in ComfyUI, for {CORE_VAE.node} (models/{CORE_VAE.folder})")
        else:
            channels = "" if transformer is None else f" with {transformer.in_channels} latent channels"
            missing.append(f"a {AutoencoderConfig.TITLE}{channels}")
    return missing


def _places(parts: Parts, place: Path, complete: bool) -> list[Place]:
    """Where a file or folder belongs: as a whole, or once for each of its parts."""
    if place in BUNDLED.values():
        return [Place(ONE_FILE.node, "", ONE_FILE.option)]
    folder_of_parts = place.is_dir() and any((place / name).is_dir() for name in PART_FOLDERS)
    if complete and not folder_of_parts and not _reads_classes(parts):
        return [ONE_FILE]
    places = [one for kind in TITLES if kind in parts and (one := _place(parts[kind])) is not None]
    return [Place(one.node, one.folder, ONE_FILE.option) for one in places] if complete else places


def _place(part: Part) -> Place | None:
    """Where a file with this part belongs; None for Stable Diffusion's VAE under a prefix, with which core does not read it."""
    if part.kind == AUTOENCODER and isinstance(part.config, KLAutoencoderConfig):
        return None if part.prefix else replace(CORE_VAE, option=PLACES[AUTOENCODER].option)
    return PLACES[part.kind]


def _advice(parts: Parts, missing: tuple[str, ...]) -> str:
    """The command that downloads what is missing, for parts of the released models; or what ComfyUI does not read."""
    if AUTOENCODER in parts and _place(parts[AUTOENCODER]) is None:
        own = "write one with tim convert" if len(parts.parts) == 1 else f"tim download c2i-256 fetches {SD_VAE}"
        return f"{CORE_VAE.node} in ComfyUI takes Stable Diffusion's VAE from a file of its own; {own}"
    if not missing:
        return ""
    if TRANSFORMER not in parts and AUTOENCODER in parts and isinstance(parts[AUTOENCODER].config, KLAutoencoderConfig):
        return "tim download c2i-256 fetches the released class-conditional model with this VAE"
    if TRANSFORMER not in parts:
        released = (
            TEXT_ENCODER in parts
            and _width(parts[TEXT_ENCODER]) == GEMMA_1B_WIDTH
            or AUTOENCODER in parts
            and parts[AUTOENCODER].config.latent_channels == DC_AE_CHANNELS
        )
        return "tim download t2i fetches the released text-to-image model with all its parts" if released else ""
    config = parts[TRANSFORMER].config
    release = find_release(config.in_channels, config.text_dim is None)
    if release is None or release.text_width != config.text_dim:
        return ""
    return f"tim download {release.name} fetches what is missing of the released model"


def _defaults(parts: Parts) -> Defaults | None:
    if TRANSFORMER not in parts:
        return None
    try:
        return read_defaults(parts)
    except TimError:  # named among the transformer's problems
        return None


def _describe_other(path: str, place: Path, size: int, tensors: Mapping, metadata: Mapping[str, str]) -> Description:
    """A LoRA, with where it loads; else what kind of state dict it looks like."""
    record = {**metadata, **_lora_record(metadata)}
    try:
        lora = read_lora(place)
    except TimError:
        kind = describe_unknown(tensors)
        places = (CORE_VAE,) if kind.startswith(KL_AUTOENCODER) else ()
        return Description(path, kind, size, places=places, metadata=record)
    return _describe_lora(path, size, lora, record)


def _describe_lora(path: str, size: int, lora: Lora, record: dict) -> Description:
    advice = "" if lora.core_names else "for ComfyUI, rename its keys with tim convert"
    return Description(path, lora.title, size, places=(LORA,), missing=("the model it was trained on",), metadata=record, advice=advice)


def _lora_record(metadata: Mapping[str, str]) -> dict:
    """The training record of a LoRA made by `tim train`."""
    try:
        return {"training": parse_json(metadata["tim_lora"], "tim_lora")}
    except (LookupError, TimError):
        return {}


def _describe_part(parts: Parts, kind: str) -> PartDescription:
    part = parts[kind]
    stored: dict[str, Stored] = {}
    for tensor in part.tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        before = stored.get(name, Stored(0, 0))
        stored[name] = Stored(before.tensors + 1, before.parameters + tensor.numel())
    no_config = kind == TEXT_ENCODER and _lacks_config(part)
    everything = part.with_projector().tensors.values()
    return PartDescription(
        kind,
        part.title,
        part.prefix,
        None if no_config else part.config,
        len(everything),
        sum(one.parameters for one in stored.values()),
        sum(tensor.numel() for tensor in part.projector.values()),
        sum(tensor.nbytes for tensor in everything),
        dict(sorted(stored.items(), key=lambda item: (-item[1].parameters, item[0]))),
        len(part.quantized),
        "" if no_config else _problem(parts, kind),
    )


def _width(text_model: Part) -> int:
    return text_model.tensors["embed_tokens.weight"].shape[1]


def _lacks_config(text_model: Part) -> bool:
    return text_model.record.keys() <= {"escape_prompts"} and _width(text_model) != GEMMA_1B_WIDTH


def _problem(parts: Parts, kind: str) -> str:
    """The error that loading a part would raise, found without reading weights; empty if it loads."""
    part = parts[kind]
    try:
        check_loads(part)
        if kind == TRANSFORMER:
            read_defaults(parts)
    except TimError as error:
        return str(error).removeprefix(f"{part.source}: ")
    return ""


def _dtypes(part: PartDescription) -> str:
    counts = [f"{name} ({stored.tensors} tensors, {stored.parameters:,} parameters)" for name, stored in part.dtypes.items()]
    scales = [f"{part.quantized_layers} layers with scales"] if part.quantized_layers else []
    return ", ".join([*(counts if counts[1:] else part.dtypes), *scales])


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
        f"{condition}, interval embedded as {c.new_condition}" + (f", positions {c.positions}" if c.positions != "official" else "")
    )
