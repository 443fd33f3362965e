"""Reads weight files and takes them apart into a transformer, a text encoder and an autoencoder.

The one-file layout (safetensors):

    model.diffusion_model.<official name>        the transformer
    text_encoders.transformer.<Gemma3TextModel name>
    text_encoders.tokenizer_json                 uint8, the tokenizer.json (or spiece_model, a SentencePiece tokenizer.model)
    vae.<diffusers AutoencoderDC or AutoencoderKL name>

Each part also has a `config_json` (uint8), a record of the settings that tensor shapes do not determine; that of the text encoder is its
Gemma config. The safetensors metadata "tim" repeats these records and adds how the model was trained. A file without metadata, as
ComfyUI's CheckpointSave writes it, loads the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TimError, one_line, printable
from ..files import is_file, parse_json, read_bytes, user_path
from ..models.config import AutoencoderConfig, TransformerConfig
from ..models.gemma import check_gemma, gemma_1b_config, normalise_config
from ..models.kl_autoencoder import KLAutoencoderConfig, diffusers_names
from ..models.released import ESCAPE_PROMPTS, latent_factor
from ..models.tokenizer import MOST_TOKENIZER, is_json, tokenizer_file
from .detect import AUTOENCODER, BYTE_KEYS, TEXT_ENCODER, TITLES, TRANSFORMER, describe_unknown, find_copies, find_part, other_model
from .open import StateDict, flatten, open_state_dict
from .quantized import MARKER, Quantization, dequantize, separate, with_layer_keys

FORMAT = 1
BUNDLED = {"tim-shapes": Path(__file__).parents[1] / "bundled" / "tim-shapes.safetensors"}

PREFIXES = {TRANSFORMER: "model.diffusion_model.", TEXT_ENCODER: "text_encoders.transformer.", AUTOENCODER: "vae."}
CONFIG_KEYS = {
    TRANSFORMER: "model.diffusion_model.config_json",
    TEXT_ENCODER: "text_encoders.config_json",
    AUTOENCODER: "vae.config_json",
}
PART_FOLDERS = {"transformer": "model", "text_encoder": "text-encoder", "vae": "vae"}  # of a folder of parts
PART_NAMES = {"model": TRANSFORMER, "text-encoder": TEXT_ENCODER, "clip": TEXT_ENCODER, "vae": AUTOENCODER} | {n: n for n in TITLES}

DIMENSIONS = {
    "embed_tokens.weight": 2, "layers.0.self_attn.q_norm.weight": 1, "layers.0.self_attn.q_proj.weight": 2,
    "layers.0.self_attn.k_proj.weight": 2, "layers.0.mlp.gate_proj.weight": 2, "x_embedder.proj.weight": 4,
}

WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")
MOST_FACTOR = 256


@dataclass(frozen=True, eq=False)
class Part:
    """One model of a checkpoint.

    tensors: under their official names, as the file stores them; the REPA projector of a transformer is kept apart.
    record: the settings that tensor shapes do not determine. A key comes from the part's own `config_json`, else from the file's
    metadata; where neither has any, the record is read from a config.json in the same folder.
    """

    kind: str
    source: str  # file, folder, bundled name or class, for error messages
    tensors: StateDict
    record: dict = field(default_factory=dict)
    prefix: str = ""  # of its keys in the file
    projector: StateDict = field(default_factory=dict)
    tokenizer: bytes | None = None
    quantized: dict[str, Quantization] = field(default_factory=dict)  # layers whose weight is stored in 8 bits with a scale

    def weight(self, name: str) -> Tensor:
        """A tensor as the network needs it: scaled to float32 if it is quantised."""
        layer = name.removesuffix(".weight")
        return dequantize(self.tensors[name], self.quantized[layer]) if layer != name and layer in self.quantized else self.tensors[name]

    def with_projector(self) -> Part:
        """This part with the REPA projector among its tensors."""
        return replace(self, tensors=self.tensors | self.projector, projector={})

    @property
    def title(self) -> str:
        return autoencoder_config(self.tensors).TITLE if self.kind == AUTOENCODER else TITLES[self.kind]

    @cached_property
    def config(self):
        """TransformerConfig, AutoencoderConfig, KLAutoencoderConfig, or the Gemma config as a dict. TimError naming the source."""
        with naming(self.source, self.kind):
            if self.kind == TRANSFORMER:
                return TransformerConfig.from_state_dict(self.tensors, self.record)
            if self.kind == AUTOENCODER:
                return autoencoder_config(self.tensors).from_state_dict(self.tensors, self.record)
            gemma = {key: value for key, value in self.record.items() if key != "escape_prompts"}
            config = normalise_config(gemma or gemma_1b_config(self.tensors))
            check_gemma(config, self.tensors)
            return config


@dataclass
class Parts:
    """The parts of one or several files. `parts[kind]` is a Part; TimError naming the source if there is none."""

    source: str  # as errors name it
    parts: dict[str, Part] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)  # the "tim" record of the file
    rest: list[str] = field(default_factory=list)  # names of tensors that belong to no part
    path: str = ""  # what read_parts takes to read them again, by default the source

    def __post_init__(self) -> None:
        self.path = self.path or self.source

    def __contains__(self, kind: str) -> bool:
        return kind in self.parts

    def __getitem__(self, kind: str) -> Part:
        if kind not in self.parts:
            raise TimError(f"{self.source}: has no {TITLES[kind]}; it holds {_list(self)}")
        return self.parts[kind]

    def require(self, *kinds: str) -> None:
        """TimError naming the first kind that is missing."""
        for kind in kinds:
            self[kind]

    def check_fit(self, latent_factor: int | None = None) -> None:
        """TimError if the transformer cannot read the text model's features or the autoencoder cannot decode its latents.

        latent_factor: instead of the one in the transformer's record.
        """
        if TRANSFORMER not in self:
            return
        config = self[TRANSFORMER].config
        if AUTOENCODER in self and (channels := self[AUTOENCODER].config.latent_channels) != config.in_channels:
            own = f"the transformer has {config.in_channels}; use the autoencoder it was trained with"
            raise TimError(f"{self.source}: the autoencoder has {channels} latent channels, {own}")
        factor = self.latent_factor if latent_factor is None else latent_factor
        if AUTOENCODER in self and (pixels := self[AUTOENCODER].config.factor) != factor:
            advice = "use the autoencoder it was trained with, or correct the file's metadata"
            raise TimError(f"{self.source}: the transformer's latent_factor is {factor}, the autoencoder has {pixels}; {advice}")
        if TEXT_ENCODER in self and (width := self[TEXT_ENCODER].tensors["embed_tokens.weight"].shape[1]) != config.text_dim:
            if config.text_dim is None:
                raise TimError(f"{self.source}: the transformer is class-conditional; leave out the text model")
            own = f"the transformer reads width {config.text_dim}; use the text model it was trained with"
            raise TimError(f"{self.source}: the text model has width {width}, {own}")

    @property
    def escape(self) -> bool:
        """Whether prompts are unicode-escaped, as in training: from the transformer's record, else the text model's, else as released."""
        records = (self.parts[kind].record for kind in (TRANSFORMER, TEXT_ENCODER) if kind in self)
        escape = next((r["escape_prompts"] for r in records if r.get("escape_prompts") is not None), ESCAPE_PROMPTS)
        if not isinstance(escape, bool):
            raise TimError(f"{self.source}: escape_prompts is {escape!r}; it must be true or false")
        return escape

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell: from the transformer's record, else the autoencoder, else the latent's channels."""
        factor = self.parts[TRANSFORMER].record.get("latent_factor") if TRANSFORMER in self else None
        if factor is not None:
            if isinstance(factor, bool) or not isinstance(factor, int) or not 1 <= factor <= MOST_FACTOR:
                raise TimError(f"{self.source}: latent_factor is {factor!r}; it must be a whole number from 1 to {MOST_FACTOR}")
            return factor
        if AUTOENCODER in self:
            return self[AUTOENCODER].config.factor
        return latent_factor(self[TRANSFORMER].tensors["x_embedder.proj.weight"].shape[1])

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this many pixels: the latent factor times the patch size."""
        return self.latent_factor * self[TRANSFORMER].config.patch_size


def _list(parts: Parts) -> str:
    return ", ".join(f"a {parts[kind].title}" for kind in TITLES if kind in parts) or "no part of a TiM checkpoint"


def autoencoder_config(tensors: Mapping[str, Tensor]) -> type[AutoencoderConfig] | type[KLAutoencoderConfig]:
    """The class of the configuration of an autoencoder with these tensors."""
    return KLAutoencoderConfig if "quant_conv.weight" in tensors else AutoencoderConfig


class NoPart(TimError):
    """A file that holds no part of a TiM checkpoint."""


@contextmanager
def naming(source: str, kind: str) -> Iterator[None]:
    """Turns errors inside into a TimError that names the source."""
    try:
        yield
    except TimError as error:
        message = str(error)
        raise TimError(message if message.startswith(f"{source}: ") else f"{source}: {message}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise TimError(f"{source}: malformed metadata or tensors of the {TITLES[kind]} ({reason})") from None


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
    tensors, metadata, folder = _open_folder(path, checksums) if path.is_dir() else (*open_state_dict(path, checksums), path.parent)
    tensors = with_layer_keys(tensors, metadata, str(source))
    parts = _take_apart(tensors, _tim_record(metadata, str(source)), str(source))
    if not parts.parts or _is_of_another_model(parts):
        wanted = " or ".join(TITLES.values())
        raise NoPart(f"{source}: no {wanted} in it; this is {describe_unknown(tensors)}")
    parts.parts = {kind: _complete(part, folder) for kind, part in parts.parts.items()}
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
            record |= _json(_bytes(config), f"{source}: {prefix}config_json")
        if kind == TRANSFORMER and "preview" in record and not _is_preview(record["preview"], own["x_embedder.proj.weight"]):
            logging.warning(f"{source}: the preview in the metadata is malformed and ignored; tim previews makes a new one")
            del record["preview"]
            metadata.pop("preview", None)
        parts.parts[kind] = replace(_part(kind, source, own, record, prefix), quantized=quantized)
    tokenizers = [_bytes(tensor) for key, tensor in rest.items() if key.rpartition(".")[2] in ("tokenizer_json", "spiece_model")]
    if tokenizers and TEXT_ENCODER in parts:
        parts.parts[TEXT_ENCODER] = replace(parts[TEXT_ENCODER], tokenizer=_not_empty(tokenizers[-1], f"{source}: tokenizer"))
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


def _open_folder(folder: Path, checksums: bool) -> tuple[StateDict, dict[str, str], Path]:
    """The weights of a folder in Hugging Face layout: one file, or the shards that an index names."""
    for index in sorted(folder.glob("*.index.json")):
        weight_map = _json(read_bytes(index), str(index)).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TimError(f"{index}: weight_map must map names of tensors to file names; download the index again")
        if weight_map:
            return _open_shards(folder, sorted({Path(shard).name for shard in weight_map.values()}), checksums), {}, folder
    files = [folder / f"{stem}{end}" for stem in WEIGHT_FILES for end in (".safetensors", ".bin")]
    files = [file for file in files if is_file(file)] or sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(files) > 1 and files[0].stem not in WEIGHT_FILES:
        raise TimError(f"{folder}: holds {len(files)} weight files; name one ({', '.join(f.name for f in files[:3])}, ...)")
    if not files:
        raise TimError(f"{folder}: no weights in this folder; it needs model.safetensors or another file of the Hugging Face layout")
    return (*open_state_dict(files[0], checksums), folder)


def _open_shards(folder: Path, names: list[str], checksums: bool) -> StateDict:
    """The tensors of several files. TimError naming a tensor that two of them hold."""
    tensors: StateDict = {}
    for name in names:
        shard = open_state_dict(folder / name, checksums)[0]
        if twice := next((key for key in shard if key in tensors), None):
            raise TimError(f"{folder / name}: tensor '{twice}' is in another shard, too; download the folder again")
        tensors |= shard
    return tensors


def _complete(part: Part, folder: Path) -> Part:
    """The part with what its file lacks: a record from config.json, and the tokenizer, of the same folder."""
    file, record, tokenizer = folder / "config.json", part.record, part.tokenizer
    if part.kind == TEXT_ENCODER and record.keys() <= {"escape_prompts"} and is_file(file):
        config = _json(read_bytes(file), str(file))
        inner = config.get("text_config", config)
        if isinstance(inner, dict) and inner.get("model_type") == "gemma3_text":
            record = {**inner, **record}
    if part.kind == AUTOENCODER and not record and is_file(file):
        config, own = _json(read_bytes(file), str(file)), autoencoder_config(part.tensors)
        name, key = own.DIFFUSERS
        kind = config.get("_class_name", name)
        if kind != name and (key in config or str(kind).startswith(("Autoencoder", "VQ"))):
            found = f"_class_name is {kind!r}, but the weights are of a {own.TITLE}, {name}"
            raise TimError(f"{file}: {found}; use the config.json of these weights")
        if key in config:
            with naming(str(file), part.kind):
                record = _record_of_config(own.from_diffusers(config), part.tensors)
    if part.kind == TEXT_ENCODER and tokenizer is None and (found := tokenizer_file(folder)):
        tokenizer = _not_empty(read_bytes(found, MOST_TOKENIZER), str(found))
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


def _not_empty(data: bytes, name: str) -> bytes:
    if not data.strip():
        raise TimError(f"{name}: is empty; download it again")
    return data


def _tim_record(metadata: Mapping[str, str], source: str) -> dict:
    record = _json(metadata["tim"].encode("utf-8"), f"{source}: metadata") if "tim" in metadata else {}
    form = record.get("format", FORMAT)
    if not isinstance(form, int) or form > FORMAT:
        raise TimError(f"{source}: checkpoint format {form!r} is not known; update this package (it reads format {FORMAT})")
    return record


def _json(data: bytes, name: str) -> dict:
    value = parse_json(data, name)
    if not isinstance(value, dict):
        raise TimError(f"{name}: holds a JSON {type(value).__name__}; it must be an object")
    return value


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(device="cpu", dtype=torch.uint8).numpy().tobytes()
