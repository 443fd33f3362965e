"""State dicts under wrappers and prefixes, with hostile names, or of other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.corpus.case import Case, Gives, Outcome, fails, generator, gives
from tests.corpus.originals import PREFIXES, SAMPLE, Originals

TRANSFORMER = PREFIXES["transformer"]
CLEAN = gives("out.png", lambda originals: originals.result(*SAMPLE, "--model", originals.model))


def write(tensors: Mapping, ending: str, originals: Originals) -> Path:
    path = Path(f"model.{ending}")
    if ending == "bin":
        torch.save(tensors, path)
    else:
        originals.save(tensors, path)
    return path


def built(make: Callable[[dict[str, Tensor]], Mapping], ending: str, command: tuple[str, ...] = (*SAMPLE, "--model", "MODEL")):
    def build(folder: Path, originals: Originals) -> list[object]:
        path = write(make(originals.tensors), ending, originals)
        return [path if word == "MODEL" else word for word in command]

    return build


WRAPPERS = {
    "state_dict": lambda tensors: {"state_dict": tensors},
    "model": lambda tensors: {"model": tensors, "epoch": 3, "args": {"lr": 1.0}},
    "module": lambda tensors: {"module": tensors},
    "model_ema": lambda tensors: {"model": tensors, "model_ema": tensors},
    "nested wrappers": lambda tensors: {"checkpoint": {"state_dict": {"module": tensors}}},
    "an optimiser beside": lambda tensors: {"model": tensors, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}},
    "module.": lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
    "_orig_mod.": lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()},
    "_orig_mod. of blocks": lambda tensors: {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in tensors.items()},
    "_fsdp_wrapped_module.": lambda tensors: {f"_fsdp_wrapped_module.{name}": value for name, value in tensors.items()},
    "_checkpoint_wrapped_module.": lambda tensors: {f"_checkpoint_wrapped_module.{name}": value for name, value in tensors.items()},
    "compiled and distributed": lambda tensors: {"model": {f"module._orig_mod.{name}": value for name, value in tensors.items()}},
}


@generator
def wrapped_state_dicts(random: Random) -> Iterator[Case]:
    """Give the clean image. In a safetensors file, names alone can wrap."""
    for title, wrap in WRAPPERS.items():
        flat = title.endswith(".") or "blocks" in title
        ending = random.choice(["bin", "safetensors"]) if flat else "bin"
        yield Case(f"{title} in a .{ending}", built(wrap, ending), CLEAN)


@generator
def names_twice(random: Random) -> Iterator[Case]:
    """Once under a wrapper's name, with the same values or with others."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        for part, prefix in PREFIXES.items():
            place, ending, inside, change = (
                random.random(),
                random.choice(["bin", "safetensors"]),
                random.random() < 0.5,
                random.choice([0, 1]),
            )

            def make(tensors, wrapper=wrapper, prefix=prefix, place=place, inside=inside, change=change) -> Mapping:
                names = sorted(name for name in tensors if name.startswith(prefix) and not name.endswith("_json"))
                name = names[int(place * len(names))]
                head, _, tail = name.rpartition(".")
                twin = f"{head}.{wrapper}{tail}" if inside else wrapper + name
                return tensors | {twin: tensors[name] + change}

            yield Case(f"a tensor of the {part} twice, as {wrapper}", built(make, ending), fails(f"model.{ending}", "twice"))


NAMES = {
    "an index of 10**9": f"{TRANSFORMER}blocks.1000000000.attn.qkv.weight",
    "an index of 5000 digits": f"{TRANSFORMER}blocks.{'9' * 5000}.attn.qkv.weight",
    "a negative index": f"{TRANSFORMER}blocks.-1.attn.qkv.weight",
    "an index in Arabic digits": f"{TRANSFORMER}blocks.٣.attn.qkv.weight",
    "an index that is a superscript": f"{TRANSFORMER}blocks.².attn.qkv.weight",
    "a stage of 10**9": "vae.encoder.down_blocks.1000000000.0.conv1.weight",
    "a layer of 10**9": "vae.decoder.up_blocks.1.1000000000.conv1.weight",
    "a stage of 5000 digits": f"vae.decoder.up_blocks.{'9' * 5000}.0.conv1.weight",
    "a text layer of 10**9": f"{PREFIXES['text']}layers.1000000000.mlp.up_proj.weight",
    "a text layer of 5000 digits": f"{PREFIXES['text']}layers.{'9' * 5000}.mlp.up_proj.weight",
    "escape codes": f"{TRANSFORMER}blocks.0.\x1b[31m\x1b]0;title\x07.weight",
    "a key of 1 MB": f"{TRANSFORMER}blocks.0.{'x' * 10**6}.weight",
    "line breaks": f"{TRANSFORMER}blocks.0.a\r\ntim: error: b\n.weight",
    "right-to-left marks": f"{TRANSFORMER}blocks.0.\u202egnp.weight",
    "a null byte": f"{TRANSFORMER}blocks.0.a\0b.weight",
    "emoji": f"{TRANSFORMER}blocks.0.🎨.weight",
    "1000 dots": TRANSFORMER + "a." * 1000 + "weight",
    "only dots": TRANSFORMER + "....",
    "a format string": f"{TRANSFORMER}blocks.0.{{0.__class__}}%s%n.weight",
}


@generator
def hostile_names(random: Random) -> Iterator[Case]:
    """Inside a part they are errors; nothing of them reaches the terminal raw."""
    for title, name in NAMES.items():
        ending = random.choice(["bin", "safetensors"])
        size = random.choice([0, 1, 16])
        build = built(lambda tensors, name=name, size=size: tensors | {name: torch.zeros(size)}, ending)
        yield Case(f"a name with {title}", build, fails(f"model.{ending}"))


@generator
def hostile_names_of_no_part(random: Random) -> Iterator[Case]:
    """Give a printable line of `tim inspect`, or of a model without parts."""

    def printable(outcome: Outcome, originals: Originals) -> None:
        assert all(c.isprintable() or c == "\n" for c in outcome.out) and len(outcome.out) < 10**4 and not outcome.new

    for title, name in NAMES.items():
        ending, alone, command = (
            random.choice(["bin", "safetensors"]),
            random.random() < 0.5,
            random.choice(["inspect", "sample", "convert"]),
        )
        words = {
            "inspect": ("inspect", "MODEL"),
            "sample": (*SAMPLE, "--model", "MODEL"),
            "convert": ("convert", "MODEL", "out.safetensors"),
        }
        name = "extra" + name.removeprefix("model").removeprefix("text_encoders").removeprefix("vae")

        def make(tensors, name=name, alone=alone) -> Mapping:
            return ({} if alone else tensors) | {name: torch.zeros(2)}

        if command == "inspect":
            expected: object = Gives(printable)
        elif alone:
            expected = fails(f"model.{ending}")
        elif command == "sample":
            expected = CLEAN
        else:
            expected = Gives(lambda outcome, originals: None, said=(f"model.{ending}", 1, "extra"))
        yield Case(f"{title} outside of parts, {command}", built(make, ending, words[command]), expected)


FOREIGN = {
    "Stable Diffusion": ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.0.in_layers.0.weight"],
    "SDXL": ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
    "diffusers": ["mid_block.attentions.0.proj_in.weight", "conv_in.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"],
    "SD3": ["joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight"],
    "DiT": ["blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight", "x_embedder.proj.weight"],
    "Wan": ["blocks.0.self_attn.q.weight", "patch_embedding.weight", "head.head.weight"],
    "PixArt": ["transformer_blocks.0.attn1.to_q.weight", "pos_embed.proj.weight"],
    "a KL autoencoder": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"],
    "T5": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "CLIP": ["text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.embeddings.position_embedding.weight"],
    "Llama": ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"],
    "ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "an embedding": ["emb_params"],
    "an upscaler": ["body.0.rdb1.conv1.weight", "conv_first.weight"],
}


@generator
def other_models(random: Random) -> Iterator[Case]:
    for title, names in FOREIGN.items():
        ending, command = (
            random.choice(["bin", "safetensors"]),
            random.choice(["sample", "convert", "pack", "upscale", "sweep", "evaluate"]),
        )
        words = {
            "sample": (*SAMPLE, "--model", "MODEL"), "convert": ("convert", "MODEL", "out.safetensors"),
            "pack": ("pack", "--model", "MODEL", "out.safetensors"), "sweep": ("sweep", "a circle", "--model", "MODEL"),
            "upscale": ("upscale", "image.png", "a circle", "--model", "MODEL"), "evaluate": ("evaluate", "--model", "MODEL"),
        }[command]  # fmt: skip

        def build(folder: Path, originals: Originals, names=names, ending=ending, words=words) -> list[object]:
            originals.copy(originals.image, folder / "image.png")
            path = write({name: torch.zeros(2, 2) for name in names}, ending, originals)
            return [path if word == "MODEL" else word for word in words]

        yield Case(f"{title} as a model, {command}", build, fails(f"model.{ending}"))


QUERY = "encoder.mid_block.attentions.0.to_q.weight"
FIRST = "encoder.down_blocks.0.resnets.0.conv1.weight"


def without(*beginnings: str):
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(beginnings)}


# title: what is done to the weights of an SD VAE, and what the error names
STOCK_VAES: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping], tuple[object, ...]]] = {
    "a tensor under its present and its older name": (lambda w: w | {QUERY.replace("to_q", "query"): w[QUERY]}, (QUERY, "twice")),
    "a level of 10**9": (lambda w: w | {FIRST.replace("blocks.0", "blocks.1000000000"): w[FIRST]}, ("1000000000",)),
    "a level of 5000 digits": (lambda w: w | {FIRST.replace("blocks.0", "blocks." + "9" * 5000): w[FIRST]}, ()),
    "a layer of 999": (lambda w: w | {FIRST.replace("resnets.0", "resnets.999"): w[FIRST]}, ("not a complete Stable Diffusion VAE",)),
    "a level that is a superscript": (lambda w: w | {FIRST.replace("blocks.0", "blocks.²"): w[FIRST]}, ()),
    "three levels": (lambda w: without("encoder.down_blocks.3")(w), ("number of resolutions", 3, 4)),
    "16 latent channels": (lambda w: w | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, ("latent_channels", 16)),
    "no latent channels": (lambda w: w | {"post_quant_conv.weight": torch.zeros(0, 0, 1, 1)}, ("latent_channels", 0)),
    "a convolution that is a number": (lambda w: w | {FIRST: torch.zeros(())}, (FIRST,)),
    "a width of 33": (lambda w: w | {FIRST: torch.zeros(33, 32, 3, 3)}, (33, "multiples of 32")),
    "a width of 2**40": (lambda w: w | {FIRST: torch.zeros(1).expand(2**40, 1, 1, 1)}, (FIRST, "repeats")),
    "a query of another shape": (lambda w: w | {QUERY: torch.zeros(32, 32, 3, 3)}, (QUERY,)),
    "no decoder levels": (lambda w: without("decoder.up_blocks")(w), ("not a complete Stable Diffusion VAE",)),
    "no attention": (lambda w: without("encoder.mid_block.attentions")(w), ("not a complete Stable Diffusion VAE",)),
    "the convolutions of its latents missing": (lambda w: without("quant_conv", "post_quant_conv")(w), ("a KL autoencoder", "4 latent")),
    "a batch norm": (lambda w: w | {"encoder.norm.running_mean": torch.zeros(4)}, ("encoder.norm.running_mean",)),
    "original names with a level of 9": (
        lambda w: w | {"encoder.down.0.block.0.conv1.weight": w[FIRST], "decoder.up.9.block.0.conv1.weight": w[FIRST]}, ("twice",)),
    "an SDXL UNet beside": (
        lambda w: w | {f"unet.{name}": torch.zeros(2) for name in ("input_blocks.0.0.weight", "label_emb.0.0.weight")}, ("SDXL",)),
}  # fmt: skip


@generator
def stock_vaes(random: Random) -> Iterator[Case]:
    """An SD VAE that was changed, in the folder of a class-conditional model."""

    def changed(change: Callable[[dict[str, Tensor]], Mapping], ending: str):
        def build(folder: Path, originals: Originals) -> list[object]:
            for name in ("transformer", "vae"):
                (folder / "parts" / name).mkdir(parents=True)
            tensors = load_file(originals.classes)
            names = [name for name in tensors if name.startswith(TRANSFORMER) and not name.endswith("_json")]
            own = {name.removeprefix(TRANSFORMER): tensors[name] for name in names}
            originals.save(own, folder / "parts/transformer/model.safetensors", {})
            weights = dict(change(load_file(originals.stock_vae)))
            if ending == "safetensors":
                weights = {name: value.clone() for name, value in weights.items()}
            path = folder / f"parts/vae/model.{ending}"
            torch.save(weights, path) if ending == "bin" else originals.save(weights, path, {})
            return ["sample", "3", "--model", "parts", "--size", "16x16", "--steps", "1", "-o", "out.png"]

        return build

    for title, (change, named) in STOCK_VAES.items():
        ending = "bin" if "2**40" in title else random.choice(["bin", "safetensors"])
        yield Case(f"an SD VAE with {title}", changed(change, ending), fails("parts", *named))
    channel, value = random.randrange(3), random.choice([float("nan"), float("inf")])

    def damage(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights["decoder.conv_out.bias"][channel] = value
        return weights

    yield Case("an SD VAE with a damaged weight", changed(damage, "safetensors"), fails("VAE decoder", "decoder.conv_out.bias"))


def part_of(originals: Originals, name: str, path: Path) -> Path:
    prefix = PREFIXES[name]
    own = {key.removeprefix(prefix): value for key, value in originals.tensors.items() if key.startswith(prefix)}
    return originals.save(own, path, {})


@generator
def parts_in_place_of_others(random: Random) -> Iterator[Case]:
    """A file of one part where another is expected, and a LoRA as a model."""
    for given in ("text", "vae"):
        for words in ((*SAMPLE, "--model", "part.safetensors"), ("pack", "--model", "part.safetensors", "out.safetensors")):

            def build(folder: Path, originals: Originals, given=given, words=words) -> list[object]:
                part_of(originals, given, Path("part.safetensors"))
                return list(words)

            yield Case(f"a {given} as a model, {words[0]}", build, fails("part.safetensors"))
    for option, wrong in (("--vae", "transformer"), ("--vae", "text"), ("--text-encoder", "vae"), ("--text-encoder", "transformer")):

        def build_pack(folder: Path, originals: Originals, option=option, wrong=wrong) -> list[object]:
            part_of(originals, wrong, Path("part.safetensors"))
            return [
                "pack",
                "--model",
                originals.copy(originals.model, Path("model.safetensors")),
                option,
                "part.safetensors",
                "out.safetensors",
            ]

        yield Case(f"a {wrong} as {option} of pack", build_pack, fails("part.safetensors"))

    def as_model(folder: Path, originals: Originals) -> list[object]:
        return [*SAMPLE, "--model", originals.copy(originals.lora, Path("lora.safetensors"))]

    yield Case("a LoRA as a model", as_model, fails("lora.safetensors", "LoRA"))

    def as_lora(folder: Path, originals: Originals) -> list[object]:
        model = originals.copy(originals.model, Path("model.safetensors"))
        return [*SAMPLE, "--model", model, "--lora", f"{model}:{random.uniform(-2, 2):.2f}"]

    yield Case("a model as a LoRA", as_lora, fails("model.safetensors", "not a LoRA"))
