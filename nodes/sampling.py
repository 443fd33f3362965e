"""Sampling along a time grid of our own."""

from comfy_api.latest import io

from ..tim_core import schedule
from .compat import schema
from .model import sample_latent


class TiMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TiMSampler",
            display_name="TiM Sampler",
            category="TiM",
            description="Samples a TiM model in any number of equal steps, each a transition from one time to the next. "
            "Time runs from 1 (noise) to 0 (picture).",
            search_aliases=["transition models", "ksampler", "few-step"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model, patched or not."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What guidance leads away from; an empty prompt is the usual one."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or one to start from. A noise mask keeps what it leaves out."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise. The same seed and settings give the same picture in `tim sample`.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=10000,
                    tooltip="Steps of equal length between start and end. One is enough for a picture; more are better.",
                ),
                io.Float.Input(
                    "cfg",
                    default=2.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Strength of the guidance; 1 is none. Guided steps cost two evaluations.",
                ),
                io.Float.Input(
                    "guidance_low",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps are guided only where their time is above this.",
                ),
                io.Float.Input(
                    "guidance_high",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps are guided only where their time is below this. At 1, as published, the first step from pure noise "
                    "is not guided, so a one-step picture has no guidance.",
                ),
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The first time: 1 starts from noise, less keeps part of the latent. All steps are taken either way.",
                ),
                io.Float.Input(
                    "end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The last time: 0 is the finished picture, more leaves noise for another sampler.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The sampled latent, for VAEDecode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, guidance_low, guidance_high, start, end
    ) -> io.NodeOutput:
        times, interval = schedule.uniform(steps, start, end), (guidance_low, guidance_high)
        return io.NodeOutput(sample_latent(model, positive, negative, latent_image, seed, cfg, times, interval))
