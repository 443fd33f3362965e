"""What upscaling needs of core: its upscale models, and a network that sees large latents in tiles."""

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.upscale import in_tiles
from .log import say
from .model import size_multiple, tim_model


def enlarge_with_model(upscale_model, images: Tensor) -> Tensor:
    """Images (B, h, w, 3) through an UPSCALE_MODEL, as core's node does it, with its tiles and its fallback."""
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel  # brings spandrel, which ComfyUI loads with its own nodes

    return ImageUpscaleWithModel.execute(upscale_model, images).result[0]


def with_tiles(model, pixels: int) -> comfy.model_patcher.ModelPatcher:
    """A clone whose network sees latents in tiles of this side, rounded to size_multiple. TimError below two multiples."""
    multiple, factor = size_multiple(model), tim_model(model).latent_format.spacial_downscale_ratio
    side = int(pixels / multiple + 0.5) * multiple
    if side < 2 * multiple:
        raise TimError(f"tile_size: {pixels} is too small; use {2 * multiple} pixels or more, or 0 for the whole image")

    made_for = tim_model(model).model_config.defaults
    if side < made_for.width and (line := made_for.far_size(side, side)):  # a larger one may hold the whole image
        say(model.model_options["transformer_options"], f"tile_size: {line.removeprefix('size: ')}")

    def tiles(executor, x, *args, **kwargs):
        return in_tiles(lambda part: executor(part, *args, **kwargs), x, side // factor)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tim_tiles", tiles)
    return model
