"""Sampling along TiM's time grid: in one node, split between several, or in the parts of custom sampling."""

from comfy_api.latest import io

from ..tim_core import schedule
from ..tim_core.errors import TimError
from ..tim_core.sampler import MODES
from .adapters.compat import Schema
from .adapters.guidance import with_interval
from .adapters.model import tim_model
from .adapters.sampling import check_sigmas, sample_latent, time_grid, transition_sampler, with_shift
from .inputs import (
    advanced,
    cfg_input,
    conditioning_inputs,
    interval_inputs,
    limit_inputs,
    seed_input,
    shift_input,
    steps_input,
    stochasticity_input,
    time_inputs,
)


class TiMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMSampler",
            display_name="TiM Sampler",
            category="TiM",
            description="Samples a TiM model in any number of steps; chain several to split one run. "
            "Time runs from 1 (noise) to 0 (image).",
            search_aliases=["few step", "one step", "ksampler", "ksampler advanced", "transition models"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model, with or without LoRAs."),
                *conditioning_inputs(),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent, or an image to start from. Areas outside a noise mask are kept."
                ),
                seed_input(),
                steps_input("Number of equal steps from start to end. 1 makes an image, 4 a better one, 16 to 64 the best."),
                cfg_input(),
                *advanced(
                    *limit_inputs(),
                    stochasticity_input(),
                    *time_inputs(),
                    io.Boolean.Input(
                        "add_noise",
                        default=True,
                        tooltip="On for an empty latent or a finished image. Off for a latent that another sampler left at the start time.",
                    ),
                    io.Boolean.Input(
                        "return_with_leftover_noise",
                        default=True,
                        tooltip="Used only when end is above 0. On: the latent keeps its noise for the next sampler, TiM Sampler or "
                        "KSampler (Advanced). Off: the last step goes to 0 instead of end and finishes the image.",
                    ),
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="Times of the steps, in falling order, between 1 and 0. They replace steps, shift, "
                    "start and end."
                ),
                *advanced(
                    shift_input(
                        "Above 1: denser steps at high noise. Below 1: denser steps near the image. 1: the model's own times. Works as "
                        "ModelSamplingSD3, and shifts start and end too.",
                        optional=True,
                    )
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The sampled latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, guidance_low, guidance_high, stochasticity, start, end, add_noise,
        return_with_leftover_noise, sigmas=None, shift=1.0,
    ) -> io.NodeOutput:
        model = with_shift(model, shift)
        times = time_grid(model, steps, start, end) if sigmas is None else check_sigmas(sigmas).clone()
        if not add_noise and times[0] >= 1:
            where = f"start is {start:g}" if sigmas is None else f"sigmas start at {float(times[0]):g}"
            raise TimError(f"add_noise: off, but {where}; turn it on, or start at the time at which another sampler stopped")
        if not return_with_leftover_noise:
            times[-1] = 0.0
        interval = guidance_low, guidance_high
        return io.NodeOutput(
            sample_latent(model, positive, negative, latent_image, seed, cfg, times, interval, stochasticity, add_noise)
        )


class TiMSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMSamplerSelect",
            display_name="TiM Sampler Select",
            category="TiM",
            description="TiM's sampler for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["custom sampling", "ksampler select", "transition models"],
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="transition: the network is given the end time of each step, as in training. diffusion: ordinary flow "
                    "matching, which needs many steps.",
                ),
                stochasticity_input(),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, mode, stochasticity) -> io.NodeOutput:
        return io.NodeOutput(transition_sampler(mode, stochasticity))


class TiMScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMScheduler",
            display_name="TiM Scheduler",
            category="TiM",
            description="The step times of a TiM model as sigmas, for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["sigmas", "timesteps", "basic scheduler", "transition models"],
            inputs=[
                steps_input("Number of steps from start to end."),
                *time_inputs(),
                shift_input("1: equal steps, as published. Above 1: denser steps at high noise. Below 1: denser steps near the image."),
                io.String.Input(
                    "times",
                    default="",
                    tooltip="Custom times in falling order, such as 1, 0.7, 0.3, 0. They replace steps, start, end and shift.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="The times, one more than the steps.")],
        )

    @classmethod
    def execute(cls, steps, start, end, shift, times) -> io.NodeOutput:
        grid = schedule.parse(times) if times.strip() else schedule.shifted(steps, shift, start, end)
        return io.NodeOutput(grid.float())


class TiMGuidanceInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMGuidanceInterval",
            display_name="TiM Guidance Interval",
            category="TiM",
            description="Limits CFG to part of the run, for KSampler and custom sampling. TiM Sampler, TiM Native Upscale and TiM Step "
            "Sweep have these inputs themselves.",
            search_aliases=["cfg interval", "guidance limit", "transition models"],
            inputs=[io.Model.Input("model", tooltip="A TiM model."), *interval_inputs()],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model, with CFG inside the interval only.")],
        )

    @classmethod
    def execute(cls, model, guidance_low, guidance_high) -> io.NodeOutput:
        tim_model(model)
        return io.NodeOutput(with_interval(model, guidance_low, guidance_high))
