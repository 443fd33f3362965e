"""Reads LoRA files (arXiv 2106.09685) in the spellings of several trainers: W + strength * alpha / rank * B A."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TimError, printable
from ..files import user_path
from ..finite import damaged_weight
from ..limits import check_lora_strength
from .detect import LORA_DOWN, LORA_UP, TEXT_ENCODER, TITLES, TRANSFORMER, is_lora
from .open import open_state_dict

# Key prefixes that ComfyUI, PEFT, diffusers and kohya's scripts write for the two networks.
PREFIXES = {
    TEXT_ENCODER: ("text_encoders.transformer.", "text_encoder.transformer.", "text_encoder.", "lora_te_"),
    TRANSFORMER: (
        "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", "base_model.model.transformer.",
        "base_model.model.diffusion_model.", "module.", "lora_unet_", "lora_transformer_", "",
    ),
}
CORE_READS = ("diffusion_model.", "lora_unet_", "text_encoders.transformer.")  # prefixes that ComfyUI's LoRA loaders map
CORE_PREFIXES = {TRANSFORMER: "diffusion_model.", TEXT_ENCODER: "text_encoders.transformer."}
OTHER_KINDS = {
    "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "oft_blocks": "OFT", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA", "lora_mid.weight": "a LoRA of convolutions (LoCon)", "diff": "a full difference",
}


@dataclass(frozen=True, eq=False)
class Adapter:
    """One layer's adapter. down: (rank, in). up: (out, rank). alpha: None for rank."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]


@dataclass(frozen=True, eq=False)
class Lora:
    """source: the file. layers: the adapters of each network, by the names of its linear layers. core_names: whether ComfyUI reads it."""

    source: str
    layers: dict[str, dict[str, Adapter]]
    metadata: dict[str, str]
    core_names: bool = True

    @property
    def title(self) -> str:
        """What it adapts, and its ranks."""
        ranks = sorted({adapter.down.shape[0] for layers in self.layers.values() for adapter in layers.values()})
        parts = " and a ".join(TITLES[part] for part in self.layers)
        layers = sum(map(len, self.layers.values()))
        return f"LoRA of a {parts}, {layers} layer{'s' if layers > 1 else ''}, rank {' and '.join(map(str, ranks))}"

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names that ComfyUI reads."""
        tensors = {}
        for part, layers in self.layers.items():
            for name, adapter in layers.items():
                key = CORE_PREFIXES[part] + name
                tensors |= {f"{key}.lora_A.weight": adapter.down.contiguous(), f"{key}.lora_B.weight": adapter.up.contiguous()}
                if adapter.alpha is not None:
                    tensors[f"{key}.alpha"] = torch.tensor(float(adapter.alpha))
        return tensors


def read_lora(path: str | Path) -> Lora:
    """Reads a LoRA of a TiM transformer or its text encoder. TimError naming the file for other adapters, other models, malformed ones."""
    tensors, metadata = open_state_dict(user_path(path))
    for key in tensors:
        kind = next((title for ending, title in OTHER_KINDS.items() if key.endswith(f".{ending}")), None)
        if kind:
            raise TimError(f"{path}: is {kind} ('{key}'), which only ComfyUI's loaders apply; give a plain LoRA")
    if not is_lora(tensors):
        raise TimError(f"{path}: is not a LoRA; it has no lora_A or lora_down tensors; give a LoRA file")
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        for role, endings in (("down", LORA_DOWN), ("up", LORA_UP), ("alpha", ("alpha",))):
            if ending := next((ending for ending in endings if key.endswith(f".{ending}")), None):
                found.setdefault(key[: -len(ending) - 1], {})[role] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise TimError(f"{path}: {len(unknown)} unknown keys, such as '{unknown[0]}'; give a plain LoRA of a TiM model")
    layers: dict[str, dict[str, Adapter]] = {TRANSFORMER: {}, TEXT_ENCODER: {}}
    for name, roles in found.items():
        part, layer = _place(name, str(path))
        if layer in layers[part]:
            raise TimError(f"{path}: layer '{layer}' occurs twice, also as '{name}'; save the file again with one")
        layers[part][layer] = _adapter(roles, f"{path}: '{name}'")
    core_names = all(key.startswith(CORE_READS) and not key.endswith(".default.weight") for key in tensors)
    return Lora(str(path), {part: some for part, some in layers.items() if some}, metadata, core_names)


def merge_lora(lora: Lora, networks: dict[str, nn.Module | None], strength: float = 1.0) -> int:
    """Adds strength * alpha / rank * B A to the weights of `networks` (by part), computed in float32 -> number of layers.

    TimError naming the file and the layer if a network is missing, lacks a layer or has it in another shape, or if a weight overflows; no
    weight is changed then. A log line names a LoRA that changes none in any case: untrained, or with an alpha of 0.
    """
    check_lora_strength(strength, lora.source)
    targets: list[tuple[str, nn.Parameter, Adapter]] = []
    for part, layers in lora.layers.items():
        network = networks.get(part)
        linear = {} if network is None else {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        for name, adapter in layers.items():
            if name not in linear:
                raise TimError(f"{lora.source}: layer '{name}' is not in this model; use the LoRA with the model that it was trained on")
            weight, shape = linear[name].weight, (adapter.up.shape[0], adapter.down.shape[1])
            if tuple(weight.shape) != shape:
                model = f"this model's is {list(weight.shape)}; use the LoRA with the model that it was trained on"
                raise TimError(f"{lora.source}: layer '{name}' has shape {list(shape)}, {model}")
            targets.append((name, weight, adapter))
    for name, weight, adapter in targets:
        if damaged_weight({"": _merged(weight, adapter, strength)}) is not None:
            scale = f"strength {strength:g} times alpha / rank {adapter.scale:g}"
            raise TimError(f"{lora.source}: layer '{name}' becomes NaN or infinite with {scale}; use a smaller strength or another LoRA")
    if not any(adapter.alpha != 0 and adapter.down.any() and adapter.up.any() for _, _, adapter in targets):
        logging.warning(printable(f"{lora.source}: changes nothing: its alphas or its matrices are all 0; it may be untrained"))
    for _, weight, adapter in targets:
        weight.data = _merged(weight, adapter, strength)  # the old one may be a mapped file
    return len(targets)


@torch.no_grad()
def _merged(weight: Tensor, adapter: Adapter, strength: float) -> Tensor:
    up, down = (tensor.to(weight.device, torch.float32) for tensor in (adapter.up, adapter.down))
    return (weight.float() + strength * adapter.scale * (up @ down)).to(weight.dtype)


def _adapter(roles: dict[str, Tensor], name: str) -> Adapter:
    if missing := [role for role in ("down", "up") if role not in roles]:
        raise TimError(f"{name}: its lora_{missing[0]} tensor is missing; the file is damaged or incomplete")
    down, up = roles["down"], roles["up"]
    if down.ndim == 4 and up.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down[:, :, 0, 0], up[:, :, 0, 0]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or 0 in down.shape or 0 in up.shape:
        raise TimError(f"{name}: shapes {list(down.shape)} and {list(up.shape)} are not (rank, in) and (out, rank); the file is damaged")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise TimError(f"{name}: {down.dtype} and {up.dtype} are not floating-point; the file is damaged, or of another format")
    if damaged := damaged_weight({"down": down, "up": up}):
        raise TimError(f"{name}: its lora_{damaged} tensor has NaN or infinite values; the file is damaged")
    alpha = roles.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or alpha.dtype == torch.bool or not bool(alpha.float().isfinite())):
        raise TimError(f"{name}: its alpha is not one finite number; the file is damaged")
    return Adapter(down, up, None if alpha is None else float(alpha))


def _place(name: str, source: str) -> tuple[str, str]:
    """The part and the linear layer that a key without its ending names."""
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix) and (layer := _layer(part, name[len(prefix) :])):
                return part, layer
    raise TimError(f"{source}: '{name}' names no layer of a TiM transformer or a Gemma-3 text model; it is another model's LoRA")


def _layer(part: str, name: str) -> str | None:
    """The official name of a linear layer: dotted already, or with underscores for dots, as kohya's scripts write it."""
    if part == TEXT_ENCODER:
        match = re.fullmatch(r"(?:model\.)?layers[._](\d+)[._](self_attn|mlp)[._](\w+)", name)
        return match and "layers.{}.{}.{}".format(*match.groups())
    block = re.match(r"blocks[._](\d+)[._]", name)
    first = name if block is None else f"blocks.0.{name[block.end():]}"
    official = _transformer_layers().get(first.replace(".", "_"))
    return official if official is None or block is None else official.replace("blocks.0.", f"blocks.{block[1]}.")


@lru_cache(maxsize=1)
def _transformer_layers() -> dict[str, str]:
    """The linear layers of the networks for text and for classes, of one block: names with underscores -> official names."""
    from ..models.config import TransformerConfig
    from ..models.transformer import TransitionTransformer

    names = {}
    shape = {"in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "lora_hidden_size": 8}
    for condition in ({"text_dim": 8}, {"num_classes": 8}):
        network = TransitionTransformer(TransformerConfig(**shape, **condition), device="meta")
        names |= {name.replace(".", "_"): name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    return names


def list_loras(lora: Any) -> list[tuple[str | Path, float]]:
    """LoRA files and their strengths, from what `Pipeline.load` takes. TimError for a strength that cannot be used."""
    if isinstance(lora, (str, Path)):
        return [(lora, 1.0)]
    pairs = list(lora.items() if isinstance(lora, Mapping) else lora or ())
    for file, strength in pairs:
        check_lora_strength(strength, str(file))
    return pairs
