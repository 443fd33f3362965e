"""Checks of what a run is given: latents, times, sizes."""

from torch import Tensor

from ...tim_core.errors import TimError
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
    factor = model_config.latent_format.spacial_downscale_ratio
    if line := model_config.defaults.far_size(noise.shape[3] * factor, noise.shape[2] * factor):
        say(options, line)
