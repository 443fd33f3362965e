"""Training: nothing in inference imports it."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def run(configs: list[str | Path], image_encoder: Callable[[Tensor], Tensor] | None = None) -> list[Path | None]:
    """Runs training configurations one after the other; returns the files they made (of several processes, only the first knows them).

    image_encoder: pictures (B, 3, H, W) in [-1, 1] to features (B, N, z_dim), one for each token of the transformer, N = (H / unit) *
    (W / unit). With it a transformer that has a projector learns the REPA term, too (arXiv 2410.06940), with weight objective.proj_coeff.
    """
    from .autoencoder import train_autoencoder
    from .config import AutoencoderTraining, FineTuning, TransitionTraining, read
    from .finetune import train_finetuning
    from .transition import train_transition

    kinds = {"autoencoder": AutoencoderTraining, "tim": TransitionTraining, "finetune": FineTuning}
    runs = {AutoencoderTraining: train_autoencoder, TransitionTraining: train_transition, FineTuning: train_finetuning}
    settings = [read(path, kinds) for path in configs]
    return [runs[type(config)](config, image_encoder) for config in settings]
