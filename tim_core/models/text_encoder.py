"""Encodes prompts with Gemma 3: the last hidden state over 256 positions, as in the official pipeline.

A prompt is <bos>, its tokens, and padding on the right, without a chat template. The attention output of pad rows is zero, as in the
official encoder, which runs with flash-attention; so all pad rows are equal.
"""

import copy
import hashlib
import json
import logging
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TimError, one_line, printable, state_dict_mismatch
from ..files import digest, is_file

MAX_LENGTH = 256  # tokens of a prompt, <bos> included
MIN_TRANSFORMERS = (4, 50)
MOST_TOKENIZER = 2**28  # bytes; those of Gemma 3 have 33 MB
WORD_START = "\u2581"  # precedes a word in Gemma's vocabulary
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference


KINDS = ("sliding_attention", "full_attention")
WHOLE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "num_key_value_heads",
         "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "max_position_embeddings")  # values of a Gemma config
RANGES = {"rms_norm_eps": (1e-12, 1e-2), "query_pre_attn_scalar": (1e-3, 1e6), "attn_logit_softcapping": (1e-3, 1e6),
          "attention_dropout": (0, 1), "rope_theta": (1e-3, 1e9), "rope_local_base_freq": (1e-3, 1e9)}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
MOST_LAYERS = 1000
MOST_GROWTH = 100  # times that a tokenizer's normaliser may lengthen a text; Gemma's keeps its length
MOST_SHOWN = 10  # unknown words in a line


class Tokenizer:
    """Gemma's tokenizer without transformers: text -> <bos> and at most 255 ids, padded on the right to 256."""

    def __init__(self, encode, data: bytes, pad_id: int = 0, bos_id: int = 2, name: str = "tokenizer", spelled=None, words=()):
        """encode: a list of texts -> lists of ids without special tokens. data: the bytes of the tokenizer's file; name: of the file.

        words: all words of a tokenizer that spells every other word in bytes; spelled: a text -> those of its words.
        """
        self._encode, self.data, self.pad_id, self.bos_id, self.name = encode, data, pad_id, bos_id, name
        self._spelled, self.words = spelled, tuple(words)

    @classmethod
    def from_json(cls, data: bytes, name: str = "tokenizer.json") -> "Tokenizer":
        """From the bytes of a tokenizer.json. TimError naming the file if they are damaged."""
        import tokenizers

        if re.search(rb'"type"\s*:\s*"Precompiled"', data):  # where it is damaged, the library prints pages before it raises
            raise TimError(f"{name}: not Gemma 3's tokenizer (it has a Precompiled normaliser); use the tokenizer.json of Gemma 3")
        with _rust_errors(f"{name}: not a valid tokenizer.json"):
            model = tokenizers.Tokenizer.from_str(bytes(data).decode("utf-8"))
        growth = _growth(json.loads(model.normalizer.__getstate__())) if model.normalizer is not None else 1
        if growth > MOST_GROWTH:
            raise TimError(f"{name}: its normaliser makes text up to {growth} times as long; use the tokenizer.json of Gemma 3")
        model.no_padding()
        model.no_truncation()
        ids = {token: model.token_to_id(token) for token in ("<pad>", "<bos>")}
        closed = re.search(rb'"merges"\s*:\s*\[\s*\]', data)  # without merges a word has its own token, or one for each byte
        words = sorted(token[1:] for token in model.get_vocab() if token[:1] == WORD_START and token[1:]) if closed else ()
        return cls(
            lambda texts: [e.ids for e in model.encode_batch(texts, add_special_tokens=False)],
            bytes(data),
            pad_id=0 if ids["<pad>"] is None else ids["<pad>"],
            bos_id=2 if ids["<bos>"] is None else ids["<bos>"],
            name=name,
            spelled=lambda text: _spelled_words(model, text),
            words=words,
        )

    @classmethod
    def from_sentencepiece(cls, data: bytes, name: str = "tokenizer.model") -> "Tokenizer":
        """From the bytes of a SentencePiece tokenizer.model. TimError if they are damaged, or sentencepiece is not installed."""
        try:
            import sentencepiece
        except ImportError:
            raise TimError(f"{name}: sentencepiece is not installed; run: pip install sentencepiece") from None
        try:
            model = sentencepiece.SentencePieceProcessor()
            model.LoadFromSerializedProto(bytes(data))
        except Exception as error:
            raise TimError(f"{name}: not a valid SentencePiece model ({one_line(error)})") from None
        return cls(
            lambda texts: [model.encode(text) for text in texts],
            bytes(data),
            pad_id=model.pad_id() if model.pad_id() >= 0 else 0,
            bos_id=model.bos_id() if model.bos_id() >= 0 else 2,
            name=name,
        )

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer") -> "Tokenizer":
        """From the bytes of either file; its first character tells which."""
        return (cls.from_json if is_json(data) else cls.from_sentencepiece)(data, name)

    @property
    def is_json(self) -> bool:
        """Whether it was read from a tokenizer.json, not from a SentencePiece model."""
        return is_json(self.data)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the tokenizer spells in bytes, if it has a closed list of words; else none."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        with _rust_errors(f"{self.name}: cannot encode text"):
            return self._spelled(text) if self.words else []

    def __deepcopy__(self, memo) -> "Tokenizer":
        return self  # immutable

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, 256) int64, mask (B, 256) bool, true on <bos> and text."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TimError(f"prompt: {prompt!r} is {type(prompt).__name__}, not text")
        texts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]  # lone surrogates become ?
        ids = torch.full((len(prompts), MAX_LENGTH), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(prompts), MAX_LENGTH, dtype=torch.bool)
        with _rust_errors(f"{self.name}: cannot encode text"):
            encoded = self._encode(texts)
        for row, tokens in enumerate(encoded):
            if len(tokens) >= MAX_LENGTH:
                start = printable(texts[row][:40])
                logging.warning(f"prompt: has {len(tokens)} tokens; only the first {MAX_LENGTH - 1} are used: {start}...")
            tokens = [self.bos_id, *tokens[: MAX_LENGTH - 1]]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask


def _spelled_words(model, text: str) -> list[str]:
    """The words of a text of which `model`, a tokenizers.Tokenizer, makes byte tokens; each once, in their order."""
    encoding = model.encode(text, add_special_tokens=False)
    places: dict[int, tuple[int, int]] = {}
    for token, word, (start, end) in zip(encoding.tokens, encoding.word_ids, encoding.offsets):
        if BYTE_TOKEN.fullmatch(token):
            first, last = places.get(word, (start, end))
            places[word] = min(first, start), max(last, end)
    return list(dict.fromkeys(text[start:end].strip() for start, end in places.values()))


def _growth(normaliser: dict) -> int:
    """By how much the replacements of a tokenizers normaliser, in its JSON form, may lengthen a text."""
    if normaliser.get("type") == "Sequence":
        return math.prod(map(_growth, normaliser["normalizers"]))
    return max(1, len(normaliser.get("content", "")), len(normaliser.get("prepend", "")))


@contextmanager
def _rust_errors(message: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into a TimError: bare Exceptions, and PanicException, which is not an Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TimError(f"{message} ({one_line(error)})") from None


def is_json(data: bytes) -> bool:
    """Whether the bytes of a tokenizer are a tokenizer.json, not a SentencePiece model."""
    return bytes(data[:64]).lstrip()[:1] == b"{"


def tokenizer_file(folder: str | Path) -> Path | None:
    """The tokenizer of a folder in Hugging Face layout, None if there is none. TimError if it is not a regular file."""
    return next((file for name in TOKENIZER_FILES if is_file(file := Path(folder) / name)), None)


@dataclass(frozen=True)
class Features:
    """rows (B, 256, D): last hidden states; from `lengths[b]` on, all rows are the pad row."""

    rows: Tensor
    lengths: list[int]


class TextEncoder(nn.Module):
    """transformers' Gemma3TextModel as `.transformer`, with padding as in the official pipeline.

    escape: unicode-escape prompts, as in the training of the released weights (`é` becomes the four characters `\\xe9`).
    device="meta" allocates nothing; `load` then takes over the tensors it is given.
    """

    damaged_weight: str | None = None  # set by loaders, see tim_core.finite

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
        """Moves and casts weights. Rotary frequencies and the embedding scale stay float32; transformers rounds them at use."""
        buffers = {name: buffer for name, buffer in self.transformer.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            _set_buffer(self.transformer, name, buffer.to(self.device))
        self._round_embed_scale()
        return self

    def _round_embed_scale(self) -> None:
        """Rounds the embedding scale of transformers 4.50, a plain number, to the dtype of the weights, as later versions do."""
        embed = self.transformer.embed_tokens
        if "embed_scale" not in embed._buffers:
            embed.embed_scale = torch.tensor(self.width**0.5).to(self.dtype).item()

    def fingerprint(self) -> str:
        """sha256 of all that features depend on: weights in their dtype, settings, tokenizer."""
        settings = (json.dumps(self.gemma_config, sort_keys=True), self.escape, hashlib.sha256(self.tokenizer.data).hexdigest())
        return hashlib.sha256(f"{digest(self.transformer.state_dict().items())} {settings}".encode()).hexdigest()

    def load(self, state_dict: dict, dtype=None) -> "TextEncoder":
        """Takes over the tensors of `state_dict` (names of Gemma3TextModel). TimError unless every name and shape agrees."""
        if wrong := state_dict_mismatch(self.transformer.state_dict(), state_dict):
            raise TimError(text_mismatch(wrong))
        tensors = {name: value if dtype is None else value.to(dtype) for name, value in state_dict.items()}
        self.transformer.load_state_dict(tensors, assign=True)
        self._round_embed_scale()
        return self

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, 256), mask (B, 256) on the CPU; escapes prompts if `escape` is set. TimError for ids that the model does not have."""
        if self.escape:
            prompts = [p.encode("unicode-escape").decode("utf-8") if isinstance(p, str) else p for p in prompts]
        ids, mask = self.tokenizer(prompts)
        check_ids(ids, self.tokenizer, self.gemma_config["vocab_size"])
        return ids, mask

    def unknown_words(self, prompts: Iterable[str], mentioned: Container[str] = ()) -> tuple[list[str], str]:
        """The words of prompts that the model does not know, except those mentioned before; and a line that names them."""
        found = dict.fromkeys(word for prompt in prompts for word in self.tokenizer.unknown_words(prompt) if word not in mentioned)
        shown = ", ".join([*found][:MOST_SHOWN]) + (f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else "")
        return [*found], printable(f"prompt: this model does not know {shown}; it knows only: {' '.join(self.tokenizer.words)}")

    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), T <= 256, padded on the right -> last hidden states (B, T, D). Differentiable."""
        self._text_rows.mask = mask.to(device=ids.device, dtype=self.dtype)[..., None]
        # Attention is causal, so text does not see the padding behind it: no padding mask is needed.
        return self.transformer(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Features:
        """The 256 rows of each prompt. Computes the longest text and one pad row: pad rows depend on neither position nor prompt."""
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
        """-> cond, null (B, L, D), L being the longest text of prompts and negatives. One negative may serve all prompts."""
        prompts = list(prompts)
        negatives = list(negatives or [""])
        if len(negatives) == 1:
            negatives *= len(prompts)
        if not prompts or len(negatives) != len(prompts):
            raise TimError(f"negative prompts: {len(negatives)} for {len(prompts)} prompts; give one, or one per prompt")
        features = self.encode(prompts + negatives)
        rows = features.rows[:, : max(features.lengths)]
        return rows[: len(prompts)], rows[len(prompts) :]


def text_mismatch(wrong: str) -> str:
    """The error for tensors that are not those of a text model's config; wrong: how they differ."""
    return f"text encoder: tensors do not match config.json: {wrong}; download both again"


def check_ids(ids: Tensor, tokenizer: Tokenizer, vocab_size: int) -> None:
    """TimError for a token id that a text model of this vocabulary does not have."""
    if ids.numel() and (largest := int(ids.max())) >= vocab_size:
        raise TimError(f"{tokenizer.name}: gives token {largest}, the text model has {vocab_size}; use the tokenizer of this model")


class _TextRows:
    """Forward pre-hook of every o_proj that zeroes the attention of pad rows. mask: (B, T, 1), of the current call."""

    mask: Tensor | None = None

    def __call__(self, module, args):
        return (args[0] * self.mask, *args[1:])


def normalise_config(config: dict) -> dict:
    """A Gemma-3 text config with both spellings of its rotary fields, so that every supported transformers builds the same model.

    Old: rope_theta, rope_local_base_freq, rope_scaling, sliding_window_pattern. New: rope_parameters, layer_types; these win. TimError
    if it is not a Gemma-3 text config.
    """
    config = config.get("text_config") or config
    if not isinstance(config, Mapping):
        raise TimError(f"text encoder config: text_config is {config!r}; it must be an object")
    config = copy.deepcopy(dict(config))
    if config.get("model_type", "gemma3_text") != "gemma3_text":
        raise TimError(f"text encoder config: model_type is {config['model_type']!r}; it must be gemma3_text")
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim") if k not in config]
    if missing:
        raise TimError(f"text encoder config: {', '.join(missing)} missing; use the config.json of a Gemma-3 text model")
    _check_values(config)

    layers = config["num_hidden_layers"]
    pattern = config.pop("_sliding_window_pattern", None)
    pattern = config.pop("sliding_window_pattern", None) or pattern or 6
    kinds = config.get("layer_types") or ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers or not all(kind in KINDS for kind in kinds):
        wanted = f"one of {', '.join(KINDS)} for each layer (num_hidden_layers is {layers})"
        raise TimError(f"text encoder config: layer_types is {kinds!r}; it must name {wanted}")
    config["layer_types"] = list(kinds)
    config["sliding_window_pattern"] = kinds.index("full_attention") + 1 if "full_attention" in kinds else layers + 1

    rope = _rope(config)
    full = {"rope_type": "default", "rope_theta": config.get("rope_theta") or 1e6}
    full.update(rope.get("full_attention") or config.get("rope_scaling") or {})
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


def gemma_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a Gemma3TextModel's weights, from its config; needs no transformers."""
    hidden, head, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    inner, groups = config.get("intermediate_size", 9216), config.get("num_key_value_heads", 4)  # Gemma3TextConfig's defaults
    linear: dict[str, tuple[int, ...]]
    linear = {f"self_attn.{name}_proj": (rows * head, hidden) for name, rows in (("q", heads), ("k", groups), ("v", groups))}
    linear["self_attn.o_proj"] = (hidden, heads * head)
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    if config.get("attention_bias"):
        layer |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner)}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    layer |= {f"{name}.weight": (hidden,) for name in norms}
    layers = {f"layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()}
    return {"embed_tokens.weight": (config["vocab_size"], hidden), **layers, "norm.weight": (hidden,)}


def _check_values(config: dict) -> None:
    """TimError naming the first value of a Gemma-3 text config from which no model can be built, or none that computes."""
    for name in WHOLE:
        value = config.get(name)
        most = MOST_LAYERS if name == "num_hidden_layers" else 2**31
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise TimError(f"text encoder config: {name} is {value!r}; it must be a whole number from 1 to {most}")
    if config["num_attention_heads"] % (config.get("num_key_value_heads") or 1):
        heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
        raise TimError(f"text encoder config: num_key_value_heads is {shared}; it must divide num_attention_heads, {heads}")
    for name, (least, most) in RANGES.items():
        if config.get(name) is not None:
            _check_number(name, config[name], least, most)
    for name in ("pad_token_id", "bos_token_id"):
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < config["vocab_size"]):
            raise TimError(f"text encoder config: {name} is {value!r}; it must be a token from 0 to {config['vocab_size'] - 1}")
    if config.get("use_bidirectional_attention"):
        raise TimError("text encoder config: use_bidirectional_attention is set; only causal text models are supported")


def _rope(config: dict) -> dict:
    """The rope_parameters of a Gemma-3 text config, by kind of layer. TimError naming a rotary setting that cannot be used."""
    rope = config.get("rope_parameters")
    rope = {} if rope is None else rope
    objects = {"rope_parameters": rope, "rope_scaling": config.get("rope_scaling")}
    if isinstance(rope, Mapping):
        objects |= {f"rope_parameters.{kind}": rope.get(kind) for kind in KINDS}
    for name, value in objects.items():
        if value is not None and not isinstance(value, Mapping):
            raise TimError(f"text encoder config: {name} is {value!r}; it must be an object")
        if isinstance(value, Mapping) and value.get("rope_type", "default") not in ROPE_TYPES:
            raise TimError(f"text encoder config: {name}.rope_type is {value['rope_type']!r}; use {', '.join(ROPE_TYPES)}")
        for key, number in (value or {}).items():
            if isinstance(number, (int, float)) or key in ("rope_theta", "factor"):
                _check_number(f"{name}.{key}", number, 1e-3, 1e9)
    return rope


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise TimError(f"text encoder config: {name} is {value!r}; it must be a number from {least:g} to {most:g}")


def _build(config: dict, device: torch.device) -> nn.Module:
    """Gemma3TextModel with SDPA. On the meta device its constants (rotary tables, embedding scale) are real all the same."""
    Config, Model = _gemma_classes()
    from transformers.activations import ACT2FN

    arguments = copy.deepcopy(config)
    activation = arguments.get("hidden_activation")
    if activation is not None and (not isinstance(activation, str) or activation not in ACT2FN):
        raise TimError(f"text encoder config: hidden_activation is {activation!r}; use that of Gemma 3, gelu_pytorch_tanh")
    kinds = arguments["layer_types"]
    with device, _quiet_transformers():
        model = Model(Config(**arguments, attn_implementation="sdpa"))
    sliding = [bool(layer.self_attn.is_sliding) for layer in model.layers]
    if sliding != [kind == "sliding_attention" for kind in kinds]:
        raise TimError(
            f'text encoder: this version of transformers cannot build the layer order {kinds}; run: pip install -U "transformers>=5"'
        )
    if device.type == "meta":
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RotaryEmbedding"):
                _set_module(model, name, type(module)(module.config))
        if "embed_scale" in model.embed_tokens._buffers:
            model.embed_tokens.embed_scale = torch.tensor(float(config["hidden_size"]) ** 0.5)
        left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
        if left:
            raise TimError(f"text encoder: this version of transformers is not supported (unknown buffer '{left[0]}'); install 4.50 to 5.x")
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides what transformers logs about a config; what matters is checked here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _gemma_classes():
    """The config and model class of transformers. TimError with the pip command if it is missing or too old."""
    wanted = ".".join(map(str, MIN_TRANSFORMERS))
    pip = f'pip install -U "transformers>={wanted}"'
    try:
        import transformers
    except ImportError:
        raise TimError(f"text encoder: transformers is not installed; run: {pip}") from None
    version = str(getattr(transformers, "__version__", "0"))
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if numbers < MIN_TRANSFORMERS:
        raise TimError(f"text encoder: transformers {version} is too old; run: {pip}")
    from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    return Gemma3TextConfig, Gemma3TextModel


def _set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _set_buffer(root: nn.Module, name: str, buffer: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._buffers[leaf] = buffer
