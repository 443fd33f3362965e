"""What a transformer with a projector learns from an image encoder (REPA, arXiv 2410.06940; paper App. C)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import TimError
from ..models.config import TransformerConfig
from ..models.transformer import TransitionTransformer
from .objectives.transition import ObjectiveConfig

ImageEncoder = Callable[[Tensor], Tensor]


def check_projector(transformer: TransitionTransformer, encoder: ImageEncoder | None, *objectives: ObjectiveConfig) -> None:
    """TimError for an encoder without a projector to learn from it, or a weight of the term without an encoder.

    A projector that has nothing to learn from stays as it is.
    """
    if encoder is None and transformer.projector is not None:
        transformer.projector.requires_grad_(False)
    if encoder is not None and transformer.projector is None:
        raise TimError("image_encoder: found a transformer without a projector, expected one with it (transformer.z_dim)")
    for objective in objectives:
        if encoder is None and objective.proj_coeff not in (0, ObjectiveConfig.proj_coeff):
            raise TimError(f"training config: objective.proj_coeff: found {objective.proj_coeff} without an image encoder, expected one, "
                           "passed to tim_core.training.run")


def name_of(encoder: ImageEncoder | None) -> str:
    """What tells one encoder's features from another's in a cache: its `name`. TimError if it has none."""
    name = "" if encoder is None else getattr(encoder, "name", None)
    if not isinstance(name, str):
        raise TimError("image_encoder: found no name on it, expected a text that changes with its weights: features are cached by it")
    return name


@torch.no_grad()
def shown(encoder: ImageEncoder, pictures: Tensor, latents: Tensor, config: TransformerConfig) -> Tensor:
    """The encoder's features (B, N, z_dim) of pictures (B, 3, H, W), one for each of the N tokens of their latents. TimError for others."""
    features = encoder(pictures)
    expected = [len(pictures), latents.shape[-2] * latents.shape[-1] // config.patch_size**2, config.z_dim]
    if list(features.shape) != expected:
        raise TimError(f"image_encoder: found features {list(features.shape)} for pictures {list(pictures.shape)}, expected {expected}")
    return features.float()
