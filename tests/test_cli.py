"""The command line: what it writes, prints and refuses."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import mentions
from tim_core import Pipeline, TimError, __version__, cli
from tim_core.weights.save import convert

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle left of a blue square"
PROGRESS = re.compile(r"%\||step \[")
COMMANDS = ("sample", "sweep", "evaluate", "inspect", "convert", "pack", "train")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run(*words) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(run):
    """fails(code, *words) -> the one line of the error."""

    def fails(code, *words):
        found, out, err = run(*words)
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not PROGRESS.search(line)]
        assert found == code and out == "" and len(lines) == 1 and lines[0].startswith("tim: error: "), (found, out, err)
        assert "Traceback" not in err and not list(Path.cwd().glob("*.png")) and not list(Path.cwd().glob("*.part"))
        return lines[0]

    return fails


# Help


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in COMMANDS) and "examples:" in out
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0 and len(out.splitlines()) > 8
        assert f"tim {command} " in out.split("example")[-1]
    assert run("--version") == (0, f"tim {__version__}\n", "")


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_the_terminal(run, monkeypatch, command, columns):
    """Texts are wrapped at the terminal's width and at 78 columns; the examples, which can be pasted, have at most 78 themselves."""
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(*filter(None, [command]), "--help")
    text, examples = re.split(r"\nexamples?:\n", out)
    assert max(map(len, text.splitlines())) <= columns and max(map(len, examples.splitlines())) <= 78
    description = re.split(r"\n\n(?:positional arguments|options):\n", text)[0].partition("\n\n")[2]
    assert max(map(len, description.splitlines())) <= 78
    if command:
        assert description.split() == cli.COMMANDS[command].DESCRIPTION.split()


def test_help_imports_nothing_slow():
    words = [sys.executable, "-X", "importtime", "-m", "tim_core", "--help"]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "examples:" in done.stdout and "tim_core.cli" in imported and not {"torch", "numpy", "PIL"} & imported


# sample


def test_sample_writes_the_pipelines_image(run, tiny):
    options = ("--steps", 3, "--cfg", 3, "--size", "32x48", "--seed", 5, "--negative", "a circle")
    code, out, err = run("sample", PROMPT, "--model", tiny, *options, "-o", "picture.png")
    assert code == 0 and out.splitlines()[0] == "picture.png" and "5 NFE" in out and "step" in err
    images = Pipeline.load(tiny, device="cpu")([PROMPT], "a circle", steps=3, cfg=3.0, width=32, height=48, seed=5)
    expected = np.clip(255.0 * images[0].numpy(), 0, 255).astype(np.uint8)
    with Image.open("picture.png") as image:
        assert image.format == "PNG" and np.abs(np.asarray(image).astype(int) - expected).max() <= 1
    assert os.listdir() == ["picture.png"]


@pytest.fixture
def recorded(tiny, tmp_path_factory):
    """The tiny checkpoint with a record of its defaults."""
    record = {"native_size": [32, 16], "steps": 2, "cfg": 1.5, "guidance_interval": [0.0, 1.1]}
    return convert(tiny, tmp_path_factory.mktemp("recorded") / "recorded.safetensors", metadata=record)


def test_options_default_to_the_record(run, tiny, recorded):
    assert "4 NFE" in run("sample", "a circle", "--model", recorded, "-o", "a.png")[1]
    assert run("sample", "a circle", "--model", recorded, "--size", "32x16", "--steps", 2, "--cfg", 1.5, "--guidance-interval", "0,1.1",
               "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() and Image.open("a.png").size == (32, 16)
    assert "7 NFE" in run("sample", "a circle", "--model", tiny)[1] and Image.open("out.png").size == (64, 64)
    assert run("sweep", "a circle", "--model", recorded, "--steps", "1,2")[1].splitlines()[1].startswith("1 step, 2 NFE")
    Path("prompts.jsonl").write_text('{"prompt": "a circle"}\n')
    command = ("evaluate", "--model", recorded, "--steps", 2, "--prompts", "prompts.jsonl", "--layout", "geneval", "-o", "made")
    assert run(*command)[0] == 0
    settings = json.loads(Path("made/steps-2/settings.json").read_text())
    assert (settings["width"], settings["height"], settings["cfg"], settings["guidance_interval"]) == (32, 16, 1.5, [0.0, 1.1])


@pytest.mark.parametrize("command", [("sample", "a circle"), ("sweep", "a circle"), ("evaluate",)], ids=lambda words: words[0])
def test_sizes_are_checked_before_the_weights_are_loaded(fails, tiny, monkeypatch, command):
    monkeypatch.setattr(Pipeline, "load", lambda *arguments: pytest.fail("loaded"))
    assert mentions(fails(1, *command, "--model", tiny, "--size", "60x64"), "size", "60x64", 8, "64x64")


def test_a_batch_is_numbered(run, tiny):
    code, out, _ = run("sample", "a circle", "--model", tiny, "--size", "16x16", "--batch", 3, "-o", "many.webp")
    names = ["many-0.webp", "many-1.webp", "many-2.webp"]
    assert code == 0 and out.splitlines()[:3] == names and sorted(os.listdir()) == names


@pytest.mark.parametrize("name, kind", [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.b.png", "PNG")])
def test_the_file_extension_is_the_format(run, tiny, name, kind):
    assert run("sample", "a circle", "--model", tiny, "--size", "16x16", "--steps", 1, "-o", name)[0] == 0
    with Image.open(name) as image:
        assert image.format == kind and image.size == (16, 16)


def test_out_png_is_the_default_and_is_replaced(run, tiny):
    Path("out.png").write_text("an older file")
    assert run("sample", "a circle", "--model", tiny, "--size", "16x16", "--times", "1, 0.5, 0")[0] == 0
    assert Image.open("out.png").size == (16, 16) and os.listdir() == ["out.png"]
    assert os.stat("out.png").st_mode & 0o777 == 0o666 & ~cli_umask()


def cli_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_modes_and_intervals_reach_the_sampler(run, tiny):
    options = ("--model", tiny, "--size", "16x16")
    assert "5 NFE" in run("sample", "a circle", *options, "--guidance-interval", "0.3,0.6")[1]
    assert "4 NFE" in run("sample", "a circle", *options, "--cfg", 1, "--mode", "diffusion", "--stochasticity", "0.5")[1]


# sweep


def test_sweep_writes_one_labelled_sheet(run, tiny):
    code, out, _ = run("sweep", PROMPT, "--model", tiny, "--size", "16x16", "--steps", "1,2,4", "-o", "sweep.png")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "sweep.png"
    assert [line[:14] for line in lines[1:]] == ["1 step, 1 NFE,", "2 steps, 3 NFE", "4 steps, 7 NFE"]
    with Image.open("sweep.png") as sheet:
        assert sheet.size[0] == 3 * 192 + 4 * 8 and sheet.size[1] > 192
        pixels = np.asarray(sheet).astype(int)
    images = Pipeline.load(tiny, device="cpu")(PROMPT, steps=4, width=16, height=16)
    expected = np.clip(255.0 * images[0].numpy(), 0, 255).astype(int).repeat(12, 0).repeat(12, 1)
    assert np.abs(pixels[8:200, 2 * 200 + 8 : 2 * 200 + 200] - expected).max() <= 1
    assert run("sweep", PROMPT, "--model", tiny, "--size", "16x16", "--steps", "1 2", "--columns", 1)[0] == 0


# evaluate


def test_evaluate_writes_a_report(run, tiny):
    options = ("--steps", "1,2", "--prompts-per-task", 1, "--images", 1, "--tasks", "single,two")
    code, out, err = run("evaluate", "--model", tiny, *options, "-o", "scores")
    report = json.loads(Path("scores/report.json").read_text())
    assert code == 0 and [p["steps"] for p in report["curve"]] == [1, 2] and set(report["curve"][0]["tasks"]) == {"single", "two"}
    assert str(Path("scores/report.json")) in out and "overall" in out and Path("scores/curve.png").is_file() and "image" in err


def test_evaluate_makes_images_for_other_benchmarks(run, fails, tiny):
    Path("prompts.jsonl").write_text('{"item_id": "a7", "prompt": "a circle"}\n')
    options = ("evaluate", "--model", tiny, "--prompts", "prompts.jsonl", "--size", "16x16")
    code, out, _ = run(*options, "--layout", "dpg", "--steps", "1,2", "-o", "dpg")
    assert code == 0 and out.splitlines() == ["dpg/steps-1/pictures", "dpg/steps-2/pictures"]
    with Image.open("dpg/steps-2/pictures/a7.png") as image:
        assert image.size == (32, 32)
    assert run(*options, "--layout", "geneval", "--steps", 1, "-o", "geneval")[0] == 0
    assert len(list(Path("geneval/steps-1/00000/samples").iterdir())) == 4
    for given in (("--tasks", "two"), ("--prompts-per-task", 3)):
        assert given[0] in fails(1, *options, "--layout", "geneval", *given)
    assert mentions(fails(1, "evaluate", "--model", tiny, "--prompts-per-task", 0), "prompts per task", 0)
    assert "--layout" in fails(1, *options) and "--prompts" in fails(1, "evaluate", "--layout", "dpg")
    assert "--baseline" in fails(1, *options, "--layout", "dpg", "--baseline", "report.json")


def test_a_baseline(run, tiny):
    options = ("evaluate", "--model", tiny, "--steps", "1,2", "--prompts-per-task", 1, "--images", 1, "--tasks", "single")
    assert "vs baseline" not in run(*options, "-o", "first")[1]
    code, out, _ = run(*options, "--baseline", "first/report.json", "-o", "second")
    assert code == 0 and "vs baseline" in out and "+0.000 +- 0.000" in out and "monotone" in out


@pytest.mark.parametrize("file, code", [("tiny", 0), ("nothing", 1)])
def test_the_package_is_the_command(capsys, monkeypatch, tiny, file, code):
    monkeypatch.setattr(sys, "argv", ["tim_core", "inspect", str(tiny) if file == "tiny" else file])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tim_core", run_name="__main__")
    assert stop.value.code == code and ("TiM" in capsys.readouterr().out) == (code == 0)


def test_the_shift_reaches_the_sampler(run, tiny):
    options = ("--model", tiny, "--size", "16x16")
    for name, more in (("shifted", ("--steps", 2, "--shift", 3)), ("own", ("--times", "1, 0.75, 0")), ("even", ("--steps", 2))):
        assert run("sample", "a circle", *options, *more, "-o", f"{name}.png")[0] == 0
    images = {name: Path(f"{name}.png").read_bytes() for name in ("shifted", "own", "even")}
    assert images["shifted"] == images["own"] != images["even"]
    assert run("evaluate", *options, "--steps", 2, "--prompts-per-task", 1, "--images", 1, "--shift", 3, "-o", "scores")[0] == 0
    assert json.loads(Path("scores/report.json").read_text())["sampling"]["shift"] == 3


# files


def test_inspect(run, tiny, tmp_path):
    trained = [line.strip() for line in run("inspect", "tim-shapes")[1].splitlines()]
    assert any(line.startswith("trained for ") and "steps" in line for line in trained)
    assert any(line.startswith('text: {"head_dim": 64, ') for line in trained) and max(map(len, trained)) < 500
    assert '2300: {"loop.steps": [3000, 4000], "matching.cfg": [2.5, 1.5]}' in trained
    code, out, _ = run("inspect", tiny)
    assert code == 0 and "TiM" in out and "Gemma-3" in out and "DC-AE" in out
    torch.save({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.bin")
    assert run("inspect", tmp_path / "flux.bin")[1].startswith(f"{tmp_path / 'flux.bin'}: a Flux-like transformer")


def test_inspect_goes_on_after_a_bad_file(run, tiny, tmp_path):
    (tmp_path / "bad.safetensors").write_text("hello")
    code, out, err = run("inspect", tiny, "bad.safetensors", "nothing.bin", tiny)
    lines = err.splitlines()
    assert code == 1 and out.count("TiM checkpoint") == 2 and len(lines) == 2
    assert lines[0].startswith("tim: error: bad.safetensors") and lines[1].startswith("tim: error: nothing.bin")


def test_the_example_of_train_is_of_files_that_are_there():
    names = [word for word in cli.train.EXAMPLES.split() if word.endswith(".yaml")]
    assert len(names) == 4 and all(any(ROOT.glob(name)) for name in names)


def test_convert_and_pack(run, tiny):
    code, out, _ = run("convert", tiny, "half.safetensors", "--dtype", "bf16")
    assert code == 0 and out == "half.safetensors\n"
    assert "bfloat16" in run("inspect", "half.safetensors")[1]
    code, out, _ = run("pack", "--model", "half.safetensors", "--text-encoder", tiny, "--vae", tiny, "packed.safetensors")
    assert code == 0 and out == "packed.safetensors\n"
    assert run("sample", "a circle", "--model", "packed.safetensors", "--size", "16x16")[0] == 0


# train


def test_train_calls_training(run, monkeypatch):
    import tim_core.training

    seen = []
    monkeypatch.setattr(tim_core.training, "run", lambda paths: seen.extend(paths) or [Path("made.safetensors")])
    assert run("train", "a.yaml", "b.yaml")[:2] == (0, "made.safetensors\n") and seen == [Path("a.yaml"), Path("b.yaml")]


# Failures

USAGE = {
    "no command": (), "an unknown command": ("paint",), "no prompt": ("sample",), "an unknown option": ("sample", "a", "--stpes", "4"),
    "size": ("sample", "a", "--size", "large"), "steps": ("sample", "a", "--steps", "many"), "a list": ("sweep", "a", "--steps", "1,x"),
    "interval": ("sample", "a", "--guidance-interval", "0.5"), "attention": ("sample", "a", "--attention", "quick"), "pack": ("pack", "a"),
}


@pytest.mark.parametrize("words", USAGE.values(), ids=USAGE)
def test_wrong_usage_is_2(fails, words):
    assert "--help" in fails(2, *words)


ERRORS = {
    "no such model": (("sample", "a", "--model", "nothing.safetensors"), "nothing.safetensors"),
    "no file extension": (("sample", "a", "-o", "image"), "image: .*extension.*[.]png"),
    "an unsupported format": (("sample", "a", "-o", "picture.tga"), "[.]tga"),
    "no folder": (("sweep", "a", "-o", "none/sweep.png"), "none"),
    "no steps": (("sweep", "a", "--steps", ","), "--steps"),
    "zero steps in a list": (("sweep", "a", "--steps", "0,1"), "0,1"),
    "no columns": (("sweep", "a", "--columns", "0"), "--columns"),
    "an empty batch": (("sample", "a", "--batch", "0"), "--batch"),
    "inspect nothing": (("inspect", "nothing.safetensors"), "nothing.safetensors"),
    "convert nothing": (("convert", "nothing.bin", "new.safetensors"), "nothing.bin"),
    "train nothing": (("train", "nothing.yaml"), "nothing.yaml"),
}


@pytest.mark.parametrize("words, named", ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(fails, words, named):
    assert re.search(named, fails(1, *words))


MODEL_ERRORS = {
    "size": (("--size", "60x64"), "multiple of 8"), "no size": (("--size", "0x64"), "0x64"), "steps": (("--steps", "0"), "steps"),
    "cfg": (("--cfg", "nan"), "cfg"), "seed": (("--seed", "-1"), "seed"), "times": (("--times", "1,2"), "times"),
    "device": (("--device", "abacus"), "device"), "dtype": (("--dtype", "int8"), "dtype"),
}


@pytest.mark.parametrize("words, named", MODEL_ERRORS.values(), ids=MODEL_ERRORS)
def test_values_that_cannot_be_used(fails, tiny, words, named):
    assert named in fails(1, "sample", "a circle", "--model", tiny, *words)


def test_files_that_are_no_model(fails, tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    assert "text.safetensors" in fails(1, "sample", "a", "--model", "text.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 8 + b"{" * 100)
    assert "broken.safetensors" in fails(1, "inspect", "broken.safetensors")


def test_the_output_is_checked_before_the_work(fails, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", lambda *arguments: pytest.fail("loaded"))
    fails(1, "sample", "a", "-o", "picture.tga")
    fails(1, "sweep", "a", "-o", ".")


@pytest.mark.parametrize("raised, code, said", [
    (KeyboardInterrupt(), 1, "interrupted"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
    (MemoryError(), 1, "out of memory: try a smaller --size or --batch"),
    (PermissionError(13, "Permission denied", "weights.safetensors"), 1, "weights.safetensors: Permission denied"),
    (TimError("one thing:\n  found two, expected one"), 1, "one thing: found two, expected one"),
    (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "")
def test_whatever_happens_is_one_line(fails, monkeypatch, raised, code, said):
    def load(*arguments):
        raise raised

    monkeypatch.setattr(Pipeline, "load", load)
    assert said in fails(code, "sample", "a circle")


@pytest.mark.parametrize("words, advice", [
    (("train", "a.yaml"), "loop.checkpointing: true"), (("convert", "a.bin", "b.safetensors"), "more memory"),
    (("upscale", "a.png", "a circle"), "--factor"), (("sweep", "a circle"), "--size"),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_out_of_memory_advises_what_the_command_has(fails, monkeypatch, words, advice):
    def no_memory(args):
        raise MemoryError

    monkeypatch.setattr(cli.COMMANDS[words[0]], "run", no_memory)
    line = fails(1, *words)
    assert mentions(line, "out of memory") and advice in line
    options = set(re.findall(r"--[a-z]+", line))
    monkeypatch.undo()
    command = cli.build_parser().parse_args(words)
    assert all(hasattr(command, option.strip("-")) for option in options)


def test_a_full_disk_leaves_nothing(fails, tiny, monkeypatch):
    def save(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert "No space left" in fails(1, "sample", "a circle", "--model", tiny, "--size", "16x16")


@pytest.mark.parametrize("words", [("-v", "inspect", "nothing"), ("inspect", "nothing", "-v")], ids=["before", "after"])
def test_verbose_adds_the_traceback(run, words):
    code, _, err = run(*words)
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("tim: error: nothing")


def test_a_closed_pipe_stops_silently(capsys, monkeypatch, tiny):
    """As in `tim inspect FILE | head -1`: neither the command nor the flush at the interpreter's end says anything."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["inspect", str(tiny)]) == 1
        pipe.write("what was still to come")
        pipe.flush()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_stops_nothing(monkeypatch, tmp_path, tiny, closed):
    """As in `tim sample ... >&-`, where Python has no such stream."""
    monkeypatch.setattr(sys, closed, None)
    assert cli.main(["sample", "a circle", "--model", str(tiny), "--size", "16x16", "--steps", "1", "-o", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").is_file()


def test_usage_errors_are_one_printable_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "a circle", "--steps", "4\n\x1b[31m" + "9" * 5000])
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line and len(line) < 2200


def test_a_size_is_the_models_or_bounded(fails, tiny):
    """One limit for every way to sample."""
    for words in (("sample", "a"), ("sweep", "a"), ("evaluate",)):
        assert mentions(fails(1, *words, "--model", tiny, "--size", "8x100000"), "size: 8x100000", "4096", "nearest", "8x4096")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("buffering", [1, -1], ids=["by line", "whole"])
def test_a_full_standard_output_is_named(buffering, tiny, monkeypatch, capsys):
    with open("/dev/full", "w", buffering=buffering, encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["inspect", str(tiny)]) == 1
    assert mentions(capsys.readouterr().err, "tim: error: standard output", "cannot be written")
