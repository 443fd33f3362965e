"""Training. Inference does not import it."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def run(configs: list[str | Path], image_encoder: Callable[[Tensor], Tensor] | None = None) -> list[Path | None]:
    """Runs training configurations one after another; returns the files they wrote (None in all processes but the main one).

    image_encoder: maps images (B, 3, H, W) in [-1, 1] to features (B, N, z_dim), one row per token of the transformer. It adds the REPA
    term (arXiv 2410.06940) with weight objective.proj_coeff; the transformer must have a projector.
    """
    from .autoencoder import train_autoencoder
    from .config import AutoencoderTraining, FineTuning, TransitionTraining, read
    from .finetune import train_finetuning
    from .transition import train_transition

    kinds = {"autoencoder": AutoencoderTraining, "tim": TransitionTraining, "finetune": FineTuning}
    runs = {AutoencoderTraining: train_autoencoder, TransitionTraining: train_transition, FineTuning: train_finetuning}
    settings = [read(path, kinds) for path in configs]
    return [runs[type(config)](config, image_encoder) for config in settings]
