"""`tim evaluate`: score a model, or make images for other benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import __version__
from ..errors import TimError
from . import options
from .failures import print_result

SUMMARY = "score a model and draw its curve"

DESCRIPTION = """\
Score a model on coloured shapes as GenEval does: prompts of six tasks,
several images per prompt, each checked by an exact detector.

Prompts and noise depend on --seed and are the same at every step count. 1
step runs without guidance. DIR/report.json and DIR/curve.png are written after
every step count. To resume an interrupted run, repeat the command; results of
the same model and settings are kept. --baseline compares with the report of
another model, image by image, and draws it in the same chart.

With --prompts FILE.jsonl, make images for the evaluator of another benchmark
instead, four per prompt, in DIR/steps-N. --layout geneval takes its
evaluation_metadata.jsonl, --layout dpg lines of
{"item_id": ..., "prompt": ...}.

For several GPUs run `torchrun --nproc-per-node N -m tim_core evaluate ...`;
they share the images."""

EXAMPLES = """\
examples:
  tim evaluate -o scores                                     the whole curve
  tim evaluate --steps 1,4 --prompts-per-task 10 -o quick    a quick look
  tim evaluate --tasks counting,position --size 128x128 -o large
  tim evaluate --model my.safetensors --baseline scores/report.json -o mine
  tim evaluate --model tim-t2i.safetensors --layout geneval \\
    --prompts evaluation_metadata.jsonl --size 1024x1024 -o geneval"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--steps", type=options.step_list, default=[1, 2, 4, 8, 16, 32, 64], metavar="LIST",
                        help="step counts: a list, 1-8, or 1-32 x2 (default: 1,2,4,8,16,32,64)")
    parser.add_argument("--cfg", type=options.number, metavar="C", help="guidance scale, from 2 steps on (default: the model's, else 2.5)")
    parser.add_argument("--guidance-interval", type=options.interval, metavar="LOW,HIGH", help=options.INTERVAL_HELP)
    parser.add_argument("--shift", type=options.number, default=1.0, metavar="S", help=options.SHIFT_HELP)
    parser.add_argument("--prompts-per-task", type=options.whole, metavar="P",
                        help="prompts per task, drawn with replacement (default: 60)")
    parser.add_argument("--images", type=options.whole, default=4, metavar="I", help="images per prompt (default: 4)")
    parser.add_argument("--seed", type=options.whole, default=0, metavar="N", help="seed of prompts and noise (default: 0)")
    parser.add_argument("--tasks", type=options.words, metavar="LIST",
                        help="some of single,two,counting,colors,position,attribution (default: all)")
    parser.add_argument("--size", type=options.size, metavar="WxH",
                        help="width and height in pixels (default: the model's, 64x64 for tim-shapes)")
    parser.add_argument("--mode", default="transition", choices=["transition", "diffusion"],
                        help="diffusion runs the network as ordinary flow matching (default: transition)")
    parser.add_argument("--batch", type=options.whole, metavar="B", help="images made together (default: 120; 4 with --prompts)")
    parser.add_argument("--baseline", type=Path, metavar="REPORT",
                        help="report.json of another model, same prompts and noise (default: none)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=".jsonl file of prompts (default: coloured shapes)")
    parser.add_argument("--layout", choices=["geneval", "dpg"], help="folder layout, required with --prompts (default: none)")
    parser.add_argument("-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR",
                        help="folder to write to (default: evaluation)")


def run(args: argparse.Namespace) -> None:
    from ..processes import find_processes

    check_options(args)
    options.check_sampling(args, args.steps)
    from ..evaluation import benchmark_export, curve
    from ..weights.parts import BUNDLED, TRANSFORMER, Parts

    batch = (120 if args.prompts is None else 4) if args.batch is None else args.batch
    prompts_per_task = 60 if args.prompts_per_task is None else args.prompts_per_task
    tasks = curve.TASKS if args.tasks is None else args.tasks
    if args.prompts is None:
        curve.check_protocol(args.steps, prompts_per_task, args.images, batch, tasks)
        curve.check_folder(args.output, [args.baseline, *options.input_files(args)])
    else:
        benchmark_export.check_amounts(args.layout, args.steps, args.images, batch)
        records = benchmark_export.read_prompts(args.prompts, args.layout)
        for steps in args.steps:
            folder = args.output / f"steps-{steps}"
            benchmark_export.check_folder(folder, args.layout, records, args.images, [args.prompts, *options.input_files(args)])
    processes = find_processes()

    def check_model(parts: Parts) -> None:
        options.check_size_of(args.size, batch)(parts)
        if args.prompts is None and parts[TRANSFORMER].config.text_dim is None:
            raise TimError(f"--model: {args.model} takes classes, not prompts; give a text-to-image model")

    pipe = options.load_pipeline(args, check_model)
    width, height = args.size or (None, None)
    settings = {"cfg": pipe.defaults.cfg if args.cfg is None else args.cfg, "images": args.images, "seed": args.seed, "width": width,
                "height": height, "mode": args.mode, "guidance_interval": args.guidance_interval or pipe.defaults.guidance_interval,
                "processes": processes, **({} if args.shift == 1 else {"shift": args.shift})}
    if args.prompts is not None:
        weights = pipe.fingerprint()
        for steps in args.steps:
            folder = args.output / f"steps-{steps}"
            made = benchmark_export.export_images(
                pipe, args.prompts, args.layout, folder, model=weights, steps=steps, batch=batch, **settings)
            if processes.is_main:
                print_result(made)
        return
    name = args.model if args.model in BUNDLED else Path(args.model).name
    model = {"name": name, "weights": pipe.fingerprint(), "dtype": str(pipe.dtype).removeprefix("torch."), "version": __version__}
    report = curve.evaluate(pipe, args.steps, prompts_per_task=prompts_per_task, output=args.output, batch=batch, tasks=tasks,
                            baseline=args.baseline, model=model, **settings)
    if processes.is_main:
        print_report(report)
        print_result(args.output / "report.json")
        print_result(args.output / "curve.png")


def check_options(args: argparse.Namespace) -> None:
    """TimError for options that do not go together."""
    if (args.prompts is None) != (args.layout is None):
        given, missing = ("--prompts", "--layout") if args.prompts else ("--layout", "--prompts")
        raise TimError(f"{given}: needs {missing} too")
    shapes_only = {"--baseline": args.baseline, "--tasks": args.tasks, "--prompts-per-task": args.prompts_per_task}
    given = next((name for name, value in shapes_only.items() if value is not None), None)
    if args.prompts is not None and given:
        raise TimError(f"{given}: cannot be used with --prompts, whose images are scored by the other benchmark")


def print_report(report: dict) -> None:
    tasks = list(report["curve"][0]["tasks"])
    compared = any("vs_baseline" in point for point in report["curve"])
    last = ["vs baseline"] if compared else []
    print("  ".join(["steps    NFE    cfg   overall  +-stderr", *(f"{task:>11}" for task in tasks), *last]))
    for point in report["curve"]:
        start = f"{point['steps']:5}  {point['nfe']:5}  {point['cfg']:5.2f}  {point['overall']:8.3f}  {point['stderr']:8.3f}"
        accuracy = "  ".join(f"{point['tasks'][task]:11.3f}" for task in tasks)
        change = point.get("vs_baseline")
        delta = f"  {change['difference']:+.3f} +- {change['stderr']:.3f}" if change else ""
        print(f"{start}  {accuracy}{delta}")
    for pair in report["regressions"]:
        print(f"{pair['to']} steps are worse than {pair['from']}: {pair['difference']:+.3f} +- {pair['stderr']:.3f}")
    if len(report["curve"]) > 1 and not report["regressions"]:
        print("monotone: no point is below an earlier one by more than two standard errors of the paired difference")
