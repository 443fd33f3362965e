"""Prompts to Gemma-3 features: the last hidden state over 256 positions, as the official pipeline feeds it to the network.

No chat template; <bos>, the text, then padding on the right. Pad rows see no attention (the official encoder runs with
flash-attention, which removes them before attention and puts zeros back), so they are all one constant vector.
"""

import copy
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import TimError, one_line, state_dict_mismatch
from ..files import digest

MAX_LENGTH = 256  # tokens of a prompt, <bos> included
MIN_TRANSFORMERS = (4, 50)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first of them that is there


class Tokenizer:
    """Gemma's tokenizer without transformers: text -> <bos> and at most 255 ids, right padded to 256."""

    def __init__(self, encode, data: bytes, pad_id: int = 0, bos_id: int = 2):
        """`encode(list of texts) -> lists of ids` without special tokens; `data` is the file it was made from."""
        self._encode, self.data, self.pad_id, self.bos_id = encode, data, pad_id, bos_id

    @classmethod
    def from_json(cls, data: bytes, name: str = "tokenizer.json") -> "Tokenizer":
        """From the bytes of a tokenizer.json; TimError if they are none."""
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(bytes(data).decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise TimError(f"{name}: found no readable tokenizer ({one_line(error)}), expected a tokenizer.json") from None
        model.no_padding()
        model.no_truncation()
        ids = {token: model.token_to_id(token) for token in ("<pad>", "<bos>")}
        return cls(
            lambda texts: [e.ids for e in model.encode_batch(texts, add_special_tokens=False)],
            bytes(data),
            pad_id=0 if ids["<pad>"] is None else ids["<pad>"],
            bos_id=2 if ids["<bos>"] is None else ids["<bos>"],
        )

    @classmethod
    def from_sentencepiece(cls, data: bytes, name: str = "tokenizer.model") -> "Tokenizer":
        """From the bytes of a SentencePiece tokenizer.model; needs the sentencepiece package."""
        try:
            import sentencepiece
        except ImportError:
            raise TimError(f'{name}: reading it needs the sentencepiece package: pip install "sentencepiece"') from None
        try:
            model = sentencepiece.SentencePieceProcessor()
            model.LoadFromSerializedProto(bytes(data))
        except Exception as error:
            raise TimError(f"{name}: found no readable tokenizer ({one_line(error)}), expected a SentencePiece model") from None
        return cls(
            lambda texts: [model.encode(text) for text in texts],
            bytes(data),
            pad_id=model.pad_id() if model.pad_id() >= 0 else 0,
            bos_id=model.bos_id() if model.bos_id() >= 0 else 2,
        )

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer") -> "Tokenizer":
        """Either kind of file, told apart by its first character."""
        return (cls.from_json if is_json(data) else cls.from_sentencepiece)(data, name)

    @property
    def is_json(self) -> bool:
        return is_json(self.data)

    def __deepcopy__(self, memo) -> "Tokenizer":
        return self  # immutable

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, 256) int64, mask (B, 256) bool, true on <bos> and text."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TimError(f"prompt: found {type(prompt).__name__}, expected text")
        texts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]  # lone surrogates become ?
        ids = torch.full((len(prompts), MAX_LENGTH), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(prompts), MAX_LENGTH, dtype=torch.bool)
        for row, tokens in enumerate(self._encode(texts)):
            if len(tokens) >= MAX_LENGTH:
                logging.warning(f"prompt: found {len(tokens)} tokens, of which the first {MAX_LENGTH - 1} are read: {texts[row][:40]}...")
            tokens = [self.bos_id, *tokens[: MAX_LENGTH - 1]]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask


def is_json(data: bytes) -> bool:
    """Whether the bytes of a tokenizer are a tokenizer.json; SentencePiece's otherwise."""
    return bytes(data[:64]).lstrip()[:1] == b"{"


def tokenizer_file(folder: str | Path) -> Path | None:
    """The tokenizer in a folder in Hugging Face layout, None if there is none."""
    return next((file for name in TOKENIZER_FILES if (file := Path(folder) / name).is_file()), None)


@dataclass(frozen=True)
class Features:
    """rows (B, 256, D): last hidden states, the rows from `lengths[b]` on being the constant pad row."""

    rows: Tensor
    lengths: list[int]


class TextEncoder(nn.Module):
    """transformers' Gemma3TextModel as `.transformer`, with the official meaning of padding.

    `escape` writes prompts as the released weights saw them in training (`é` is the four characters `\\xe9`).
    With device="meta" nothing is allocated: `load` then takes over the tensors it is given.
    """

    def __init__(self, gemma_config: dict, tokenizer: Tokenizer, escape: bool = False, dtype=None, device=None):
        super().__init__()
        self.gemma_config = normalise_config(gemma_config)
        self.tokenizer = tokenizer
        self.escape = bool(escape)
        self.transformer = _build(self.gemma_config, torch.device(device or "cpu"))
        self._text_rows = _TextRows()
        for layer in self.transformer.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(self._text_rows)
        if dtype is not None:
            self.to(dtype)

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.gemma_config["hidden_size"]

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.embed_tokens.weight.device

    def _apply(self, fn, recurse=True):
        """Moves and casts, but rotary frequencies and the embedding scale stay float32: transformers rounds them itself, at use."""
        exact = {name: buffer for name, buffer in self.transformer.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            _set_buffer(self.transformer, name, buffer.to(self.device))
        self._round_embed_scale()
        return self

    def _round_embed_scale(self) -> None:
        """transformers 4.50 keeps the embedding scale as a plain number; later versions round it to the weights' dtype, and so do we."""
        embed = self.transformer.embed_tokens
        if "embed_scale" not in embed._buffers:
            embed.embed_scale = torch.tensor(self.width**0.5).to(self.dtype).item()

    def fingerprint(self) -> str:
        """A text that tells what this encoder makes of prompts from what another does: weights as they are here, settings, tokenizer."""
        settings = (json.dumps(self.gemma_config, sort_keys=True), self.escape, hashlib.sha256(self.tokenizer.data).hexdigest())
        return hashlib.sha256(f"{digest(self.transformer.state_dict().items())} {settings}".encode()).hexdigest()

    def load(self, state_dict: dict, dtype=None) -> "TextEncoder":
        """Takes over the tensors of `state_dict` (names of Gemma3TextModel); TimError unless every key and shape agrees."""
        if wrong := state_dict_mismatch(self.transformer.state_dict(), state_dict):
            raise TimError(f"text encoder: found {wrong}, expected the tensors of the Gemma-3 text model its config describes")
        tensors = {name: value if dtype is None else value.to(dtype) for name, value in state_dict.items()}
        self.transformer.load_state_dict(tensors, assign=True)
        self._round_embed_scale()
        return self

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, 256), mask (B, 256) on the CPU; escapes first if this encoder does."""
        if self.escape:
            prompts = [p.encode("unicode-escape").decode("utf-8") if isinstance(p, str) else p for p in prompts]
        return self.tokenizer(prompts)

    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), T <= 256, padded on the right -> last hidden states (B, T, D). Differentiable."""
        self._text_rows.mask = mask.to(device=ids.device, dtype=self.dtype)[..., None]
        # Causal attention alone keeps text from seeing the padding behind it, so no padding mask is needed.
        return self.transformer(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Features:
        """Each prompt's 256 rows. Only the longest text and one pad row are computed: pad rows do not depend on position or prompt."""
        unique = list(dict.fromkeys(prompts))
        ids, mask = self.tokenize(unique)
        lengths = mask.sum(1).tolist()
        length = min(max(lengths) + 1, MAX_LENGTH)
        rows = self.encode_ids(ids[:, :length].to(self.device), mask[:, :length].to(self.device))
        rows = torch.cat([rows, rows[:, -1:].expand(-1, MAX_LENGTH - length, -1)], dim=1)
        order = [unique.index(prompt) for prompt in prompts]
        return Features(rows[order], [lengths[i] for i in order])

    @torch.no_grad()
    def conditioning(self, prompts: list[str], negatives: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """-> cond, null (B, L, D), both cut to L = the longest text of prompts and negatives; one negative serves all prompts."""
        prompts = list(prompts)
        negatives = list(negatives or [""])
        if len(negatives) == 1:
            negatives *= len(prompts)
        if not prompts or len(negatives) != len(prompts):
            raise TimError(f"negative prompts: found {len(negatives)} for {len(prompts)} prompts, expected one, or one for each prompt")
        features = self.encode(prompts + negatives)
        rows = features.rows[:, : max(features.lengths)]
        return rows[: len(prompts)], rows[len(prompts) :]


class _TextRows:
    """Forward pre-hook of every o_proj: zeroes the attention of pad rows. `mask` (B, T, 1) belongs to the call in progress."""

    mask: Tensor | None = None

    def __call__(self, module, args):
        return (args[0] * self.mask, *args[1:])


def normalise_config(config: dict) -> dict:
    """A Gemma-3 text config in both spellings of its rotary fields, so that every supported transformers reads the same model.

    Old: rope_theta, rope_local_base_freq, rope_scaling, sliding_window_pattern. New: rope_parameters, layer_types.
    Where a config holds both, the new one wins. TimError if it is no Gemma-3 text config.
    """
    config = copy.deepcopy(dict(config.get("text_config") or config))
    if config.get("model_type", "gemma3_text") != "gemma3_text":
        raise TimError(f"text encoder config: found model_type {config['model_type']}, expected gemma3_text")
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim") if k not in config]
    if missing:
        raise TimError(f"text encoder config: found no {', '.join(missing)}, expected the config.json of a Gemma-3 text model")

    layers = config["num_hidden_layers"]
    pattern = config.pop("_sliding_window_pattern", None)
    pattern = config.pop("sliding_window_pattern", None) or pattern or 6
    kinds = config.get("layer_types") or ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    config["layer_types"] = list(kinds)
    config["sliding_window_pattern"] = kinds.index("full_attention") + 1 if "full_attention" in kinds else layers + 1

    rope = config.get("rope_parameters") or {}
    full = {"rope_type": "default", "rope_theta": config.get("rope_theta") or 1e6, **(config.get("rope_scaling") or {})}
    full.update(rope.get("full_attention") or {})
    local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq") or 1e4}
    local.update(rope.get("sliding_attention") or {})
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    config["rope_theta"], config["rope_local_base_freq"] = full["rope_theta"], local["rope_theta"]
    scaling = {k: v for k, v in full.items() if k != "rope_theta"}
    config["rope_scaling"] = None if full["rope_type"] == "default" else scaling
    for key in ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type"):
        config.pop(key, None)
    config.setdefault("pad_token_id", 0)
    config.setdefault("bos_token_id", 2)
    return config


def _build(config: dict, device: torch.device) -> nn.Module:
    """Gemma3TextModel with SDPA; on the meta device only its small constants (rotary tables, embedding scale) are real."""
    Config, Model = _gemma_classes()
    arguments = copy.deepcopy(config)
    kinds = arguments["layer_types"]
    with device:
        model = Model(Config(**arguments, attn_implementation="sdpa"))
    sliding = [bool(layer.self_attn.is_sliding) for layer in model.layers]
    if sliding != [kind == "sliding_attention" for kind in kinds]:
        raise TimError(
            f'text encoder: this transformers cannot build the layer order {kinds}, expected a newer one: pip install -U "transformers>=5"'
        )
    if device.type == "meta":
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RotaryEmbedding"):
                _set_module(model, name, type(module)(module.config))
        if "embed_scale" in model.embed_tokens._buffers:
            model.embed_tokens.embed_scale = torch.tensor(float(config["hidden_size"]) ** 0.5)
        left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        if left:
            raise TimError(f"text encoder: this transformers keeps a table we do not know ({left[0]}), expected 4.50 to 5.x")
    return model


def _gemma_classes():
    """transformers' config and model class; TimError with the pip line if transformers is absent or too old."""
    wanted = ".".join(map(str, MIN_TRANSFORMERS))
    pip = f'pip install -U "transformers>={wanted}"'
    try:
        import transformers
    except ImportError:
        raise TimError(f"text encoder: transformers is not installed, expected {wanted} or newer: {pip}") from None
    version = str(getattr(transformers, "__version__", "0"))
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if numbers < MIN_TRANSFORMERS:
        raise TimError(f"text encoder: found transformers {version}, expected {wanted} or newer: {pip}")
    from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    return Gemma3TextConfig, Gemma3TextModel


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _set_buffer(root: nn.Module, name: str, buffer: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._buffers[leaf] = buffer
