"""Where convert, pack, previews, sample and sweep write: missing folders, folders, the source itself, files that are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from PIL import Image
from safetensors.torch import load_file

from tests.corpus.case import Case, Gives, Outcome, fails, generator
from tests.corpus.originals import PROMPT, SAMPLE, Originals

WRITERS = {
    "convert": ("convert", "model.safetensors", "TARGET"),
    "pack": ("pack", "--model", "model.safetensors", "--vae", "model.safetensors", "TARGET"),
    "convert of a LoRA": ("convert", "lora.safetensors", "TARGET"),
}
IMAGES = {
    "sample": (*SAMPLE[:-1], "TARGET", "--model", "model.safetensors"),
    "sweep": ("sweep", PROMPT, "--steps", "1", "--model", "model.safetensors", "-o", "TARGET"),
    "upscale": ("upscale", "image.png", PROMPT, "--steps", "1", "--model", "model.safetensors", "-o", "TARGET"),
}


def with_target(words: tuple[str, ...], target: str):
    def build(folder: Path, originals: Originals) -> list[object]:
        originals.copy(originals.model, Path("model.safetensors"))
        originals.copy(originals.lora, Path("lora.safetensors"))
        originals.copy(originals.image, Path("image.png"))
        Path("folder.safetensors").mkdir()
        Path("folder.png").mkdir()
        os.mkfifo("pipe.safetensors")
        os.mkfifo("pipe.png")
        return [target if word == "TARGET" else word for word in words]

    return build


@generator
def targets_that_cannot_be_written(random: Random) -> Iterator[Case]:
    for writers, ending, others in (
        (WRITERS, "safetensors", ["bin", "pt", "png", "SAFETENSORS.x"]),
        (IMAGES, "png", ["bmp", "safetensors", "x"]),
    ):
        for title, words in writers.items():
            odd = {
                "a folder": f"folder.{ending}",
                "a missing folder": f"{random.choice(['none', 'a/b/c', './none/.'])}/out.{ending}",
                "a file as a folder": f"image.png/out.{ending}",
                "another ending": f"out.{random.choice(others)}",
                "no ending": random.choice(["out", ".", "..", "/", "out."]),
                "a name of 5000 characters": f"{'a' * 5000}.{ending}",
                "an empty name": "",
            }
            for kind, target in odd.items():
                named = "too long" if len(target) > 1000 else target.strip("./ ").partition("/")[0]
                yield Case(f"{kind} as the target of {title}", with_target(words, target), fails(named))


@generator
def targets_that_are_there(random: Random) -> Iterator[Case]:
    """Are replaced, with one line that says so."""

    def replaced(name: str):
        def look(outcome: Outcome, originals: Originals) -> None:
            made, wanted = load_file(outcome.folder / name), originals.tensors
            assert not outcome.new and outcome.changed == (name,)
            assert made and all(torch.equal(made[key], wanted[key]) for key in made if not key.endswith("_json"))

        return look

    yield Case("convert onto another model", with_target(("convert", "model.safetensors", "lora.safetensors"), ""),
               Gives(replaced("lora.safetensors"), said=("lora.safetensors", "replacing")))  # fmt: skip


LINKS: dict[str, Callable[[str, str], object]] = {
    "a symbolic link to": lambda source, target: os.symlink(source, target),
    "a hard link to": os.link,
    "another path to": lambda source, target: None,
    "itself,": lambda source, target: None,
}


def onto_input(kind: str, source: str, words: tuple[str, ...], ending: str):
    """A builder: the target is an input, under the same or another name."""

    def build(folder: Path, originals: Originals) -> list[object]:
        arguments = with_target(words, "TARGET")(folder, originals)
        originals.copy(originals.parts, Path("parts"))
        target = {"itself,": source, "another path to": f"folder.png/../{source}"}.get(kind, f"target{ending}")
        LINKS[kind](source, target)
        return [target if word == "TARGET" else word for word in arguments]

    return build


@generator
def targets_that_are_inputs(random: Random) -> Iterator[Case]:
    model, lora, image = "model.safetensors", "lora.safetensors", "image.png"
    part = "parts/vae/model.safetensors"
    for title, source, words in (
        ("convert", model, WRITERS["convert"]),
        ("convert of a folder", part, ("convert", "parts", "TARGET")),
        ("convert of a LoRA", lora, WRITERS["convert of a LoRA"]),
        ("pack", model, ("pack", "--model", model, "--vae", "parts", "TARGET")),
        ("pack, of its VAE", part, ("pack", "--model", model, "--vae", "parts/vae", "TARGET")),
        ("upscale", image, IMAGES["upscale"]),
    ):
        for kind in random.sample([*LINKS], 2):
            ending = Path(source).suffix
            yield Case(
                f"{kind} an input as the target of {title}", onto_input(kind, source, words, ending), fails("input", Path(source).name)
            )
    for title, source in (("sample", model), ("sweep", lora), ("upscale", model)):  # no weights have the name of an image, but a link may
        kind, words = random.choice([*LINKS][:2]), (*IMAGES[title], "--lora", lora)
        yield Case(
            f"{kind} the weights as the target of {title}", onto_input(kind, source, words, ".png"), fails("target.png", "input", source)
        )


@generator
def images_for_previews(random: Random) -> Iterator[Case]:
    """Folders of images that are missing, empty or damaged."""

    def build(kind: str):
        def make(folder: Path, originals: Originals) -> list[object]:
            originals.copy(originals.model, Path("model.safetensors"))
            if kind == "a file":
                Path("images").write_text("x")
            elif kind != "missing":
                Path("images").mkdir()
            if kind == "damaged":
                Path("images/a.png").write_bytes(originals.image.read_bytes()[:60])
            elif kind == "a FIFO":
                os.mkfifo("images/a.png")
            elif kind == "only text":
                Path("images/a.txt").write_text("x")
            return ["previews", "model.safetensors", "--images", "images"]

        return make

    for kind in ("missing", "empty", "a file", "damaged", "a FIFO", "only text"):
        yield Case(f"images for previews: {kind}", build(kind), fails("images"))

    def whole(folder: Path, originals: Originals) -> list[object]:
        originals.copy(originals.model, Path("model.safetensors"))
        Path("images").mkdir()
        for number in range(3):
            Image.frombytes("RGB", (40, 30), random.randbytes(3600)).save(f"images/{number}.png")
        return ["previews", "model.safetensors", "--images", "images"]

    def look(outcome: Outcome, originals: Originals) -> None:
        made, wanted = load_file(outcome.folder / "model.safetensors"), originals.tensors
        assert outcome.changed == ("model.safetensors",) and "explain" in outcome.out
        assert all(torch.equal(made[key], wanted[key]) for key in wanted if not key.endswith("_json"))

    yield Case("images for previews", whole, Gives(look))


DTYPES = ["int8", "float64", "", "Float16", "torch.float16", "f16 ", "bf-16", "None", "\x1b[31m"]


@generator
def dtypes_that_are_none(random: Random) -> Iterator[Case]:
    for title, words in {**WRITERS, "sample": (*SAMPLE, "--model", "model.safetensors")}.items():
        name = random.choice([*DTYPES, *(["fp8"] if title in ("sample", "convert of a LoRA") else [])])
        yield Case(f"--dtype {name!r} of {title}", with_target((*words, "--dtype", name), "out.safetensors"), fails("dtype"))


@generator
def dtypes_of_no_vae(random: Random) -> Iterator[Case]:
    dtype = random.choice(["bf16", "fp32"])
    for title, words in (("convert of a LoRA", WRITERS["convert of a LoRA"]), ("pack", ("pack", "--model", "parts/transformer", "TARGET"))):

        def build(folder: Path, originals: Originals, words=words) -> list[object]:
            originals.copy(originals.parts, Path("parts"))
            return [*with_target(words, "out.safetensors")(folder, originals), "--vae-dtype", dtype]

        yield Case(f"--vae-dtype {dtype} of {title}", build, fails("no VAE", "vae-dtype"))


@generator
def releases_that_are_none(random: Random) -> Iterator[Case]:
    for name in random.sample(["t2v", "", "T2I", "c2i", "../t2i", "t2i\0", "c2i-1024"], 3):
        yield Case(f"the release {name!r}", lambda folder, originals, name=name: ["download", name, "--dry-run"], fails("choice", code=2))

    def both(folder: Path, originals: Originals) -> list[object]:
        return ["download", "t2i", "--comfyui", "a", "--to", "b", "--dry-run"]

    yield Case("two places for a release", both, fails("not allowed", code=2))
