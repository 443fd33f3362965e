"""Weights that are NaN, infinite, or of a kind or shape that the model cannot have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.corpus.case import Case, Gives, Outcome, fails, generator, gives
from tests.corpus.originals import SAMPLE, Originals

STAGES = {"model.diffusion_model.": "transformer", "text_encoders.transformer.": "text encoder", "vae.decoder.": "VAE decoder"}
PARTS = {"model.diffusion_model.": "transformer", "text_encoders.transformer.": "text encoder", "vae.": "VAE"}
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
    """One element of any weight, or one too large to be right. Not all show in the pixels: attention on CPUs turns NaN into zeros."""
    for prefix, stage in STAGES.items():
        for command, arguments in COMMANDS.items():
            value = random.choice([math.nan, math.inf, -math.inf, 1e30, -3e38])
            place = random.random()

            def build(folder: Path, originals: Originals, arguments=arguments, prefix=prefix, value=value, place=place) -> list[object]:
                tensors = originals.tensors
                names = sorted(name for name in tensors if name.startswith(prefix) and not name.endswith("_json"))
                tensor = tensors[names[int(place * len(names))]]
                tensor.view(-1)[int(place * tensor.numel())] = value
                originals.copy(originals.image, folder / "image.png")
                return [*arguments, "--model", originals.save(tensors, folder / "model.safetensors")]

            yield Case(f"{value} in the {stage}, {command}", build, fails(stage, "weight"))


WRONG_DTYPES = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64]
FLOATS = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
ENDINGS = ("safetensors", "bin")


def with_tensors(change: Callable[[dict[str, Tensor], str], object], prefix: str, place: float, command=SAMPLE, ending="safetensors"):
    """A builder: the model after change(tensors, name) of a tensor below a prefix."""

    def build(folder: Path, originals: Originals) -> list[object]:
        tensors, path = originals.tensors, Path(f"model.{ending}")
        names = sorted(name for name in tensors if name.startswith(prefix) and not name.endswith("_json"))
        change(tensors, names[int(place * len(names))])
        if ending == "bin":
            torch.save(tensors, path)
        else:
            originals.save(tensors, path)
        return [path if word == "MODEL" else word for word in command]

    return build


READERS = ((*SAMPLE, "--model", "MODEL"), ("convert", "MODEL", "out.safetensors"), ("inspect", "MODEL"))


@generator
def wrong_kinds_of_numbers(random: Random) -> Iterator[Case]:
    """Whole numbers, truth values and complex numbers where floats belong."""
    for prefix, part in PARTS.items():
        for dtype in random.sample(WRONG_DTYPES, 3):
            ending = random.choice(ENDINGS)

            def change(tensors: dict[str, Tensor], name: str, dtype=dtype) -> None:
                tensors[name] = tensors[name].abs().to(dtype)

            build = with_tensors(change, prefix, random.random(), (*SAMPLE, "--model", "MODEL"), ending)
            yield Case(f"{dtype} in the {part}", build, fails(f"model.{ending}", "integers"))


@generator
def other_floats(random: Random) -> Iterator[Case]:
    """Another floating dtype of all the weights gives an image."""
    for dtype in FLOATS:

        def build(folder: Path, originals: Originals, dtype=dtype) -> list[object]:
            tensors = {name: value if name.endswith("_json") else value.to(dtype) for name, value in originals.tensors.items()}
            return [*SAMPLE, "--model", originals.save(tensors, Path("model.safetensors"))]

        def look(outcome: Outcome, originals: Originals, dtype=dtype) -> None:
            made, clean = (
                np.asarray(Image.open(path), np.float32)
                for path in (outcome.folder / "out.png", originals.result(*SAMPLE, "--model", originals.model))
            )
            assert outcome.new == ("out.png",) and made.std() > 1
            assert abs(made - clean).mean() < (2 if dtype.itemsize > 1 else 40)

        yield Case(f"weights in {dtype}", build, Gives(look))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "one more row": lambda tensor: torch.cat((tensor, tensor[:1])),
    "no rows": lambda tensor: tensor[:0],
    "one dimension more": lambda tensor: tensor[None],
    "flat": lambda tensor: torch.cat((tensor.flatten(), tensor.flatten()[:1])),
    "a scalar": lambda tensor: tensor.flatten()[0],
    "half of the last dimension": lambda tensor: tensor[..., : tensor.shape[-1] // 2],
}


@generator
def wrong_shapes(random: Random) -> Iterator[Case]:
    for prefix, part in PARTS.items():
        for title, reshape in random.sample(list(SHAPES.items()), 4):
            ending = random.choice(ENDINGS)

            def change(tensors: dict[str, Tensor], name: str, reshape=reshape) -> None:
                wide = [name for name in sorted(tensors) if name.startswith(name.partition(".")[0]) and tensors[name].ndim == 2]
                name = name if tensors[name].ndim else wide[0]
                tensors[name] = reshape(tensors[name]).contiguous().clone()

            build = with_tensors(change, prefix, random.random(), (*SAMPLE, "--model", "MODEL"), ending)
            yield Case(f"{title} in the {part}", build, fails(f"model.{ending}"))


@generator
def missing_and_unknown_tensors(random: Random) -> Iterator[Case]:
    for prefix, part in PARTS.items():
        for title, change in {
            "a tensor less": lambda tensors, name: tensors.pop(name),
            "half of the tensors": lambda tensors, name: [
                tensors.pop(one) for one in sorted(tensors)[::2] if one.startswith(name.split(".")[0])
            ],
            "a tensor of another name": lambda tensors, name: tensors.update({f"{name}s": tensors.pop(name)}),
            "upper case": lambda tensors, name: tensors.update({name.upper(): tensors.pop(name)}),
        }.items():
            build = with_tensors(change, prefix, random.random(), (*SAMPLE, "--model", "MODEL"), ending := random.choice(ENDINGS))
            yield Case(f"{title} in the {part}", build, fails(f"model.{ending}"))


@generator
def scalars_that_shapes_are_read_from(random: Random) -> Iterator[Case]:
    names = {
        "model.diffusion_model.": ["x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "y_embedder.norm.weight"],
        "text_encoders.transformer.": ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"],
        "vae.": ["encoder.conv_out.weight", "decoder.up_blocks.2.0.attn.to_q.weight", "decoder.up_blocks.0.0.conv.weight"],
    }
    for prefix, some in names.items():
        for name in random.sample(some, 2):

            def change(tensors: dict[str, Tensor], _: str, key=prefix + name) -> None:
                tensors[key] = torch.tensor(1.0)

            build = with_tensors(change, prefix, 0, (*SAMPLE, "--model", "MODEL"), ending := random.choice(ENDINGS))
            yield Case(f"a scalar {name}", build, fails(f"model.{ending}", name))


EXTRA = {
    "model.diffusion_model.": [
        "blocks.2.attn.qkv.weight",
        "blocks.1000000000.x.weight",
        "blocks.-1.x.weight",
        "blocks.x.weight",
        "extra.a.weight",
    ],
    "text_encoders.transformer.": ["layers.2.mlp.up_proj.weight", "layers.1000000000.x.weight", "layers.x.weight", "norm.extra.weight"],
    "vae.": [
        "encoder.down_blocks.1000000000.0.conv1.weight",
        "decoder.up_blocks.0.1000000000.conv1.weight",
        "decoder.up_blocks.x.0.a.weight",
        "encoder.extra.weight",
        "decoder.up_blocks.0",
    ],
}


@generator
def unknown_tensors_inside_a_part(random: Random) -> Iterator[Case]:
    for prefix, names in EXTRA.items():
        for name in random.sample(names, 3):

            def change(tensors: dict[str, Tensor], _: str, key=prefix + name) -> None:
                tensors[key] = torch.zeros(2, 2)

            build = with_tensors(change, prefix, 0, (*SAMPLE, "--model", "MODEL"), ending := random.choice(ENDINGS))
            yield Case(f"an extra {name} in {prefix}", build, fails(f"model.{ending}"))


@generator
def values_that_float16_cannot_hold(random: Random) -> Iterator[Case]:
    for command in ("convert", "pack"):
        for prefix, part in PARTS.items():
            value = random.choice([65520.0, 1e6, -7e4, -3e38, 1e30])
            words = {
                "convert": ("convert", "MODEL", "out.safetensors", "--dtype", random.choice(["fp16", "float16"])),
                "pack": ("pack", "--model", "MODEL", "--text-encoder", "MODEL", "--vae", "MODEL", "out.safetensors", "--dtype", "fp16"),
            }

            def change(tensors: dict[str, Tensor], name: str, value=value) -> None:
                tensors[name].view(-1)[0] = value

            vae = ("--vae-dtype", "fp16") if part == "VAE" else ()  # which --dtype leaves as it is
            build = with_tensors(change, prefix, random.random(), (*words[command], *vae), "safetensors")
            yield Case(f"{command} of {value:g} in the {part} to float16", build, fails("tensor", f"{value:g}", "float16"))
