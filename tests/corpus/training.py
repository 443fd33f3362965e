"""Training configurations: every field with values that it cannot have, and YAML that is damaged or made to harm."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from types import UnionType
from typing import Any, Literal

from tests.corpus.case import Case, fails, generator
from tests.corpus.originals import Originals
from tim_core.training.kinds import KINDS

REQUIRED = {
    "finetune": {"output": "run", "model": "model.safetensors", "data": "{path: pictures}"},
    "tim": {"output": "run", "autoencoder": "model.safetensors"},
    "autoencoder": {"output": "run"},
}
ANY = ["[]", "[[1]]", "{a: 1}", "2026-11-29", "!!binary aGk=", "0x", "1_0", "\u0663", '"\\e[31m"']  # what no number and no truth value is
WRONG: dict[object, list[str]] = {
    int: [*ANY, "-1", "1.5", ".nan", ".inf", "1e20", "9" * 30, str(2**62), "true", "'1'", "1e3", "-.inf"],
    float: [*ANY, ".nan", ".inf", "-.inf", "1e400", "1e308", "true", "'0.5'", "-1e9", "9" * 400],
    bool: [*ANY, "1", "0", "yes", "on", "'true'", "2", "1.0"],
    str: ["[]", "{a: 1}", "3", "1.5", "true", "''", '"a\\0b"', ".inf"],
    list: ["3", "text", "true", "{a: 1}", "1.5"],
    dict: ["3", "text", "true", "[1]", "1.5"],
}


def wrong_values(hint: Any) -> list[str]:
    """YAML of values that a field of this type cannot have."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return wrong_values(parts[0])
    if origin in (typing.Union, UnionType):
        return wrong_values(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return [*WRONG[str], "none-such", "None"]
    if is_dataclass(hint):
        return WRONG[dict]
    return WRONG[{tuple: list}.get(origin, origin) or hint]


def all_fields(cls: type, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The dotted place and the type of every field of a configuration."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        yield (*above, field.name), hints[field.name]
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if is_dataclass(part):
                yield from all_fields(part, (*above, field.name))


def with_value(kind: str, place: Sequence[str], value: str) -> str:
    """The YAML of a configuration in which one field has a value."""
    top, *below = place
    values = {**REQUIRED[kind], "start": "model.safetensors"} if top == "distillation" else dict(REQUIRED[kind])
    for name in reversed(below):
        value = f"{{{name}: {value}}}"
    if top == "data" and kind == "finetune" and below != ["path"] and below:
        value = value.replace("{", "{path: pictures, ", 1)
    return f"kind: {kind}\n" + "".join(f"{name}: {one}\n" for name, one in (values | {top: value}).items())


def train(text: str | bytes, **others: str):
    """A builder: a training with a configuration, and other files."""

    def build(folder: Path, originals: Originals) -> list[object]:
        (folder / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        for name, other in others.items():
            (folder / f"{name}.yaml").write_text(other)
        return ["train", "c.yaml"]

    return build


@generator
def values_of_every_field(random: Random) -> Iterator[Case]:
    for kind, what in KINDS.items():
        for place, hint in all_fields(what.config_class()):
            value = random.choice(wrong_values(hint))
            if place[-1] in ("p_mean", "w_start") and value == "-1e9":
                value = "-1e10"
            yield Case(f"{kind} {'.'.join(place)}: {value[:20]!r}", train(with_value(kind, place, value)), fails("c.yaml", place[-1]))


TOO_MUCH = {  # a right type, but more than anyone can mean
    ("finetune", "loop.batch"): [16_385, 2**39],
    ("finetune", "loop.accumulate"): [65, 2**39],
    ("finetune", "loop.workers"): [257, 2**39],
    ("finetune", "loop.lr"): [1e20, 11, 1e-300, 0],
    ("finetune", "loop.weight_decay"): [11, 1e20],
    ("finetune", "loop.clip"): [0, 1e-300, 1e9],
    ("finetune", "lora.rank"): [4097, 2**39],
    ("finetune", "lora.alpha"): [0, 1e-300, 1e9],
    ("finetune", "data.max_pixels"): [2**27, 2**39],
    ("finetune", "data.base_pixels"): [2**27, 2**39],
    ("finetune", "shift_base"): [16_385, 2**39],
    ("finetune", "lora.targets"): [
        "['(.|.)*!']",
        "['(a+)+$']",
        "['.*.*.*.*.*x']",
        "['[']",
        "['a{1,9}{1,9}{1,9}{1,9}{1,9}']",
        "[]",
        "['(?P<a>']",
    ],
    ("finetune", "objective.epsilon"): [1e-300, 0.5],
    ("finetune", "objective.adaptive_floor"): [1e-300, 1e20],
    ("tim", "transformer.hidden_size"): [16_385, 10**9],
    ("tim", "transformer.depth"): [257, 10**9],
    ("tim", "transformer.num_heads"): [257, 10**9],
    ("tim", "transformer.patch_size"): [257, 10**9],
    ("tim", "transformer.z_dim"): [16_385, 10**9],
    ("tim", "text.layers"): [257, 10**9],
    ("tim", "text.heads"): [3, 10**9],
    ("tim", "text.head_dim"): [1026, 10**9],
    ("tim", "transformer.new_condition"): ["t-t", "r-t"],
    ("tim", "transformer.positions"): ["rows", "Grid"],
    ("tim", "matching.cfg"): [-1, 101, 1e20],
    ("tim", "matching.rollout_cfg"): [0.5, 1e20],
    ("tim", "matching.weight"): [0, 1e20],
    ("tim", "data.sizes"): ["{5000x64: 1}", "{64x64: 1e20}", "{64x64: 0}", "{0x64: 1}", "{64: 1}", "{99999x99999: 1}", "{}"],
    ("autoencoder", "encoder_layers"): ["[0, 1, 1, 65]", "[0, 1, 1, 1000000000]"],
    ("autoencoder", "head_dim"): [16_385, 10**9],
    ("autoencoder", "encoder_widths"): ["[16385, 32, 64, 128]", "[1000000000, 1, 1, 16]", "[" + "16, " * 9 + "16]"],
    ("autoencoder", "latent_noise"): [1e20, -1],
    ("autoencoder", "data.forms"): ["{single: 1e308, two: 1e308}", "{none: 1}", "{}"],
}


@generator
def more_than_anyone_can_mean(random: Random) -> Iterator[Case]:
    for (kind, key), values in TOO_MUCH.items():
        value = random.choice(values)
        place = key.split(".")
        yield Case(f"{kind} {key} is {value!r:.30}", train(with_value(kind, place, str(value))), fails("c.yaml", place[-1]))
    sizes = f"data: {{sizes: {{4096x{random.randrange(2048, 4097, 8)}: 1}}}}\n"
    yield Case("a batch of too many pixels", train(f"kind: autoencoder\noutput: run\n{sizes}"), fails("loop.batch", "megapixels"))


FINETUNE = "kind: finetune\noutput: run\nmodel: model.safetensors\ndata: {path: pictures}\n"
YAML: dict[str, tuple[str | bytes, tuple[object, ...]]] = {
    "empty": ("", ("c.yaml", "nothing")),
    "a list": ("- a\n- b\n", ("c.yaml", "keys")),
    "a number": ("3\n", ("c.yaml", "3")),
    "comments alone": ("# nothing\n", ("c.yaml", "nothing")),
    "a colon": (":", ("c.yaml",)),
    "an open list": ("kind: [", ("c.yaml", "line")),
    "an open text": ("kind: 'a", ("c.yaml", "line")),
    "tabs": ("kind: tim\nloop:\n\tsteps: 3\n", ("c.yaml", "spaces")),
    "two documents": (f"{FINETUNE}---\n{FINETUNE}", ("c.yaml",)),
    "no UTF-8": (b"kind: caf\xe9\n", ("c.yaml", "UTF-8")),
    "UTF-16": ("kind: tim\n".encode("utf-16"), ("c.yaml", "UTF-8")),
    "NUL": ("kind: \0\n", ("c.yaml",)),
    "binary": (bytes(range(256)), ("c.yaml",)),
    "a key twice": (f"{FINETUNE}output: other\n", ("c.yaml", "output", "twice")),
    "an unknown key": (f"{FINETUNE}outptu: x\n", ("outptu", "output")),
    "an unknown kind": ("kind: lora\n", ("kind", "lora")),
    "no kind": ("output: x\n", ("kind",)),
    "a list as kind": ("kind: [tim]\n", ("kind",)),
    "an alias of nothing": ("kind: *a\n", ("c.yaml", "line")),
    "an alias of itself": ("a: &a {b: *a}\n", ("c.yaml",)),
    "aliases": ("".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9 if k else 'x')}]\n" for k in range(20)), ("c.yaml", "values")),
    "merges": ("a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 20)), ("c.yaml",)),
    "deep lists": ("a: " + "[" * 20_000, ("c.yaml", "levels")),
    "deep mappings": ("{a: " * 9000, ("c.yaml", "levels")),
    "many values": ("a: [" + "1," * 20_000 + "1]", ("c.yaml", "values")),
    "many bytes": ("a: " + "x" * 10**6, ("c.yaml",)),
    "a Python object": (f"{FINETUNE}lora: !!python/object/apply:os.system ['true']\n", ("c.yaml", "tag")),
    "another tag": (f"{FINETUNE}lora: !lora {{rank: 4}}\n", ("c.yaml", "tag")),
    "a set": (f"{FINETUNE}lora: !!set {{rank}}\n", ("c.yaml", "tag")),
    "a surrogate": ('kind: "\\ud800"\n', ("c.yaml",)),
    "a mapping as key": ("{a: 1}: 2\n", ("c.yaml", "key")),
    "escape codes": (f'{FINETUNE}"\\e]0;x\\a": 1\n', ("c.yaml",)),
    "a long key": (f"{FINETUNE}{'k' * 900}: 1\n", ("c.yaml", "unknown")),
    "no required key": ("kind: tim\noutput: run\n", ("c.yaml", "autoencoder", "missing")),
    "null for a required key": (FINETUNE.replace("model.safetensors", "null"), ("c.yaml", "model")),
}
BASES = {
    "nothing": "none.yaml",
    "this file": "c.yaml",
    "a folder": ".",
    "a list": "[a.yaml, b.yaml]",
    "a number": "3",
    "empty": "''",
    "null": "null",
    "a device": "/dev/zero",
    "NUL": '"a\\0b"',
    "a long name": "a" * 300,
    "a user who is not there": "~nobody-here/a.yaml",
}


@generator
def damaged_yaml(random: Random) -> Iterator[Case]:
    for name, (text, named) in YAML.items():
        yield Case(f"YAML: {name}", train(text), fails(*named))
    for name, base in BASES.items():
        yield Case(f"a base: {name}", train(f"base: {base}\nkind: tim\n"), fails("c.yaml"))
    yield Case("bases in a circle", train("base: a.yaml", a="base: b.yaml", b="base: c.yaml"), fails("base"))
    length = random.randrange(60, 300)
    chain = {f"b{k}": f"base: b{k + 1}.yaml" for k in range(length)} | {f"b{length}": "kind: none"}
    yield Case("a long chain of bases", train("base: b0.yaml", **chain), fails("base", "deep"))


@generator
def special_configurations(random: Random) -> Iterator[Case]:
    special = {
        "a FIFO": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a folder": Path.mkdir,
        "missing": lambda path: None,
        "a link to itself": lambda path: path.symlink_to(path.name),
    }
    for name, make in special.items():

        def build(folder: Path, originals: Originals, make=make) -> list[object]:
            make(folder / "c.yaml")
            return ["train", "c.yaml"]

        yield Case(f"a configuration is {name}", build, fails("c.yaml"))

    def second_is_bad(folder: Path, originals: Originals) -> list[object]:
        originals.copy(originals.image, folder / "second.yaml")
        return [*train("kind: autoencoder\noutput: run\n")(folder, originals), "second.yaml"]

    yield Case("the second configuration is an image", second_is_bad, fails("second.yaml"))
