"""Gemma-3 text models: their configs, the names and shapes of their weights, and transformers' module for them."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TimError

MIN_TRANSFORMERS = (4, 50)
KINDS = ("sliding_attention", "full_attention")
WHOLE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "num_key_value_heads",
         "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "max_position_embeddings")  # values of a Gemma config
RANGES = {"rms_norm_eps": (1e-12, 1e-2), "query_pre_attn_scalar": (1e-3, 1e6), "attn_logit_softcapping": (1e-3, 1e6),
          "attention_dropout": (0, 1), "rope_theta": (1e-3, 1e9), "rope_local_base_freq": (1e-3, 1e9)}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
MOST_LAYERS = 1000
GEMMA_1B_WIDTH = 1152


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


def gemma_1b_config(tensors: Mapping[str, Tensor]) -> dict:
    """The config of a Gemma 3 1B, the one size that shapes identify for certain. TimError for another width."""
    vocab, hidden = tensors["embed_tokens.weight"].shape
    if hidden != GEMMA_1B_WIDTH:
        raise TimError(f"the Gemma-3 text model of width {hidden} needs its config.json in the same folder")
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


def check_gemma(config: dict, tensors: Mapping[str, Tensor]) -> None:
    """TimError unless the counts and widths of a Gemma config are those of the tensors: no model is built that they could not fill."""
    vocab, hidden = tensors["embed_tokens.weight"].shape
    head_dim = tensors["layers.0.self_attn.q_norm.weight"].shape[0]
    layers = len({key.split(".")[1] for key in tensors if key.startswith("layers.")})
    found = {"num_hidden_layers": layers, "vocab_size": vocab, "hidden_size": hidden, "head_dim": head_dim}
    rows = {"num_attention_heads": ("self_attn.q_proj", head_dim), "num_key_value_heads": ("self_attn.k_proj", head_dim),
            "intermediate_size": ("mlp.gate_proj", 1)}
    for name, (module, width) in rows.items():
        if (weight := tensors.get(f"layers.0.{module}.weight")) is not None:
            found[name] = weight.shape[0] // max(width, 1)
    for name, value in found.items():
        if config.get(name) is not None and config[name] != value:
            raise TimError(f"text encoder config: {name} is {config[name]}, the tensors have {value}; use the config.json of these weights")


def text_mismatch(wrong: str) -> str:
    """The error for tensors that are not those of a text model's config; wrong: how they differ."""
    return f"text encoder: tensors do not match config.json: {wrong}; download both again"


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


def build_gemma(config: dict, device: torch.device) -> nn.Module:
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
