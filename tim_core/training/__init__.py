"""Training: nothing in inference imports it."""

from pathlib import Path


def run(configs: list[str | Path]) -> list[Path]:
    """Runs training configurations one after the other; returns the files they made."""
    from .autoencoder import train_autoencoder
    from .config import AutoencoderTraining, TransitionTraining, read
    from .transition import train_transition

    runs = {AutoencoderTraining: train_autoencoder, TransitionTraining: train_transition}
    settings = [read(path, {"autoencoder": AutoencoderTraining, "tim": TransitionTraining}) for path in configs]
    return [runs[type(config)](config) for config in settings]
