"""What a weight file holds: recognised by key names and shapes, taken apart.

The one-file layout (safetensors):

    model.diffusion_model.<official name>        the transformer
    text_encoders.transformer.<Gemma3TextModel name>
    text_encoders.tokenizer_json                 uint8, the tokenizer.json (or spiece_model, a SentencePiece tokenizer.model)
    vae.<diffusers AutoencoderDC name>

and beside each part a `config_json` (uint8): what its shapes cannot tell. The text model's is its Gemma config. The same record, with
how the model was trained, is the safetensors metadata "tim"; a file whose metadata was lost (ComfyUI's CheckpointSave) loads alike.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, one_line
from ..models.config import AutoencoderConfig, TransformerConfig
from ..models.text_encoder import normalise_config, tokenizer_file
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER, describe_unknown, find_part
from .open import StateDict, flatten, open_state_dict

FORMAT = 1
BUNDLED = {"tim-shapes": Path(__file__).parents[1] / "bundled" / "tim-shapes.safetensors"}

PREFIXES = {TRANSFORMER: "model.diffusion_model.", TEXT_ENCODER: "text_encoders.transformer.", AUTOENCODER: "vae."}
CONFIG_KEYS = {
    TRANSFORMER: "model.diffusion_model.config_json",
    TEXT_ENCODER: "text_encoders.config_json",
    AUTOENCODER: "vae.config_json",
}
PART_NAMES = {"model": TRANSFORMER, "text-encoder": TEXT_ENCODER, "clip": TEXT_ENCODER, "vae": AUTOENCODER} | {n: n for n in TITLES}

WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")
GEMMA_1B_WIDTH = 1152
LATENT_FACTORS = {32: 32, 4: 8}  # latent channels -> pixels per latent cell


@dataclass
class Parts:
    """What one or several files hold, taken apart: official key names, tensors still as the file stores them (memory-mapped)."""

    source: str
    transformer: StateDict | None = None
    text_encoder: StateDict | None = None
    autoencoder: StateDict | None = None
    records: dict[str, dict] = field(default_factory=dict)  # part -> what its shapes cannot tell
    prefixes: dict[str, str] = field(default_factory=dict)  # part -> where it stood in the file
    gemma_config: dict | None = None
    tokenizer: bytes | None = None
    metadata: dict = field(default_factory=dict)  # the "tim" record

    def __contains__(self, part: str) -> bool:
        return getattr(self, part) is not None

    def tensors(self, part: str) -> StateDict:
        """The tensors of a part; TimError if the file has none of it."""
        if part not in self:
            there = ", ".join(f"a {TITLES[p]}" for p in TITLES if p in self)
            raise TimError(f"{self.source}: found {there or 'nothing'} and no {TITLES[part]}, expected one")
        return getattr(self, part)

    def record(self, part: str) -> dict:
        return {**self.metadata, **self.records.get(part, {})}

    def config(self, part: str):
        """TransformerConfig, AutoencoderConfig, or the Gemma config as a dict; TimError naming the file if it cannot be read."""
        tensors, record = self.tensors(part), self.record(part)
        if part == TRANSFORMER and not {"projector.0.weight", "projector.2.weight", "projector.4.weight"} <= tensors.keys():
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("projector.")}  # none, or half of one
        try:
            if part == TEXT_ENCODER:
                return normalise_config(self.gemma_config or _gemma_config(tensors))
            if part == AUTOENCODER and "attention_head_dim" in record:  # a diffusers config.json
                return AutoencoderConfig.from_diffusers(record)
            return (TransformerConfig if part == TRANSFORMER else AutoencoderConfig).from_state_dict(tensors, record)
        except TimError as error:
            raise TimError(f"{self.source}: {error}") from None
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            found = f"found keys or a record that make no sense ({type(error).__name__}: {one_line(error)})"
            raise TimError(f"{self.source}: {found}, expected those of a {TITLES[part]}") from None

    def check_fit(self) -> None:
        """TimError if the transformer cannot read the text model's features or the autoencoder cannot decode its latents."""
        if self.transformer is None:
            return
        config = self.config(TRANSFORMER)
        if self.autoencoder is not None and (channels := self.config(AUTOENCODER).latent_channels) != config.in_channels:
            wanted = f"the transformer's {config.in_channels}"
            raise TimError(f"{self.source}: found an autoencoder of {channels} latent channels, expected {wanted}")
        if self.text_encoder is not None and (width := self.text_encoder["embed_tokens.weight"].shape[1]) != config.text_dim:
            wanted = "none: the transformer is class-conditional" if config.text_dim is None else f"the transformer's {config.text_dim}"
            raise TimError(f"{self.source}: found a text model of width {width}, expected {wanted}")

    @property
    def escape(self) -> bool:
        """Whether prompts are unicode-escaped: as the transformer was trained, which for the released weights is yes."""
        records = (self.records.get(TRANSFORMER, {}), self.metadata, self.records.get(TEXT_ENCODER, {}))
        escape = next((r["escape_prompts"] for r in records if r.get("escape_prompts") is not None), True)
        if not isinstance(escape, bool):
            raise TimError(f"{self.source}: escape_prompts is {escape!r}, expected true or false")
        return escape

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell: from the metadata, else the autoencoder in the same file, else the latent's channels."""
        record = self.record(TRANSFORMER)
        if (factor := record.get("latent_factor")) is not None:
            if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
                raise TimError(f"{self.source}: latent_factor is {factor!r}, expected a whole number of at least 1")
            return factor
        if self.autoencoder is not None:
            return self.config(AUTOENCODER).factor
        channels = self.tensors(TRANSFORMER)["x_embedder.proj.weight"].shape[1]
        return LATENT_FACTORS.get(channels, 8)


# Taking apart


def resolve(name: str | Path) -> Path:
    """A bundled model's name, or a path, to the file; TimError listing the bundled names if there is neither."""
    if str(name) in BUNDLED:
        path = BUNDLED[str(name)]
        if not path.is_file():
            raise TimError(f"{name}: the bundled model is not in this installation, expected it at {path}")
        return path
    path = Path(name).expanduser()
    if not str(name).strip() or not path.exists():
        raise TimError(f"{name}: found no such file, expected a path or a bundled model ({', '.join(BUNDLED)})")
    return path


def read_parts(source) -> Parts:
    """Takes apart a weight file, a folder in Hugging Face layout, a bundled name, or a dict of parts ({"model": ..., "vae": ...}).

    A dict's values are files, folders or modules. TimError, naming the file, what was found and what was expected, if nothing of ours
    is in it.
    """
    if isinstance(source, Parts):
        return source
    if isinstance(source, Mapping):
        return _gather(source)
    path = resolve(source)
    tensors, metadata, folder = _open_folder(path) if path.is_dir() else (*open_state_dict(path), path.parent)
    parts = _take_apart(tensors, str(source))
    parts.metadata = _tim_record(metadata, str(source))
    if not any(part in parts for part in TITLES):
        found = describe_unknown(tensors)
        raise TimError(f"{source}: found {found}, expected a TiM transformer, a Gemma-3 text model, a DC-AE, or several of them")
    _read_beside(parts, folder)
    return parts


def _take_apart(tensors: Mapping[str, Tensor], source: str) -> Parts:
    parts = Parts(source)
    rest = dict(tensors)
    for part in (AUTOENCODER, TEXT_ENCODER, TRANSFORMER):  # the transformer, which takes all that stands under its prefix, last
        if (found := find_part(rest, part)) is None:
            continue
        prefix, own = found
        setattr(parts, part, own)
        parts.prefixes[part] = prefix
        for name in own:
            del rest[prefix + name]
        places = (prefix, prefix.removesuffix("transformer.")) if part == TEXT_ENCODER else (prefix,)
        config = next((rest.pop(place + "config_json") for place in places if place + "config_json" in rest), None)
        if config is not None:
            parts.records[part] = _json(_bytes(config), f"{source}: {prefix}config_json")
    if TEXT_ENCODER in parts and TEXT_ENCODER in parts.records:
        record = parts.records[TEXT_ENCODER]
        parts.gemma_config = {k: v for k, v in record.items() if k != "escape_prompts"}
        parts.records[TEXT_ENCODER] = {k: v for k, v in record.items() if k == "escape_prompts"}
    for key, tensor in rest.items():
        if key.rpartition(".")[2] in ("tokenizer_json", "spiece_model"):
            parts.tokenizer = _bytes(tensor)
    return parts


def _gather(sources: Mapping) -> Parts:
    parts = Parts(" + ".join(str(s) if isinstance(s, (str, Path)) else type(s).__name__ for s in sources.values()))
    for name, source in sources.items():
        if name not in PART_NAMES:
            raise TimError(f"parts: found '{name}', expected {', '.join(map(repr, PART_NAMES))}")
        part = PART_NAMES[name]
        if source is None:
            continue
        one = _from_module(source, part) if isinstance(source, torch.nn.Module) else read_parts(source)
        if part not in one:
            held = ", ".join(f"a {TITLES[p]}" for p in TITLES if p in one)
            raise TimError(f"{one.source}: found {held}, expected a {TITLES[part]}")
        setattr(parts, part, getattr(one, part))
        parts.records[part] = one.records.get(part, {})
        if part == TEXT_ENCODER:
            parts.gemma_config, parts.tokenizer = one.gemma_config, one.tokenizer
            if "escape_prompts" in one.metadata:
                parts.records[part] = {"escape_prompts": one.metadata["escape_prompts"], **parts.records[part]}
        elif part == AUTOENCODER:
            parts.records[part] = {k: v for k, v in one.metadata.items() if k in AutoencoderConfig.RECORD} | parts.records[part]
        else:
            parts.metadata = {k: v for k, v in one.metadata.items() if k not in AutoencoderConfig.RECORD}
    return parts


def _from_module(module: torch.nn.Module, part: str) -> Parts:
    parts = Parts(type(module).__name__)
    found = find_part(flatten(module.state_dict(), parts.source), part)  # without a compiled or distributed module's wrapping
    if found is None:
        raise TimError(f"{parts.source}: found a module without the tensors of one, expected a {TITLES[part]}")
    setattr(parts, part, found[1])
    module = getattr(module, "module", module)
    if part == TEXT_ENCODER:
        parts.gemma_config, parts.tokenizer = module.gemma_config, module.tokenizer.data
        parts.records[part] = {"escape_prompts": module.escape}
    else:
        parts.records[part] = module.config.record()
    return parts


def _open_folder(folder: Path) -> tuple[StateDict, dict[str, str], Path]:
    """The weights of a folder in Hugging Face layout: one file, or the shards that an index names."""
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(_json(index.read_bytes(), str(index)).get("weight_map", {}).values()))
        if shards:
            tensors = {}
            for shard in shards:
                tensors.update(open_state_dict(folder / Path(shard).name)[0])
            return tensors, {}, folder
    files = [folder / f"{stem}{end}" for stem in WEIGHT_FILES for end in (".safetensors", ".bin")]
    files = [file for file in files if file.is_file()] or sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and files[0].stem not in WEIGHT_FILES:
        raise TimError(f"{folder}: found {len(files)} weight files, expected the name of one ({', '.join(f.name for f in files[:3])}, ...)")
    if not files:
        raise TimError(f"{folder}: found a folder without weights, expected model.safetensors or another of Hugging Face's layout in it")
    return (*open_state_dict(files[0]), folder)


def _read_beside(parts: Parts, folder: Path) -> None:
    """What a text model or an autoencoder lacks of its own: config.json and the tokenizer in the same folder."""
    file = folder / "config.json"
    text = TEXT_ENCODER in parts and parts.gemma_config is None
    pixels = AUTOENCODER in parts and AUTOENCODER not in parts.records and not parts.metadata
    if (text or pixels) and file.is_file():
        config = _json(file.read_bytes(), str(file))
        inner = config.get("text_config", config)
        if text and isinstance(inner, dict) and inner.get("model_type") == "gemma3_text":
            parts.gemma_config = config
        if pixels and config.get("_class_name", "AutoencoderDC") == "AutoencoderDC" and "encoder_block_out_channels" in config:
            parts.records[AUTOENCODER] = config
    if TEXT_ENCODER in parts and parts.tokenizer is None and (tokenizer := tokenizer_file(folder)):
        parts.tokenizer = tokenizer.read_bytes()


# Small things


def _gemma_config(tensors: Mapping[str, Tensor]) -> dict:
    """The config of a Gemma 3 1B without config.json, which is all that its shapes identify for certain."""
    vocab, hidden = tensors["embed_tokens.weight"].shape
    if hidden != GEMMA_1B_WIDTH:
        raise TimError(f"found a Gemma-3 text model of width {hidden} without its config, expected config.json beside it")
    head_dim = tensors["layers.0.self_attn.q_norm.weight"].shape[0]
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("layers.")),
        "num_attention_heads": tensors["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim,
        "num_key_value_heads": tensors["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
    }


def _tim_record(metadata: Mapping[str, str], source: str) -> dict:
    record = _json(metadata["tim"].encode("utf-8"), f"{source}: metadata") if "tim" in metadata else {}
    form = record.get("format", FORMAT)
    if not isinstance(form, int) or form > FORMAT:
        raise TimError(f"{source}: found checkpoint format {form!r}, expected {FORMAT}; a newer version of this package may read it")
    return record


def _json(data: bytes, name: str) -> dict:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise TimError(f"{name}: found no readable JSON ({one_line(error)}), expected an object") from None
    if not isinstance(value, dict):
        raise TimError(f"{name}: found a JSON {type(value).__name__}, expected an object")
    return value


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(device="cpu", dtype=torch.uint8).numpy().tobytes()
