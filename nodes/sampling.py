"""Sampling along a time grid of our own: in one node, in several that share a trajectory, or in the parts of custom sampling."""

from comfy_api.latest import io

from ..tim_core import schedule
from ..tim_core.errors import TimError
from ..tim_core.sampler import MODES
from .adapters.compat import Schema
from .adapters.model import tim_model, with_interval
from .adapters.sampling import sample_latent, transition_sampler
from .inputs import cfg_input, conditioning_inputs, interval_inputs, seed_input, steps_input, stochasticity_input, time_inputs


class TiMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMSampler",
            display_name="TiM Sampler",
            category="TiM",
            description="Samples a TiM model in any number of equal steps, each a transition from one time to the next. "
            "Time runs from 1 (noise) to 0 (picture); several of these nodes can share it, each with its own steps.",
            search_aliases=["transition models", "ksampler", "ksampler advanced", "few-step"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model, patched or not."),
                *conditioning_inputs(),
                io.Latent.Input("latent_image", tooltip="An empty latent, or one to start from. A noise mask keeps what it leaves out."),
                seed_input("The noise. The same seed and settings give the same picture in `tim sample`."),
                steps_input("Steps of equal length between start and end. One is enough for a picture; more are better."),
                cfg_input(),
                *interval_inputs(),
                stochasticity_input(),
                *time_inputs(),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    tooltip="On for an empty latent or a picture; off for what another sampler left unfinished at the time `start`.",
                ),
                io.Boolean.Input(
                    "return_with_leftover_noise",
                    default=True,
                    tooltip="Matters only where end is above 0. On: the latent keeps its noise, for the next sampler, ours or "
                    "KSamplerAdvanced. Off: the last step goes to 0 instead of to end, and the picture is finished.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The sampled latent, for VAEDecode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, guidance_low, guidance_high, stochasticity, start, end, add_noise,
        return_with_leftover_noise,
    ) -> io.NodeOutput:
        times, interval = schedule.uniform(steps, start, end), (guidance_low, guidance_high)
        if not add_noise and start >= 1:
            raise TimError("add_noise: found off with a start of 1, expected on, or the time below 1 at which another sampler stopped")
        if not return_with_leftover_noise:
            times[-1] = 0.0
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
            description="TiM's own sampler for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["transition models", "ksampler select", "custom sampling"],
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="transition: the network is told where each step goes, as it should be. diffusion: it is not, as in ordinary "
                    "flow matching, which needs many steps.",
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
            description="The times of TiM's steps, as SIGMAS for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["transition models", "sigmas", "timesteps", "basic scheduler"],
            inputs=[
                steps_input("Number of steps between start and end."),
                *time_inputs(),
                io.Float.Input(
                    "shift",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="1: steps of equal length, as published. Above 1 more of them are near noise, below 1 near the picture.",
                ),
                io.String.Input(
                    "times",
                    default="",
                    tooltip="A list of times of your own, such as 1, 0.7, 0.3, 0, each smaller than the one before. Where there is one, "
                    "steps, start, end and shift are not used.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="The times, one more than there are steps.")],
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
            description="The times at which a TiM model is guided, in KSampler and custom sampling. The other TiM nodes have their own.",
            search_aliases=["transition models", "cfg interval", "guidance limit"],
            inputs=[io.Model.Input("model", tooltip="A TiM model."), *interval_inputs()],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model, guided inside the interval only; elsewhere cfg is 1.")],
        )

    @classmethod
    def execute(cls, model, guidance_low, guidance_high) -> io.NodeOutput:
        tim_model(model)
        return io.NodeOutput(with_interval(model, guidance_low, guidance_high))
