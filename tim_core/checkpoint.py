"""Weight files: opened without running code from them, recognised by key names and shapes, taken apart, loaded, packed into one.

The one-file layout (safetensors):

    model.diffusion_model.<official name>        the transformer
    text_encoders.transformer.<Gemma3TextModel name>
    text_encoders.tokenizer_json                 uint8, the tokenizer.json (or spiece_model, a SentencePiece tokenizer.model)
    vae.<diffusers AutoencoderDC name>

and beside each part a `config_json` (uint8): what its shapes cannot tell. The text model's is its Gemma config. The same record, with
how the model was trained, is the safetensors metadata "tim"; a file whose metadata was lost (ComfyUI's CheckpointSave) loads alike.
"""

import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import TimError

FORMAT = 1
BUNDLED = {"tim-shapes": Path(__file__).parent / "bundled" / "tim-shapes.safetensors"}

TRANSFORMER, TEXT_ENCODER, AUTOENCODER = "transformer", "text_encoder", "autoencoder"
TITLES = {TRANSFORMER: "TiM transformer", TEXT_ENCODER: "Gemma-3 text model", AUTOENCODER: "DC-AE"}
PREFIXES = {TRANSFORMER: "model.diffusion_model.", TEXT_ENCODER: "text_encoders.transformer.", AUTOENCODER: "vae."}
CONFIG_KEYS = {
    TRANSFORMER: "model.diffusion_model.config_json",
    TEXT_ENCODER: "text_encoders.config_json",
    AUTOENCODER: "vae.config_json",
}
PART_NAMES = {"model": TRANSFORMER, "text-encoder": TEXT_ENCODER, "clip": TEXT_ENCODER, "vae": AUTOENCODER} | {n: n for n in TITLES}

# A part is where all of these are; what stands before them is its prefix.
SIGNATURES = {
    TRANSFORMER: (
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.adaLN_modulation.fc1_g.weight",
        "final_layer.linear.weight",
    ),
    TEXT_ENCODER: ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.pre_feedforward_layernorm.weight", "norm.weight"),
    AUTOENCODER: ("encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.norm_out.weight", "decoder.up_blocks.1.0.conv.weight"),
}
ROOTS = {TEXT_ENCODER: ("embed_tokens.", "layers.", "norm."), AUTOENCODER: ("encoder.", "decoder.")}
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, activation checkpointing
BYTE_KEYS = ("config_json", "tokenizer_json", "spiece_model")
WEIGHT_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")
GEMMA_1B_WIDTH = 1152
LATENT_FACTORS = {32: 32, 4: 8}  # latent channels -> pixels per latent cell

# Other models' key names, for the message that says what a file is.
STRANGERS = (
    (("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight"), "a LoRA"),
    (("input_blocks.0.0.weight", "label_emb.0.0.weight"), "an SDXL UNet-like state dict"),
    (("input_blocks.0.0.weight",), "a Stable Diffusion UNet-like state dict"),
    (("add_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"), "an SDXL UNet-like state dict (diffusers)"),
    (("mid_block.attentions.0.proj_in.weight",), "a Stable Diffusion UNet-like state dict (diffusers)"),
    (("double_blocks.0.img_attn.qkv.weight",), "a Flux-like transformer"),
    (("joint_blocks.0.x_block.attn.qkv.weight",), "an SD3-like transformer"),
    (("blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"), "a DiT- or SiT-like transformer"),
    (("transformer_blocks.0.attn1.to_q.weight",), "a diffusers transformer"),
    (("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"), "a KL autoencoder"),
    (("encoder.down_blocks.0.resnets.0.conv1.weight",), "a KL autoencoder (diffusers)"),
    (("encoder.block.0.layer.0.SelfAttention.q.weight",), "a T5 text encoder"),
    (("text_model.encoder.layers.0.self_attn.q_proj.weight",), "a CLIP text encoder"),
    (("layers.0.self_attn.q_proj.weight", "embed_tokens.weight"), "a language model other than Gemma 3"),
)

StateDict = dict[str, Tensor]


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
            raise TimError(f"{self.source}: found {there or 'nothing'}, expected a {TITLES[part]} too")
        return getattr(self, part)

    def record(self, part: str) -> dict:
        return {**self.metadata, **self.records.get(part, {})}

    def config(self, part: str):
        """TransformerConfig, AutoencoderConfig, or the Gemma config as a dict; TimError naming the file if it cannot be read."""
        from .config import AutoencoderConfig, TransformerConfig
        from .text_encoder import normalise_config

        tensors, record = self.tensors(part), self.record(part)
        try:
            if part == TEXT_ENCODER:
                return normalise_config(self.gemma_config or _gemma_config(tensors))
            if part == AUTOENCODER and "attention_head_dim" in record:  # a diffusers config.json
                return AutoencoderConfig.from_diffusers(record)
            return (TransformerConfig if part == TRANSFORMER else AutoencoderConfig).from_state_dict(tensors, record)
        except TimError as error:
            raise TimError(f"{self.source}: {error}") from None

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
        return bool(next((r["escape_prompts"] for r in records if r.get("escape_prompts") is not None), True))

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell: from the metadata, else the autoencoder in the same file, else the latent's channels."""
        record = self.record(TRANSFORMER)
        if record.get("latent_factor"):
            return int(record["latent_factor"])
        if self.autoencoder is not None:
            return self.config(AUTOENCODER).factor
        channels = self.tensors(TRANSFORMER)["x_embedder.proj.weight"].shape[1]
        return LATENT_FACTORS.get(channels, 8)


@dataclass
class Checkpoint:
    """The loaded parts of a model; None for a part that the file does not have."""

    transformer: torch.nn.Module
    text_encoder: torch.nn.Module | None
    autoencoder: torch.nn.Module | None
    latent_factor: int
    metadata: dict


# Opening


def resolve(name: str | Path) -> Path:
    """A bundled model's name, or a path, to the file; TimError listing the bundled names if there is neither."""
    if str(name) in BUNDLED:
        path = BUNDLED[str(name)]
        if not path.is_file():
            raise TimError(f"{name}: the bundled model is not in this installation, expected it at {path}")
        return path
    path = Path(name).expanduser()
    if not path.exists():
        raise TimError(f"{name}: found no such file, expected a path or a bundled model ({', '.join(BUNDLED)})")
    return path


def open_state_dict(path: str | Path, header: bool = False) -> tuple[StateDict, dict[str, str]]:
    """A weight file -> its tensors (nested dicts flattened to dotted keys; memory-mapped where the format allows) and safetensors metadata.

    The format is told by content. Torch files go through the weights-only loader alone. With `header` the tensors of a safetensors
    file are on the meta device, except the small byte tensors. TimError naming the file if it cannot be opened, or would run code.
    """
    path = Path(path)
    if path.is_dir():
        raise TimError(f"{path}: found a folder, expected a weight file")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise TimError(f"{path}: found no such file, expected a weight file") from None
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror}), expected a weight file") from None
    if not start:
        raise TimError(f"{path}: found an empty file, expected a weight file")
    if start[8:9] == b"{":
        return _open_safetensors(path, header)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _flatten(_open_torch(path), str(path)), {}
    strangers = {
        b"GGUF": "a GGUF file",
        b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
        b"<": "a web page, not the file itself",
        b"{": "a JSON file",
    }
    found = next((title for magic, title in strangers.items() if start.lstrip().startswith(magic)), "an unknown or damaged file")
    raise TimError(f"{path}: found {found}, expected safetensors or a torch weight file (.bin, .pt, .pth)")


def _open_safetensors(path: Path, header: bool) -> tuple[StateDict, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for key in file.keys():
                if header and key.rpartition(".")[2] not in BYTE_KEYS:
                    view = file.get_slice(key)
                    tensors[key] = torch.empty(view.get_shape(), dtype=_safetensors_dtype(view.get_dtype()), device="meta")
                else:
                    tensors[key] = file.get_tensor(key)
            return {_unwrapped(key): tensor for key, tensor in tensors.items()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise TimError(f"{path}: found a truncated or damaged safetensors file ({_one_line(error)}), expected a whole one") from None


def _safetensors_dtype(name: str) -> torch.dtype:
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    names |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
    return getattr(torch, names.get(name, "uint8"))


def _open_torch(path: Path):
    """torch.load(weights_only=True), memory-mapped unless the file is of torch's old format (or misnamed: torch goes by .safetensors)."""
    for mmap in (True, False) if path.suffix != ".safetensors" else (False,):
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual pickle protocol
            try:
                return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
            except Exception as error:  # UnpicklingError, RuntimeError, EOFError, and whatever a damaged pickle provokes
                text = _one_line(error, limit=None)
        if mmap and "mmap" in text.replace(str(path), ""):
            continue
        named = re.search(r"GLOBAL [\w.]+", text) or re.search(r"Unsupported (class|global|operand|type)\S* [\w.]+|TorchScript", text)
        if named:
            raise TimError(f"{path}: found code or objects in the file ({named[0]}), expected tensors only; it was not opened")
        raise TimError(f"{path}: found a truncated or damaged torch file ({text[:120]}), expected a whole one")


def _flatten(value, name: str) -> StateDict:
    """Nested dicts to dotted keys; anything but tensors (step counts, settings) is left out."""
    if not isinstance(value, Mapping):
        raise TimError(f"{name}: found a {type(value).__name__}, expected a state dict")
    tensors = {}

    def walk(mapping: Mapping, prefix: str) -> None:
        for key, item in mapping.items():
            if isinstance(item, Tensor):
                tensors[_unwrapped(f"{prefix}{key}")] = item
            elif isinstance(item, Mapping):
                walk(item, f"{prefix}{key}.")

    walk(value, "")
    return tensors


def _unwrapped(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key


# Recognising


def find(tensors: Mapping[str, Tensor], part: str) -> tuple[str, StateDict] | None:
    """The part's prefix and its tensors under their official names; None if it is not there.

    Any wrapping is understood (`model.`, `state_dict.`, `module.`, `model.diffusion_model.`, ...). Where a training checkpoint holds
    both the trained weights and their moving average, the average (`ema`) is taken: it is what the authors sample with.
    """
    first, *others = SIGNATURES[part]
    prefixes = {key[: -len(first)] for key in tensors if key == first or key.endswith("." + first)}
    prefixes = {prefix for prefix in prefixes if all(prefix + name in tensors for name in others)}
    if not prefixes:
        return None
    best = min(prefixes, key=lambda p: (not any("ema" in word.split("_") for word in p.split(".")), len(p), p))
    foreign = tuple(p for p in prefixes if p != best and p.startswith(best))
    roots = ROOTS.get(part, ("",))
    return best, {
        key[len(best) :]: tensor
        for key, tensor in tensors.items()
        if key.startswith(best)
        and key[len(best) :].startswith(roots)
        and key.rpartition(".")[2] not in BYTE_KEYS
        and not (foreign and key.startswith(foreign))
    }


def guess(tensors: Mapping[str, Tensor]) -> str:
    """What a state dict that is none of ours looks like, in words."""
    names = set(tensors)
    suffixes = {key.partition(".")[2] for key in names} | {key.split(".", 2)[-1] for key in names} | names
    for marks, title in STRANGERS:
        if title == "a LoRA":
            if any(key.endswith(marks) for key in names):
                break
        elif all(mark in suffixes for mark in marks):
            break
    else:
        title = "an unknown state dict"
    shown = ", ".join(list(tensors)[:3])
    return f"{title}: {len(tensors)} tensors" + (f", first keys {shown}" if shown else "")


def read_parts(source, header: bool = False) -> Parts:
    """Takes apart a weight file, a folder in Hugging Face layout, a bundled name, or a dict of parts ({"model": ..., "vae": ...}).

    A dict's values are files, folders or modules. `header` reads no weights of a safetensors file (see open_state_dict).
    TimError, naming the file, what was found and what was expected, if nothing of ours is in it.
    """
    if isinstance(source, Parts):
        return source
    if isinstance(source, Mapping):
        return _gather(source, header)
    path = resolve(source)
    tensors, metadata, folder = _open_folder(path, header) if path.is_dir() else (*open_state_dict(path, header), path.parent)
    parts = _take_apart(tensors, str(source))
    parts.metadata = _tim_record(metadata, str(source))
    if not any(part in parts for part in TITLES):
        raise TimError(f"{source}: found {guess(tensors)}, expected a TiM transformer, a Gemma-3 text model, a DC-AE, or several of them")
    _read_beside(parts, folder, own_folder=path.is_dir())
    return parts


def _take_apart(tensors: Mapping[str, Tensor], source: str) -> Parts:
    parts = Parts(source)
    rest = dict(tensors)
    for part in (AUTOENCODER, TEXT_ENCODER, TRANSFORMER):  # the transformer, which takes all that stands under its prefix, last
        if (found := find(rest, part)) is None:
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


def _gather(sources: Mapping, header: bool) -> Parts:
    parts = Parts(" + ".join(str(s) if isinstance(s, (str, Path)) else type(s).__name__ for s in sources.values()))
    for name, source in sources.items():
        if name not in PART_NAMES:
            raise TimError(f"parts: found '{name}', expected {', '.join(map(repr, PART_NAMES))}")
        part = PART_NAMES[name]
        if source is None:
            continue
        one = _from_module(source, part) if isinstance(source, torch.nn.Module) else read_parts(source, header)
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
            scale = {k: one.metadata[k] for k in ("scaling_factor",) if k in one.metadata}
            parts.records[part] = {**scale, **parts.records[part]}
        else:
            parts.metadata = {k: v for k, v in one.metadata.items() if k != "scaling_factor"}
    return parts


def _from_module(module: torch.nn.Module, part: str) -> Parts:
    parts = Parts(type(module).__name__)
    found = find(_flatten(module.state_dict(), parts.source), part)  # without a compiled or distributed module's wrapping
    if found is None:
        raise TimError(f"{parts.source}: found a module without the tensors of one, expected a {TITLES[part]}")
    setattr(parts, part, found[1])
    module = getattr(module, "module", module)
    if part == TEXT_ENCODER:
        parts.gemma_config, parts.tokenizer = module.gemma_config, module.tokenizer.data
        parts.records[part] = {"escape_prompts": module.escape}
    else:
        parts.records[part] = _shapeless(module.config)
    return parts


def _shapeless(config) -> dict:
    """What the shapes of a transformer or an autoencoder cannot tell."""
    if hasattr(config, "latent_channels"):
        names = ("scaling_factor", "head_dim")
    else:
        names = ("num_heads", "new_condition", "null_class") + (("encoder_depth",) if config.z_dim is not None else ())
    return {name: getattr(config, name) for name in names}


def _open_folder(folder: Path, header: bool) -> tuple[StateDict, dict[str, str], Path]:
    """The weights of a folder in Hugging Face layout: one file, or the shards that an index names."""
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(_json(index.read_bytes(), str(index)).get("weight_map", {}).values()))
        if shards:
            tensors = {}
            for shard in shards:
                tensors.update(open_state_dict(folder / Path(shard).name, header)[0])
            return tensors, {}, folder
    files = [folder / f"{stem}{end}" for stem in WEIGHT_FILES for end in (".safetensors", ".bin")]
    files = [file for file in files if file.is_file()] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise TimError(f"{folder}: found a folder without weights, expected model.safetensors or another of Hugging Face's layout in it")
    return (*open_state_dict(files[0], header), folder)


def _read_beside(parts: Parts, folder: Path, own_folder: bool) -> None:
    """What a text model or an autoencoder lacks of its own: config.json and the tokenizer in the same folder."""
    file = folder / "config.json"
    config = _json(file.read_bytes(), str(file)) if file.is_file() else {}
    kind = (config.get("text_config") or config).get("model_type")
    if TEXT_ENCODER in parts and parts.gemma_config is None and kind == "gemma3_text":
        parts.gemma_config = config
    if AUTOENCODER in parts and AUTOENCODER not in parts.records and "attention_head_dim" in config:
        parts.records[AUTOENCODER] = config
    if TEXT_ENCODER in parts and parts.tokenizer is None:
        for name in ("tokenizer.json", "tokenizer.model"):
            if (folder / name).is_file():
                parts.tokenizer = (folder / name).read_bytes()
                return


# Loading


def load_transformer(source, operations=torch.nn, attention=None, dtype=None, device="cpu", metadata=None, keep_projector=False):
    """TransitionTransformer from a file, a bundled name, Parts, or a state dict (wrapped or not).

    dtype None keeps the stored one. The REPA `projector.*` is dropped unless asked for; any other key too many or too few is a TimError.
    """
    from .attention import sdpa
    from .transformer import TransitionTransformer

    if isinstance(source, Mapping) and any(isinstance(value, (Tensor, Mapping)) for value in source.values()):
        flat = _flatten(source, "state dict")
        parts = _take_apart(flat, "state dict")
        if TRANSFORMER not in parts:
            raise TimError(f"state dict: found {guess(flat)}, expected a TiM transformer")
    else:
        parts = read_parts(source)
    tensors = parts.tensors(TRANSFORMER)
    if not keep_projector:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("projector.")}
    record = {**parts.record(TRANSFORMER), **(metadata or {})}
    config = Parts(parts.source, transformer=tensors, records={TRANSFORMER: record}).config(TRANSFORMER)
    dtype = dtype or _main_dtype(tensors)
    model = TransitionTransformer(config, operations, attention or sdpa, device="meta", dtype=dtype)
    return _fill(model, tensors, dtype, device, parts.source, TRANSFORMER)


def load_autoencoder(source, operations=torch.nn, dtype=None, device="cpu"):
    """Autoencoder from a file, a folder in diffusers' layout, a bundled name or Parts. Never float16: the deep stages overflow."""
    from .autoencoder import Autoencoder

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
    from .text_encoder import TextEncoder, Tokenizer

    parts = read_parts(source)
    tensors = parts.tensors(TEXT_ENCODER)
    if parts.tokenizer is None:
        raise TimError(f"{parts.source}: found no tokenizer in the file or beside it, expected tokenizer.json or tokenizer.model")
    tokenizer = Tokenizer.from_bytes(parts.tokenizer, f"{parts.source}: tokenizer")
    model = TextEncoder(parts.config(TEXT_ENCODER), tokenizer, parts.escape if escape is None else escape, device="meta")
    try:
        return model.load(_placed(tensors, dtype or _main_dtype(tensors), device)).eval()
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
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    wrong = _listed("no", sorted(own.keys() - found.keys() - optional)) + _listed("unknown", sorted(found.keys() - own.keys()))
    wrong += _listed("another shape of", [key for key in own if key in found and own[key] != found[key]])
    if wrong:
        raise TimError(f"{source}: found {', '.join(wrong)}, expected the tensors of the {TITLES[part]} that its shapes describe")
    tensors = _placed(tensors, dtype, device)
    tensors |= {key: torch.zeros((), dtype=torch.int64, device=device) for key in optional - tensors.keys()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _listed(what: str, keys: list[str]) -> list[str]:
    return [f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")] if keys else []


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
        name = "tokenizer_json" if parts.tokenizer[:64].lstrip()[:1] == b"{" else "spiece_model"
        tensors[f"text_encoders.{name}"] = torch.frombuffer(bytearray(parts.tokenizer), dtype=torch.uint8)
    return _write(tensors, dst, _whole_record(parts, records, metadata or {}))


def convert(src, dst: str | Path, dtype=None) -> Path:
    """Any file of ours as safetensors: several parts in the one-file layout, a lone part under its official names; nothing is dropped."""
    parts = read_parts(src)
    there = [part for part in TITLES if part in parts]
    if len(there) > 1 or there == [TEXT_ENCODER]:  # a lone text model keeps its tokenizer with it
        return pack(parts, dst, dtype, keep_projector=True)
    records = {part: _record_of(parts, part, {}) for part in there}
    return _write(_cast(dict(parts.tensors(there[0])), dtype), dst, _whole_record(parts, records, {}))


def json_tensor(record: dict) -> Tensor:
    """A record as uint8, the form in which it survives every program that copies tensors only."""
    return torch.frombuffer(bytearray(json.dumps(record, sort_keys=True).encode("utf-8")), dtype=torch.uint8)


def _record_of(parts: Parts, part: str, extra: dict) -> dict:
    config = parts.config(part)
    if part == TEXT_ENCODER:
        return {**config, "escape_prompts": bool(extra.get("escape_prompts", parts.escape))}
    record = _shapeless(config)
    if part == TRANSFORMER:
        record["latent_factor"] = int(extra.get("latent_factor") or parts.latent_factor)
        if config.text_dim is not None:
            record["escape_prompts"] = bool(extra.get("escape_prompts", parts.escape))
    return record


def _whole_record(parts: Parts, records: dict[str, dict], extra: dict) -> dict:
    whole = {"format": FORMAT, **parts.metadata}
    whole |= records.get(TRANSFORMER, {})
    if AUTOENCODER in records:
        whole["scaling_factor"] = records[AUTOENCODER]["scaling_factor"]
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


def _write(tensors: StateDict, dst: str | Path, record: dict) -> Path:
    """Beside, then renamed: a reader never sees half a file."""
    from safetensors.torch import save_file

    dst = Path(dst).expanduser()
    if dst.is_dir():
        raise TimError(f"{dst}: found a folder, expected the name of a file to write")
    if dst.suffix != ".safetensors":
        raise TimError(f"{dst}: found the ending '{dst.suffix}', expected .safetensors")
    if not dst.parent.is_dir():
        raise TimError(f"{dst}: found no folder {dst.parent}, expected one to write into")
    half = None
    try:
        handle, half = tempfile.mkstemp(prefix=f".{dst.stem}-", suffix=".part", dir=dst.parent)
        os.close(handle)
        save_file(tensors, half, metadata={"format": "pt", "tim": json.dumps(record, sort_keys=True)})
        os.chmod(half, 0o666 & ~_umask())
        os.replace(half, dst)
    except Exception as error:
        # safetensors reports a full disk as its own SafetensorError
        raise TimError(f"{dst}: cannot be written ({_one_line(error)}), expected a writable place with room for it") from error
    finally:
        if half is not None and os.path.exists(half):
            os.remove(half)
    return dst


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Describing


@dataclass(frozen=True)
class PartDescription:
    """One part of a file; `parameters` leaves out the REPA projector, which is counted apart."""

    part: str
    title: str
    prefix: str
    architecture: object  # TransformerConfig, AutoencoderConfig, or a Gemma config (a dict; None where the file has none)
    tensors: int
    parameters: int
    projector_parameters: int
    dtypes: dict[str, int]  # name -> parameters


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

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}"]
        for part in self.parts:
            dtypes = ", ".join(part.dtypes)
            extra = f" (+ {part.projector_parameters:,} in the projector)" if part.projector_parameters else ""
            under = f" under {part.prefix}" if part.prefix else ""
            lines.append(f"  {part.title}: {part.parameters:,} parameters{extra}, {part.tensors} tensors, {dtypes}{under}")
            lines.append(f"    {_summary(part)}")
        if self.latent_factor:
            lines.append(f"  latent factor: {self.latent_factor}")
        if any(part.part == TEXT_ENCODER for part in self.parts):
            lines.append(f"  tokenizer: {'in the file or beside it' if self.tokenizer else 'none'}")
            lines.append(f"  prompts: {'unicode-escaped' if self.escape_prompts else 'as they are'}")
        for key, value in self.metadata.items():
            if key in ("training", "format"):
                lines.append(f"  {key}: {json.dumps(value, sort_keys=True)}")
        return "\n".join(lines)


def describe(path: str | Path) -> Description:
    """What a file (or folder, or bundled name) holds, read from its header where the format has one; a file of another model is described
    as such, TimError only if it cannot be opened."""
    place = resolve(path)
    try:
        parts = read_parts(path, header=True)
    except TimError:
        if place.is_dir():
            raise
        tensors, metadata = open_state_dict(place, header=True)
        if any(find(tensors, part) for part in TITLES):
            raise
        return Description(str(path), guess(tensors), (), None, None, False, metadata)
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
    )


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
    )


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
    if record.get("format", FORMAT) > FORMAT:
        raise TimError(f"{source}: found checkpoint format {record['format']}, expected {FORMAT}; a newer version of this package reads it")
    return record


def _json(data: bytes, name: str) -> dict:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise TimError(f"{name}: found no readable JSON ({_one_line(error)}), expected an object") from None
    if not isinstance(value, dict):
        raise TimError(f"{name}: found a JSON {type(value).__name__}, expected an object")
    return value


def _bytes(tensor: Tensor) -> bytes:
    return tensor.to(device="cpu", dtype=torch.uint8).numpy().tobytes()


def _one_line(error: Exception, limit: int | None = 160) -> str:
    return " ".join(str(error).split())[:limit]
