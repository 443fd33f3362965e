"""Empty latents."""

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.limits import MAX_BATCH, MAX_SIDE
from .adapters.compat import Schema
from .adapters.model import tim_model
from .adapters.sampling import empty_latent, fitting_size
from .inputs import advanced, side_input

NAMES = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21", "5:2", "2:5")
RATIOS = {name: tuple(map(int, name.split(":"))) for name in NAMES}
AREAS = {"1": 1, "2": 2, "4": 4, "16": 16}
NATIVE, CUSTOM = "native", "custom"


def preset(ratio: str, area: str, native: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of a ratio, with `area` times the pixels of the native size; the long side is at most MAX_SIDE.

    TimError if ratio or area is not offered.
    """
    if ratio not in (NATIVE, *RATIOS):
        raise TimError(f"aspect_ratio: '{ratio}' is not offered; choose {', '.join([NATIVE, *RATIOS, CUSTOM])}")
    if area not in AREAS:
        raise TimError(f"area_factor: '{area}' is not offered; choose {', '.join(AREAS)}")
    across, down = RATIOS.get(ratio, native)
    pixels = native[0] * native[1] * AREAS[area]
    scale = min((pixels / (across * down)) ** 0.5, MAX_SIDE / max(across, down))
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
                io.Model.Input(
                    "model", tooltip="A TiM model; it sets the native size, the number of latent channels and the downscale factor."
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[NATIVE, *RATIOS, CUSTOM],
                    default=NATIVE,
                    tooltip="Width to height. native is the size that the model is made for: 64x64 for the demo model, 1024x1024 for the "
                    "released one. custom uses the inputs width and height.",
                ),
                io.Combo.Input(
                    "area_factor",
                    options=list(AREAS),
                    default="1",
                    tooltip="Number of pixels as a multiple of the model's native size: at 4 the sides are twice as long. Not used with "
                    "custom. The long side is limited to 4096.",
                ),
                side_input(
                    "width", 0, 0, "Image width in pixels for custom, rounded to a multiple of 32 (16 for class models at 256x256, 8 for "
                    "the demo model). 0: the model's native width.",
                ),
                side_input("height", 0, 0, "Image height in pixels for custom, rounded like the width. 0: the model's native height."),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, tooltip="Number of images to sample at once."),
                *advanced(
                    io.Boolean.Input(
                        "swap", optional=True, default=False, tooltip="Swaps width and height, however they were chosen."
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="An empty latent, for a sampler that starts from noise."),
                io.Int.Output(display_name="width", tooltip="Image width in pixels, as rounded."),
                io.Int.Output(display_name="height", tooltip="Image height in pixels, as rounded."),
            ],
        )

    @classmethod
    def execute(cls, model, aspect_ratio, area_factor, width, height, batch_size, swap=False) -> io.NodeOutput:
        made_for = tim_model(model).model_config.defaults
        native = made_for.width, made_for.height
        if aspect_ratio == CUSTOM:
            size = width or native[0], height or native[1]
        else:
            size = fitting_size(model, *preset(aspect_ratio, area_factor, native))
        width, height = size[::-1] if swap else size
        latent = empty_latent(model, width, height, batch_size)
        return io.NodeOutput(latent, *fitting_size(model, width, height))
