"""Representation alignment with an image encoder (REPA, arXiv 2410.06940; paper App. C), for transformers with a projector."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import TimError
from ..models.config import TransformerConfig
from ..models.transformer import TransitionTransformer
from .objectives.transition import ObjectiveConfig

ImageEncoder = Callable[[Tensor], Tensor]


def check_projector(transformer: TransitionTransformer, encoder: ImageEncoder | None, *objectives: ObjectiveConfig) -> None:
    """TimError for an encoder without a projector, or a REPA weight without an encoder. A projector without an encoder is frozen."""
    if encoder is None and transformer.projector is not None:
        transformer.projector.requires_grad_(False)
    if encoder is not None and transformer.projector is None:
        raise TimError("image_encoder: the transformer has no projector; set transformer.z_dim")
    for objective in objectives:
        if encoder is None and objective.proj_coeff not in (0, ObjectiveConfig.proj_coeff):
            raise TimError(f"training config: objective.proj_coeff is {objective.proj_coeff} without an image encoder; pass one to "
                           "tim_core.training.run")


def name_of(encoder: ImageEncoder | None) -> str:
    """The encoder's `name`, under which features are cached; empty without an encoder. TimError if it has none."""
    name = "" if encoder is None else getattr(encoder, "name", None)
    if not isinstance(name, str):
        raise TimError("image_encoder: it has no name, and features are cached by name; set its attribute `name`, a text that changes with "
                       "its weights")
    return name


@torch.no_grad()
def image_features(encoder: ImageEncoder, images: Tensor, latents: Tensor, config: TransformerConfig) -> Tensor:
    """The encoder's features (B, N, z_dim) of images (B, 3, H, W), N being the number of tokens. TimError for another shape."""
    features = encoder(images)
    shape = [len(images), latents.shape[-2] * latents.shape[-1] // config.patch_size**2, config.z_dim]
    if list(features.shape) != shape:
        raise TimError(f"image_encoder: features {list(features.shape)} for images {list(images.shape)}; return features of shape {shape}")
    return features.float()
