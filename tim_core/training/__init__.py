"""Training. Inference does not import it."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ..errors import TimError
from ..files import check_new_output, user_path

INPUTS = ("model", "text_encoder", "autoencoder", "start")  # keys whose values name weights


def run(configs: list[str | Path], image_encoder: Callable[[Tensor], Tensor] | None = None) -> list[Path | None]:
    """Runs training configurations one after another; returns the files they wrote (None in all processes but the main one).

    image_encoder: maps images (B, 3, H, W) in [-1, 1] to features (B, N, z_dim), one row per token of the transformer. It adds the REPA
    term (arXiv 2410.06940) with weight objective.proj_coeff; the transformer must have a projector.
    """
    try:
        from .config import read
    except ModuleNotFoundError as error:
        raise TimError(f"training needs the package {error.name}; run: pip install {error.name}") from None
    from .kinds import kind_of
    from .loop import train

    read_configs = [read(path) for path in configs]
    for path, config in zip(configs, read_configs):
        check_outputs(config, path)
    made: list[Path | None] = []
    for path, config in zip(configs, read_configs):
        check_outputs(config, path)  # a run before it may have made an input
        made.append(train(config.loop, kind_of(config).make_task(config, image_encoder)))
    return made


def check_outputs(config, path: str | Path) -> None:
    """TimError if a run cannot write its files, or would replace an input. Nothing is made. path: of the configuration."""
    from ..weights.parts import BUNDLED
    from ..weights.save import check_output_path
    from . import metrics

    folder = user_path(config.output)
    above = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not above.is_dir():
        raise TimError(f"output: {above} is a file; name a folder")
    names = [value for key in INPUTS if (value := getattr(config, key, None))]
    inputs = [path, *(BUNDLED.get(name, name) for name in names)]
    if (data := getattr(config.data, "path", None)) is not None:
        if (images := user_path(data)).is_dir() and folder.resolve().is_relative_to(images.resolve()):
            raise TimError(f"output: {folder} is inside data.path; name a folder outside {images}")
        inputs += [] if images.is_dir() else [images]
    if config.checkpoint:
        check_output_path(config.export_path(config.loop.steps))
    for file in (*{config.export_path(0), config.export_path(config.loop.steps)}, folder / metrics.NAME, *_saved(config, folder)):
        check_new_output(file, inputs)
    metrics.check(folder)
    if (cache := getattr(config.data, "cache_folder", None)) is not None and os.path.lexists(cache) and not cache.is_dir():
        raise TimError(f"data.cache: {cache} is a file; name a folder")


def _saved(config, folder: Path) -> Iterator[Path]:
    """The paths of a run's checkpoints and sample images that exist already in its folder."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if found := re.fullmatch(r"(?:step|sample)-([0-9]{8,12})\.(?:pt|png)", file.name):
            step = int(found[1])
            if step == config.loop.steps or step < config.loop.steps and step % config.loop.save_every == 0:
                yield file
