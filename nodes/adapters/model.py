"""TiM as a MODEL: core's BaseModel around our network."""

from functools import partial

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch

from ...tim_core.errors import TimError
from ...tim_core.finite import damaged_weight
from ...tim_core.models.config import TransformerConfig
from ...tim_core.models.released import find_release
from ...tim_core.models.transformer import TransitionTransformer, peak_bytes
from ...tim_core.weights.defaults import Defaults, read_defaults
from ...tim_core.weights.load import check_tensors
from ...tim_core.weights.parts import TRANSFORMER, Parts
from ...tim_core.weights.read import read_parts
from ...tim_core.weights.write import json_tensor
from .compiling import call_for_any_batch
from .log import SAID
from .network import TiMNetwork
from .patches import usable_patches
from .preview import PLAIN, DecodedPreview, decoded_preview
from .quantized import add_scales, keep_quantized, use_quantized_layers
from .run import install, resolve_r
from .trace import TRACE

WEIGHT_DTYPES = {
    "default": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
}


class TiMModel(comfy.model_base.BaseModel):
    def __init__(self, model_config, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=TiMNetwork)
        self.diffusion_model.eval().requires_grad_(False)

    def process_timestep(self, timestep, **kwargs):
        # ModelSamplingSD3 and similar nodes scale time to 1000; the network takes 0 to 1.
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **kwargs):
        self.diffusion_model.check_condition(kwargs.get("cross_attn"))
        return super().extra_conds(**kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        # An option, not a conditioning: conditionings are rounded to the network's dtype.
        config = self.diffusion_model.config
        options = usable_patches(transformer_options, config.depth, has_text=config.text_dim is not None)
        options = {**options, "tim_r": resolve_r(t, options)}
        options.pop(SAID, None)
        trace = options.pop(TRACE, None)
        apply = partial(super()._apply_model, x, t, c_concat, c_crossattn, control, options, **kwargs)
        denoised = call_for_any_batch(self.diffusion_model, apply)
        if trace is not None:
            trace.add(t, options["tim_r"], x, denoised)
        return denoised


class TiMLatent(comfy.latent_formats.LatentFormat):
    """Latents of unit variance: DC-AE's scale is applied by the VAE, that of the stock SD VAE here.

    For live previews, `preview` is None or {"factors": (C, 3), "bias": (3)}: a linear map from latent to RGB, and `decoded` what does
    better, if anything does.
    """

    def __init__(
        self, config: TransformerConfig, factor: int, preview: dict | None = None, decoded: DecodedPreview | None = None
    ):
        self.latent_channels = config.in_channels
        self.spacial_downscale_ratio = factor
        release = find_release(config.in_channels, config.text_dim is None)
        if release is not None and release.sd_vae and release.reads(config.text_dim is None):  # latents of the stock SD VAE
            stock = comfy.latent_formats.SD15()
            self.scale_factor, self.latent_rgb_factors = stock.scale_factor, stock.latent_rgb_factors
            self.taesd_decoder_name = stock.taesd_decoder_name
        if preview is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = preview["factors"], preview["bias"]
        if decoded is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias, self.latent_rgb_factors_reshape = PLAIN, None, decoded


class TiMConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]
    latent_format = None

    def __init__(
        self, config: TransformerConfig, factor: int, record: dict, defaults: Defaults, decoded: DecodedPreview | None = None
    ):
        self.latent_format = lambda: TiMLatent(config, factor, record.get("preview"), decoded)  # BASE calls it
        super().__init__({"config": config})
        self.record, self.defaults = record, defaults

    def get_model(self, state_dict, prefix="", device=None):
        # Core multiplies latent cells by dtype size, 0.01 MiB and this factor.
        dtype = self.manual_cast_dtype or self.unet_config["dtype"]
        self.memory_usage_factor = peak_bytes(self.unet_config["config"], 1, dtype) / dtype.itemsize / (0.01 * 2**20)
        model = TiMModel(self, device=device)
        self.unet_config["model_channels"] = self.unet_config["config"].hidden_size  # as core's FreeU reads it; not for the network
        return model

    def process_unet_state_dict_for_saving(self, state_dict):
        return super().process_unet_state_dict_for_saving({**state_dict, "config_json": json_tensor(self.record)})


def build_model(parts: Parts, model_options: dict = {}, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Builds the MODEL of a checkpoint. TimError if it holds no TiM transformer.

    model_options: dtype, fp8_optimizations, load_device, offload_device as in core's loaders.
    """
    part = parts[TRANSFORMER]
    config = part.config
    check_tensors(part, TransitionTransformer(config, device="meta"))  # plain layers: core's may be without weights until they load
    record = {**part.record, **config.record(), "latent_factor": parts.latent_factor, "escape_prompts": parts.escape}
    decoded = decoded_preview(parts, record.get("preview"))
    model_config = TiMConfig(config, parts.latent_factor, record, read_defaults(parts), decoded)

    load_device = model_options.get("load_device", mm.get_torch_device())
    offload_device = model_options.get("offload_device", mm.unet_offload_device())
    supported, fast = model_config.supported_inference_dtypes, bool(model_options.get("fp8_optimizations"))
    if keeps := keep_quantized(part, model_options):
        weights, stored, wanted = dict(part.tensors), None, None
        use_quantized_layers(model_config, part, load_device, fast)
    else:
        weights = {name: part.weight(name) for name in part.tensors}
        stored, wanted = comfy.utils.weight_dtype(weights), model_options.get("dtype")
    parameters = comfy.utils.calculate_parameters(weights)
    dtype = wanted or mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    model_config.set_inference_dtype(dtype, mm.unet_manual_cast(None if keeps else dtype, load_device, supported))
    if fast:
        model_config.optimizations = {**model_config.optimizations, "fp8": True}
    model = model_config.get_model(weights)
    model.diffusion_model.damaged_weight = damaged_weight(weights)
    if keeps:
        add_scales(weights, part, model.diffusion_model)

    patcher = patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    if not mm.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(weights, "", **({"assign": True} if is_dynamic(patcher) else {}))

    patcher.cached_patcher_init = (_reload_model, (parts.path, model_options))
    return install(patcher)


def _reload_model(source: str, model_options: dict = {}, disable_dynamic: bool = False):
    """Second patcher of the same file: core calls it for hooks and for several GPUs."""
    return build_model(read_parts(source), model_options, disable_dynamic)


def patcher_class(disable_dynamic: bool = False) -> type[comfy.model_patcher.ModelPatcher]:
    """The patcher for core's layers. Looked up late: ComfyUI replaces the class at start where it offloads dynamically."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def is_dynamic(patcher) -> bool:
    return getattr(patcher, "is_dynamic", lambda: False)()


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """For layers that are not core's and cannot run partly offloaded: loads and unloads the whole model."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, 1e32, force_patch_weights=force_patch_weights)

    def partially_unload(self, *args, **kwargs):
        return 0  # bytes freed; core then unloads the whole model


def tim_model(model) -> TiMModel:
    """The TiMModel inside a MODEL. TimError if it is another model."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, TiMModel):
        raise TimError(f"model: {type(inner).__name__} is not a TiM model; load one with Load TiM Checkpoint or Load TiM Model")
    return inner


def size_multiple(model) -> int:
    """Number of pixels that an image's sides must be multiples of."""
    inner = tim_model(model)
    return inner.latent_format.spacial_downscale_ratio * inner.diffusion_model.config.patch_size
