"""One prompt and one noise at several numbers of steps."""

import time

from comfy_api.latest import io

from ..tim_core import schedule
from ..tim_core.errors import TimError
from ..tim_core.images import contact_sheet, step_label, to_tensor
from .adapters.compat import Schema
from .adapters.sampling import as_batch, count_evaluations, first_of_batch, sample_latent, shared_progress
from .inputs import cfg_input, conditioning_inputs, interval_inputs, seed_input


def step_counts(text: str) -> list[int]:
    """ "1, 2, 4" -> [1, 2, 4]; TimError for anything else than whole numbers of at least 1."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise TimError(f"steps: found '{text}', expected whole numbers of at least 1, such as 1, 2, 4, 8")
    return [int(word) for word in words]


class TiMStepSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TiMStepSweep",
            display_name="TiM Step Sweep",
            category="TiM",
            description="The same picture, from the same noise, at several numbers of steps: what more steps buy, on one labelled sheet.",
            search_aliases=["transition models", "xy plot", "compare steps", "grid"],
            inputs=[
                io.Model.Input("model", tooltip="A TiM model."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                *conditioning_inputs(),
                io.Latent.Input("latent_image", tooltip="An empty latent: its size is taken, and of a batch the first. Every picture "
                "starts from noise."),
                seed_input("The noise, the same for every number of steps."),
                io.String.Input("steps", default="1, 2, 4, 8, 16, 32", tooltip="Numbers of steps to compare."),
                cfg_input(),
                *interval_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="SHEET", tooltip="All pictures, with steps, network evaluations and seconds under each."),
                io.Image.Output(display_name="IMAGES", tooltip="The pictures as a batch, in the order of the steps."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, latent_image, seed, steps, cfg, guidance_low, guidance_high
    ) -> io.NodeOutput:
        counts = step_counts(steps)
        model, rows = count_evaluations(model)
        latent, interval = first_of_batch(latent_image), (guidance_low, guidance_high)
        progress = shared_progress(model, 1 + sum(counts))

        def run(count: int, done: int):
            rows.clear()
            start_time = time.perf_counter()
            sampled = sample_latent(
                model, positive, negative, latent, seed, cfg, schedule.uniform(count), interval, callback=progress(done)
            )
            return vae.decode(sampled["samples"])[0], step_label(count, sum(rows), time.perf_counter() - start_time)

        run(1, 0)  # the first run of all loads the model, and would count as slow
        shown = [run(count, 1 + sum(counts[:i])) for i, count in enumerate(counts)]
        images = [image for image, _ in shown]
        return io.NodeOutput(to_tensor(contact_sheet(images, [label for _, label in shown])), as_batch(images))
