"""Option values, prompts and output paths that no run can use, and odd ones that it can."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

from PIL import Image

from tests.corpus.case import Case, Gives, Outcome, fails, generator, gives
from tests.corpus.originals import PROMPT, Originals

RUNS = {
    "sample": ("sample", PROMPT, "--size", "16x16", "--steps", "2", "-o", "out.png"),
    "sweep": ("sweep", PROMPT, "--size", "16x16", "--steps", "1,2", "-o", "out.png"),
    "upscale": ("upscale", "image.png", PROMPT, "--steps", "2", "-o", "out.png"),
    "evaluate": ("evaluate", "--steps", "1", "--tasks", "single", "--prompts-per-task", "1", "--images", "1", "-o", "scores"),
}
NO_NUMBERS = ["", " ", "ten", "1_0", "\u0663", "\uff12", "\u00b2", "0x10", "1,5", "4 4", "--", "1e", "\0", "4\n4", "\u221e", "1" * 50 + "_"]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, "1.5", "1e3", "nan", "inf", "-inf", "1.0", "9" * 5000]
WHOLE_NUMBERS = {
    "sample": ("--steps", "--seed", "--batch"),
    "sweep": ("--columns", "--seed"),
    "upscale": ("--stages", "--seed"),
    "evaluate": ("--prompts-per-task", "--images", "--seed", "--batch"),
}
NUMBERS = {
    "sample": ("--cfg", "--stochasticity", "--shift"),
    "sweep": ("--cfg", "--shift"),
    "upscale": ("--factor", "--strength", "--cfg"),
    "evaluate": ("--cfg", "--shift"),
}
NO_LISTS = [
    "x",
    "1,x",
    "1,-2",
    "8-1",
    "1-8 x1",
    "1-8 +0",
    "\u0663",
    "1_0",
    "1," * 150,
    "1-1000000000",
    "4,8,4",
    "1e3",
    "1" + " " * 10**5 + "x",
]
SEEDS = [-1, 2**64, 2**65 + 1, -(2**63), 10**30]
CFGS = ["0", "0.99", "-1", "nan", "inf", "-inf", "1e20", "1e-300", "100.1", "-0", "1e400"]
SHIFTS = ["0", "-1", "nan", "inf", "1e20", "1e-300", "0.009", "101", "-inf"]
INTERVALS = ["1,2", "0.5,0.5", "0.7,0.2", "-1,1", "nan,1", "0,nan", "0,inf", "1e20,1e21", "1,1.5", "-inf,inf", "0.9,-0.9"]
SIZES = ["0x0", "0x16", "17x16", "16x100000", "99996x16", "8192x8192", "16x15", "1x1", "4100x4100", "16x" + "9" * 20]
OUTSIDE = {  # values that are numbers, or whatever the option takes, but that no run can use; what the line names
    "sample": {
        "--steps": ([0, -1, 10_001, 10**9, 10**30, -(10**6)], "steps"),
        "--seed": (SEEDS, "seed"),
        "--cfg": (CFGS, "cfg"),
        "--batch": ([0, -1, 4097, 10**6, 10**20], "--batch"),
        "--shift": (SHIFTS, "shift"),
        "--guidance-interval": (INTERVALS, "guidance"),
        "--stochasticity": (["-0.1", "1.01", "nan", "inf", "1e20", "-1e-9"], "stochasticity"),
        "--times": (
            [
                "1",
                "",
                "0,1",
                "1,0.5,0.5,0",
                "2,0",
                "1,nan,0",
                "1,0.5",
                "0.9,0",
                "1;x;0",
                "1,-0.1",
                "1,inf,0",
                "1,0,0",
                "1,0.5_5,0",
                "1,\u0660.5,0",
                "1,0x0",
            ],
            "times",
        ),
        "--size": (SIZES, "size"),
        "--tile": (["0", "-1", "255", "258", "1e3", "on", "", "10_24", "9" * 30], "tile"),
        "--device": (["cuda:99", "abacus", "cuda:-1", "", "cpu:x", "meta", "cpu:5", "\u00b2"], "device"),
        "--dtype": (["int8", "float8", "", "FP32", "float64", "torch.float32", "32"], "dtype"),
    },
    "sweep": {
        "--steps": (["", ",", "0", "1,0", "1,10001", f"1,{10**30}", "1.5", "6000,5000", "0-8"], "steps"),
        "--columns": ([0, -1, -(10**20)], "--columns"),
        "--cfg": (CFGS, "cfg"),
        "--size": (SIZES, "size"),
        "--guidance-interval": (INTERVALS, "guidance"),
    },
    "upscale": {
        "--factor": (["0", "0.24", "-1", "nan", "inf", "1e20", "1e-300", "17", "1000"], "factor"),
        "--strength": (["0", "-0.1", "1.01", "nan", "inf", "1e20"], "strength"),
        "--stages": ([0, -1, 9, 10**6, 10**30], "stages"),
        "--steps": (
            ["0", "-1", "", ",", "4,4", "8;4", "4.5", "1e3", "1_0", "\u0663", str(10**6), "9" * 30, "x", "4,x", "1-8", "1," * 150],
            "steps",
        ),
        "--size": (["0x0", "0x32", "32x0", "4x4096", "100000x100000", "5000x5000", "4097x4097"], "size"),
        "--seed": (SEEDS, "seed"),
        "--cfg": (CFGS, "cfg"),
        "--guidance-interval": (INTERVALS, "guidance"),
    },
    "evaluate": {
        "--steps": (["", "0", "1,0", "10001", "5000 5001", str(10**20)], "steps"),
        "--images": ([0, -1, 4097, 10**12], "images"),
        "--prompts-per-task": ([0, -1, 100_001, 10**12], "prompts per task"),
        "--batch": ([0, -1, 4097, 10**20], "batch"),
        "--tasks": (["", "all", "Single", "single;two", "\u0663"], "tasks"),
        "--size": (SIZES, "size"),
        "--cfg": (CFGS, "cfg"),
        "--seed": (SEEDS, "seed"),
        "--shift": (SHIFTS, "shift"),
        "--guidance-interval": (INTERVALS, "guidance"),
    },
}
PAIRS = {  # what no option may be, or needs
    "--layout alone": (("--layout", "dpg"), ("--layout", "--prompts")),
    "--prompts alone": (("--prompts", "prompts.jsonl"), ("--prompts", "--layout")),
    "--tasks with --prompts": (("--prompts", "prompts.jsonl", "--layout", "dpg"), ("--tasks", "--prompts")),
}


def with_options(command: str, *words: object):
    """A builder: a run of a command with more options, which overrule those before."""

    def build(folder: Path, originals: Originals) -> list[object]:
        originals.copy(originals.image, folder / "image.png")
        return [*RUNS[command], "--model", originals.model, *words]

    return build


@generator
def words_that_are_no_numbers(random: Random) -> Iterator[Case]:
    for options, words in ((WHOLE_NUMBERS, NO_WHOLE_NUMBERS), (NUMBERS, NO_NUMBERS)):
        for command, names in options.items():
            for name in names:
                for word in random.sample(words, 2):
                    yield Case(f"{command} {name} {word[:20]!r}", with_options(command, f"{name}={word}"), fails(name, code=2))


@generator
def lists_that_are_none(random: Random) -> Iterator[Case]:
    for command in ("sweep", "evaluate"):
        for text in random.sample(NO_LISTS, 5):
            yield Case(f"{command} --steps {text[:20]!r}", with_options(command, f"--steps={text}"), fails("--steps", code=2))


@generator
def values_outside_their_range(random: Random) -> Iterator[Case]:
    for command, options in OUTSIDE.items():
        for name, (values, named) in options.items():
            for value in random.sample(values, 2):
                yield Case(f"{command} {name} is {value!r:.40}", with_options(command, f"{name}={value}"), fails(named))


@generator
def options_that_do_not_go_together(random: Random) -> Iterator[Case]:
    for name, (words, named) in PAIRS.items():
        yield Case(name, with_options("evaluate", *words), fails(*named))
    yield Case("steps with times", with_options("sample", "--times", "1,0"), fails("--steps", 2, "--times", 1))
    yield Case(
        "a shift with times",
        lambda f, o: ["sample", PROMPT, "--model", o.model, "--times", "1,0.4,0", "--shift", "2"],
        fails("shift", "2.0", "times"),
    )


@generator
def values_that_depend_on_a_file(random: Random) -> Iterator[Case]:
    for strength in random.sample(["101", "-100.1", "1e30", "nan", "-inf"], 2):
        build = lambda f, o, strength=strength: [*RUNS["sample"], "--model", o.model, "--lora", f"{o.lora}:{strength}"]  # noqa: E731
        yield Case(f"a LoRA of strength {strength}", build, fails("lora.safetensors", "strength", f"{float(strength)}"))
    words = ("--size", "16x16")
    yield Case("evaluate a class model", lambda f, o: [*RUNS["evaluate"], *words, "--model", o.classes], fails("--model", "classes"))
    label = random.choice(["\uff10", "10", "1.5", "-1", "9" * 30, "\u0663", "a cat on a sofa", "0,1"])
    sample = ("sample", "--size", "16x16", "--steps", "1")
    yield Case(f"a class {label}", lambda f, o: [*sample, "--model", o.classes, "--", label], fails("class", label))
    for command in (("sample", "a", "--model", ""), ("inspect", ""), ("convert", "", "out.safetensors"), ("sample", "a", "--lora", ":1")):
        yield Case(f"{command[0]} of {command[-1]!r} as a file", lambda f, o, command=command: command, fails("no such file"))


@generator
def too_many_pixels(random: Random) -> Iterator[Case]:
    batch, size = random.choice([(4096, "512x512"), (300, "1024x1024"), (17, "4096x4096")])
    for name, words, named in (
        ("sample", ("--batch", batch, "--size", size), ("--batch", batch, size, "megapixels", "a smaller --batch")),
        ("sweep", ("--steps", "1-70", "--size", "2048x2048"), ("--steps", 70, "2048x2048", "megapixels", "fewer step counts")),
        ("evaluate", ("--batch", batch, "--size", size), ("--batch", batch, size, "megapixels", "a smaller --batch")),
    ):
        yield Case(f"{name} of too many pixels", with_options(name, *words), fails(*named))


def shows(look_for: tuple[int, int], said: tuple[object, ...] = ()) -> Gives:
    """out.png is made, of this size, and nothing else."""

    def look(outcome: Outcome, originals: Originals) -> None:
        assert outcome.new == ("out.png",) and not outcome.changed, (outcome.new, outcome.changed)
        with Image.open(outcome.folder / "out.png") as image:
            assert image.size == look_for

    return Gives(look, said)


ODD_PROMPTS = {
    "empty": "",
    "spaces": " \t  ",
    "a surrogate": "a \udce9 circle",
    "right to left": "\u202ecircle",
    "emoji": "\U0001f534\u200d\U0001f534",
    "escape codes": "\x1b[31mred\x1b]0;title\x07",
    "lines": "a\nred\r\n\r\ncircle",
    "NUL": "a red\0circle",
    "special tokens": "<bos><eos><pad>",
    "format codes": "%s %d {0} \\x41 $HOME",
    "a byte order mark": "\ufeffa circle",
    "a private character": "\U0010ffff \ue000",
}
STRANGE_PROMPTS = {"right to left", "emoji", "escape codes", "NUL", "format codes", "a byte order mark", "a private character"}
SAME_PROMPTS = ["  A Red   circle ", "a red\ncircle", "a red, circle!", "\uff41 red circle", "A\tRED\u00a0CIRCLE"]  # as PROMPT


WEIGHTED_PROMPTS = [
    "a (red:1.3) circle",
    "(a red circle:0.5)",
    "((a:1.1) red:2) circle",
    "a red circle embedding:bad",
    "a red (circle:-.5)",
]


@generator
def prompts_with_weights(random: Random) -> Iterator[Case]:
    for number, prompt in enumerate(random.sample(WEIGHTED_PROMPTS, 3)):
        reference = gives("out.png", lambda o: o.result(*RUNS["sample"], "--model", o.model), ("weights", "a red circle"))
        run = ["sample", prompt, *RUNS["sample"][2:]]
        yield Case(f"a prompt with weights {number}", lambda f, o, run=run: [*run, "--model", o.model], reference)


@generator
def lines_beside_progress(random: Random) -> Iterator[Case]:
    """Are lines of their own."""
    for command, words in {
        "sample": (*RUNS["sample"], "--negative", "zebra"),
        "sweep": ("sweep", "a zebra", *RUNS["sweep"][2:]),
        "upscale": ("upscale", "image.png", "a zebra", *RUNS["upscale"][3:]),
    }.items():

        def build(folder: Path, originals: Originals, words=words) -> list[object]:
            originals.copy(originals.image, folder / "image.png")
            return [*words, "--model", originals.model]

        yield Case(f"an unknown word of {command}", build, Gives(lambda outcome, originals: None, ("does not know", "zebra")))


@generator
def odd_prompts(random: Random) -> Iterator[Case]:
    for name, prompt in ODD_PROMPTS.items():
        words = random.choice([("sample", prompt), ("sample", f"--negative={prompt}", PROMPT)])
        run = [*words, "--size", "16x16", "--steps", "2", "-o", "out.png"]
        said = ("does not know",) if name in STRANGE_PROMPTS else ()
        yield Case(f"a prompt: {name}", lambda f, o, run=run: [*run, "--model", o.model], shows((16, 16), said))
    length = random.randrange(20_000, 100_000)
    long = ["sample", "red " * (length // 4), "--size", "16x16", "--steps", "1", "-o", "out.png"]
    yield Case("a prompt: very long", lambda f, o: [*long, "--model", o.model], shows((16, 16), ("prompt", "tokens", "first")))
    for number, prompt in enumerate(random.sample(SAME_PROMPTS, 3)):
        run = ["sample", prompt, *RUNS["sample"][2:]]
        reference = gives("out.png", lambda o: o.result(*RUNS["sample"], "--model", o.model))
        yield Case(f"a prompt in another spelling {number}", lambda f, o, run=run: [*run, "--model", o.model], reference)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path.name)  # in the working directory: such a path is short
    listener.close()


IN_THE_WAY = {  # what is at the place of the output
    "a FIFO": _fifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/full"),
    "a link into no folder": lambda path: path.symlink_to("none/there.png"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a folder": lambda path: path.symlink_to("."),
}
NO_OUTPUTS = {
    "missing folder": ("none/there.png", "none"),
    "a file as folder": ("image.png/out.png", "folder"),
    "no extension": ("out", "extension"),
    "unknown extension": ("out.xcf", ".xcf"),
    "dash": ("-", "extension"),
    "empty": ("", "extension"),
    "a long name": ("a" * 260 + ".png", "long"),
    "NUL": ("a\0.png", "cannot be written"),
    "this folder": (".", "extension"),
    "a weight file": ("out.safetensors", ".safetensors"),
    "many folders": ("d/" * 2000 + "out.png", "out.png"),
}


@generator
def outputs_that_cannot_be_written(random: Random) -> Iterator[Case]:
    commands = ("sample", "sweep", "upscale")
    for name, make in IN_THE_WAY.items():
        command = random.choice(commands)

        def build(folder: Path, originals: Originals, make=make, command=command) -> list[object]:
            make(folder / "out.png")
            return with_options(command)(folder, originals)

        yield Case(f"{name} in the way of {command}", build, fails("out.png"))
    for name, (path, named) in NO_OUTPUTS.items():
        command = random.choice(commands)
        yield Case(f"{command} writes to: {name}", with_options(command, f"--output={path}"), fails(named))

    def in_the_way_of_the_last(folder: Path, originals: Originals) -> list[object]:
        (folder / "out-2.png").mkdir()
        return with_options("sample", "--batch", "3")(folder, originals)

    yield Case("a folder in the way of the last image", in_the_way_of_the_last, fails("out-2.png", "folder"))


ODD_NAMES = ["\x1b[31mred", "two\nlines", "\udce9", "\x1b]0;title\x07", "back\b\b\b", "\x9b31m", "\u202ename", "car\rriage", "\u2028line"]


@generator
def odd_names_of_outputs(random: Random) -> Iterator[Case]:
    """Are written and printed as one line."""

    def named(name: str) -> Gives:
        def look(outcome: Outcome, originals: Originals) -> None:
            shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
            assert outcome.new == (name,) and outcome.out.split("\n")[0] == shown

        return Gives(look)

    for command in ("sample", "sweep", "upscale"):
        for name in random.sample(ODD_NAMES, 2):
            words = ("--steps", "1", "--output", f"{name}.png")
            yield Case(f"{command} writes to {name!r}", with_options(command, *words), named(f"{name}.png"))
    for command in ("convert", "pack"):
        name = f"{random.choice(ODD_NAMES)}.safetensors"
        words = {"convert": ["convert"], "pack": ["pack", "--model"]}[command]
        yield Case(f"{command} writes to {name!r}", lambda f, o, words=words, name=name: [*words, o.model, name], named(name))


@generator
def outputs_through_links(random: Random) -> Iterator[Case]:
    def build(folder: Path, originals: Originals) -> list[object]:
        (folder / "out.png").symlink_to("real.png")
        return with_options("sample")(folder, originals)

    def look(outcome: Outcome, originals: Originals) -> None:
        clean = originals.result(*RUNS["sample"], "--model", originals.model)
        assert (outcome.folder / "out.png").is_symlink() and (outcome.folder / "real.png").read_bytes() == clean.read_bytes()

    yield Case("an output through a link", build, Gives(look))
