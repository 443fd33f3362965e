"""`tim evaluate`: score a model, or make images for other benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import __version__
from ..errors import TimError
from . import options

SUMMARY = "scores and a curve"

DESCRIPTION = """\
Scores a model in the small world as GenEval does: prompts of six tasks, several pictures a prompt, each judged by an exact detector.

Prompts and noise are fixed by --seed and the same at every number of steps. 1 step runs without guidance.
Writes DIR/report.json and DIR/curve.png after every point; what DIR holds of the same model and pictures already is kept.
--twin draws another model's report beside it and compares picture by picture.

--prompts FILE.jsonl makes pictures for another benchmark's own evaluator instead, four a prompt, in DIR/steps-N: --layout geneval wants
the lines of its evaluation_metadata.jsonl, --layout dpg {"item_id": ..., "prompt": ...}. The same command goes on where it was stopped.

`accelerate launch -m tim_core evaluate ...` shares the pictures among several GPUs."""

EXAMPLES = """\
examples:
  tim evaluate -o scores                                     the whole curve, 1440 pictures a point
  tim evaluate --steps 1,4 --prompts-per-task 10 -o quick    a quick look
  tim evaluate --model my.safetensors --tasks counting,position --size 128x128 -o large
  tim evaluate --model my.safetensors --steps 1,4 --twin scores/report.json -o mine
  tim evaluate --model tim-t2i.safetensors --prompts evaluation_metadata.jsonl --layout geneval --size 1024x1024 --steps 1,4 -o geneval"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--steps", type=options.whole_numbers, default=[1, 2, 4, 8, 16, 32, 64], metavar="LIST", help="(1,2,4,8,16,32,64)")
    parser.add_argument("--cfg", type=float, default=2.5, help="strength of guidance, from 2 steps on (2.5)")
    parser.add_argument("--guidance-interval", type=options.interval, default=(0.0, 1.0), metavar="LOW,HIGH", help=options.INTERVAL_HELP)
    parser.add_argument("--shift", type=float, default=1.0, metavar="S", help=options.SHIFT_HELP)
    parser.add_argument("--prompts-per-task", type=int, metavar="P", help="drawn with replacement (60)")
    parser.add_argument("--images", type=int, default=4, metavar="I", help="pictures a prompt (4)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise (0)")
    parser.add_argument("--tasks", type=options.words, metavar="LIST", help="some of single,two,counting,colors,position,attribution (all)")
    parser.add_argument("--size", type=options.size, metavar="WxH", help="in pixels (64x64; 1024x1024 with --prompts and a large model)")
    parser.add_argument("--mode", default="transition", choices=["transition", "diffusion"], help="diffusion for ordinary flow matching")
    parser.add_argument("--batch", type=int, metavar="B", help="pictures made together (120; 4 with --prompts)")
    parser.add_argument("--twin", type=Path, metavar="REPORT", help="another model's report.json of the same pictures")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a .jsonl of prompts, in place of the small world's")
    parser.add_argument("--layout", choices=["geneval", "dpg"], help="of the folder that --prompts makes")
    parser.add_argument("-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="folder for the report (evaluation)")


def run(args: argparse.Namespace) -> None:
    from ..processes import find_processes

    if (args.prompts is None) != (args.layout is None):
        given, missing = ("--prompts", "--layout") if args.prompts else ("--layout", "--prompts")
        raise TimError(f"{given}: found it without {missing}, expected both")
    if args.prompts is not None and args.twin is not None:
        raise TimError("--twin: found it with --prompts, expected one of them: pictures of a prompt file get no score here")
    processes = find_processes()
    if args.prompts is not None and (args.tasks is not None or args.prompts_per_task is not None):
        given = "--tasks" if args.tasks is not None else "--prompts-per-task"
        raise TimError(f"{given}: found it with --prompts, expected one of them: the small world's prompts are not used then")
    pipe = options.load_pipeline(args)
    width, height = args.size or ((64, 64) if args.prompts is None or pipe.factor < 32 else (1024, 1024))
    settings = {"cfg": args.cfg, "images": args.images, "seed": args.seed, "width": width, "height": height, "mode": args.mode,
                "guidance_interval": args.guidance_interval, "processes": processes, **({} if args.shift == 1 else {"shift": args.shift})}
    if args.prompts is not None:
        from ..evaluation.benchmark_export import make_pictures

        weights = pipe.fingerprint()

        for steps in args.steps:
            folder = args.output / f"steps-{steps}"
            made = make_pictures(pipe, args.prompts, args.layout, folder, model=weights, steps=steps, batch=args.batch or 4,
                                 **settings)
            if processes.first:
                print(made)
        return
    from ..evaluation.curve import TASKS, evaluate
    from ..weights.parts import BUNDLED

    name = args.model if args.model in BUNDLED else Path(args.model).name
    model = {"name": name, "weights": pipe.fingerprint(), "dtype": str(pipe.dtype).removeprefix("torch."), "version": __version__}
    prompts = 60 if args.prompts_per_task is None else args.prompts_per_task
    report = evaluate(pipe, args.steps, prompts_per_task=prompts, output=args.output, batch=args.batch or 120,
                      tasks=TASKS if args.tasks is None else args.tasks, twin=args.twin, model=model, **settings)
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
