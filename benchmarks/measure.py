"""What the benchmarks share: pairs of timings, memory counted by live tensors and seen by the system, tables."""

import json
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tim_core.files import atomic_write  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, on any device, meta among them, and are alive: `peak` is the most at once.

    Tensors made before, such as weights and inputs, do not count; nor does what a kernel takes and gives back inside.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor) and given.untyped_storage() not in self.known:
                self.known.add(given.untyped_storage())  # made before
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.bytes)
        return made

    def _freed(self, count: int) -> None:
        self.bytes -= count


def counted_peak(function: Callable[[], object]) -> int:
    """Bytes of live tensors at the peak of a call, what it returns included."""
    with LiveTensors() as live:
        made = function()
    del made
    return live.peak


def memory_line(name: str) -> int:
    """A line of /proc/self/status in bytes: VmHWM is the most memory the process has held, VmRSS what it holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def child(script: str, *arguments: str) -> dict:
    """The JSON that a run of one of these scripts prints, in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def pairs(first: Callable[[], object], second: Callable[[], object], count: int, warm_up: int = 0) -> list[tuple[float, float]]:
    """Seconds of two functions, run by turns, the order changing from pair to pair."""
    for _ in range(warm_up):
        seconds(first), seconds(second)
    times = []
    for number in range(count):
        if number % 2:
            other = seconds(second)
            times.append((seconds(first), other))
        else:
            times.append((seconds(first), seconds(second)))
    return times


def ratio(times: list[tuple[float, float]], first: str, second: str) -> dict:
    """Medians of both, the ratio of the medians, and the quartiles of the ratios of the pairs."""
    medians = [statistics.median(column) for column in zip(*times)]
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
    return {f"{first}_s": medians[0], f"{second}_s": medians[1], "ratio": medians[0] / medians[1], "quartiles": [low, high]}


def device_name(device: torch.device | str = "cpu") -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def report(title: str, rows: list[dict], file: str | None) -> None:
    """Print rows of equal keys as a table, and write them to a file."""
    print(title)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[_text(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    if file:
        data = {"title": title, "rows": rows}
        atomic_write(Path(file), lambda tmp: tmp.write_text(json.dumps(data, indent=1) + "\n"))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " to ".join(map(_text, value)) if isinstance(value, list) else str(value)
