"""Training. Inference does not import it."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import TimError
from ..files import user_path


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
    """Runs one configuration. TimError, before any work, if its files cannot be written."""
    from ..weights.save import check_output_path
    from .kinds import kind_of
    from .loop import train

    folder = user_path(config.output)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise TimError(f"output: {above} is a file; name a folder")
    if config.checkpoint:
        check_output_path(config.export_path(config.loop.steps))
    if folder.is_dir():
        check_output_path(config.export_path(0))
    return train(config.loop, kind_of(config).make_task(config, image_encoder))
