"""One prompt and one noise at several step counts, and along a second axis."""

import time

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.images import check_pixels, contact_sheet, step_label, to_tensor
from ..tim_core.ranges import parse_counts, parse_numbers
from ..tim_core.sampler import check_guidance, check_seed
from .adapters.compat import Schema
from .adapters.log import log_once, show_progress
from .adapters.model import tim_model
from .adapters.sampling import count_evaluations, sample_latent, shared_progress, time_grid, with_shift
from .inputs import advanced, cfg_input, conditioning_inputs, limit_inputs, seed_input, step_list_input

NONE = "none"
AXES = (NONE, "cfg", "seed", "shift", "stochasticity")


class TiMStepSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMStepSweep",
            display_name="TiM Step Sweep",
            category="TiM",
            description="Renders one prompt at several step counts, from the same noise, on a labelled sheet; a second axis varies cfg, "
            "seed, shift or stochasticity.",
            search_aliases=["xy plot", "compare steps", "grid", "transition models"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                *conditioning_inputs(),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent that sets the size and, by its batch, the number of images in each cell. "
                    "Every image starts from noise."
                ),
                seed_input("Noise seed, the same for every cell unless axis is seed."),
                step_list_input(
                    "1, 2, 4, 8, 16, 32", "Step counts to compare: a list, a range such as 1-8, or a doubling range such as 1-32 x2.",
                ),
                cfg_input(),
                *advanced(*limit_inputs()),
                io.Combo.Input(
                    "axis",
                    options=list(AXES),
                    default=NONE,
                    optional=True,
                    tooltip="What changes from row to row. none: only the step count changes.",
                ),
                io.String.Input(
                    "axis_values",
                    default="",
                    optional=True,
                    tooltip="Values of axis, one for each row: a list, or a range such as 1-4 +0.5. Not used with none.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="SHEET", tooltip="All images, labelled with steps, network evaluations and seconds."),
                io.Image.Output(display_name="IMAGES", tooltip="The images as a batch, in the order of the sheet."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, latent_image, seed, steps, cfg, guidance_low, guidance_high, axis=NONE, axis_values=""
    ) -> io.NodeOutput:
        counts, values = parse_counts(steps, "steps"), read_axis(axis, axis_values)
        fixed = {"cfg": cfg, "seed": seed, "shift": 1.0, "stochasticity": 0.0}
        rows = [fixed if axis == NONE else {**fixed, axis: value} for value in values]
        cells, batch = len(rows) * len(counts), len(latent_image["samples"])
        factor = tim_model(model).latent_format.spacial_downscale_ratio
        height, width = (side * factor for side in latent_image["samples"].shape[-2:])
        check_pixels("sweep", cells * batch, width, height, "fewer steps or values, a smaller batch or a smaller size")
        model, evaluations = count_evaluations(log_once(model))
        models = [with_shift(model, row["shift"]) for row in rows]
        progress = shared_progress(model, 1 + sum(counts) * len(rows))
        interval = (guidance_low, guidance_high)

        def run(row: int, count: int, done: int):
            evaluations.clear()
            start_time, settings = time.perf_counter(), rows[row]
            sampled = sample_latent(
                models[row], positive, negative, latent_image, settings["seed"], settings["cfg"], time_grid(models[row], count), interval,
                settings["stochasticity"], callback=progress(done),
            )
            images = vae.decode(sampled["samples"])
            label = step_label(count, sum(evaluations) // batch, time.perf_counter() - start_time)
            return images, label if axis == NONE else f"{axis} {settings[axis]} · {label}"

        run(0, 1, 0)  # warm-up: the first run also loads the model
        cells = [(row, count) for row in range(len(rows)) for count in counts]
        images, labels, done = None, [], 1
        for i, (row, count) in enumerate(cells):
            place = "" if axis == NONE else f", {axis} {rows[row][axis]}"
            show_progress(f"{i + 1} of {len(cells)}: {count} step{'s' if count > 1 else ''}{place}")
            made, label = run(row, count, done)
            images = made.new_empty(len(cells), *made.shape) if images is None else images
            images[i] = made
            labels.append(label)
            done += count
        show_progress(f"{len(cells)} of {len(cells)}")
        sheet = contact_sheet(images, labels, None if axis == NONE else len(counts))
        return io.NodeOutput(to_tensor(sheet), images.flatten(0, 1))


def read_axis(axis: str, text: str) -> list[int | float]:
    """The values of the second axis; one, without meaning, if there is none. TimError for values that the axis cannot have."""
    if axis not in AXES:
        raise TimError(f"axis: '{axis}' is not offered; choose {', '.join(AXES)}")
    if axis == NONE:
        return [0]
    values = parse_numbers(text, "axis_values")
    for value in values:
        if axis == "cfg":
            check_guidance(value)
        elif axis == "stochasticity":
            check_guidance(1.0, stochasticity=value)
        elif axis == "seed":
            check_seed(value)
    return values
