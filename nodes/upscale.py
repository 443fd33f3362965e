"""Upscaling at native resolution."""

import logging

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.upscale import MAX_STAGES, stage_sizes, stage_steps, target_size, upscale
from .adapters.compat import Schema
from .adapters.model import size_multiple
from .adapters.sampling import sample_latent, shared_progress
from .inputs import MAX_SIDE, cfg_input, conditioning_inputs, interval_inputs, seed_input, side_input, stochasticity_input


class TiMNativeUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMNativeUpscale",
            display_name="TiM Native Upscale",
            category="TiM",
            description="Draws a picture again at a larger size: enlarges it, mixes noise in and samples it as a whole, no tiles, "
            "in one or several stages.",
            search_aliases=["transition models", "hires fix", "upscale image", "ultimate sd upscale"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model."),
                io.Vae.Input("vae", tooltip="The model's VAE; it works in blended tiles where memory is short."),
                *conditioning_inputs(),
                io.Image.Input("image", optional=True, tooltip="The picture to enlarge. Connect this or latent."),
                io.Latent.Input("latent", optional=True, tooltip="The picture to enlarge, as a finished latent. Connect this or image."),
                seed_input("The noise that is mixed in."),
                io.Float.Input(
                    "factor",
                    default=2.0,
                    min=0.25,
                    max=16.0,
                    step=0.25,
                    round=0.001,
                    tooltip="How many times larger, where width and height are both 0.",
                ),
                side_input(
                    "width", 0, 0, "Width to reach in pixels, rounded to a multiple of 32 (16 for classes at 256, 8 for the bundled "
                    "model). 0: by the height and the picture's proportions.",
                ),
                side_input(
                    "height", 0, 0, "Height to reach in pixels, 0: by the width. Where both are given, what other proportions leave over "
                    "is cut off.",
                ),
                io.Int.Input(
                    "stages",
                    default=1,
                    min=1,
                    max=MAX_STAGES,
                    tooltip="Enlargements on the way, by equal factors: 1024 to 4096 in 2 stages goes over 2048.",
                ),
                io.String.Input(
                    "steps",
                    default="4",
                    tooltip="Number of steps of every stage, or one number for each: 8, 4.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="The time that the enlarged picture is noised to, and sampling starts from: low keeps the picture, high "
                    "draws more of it anew. All steps run, whatever it is.",
                ),
                cfg_input(),
                *interval_inputs(),
                stochasticity_input(),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The picture at its new size."),
                io.Latent.Output(display_name="LATENT", tooltip="The same as a latent, for another sampler."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, seed, factor, width, height, stages, steps, strength, cfg, guidance_low, guidance_high,
        stochasticity, image=None, latent=None,
    ) -> io.NodeOutput:
        if (image is None) == (latent is None):
            found = "neither" if image is None else "both"
            raise TimError(f"TiMNativeUpscale: found {found} of image and latent connected, expected one of them")
        multiple, counts = size_multiple(model), stage_steps(steps, stages)
        images = (vae.decode(latent["samples"]) if image is None else image)[..., :3]
        images = images.expand(*images.shape[:3], 3)  # of a mask or a depth map
        places = {"batch_index": latent["batch_index"]} if latent and "batch_index" in latent else {}
        size = images.shape[2], images.shape[1]
        target = target_size(*size, width, height, factor)
        sizes = stage_sizes(size, target, stages, multiple)
        if max(sizes[-1]) > MAX_SIDE:
            raise TimError(f"size: found {sizes[-1][0]}x{sizes[-1][1]} pixels, expected at most {MAX_SIDE} a side")
        if sizes[-1] != target:
            logging.info(f"TiMNativeUpscale: {target[0]}x{target[1]} becomes {sizes[-1][0]}x{sizes[-1][1]}, multiples of {multiple}")
        progress = shared_progress(model, sum(counts))

        def sample(samples, times, stage):
            interval, callback = (guidance_low, guidance_high), progress(sum(counts[:stage]))
            start = {"samples": samples, **places}
            return sample_latent(
                model, positive, negative, start, seed, cfg, times, interval, stochasticity, callback=callback
            )["samples"]

        images, samples = upscale(images, sizes, counts, strength, encode=vae.encode, sample=sample, decode=vae.decode)
        return io.NodeOutput(images, {"samples": samples})
