"""What ten minutes of one GPU show, in the released sizes with random weights, as one table.

    python benchmarks/gpu.py [--json FILE]
    python benchmarks/gpu.py --dry-run          tiny networks on a CPU: that every row can be made

Images end to end (sampler and decode, guided from the second step) at 1024, 1 and 4 steps, batch 1 and 8: ours eager, ours compiled, and
the baseline, a plain reading of the network with diffusers' decoder (without diffusers: no baseline). The network at 16,384 tokens as a
share of the measured peak of matrix products, in bfloat16; these products in fp8 where the card has it. Peak memory of an image at 4096.
Goals: 1 step at 1024 within 60 ms, half of the baseline's time, 60 % of the peak, 8 GiB.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import network as plain  # noqa: E402
from benchmarks.decoder import released_config  # noqa: E402
from benchmarks.measure import device_name, memory_line, report, seconds  # noqa: E402
from tim_core.models.autoencoder import Autoencoder  # noqa: E402
from tim_core.models.config import AutoencoderConfig  # noqa: E402
from tim_core.models.tiles import TILE  # noqa: E402
from tim_core.sampler import sample  # noqa: E402
from tim_core.schedule import uniform  # noqa: E402


class Bench:
    """The networks on the device, and the rows measured so far."""

    def __init__(self, device: torch.device, dry_run: bool, repeats: int):
        self.device, self.repeats, self.rows = device, repeats, []
        self.batches, self.warm_up = ((1, 2), 0) if dry_run else ((1, 8), 2)
        self.dtype = torch.bfloat16
        self.config = replace(plain.SMALL, in_channels=8) if dry_run else plain.RELEASED
        vae = released_config(dry_run)
        self.network = plain.build(self.config, self.dtype, device)
        torch.manual_seed(0)
        self.autoencoder = Autoencoder(AutoencoderConfig.from_diffusers(vae)).to(device, self.dtype).eval()
        self.factor, self.oracle = self.autoencoder.config.factor, None
        try:
            import diffusers

            self.oracle = diffusers.AutoencoderDC(**vae).to(device, self.dtype).eval()
            self.oracle.load_state_dict(self.autoencoder.state_dict())
        except ImportError:
            print("diffusers is not installed: no baseline", file=sys.stderr)

    def image(self, network, decode, size: int, steps: int, batch: int) -> torch.Tensor:
        """Noise to pixels on the device, with cfg 2.5."""
        side = size // self.factor
        x = torch.randn(batch, self.config.in_channels, side, side, device=self.device)
        y = torch.randn(batch, 32, self.config.text_dim, device=self.device, dtype=self.dtype)
        latent, _ = sample(lambda x, t, r, y: network(x.to(self.dtype), t, r, y), x, uniform(steps), y, torch.zeros_like(y), cfg=2.5)
        return torch.cat([decode(one) for one in latent.to(self.dtype).split(1)])

    def median(self, function) -> float:
        return statistics.median(seconds(function) for _ in range(self.repeats))

    def end_to_end(self, size: int) -> None:
        """Rows of images; the ways take turns, so that the card's clock is the same for all."""
        compiled = torch.compile(self.network, fullgraph=True, backend="inductor" if self.device.type == "cuda" else "eager")
        ways = {"eager": (self.network, self.autoencoder.decode), "compiled": (compiled, self.autoencoder.decode)}
        if self.oracle is not None:
            ways["baseline"] = (plain.PlainNetwork(self.network), lambda z: self.oracle.decode(z).sample)
        for steps in (1, 4):
            for batch in self.batches:
                times = {way: [] for way in ways}
                for number in range(self.repeats + self.warm_up):
                    for way, (network, decode) in ways.items():
                        taken = seconds(lambda: self.image(network, decode, size, steps, batch))
                        if number >= self.warm_up:  # the first ones compile
                            times[way].append(taken)
                for way, taken in times.items():
                    row = {"what": f"{size} end to end, {way}", "steps": steps, "batch": batch, "ms": 1000 * statistics.median(taken)}
                    if "baseline" in times:
                        row["vs_baseline"] = statistics.median(taken) / statistics.median(times["baseline"])
                    self.rows.append(row)

    def share_of_peak(self, tokens: int, width: int) -> None:
        """Floating-point operations a second of square products, and of the network; in fp8 the products alone."""
        a = torch.randn(width, width, device=self.device, dtype=self.dtype)
        a @ a
        peak = 2 * width**3 / self.median(lambda: a @ a)
        arguments = plain.inputs(self.config, tokens, self.dtype, self.device)
        self.network(*arguments)
        taken = self.median(lambda: self.network(*arguments))
        speed = self.operations(arguments) / taken
        self.rows.append({"what": f"products of {width}, bfloat16", "ms": 2e3 * width**3 / peak, "TFLOPS": peak / 1e12})
        self.rows.append({"what": f"network, {tokens} tokens, bfloat16", "ms": 1000 * taken, "TFLOPS": speed / 1e12, "share": speed / peak})
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 9):
            b, scale = a.to(torch.float8_e4m3fn), torch.ones((), device=self.device)
            product = lambda: torch._scaled_mm(b, b.t(), scale, scale, out_dtype=self.dtype)  # noqa: E731
            product()
            speed = 2 * width**3 / self.median(product)
            self.rows.append({"what": f"products of {width}, fp8", "TFLOPS": speed / 1e12, "share": speed / peak})

    def operations(self, arguments) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.network(*arguments)
        return counter.get_total_flops()

    def memory(self, size: int, tile: int) -> None:
        """The most memory of one step and a decode in tiles, weights included."""
        if self.device.type == "cuda":
            self.oracle = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)  # last: it takes what is reserved now as the peak
        decode = lambda z: self.autoencoder.tiled_decode(z, tile, tile - tile // 8)  # noqa: E731
        self.image(self.network, decode, size, 1, 1)
        held = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else memory_line("VmHWM")
        self.rows.append({"what": f"{size} in tiles of {tile}, memory", "steps": 1, "batch": 1, "GiB": held / 2**30})


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny networks and sizes on the CPU")
    parser.add_argument("--repeats", type=int, default=10, help="timings of each kind (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA or ROCm GPU was found; to try the script use --dry-run")
    bench = Bench(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run, 1 if args.dry_run else args.repeats)
    bench.end_to_end(64 if args.dry_run else 1024)
    bench.share_of_peak(*((64, 64) if args.dry_run else (16384, 8192)))
    bench.memory(*((512, 256) if args.dry_run else (4096, TILE)))
    report(device_name(bench.device), bench.rows, args.json)


if __name__ == "__main__":
    main()
