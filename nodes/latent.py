"""Empty latents."""

from comfy_api.latest import io

from ..tim_core.errors import TimError
from .adapters.compat import Schema
from .adapters.sampling import empty_latent
from .inputs import MAX_SIDE, side_input

NAMES = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21", "5:2", "2:5")
RATIOS = {name: tuple(map(int, name.split(":"))) for name in NAMES}
MEGAPIXELS = {"0.25": 512**2, "1": 1024**2, "2": 2 * 1024**2, "4": 2048**2, "16": 4096**2}
CUSTOM = "custom"


def preset(ratio: str, megapixels: str) -> tuple[int, int]:
    """Width and height of a preset in pixels, scaled down where its long side is above MAX_SIDE. TimError if it is not offered."""
    if ratio not in RATIOS:
        raise TimError(f"aspect_ratio: '{ratio}' is not offered; choose {', '.join([CUSTOM, *RATIOS])}")
    if megapixels not in MEGAPIXELS:
        raise TimError(f"megapixels: '{megapixels}' is not offered; choose {', '.join(MEGAPIXELS)}")
    across, down = RATIOS[ratio]
    scale = min((MEGAPIXELS[megapixels] / (across * down)) ** 0.5, MAX_SIDE / max(across, down))
    return round(across * scale), round(down * scale)


class TiMEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMEmptyLatent",
            display_name="Empty TiM Latent",
            category="TiM",
            description="An empty latent of the model's own channels and pixels a cell, for TiMSampler or KSampler.",
            search_aliases=["transition models", "empty latent image", "resolution", "aspect ratio"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model: it says how many pixels a latent cell is."),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[CUSTOM, *RATIOS],
                    tooltip="Width to height. 'custom' takes width and height; any other sets both, with the megapixels, for the "
                    "released model (the smallest is 512x512).",
                ),
                io.Combo.Input(
                    "megapixels",
                    options=list(MEGAPIXELS),
                    default="1",
                    tooltip="Size of an aspect ratio's picture, 1 being 1024x1024; not used with 'custom'. It shrinks until the long "
                    "side is within 4096. The released model is at its best from 1 to 4.",
                ),
                side_input(
                    "width", 64, 8, "Width of the picture in pixels, with 'custom', rounded to a multiple of 32 (16 for classes at 256, "
                    "8 for the bundled model). The bundled model draws at 64, the released one at 1024 and up to 4096.",
                ),
                side_input("height", 64, 8, "Height of the picture in pixels, with 'custom', rounded like the width."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures to sample at once."),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="Zeros, for a sampler to start from noise.")],
        )

    @classmethod
    def execute(cls, model, aspect_ratio, megapixels, width, height, batch_size) -> io.NodeOutput:
        if aspect_ratio != CUSTOM:
            width, height = preset(aspect_ratio, megapixels)
        return io.NodeOutput(empty_latent(model, width, height, batch_size))
