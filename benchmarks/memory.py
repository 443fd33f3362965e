"""The memory of the released sizes: what is announced, what live tensors count, what small cards can do.

    python benchmarks/memory.py [--json FILE]                   counted on the meta device: no weights, no waiting
    python benchmarks/memory.py --run [--size 4096] [--json FILE]   an image end to end on the CPU in bfloat16, in a process of its own

--run makes an image of one step with `Pipeline`, random weights of the released sizes, text encoder included, and prints the most memory
that the process held (VmHWM) and the number of decoded tiles. At 4096 it takes 186 TFLOP, half an hour to some hours. The goal: 8 GiB.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decoder import released_config  # noqa: E402
from benchmarks.measure import child, counted_peak, memory_line, report  # noqa: E402
from benchmarks.network import RELEASED, SMALL  # noqa: E402
from tests.full_size import GEMMA  # noqa: E402
from tim_core.models.autoencoder import Autoencoder  # noqa: E402
from tim_core.models.config import AutoencoderConfig  # noqa: E402
from tim_core.models.text_encoder import TextEncoder  # noqa: E402
from tim_core.models.tiles import TILE  # noqa: E402
from tim_core.models.tokenizer import Tokenizer  # noqa: E402
from tim_core.models.transformer import TransitionTransformer, peak_bytes  # noqa: E402
from tim_core.pipeline import Pipeline  # noqa: E402
from tim_core.shapes.tokenizer import shapes_tokenizer  # noqa: E402

SMALL_GEMMA = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 4, "intermediate_size": 8}
TEXT_ENCODER = 1_999_811_208  # bytes of Gemma 3 1B in bfloat16


def counted() -> list[dict]:
    """Rows of announced and counted bytes, for one image with guidance, beside the weights."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        network = TransitionTransformer(RELEASED, dtype=dtype, device="meta").eval()
        config = AutoencoderConfig.from_diffusers(released_config())
        autoencoder = Autoencoder(config, dtype=dtype, device="meta").eval()
        for size in (1024, 2048, 4096):
            side = size // config.factor
            z, times = torch.empty(2, 32, side, side, dtype=dtype, device="meta"), torch.empty(2, device="meta")
            y = torch.empty(2, 32, RELEASED.text_dim, dtype=dtype, device="meta")
            image = torch.empty(1, 3, size, size, dtype=dtype, device="meta")
            announced = peak_bytes(RELEASED, 2 * side**2, dtype)
            vae = autoencoder.peak_bytes(size, size, dtype)
            tile = autoencoder.peak_bytes(TILE, TILE, dtype) + 3 * 3 * 4 * size * size
            for what, said, call in (
                ("network, guided", announced, lambda: network(z, times, times, y)),
                ("decode, whole", vae, lambda: autoencoder.decode(z[:1])),
                ("decode, tiles", vae if size == TILE else tile, lambda: autoencoder.tiled_decode(z[:1])),
                ("encode, whole", vae, lambda: autoencoder.encode(image)),
            ):
                found = counted_peak(call)
                rows.append({"what": what, "dtype": str(dtype).removeprefix("torch."), "size": size, "announced_GiB": said / 2**30,
                             "counted_GiB": found / 2**30, "ratio": said / found})
    return rows


def cards(rows: list[dict]) -> list[dict]:
    """Computed, not measured: GiB that a bfloat16 run needs with all networks on the card, and with one at a time."""
    weights = {name: bytes_ / 2**30 for name, bytes_ in (("text", TEXT_ENCODER), ("network", 2 * 864_978_080), ("vae", 2 * 312_250_275))}
    found = {(row["what"], row["size"]): row["counted_GiB"] for row in rows if row["dtype"] == "bfloat16"}
    table = []
    for size in (1024, 2048, 4096):
        network, whole, tiles = (found[what, size] for what in ("network, guided", "decode, whole", "decode, tiles"))
        for way, decode in (("whole", whole), ("tiles", tiles)):
            table.append({"size": size, "decode": way, "all_on_card_GiB": sum(weights.values()) + max(network, decode),
                          "one_at_a_time_GiB": max(weights["text"], weights["network"] + network, weights["vae"] + decode)})
    return table


def run(size: int, small: bool) -> dict:
    """An image of one step from `Pipeline`, with its own choice of tiles."""
    gemma = GEMMA | (SMALL_GEMMA if small else {})
    shape, config = SMALL if small else RELEASED, AutoencoderConfig.from_diffusers(released_config(small))
    made = {
        "text": TextEncoder(gemma, Tokenizer.from_json(shapes_tokenizer()), dtype=torch.bfloat16, device="meta"),
        "network": TransitionTransformer(replace(shape, in_channels=config.latent_channels), dtype=torch.bfloat16, device="meta"),
        "vae": Autoencoder(config, dtype=torch.bfloat16, device="meta"),
    }
    for network in made.values():
        network.to_empty(device="cpu").eval().requires_grad_(False)
        for value in network.parameters():
            value.normal_(std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
    pipe = Pipeline(made["network"], made["text"], made["vae"])
    moments = []
    decode = pipe.autoencoder.decode

    def timed(z):
        moments.append(time.perf_counter())
        return decode(z)

    pipe.autoencoder.decode = timed
    started = time.perf_counter()
    image = pipe(["a red circle"], steps=1, cfg=1, width=size, height=size)
    ended, (height, width) = time.perf_counter(), image.shape[1:3]
    return {"size": f"{width}x{height}", "decodes": len(moments),
            "weights_GiB": sum(p.nbytes for n in made.values() for p in n.parameters()) / 2**30,
            "held_GiB": memory_line("VmHWM") / 2**30, "text_and_network_s": moments[0] - started, "decode_s": ended - moments[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run an image end to end")
    parser.add_argument("--size", type=int, default=4096, help="side of that image in pixels (default: 4096)")
    parser.add_argument("--small", action="store_true", help="with --run: tiny networks, to try the script")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.size, args.small)))
    elif args.run:
        row = child(__file__, "--child", "--size", str(args.size), *["--small"] * args.small)
        report("end to end, CPU, bfloat16", [row], args.json)
    else:
        with torch.inference_mode():
            rows = counted()
        report("live tensors beside the weights, meta device, bands as on a GPU", rows, args.json)
        report("\nbfloat16, computed: GiB that a card needs for an image with guidance", cards(rows), None)


if __name__ == "__main__":
    main()
