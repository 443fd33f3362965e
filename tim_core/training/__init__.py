"""Training: nothing in inference imports it."""

from pathlib import Path


def run(configs: list[str | Path]) -> list[Path]:
    """Runs training configurations one after the other; returns the files they made."""
    from .autoencoder import train_autoencoder
    from .config import AutoencoderTraining, FineTuning, TransitionTraining, read
    from .finetune import train_finetuning
    from .transition import train_transition

    kinds = {"autoencoder": AutoencoderTraining, "tim": TransitionTraining, "finetune": FineTuning}
    runs = {AutoencoderTraining: train_autoencoder, TransitionTraining: train_transition, FineTuning: train_finetuning}
    settings = [read(path, kinds) for path in configs]
    return [runs[type(config)](config) for config in settings]
