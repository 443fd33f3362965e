"""Recognises the parts of a TiM checkpoint, and other models, by their key names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .open import StateDict

TRANSFORMER, TEXT_ENCODER, AUTOENCODER = "transformer", "text_encoder", "autoencoder"
TITLES = {TRANSFORMER: "TiM transformer", TEXT_ENCODER: "Gemma-3 text model", AUTOENCODER: "DC-AE or SD VAE"}


@dataclass(frozen=True)
class Signature:
    """What tells a part: all `keys` are there, under one prefix. roots: beginnings of its names."""

    keys: tuple[str, ...]
    roots: tuple[str, ...] = ("",)


_KL_KEYS = ("decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight")  # Flux and SD3 lack the last two
_KL_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# A part is present if one of its signatures is.
SIGNATURES = {
    TRANSFORMER: (
        Signature(
            (
                "x_embedder.proj.weight",
                "t_embedder.mlp.0.weight",
                "blocks.0.attn.qkv.weight",
                "blocks.0.adaLN_modulation.fc1_g.weight",
                "final_layer.linear.weight",
            )
        ),
    ),
    TEXT_ENCODER: (
        Signature(
            ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.pre_feedforward_layernorm.weight", "norm.weight"),
            ("embed_tokens.", "layers.", "norm."),
        ),
    ),
    AUTOENCODER: (
        Signature(
            ("encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.norm_out.weight", "decoder.up_blocks.1.0.conv.weight"),
            ("encoder.", "decoder."),
        ),
        Signature(("encoder.down_blocks.0.resnets.0.conv1.weight", *_KL_KEYS), _KL_ROOTS),
        Signature(("encoder.down.0.block.0.conv1.weight", *_KL_KEYS), _KL_ROOTS),
    ),
}
BYTE_KEYS = ("config_json", "tokenizer_json", "spiece_model")

# Endings of the keys of a LoRA's two matrices, as PEFT, ComfyUI, kohya's scripts and diffusers write them.
LORA_DOWN = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight")
LORA_UP = ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight")
KL_AUTOENCODER = "a KL autoencoder"
# All of these keys, with or without one or two words before them.
FOREIGN_SIGNATURES = (
    (("input_blocks.0.0.weight", "label_emb.0.0.weight"), "an SDXL UNet-like state dict"),
    (("input_blocks.0.0.weight",), "a Stable Diffusion UNet-like state dict"),
    (("add_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"), "an SDXL UNet-like state dict (diffusers)"),
    (("mid_block.attentions.0.proj_in.weight",), "a Stable Diffusion UNet-like state dict (diffusers)"),
    (("double_blocks.0.img_attn.qkv.weight",), "a Flux-like transformer"),
    (("joint_blocks.0.x_block.attn.qkv.weight",), "an SD3-like transformer"),
    (("blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"), "a DiT- or SiT-like transformer"),
    (("transformer_blocks.0.attn1.to_q.weight",), "a diffusers transformer"),
    (("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"), KL_AUTOENCODER),
    (("encoder.down_blocks.0.resnets.0.conv1.weight",), f"{KL_AUTOENCODER} (diffusers)"),
    (("encoder.block.0.layer.0.SelfAttention.q.weight",), "a T5 text encoder"),
    (("text_model.encoder.layers.0.self_attn.q_proj.weight",), "a CLIP text encoder"),
    (("layers.0.self_attn.q_proj.weight", "embed_tokens.weight"), "a language model other than Gemma 3"),
)


def find_part(tensors: Mapping[str, Tensor], part: str) -> tuple[str, StateDict] | None:
    """Finds a part under any prefix (`model.`, `state_dict.`, `module.`, ...) -> its prefix and its tensors under their names without it.

    None if it is not there. Of a training checkpoint that holds the trained weights and their EMA, the EMA is taken, as in the official
    sampler.
    """
    if not (found := _prefixes(tensors, part)):
        return None
    best, *others = found
    roots, foreign = found[best].roots, tuple(prefix for prefix in others if prefix.startswith(best))
    return best, {
        key[len(best) :]: tensor
        for key, tensor in tensors.items()
        if key.startswith(best)
        and "." in key[len(best) :]  # others belong to no module: a step, a decay
        and key[len(best) :].startswith(roots)
        and key.rpartition(".")[2] not in BYTE_KEYS
        and not (foreign and key.startswith(foreign))
    }


def find_copies(tensors: Mapping[str, Tensor], part: str) -> list[str]:
    """The prefixes of equally good copies of a part, the one that `find_part` takes first; empty if there are none."""
    prefixes = list(_prefixes(tensors, part))
    equal = [prefix for prefix in prefixes if _kind_of_copy(prefix) == _kind_of_copy(prefixes[0])]
    return equal if len(equal) > 1 else []


def _prefixes(tensors: Mapping[str, Tensor], part: str) -> dict[str, Signature]:
    """The prefixes under which all keys of a part's signature are found, the best first, each with that signature."""
    found: dict[str, Signature] = {}
    for signature in SIGNATURES[part]:
        first, *others = signature.keys
        for prefix in (key[: -len(first)] for key in tensors if key == first or key.endswith("." + first)):
            if all(prefix + name in tensors for name in others):
                found.setdefault(prefix, signature)
    return dict(sorted(found.items(), key=lambda item: (_kind_of_copy(item[0]), len(item[0]), item[0])))


def _kind_of_copy(prefix: str) -> int:
    """0 for an EMA, 1 for other weights, 2 for an optimiser's moments, which have the names and shapes of the weights."""
    words = prefix.split(".")
    if any(word.startswith(("exp_avg", "optim", "momentum")) for word in words):
        return 2
    return 0 if any("ema" in word.split("_") for word in words) else 1


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA of any model."""
    endings = tuple(f".{name}" for name in (*LORA_DOWN, *LORA_UP))
    return any(key.endswith(endings) for key in keys)


def other_model(names: Iterable[str]) -> str | None:
    """Names another model by its key names; None if they are of none that is known."""
    names = set(names)
    suffixes = {key.partition(".")[2] for key in names} | {key.split(".", 2)[-1] for key in names} | names
    return next((title for keys, title in FOREIGN_SIGNATURES if all(key in suffixes for key in keys)), None)


def describe_unknown(tensors: Mapping[str, Tensor]) -> str:
    """Names the kind of a state dict that holds no part of a TiM checkpoint."""
    names = set(tensors)
    if any(key.startswith("optimizers.state") for key in names):
        title = "the state of a training run, for resuming only"
    elif is_lora(names):
        title = "a LoRA"
    else:
        title = other_model(names) or "an unknown state dict"
        if title.startswith(KL_AUTOENCODER):
            widths = [t.shape[1] for key, t in tensors.items() if f".{key}".endswith(".decoder.conv_in.weight") and t.ndim == 4]
            title += f" with {widths[0]} latent channels" if widths else ""
    shown = ", ".join(list(tensors)[:3])
    return f"{title} ({len(tensors)} tensors" + (f", first keys {shown})" if shown else ")")
