"""Settings of the released weights, which have no record: found by their latent channels and by whether they read text or classes."""

from __future__ import annotations

from dataclasses import dataclass

from .gemma import GEMMA_1B_WIDTH

ESCAPE_PROMPTS = True  # their captions were unicode-escaped in training
DC_AE_CHANNELS, DC_AE_SCALE = 32, 0.41407  # of dc-ae-f32c32-sana
SD_VAE, SD_VAE_CHANNELS, SD_VAE_SCALE = "stabilityai/sd-vae-ft-ema", 4, 0.18215
OTHER_FACTOR = 8  # pixels per latent cell of other numbers of channels


@dataclass(frozen=True)
class Release:
    """One set of weights.

    name: of `tim download`. channels: of the latent. factor: pixels per latent cell. side: of its images, in pixels.
    cfg, guidance_interval: of the official scripts. reach, any_shape: as in `Defaults`.
    text_width: of the features that it reads; None for class-conditional weights. sd_vae: whether its VAE is that of Stable Diffusion.
    """

    name: str
    channels: int
    factor: int
    side: int
    cfg: float = 2.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    reach: float = 1.25
    any_shape: bool = False
    text_width: int | None = None
    sd_vae: bool = False

    def reads(self, class_conditional: bool) -> bool:
        """Whether it reads classes, or text."""
        return (self.text_width is None) == class_conditional


RELEASES = (
    Release("t2i", 32, 32, 1024, reach=4, any_shape=True, text_width=GEMMA_1B_WIDTH),  # trained from 256 to 4096 pixels a side
    Release("c2i-512", 32, 32, 512, cfg=3.0, guidance_interval=(0.0, 0.7)),
    Release("c2i-256", SD_VAE_CHANNELS, 8, 256, guidance_interval=(0.0, 0.6), sd_vae=True),
)


def find_release(channels: int, class_conditional: bool = False) -> Release | None:
    """The release with these latent channels; of several, the one that reads the same kind of prompt. None for other channels."""
    found = [release for release in RELEASES if release.channels == channels]
    return next((release for release in found if release.reads(class_conditional)), found[0] if found else None)


def latent_factor(channels: int) -> int:
    """Pixels per latent cell, by the number of latent channels alone."""
    release = find_release(channels)
    return OTHER_FACTOR if release is None else release.factor
