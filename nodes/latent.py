"""Empty latents."""

from comfy_api.latest import io

from .compat import schema
from .model import empty_latent

MAX_SIDE = 4096  # pixels: what the released model was trained up to


class TiMEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TiMEmptyLatent",
            display_name="Empty TiM Latent",
            category="TiM",
            description="An empty latent of the model's own channels and factor, for TiMSampler or KSampler.",
            search_aliases=["transition models", "empty latent image", "resolution"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model: it says how many pixels a latent cell is."),
                io.Int.Input(
                    "width",
                    default=64,
                    min=8,
                    max=MAX_SIDE,
                    step=8,
                    tooltip="Width of the picture in pixels, rounded to the model's factor (32, the bundled model 8). "
                    "The bundled model draws at 64, the released one at 1024 and up to 4096.",
                ),
                io.Int.Input(
                    "height",
                    default=64,
                    min=8,
                    max=MAX_SIDE,
                    step=8,
                    tooltip="Height of the picture in pixels, rounded like the width.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures to sample at once."),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="Zeros, for a sampler to start from noise.")],
        )

    @classmethod
    def execute(cls, model, width, height, batch_size) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(model, width, height, batch_size))
