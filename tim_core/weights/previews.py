"""Fits the linear map from latents to colours that live previews show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TimError
from ..files import user_path

CELLS_PER_CHANNEL = 2  # cells of different colours that a fit needs for each of its factors; fewer are explained by chance


@torch.no_grad()
def fit(autoencoder, images: Iterable[Tensor]) -> dict:
    """Fits mean colours of latent cells by least squares -> {"factors": C rows of 3, "bias": 3, "r2": share of variance explained}.

    images: (3, H, W) in [-1, 1], sides multiples of the autoencoder's factor. RGB in [-1, 1] is about latent @ factors + bias, as in
    ComfyUI's latent formats. TimError if there are no images, or too few colours to fit.
    """
    weight, latents, colours = next(autoencoder.parameters()), [], []
    for image in images:
        latent = autoencoder.encode(image[None].to(weight)).float().cpu()
        latents.append(latent[0].flatten(1).T)
        colours.append(F.avg_pool2d(image[None].float(), autoencoder.config.factor)[0].flatten(1).T)
    if not latents:
        raise TimError("previews: no images to fit on")
    x, y = torch.cat(latents).double(), torch.cat(colours).double()
    least = CELLS_PER_CHANNEL * (x.shape[1] + 1)
    if (different := len(y.mul(255).round().unique(dim=0))) < least:
        raise TimError(f"previews: the images have {different} colours; at least {least} are needed; give more images, or more varied ones")
    x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), 1)
    solution = torch.linalg.lstsq(x, y, driver="gelsd").solution
    explained = 1 - ((y - x @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum().clamp_min(1e-12)
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1], "r2": round(explained.item(), 3)}


def photographs(folder: str | Path, side: int, most: int = 200) -> Iterable[Tensor]:
    """The first `most` images of a folder, scaled and cropped -> (3, side, side) in [-1, 1]. TimError if there is none,
    or one cannot be read."""
    from PIL import ImageOps

    from ..images import ENDINGS, open_image

    files = sorted(file for file in user_path(folder).rglob("*") if file.suffix.lower() in ENDINGS and not file.is_dir())[:most]
    if not files:
        raise TimError(f"{folder}: no images in this folder ({', '.join(ENDINGS)})")
    for file in files:
        image = ImageOps.fit(open_image(file), (side, side))
        yield torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1) / 127.5 - 1
