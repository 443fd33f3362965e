"""The prompt line: `tim sample | sweep | upscale | evaluate | inspect | convert | pack | previews | train`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import TimError
from .files import write_whole

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

EXAMPLES = """\
examples:
  tim sample "a red circle left of a blue square" --seed 0 -o picture.png
  tim sweep "two green triangles" --steps 1,2,4,8,16,32 -o sweep.png
  tim inspect tim-shapes
  tim evaluate --steps 1,4 -o scores

`tim COMMAND --help` explains a command. The bundled model, tim-shapes, needs no download.
It knows circles, squares and triangles in six colours, one to four of a kind or two kinds: a small world, made to be scored exactly."""

SAMPLE = """\
Makes pictures of a prompt.

TiM jumps from any noise level to any lower one, so --steps is a free choice: 1 is fastest, 4 is good, 16 is better.
Guidance (--cfg) acts inside --guidance-interval, whose ends are excluded: by default the first step, at time 1, is not guided, and 4
guided steps cost 7 network evaluations (NFE). The same prompt, seed, size, steps and cfg give the same picture here, in Python and in
ComfyUI."""

SAMPLE_EXAMPLES = """\
examples:
  tim sample "a red circle left of a blue square" --steps 4 --seed 0 -o picture.png
  tim sample "three squares" --batch 4 -o squares.png        writes squares-0.png to squares-3.png
  tim sample "a circle" --size 96x64 --seed 2 --cfg 1
  tim sample "a circle" --times "1, 0.6, 0.2, 0"             steps of your own"""

SWEEP = """\
Makes the same picture, from the same noise, at several numbers of steps, and writes one labelled sheet."""

SWEEP_EXAMPLES = """\
examples:
  tim sweep "a red circle and a blue square" --steps 1,2,4,8,16,32 -o sweep.png
  tim sweep "a circle" --steps 1,2,4,8 --mode diffusion      the same network as an ordinary flow-matching model"""

UPSCALE = """\
Draws a picture again at a larger size, by the same prompt: it is enlarged, noised to the time --strength, and sampled at the new size
as a whole, no tiles. A low strength keeps more of the picture, a high one draws more of it anew; all steps run either way."""

UPSCALE_EXAMPLES = """\
examples:
  tim upscale picture.png "a red circle left of a blue square" -o large.png            twice as large
  tim upscale picture.png "a red circle left of a blue square" --size 128x128 --strength 0.3 --steps 8 -o large.png

The bundled model was trained little beyond 64x64: strength 0.3 suits it, and sizes up to 128x128."""

EVALUATE = """\
Scores a model in the small world as GenEval does: prompts of six tasks, several pictures a prompt, each judged by an exact detector.

Prompts and noise are fixed by --seed and the same at every number of steps. 1 step runs without guidance.
Writes DIR/report.json and DIR/curve.png after every point; what DIR holds of the same model and pictures already is kept.
--twin draws another model's report beside it and compares picture by picture.

--prompts FILE.jsonl makes pictures for another benchmark's own evaluator instead, four a prompt, in DIR/steps-N: --layout geneval wants
the lines of its evaluation_metadata.jsonl, --layout dpg {"item_id": ..., "prompt": ...}. The same command goes on where it was stopped.

`accelerate launch -m tim_core evaluate ...` shares the pictures among several GPUs."""

EVALUATE_EXAMPLES = """\
examples:
  tim evaluate -o scores                                     the whole curve, 1440 pictures a point
  tim evaluate --steps 1,4 --prompts-per-task 10 -o quick    a quick look
  tim evaluate --model my.safetensors --tasks counting,position --size 128x128 -o large
  tim evaluate --model my.safetensors --steps 1,4 --twin scores/report.json -o mine
  tim evaluate --model tim-t2i.safetensors --prompts evaluation_metadata.jsonl --layout geneval --size 1024x1024 --steps 1,4 -o geneval"""

INSPECT = """\
Says what weight files are: their parts, architecture, dtypes, and how they were trained. No code in a file is run.
A file that cannot be read is an error line of its own; the others are still described."""

INSPECT_EXAMPLES = """\
examples:
  tim inspect tim-shapes
  tim inspect downloads/*.safetensors"""

CONVERT = """\
Rewrites a TiM transformer, a Gemma-3 text model, a DC-AE, or a file with several of them (.bin, .pt, .safetensors, or a folder in
Hugging Face layout) as one safetensors file. Nothing is dropped."""

CONVERT_EXAMPLES = """\
example:
  tim convert t2i_model.bin transformer.safetensors --dtype bf16"""

PACK = """\
Joins a transformer, a text model and an autoencoder into one file, which `--model` and the ComfyUI loader take."""

PACK_EXAMPLES = """\
example:
  tim pack --model t2i_model.bin --text-encoder gemma-3-1b-it --vae dc-ae-f32c32-sana-1.1-diffusers tim-t2i.safetensors --dtype bf16"""

PREVIEWS = """\
Fits what ComfyUI's live previews show of a latent, and writes it into a model file (which is written whole or stays as it is).
Where the autoencoder is not in the same file, --vae names it. --images names a folder of pictures such as the model makes; without it
the small world's are taken, which suits tim-shapes."""

PREVIEWS_EXAMPLES = """\
example:
  tim previews tim-t2i.safetensors --images photographs"""

INTERVAL_HELP = "times between which guidance acts, ends excluded; an upper end above 1 takes in time 1, the first step (0,1)"
SHIFT_HELP = "more than 1: times nearer to noise (1, equal steps)"

TRAIN = """\
Trains from YAML configurations, one after another: `kind: finetune` (your pictures; all weights, or a LoRA), `kind: tim` and `kind:
autoencoder` (the small world). A run that was stopped goes on from its last checkpoint when the same command is given again.

`accelerate launch -m tim_core.training CONFIG.yaml` runs on several GPUs. docs/training.md says what is read and written."""

TRAIN_EXAMPLES = """\
examples:
  tim train configs/t2i-lora.yaml                            a LoRA on a folder of pictures with captions
  tim train configs/tim-shapes-autoencoder.yaml configs/tim-shapes-decoder.yaml configs/tim-shapes.yaml
                                                             the small world's autoencoder, and a first network on it

docs/research/tim-shapes.md has the whole list that made the bundled model."""


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line, too."""

    def error(self, message: str):
        self.exit(2, f"tim: error: {message} (see {self.prog} --help)\n")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"found '{text}', expected WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found '{text}', expected whole numbers between commas, such as 1,2,4,8") from None


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found '{text}', expected LOW,HIGH such as 0,1") from None
    return low, high


def words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("the model")
    group.add_argument("--model", default="tim-shapes", metavar="M", help="a bundled name or a one-file checkpoint (tim-shapes)")
    group.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", default="auto", help="auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16, float16")
    group.add_argument("--attention", default="auto", choices=["auto", "sdpa", "flash"], help="flash needs the flash-attn package")

    guided = argparse.ArgumentParser(add_help=False)
    group = guided.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="N", help="what guidance leads away from (nothing)")
    group.add_argument("--cfg", type=float, default=2.5, help="strength of guidance, 1 is none (2.5)")
    group.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    group.add_argument("--guidance-interval", type=interval, default=(0.0, 1.0), metavar="LOW,HIGH",
                       help=INTERVAL_HELP)
    group.add_argument("--stochasticity", type=float, default=0.0, metavar="S", help="share of fresh noise at each step (0)")

    sampling = argparse.ArgumentParser(add_help=False)
    group = sampling.add_argument_group("the picture")
    group.add_argument("--size", type=size, default=(64, 64), metavar="WxH", help="width and height in pixels (64x64)")
    group.add_argument("--shift", type=float, default=1.0, metavar="S", help=SHIFT_HELP)
    group.add_argument("--mode", default="transition", choices=["transition", "diffusion"],
                       help="diffusion: the network is not told where it jumps to, as in ordinary flow matching")

    parser = Parser(prog="tim", description="Transition Models: text to image in any number of steps.", epilog=EXAMPLES,
                    parents=[common], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"tim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, description: str, epilog: str | None = None, parents=()) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=description, epilog=epilog, parents=[*parents, common],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    sub = command("sample", run_sample, "pictures of a prompt", SAMPLE, SAMPLE_EXAMPLES, [model, guided, sampling])
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument("--steps", type=int, default=4, help="number of transitions (4)")
    sub.add_argument("--times", metavar="LIST", help="times of your own from 1 to 0, in place of --steps")
    sub.add_argument("--batch", type=int, default=1, metavar="B", help="number of pictures; more than one are numbered: out-0.png ... (1)")
    sub.add_argument("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE", help=".png, .jpg or .webp (out.png)")

    sub = command("sweep", run_sweep, "one labelled sheet over numbers of steps", SWEEP, SWEEP_EXAMPLES, [model, guided, sampling])
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument("--steps", type=whole_numbers, default=[1, 2, 4, 8, 16, 32], metavar="LIST", help="(1,2,4,8,16,32)")
    sub.add_argument("--columns", type=int, metavar="C", help="pictures in a row (as many as make even rows of at most 4)")
    sub.add_argument("-o", "--output", type=Path, default=Path("sweep.png"), metavar="FILE", help=".png, .jpg or .webp (sweep.png)")

    sub = command("upscale", run_upscale, "a picture at a larger size", UPSCALE, UPSCALE_EXAMPLES, [model, guided])
    sub.add_argument("image", type=Path, metavar="IMAGE", help="a picture of any kind that Pillow reads")
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument("--size", type=size, metavar="WxH", help="in pixels; what other proportions leave over is cut off")
    sub.add_argument("--factor", type=float, default=2.0, metavar="F", help="in place of --size (2)")
    sub.add_argument("--steps", default="4", metavar="N", help="number of transitions, or one for each stage: 8,4 (4)")
    sub.add_argument("--stages", type=int, default=1, metavar="K", help="enlargements on the way, by equal factors (1)")
    sub.add_argument("--strength", type=float, default=0.5, metavar="T", help="the time that the picture is noised to, up to 1 (0.5)")
    sub.add_argument("-o", "--output", type=Path, default=Path("upscaled.png"), metavar="FILE", help=".png, .jpg or .webp (upscaled.png)")

    sub = command("evaluate", run_evaluate, "scores and a curve", EVALUATE, EVALUATE_EXAMPLES, [model])
    sub.add_argument("--steps", type=whole_numbers, default=[1, 2, 4, 8, 16, 32, 64], metavar="LIST", help="(1,2,4,8,16,32,64)")
    sub.add_argument("--cfg", type=float, default=2.5, help="strength of guidance, from 2 steps on (2.5)")
    sub.add_argument("--guidance-interval", type=interval, default=(0.0, 1.0), metavar="LOW,HIGH", help=INTERVAL_HELP)
    sub.add_argument("--shift", type=float, default=1.0, metavar="S", help=SHIFT_HELP)
    sub.add_argument("--prompts-per-task", type=int, metavar="P", help="drawn with replacement (60)")
    sub.add_argument("--images", type=int, default=4, metavar="I", help="pictures a prompt (4)")
    sub.add_argument("--seed", type=int, default=0, help="of prompts and noise (0)")
    sub.add_argument("--tasks", type=words, metavar="LIST", help="some of single,two,counting,colors,position,attribution (all)")
    sub.add_argument("--size", type=size, metavar="WxH", help="in pixels (64x64; 1024x1024 with --prompts and a large model)")
    sub.add_argument("--mode", default="transition", choices=["transition", "diffusion"], help="diffusion for ordinary flow matching")
    sub.add_argument("--batch", type=int, metavar="B", help="pictures made together (120; 4 with --prompts)")
    sub.add_argument("--twin", type=Path, metavar="REPORT", help="another model's report.json of the same pictures")
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="a .jsonl of prompts, in place of the small world's")
    sub.add_argument("--layout", choices=["geneval", "dpg"], help="of the folder that --prompts makes")
    sub.add_argument("-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="folder for the report (evaluation)")

    sub = command("inspect", run_inspect, "what a weight file is", INSPECT, INSPECT_EXAMPLES)
    sub.add_argument("files", nargs="+", metavar="FILE", help="a file, a folder in Hugging Face layout, or a bundled name")

    dtypes = argparse.ArgumentParser(add_help=False)
    dtypes.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16 (fp32, bf16, fp16); as stored if not given")
    sub = command("convert", run_convert, "weights as safetensors", CONVERT, CONVERT_EXAMPLES, [dtypes])
    sub.add_argument("source", metavar="SRC")
    sub.add_argument("target", type=Path, metavar="DST", help="a .safetensors file")

    sub = command("pack", run_pack, "three parts in one file", PACK, PACK_EXAMPLES, [dtypes])
    sub.add_argument("--model", required=True, metavar="FILE", help="the TiM transformer")
    sub.add_argument("--text-encoder", metavar="FILE", help="the Gemma-3 text model: a folder with its tokenizer, or a one-file checkpoint")
    sub.add_argument("--vae", metavar="FILE", help="the DC-AE")
    sub.add_argument("target", type=Path, metavar="DST", help="a .safetensors file")

    sub = command("previews", run_previews, "live previews for a model file", PREVIEWS, PREVIEWS_EXAMPLES)
    sub.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file with a TiM transformer")
    sub.add_argument("--vae", metavar="FILE", help="the DC-AE, if it is not in FILE")
    sub.add_argument("--images", type=Path, metavar="FOLDER", help="pictures to fit on, up to 200")

    sub = command("train", run_train, "weights from a configuration", TRAIN, TRAIN_EXAMPLES)
    sub.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml")
    return parser


# Commands


def run_sample(args: argparse.Namespace) -> None:
    check_picture(args.output)
    if args.batch < 1:
        raise TimError(f"--batch: found {args.batch}, expected at least 1")
    pipe = load_pipeline(args)
    from .images import to_pil

    images, seconds = timed(pipe, [args.prompt] * args.batch, steps=args.steps, times=args.times, **settings(args))
    names = [args.output] if args.batch == 1 else [args.output.with_stem(f"{args.output.stem}-{k}") for k in range(args.batch)]
    for name, image in zip(names, images):
        write_picture(to_pil(image), name)
        print(name)
    print(f"{pipe.nfe} NFE, {seconds:.2f} s")


def run_sweep(args: argparse.Namespace) -> None:
    check_picture(args.output)
    if not args.steps or min(args.steps) < 1 or (args.columns is not None and args.columns < 1):
        name, found = ("--columns", args.columns) if args.steps and min(args.steps) >= 1 else ("--steps", ",".join(map(str, args.steps)))
        raise TimError(f"{name}: found '{found}', expected whole numbers of at least 1")
    pipe = load_pipeline(args)
    from .images import contact_sheet, step_label

    pipe([args.prompt], steps=1, **settings(args))  # the first run of all is slower than its steps
    images, labels = [], []
    for steps in args.steps:
        image, seconds = timed(pipe, [args.prompt], steps=steps, **settings(args))
        images.append(image[0])
        labels.append(step_label(steps, pipe.nfe, seconds))
    write_picture(contact_sheet(images, labels, args.columns), args.output)
    print(args.output)
    for label in labels:
        print(label.replace(" · ", ", "))


def run_upscale(args: argparse.Namespace) -> None:
    check_picture(args.output)
    picture = read_picture(args.image)
    from .upscale import stage_steps, target_size

    total = sum(stage_steps(args.steps, args.stages)) if args.stages > 0 else 0
    pipe = load_pipeline(args)
    from tqdm import tqdm

    from .images import to_pil

    width, height = args.size or (0, 0)
    options = {name: getattr(args, name) for name in ("negative", "cfg", "seed", "guidance_interval", "stochasticity")}
    with tqdm(total=total, unit="step", leave=False) as bar:
        started = time.perf_counter()
        image = pipe.upscale(
            picture, args.prompt, width=width, height=height, steps=args.steps, strength=args.strength, factor=args.factor,
            stages=args.stages, callback=lambda state: bar.update(), **options)[0]
        seconds = time.perf_counter() - started
    write_picture(to_pil(image), args.output)
    print(args.output)
    asked = target_size(picture.shape[2], picture.shape[1], width, height, args.factor)
    made = image.shape[1], image.shape[0]
    rounded = "" if made == asked else f" (asked for {asked[0]}x{asked[1]}; sides are multiples of {pipe.unit})"
    print(f"{made[0]}x{made[1]}{rounded}, {pipe.nfe} NFE, {seconds:.2f} s")


def run_evaluate(args: argparse.Namespace) -> None:
    from .processes import find_processes

    if (args.prompts is None) != (args.layout is None):
        given, missing = ("--prompts", "--layout") if args.prompts else ("--layout", "--prompts")
        raise TimError(f"{given}: found it without {missing}, expected both")
    if args.prompts is not None and args.twin is not None:
        raise TimError("--twin: found it with --prompts, expected one of them: pictures of a prompt file get no score here")
    processes = find_processes()
    if args.prompts is not None and (args.tasks is not None or args.prompts_per_task is not None):
        given = "--tasks" if args.tasks is not None else "--prompts-per-task"
        raise TimError(f"{given}: found it with --prompts, expected one of them: the small world's prompts are not used then")
    pipe = load_pipeline(args)
    width, height = args.size or ((64, 64) if args.prompts is None or pipe.factor < 32 else (1024, 1024))
    options = {"cfg": args.cfg, "images": args.images, "seed": args.seed, "width": width, "height": height, "mode": args.mode,
               "guidance_interval": args.guidance_interval, "processes": processes, **({} if args.shift == 1 else {"shift": args.shift})}
    if args.prompts is not None:
        from .evaluation.benchmark_export import make_pictures

        weights = pipe.fingerprint()

        for steps in args.steps:
            folder = args.output / f"steps-{steps}"
            made = make_pictures(pipe, args.prompts, args.layout, folder, model=weights, steps=steps, batch=args.batch or 4,
                                 **options)
            if processes.first:
                print(made)
        return
    from .evaluation.curve import TASKS, evaluate
    from .weights.parts import BUNDLED

    name = args.model if args.model in BUNDLED else Path(args.model).name
    model = {"name": name, "weights": pipe.fingerprint(), "dtype": str(pipe.dtype).removeprefix("torch."), "version": __version__}
    prompts = 60 if args.prompts_per_task is None else args.prompts_per_task
    report = evaluate(pipe, args.steps, prompts_per_task=prompts, output=args.output, batch=args.batch or 120,
                      tasks=TASKS if args.tasks is None else args.tasks, twin=args.twin, model=model, **options)
    if processes.first:
        print_report(report)
        print(args.output / "report.json")
        print(args.output / "curve.png")


def print_report(report: dict) -> None:
    names = list(report["curve"][0]["tasks"])
    compared = any("over_twin" in point for point in report["curve"])
    last = ["over the twin"] if compared else []
    print("  ".join(["steps    NFE    cfg   overall  +-stderr", *(f"{name:>11}" for name in names), *last]))
    for point in report["curve"]:
        shares = "  ".join(f"{point['tasks'][name]:11.3f}" for name in names)
        over = point.get("over_twin")
        ahead = f"  {over['difference']:+.3f} +- {over['stderr']:.3f}" if over else ""
        start = f"{point['steps']:5}  {point['nfe']:5}  {point['cfg']:5.2f}  {point['overall']:8.3f}  {point['stderr']:8.3f}"
        print(f"{start}  {shares}{ahead}")
    for fall in report["falls"]:
        print(f"{fall['to']} steps are worse than {fall['from']}: {fall['difference']:+.3f} +- {fall['stderr']:.3f}")
    if len(report["curve"]) > 1 and not report["falls"]:
        print("monotone: no point is below an earlier one by more than two standard errors of the paired difference")


def run_inspect(args: argparse.Namespace) -> int:
    from .weights.describe import describe

    code = 0
    for file in args.files:
        try:
            text = str(describe(file))
        except TimError as error:
            code = failed(str(error), args)
        except Exception as error:  # one strange file is no reason to leave out the others
            code = failed(f"{file}: {type(error).__name__}: {error}", args)
        else:
            print(text, flush=True)
    return code


def run_convert(args: argparse.Namespace) -> None:
    from .weights.save import convert

    print(convert(args.source, args.target, storage_dtype(args.dtype)))


def run_pack(args: argparse.Namespace) -> None:
    from .weights.save import pack

    sources = {"model": args.model, "text-encoder": args.text_encoder, "vae": args.vae}
    print(pack({name: source for name, source in sources.items() if source is not None}, args.target, storage_dtype(args.dtype)))


def run_previews(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .shapes.batches import render_samples
    from .weights import previews
    from .weights.load import load_autoencoder
    from .weights.parts import TRANSFORMER, read_parts
    from .weights.save import check_target, convert

    check_target(args.file)
    parts = read_parts(args.file)
    parts.tensors(TRANSFORMER)
    autoencoder = load_autoencoder(args.vae or parts)
    side = 8 * autoencoder.config.factor
    pictures = previews.photographs(args.images, side) if args.images else render_samples(200, side)
    preview = previews.fit(autoencoder, tqdm(pictures, unit="picture", leave=False))
    print(convert(parts, args.file, metadata={"preview": preview}))
    print(f"{100 * preview['r2']:.1f} % of the colours' variance explained")


def run_train(args: argparse.Namespace) -> None:
    try:
        from .training import run
    except ModuleNotFoundError as error:
        raise TimError(f'training: found no {error.name}, expected it from: pip install "transition-models[train]"') from None
    for path in filter(None, run(args.configs)):
        print(path)


# What they share


def load_pipeline(args: argparse.Namespace):
    from .pipeline import Pipeline

    return Pipeline.load(args.model, args.device, args.dtype, args.attention)


def settings(args: argparse.Namespace) -> dict:
    width, height = args.size
    names = ("negative", "cfg", "seed", "guidance_interval", "stochasticity", "shift", "mode")
    return {"width": width, "height": height, **{name: getattr(args, name) for name in names}}


def timed(pipe, prompts: list[str], steps: int, times: str | None = None, **options):
    """-> pictures, seconds; with a progress bar over the steps."""
    from tqdm import tqdm

    from . import schedule

    total = steps if times is None else len(schedule.parse(times)) - 1
    with tqdm(total=max(0, total), unit="step", desc=f"{total} step{'s' if total != 1 else ''}", leave=False) as bar:
        started = time.perf_counter()
        images = pipe(prompts, steps=steps, times=times, callback=lambda state: bar.update(), **options)
        return images, time.perf_counter() - started


def storage_dtype(name: str | None):
    if name is None:
        return None
    from .pipeline import DTYPES

    if name not in DTYPES:
        raise TimError(f"--dtype: found '{name}', expected {', '.join(DTYPES)}")
    return DTYPES[name]


def check_picture(path: Path) -> None:
    """Before the work: can a picture be written there?"""
    if path.suffix.lower() not in FORMATS:
        raise TimError(f"{path}: found {f'the ending {path.suffix}' if path.suffix else 'no ending'}, expected {', '.join(FORMATS)}")
    if path.is_dir():
        raise TimError(f"{path}: found a folder, expected the name of a picture to write")
    if not path.parent.is_dir():
        raise TimError(f"{path}: found no folder {path.parent}, expected one to write into")
    if not os.access(path.parent, os.W_OK):
        raise TimError(f"{path}: cannot be written, expected a folder that allows it")


def read_picture(path: Path):
    """-> (1, H, W, 3) in [0, 1], upright; an alpha channel is left out."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from .images import to_tensor

    try:
        with Image.open(path) as picture:
            return to_tensor(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise TimError(f"{path}: found no picture, expected a file that Pillow reads, such as a PNG") from None
    except OSError as error:
        raise TimError(f"{path}: cannot be read ({error.strerror or 'a damaged picture'}), expected a picture") from None


def write_picture(picture, path: Path) -> None:
    kind = FORMATS[path.suffix.lower()]
    write_whole(path, lambda beside: picture.save(beside, format=kind, **({} if kind == "PNG" else {"quality": 95})))


def out_of_memory(error: Exception) -> bool:
    """On any device; torch is not imported to ask."""
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text or "out of memory" in text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> 0, or 1 after one line `tim: error: ...`; SystemExit(2) for wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a prompt's characters
    logging.basicConfig(format="tim: %(message)s")
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return failed("interrupted", args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has left: say nothing more
        return 1
    except TimError as error:
        return failed(str(error), args)
    except Exception as error:
        if out_of_memory(error):
            return failed("out of memory, expected more of it or a smaller --size or --batch", args)
        if isinstance(error, OSError) and error.strerror:
            return failed(": ".join(filter(None, [error.filename and str(error.filename), error.strerror])), args)
        return failed(f"{type(error).__name__}: {error} (-v shows where)", args)


def failed(message: str, args: argparse.Namespace) -> int:
    if getattr(args, "verbose", False):
        traceback.print_exc()
    print(f"tim: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
