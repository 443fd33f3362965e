"""The inputs that several nodes share, with one text and one range each."""

from comfy_api.latest import io

from ..tim_core.limits import MAX_CFG, MAX_SHIFT, MAX_SIDE, MAX_STEPS, MIN_SHIFT


def advanced(*inputs: io.Input) -> list[io.Input]:
    """Inputs that the editor shows on demand. As a plain option, since the class of older versions does not know it."""
    for each in inputs:
        each.extra_dict = {**(each.extra_dict or {}), "advanced": True}
    return list(inputs)


def conditioning_inputs() -> list[io.Conditioning.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="What the image should show."),
        io.Conditioning.Input("negative", tooltip="Negative prompt, usually empty."),
    ]


def side_input(name: str, default: int, minimum: int, tooltip: str) -> io.Int.Input:
    """A width or height in pixels."""
    return io.Int.Input(name, default=default, min=minimum, max=MAX_SIDE, step=8, tooltip=tooltip)


def steps_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=4, min=1, max=MAX_STEPS, tooltip=tooltip)


def step_list_input(default: str, tooltip: str) -> io.MultiType.Input:
    """Step counts as text; a number can be connected as well."""
    return io.MultiType.Input(io.String.Input("steps", default=default, tooltip=tooltip), [io.Int])


def time_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip)


def seed_input(tooltip: str = "Noise seed.") -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def cfg_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=2.5,
        min=1.0,
        max=MAX_CFG,
        step=0.1,
        round=0.01,
        tooltip="Guidance scale; 1 turns CFG off. A step with CFG runs the network twice.",
    )


def interval_inputs() -> list[io.Float.Input]:
    """The interval of a MODEL."""
    return [
        time_input("guidance_low", 0.0, "CFG acts only at times above this value."),
        time_input(
            "guidance_high",
            1.0,
            "CFG acts only at times below this value. At 1 the first step from pure noise runs without CFG, so a one-step image has none.",
        ),
    ]


def limit_inputs() -> list[io.Float.Input]:
    """The limits of a sampler node; at their defaults the interval is that of the MODEL."""
    return [
        time_input("guidance_low", 0.0, "CFG acts only at times above this value; 0 keeps the model's own limit."),
        time_input(
            "guidance_high",
            1.0,
            "CFG acts only at times below this value; 1 keeps the model's own limit. The first step from pure noise runs without CFG, so "
            "a one-step image has none.",
        ),
    ]


def shift_input(tooltip: str, optional: bool = False) -> io.Float.Input:
    return io.Float.Input("shift", default=1.0, min=MIN_SHIFT, max=MAX_SHIFT, step=0.1, round=0.01, optional=optional, tooltip=tooltip)


def stochasticity_input() -> io.Float.Input:
    return io.Float.Input(
        "stochasticity",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Share of fresh noise in each step, except a step from time 1 or to time 0; 0 is deterministic. Meant for many steps. "
        "Give chained samplers different seeds.",
    )


def time_inputs() -> list[io.Float.Input]:
    return [
        time_input("start", 1.0, "Start time: 1 starts from noise, a lower value keeps part of the latent. All steps run either way."),
        time_input("end", 0.0, "End time: 0 finishes the image, a higher value leaves it for another sampler."),
    ]
