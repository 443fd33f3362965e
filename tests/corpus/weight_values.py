"""Weights that are NaN, infinite, or of a kind or shape that the model cannot have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.corpus.case import Case, fails, generator, gives
from tests.corpus.originals import SAMPLE, Originals

STAGES = {"model.diffusion_model.": "transformer", "text_encoders.transformer.": "text encoder", "vae.decoder.": "VAE decoder"}
COMMANDS = {
    "sample": SAMPLE,
    "sweep": ("sweep", "a circle", "--steps", "1,2", "-o", "out.png"),
    "upscale": ("upscale", "image.png", "a circle", "--steps", "2", "-o", "out.png"),
    "evaluate": ("evaluate", "--steps", "1", "--tasks", "single", "--prompts-per-task", "1", "--images", "1", "-o", "scores"),
}


@generator
def clean_models(random: Random) -> Iterator[Case]:
    def build(folder: Path, originals: Originals) -> list[object]:
        return [*SAMPLE, "--model", originals.copy(originals.model, folder / "model.safetensors")]

    yield Case("a clean model", build, gives("out.png", lambda originals: originals.result(*SAMPLE, "--model", originals.model)))


@generator
def values_that_are_not_finite(random: Random) -> Iterator[Case]:
    """One element of any weight. Not all show in the pixels: torch's attention on CPUs turns NaN into zeros."""
    for prefix, stage in STAGES.items():
        for command, arguments in COMMANDS.items():
            value = random.choice([math.nan, math.inf, -math.inf])
            place = random.random()

            def build(folder: Path, originals: Originals, arguments=arguments, prefix=prefix, value=value, place=place) -> list[object]:
                tensors = originals.tensors
                names = sorted(name for name in tensors if name.startswith(prefix) and not name.endswith("_json"))
                tensor = tensors[names[int(place * len(names))]]
                tensor.view(-1)[int(place * tensor.numel())] = value
                originals.copy(originals.image, folder / "image.png")
                return [*arguments, "--model", originals.save(tensors, folder / "model.safetensors")]

            yield Case(f"{value} in the {stage}, {command}", build, fails(stage, "weight"))
