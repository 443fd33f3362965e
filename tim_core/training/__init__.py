"""Training. Inference does not import it."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import TimError


def run(configs: list[str | Path], image_encoder: Callable[[Tensor], Tensor] | None = None) -> list[Path | None]:
    """Runs training configurations one after another; returns the files they wrote (None in all processes but the main one).

    image_encoder: maps images (B, 3, H, W) in [-1, 1] to features (B, N, z_dim), one row per token of the transformer. It adds the REPA
    term (arXiv 2410.06940) with weight objective.proj_coeff; the transformer must have a projector.
    """
    try:
        from .config import read
    except ModuleNotFoundError as error:
        raise TimError(f"training needs the package {error.name}; run: pip install {error.name}") from None
    return [_train(config, image_encoder) for config in [read(path) for path in configs]]


def _train(config, image_encoder: Callable[[Tensor], Tensor] | None) -> Path | None:
    """Runs one configuration. Fine-tuning loads nothing of the small world."""
    from .config import FineTuning

    if isinstance(config, FineTuning):
        from .finetune import train_finetuning

        return train_finetuning(config, image_encoder)
    from .autoencoder import train_autoencoder
    from .shapes_config import AutoencoderTraining
    from .transition import train_transition

    return train_autoencoder(config) if isinstance(config, AutoencoderTraining) else train_transition(config, image_encoder)
