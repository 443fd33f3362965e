"""8-bit weights with scales, in the quantised layers of this version of ComfyUI."""

import inspect

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch

from ...tim_core.weights.parts import Part
from ...tim_core.weights.quantized import FORMATS

# Newer versions choose a layer's class by the `comfy_quant` beside its weight; 0.3.64 has one class of layers for the whole model.
BY_LAYER = hasattr(comfy.utils, "detect_layer_quantization") and (
    "state_dict" in inspect.signature(comfy.utils.detect_layer_quantization).parameters
)
BY_MODEL = not BY_LAYER and hasattr(comfy.ops, "scaled_fp8_ops")


def keep_quantized(part: Part, model_options: dict) -> bool:
    """Whether a transformer's 8-bit layers stay as they are: where this version has such layers, and no other dtype is asked for."""
    return bool(part.quantized) and (BY_LAYER or BY_MODEL) and model_options.get("dtype") in (None, *FORMATS.values())


def use_quantized_layers(model_config, part: Part, load_device: torch.device, fast: bool) -> None:
    """Makes the model of this config with quantised layers. fast: whether to multiply in 8 bits, which newer versions decide themselves."""
    if BY_LAYER:
        model_config.quant_config = {"mixed_ops": True}
        return
    first = next(iter(part.quantized.values()))
    model_config.scaled_fp8 = FORMATS[first.format]  # for saving
    multiply = fast and mm.supports_fp8_compute(load_device)
    model_config.custom_operations = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=multiply, scale_input=fast)


def add_scales(weights: dict[str, torch.Tensor], part: Part, network: torch.nn.Module) -> None:
    """Adds to the weights what the quantised layers of `network` load beside them."""
    for layer, quantization in part.quantized.items():
        if BY_LAYER:
            weights.update(quantization.tensors(layer))
            continue
        weight = weights[f"{layer}.weight"]
        module = network.get_submodule(layer)
        module.weight = torch.nn.Parameter(torch.empty_like(weight), requires_grad=False)  # loading copies into it
        weights[f"{layer}.scale_weight"] = quantization.scale
        if quantization.input_scale is not None:
            weights[f"{layer}.scale_input"] = quantization.input_scale
