"""Our DC-AE decoder against diffusers' AutoencoderDC, on the same random weights, in one run.

    python benchmarks/decoder.py [--size 512,1024] [--dtype float32,bfloat16] [--pairs 3] [--clock wall|cpu] [--json FILE] [--small]

Times in pairs by turns: medians, their ratio and its quartiles; --clock cpu counts processor time, for a machine that others use too (then
with OMP_NUM_THREADS=1). Memory of one decode: live tensors without the weights, and, in a process each, how far the most memory held
(VmHWM) rose. Released widths, or with --small tiny ones, to try the script. Needs diffusers. Goals: 0.8 of the time, 0.6 of the memory.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import ROOT, child, counted_peak, device_name, memory_line, pairs, ratio, report  # noqa: E402
from tim_core.models.autoencoder import Autoencoder  # noqa: E402
from tim_core.models.config import AutoencoderConfig  # noqa: E402

SMALL = {"encoder_block_out_channels": [8] * 6, "decoder_block_out_channels": [8] * 6, "attention_head_dim": 4, "latent_channels": 8}


def released_config(small: bool = False) -> dict:
    """The released autoencoder's config.json."""
    config = json.loads((ROOT / "tests" / "reference" / "dcae" / "keys_dcae.json").read_text())["config"]
    return {name: value for name, value in config.items() if not name.startswith("_")} | (SMALL if small else {})


def build(which: str, config: dict, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    if which == "ours":
        return Autoencoder(AutoencoderConfig.from_diffusers(config)).to(dtype).eval()
    import diffusers

    return diffusers.AutoencoderDC(**config).to(dtype).eval()


def latent(config: dict, size: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, config["latent_channels"], size // 32, size // 32).to(dtype)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512,1024", help="sides of the images in pixels (default: 512,1024)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="default: float32,bfloat16")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of decodes (default: 3)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="default: wall")
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--child", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    config, rows = released_config(args.small), []
    for dtype in (getattr(torch, name) for name in args.dtype.split(",")):
        if args.child:
            model, z = build(args.child, config, dtype), latent(config, int(args.size), dtype)
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is held now
            before = memory_line("VmRSS")
            model.decoder(z)
            print(json.dumps({"seen": memory_line("VmHWM") - before}))
            return
        oracle, ours = build("diffusers", config, dtype), build("ours", config, dtype)
        ours.load_state_dict(oracle.state_dict())
        for size in map(int, args.size.split(",")):
            z = latent(config, size, dtype)
            made, expected = ours.decoder(z).float(), oracle.decoder(z).float()
            times = pairs(lambda: ours.decoder(z), lambda: oracle.decoder(z), args.pairs, args.clock)
            row = {"dtype": str(dtype).removeprefix("torch."), "size": size, **ratio(times, "ours", "diffusers"),
                   "difference": ((made - expected).norm() / expected.norm()).item()}
            counted = [counted_peak(lambda: model.decoder(z)) for model in (ours, oracle)]
            options = ["--size", str(size), "--dtype", row["dtype"], *(["--small"] * args.small)]
            seen = [child(__file__, "--child", which, *options)["seen"] for which in ("ours", "diffusers")]
            for name, (own, theirs) in (("counted", counted), ("seen", seen)):
                row |= {f"{name}_GiB": own / 2**30, f"{name}_diffusers_GiB": theirs / 2**30, f"{name}_ratio": own / max(theirs, 1)}
            rows.append(row)
    report(f"one decode, {device_name()}, {args.clock} clock", rows, args.json)


if __name__ == "__main__":
    main()
