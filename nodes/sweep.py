"""One prompt and one noise at several step counts."""

import time

from comfy_api.latest import io

from ..tim_core.errors import TimError
from ..tim_core.images import contact_sheet, step_label, to_tensor
from .adapters.compat import Schema
from .adapters.log import log_once
from .adapters.sampling import as_batch, count_evaluations, first_of_batch, sample_latent, shared_progress, time_grid
from .inputs import advanced, cfg_input, conditioning_inputs, limit_inputs, seed_input, step_list_input


def step_counts(text: str | int) -> list[int]:
    """ "1, 2, 4" -> [1, 2, 4], 4 -> [4]. TimError unless all are whole numbers of at least 1."""
    words = str(text).replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise TimError(f"steps: '{text}' is not a list of whole numbers of at least 1, such as 1, 2, 4, 8")
    return [int(word) for word in words]


class TiMStepSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMStepSweep",
            display_name="TiM Step Sweep",
            category="TiM",
            description="Renders one prompt at several step counts, from the same noise, on a labelled sheet.",
            search_aliases=["xy plot", "compare steps", "grid", "transition models"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                *conditioning_inputs(),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent that sets the size; of a batch only the first is used. Every image starts "
                    "from noise."
                ),
                seed_input("Noise seed, the same for every step count."),
                step_list_input("1, 2, 4, 8, 16, 32", "Step counts to compare."),
                cfg_input(),
                *advanced(*limit_inputs()),
            ],
            outputs=[
                io.Image.Output(display_name="SHEET", tooltip="All images, labelled with steps, network evaluations and seconds."),
                io.Image.Output(display_name="IMAGES", tooltip="The images as a batch, in the order of the step counts."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, latent_image, seed, steps, cfg, guidance_low, guidance_high
    ) -> io.NodeOutput:
        counts = step_counts(steps)
        model, rows = count_evaluations(log_once(model))
        latent, interval = first_of_batch(latent_image), (guidance_low, guidance_high)
        progress = shared_progress(model, 1 + sum(counts))

        def run(count: int, done: int):
            rows.clear()
            start_time = time.perf_counter()
            sampled = sample_latent(
                model, positive, negative, latent, seed, cfg, time_grid(model, count), interval, callback=progress(done)
            )
            return vae.decode(sampled["samples"])[0], step_label(count, sum(rows), time.perf_counter() - start_time)

        run(1, 0)  # warm-up: the first run also loads the model
        shown = [run(count, 1 + sum(counts[:i])) for i, count in enumerate(counts)]
        images = [image for image, _ in shown]
        return io.NodeOutput(to_tensor(contact_sheet(images, [label for _, label in shown])), as_batch(images))
