"""Weights in 8-bit floats with one scale per tensor: weight = stored * scale.

Two spellings of ComfyUI are read; the first is written:

    <layer>.weight_scale, <layer>.input_scale, and <layer>.comfy_quant, JSON as uint8: {"format": "float8_e4m3fn"}. The safetensors
    metadata "_quantization_metadata" can take the place of comfy_quant.
    <layer>.scale_weight, <layer>.scale_input, and one tensor `scaled_fp8` for the whole model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TimError
from ..files import parse_json
from ..finite import MOST_WEIGHT
from .open import StateDict
from .precision import Losses
from .write import json_tensor

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FP8 = torch.float8_e4m3fn  # what `quantize` makes
MARKER = "scaled_fp8"  # of the older spelling
METADATA = "_quantization_metadata"
LAYER_KEY = ".comfy_quant"
WEIGHT_SCALES, INPUT_SCALES = (".weight_scale", ".scale_weight"), (".input_scale", ".scale_input")


@dataclass(frozen=True, eq=False)
class Quantization:
    """How one layer's weight is stored. input_scale: of its input in 8-bit products. full_precision: whether these are not allowed."""

    format: str
    scale: Tensor
    input_scale: Tensor | None = None
    full_precision: bool = False

    def tensors(self, layer: str) -> StateDict:
        """The tensors beside the layer's weight, in the current spelling."""
        settings = {"format": self.format} | ({"full_precision_matrix_mult": True} if self.full_precision else {})
        found = {f"{layer}.weight_scale": self.scale, layer + LAYER_KEY: json_tensor(settings)}
        return found if self.input_scale is None else {**found, f"{layer}.input_scale": self.input_scale}


def dequantize(weight: Tensor, quantization: Quantization) -> Tensor:
    """-> the weight in float32."""
    return weight.float() * quantization.scale.to(weight.device)


def quantize(name: str, weight: Tensor, losses: Losses) -> tuple[Tensor, Tensor]:
    """-> the weight in float8_e4m3fn and its scale, float32 (), that keeps the largest value.

    TimError for values that are not finite, or too small for a scale; `losses` takes note if many values become 0.
    """
    weight = weight.float()
    largest = weight.abs().max() if weight.numel() else torch.tensor(0.0)
    if not bool(largest.isfinite()):
        raise TimError(f"tensor {name}: holds values that are not finite; fp8 cannot scale them, use another file")
    most = torch.finfo(FP8).max
    scale = torch.where(largest > 0, largest / most, torch.ones(())).clamp(min=torch.finfo(torch.float32).tiny)
    stored = (weight / scale).clamp(-most, most).to(FP8)
    losses.add(name, weight, stored)
    return stored, scale


def is_large(name: str, weight: Tensor) -> bool:
    """Whether `quantize` is for this weight of a transformer: the linear layers of its blocks, which hold nearly all parameters."""
    return name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2


def with_layer_keys(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Mapping[str, Tensor]:
    """The tensors with a `comfy_quant` for each layer that a file's metadata calls quantised. TimError for malformed metadata."""
    if METADATA not in metadata:
        return tensors
    layers = parse_json(metadata[METADATA], f"{source}: {METADATA}")
    layers = layers.get("layers") if isinstance(layers, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(settings, dict) for settings in layers.values()):
        raise TimError(f"{source}: {METADATA} does not map layers to their formats; convert the original weights again")
    return {**tensors, **{layer + LAYER_KEY: json_tensor(settings) for layer, settings in layers.items()}}


def separate(tensors: StateDict, marker: Tensor | None, source: str) -> tuple[StateDict, dict[str, Quantization]]:
    """Takes the tensors of quantised layers apart -> the weights as stored, and how, by layer.

    marker: the tensor `scaled_fp8` of the older spelling. TimError for a format that is not known, or a scale that makes no sense.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    weights: StateDict = {}
    for name, tensor in tensors.items():
        for role, endings in (("settings", (LAYER_KEY,)), ("scale", WEIGHT_SCALES), ("input_scale", INPUT_SCALES)):
            if ending := next((ending for ending in endings if name.endswith(ending)), None):
                layers.setdefault(name.removesuffix(ending), {})[role] = tensor
                break
        else:
            weights[name] = tensor
    found = {}
    for layer, roles in layers.items():
        where = f"{source}: layer '{layer}'"
        settings: dict | None = None
        if "settings" in roles:
            data = roles["settings"].to(device="cpu", dtype=torch.uint8).numpy().tobytes()
            settings = parse_json(data, f"{where}: comfy_quant")
            if not isinstance(settings, dict):
                raise TimError(f"{where}: comfy_quant is not an object; convert the original weights again")
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            raise TimError(f"{where}: has a scale but no weight; download the file again")
        if "settings" not in roles and "scale" not in roles:
            continue  # the scale of an input alone
        stored = str(weight.dtype).removeprefix("torch.")
        form = stored if settings is None else settings.get("format")
        if settings is not None and form not in FORMATS:
            known = " and ".join(FORMATS)
            raise TimError(f"{where}: quantised as {form!r}, which is not supported; use {known}, or convert the original weights")
        if not weight.is_floating_point():
            raise TimError(f"{where}: its scale belongs to {stored}, which is not supported; convert the original weights with --dtype fp8")
        scale = _scale(roles.get("scale"), f"{where}: weight_scale")
        input_scale = _scale(roles.get("input_scale"), f"{where}: input_scale")
        full = (settings or {}).get("full_precision_matrix_mult") is True or marker is not None and marker.numel() == 2
        quantization = Quantization(form, scale, None if float(input_scale) == 1 else input_scale, full)
        if weight.dtype in FORMATS.values():
            found[layer] = quantization
        elif float(scale) != 1:  # ComfyUI 0.3.64 saves scales of 1 with layers that are not quantised
            weights[f"{layer}.weight"] = dequantize(weight, quantization)
    return weights, found


def _scale(tensor: Tensor | None, name: str) -> Tensor:
    """A scale as float32 (); 1 where there is none. TimError unless it is one positive finite number."""
    if tensor is None:
        return torch.ones(())
    if tensor.numel() != 1 or not tensor.is_floating_point():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise TimError(f"{name} has shape {list(tensor.shape)} and {dtype}; only one floating number per tensor is supported")
    value = tensor.detach().float().reshape(()).cpu().clone()
    if not 0 < float(value) <= MOST_WEIGHT:
        raise TimError(f"{name} is {float(value):g}; it must be above 0 and at most {MOST_WEIGHT:g}; download the file again")
    return value
