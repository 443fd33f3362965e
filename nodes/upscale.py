"""Upscaling at native resolution."""

import logging

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.limits import MAX_FACTOR, MAX_SIDE, MAX_STAGES, MIN_FACTOR
from ..tim_core.upscale import RESIZE_METHODS, crop_mask, enlarge, stage_sizes, stage_steps, target_size, upscale
from .adapters.compat import Schema
from .adapters.enlarging import enlarge_with_model, with_tiles
from .adapters.log import log_once
from .adapters.model import size_multiple, tim_model
from .adapters.sampling import sample_latent, shared_progress, time_grid
from .inputs import (
    advanced,
    cfg_input,
    conditioning_inputs,
    limit_inputs,
    seed_input,
    side_input,
    step_list_input,
    stochasticity_input,
)


class TiMNativeUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMNativeUpscale",
            display_name="TiM Native Upscale",
            category="TiM",
            description="Re-renders an image larger, as a whole: enlarges it, adds noise and samples it again, in one or several stages.",
            search_aliases=["hires fix", "upscale image", "ultimate sd upscale", "transition models"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model."),
                io.Vae.Input("vae", tooltip="The model's VAE; it switches to blended tiles when memory is short."),
                *conditioning_inputs(),
                io.Image.Input("image", optional=True, tooltip="The image to enlarge. Connect image or latent."),
                io.Latent.Input("latent", optional=True, tooltip="The image to enlarge, as a finished latent. Connect image or latent."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White areas (1) are redrawn, black areas (0) only enlarged. Without a mask the whole "
                    "image is redrawn."
                ),
                io.UpscaleModel.Input(
                    "upscale_model", optional=True, tooltip="From Load Upscale Model; enlarges the image before it is sampled. Without "
                    "one the image is resized."
                ),
                seed_input(),
                step_list_input("4", "Steps per stage: one number for all stages, or one for each, such as 8, 4."),
                cfg_input(),
                io.Float.Input(
                    "strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="Start time of the sampling: a low value keeps the image, a high value changes more of it. All steps run "
                    "either way. 0: the model's default, 0.3 for the demo model, 0.5 for the released one.",
                ),
                io.Float.Input(
                    "factor",
                    default=2.0,
                    min=MIN_FACTOR,
                    max=MAX_FACTOR,
                    step=0.25,
                    round=0.001,
                    tooltip="Enlargement of width and height, used when width and height are both 0.",
                ),
                side_input(
                    "width", 0, 0, "Target width in pixels, rounded to a multiple of 32 (16 for class models at 256x256, 8 for the demo "
                    "model). 0: follows the height.",
                ),
                side_input(
                    "height", 0, 0, "Target height in pixels. 0: follows the width. With both set, the image is cropped if the aspect "
                    "ratio differs.",
                ),
                io.Int.Input(
                    "stages",
                    default=1,
                    min=1,
                    max=MAX_STAGES,
                    tooltip="Number of enlargements, by equal factors: 1024 to 4096 in 2 stages passes 2048.",
                ),
                *advanced(
                    *limit_inputs(),
                    stochasticity_input(),
                    io.Combo.Input(
                        "resize_method",
                        options=list(RESIZE_METHODS),
                        default=RESIZE_METHODS[0],
                        optional=True,
                        tooltip="How the image is resized before it is sampled, or after the upscale model.",
                    ),
                    io.Int.Input(
                        "tile_size",
                        default=0,
                        min=0,
                        max=MAX_SIDE,
                        step=8,
                        optional=True,
                        tooltip="Side in pixels of the tiles that the network sees, for images that do not fit in memory. 0: the whole "
                        "image, which is better. Tiles overlap by a quarter and are blended in every step.",
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The enlarged image."),
                io.Latent.Output(display_name="LATENT", tooltip="The enlarged image as a latent, for another sampler."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, seed, steps, cfg, strength, factor, width, height, stages, guidance_low, guidance_high,
        stochasticity, image=None, latent=None, mask=None, upscale_model=None, resize_method=RESIZE_METHODS[0], tile_size=0,
    ) -> io.NodeOutput:
        if (image is None) == (latent is None):
            found = "neither is" if image is None else "both are"
            raise TimError(f"image, latent: {found} connected; connect exactly one of them")
        if latent is not None and not bool(latent["samples"].any()):
            raise TimError("latent: empty, there is no image to enlarge; connect the latent that a sampler returns, or an image")
        multiple, counts = size_multiple(model), stage_steps(steps, stages)
        model = with_tiles(log_once(model), tile_size) if tile_size else log_once(model)
        images = (vae.decode(latent["samples"]) if image is None else image)[..., :3]
        images = images.expand(*images.shape[:3], 3)  # masks and depth maps have one channel
        mask = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
        places = {"batch_index": latent["batch_index"]} if latent and "batch_index" in latent else {}
        size = images.shape[2], images.shape[1]
        target = target_size(*size, width, height, factor)
        sizes = stage_sizes(size, target, stages, multiple)
        if sizes[-1] != target:
            logging.info(f"TiM Native Upscale: {target[0]}x{target[1]} rounded to {sizes[-1][0]}x{sizes[-1][1]}, multiples of {multiple}")
        strength = strength or tim_model(model).model_config.defaults.strength
        progress = shared_progress(model, sum(counts))

        def resize(images, width, height):
            if upscale_model is not None and (width > images.shape[2] or height > images.shape[1]):
                images = enlarge_with_model(upscale_model, images)
            return enlarge(images, width, height, resize_method)

        def sample(samples, times, stage):
            interval, callback = (guidance_low, guidance_high), progress(sum(counts[:stage]))
            start, times = {"samples": samples, **places}, time_grid(model, counts[stage], float(times[0]))
            if mask is not None:
                start["noise_mask"] = crop_mask(mask, size, *sizes[stage])[:, None]
            return sample_latent(
                model, positive, negative, start, seed, cfg, times, interval, stochasticity, callback=callback
            )["samples"]

        images, samples = upscale(
            images, sizes, counts, strength, encode=vae.encode, sample=sample, decode=vae.decode, resize=resize, mask=mask
        )
        return io.NodeOutput(images, {"samples": samples})
