"""TiM as a MODEL: core's BaseModel around our network, with wrappers for exact transitions and the guidance interval."""

import comfy.k_diffusion.sampling
import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.models.config import TransformerConfig
from ...tim_core.models.transformer import TransitionTransformer
from ...tim_core.weights.load import check_tensors
from ...tim_core.weights.parts import TRANSFORMER, Parts, read_parts
from ...tim_core.weights.save import json_tensor

PADDED = "tim_padded"  # conditioning key: the 256 rows of a prompt, padding included
TARGET = "tim_target"  # transformer option: end time of the step of our own sampler
TRANSITION = "tim_transition"  # transformer option: each step ends at the next time of the schedule
INTERVAL = "tim_interval"  # key of the guidance interval's wrapper
PUBLISHED_INTERVAL = (0.0, 1.0)
LABEL_BASE = 32
WEIGHT_DTYPES = {
    "default": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
}
UNGUIDED = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}  # attributes of core's guiders, at values without guidance


class ComfyAttention:
    """ComfyUI's selected attention, called with the transformer options of the current call (other packs override it there)."""

    def __init__(self):
        self.options: dict = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, transformer_options=self.options)


class TiMNetwork(TransitionTransformer):
    """tim_core's network with the signature that BaseModel calls; r is a transformer option."""

    def __init__(self, config: TransformerConfig, operations, device=None, dtype=None):
        attention = ComfyAttention()
        super().__init__(config, operations, attention, device, dtype)
        self.comfy_attention = attention

    def forward(self, x, timesteps, context=None, control=None, transformer_options={}, **kwargs):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, transformer_options, **kwargs)

    def _forward(self, x, timesteps, context, transformer_options={}, **kwargs):
        context = self._condition(context)
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (self.config.patch_size,) * 2)
        attention = self.comfy_attention
        outer, attention.options = attention.options, transformer_options
        try:
            return super().forward(x, timesteps, transformer_options.get("tim_r", timesteps), context)[..., :height, :width]
        finally:
            attention.options = outer

    def _condition(self, context: Tensor | None) -> Tensor:
        """The network's condition: text features (B, L, text_dim) as they are, class numbers (B,) from the digits of `class_label`."""
        config = self.config
        if context is None or context.shape[-1] != (config.text_dim or 2):
            width = 0 if context is None else context.shape[-1]
            found = {0: "missing", 2: "a class label"}.get(width, f"text features of width {width}")
            if config.text_dim:
                raise TimError(f"conditioning: {found}; connect CLIP Text Encode with this model's own CLIP, of width {config.text_dim}")
            raise TimError(f"conditioning: {found}; connect TiM Class Label, this model takes classes")
        if config.text_dim:
            return context
        # The digits survive half precision, the number does not.
        label = (context[:, 0].float() @ context.new_tensor([LABEL_BASE, 1], dtype=torch.float32)).round().long()
        if int(label.max()) >= config.num_classes:
            raise TimError(f"class label: {int(label.max())} is not a class of this model; choose 0 to {config.num_classes - 1}")
        if int(label.min()) < 0 and not config.null_class:
            raise TimError("class label: empty, but this model has no null class; set cfg to 1 or choose a class")
        return torch.where(label < 0, config.num_classes, label)


class TiMModel(comfy.model_base.BaseModel):
    def __init__(self, model_config, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=TiMNetwork)
        self.diffusion_model.eval().requires_grad_(False)

    def process_timestep(self, timestep, **kwargs):
        # ModelSamplingSD3 and similar nodes scale time to 1000; the network takes 0 to 1.
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        # An option, not a conditioning: conditionings are rounded to the network's dtype.
        options = {**transformer_options, "tim_r": resolve_r(t, transformer_options)}
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)


class TiMLatent(comfy.latent_formats.LatentFormat):
    """Latents of unit variance: DC-AE's scale is applied by the VAE, that of the stock SD VAE here.

    `preview` is None or {"factors": (C, 3), "bias": (3)}: a linear map from latent to RGB, for live previews.
    """

    def __init__(self, config: TransformerConfig, factor: int, preview: dict | None = None):
        self.latent_channels = config.in_channels
        self.spacial_downscale_ratio = factor
        if config.in_channels == 4 and config.text_dim is None:  # released class model at 256x256: latents of the stock SD VAE
            stock = comfy.latent_formats.SD15()
            self.scale_factor, self.latent_rgb_factors = stock.scale_factor, stock.latent_rgb_factors
            self.taesd_decoder_name = stock.taesd_decoder_name
        if preview is not None:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = preview["factors"], preview["bias"]


class TiMConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]
    latent_format = None

    def __init__(self, config: TransformerConfig, factor: int, record: dict):
        self.latent_format = lambda: TiMLatent(config, factor, record.get("preview"))  # BASE calls it
        super().__init__({"config": config})
        self.record = record
        # Estimated, not measured on a GPU: a token peaks at about 30 tensors of the hidden width (gated MLP, q, k, v), 70 KB in
        # bfloat16 at width 1152. Core multiplies latent cells by dtype size, 0.01 MB and this factor.
        self.memory_usage_factor = 3.3 * config.hidden_size / 1152 / config.patch_size**2

    def get_model(self, state_dict, prefix="", device=None):
        return TiMModel(self, device=device)

    def process_unet_state_dict_for_saving(self, state_dict):
        return super().process_unet_state_dict_for_saving({**state_dict, "config_json": json_tensor(self.record)})


def build_model(parts: Parts, model_options: dict = {}, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Builds the MODEL of a checkpoint. TimError if it holds no TiM transformer.

    model_options: dtype, fp8_optimizations, load_device, offload_device as in core's loaders.
    """
    part = parts[TRANSFORMER]
    weights, config = dict(part.tensors), part.config
    check_tensors(part, TransitionTransformer(config, device="meta"))  # plain layers: core's may be without weights until they load
    record = {**part.record, **config.record(), "latent_factor": parts.latent_factor, "escape_prompts": parts.escape}
    model_config = TiMConfig(config, parts.latent_factor, record)

    load_device = model_options.get("load_device", mm.get_torch_device())
    offload_device = model_options.get("offload_device", mm.unet_offload_device())
    supported = model_config.supported_inference_dtypes
    dtype = model_options.get("dtype") or mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights), supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(weights)
    )
    model_config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, load_device, supported))
    if model_options.get("fp8_optimizations"):
        model_config.optimizations = {**model_config.optimizations, "fp8": True}
    model = model_config.get_model(weights)

    patcher = patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    if not mm.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(weights, "", **({"assign": True} if is_dynamic(patcher) else {}))

    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "tim", _mark_transitions)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "tim", _fit_conditionings)
    patcher.cached_patcher_init = (_reload_model, (parts.source, model_options))
    return with_interval(patcher, *PUBLISHED_INTERVAL)


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


def resolve_r(t: Tensor, options: dict) -> Tensor:
    """End times (B,), float32, of the step that evaluates the network at t (B,).

    Our sampler sets it. A step of stock euler is a transition to the next time of the schedule, since x + (x - denoised) / t * (r - t)
    is x - (t - r) F. For every other sampler r = t: ordinary flow matching.
    """
    t = t.float()
    if options.get(TARGET) is not None:
        return torch.full_like(t, options[TARGET])
    if not options.get(TRANSITION) or options.get("sample_sigmas") is None:
        return t
    sigmas = options["sample_sigmas"].to(t)
    distance, index = (sigmas[:-1] - t[:, None]).abs().min(dim=1)
    return torch.where(distance <= 1e-5, sigmas[1:][index], t)


def _mark_transitions(executor, guider, sigmas, extra_args, *args, **kwargs):
    """SAMPLER_SAMPLE wrapper: marks stock euler, and ddim, which equals it, without churn as taking exact transitions."""
    sampler = executor.class_obj
    is_euler = getattr(sampler, "sampler_function", None) is comfy.k_diffusion.sampling.sample_euler
    if is_euler and not sampler.extra_options:
        extra_args["model_options"].setdefault("transformer_options", {})[TRANSITION] = True
    return executor(guider, sigmas, extra_args, *args, **kwargs)


def _fit_conditionings(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: fits the run's copies of the conditionings to each other and to the latent.

    Texts are padded to the longest with their own pad rows, as the official code does inside a batch, so the null text is as long as
    the prompt. Areas in pixels, which core divides by 8 for every model, are converted to the latent's own grid.
    """
    guider = executor.class_obj
    factor = guider.model_patcher.model.latent_format.spacial_downscale_ratio
    conds = [cond for conds in guider.conds.values() for cond in conds]
    texts = [cond for cond in conds if cond.get("cross_attn") is not None]
    longest = max((cond["cross_attn"].shape[1] for cond in texts), default=0)
    for cond in texts:
        rows, padded = cond["cross_attn"], cond.get(PADDED)
        # not equal if a node (ConditioningConcat, ConditioningAverage, ...) has changed the rows
        if padded is not None and rows.shape[1] < longest and torch.equal(padded[:, : rows.shape[1]], rows):
            cond["cross_attn"] = padded[:, :longest]
    for cond in conds:
        area = cond.get("area")
        if area is not None and area[0] != "percentage":
            height, width, y, x = (side * 8 // factor for side in area)
            cond["area"] = (max(height, 1), max(width, 1), y, x)
    return executor(*args, **kwargs)


def with_interval(model: comfy.model_patcher.ModelPatcher, low: float, high: float) -> comfy.model_patcher.ModelPatcher:
    """A clone with guidance only at times low < t < high, for the guiders CFG, Dual CFG and Perp-Neg. TimError if low >= high.

    Outside the interval the negatives have no weight and are not evaluated, except by nested Dual CFG, which always does.
    """
    if low >= high:
        raise TimError(f"guidance_low: {low:g} is not below guidance_high {high:g}; to turn CFG off, set cfg to 1")
    low, high = torch.tensor([low, high], dtype=torch.float32).tolist()  # the precision of the times they are compared with

    def guide_inside(executor, x, timestep, *args, **kwargs):
        guider = executor.class_obj
        if low < float(timestep.flatten()[0]) < high:
            return executor(x, timestep, *args, **kwargs)
        strengths = {name: getattr(guider, name) for name in UNGUIDED if hasattr(guider, name)}
        try:
            for name in strengths:
                setattr(guider, name, UNGUIDED[name])
            return executor(x, timestep, *args, **kwargs)
        finally:
            for name, strength in strengths.items():
                setattr(guider, name, strength)

    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, INTERVAL)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, INTERVAL, guide_inside)
    return model


def class_label(label: int) -> Tensor:
    """A class as conditioning (1, 1, 2): two digits in base LABEL_BASE, exact in half precision. -1 is the null class."""
    return torch.tensor([[[label // LABEL_BASE, label % LABEL_BASE]]], dtype=torch.float32)


def size_multiple(model) -> int:
    """Number of pixels that an image's sides must be multiples of."""
    inner = tim_model(model)
    return inner.latent_format.spacial_downscale_ratio * inner.diffusion_model.config.patch_size
