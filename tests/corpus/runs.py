"""Training data, runs that are resumed, and reports: damaged, edited, of another kind, or in the way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.corpus.case import Case, Fails, Gives, Outcome, fails, generator
from tests.corpus.originals import Originals
from tim_core.cli import main

LOOP = "loop: {steps: %d, batch: 2, save_every: 2, log_every: 1, keep: 9, workers: 0, warmup: 1, autocast: false%s}\n"
AUTOENCODER = (
    "kind: autoencoder\noutput: run\nencoder_widths: [4, 8]\nencoder_layers: [0, 1]\ndecoder_widths: [4, 8]\ndecoder_layers: [0, 1]\n"
    "latent_channels: 4\nhead_dim: 4\ndata: {sizes: {16x16: 1}}\n"
)


def made(name: str, look_into: str = "run") -> Callable[[Outcome, Originals], None]:
    """A file of this name is made, and no temporary one is left."""

    def look(outcome: Outcome, originals: Originals) -> None:
        assert (outcome.folder / look_into / name).is_file() and not list(outcome.folder.rglob("*.part"))

    return look


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda p: p.symlink_to(p.name),
}


# Data of `kind: finetune`


def draw(path: Path, colour: str = "red", caption: str | bytes | None = "a circle") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)


def finetune(fill: Callable[[Path], object], path: str = "pictures", classes: bool = False, more: str = ""):
    """A builder: a LoRA on a folder of images that `fill` makes."""

    def build(folder: Path, originals: Originals) -> list[object]:
        (folder / "pictures").mkdir()
        fill(folder / "pictures")
        model = originals.classes if classes else originals.model
        text = f"kind: finetune\noutput: run\nmodel: {model}\nlora: {{rank: 2}}\ndata: {{path: {path}, cache: cache, base_pixels: 256}}\n"
        (folder / "c.yaml").write_text(text + (LOOP % (1, "")) + more)
        return ["train", "c.yaml"]

    return build


def listed(*lines: str) -> Callable[[Path], None]:
    def fill(place: Path) -> None:
        draw(place / "0.png")
        (place / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")

    return fill


def whole(place: Path) -> None:
    for number, colour in enumerate(("red", "blue", "green")):
        draw(place / f"{number}.png", colour)


def whole_and(more: Callable[[Path], object]) -> Callable[[Path], None]:
    def fill(place: Path) -> None:
        whole(place)
        more(place)

    return fill


NO_DATA: dict[str, tuple[Callable[[Path], object], tuple[object, ...]]] = {
    "an empty folder": (lambda place: None, ("pictures", "none")),
    "images without captions": (lambda place: draw(place / "a.png", caption=None), ("none",)),
    "captions without images": (lambda place: (place / "a.txt").write_text("a"), ("none",)),
    "captions in Latin-1": (lambda place: draw(place / "a.png", caption=b"caf\xe9"), ("none",)),
    "captions of many bytes": (lambda place: draw(place / "a.png", caption="a" * 10**6), ("none",)),
    "text named .png": (lambda place: [(place / f"a{end}").write_text("a") for end in (".png", ".txt")], ("none",)),
    "a cache in the way": (lambda place: (whole(place), (place.parent / "cache").write_text("")), ("cache",)),
}
NO_LINES = {
    "text": "hello",
    "a list": "[1]",
    "no image": '{"caption": "a"}',
    "no caption": '{"image": "0.png"}',
    "a number": '{"image": "0.png", "caption": 3}',
    "an image that is a number": '{"image": 3, "caption": "a"}',
    "deep": '{"image": "0.png", "caption": ' + "[" * 20_000,
    "cut": '{"image": "0.png", "ca',
    "not finite": '{"image": "0.png", "caption": NaN}',
    "a long caption": '{"image": "0.png", "caption": "' + "a" * 10**6 + '"}',
}
NO_IMAGES = {
    "missing": "none.png",
    "a device": "/dev/zero",
    "a folder": ".",
    "NUL": "a\\u0000.png",
    "long": "a" * 300,
    "this list": "list.jsonl",
    "empty": "",
    "a surrogate": "\\ud800.png",
}
NO_LABELS = ["-1", "10", "11", str(10**20), "1.5", "true", '"1"', "null", "[0]", "1e0"]
ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda place: (os.mkfifo(place / "f.png"), (place / "f.txt").write_text("a")),
    "a caption that is a device": lambda place: (draw(place / "f.png", caption=None), (place / "f.txt").symlink_to("/dev/zero")),
    "a link to nothing": lambda place: ((place / "f.png").symlink_to("none"), (place / "f.txt").write_text("a")),
    "a cut image": lambda place: (draw(place / "f.png"), (place / "f.png").write_bytes((place / "f.png").read_bytes()[:60])),
    "many that are no images": lambda place: [(place / f"f{k}{end}").write_text("a") for k in range(60) for end in (".png", ".txt")],
}


@generator
def training_data(random: Random) -> Iterator[Case]:
    for name, (fill, named) in NO_DATA.items():
        yield Case(f"data: {name}", finetune(fill), fails(*named))
    for name, line in NO_LINES.items():
        yield Case(f"a list: {name}", finetune(listed(line), "pictures/list.jsonl"), fails("list.jsonl", "line", 1))
    for name, file in NO_IMAGES.items():
        line = f'{{"image": "{file}", "caption": "a"}}'
        yield Case(f"a list of an image: {name}", finetune(listed(line), "pictures/list.jsonl"), fails("list.jsonl", "none"))
    for label in random.sample(NO_LABELS, 6):
        line = f'{{"image": "0.png", "label": {label}}}'
        yield Case(f"a label: {label}", finetune(listed(line), "pictures/list.jsonl", classes=True), fails("list.jsonl"))
    yield Case("images in no class folder", finetune(whole, classes=True), fails("pictures", "class folder"))
    yield Case("no class folders", finetune(lambda place: None, classes=True), fails("pictures", "class folders"))
    many = finetune(lambda place: [draw(place / f"c{k:02}" / "a.png", caption=None) for k in range(12)], classes=True)
    yield Case("more classes than the model has", many, fails("pictures", "class 10", 9))
    for name in ("none", "/dev/zero", "a" * 300, "~nobody-here/a", "c.yaml"):
        yield Case(f"a data path: {name[:20]}", finetune(whole, name), fails("too long" if len(name) > 255 else name))
    for name, more in ODD_FILES.items():
        said = ("skipped", "pictures", "skipped")
        yield Case(f"a file among the data: {name}", finetune(whole_and(more)), Gives(made("lora.safetensors"), said))
    loop = whole_and(lambda place: (place / "again").symlink_to("."))
    yield Case("folders in a circle", finetune(loop), Gives(made("lora.safetensors"), ("pictures", "3 images")))


def no_weights(change: Callable[[Path], str], *named: str) -> tuple[Callable[[Path, Originals], list[object]], Fails]:
    """A builder of a LoRA of weights that are not there, with more keys that `change` returns, and its error, which comes first."""

    def build(folder: Path, originals: Originals) -> list[object]:
        whole(folder / "pictures")
        text = "kind: finetune\nmodel: none.safetensors\ndata: {path: pictures}\nlora: {rank: 2}\n"
        (folder / "c.yaml").write_text(text + LOOP % (4, "") + change(folder))
        return ["train", "c.yaml"]

    return build, fails(*named)


def run_with(make: Callable[[Path], object], name: str) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        (folder / "run").mkdir()
        make(folder / "run" / name)
        return "output: run\n"

    return change


def is_the_model(place: str, link: Callable[[str, Path], object]) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        (folder / "run").mkdir()
        (folder / "none.safetensors").write_text("weights")
        link("none.safetensors", folder / place)
        return f"output: run\ncheckpoint: {place}\n"

    return change


@generator
def outputs_of_training(random: Random) -> Iterator[Case]:
    """Are checked before the weights, which are not there, are read."""
    for name, make in IN_THE_WAY.items():
        for file in random.sample(["metrics.csv", "lora.safetensors", "step-00000002.pt", "sample-00000004.png"], 2):
            yield Case(f"{name} in the way of a new {file}", *no_weights(run_with(make, file), file))
    outputs = {
        "the images": ("pictures", "data.path"),
        "a folder in the images": ("pictures/run", "data.path"),
        "a long name": ("a" * 300, "too long"),
        "many folders": ("d/" * 2100, "too long"),
        "a FIFO": ("c.yaml", "file"),
    }
    for name, (output, named) in outputs.items():
        yield Case(f"the output of a training: {name}", *no_weights(lambda folder, output=output: f"output: {output}\n", named))
    for name, link in {"a symbolic link": lambda a, b: b.symlink_to(f"../{a}"), "a hard link": os.link}.items():
        change = is_the_model("run/made.safetensors", link)
        yield Case(f"a training writes to its model: {name}", *no_weights(change, "made.safetensors", "input", "none.safetensors"))

    def cache(folder: Path) -> str:
        (folder / "pictures.cache").write_text("")
        return "output: run\n"

    yield Case("a file in the way of the cache", *no_weights(cache, "data.cache", "pictures.cache"))


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors in a safetensors file, under the same metadata."""

    def write(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)

    return write


def flip_last(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 64
    file.write_bytes(data)


BAD_CACHE: dict[str, Callable[[Path], object]] = {
    "a bit": flip_last,
    "NaN": rewritten(lambda tensors: tensors["latent"].fill_(float("nan"))),
    "no condition": rewritten(lambda tensors: tensors.pop("condition")),
    "another shape": rewritten(lambda tensors: tensors.update(latent=tensors["latent"][:, :1])),
    "another dtype": rewritten(lambda tensors: tensors.update(latent=tensors["latent"].long())),
}
LOST_CACHE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "no metadata": lambda file: save_file(load_file(file), file),
    "gone": Path.unlink,
    "text": lambda file: file.write_text("hello"),
}


def with_cache(damage: Callable[[Path], object], workers: int):
    """A builder: a run that is resumed after the files of its cache were damaged."""

    def build(folder: Path, originals: Originals) -> list[object]:
        words = finetune(whole)(folder, originals)
        assert main([str(word) for word in words]) == 0
        text = (folder / "c.yaml").read_text()
        (folder / "c.yaml").write_text(text.replace("steps: 1", "steps: 6").replace("workers: 0", f"workers: {workers}"))
        for file in (folder / "cache").glob("*.safetensors"):
            damage(file)
        return words

    return build


@generator
def damaged_caches(random: Random) -> Iterator[Case]:
    for name, damage in random.sample(sorted(BAD_CACHE.items()), 3):
        error = fails("cache", "damaged", "remove")
        yield Case(f"a cached file: {name}", with_cache(damage, random.choice([0, 1])), error)
    for name, damage in random.sample(sorted(LOST_CACHE.items()), 2):
        yield Case(f"a cached file: {name}", with_cache(damage, 0), Gives(made("step-00000006.pt"), ("resumed",)))
    for name in random.sample(["a FIFO", "a folder", "a device"], 2):

        def replace(file: Path, make=IN_THE_WAY[name]) -> None:
            file.unlink()
            make(file)

        yield Case(f"a cached file: {name}", with_cache(replace, 0), fails("cache", "give"))


# Runs


def finished(originals: Originals) -> Path:
    """The folder of a run of 4 steps, with checkpoints of steps 2 and 4."""
    folder = originals.folder / "finished"
    if not folder.exists():
        folder.mkdir()
        config = folder / "c.yaml"
        config.write_text(AUTOENCODER.replace("output: run", f"output: {folder / 'run'}") + LOOP % (4, ""))
        assert main(["train", str(config)]) == 0
    return folder / "run"


def resumed(change: Callable[[Path], object], steps: int = 6, loop: str = "", text: str = AUTOENCODER):
    """A builder: the finished run, to go on to another step, with a changed folder."""

    def build(folder: Path, originals: Originals) -> list[object]:
        shutil.copytree(finished(originals), folder / "run")
        (folder / "c.yaml").write_text(text + LOOP % (steps, loop))
        change(folder / "run")
        return ["train", "c.yaml"]

    return build


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        file = run / "step-00000004.pt"
        state = torch.load(file, weights_only=True)
        other = change(state)
        torch.save(state if other is None else other, file)

    return write


def fill_first(part: str, value: float) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        tensor = next(iter(state[part].values()))
        tensor[(0,) * tensor.ndim] = value

    return edited(change)


def drop_first(state: dict[str, Any]) -> None:
    state["model"].pop(next(iter(state["model"])))


NO_STATES: dict[str, tuple[Callable[[Path], None], tuple[object, ...]]] = {
    "NaN in the model": (fill_first("model", float("nan")), ("model", "finite")),
    "infinity in the EMA": (fill_first("ema", float("inf")), ("ema", "finite")),
    "a list": (edited(lambda state: [1, 2]), ("no checkpoint",)),
    "a text": (edited(lambda state: "hello"), ("no checkpoint",)),
    "another step": (edited(lambda state: state | {"step": 3}), ("step 3",)),
    "no step": (edited(lambda s: {k: s[k] for k in s if k != "step"}), ("step",)),
    "integers": (edited(lambda state: state | {"model": {name: value.long() for name, value in state["model"].items()}}), ("integers",)),
    "a tensor less": (edited(drop_first), ("missing",)),
    "another shape": (edited(lambda state: state | {"ema": {name: value[:1] for name, value in state["ema"].items()}}), ("shape",)),
    "optimisers that are a number": (edited(lambda state: state | {"optimizers": {"param_groups": 3}}), ("optimiser",)),
    "other frozen weights": (edited(lambda state: state | {"fixed": "none"}), ("frozen",)),
    "endless seconds": (edited(lambda state: state | {"seconds": float("inf")}), ("seconds",)),
    "another optimiser": (edited(lambda state: state["settings"]["loop"].update(optimizer="\x1b[31m")), ("loop.optimizer",)),
}


NO_METRICS = {
    "NUL": b"\0" * 50,
    "binary": bytes(range(256)),
    "a column twice": b"step,step\n1,1\n",
    "no steps": b"a,b\n1,2\n",
    "JSON": b"{}\n",
    "a huge field": b"step,loss\n1," + b"9" * 10**6 + b"\n",
    "Latin-1": b"step,loss\n1,\xe9\n",
}
ODD_METRICS = {
    "empty": b"",
    "cut": b"step,loss\n1",
    "rows of other lengths": b"step,loss\n1\n2,3,4\nx,1\n-1,2\n",
    "an open text": b'step,loss\n"1,2\n',
}


def put(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return change


def damaged(random: Random) -> Callable[[Path], None]:
    share, bit, how = random.random(), random.randrange(8), random.choice(["cut", "bit", "zeros", "empty"])

    def change(run: Path) -> None:
        file = run / "step-00000004.pt"
        data = bytearray(file.read_bytes())
        place = 100 + int(share * (len(data) - 400))
        if how == "bit":  # of a weight: what else changes may be harmless
            weight = next(value for value in torch.load(file, weights_only=True)["model"].values() if value.ndim == 1)
            data[data.index(weight.numpy().tobytes()) + place % weight.nbytes] ^= 1 << bit
        elif how == "zeros":
            data[-120:] = bytes(120)
        else:
            del data[place if how == "cut" else 0 :]
        file.write_bytes(data)

    return change


@generator
def runs_to_resume(random: Random) -> Iterator[Case]:
    for name, (change, named) in NO_STATES.items():
        yield Case(f"a checkpoint: {name}", resumed(change), fails("step-00000004.pt", *named))
    for name, data in NO_METRICS.items():
        yield Case(f"metrics: {name}", resumed(put(lambda path, data=data: path.write_bytes(data), "metrics.csv")), fails("metrics.csv"))
    ready = Gives(made("step-00000006.pt"), ("resumed", "step-00000004.pt"))
    for name, data in ODD_METRICS.items():
        yield Case(f"odd metrics: {name}", resumed(put(lambda path, data=data: path.write_bytes(data), "metrics.csv")), ready)
    before = Gives(made("step-00000006.pt"), ("step-00000004.pt", "damaged", "resuming from step-00000002.pt"))
    for number in range(5):
        yield Case(f"a damaged checkpoint {number}", resumed(damaged(random)), before)

    def all_damaged(run: Path) -> None:
        for file in run.glob("step-*.pt"):
            file.write_bytes(file.read_bytes()[:-50])

    yield Case("only damaged checkpoints", resumed(all_damaged), fails("step-00000004.pt", "damaged"))
    for name, make in IN_THE_WAY.items():
        yield Case(f"{name} in the way of the model", resumed(put(make, "autoencoder.safetensors")), fails("autoencoder.safetensors"))
        file = random.choice(["metrics.csv", "sample-00000006.png", "step-00000006.pt"])
        yield Case(f"{name} in the way of {file}", resumed(put(make, file)), fails(file))
        later = Gives(made("autoencoder.safetensors"), ("step-00000009.pt", "damaged", "resuming from step-00000004.pt"))
        yield Case(f"{name} as a later checkpoint", resumed(put(make, "step-00000009.pt")), later)
    for key, value in {"lr": "0.5", "seed": "9", "ema": "0.5", "weight_decay": "0.3", "clip": "9.0"}.items():
        build = resumed(lambda run: None, 4, f", {key}: {value}")
        yield Case(f"a finished run with another {key}", build, fails("step-00000004.pt", "finished", f"loop.{key}", value))
    fewer = resumed(lambda run: None, 4, text=AUTOENCODER.replace("latent_channels: 4", "latent_channels: 2"))
    yield Case("a finished run with another architecture", fewer, fails("step-00000004.pt"))
    yield Case("an output that is a file", resumed(lambda run: (shutil.rmtree(run), run.write_text(""))), fails("output", "run"))


# Reports and prompt files of `tim evaluate`

EVALUATE = ("evaluate", "--steps", "1", "--tasks", "single", "--prompts-per-task", "2", "--images", "1", "--size", "16x16", "-o", "scores")
Change = Callable[[dict[str, Any]], Any]
NO_REPORTS: dict[str, str | bytes | Change] = {
    "empty": "",
    "null": "null",
    "a list": "[]",
    "binary": bytes(range(256)),
    "deep": "[" * 20_000,
    "cut": '{"protocol": {',
    "no protocol": "{}",
    "a list as protocol": lambda r: r.update(protocol=[1]),
    "a text as model": lambda r: r.update(model="x"),
    "no sampling": lambda r: r.update(sampling=None),
    "a curve of nulls": lambda r: r.update(curve=[None]),
    "a number as curve": lambda r: r.update(curve=3),
    "steps in words": lambda r: r["curve"][0].update(steps="1"),
    "a list of steps": lambda r: r["curve"][0].update(steps=[1]),
    "no NFE": lambda r: r["curve"][0].update(nfe=0),
    "NFE in words": lambda r: r["curve"][0].update(nfe="x"),
    "endless NFE": lambda r: r["curve"][0].update(nfe=1e308),
    "accuracy in words": lambda r: r["curve"][0].update(overall="x"),
    "an accuracy of 5": lambda r: r["curve"][0].update(overall=5),
    "another accuracy": lambda r: r["curve"][0].update(overall=0.75),
    "no error": lambda r: r["curve"][0].update(stderr=None),
    "NaN": lambda r: r["curve"][0].update(overall=float("nan")),
    "a list of tasks": lambda r: r["curve"][0].update(tasks=[]),
    "no images": lambda r: r["curve"][0].update(correct=""),
    "more images": lambda r: r["curve"][0].update(correct="1" * 99),
    "other letters": lambda r: r["curve"][0].update(correct="xy"),
    "a point twice": lambda r: r["curve"].append(r["curve"][0]),
    "many points": lambda r: r.update(curve=[{**r["curve"][0], "steps": k} for k in range(1, 5000)]),
    "another seed": lambda r: r["protocol"].update(seed=5),
    "other weights": lambda r: r["model"].update(weights="\x1b[31m"),
    "a cfg in words": lambda r: r["curve"][0].update(cfg="x"),
}


def clean_report(originals: Originals) -> dict[str, Any]:
    folder = originals.folder / "scores"
    if not folder.exists():
        assert main([*EVALUATE[:-1], str(folder), "--model", str(originals.model)]) == 0
    return json.loads((folder / "report.json").read_text())


def with_report(content: str | bytes | Change, baseline: bool):
    def build(folder: Path, originals: Originals) -> list[object]:
        data = content
        if callable(data):
            report = clean_report(originals)
            data(report)
            data = json.dumps(report)
        place = folder / ("other" if baseline else "scores")
        place.mkdir()
        (place / "report.json").write_bytes(data if isinstance(data, bytes) else data.encode())
        return [*EVALUATE, "--model", originals.model, *(["--baseline", "other/report.json"] if baseline else [])]

    return build


NO_PROMPTS = {
    "empty": b"",
    "lines": b"\n\n\n",
    "text": b"hello",
    "a list": b"[]",
    "no prompt": b'{"tag": 1}',
    "a number": b'{"prompt": 3}',
    "null": b'{"prompt": null}',
    "deep": b'{"prompt": ' + b"[" * 20_000,
    "binary": bytes(range(256)),
    "Latin-1": b'{"prompt": "\xe9"}',
    "long": b'{"prompt": "' + b"x" * 10**6 + b'"}',
    "a huge number": b'{"prompt": "a", "tag": ' + b"9" * 6000 + b"}",
}
NO_NAMES = ["a.b", "../a", "", "a/b", "a" * 300, "\\u00e9" * 130, "a\\n", "a b", "\\ud800", "\\u0000"]
EXPORT = ("evaluate", "--steps", "1", "--size", "16x16", "-o", "made", "--prompts", "prompts.jsonl", "--layout")


@generator
def reports_and_prompts(random: Random) -> Iterator[Case]:
    for name, content in NO_REPORTS.items():
        baseline = name != "other weights" and random.random() < 0.5
        yield Case(f"a report: {name}", with_report(content, baseline), fails("report.json"))

    def prompts(data: bytes, layout: str):
        def build(folder: Path, originals: Originals) -> list[object]:
            (folder / "prompts.jsonl").write_bytes(data)
            return [*EXPORT, layout, "--model", originals.model]

        return build

    for name, data in NO_PROMPTS.items():
        yield Case(f"prompts: {name}", prompts(data, random.choice(["geneval", "dpg"])), fails("prompts.jsonl"))
    for number, item in enumerate(random.sample(NO_NAMES, 4)):
        data = f'{{"prompt": "a", "item_id": "{item}"}}'.encode()
        yield Case(f"a name of a prompt {number}: {item[:9]}", prompts(data, "dpg"), fails("prompts.jsonl", "line", 1))
    for value in random.sample(["null", "true", "1.5", "[1]", "{}"], 2):
        data = b'{"prompt": "a", "item_id": %s}' % value.encode()
        yield Case(f"a name of a prompt: {value}", prompts(data, "dpg"), fails("prompts.jsonl", "line", 1))
    twice = b'{"prompt": "a", "item_id": "a"}\n' * 2
    yield Case("a name of a prompt: twice", prompts(twice, "dpg"), fails("prompts.jsonl", "twice"))
    for name, make in IN_THE_WAY.items():

        def build(folder: Path, originals: Originals, make=make) -> list[object]:
            make(folder / "prompts.jsonl")
            return [*EXPORT, "geneval", "--model", originals.model]

        yield Case(f"prompts are {name}", build, fails("prompts.jsonl"))
        chart = random.choice(["report.json", "curve.png"])

        def in_the_way(folder: Path, originals: Originals, make=make, chart=chart) -> list[object]:
            (folder / "scores").mkdir()
            make(folder / "scores" / chart)
            return [*EVALUATE, "--model", originals.model]

        yield Case(f"{name} in the way of {chart}", in_the_way, fails(chart))

    def report_is(name: str, *words: str):
        def build(folder: Path, originals: Originals) -> list[object]:
            clean_report(originals)
            shutil.copytree(originals.folder / "scores", folder / "scores")
            originals.copy(originals.model, folder / "model.safetensors")
            (folder / "scores" / name).unlink()
            os.link(folder / words[-1], folder / "scores" / name)
            return [*EVALUATE, *words]

        return build

    def baseline_is_replaced(folder: Path, originals: Originals) -> list[object]:
        clean_report(originals)
        shutil.copytree(originals.folder / "scores", folder / "scores")
        return [*EVALUATE, "--model", originals.model, "--baseline", "scores/report.json"]

    yield Case("a baseline is this run's report", baseline_is_replaced, fails("report.json", "input"))
    chart = random.choice(["report.json", "curve.png"])
    yield Case(f"{chart} is the model", report_is(chart, "--model", "model.safetensors"), fails(chart, "input", "model.safetensors"))

    def prompts_are_replaced(folder: Path, originals: Originals) -> list[object]:
        place = folder / "made" / "steps-1" / "00000" / "metadata.jsonl"
        place.parent.mkdir(parents=True)
        place.write_text('{"prompt": "a red circle"}')
        return [place if word == "prompts.jsonl" else word for word in (*EXPORT, "geneval", "--model", originals.model)]

    yield Case("prompts are a file of this run", prompts_are_replaced, fails("metadata.jsonl", "input"))
    for name in ("settings.json", "00000", "00000/samples/00001.png", "00000/metadata.jsonl"):
        made, make = random.choice(list(IN_THE_WAY.items()))

        def in_the_way_of_images(folder: Path, originals: Originals, name=name, make=make) -> list[object]:
            place = folder / "made" / "steps-1" / name
            place.parent.mkdir(parents=True)
            make(place)
            (folder / "prompts.jsonl").write_text('{"prompt": "a red circle"}')
            return [*EXPORT, "geneval", "--model", originals.model]

        if (made, name) != ("a folder", "00000"):
            yield Case(f"{made} in the way of {name}", in_the_way_of_images, fails(name.partition("/")[0]))

    def scores_are_a_file(folder: Path, originals: Originals) -> list[object]:
        (folder / "scores").write_text("")
        return [*EVALUATE, "--model", originals.model]

    yield Case("scores are a file", scores_are_a_file, fails("scores", "folder"))


# Images and models of `tim previews`


@generator
def previews(random: Random) -> Iterator[Case]:
    def build(fill: Callable[[Path], object], file: str = "model.safetensors"):
        def make(folder: Path, originals: Originals) -> list[object]:
            originals.copy(originals.model, folder / "model.safetensors")
            (folder / "pictures").mkdir()
            fill(folder / "pictures")
            return ["previews", file, "--images", "pictures"]

        return make

    bad = {
        "text": lambda place: (place / "a.png").write_text("a"),
        "a FIFO": lambda place: os.mkfifo(place / "a.png"),
        "a device": lambda place: (place / "a.png").symlink_to("/dev/zero"),
        "a cut image": lambda place: (draw(place / "a.png"), (place / "a.png").write_bytes((place / "a.png").read_bytes()[:50])),
    }
    for name, fill in bad.items():
        yield Case(f"previews of {name}", build(fill), fails("a.png"))
    for name, images in {"one colour": [(64, 64)] * 9, "a few pixels": [(1, 1), (2, 1), (1, 3)]}.items():

        def fill(place: Path, images=images) -> None:
            for number, size in enumerate(images):
                Image.new("RGB", size, (number, 9, 200)).save(place / f"{number}.png")

        yield Case(f"previews of {name}", build(fill), fails("previews", "colours", "more"))
    yield Case("previews of an empty folder", build(lambda place: None), fails("pictures", "no images"))
    yield Case("previews into an image", build(lambda place: draw(place / "a.png"), "pictures/a.png"), fails("a.png"))
