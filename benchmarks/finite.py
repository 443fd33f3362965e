"""What the checks for NaN and infinite values cost: images with and without them, in pairs.

    python benchmarks/finite.py [--model tim-shapes] [--size 64x64] [--pairs 40] [--json FILE] [--graph]

Prints the median time of a 4-step image with the checks over that without them, and, on a CPU, the median time that the checks of an
image take themselves, which is steadier. The goal: at most 0.01 of an image. With --graph the bundled model's image is made by KSampler and
VAE Decode in a real ComfyUI, found as the tests find it, and all checks of a run are counted.
"""

import argparse
import contextlib
import inspect
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core import Pipeline, codec, pipeline  # noqa: E402
from tim_core.files import atomic_write  # noqa: E402


class Unrecorded:
    """Stands in for finite.StepRecorder and records nothing."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *inputs):
        return self.model(*inputs)

    def first_bad(self) -> str:
        return "sampling"


@contextlib.contextmanager
def unchecked():
    """Pipeline without its checks."""
    with mock.patch.multiple(pipeline, check_finite=lambda *args, **options: None, StepRecorder=Unrecorded):
        with mock.patch.object(codec, "check_finite", lambda *args, **options: None):
            yield


def timed(function, spent, sign=1):
    """The function, which also appends to `spent` the seconds that a call takes, with this sign."""
    from time import perf_counter

    def call(*args, **options):
        started = perf_counter()
        try:
            return function(*args, **options)
        finally:
            spent.append(sign * (perf_counter() - started))

    return call


@contextlib.contextmanager
def timing(spent: list[float]):
    """Pipeline with its checks, whose seconds are appended to `spent`."""

    class Recorder(pipeline.StepRecorder):
        def __init__(self, model):
            super().__init__(timed(model, spent, -1))

        __call__ = timed(pipeline.StepRecorder.__call__, spent)

    check = timed(pipeline.check_finite, spent)
    with mock.patch.multiple(pipeline, check_finite=check, StepRecorder=Recorder), mock.patch.object(codec, "check_finite", check):
        yield


def seconds(pipe, width: int, height: int) -> float:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    pipe("a red circle", steps=4, cfg=2.5, width=width, height=height)
    return time.perf_counter() - started


def timed_in_graph(model, clip, vae):
    """Runs inside ComfyUI: seconds of PAIRS images of WIDTH x HEIGHT each, checked and unchecked, and of the checks of PAIRS more."""
    import contextlib
    import sys
    import time
    from unittest import mock

    import torch

    from nodes import KSampler, VAEDecode

    modules = {name: next(module for key, module in sys.modules.items() if key.endswith(f"ComfyUI-TiM.nodes.adapters.{name}"))
               for name in ("run", "vae")}
    checks = ("check_finite", "check_result", "check_start", "check_areas", "_check_coverage", "_check_keys", "_check_sigmas")
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red circle", "")]
    latent = {"samples": torch.zeros(1, vae.latent_channels, HEIGHT // 8, WIDTH // 8)}  # noqa: F821

    @contextlib.contextmanager
    def patched(none, made, add):
        """With each check through a function of it."""
        with contextlib.ExitStack() as stack:
            places = [(modules["run"], name, none) for name in checks]
            places += [(modules["vae"].CheckedAutoencoder, "_finite", made), (modules["run"].Trace, "add", add)]
            for owner, name, change in places:
                stack.enter_context(mock.patch.object(owner, name, change(getattr(owner, name))))
            yield

    def unchecked():
        def nothing(function):
            return lambda *args, **options: None

        return patched(nothing, lambda function: lambda self, made, *args: made, nothing)

    def timing(spent):
        return patched(*[lambda function: timed(function, spent)] * 3)  # noqa: F821

    def seconds() -> float:
        started = time.perf_counter()
        sampled = KSampler().sample(model, 0, 4, 2.5, "euler", "simple", *conds, latent)[0]
        VAEDecode().decode(vae, sampled)
        return time.perf_counter() - started

    times = {"checked": [], "unchecked": [], "checks": []}
    for number in range(-3, PAIRS):  # noqa: F821
        for kind in ("checked", "unchecked") if number % 2 else ("unchecked", "checked"):
            with unchecked() if kind == "unchecked" else contextlib.nullcontext():
                taken = seconds()
            if number >= 0:
                times[kind].append(taken)
        with timing(spent := []):
            seconds()
        if number >= 0:
            times["checks"].append(sum(spent))
    return times


def graph_times(width: int, height: int, pairs: int) -> dict[str, list[float]]:
    from tests.comfy_graph import BUNDLED_NAME, Graph
    from tests.comfy_support import Server, find, probe

    if (found := find()) is None:
        raise SystemExit("no ComfyUI found; COMFYUI_PATH and COMFYUI_PYTHON name one")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "base", *found)
        try:
            graph, given = Graph(BUNDLED_NAME), probe(timed_in_graph)
            given["source"] += inspect.getsource(timed) + f"\nPAIRS, WIDTH, HEIGHT = {pairs}, {width}, {height}\n"
            node = graph.add("TiMTestProbe", **given, model=graph.model, clip=graph.clip, vae=graph.vae)[0]
            return json.loads(server.run(graph.prompt)[node]["text"][0])
        finally:
            server.stop()


def pipeline_times(model: str, width: int, height: int, pairs: int) -> dict[str, list[float]]:
    pipe = Pipeline.load(model)
    times: dict[str, list[float]] = {"checked": [], "unchecked": [], "checks": []}
    for _ in range(3):
        seconds(pipe, width, height)  # warm-up
    for number in range(pairs):
        for kind in ("checked", "unchecked") if number % 2 else ("unchecked", "checked"):
            with unchecked() if kind == "unchecked" else contextlib.nullcontext():
                times[kind].append(seconds(pipe, width, height))
        if pipe.device.type == "cpu":  # elsewhere the first check waits for the work before it
            with timing(spent := []):
                seconds(pipe, width, height)
            times["checks"].append(sum(spent))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tim-shapes", help="bundled name, checkpoint or folder of parts (default: tim-shapes)")
    parser.add_argument("--size", default="64x64", help="WIDTHxHEIGHT (default: 64x64)")
    parser.add_argument("--pairs", type=int, default=40, help="images of each kind (default: 40)")
    parser.add_argument("--graph", action="store_true", help="measure KSampler and VAE Decode in ComfyUI, with the bundled model")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    times = graph_times(width, height, args.pairs) if args.graph else pipeline_times(args.model, width, height, args.pairs)
    checked, plain = (statistics.median(times[kind]) for kind in ("checked", "unchecked"))
    spread = statistics.quantiles([a / b for a, b in zip(times["checked"], times["unchecked"])], n=4)
    print(f"{args.model}, {args.size}: {1000 * checked:.2f} ms checked, {1000 * plain:.2f} ms unchecked, ratio {checked / plain:.4f} "
          f"(quartiles of the pairs {spread[0]:.4f} to {spread[2]:.4f})")
    report = {"model": args.model, "size": args.size, "checked": checked, "unchecked": plain, "ratio": checked / plain}
    if times["checks"]:
        report["checks"] = statistics.median(times["checks"])
        report["share"] = report["checks"] / plain
        print(f"the checks alone: {1e6 * report['checks']:.0f} microseconds an image, {report['share']:.4f} of it")
    if args.json:
        atomic_write(Path(args.json), lambda tmp: tmp.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    main()
