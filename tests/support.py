"""What several test files need and the package does not."""

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tim_core.models.config import TransformerConfig
from tim_core.weights.load import load_autoencoder, load_text_encoder, load_transformer
from tim_core.weights.parts import AUTOENCODER, TEXT_ENCODER
from tim_core.weights.read import read_parts


def mentions(text: str, *parts: object) -> bool:
    """Whether the text holds these parts in this order, words as whole words and in any case: the thing, its value, the advice."""
    pattern = ".*?".join(rf"(?<!\w){re.escape(str(part))}(?!\w)" for part in parts)
    return re.search(pattern, text, re.IGNORECASE | re.DOTALL) is not None


def load_all(source) -> SimpleNamespace:
    """Every model of a text-to-image or class-conditional checkpoint, None for what it does not hold."""
    parts = read_parts(source)
    transformer = load_transformer(parts)
    parts.check_fit()
    return SimpleNamespace(
        transformer=transformer,
        text_encoder=load_text_encoder(parts) if TEXT_ENCODER in parts else None,
        autoencoder=load_autoencoder(parts) if AUTOENCODER in parts else None,
        latent_factor=parts.latent_factor,
        metadata=parts.metadata,
    )


def sd_vae_names_of_2022(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under diffusers' present names -> under those of the published file."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub(r"(?<=attentions\.0\.)to_(q|k|v|out\.0)(?=\.)", lambda m: names[m[0]], name): w for name, w in weights.items()}


def official_config(network: Mapping[str, Any]) -> TransformerConfig:
    """From the network section of an official yaml; what is left out takes the official default."""
    is_class = "num_classes" in network
    hidden, ratio = network.get("hidden_size", 1152), network.get("mlp_ratio", 4.0)
    return TransformerConfig(
        in_channels=network.get("in_channels", 4),
        hidden_size=hidden,
        depth=network.get("depth", 28),
        num_heads=network.get("num_heads", 16),
        patch_size=network.get("patch_size", 2),
        text_dim=None if is_class else network.get("cap_feat_dim", 2048),
        num_classes=network["num_classes"] if is_class else None,
        null_class=network.get("class_dropout_prob", 0.1) > 0,
        qk_norm=network.get("qk_norm", False),
        new_condition=network.get("new_condition", "t-r"),
        use_new_embed=network.get("use_new_embed", False),
        distance_aware=network.get("distance_aware", False),
        lora_hidden_size=network.get("lora_hidden_size"),
        encoder_depth=network.get("encoder_depth", 8),
        projector_dim=network.get("projector_dim", 2048),
        z_dim=network.get("z_dim", 768),
        mlp_hidden_size=None if ratio == 4 else int(hidden * ratio) * 2 // 3,
    )
