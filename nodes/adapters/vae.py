"""DC-AE as a VAE: core's class, with its batching, tiling and out-of-memory fallback, around our autoencoder."""

import logging
from contextlib import contextmanager

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.finite import check_finite
from ...tim_core.models.autoencoder import Autoencoder
from ...tim_core.models.config import AutoencoderConfig
from ...tim_core.models.tiles import STRIDE, TILE
from ...tim_core.weights.load import check_tensors, note_damage
from ...tim_core.weights.parts import AUTOENCODER, Parts
from ...tim_core.weights.precision import Losses, cast
from ...tim_core.weights.read import read_parts
from ...tim_core.weights.write import json_tensor
from .checks import check_latent
from .model import WholePatcher, is_dynamic, patcher_class

OVERLAP = TILE - STRIDE  # pixels


class CheckedAutoencoder(Autoencoder):
    """Uses tiles where a whole image does not fit in the memory that core can free.

    Checks at every tile for cancellation, which core's tile loops do not, and for finite values, before core clamps them.
    """

    def encode(self, x: Tensor) -> Tensor:
        if self._needs_tiles(x, 1):
            return self.tiled_encode(x)
        mm.throw_exception_if_processing_interrupted()
        return self._finite(super().encode(x), "encoder", x, "image before encoding", "another image")

    def decode(self, z: Tensor) -> Tensor:
        if self._needs_tiles(z, self.config.factor):
            return self.tiled_decode(z)
        mm.throw_exception_if_processing_interrupted()
        return self._finite(super().decode(z), "decoder", z, "latent before decoding", "a lower cfg or float32 in the sampler before")

    def _needs_tiles(self, x: Tensor, factor: int) -> bool:
        available = None if x.device.type == "cpu" else mm.get_free_memory(x.device)
        return self.needs_tiles(x.shape[-2] * factor, x.shape[-1] * factor, x.dtype, x.device, available)

    def _finite(self, made: Tensor, half: str, given: Tensor, name: str, advice: str) -> Tensor:
        """`made` if it is finite and no weight damaged, else TimError that names its stage, or `given` if that is not finite either."""
        if self.damaged_weights.get(half) is not None or not bool(made.isfinite().all()):
            check_finite(given, name, advice=[advice])
            check_finite(made, f"VAE {half}", self.stage(half), float32="ComfyUI's option --fp32-vae")
        return made


class TiMVAE(comfy.sd.VAE):
    """Images in [0, 1] <-> latents of unit variance, in float32 or bfloat16: float16 overflows in the deep stages."""

    def __init__(
        self, parts: Parts, device: torch.device | None = None, dtype: torch.dtype | None = None, disable_dynamic: bool = False
    ):
        part = parts[AUTOENCODER]
        config = part.config
        if not isinstance(config, AutoencoderConfig):
            raise TimError(f"{part.source}: this is Stable Diffusion's VAE; load it with Load VAE, from a file of its own")
        with _without_warning("No VAE weights detected"):
            super().__init__(sd={})  # sets the defaults of this version
        reload = (_reload_vae, (parts.path, device, dtype))
        self.device = device or mm.vae_device()
        self.working_dtypes = [torch.bfloat16, torch.float32]
        dtype = dtype or mm.vae_dtype(self.device, self.working_dtypes)
        self.needs_float32 = config.force_upcast
        self.vae_dtype = torch.float32 if dtype == torch.float16 or self.needs_float32 else dtype
        self.output_device = mm.intermediate_device()

        check_tensors(part, Autoencoder(config, device="meta"))  # plain layers: core's may be without weights until they load
        network = CheckedAutoencoder(config, comfy.ops.disable_weight_init, dtype=self.vae_dtype)
        self.first_stage_model = network.eval().requires_grad_(False)
        # Batch norm is not one of core's layers, so its tensors would not move when the rest is offloaded.
        self.disable_offload = any(stage.norm == "batch_norm" for stage in (*config.encoder, *config.decoder))
        self.latent_channels = config.latent_channels
        self.downscale_ratio = self.upscale_ratio = config.factor
        factor, device = config.factor, self.device
        self.memory_used_encode = lambda shape, dtype: network.peak_bytes(shape[2], shape[3], dtype, device)
        self.memory_used_decode = lambda shape, dtype: network.peak_bytes(shape[2] * factor, shape[3] * factor, dtype, device)

        if hasattr(mm, "archive_model_dtypes"):
            mm.archive_model_dtypes(self.first_stage_model)
        chosen = WholePatcher if self.disable_offload else patcher_class(disable_dynamic)
        self.patcher = chosen(self.first_stage_model, load_device=self.device, offload_device=mm.vae_offload_device())
        losses = Losses()
        weights = {name: cast(name, part.weight(name), self.vae_dtype, "cpu", losses) for name in part.tensors}
        losses.report(part.source)
        note_damage(network, part)
        self.first_stage_model.load_state_dict(weights, strict=False, assign=is_dynamic(self.patcher))
        self.patcher.cached_patcher_init = reload
        if hasattr(self, "model_size"):
            self.model_size()

    def get_sd(self):
        config = self.first_stage_model.config
        return {**super().get_sd(), "config_json": json_tensor({**config.record(), "force_upcast": self.needs_float32})}

    def decode(self, samples_in, *args, **kwargs):
        check_latent(samples_in, self.latent_channels)
        return super().decode(samples_in, *args, **kwargs)

    def decode_tiled(self, samples, *args, **kwargs):
        check_latent(samples, self.latent_channels)
        return super().decode_tiled(samples, *args, **kwargs)

    def decode_tiled_(self, samples, tile_x=None, tile_y=None, overlap=None):
        factor = self.upscale_ratio
        overlap = OVERLAP // factor if overlap is None else overlap
        return super().decode_tiled_(samples, tile_x=tile_x or TILE // factor, tile_y=tile_y or TILE // factor, overlap=overlap)

    def encode_tiled_(self, pixel_samples, tile_x=TILE, tile_y=TILE, overlap=OVERLAP):
        return super().encode_tiled_(pixel_samples, tile_x=tile_x, tile_y=tile_y, overlap=overlap)


def _reload_vae(source: str, device=None, dtype=None, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Second patcher of the same file: core calls it for another device."""
    return TiMVAE(read_parts(source), device, dtype, disable_dynamic).patcher


@contextmanager
def _without_warning(text: str):
    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger = logging.getLogger()
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
