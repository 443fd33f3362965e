"""Folders in Hugging Face layout and of parts: indexes, configs and tokenizers that are damaged, and files that are not regular."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.corpus.case import Case, Either, Gives, Outcome, fails, generator, gives
from tests.corpus.originals import PROMPT, SAMPLE, Originals
from tests.hostile import SPECIAL, deep_json, special_file

CLEAN = gives("out.png", lambda originals: originals.result(*SAMPLE, "--model", originals.parts))
FOLDERS = {"transformer": "transformer", "text": "text_encoder", "vae": "vae"}
SOCKETS: list[object] = []  # listeners, which live until the end


def with_folder(change: Callable[[Path], object], command: tuple[str, ...] = (*SAMPLE, "--model", "parts")):
    """A builder: a folder of parts, changed."""

    def build(folder: Path, originals: Originals) -> list[object]:
        originals.copy(originals.parts, Path("parts"))
        change(Path("parts"))
        return list(command)

    return build


@generator
def clean_folders(random: Random) -> Iterator[Case]:
    yield Case("a clean folder of parts", with_folder(lambda folder: None), CLEAN)
    words = ("pack", "--model", "parts/transformer", "--text-encoder", "parts/text_encoder", "--vae", "parts/vae", "out.safetensors")

    def look(outcome: Outcome, originals: Originals) -> None:
        made, wanted = load_file(outcome.folder / "out.safetensors"), originals.tensors
        assert made.keys() == wanted.keys()
        assert all(torch.equal(made[name], wanted[name]) for name in made if not name.endswith("_json"))

    yield Case("a clean folder of parts, pack", with_folder(lambda folder: None, words), Gives(look))


def shards(folder: Path, index: Any, cut: int = 40) -> None:
    """Splits the weights of a folder in two; index(weight_map) -> what is written as the index."""
    whole = load_file(folder / "model.safetensors")
    names, weight_map = sorted(whole), {}
    for number, some in enumerate((names[:cut], names[cut:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: whole[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors").unlink()
    made = index(weight_map)
    (folder / "model.safetensors.index.json").write_text(made if isinstance(made, str) else json.dumps(made))


INDEXES: dict[str, Callable[[dict[str, str]], Any]] = {
    "a list": lambda m: {"weight_map": list(m)},
    "null": lambda m: {"weight_map": None},
    "a number": lambda m: {"weight_map": 3},
    "numbers": lambda m: {"weight_map": dict.fromkeys(m, 1)},
    "lists": lambda m: {"weight_map": {name: [file] for name, file in m.items()}},
    "a missing file": lambda m: {"weight_map": m | {"x": "model-00003-of-00003.safetensors"}},
    "a half": lambda m: {"weight_map": {name: file for name, file in m.items() if "00001" in file}},
    "an empty name": lambda m: {"weight_map": m | {"x": ""}},
    "a folder's name": lambda m: {"weight_map": m | {"x": ".."}},
    "a null byte": lambda m: {"weight_map": m | {"x": "a\0.safetensors"}},
    "a name of 5000 characters": lambda m: {"weight_map": m | {"x": "a" * 5000}},
    "itself": lambda m: {"weight_map": m | {"x": "model.safetensors.index.json"}},
    "deep JSON": lambda m: deep_json(),
    "no object": lambda m: [m],
    "half of itself": lambda m: json.dumps({"weight_map": m})[:500],
    "nothing": lambda m: "",
}


@generator
def indexes_that_lie(random: Random) -> Iterator[Case]:
    for title, index in INDEXES.items():
        part = random.choice(list(FOLDERS.values()))
        cut = random.randrange(5, 15)
        build = with_folder(lambda folder, index=index, part=part, cut=cut: shards(folder / part, index, cut))
        yield Case(f"an index with {title} of the {part}", build, fails(part))
    outside = {"a path outside": "../../../etc/passwd/", "an absolute path": "/tmp/", "a path below": "sub/"}
    for title, start in outside.items():
        part = random.choice(list(FOLDERS.values()))

        def index_outside(m: dict[str, str], start=start) -> Any:
            return {"weight_map": {name: start + file for name, file in m.items()}}

        build = with_folder(lambda folder, part=part, index=index_outside: shards(folder / part, index))
        yield Case(f"an index with {title} of the {part}", build, Either(fails(part), CLEAN))
    build = with_folder(lambda folder: [shards(folder / part, lambda m: {"weight_map": m}, 10) for part in FOLDERS.values()])
    yield Case("a sharded model", build, CLEAN)

    def twice(folder: Path) -> None:
        shards(folder / "vae", lambda m: {"weight_map": m}, 10)
        first = load_file(folder / "vae" / "model-00001-of-00002.safetensors")
        second = load_file(folder / "vae" / "model-00002-of-00002.safetensors")
        save_file(second | {(name := sorted(first)[0]): first[name]}, folder / "vae" / "model-00002-of-00002.safetensors")

    yield Case("a tensor in two shards", with_folder(twice), fails("vae", "another shard"))


@generator
def folders_with_other_contents(random: Random) -> Iterator[Case]:
    def swap(folder: Path) -> None:
        (folder / "vae" / "model.safetensors").rename(folder / "x")
        (folder / "transformer" / "model.safetensors").rename(folder / "vae" / "model.safetensors")
        (folder / "x").rename(folder / "transformer" / "model.safetensors")

    def removed(*names: str) -> Callable[[Path], object]:
        return lambda folder: [(folder / name).unlink() for name in names]

    def narrow(folder: Path) -> None:
        path = folder / "text_encoder" / "model.safetensors"
        save_file({name: value[..., :8].contiguous() if value.shape[-1] == 16 else value for name, value in load_file(path).items()}, path)

    def two_files(folder: Path) -> None:
        (folder / "vae" / "model.safetensors").rename(folder / "vae" / "a.safetensors")
        (folder / "vae" / "b.safetensors").write_bytes((folder / "vae" / "a.safetensors").read_bytes())

    others: dict[str, tuple[Callable[[Path], object], tuple[object, ...]]] = {
        "the parts swapped": (swap, ("DC-AE",)),
        "no transformer's weights": (removed("transformer/model.safetensors"), ("transformer", "no weights")),
        "no text encoder's weights": (removed("text_encoder/model.safetensors"), ("text_encoder", "no weights")),
        "no VAE's weights": (removed("vae/model.safetensors"), ("vae", "no weights")),
        "no tokenizer": (removed("text_encoder/tokenizer.json"), ("text_encoder", "tokenizer")),
        "no config": (removed("text_encoder/config.json"), ("text_encoder", "config.json")),
        "a narrow text encoder": (narrow, ("parts",)),
        "two files of one part": (two_files, ("vae", 2)),
        "a VAE of another model": (lambda folder: (folder / "vae" / "model.safetensors").write_bytes(
            (folder / "text_encoder" / "model.safetensors").read_bytes()), ("vae", "DC-AE")),
    }  # fmt: skip
    for title, (change, named) in others.items():
        yield Case(f"a folder with {title}", with_folder(change), fails(*named))
    missing = {"transformer": "transformer", "text_encoder": "Gemma-3", "vae": "DC-AE"}
    for part, named in missing.items():

        def change(folder: Path, part=part) -> None:
            (folder / part).rename(folder / f"{part}-x")

        yield Case(f"a folder without {part}", with_folder(change), fails("parts", named))
    yield Case(
        "an empty folder", with_folder(lambda folder: Path("none").mkdir(), (*SAMPLE, "--model", "none")), fails("none", "no weights")
    )


CONFIGS: dict[str, list[Any]] = {
    "num_hidden_layers": [10**9, 0, -1, 1e9, "2", 3, None, [2]], "head_dim": [0, -8, 10**9, 7, "8"], "hidden_size": [0, 10**12, "16", 17],
    "vocab_size": [0, 10**12, 7], "num_attention_heads": [0, -2, 10**9, 3], "num_key_value_heads": [0, -1, 3],
    "intermediate_size": [0, 10**12, 25], "rms_norm_eps": [-1, 0, math.nan, math.inf, "1e-6", 1e30, True],
    "query_pre_attn_scalar": [0, -1, math.nan, "8"], "rope_theta": [-1, math.nan, "x", 1e300], "sliding_window": [0, -1, "512", 1e9],
    "sliding_window_pattern": [0, -1, "x", 10**30], "max_position_embeddings": [0, -1, 1e9, "x"],
    "rope_scaling": ["x", {"rope_type": "none"}, {"rope_type": "linear", "factor": 0}, 3],
    "layer_types": ["x", [], ["full"] * 2, 3, {"a": 1}],
    "model_type": ["llama", "gemma2", 3, ["gemma3_text"], "gemma3"], "hidden_activation": ["none", 3, ["relu"]],
    "text_config": [3, "x", [1], math.nan], "attn_logit_softcapping": [0, -1, math.nan, "x"], "pad_token_id": [-1, 10**9, "x", 5],
    "bos_token_id": [-1, 10**9, "x", 7],
}  # fmt: skip


@generator
def configs_of_the_text_encoder(random: Random) -> Iterator[Case]:
    for key, values in CONFIGS.items():
        value = random.choice(values)

        def change(folder: Path, key=key, value=value) -> None:
            path = folder / "text_encoder" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

        expected: object = fails("parts")
        if value is None or value == []:
            expected = Either(expected, CLEAN)  # as if it were not there
        yield Case(f"{key} {str(value)[:30]!r} in config.json", with_folder(change), expected)


TEXTS: dict[str, Callable[[bytes, float], bytes]] = {
    "cut": lambda data, place: data[: int(place * (len(data) - 1))],
    "empty": lambda data, place: b"",
    "deep": lambda data, place: deep_json().encode(),
    "a list": lambda data, place: b"[" + data + b"]",
    "null": lambda data, place: b"null",
    "a number of 10,000 digits": lambda data, place: b'{"a": ' + b"9" * 10**4 + b"}",
    "no UTF-8": lambda data, place: data.replace(b'"', b'"\xff', 1),
    "UTF-16": lambda data, place: "\ufeff".encode("utf-16-le") + data.decode().encode("utf-16-be"),
    "binary": lambda data, place: bytes(range(256)) * 10,
    "20 MB": lambda data, place: b'{"a": "' + b"x" * 2 * 10**7 + b'"}',
    "a web page": lambda data, place: b"<html></html>",
    "brackets": lambda data, place: b"[" * 10**6,
}


@generator
def json_files_that_are_damaged(random: Random) -> Iterator[Case]:
    for title, change in TEXTS.items():
        for name in ("config.json", "tokenizer.json"):
            place, command = random.random(), random.choice(["sample", "pack", "inspect"])
            words = {
                "sample": (*SAMPLE, "--model", "parts"),
                "inspect": ("inspect", "parts/text_encoder"),
                "pack": ("pack", "--model", "parts/transformer", "--text-encoder", "parts/text_encoder", "out.safetensors"),
            }[command]
            if name == "tokenizer.json" and command == "inspect":
                words = (*SAMPLE, "--model", "parts")

            def damage(folder: Path, name=name, change=change, place=place) -> None:
                path = folder / "text_encoder" / name
                path.write_bytes(change(path.read_bytes(), place))

            yield Case(f"{name} is {title}", with_folder(damage, words), fails("text_encoder"))


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], bool]] = {  # change, and whether it has to be refused
    "no model": (lambda t: t.pop("model"), True),
    "an unknown model": (lambda t: t["model"].update(type="Magic"), True),
    "a model of text": (lambda t: t.update(model="x"), True),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), True),
    "a vocabulary of text": (lambda t: t["model"].update(vocab="x"), True),
    "ids of text": (lambda t: t["model"].update(vocab=dict.fromkeys(t["model"]["vocab"], "1")), True),
    "negative ids": (lambda t: t["model"].update(vocab={name: -id for name, id in t["model"]["vocab"].items()}), True),
    "ids beyond the embedding": (lambda t: t["model"].update(vocab={name: id + 10**6 for name, id in t["model"]["vocab"].items()}), True),
    "one id for all": (lambda t: t["model"].update(vocab=dict.fromkeys(t["model"]["vocab"], 3)), False),
    "no <pad>": (lambda t: t["model"]["vocab"].pop("<pad>"), True),
    "no <bos>": (lambda t: t["model"]["vocab"].pop("<bos>"), True),
    "<pad> at 7": (lambda t: t["model"]["vocab"].update({"<pad>": 7}), True),
    "a Precompiled normaliser": (lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}), True),
    "a Precompiled normaliser without map": (lambda t: t.update(normalizer={"type": "Precompiled"}), True),
    "a Precompiled normaliser in a sequence": (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": "////"}]}), True),
    "a normaliser that multiplies the text": (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "r"}, "content": "r" * 10} for _ in range(7)]}), True),
    "a normaliser that begins with a page": (lambda t: t.update(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), True),
    "an unknown normaliser": (lambda t: t.update(normalizer={"type": "Magic"}), True),
    "a pattern that is none": (lambda t: t.update(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}), True),
    "a number as version": (lambda t: t.update(version=3), True),
    "a version of the future": (lambda t: t.update(version="9.0"), True),
    "added tokens of numbers": (lambda t: t.update(added_tokens=[1, 2]), True),
    "an unknown decoder": (lambda t: t.update(decoder={"type": "Magic"}), True),
    "truncation to nothing": (lambda t: t.update(truncation={"max_length": 0, "strategy": "LongestFirst", "stride": 0,
                                                             "direction": "Right"}), False),
    "padding to 10**9": (lambda t: t.update(padding={"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": None,
                                                     "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}), False),
}  # fmt: skip


@generator
def tokenizers_that_are_damaged(random: Random) -> Iterator[Case]:
    for title, (change, refused) in TOKENIZERS.items():

        def damage(folder: Path, change=change) -> None:
            path = folder / "text_encoder" / "tokenizer.json"
            tokenizer = json.loads(path.read_text())
            change(tokenizer)
            path.write_text(json.dumps(tokenizer))

        expected = fails("tokenizer")
        yield Case(f"a tokenizer with {title}", with_folder(damage), expected if refused else Either(expected, CLEAN), child=True)


def make_special(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "link to a FIFO":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "empty file":
        path.touch()
    elif kind == "random device":
        path.symlink_to("/dev/urandom")
    elif kind == "proc file":
        path.symlink_to("/proc/self/mem")
    elif kind == "a name that is missing":
        pass
    else:
        SOCKETS.append(special_file(kind, path))


KINDS = (
    *SPECIAL,
    "folder",
    "broken link",
    "link to itself",
    "link to a FIFO",
    "empty file",
    "random device",
    "proc file",
    "a name that is missing",
)
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {  # a file, and a command that reads it
    "the model": ("odd.safetensors", (*SAMPLE, "--model", "odd.safetensors")),
    "the model of sweep": ("odd.bin", ("sweep", PROMPT, "--steps", "1", "--model", "odd.bin")),
    "the model of upscale": ("odd.safetensors", ("upscale", "image.png", PROMPT, "--model", "odd.safetensors")),
    "the model of evaluate": ("odd.safetensors", ("evaluate", "--steps", "1", "--model", "odd.safetensors", "-o", "scores")),
    "the LoRA": ("odd.safetensors", (*SAMPLE, "--lora", "odd.safetensors")),
    "the source of convert": ("odd.bin", ("convert", "odd.bin", "out.safetensors")),
    "the file of inspect": ("odd.bin", ("inspect", "odd.bin")),
    "the VAE of pack": ("odd.safetensors", ("pack", "--model", "parts/transformer", "--vae", "odd.safetensors", "out.safetensors")),
    "the text encoder of pack": ("odd.bin", ("pack", "--model", "parts/transformer", "--text-encoder", "odd.bin", "out.safetensors")),
    "the file of previews": ("odd.safetensors", ("previews", "odd.safetensors")),
    "the VAE of previews": ("odd.safetensors", ("previews", "parts/transformer/model.safetensors", "--vae", "odd.safetensors")),
    "the weights in a folder": ("parts/vae/model.safetensors", (*SAMPLE, "--model", "parts")),
    "the config in a folder": ("parts/text_encoder/config.json", (*SAMPLE, "--model", "parts")),
    "the tokenizer in a folder": ("parts/text_encoder/tokenizer.json", (*SAMPLE, "--model", "parts")),
    "the index in a folder": ("parts/vae/model.safetensors.index.json", (*SAMPLE, "--model", "parts")),
}  # fmt: skip


@generator
def files_that_are_not_regular(random: Random) -> Iterator[Case]:
    for title, (name, words) in PLACES.items():
        for kind in random.sample(KINDS, 4):

            def build(folder: Path, originals: Originals, name=name, words=words, kind=kind) -> list[object]:
                originals.copy(originals.parts, Path("parts"))
                originals.copy(originals.image, Path("image.png"))
                Path(name).unlink(missing_ok=True)
                make_special(kind, Path(name))
                return list(words)

            expected: object = fails(Path(name).stem)
            if Path(name).suffix == ".json" and kind in ("a name that is missing", "broken link", "link to itself"):
                expected = Either(fails("parts"), CLEAN)  # a file that need not be there
            yield Case(f"{kind} as {title}", build, expected)
