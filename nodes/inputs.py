"""The inputs that several nodes share, so that they read and behave alike."""

from comfy_api.latest import io

MAX_SIDE = 4096  # pixels: what the released model was trained up to


def conditioning_inputs() -> list[io.Conditioning.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="What the picture should show."),
        io.Conditioning.Input("negative", tooltip="What guidance leads away from; an empty prompt is the usual one."),
    ]


def side_input(name: str, default: int, minimum: int, tooltip: str) -> io.Int.Input:
    """A width or height in pixels."""
    return io.Int.Input(name, default=default, min=minimum, max=MAX_SIDE, step=8, tooltip=tooltip)


def steps_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=4, min=1, max=10000, tooltip=tooltip)


def time_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip)


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def cfg_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=2.5,
        min=1.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="Strength of the guidance; 1 is none. Guided steps cost two evaluations.",
    )


def interval_inputs() -> list[io.Float.Input]:
    high = "Steps are guided only where their time is below this. At 1, as published, the first step from pure noise is not guided, "
    return [
        time_input("guidance_low", 0.0, "Steps are guided only where their time is above this."),
        time_input("guidance_high", 1.0, high + "so a one-step picture has no guidance."),
    ]


def stochasticity_input() -> io.Float.Input:
    return io.Float.Input(
        "stochasticity",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Share of fresh noise in every step that neither begins at time 1 nor ends at 0; 0 is deterministic. It is meant for many "
        "steps. Nodes that share a trajectory want seeds of their own.",
    )


def time_inputs() -> list[io.Float.Input]:
    return [
        time_input("start", 1.0, "The first time: 1 starts from noise, less keeps part of the latent. All steps run either way."),
        time_input("end", 0.0, "The last time: 0 is the finished picture, more is for another sampler to go on from."),
    ]
