"""Checks of what a run is given: latents, times, sizes."""

from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.weights.defaults import RELEASED_SIDES
from .log import say


def check_latent(latent: Tensor, channels: int) -> None:
    """TimError unless the latent is (B, channels, H, W)."""
    if latent.ndim != 4 or latent.shape[1] != channels:
        shape = "x".join(map(str, latent.shape))
        raise TimError(f"latent: shape {shape} does not fit this model, which needs (batch, {channels}, height, width); "
                       "use Empty TiM Latent, or VAE Encode with the VAE of the same checkpoint")


def outside_times(sigmas: Tensor) -> float | None:
    """The first sigma outside 0 to 1, None if there is none."""
    return next((sigma for sigma in sigmas.tolist() if not -1e-6 <= sigma <= 1 + 1e-6), None)


def check_size(model_config, noise: Tensor, options: dict) -> None:
    """Logs a line if the image is much larger or smaller than what the checkpoint is made for."""
    config, made_for = model_config.unet_config["config"], model_config.defaults
    factor = model_config.latent_format.spacial_downscale_ratio
    width, height = noise.shape[3] * factor, noise.shape[2] * factor
    released = config.text_dim is not None and config.in_channels in RELEASED_SIDES and "native_size" not in model_config.record
    reach = 16 if released else 4  # the released text-to-image model was trained from 256 to 4096 pixels a side, a class model at one size
    ratio = width * height / (made_for.width * made_for.height)
    if not 1 / reach <= ratio <= reach:
        say(options, f"size: {width}x{height} is far from {made_for.width}x{made_for.height}, which this model is made for; "
                     "expect a broken image, or use TiM Native Upscale")
