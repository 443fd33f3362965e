"""LoRA files: spellings of other trainers, adapters that are none, of other models, or with values that overflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.corpus.case import Case, Gives, Outcome, fails, generator, gives
from tests.corpus.originals import SAMPLE, Originals

FILE = "lora.safetensors"
PREFIX = "diffusion_model."


def with_lora(make: Callable[[dict[str, Tensor]], dict[str, Tensor]], strength: object = None, ending: str = "safetensors"):
    """A builder: samples with a LoRA made from the tensors of the clean one."""

    def build(folder: Path, originals: Originals) -> list[object]:
        path = Path(f"lora.{ending}")
        tensors = {name: value.contiguous().clone() for name, value in make(load_file(originals.lora)).items()}
        torch.save(tensors, path) if ending == "bin" else save_file(tensors, path)
        lora = path if strength is None else f"{path}:{strength}"
        return [*SAMPLE, "--model", originals.copy(originals.model, Path("model.safetensors")), "--lora", lora]

    return build


def clean(originals: Originals) -> Path:
    return originals.result(*SAMPLE, "--model", originals.model, "--lora", originals.lora)


def renamed(prefix: str, down: str, up: str, dots: bool = True) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def make(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in tensors.items():
            layer, _, ending = name.removeprefix(PREFIX).rpartition(".qkv.")
            layer = f"{layer}.qkv"
            ending = {"lora_A.weight": down, "lora_B.weight": up}.get(ending, ending)
            found[f"{prefix}{layer if dots else layer.replace('.', '_')}.{ending}"] = value
        return found

    return make


SPELLINGS = {
    "PEFT": renamed("base_model.model.", "lora_A.weight", "lora_B.weight"),
    "PEFT with an adapter's name": renamed("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT of a pipeline": renamed("base_model.model.transformer.", "lora_A.weight", "lora_B.weight"),
    "diffusers": renamed("transformer.", "lora_A.weight", "lora_B.weight"),
    "old diffusers": renamed("transformer.", "lora.down.weight", "lora.up.weight"),
    "older diffusers": renamed("transformer.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "kohya": renamed("lora_unet_", "lora_down.weight", "lora_up.weight", dots=False),
    "bare": renamed("", "lora_down.weight", "lora_up.weight"),
    "official": renamed("model.diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "DDP": renamed("module.", "lora_A.weight", "lora_B.weight"),
}


@generator
def spellings_of_trainers(random: Random) -> Iterator[Case]:
    """Give the image of the clean LoRA, and `tim convert` writes the clean LoRA's names."""

    def same_names(outcome: Outcome, originals: Originals) -> None:
        made, wanted = load_file(outcome.folder / "out.safetensors"), load_file(originals.lora)
        assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in made)

    for title, make in SPELLINGS.items():
        ending = random.choice(["safetensors", "bin"])
        yield Case(f"a LoRA of {title}", with_lora(make, ending=ending), gives("out.png", clean))
        sample = with_lora(make, ending=ending)

        def convert(folder: Path, originals: Originals, sample=sample) -> list[object]:
            return ["convert", sample(folder, originals)[-1], "out.safetensors"]

        if random.random() < 0.5:
            yield Case(f"a LoRA of {title}, convert", convert, Gives(same_names))


@generator
def alphas_that_are_plain_numbers(random: Random) -> Iterator[Case]:
    """Count as tensors do, in a torch file."""
    value, huge = random.choice([1, 4, 0.5]), random.choice([10**400, -(10**40), 1e300, math.nan])

    def alphas(tensors: dict[str, Tensor], convert: Callable[[float], object]) -> dict:
        return {name: convert(value) if name.endswith("alpha") else tensor for name, tensor in tensors.items()}

    def build(folder: Path, originals: Originals, value=value) -> list[object]:
        torch.save(alphas(load_file(originals.lora), lambda number: value), "lora.bin")
        return [*SAMPLE, "--model", originals.copy(originals.model, Path("model.safetensors")), "--lora", "lora.bin"]

    def reference(originals: Originals) -> Path:
        path = originals.folder / "alpha.safetensors"
        save_file(alphas(load_file(originals.lora), lambda number: torch.tensor(float(number))), path)
        return originals.result(*SAMPLE, "--model", originals.model, "--lora", path)

    yield Case(f"a LoRA with the plain alpha {value}", build, gives("out.png", reference))
    yield Case(f"a LoRA with the plain alpha {str(huge)[:8]}", lambda *places: build(*places, value=huge), fails("lora.bin", "alpha"))


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def changed(ending: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """One tensor with this ending, changed."""
    return lambda tensors: tensors | {(name := first(tensors, ending)): change(tensors[name])}


def without(ending: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if name != first(tensors, ending)}


def added(ending: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {first(tensors, "lora_A.weight").replace("lora_A.weight", ending): torch.ones(shape)}


def moved(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def filled(value: float, place: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[int(place * tensor.numel())] = value
        return tensor

    return change


@generator
def adapters_that_cannot_be_used(random: Random) -> Iterator[Case]:
    place = random.random()
    odd: dict[str, tuple[Callable, tuple[object, ...]]] = {
        "of other ranks": (changed("lora_B.weight", lambda t: torch.cat((t, t), 1)), ("rank",)),
        "without a half": (without(random.choice(["lora_A.weight", "lora_B.weight"])), ("missing",)),
        "without pairs": (lambda tensors: {name: value for name, value in tensors.items() if "lora_A" in name}, ("missing",)),
        "with alphas alone": (lambda tensors: {name: value for name, value in tensors.items() if "alpha" in name}, ("LoRA",)),
        "without tensors": (lambda tensors: {}, ()),
        "of rank 0": (lambda t: changed("lora_A.weight", lambda a: a[:0])(changed("lora_B.weight", lambda b: b[:, :0])(t)), ("rank",)),
        "of whole numbers": (changed("lora_A.weight", lambda t: t.to(torch.int8)), ("int8",)),
        "of complex numbers": (changed("lora_B.weight", lambda t: t.to(torch.complex64)), ("complex64",)),
        "of truth values": (changed("lora_B.weight", lambda t: t > 0), ("bool",)),
        "of scalars": (changed("lora_A.weight", lambda t: t[0, 0]), ("rank",)),
        "with NaN": (changed("lora_A.weight", filled(math.nan, place)), ("NaN",)),
        "with infinity": (changed("lora_B.weight", filled(random.choice([math.inf, -math.inf]), place)), ("infinite",)),
        "with alpha NaN": (changed("alpha", lambda t: t * math.nan), ("alpha",)),
        "with alpha inf": (changed("alpha", lambda t: t * random.choice([math.inf, -math.inf])), ("alpha",)),
        "with three alphas": (changed("alpha", lambda t: torch.ones(3)), ("alpha",)),
        "with a complex alpha": (changed("alpha", lambda t: t.to(torch.complex64)), ("alpha",)),
        "with no alpha in it": (changed("alpha", lambda t: torch.ones(0)), ("alpha",)),
        "with huge values": (changed("lora_A.weight", lambda t: t * 0 + random.choice([1e30, 3e38])), ()),
        "with a huge alpha": (changed("alpha", lambda t: t * 1e38), ()),
        "of wider layers": (changed("lora_A.weight", lambda t: torch.cat((t, t), 1)), ("shape",)),
        "of a block that is missing": (moved("blocks.1", f"blocks.{random.randrange(2, 99)}"), ("blocks",)),
        "of a block of 10**9": (moved("blocks.1", "blocks.1000000000"), ("blocks.1000000000",)),
        "of a block of 5000 digits": (moved("blocks.1", f"blocks.{'9' * 5000}"), ()),
        "of a layer that is none": (moved("attn.qkv", "attn.qkw"), ("qkw",)),
        "of Flux": (moved("blocks", "double_blocks"), ("another model",)),
        "of Stable Diffusion": (moved("diffusion_model.blocks", "lora_unet_down_blocks"), ("another model",)),
        "twice": (lambda t: t | {k.replace(PREFIX, "transformer."): v for k, v in t.items()}, ("twice",)),
        "with other tensors": (added("bias", 4), ("unknown",)),
        "with escape codes": (moved("attn", "\x1b[31mattn"), ()),
        "with names of 1 MB": (moved("attn", "a" * 10**6), ()),
        "LoHa": (added("hada_w1_a", 2, 16), ("LoHa",)), "LoKr": (added("lokr_w1", 2, 16), ("LoKr",)),
        "DoRA": (added("dora_scale", 48, 1), ("DoRA",)), "OFT": (added("oft_blocks", 2, 8, 8), ("OFT",)),
        "of convolutions": (added("lora_mid.weight", 2, 2, 3, 3), ("convolutions",)),
        "a difference": (added("diff", 48, 16), ("difference",)),
        "of 3x3 convolutions": (lambda t: changed("lora_A.weight", lambda a: a[:, :, None, None].expand(-1, -1, 3, 3))(
            changed("lora_B.weight", lambda b: b[:, :, None, None])(t)), ("rank",)),
    }  # fmt: skip
    for title, (make, named) in odd.items():
        ending = "bin" if title == "of scalars" or random.random() < 0.3 else "safetensors"
        yield Case(f"a LoRA {title}", with_lora(make, ending=ending), fails(f"lora.{ending}", *named))


@generator
def strengths(random: Random) -> Iterator[Case]:
    for strength in ("nan", "inf", "-inf", "1e999", random.choice(["1e38", "-3e38", "1e300"]), random.choice(["100.5", "-101", "1e9"])):
        yield Case(f"a LoRA at strength {strength}", with_lora(lambda tensors: tensors, strength), fails(FILE, "strength"))
    for strength in ("0", "-0.0", "0.0"):
        plain = gives("out.png", lambda originals: originals.result(*SAMPLE, "--model", originals.model))
        yield Case(f"a LoRA at strength {strength}", with_lora(lambda tensors: tensors, strength), plain)
    value = f"{random.uniform(-1, 1):.3f}"

    def reference(originals: Originals) -> Path:
        return originals.result(*SAMPLE, "--model", originals.model, "--lora", f"{originals.lora}:{value}")

    yield Case(f"a LoRA at strength {value}", with_lora(lambda tensors: tensors, value), gives("out.png", reference))
    zero = changed("alpha", lambda t: t * 0)
    yield Case("a LoRA of alpha 0 in one layer", with_lora(zero), Gives(lambda outcome, originals: None))
    for strength in ("", "x", "1,5", "0x1"):
        yield Case(f"a LoRA at strength {strength!r}", with_lora(lambda tensors: tensors, strength), fails(f"{FILE}:{strength}"[:16]))


@generator
def loras_of_other_models(random: Random) -> Iterator[Case]:
    def build(folder: Path, originals: Originals) -> list[object]:
        model = originals.copy(originals.classes, Path("classes.safetensors"))
        tensors = load_file(originals.lora)
        name = random.choice(["cross_attn.kv", "cross_attn.q"])
        save_file({key.replace("attn.qkv", name): value for key, value in tensors.items()}, FILE)
        words = ["3" if word == "a red circle" else word for word in SAMPLE]
        return [*words, "--model", model, "--lora", FILE]

    yield Case("a LoRA of text attention for classes", build, fails(FILE, "cross_attn"))

    def bundled(folder: Path, originals: Originals) -> list[object]:
        return [*SAMPLE, "--lora", originals.copy(originals.lora, Path(FILE))]

    yield Case("a LoRA of another width", bundled, fails(FILE, "shape"))
