"""Empty latents."""

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.limits import MAX_BATCH, MAX_SIDE
from .adapters.compat import Schema
from .adapters.sampling import empty_latent
from .inputs import side_input

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
            description="An empty latent sized for the connected TiM model, for TiM Sampler or KSampler.",
            search_aliases=["aspect ratio", "resolution", "empty latent image", "transition models"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model; it sets the number of latent channels and the downscale factor."),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[CUSTOM, *RATIOS],
                    tooltip="Width to height. custom uses the inputs width and height. Any other ratio sets both from megapixels, in sizes "
                    "for the released model, 512x512 and up.",
                ),
                io.Combo.Input(
                    "megapixels",
                    options=list(MEGAPIXELS),
                    default="1",
                    tooltip="Number of pixels for the chosen aspect ratio; 1 is 1024x1024. Not used with custom. The long side is limited "
                    "to 4096. The released model is best from 1 to 4.",
                ),
                side_input(
                    "width", 64, 8, "Image width in pixels for custom, rounded to a multiple of 32 (16 for class models at 256x256, 8 for "
                    "the demo model). The demo model draws at 64, the released model at 1024 and up to 4096.",
                ),
                side_input("height", 64, 8, "Image height in pixels for custom, rounded like the width."),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, tooltip="Number of images to sample at once."),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="An empty latent, for a sampler that starts from noise.")],
        )

    @classmethod
    def execute(cls, model, aspect_ratio, megapixels, width, height, batch_size) -> io.NodeOutput:
        if aspect_ratio != CUSTOM:
            width, height = preset(aspect_ratio, megapixels)
        return io.NodeOutput(empty_latent(model, width, height, batch_size))
