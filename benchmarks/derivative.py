"""What the derivative of a transition's target costs: the central difference (DDE, paper Eq. 10), forward mode (JVP), composed targets.

    python benchmarks/derivative.py [--batch 64] [--size 64x64] [--rounds 15] [--threads N] [--device cuda]

Training steps (forward, target, backward) of the bundled transformer, half of the batch at r = t as in the paper, in bfloat16 autocast.
Every round runs each kind once, one after another, so that they see the same machine; printed are medians, and ratios of them to plain
flow matching (r = t throughout), which has no target to differentiate. Memory is the most that a process of its own held above what it
held before its first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core.models.attention import eager  # noqa: E402
from tim_core.training.objectives.transition import ObjectiveConfig, transition_loss  # noqa: E402
from tim_core.transport import OTFM  # noqa: E402
from tim_core.weights.load import load_transformer  # noqa: E402
from tim_core.weights.read import read_parts  # noqa: E402

KINDS = {
    "flow matching": ObjectiveConfig(diffusion_ratio=1.0, consistency_ratio=0.0),
    "dde": ObjectiveConfig(),
    "jvp": ObjectiveConfig(derivative="jvp"),
    "composed": ObjectiveConfig(target="composed"),
}


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.model = load_transformer(args.model, attention=eager, dtype=torch.float32, device=args.device).train()
        self.model.requires_grad_(True)
        config = self.model.config
        factor = read_parts(args.model).latent_factor
        width, height = (int(side) // factor for side in args.size.split("x"))
        torch.manual_seed(0)
        self.x, self.noise = (torch.randn(args.batch, config.in_channels, height, width, device=self.device) for _ in range(2))
        self.y = torch.randn(args.batch, 8, config.text_dim, device=self.device)

    def step(self, kind: str) -> float:
        """Seconds."""
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = transition_loss(self.model, self.x, self.noise, self.y, transport=OTFM(), config=KINDS[kind])
        losses.total.backward()
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def memory(self, kind: str) -> float:
        """MB that three steps needed at most, above what is held before them."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
            before = resident("VmRSS")
        for _ in range(3):
            self.step(kind)
        return (torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else resident("VmHWM") - before) / 1e6


def resident(name: str) -> int:
    """Bytes of this process, by their name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tim-shapes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    if args.memory_of:
        print(json.dumps(bench.memory(args.memory_of)))
        return
    for kind in KINDS:
        bench.step(kind)  # the first of all is slower
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            seconds[kind].append(bench.step(kind))
    plain = statistics.median(seconds["flow matching"])
    print(f"{args.model}, batch {args.batch} of {args.size}, {args.device}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print("| target | seconds a step (median; fastest to slowest) | to flow matching | memory, MB |")
    print("|---|---|---|---|")
    for kind, values in seconds.items():
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory-of", kind], capture_output=True, text=True, check=True)
        middle = statistics.median(values)
        print(f"| {kind} | {middle:.3f} ({min(values):.3f} to {max(values):.3f}) | {middle / plain:.2f} | {json.loads(done.stdout):.0f} |")


if __name__ == "__main__":
    main()
