"""The network against a plain reading of the same one, on the same weights, in pairs.

    python benchmarks/network.py [--tokens 1024] [--dtype float32,bfloat16] [--pairs 5] [--blocks 28] [--clock wall] [--json FILE] [--small]

The plain reading computes as the official code does: rotation by two halves, products and sums one by one, the text normalised in every
block. Random weights in the released sizes (865M; --small: a few thousand). The goal: at most 0.90 of its time at 1,024 tokens.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import device_name, pairs, ratio, report  # noqa: E402
from tim_core.models.config import TransformerConfig  # noqa: E402
from tim_core.models.rope import angles  # noqa: E402
from tim_core.models.transformer import TransitionTransformer, time_features  # noqa: E402

RELEASED = TransformerConfig(in_channels=32, hidden_size=1152, depth=28, num_heads=16, text_dim=1152)
SMALL = replace(RELEASED, in_channels=4, hidden_size=32, depth=2, num_heads=2, text_dim=12)


class PlainNetwork:
    """A text-to-image network of one released configuration, written as its paper reads, with the weights of ours."""

    def __init__(self, network: TransitionTransformer):
        self.network, self.config = network, network.config

    def __call__(self, x, t, r, y):
        net, config = self.network, self.config
        height, width = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size
        turn = angles(config.head_dim, height, width, x.device, order=config.positions).repeat_interleave(2, -1)
        self.cos, self.sin = turn.cos(), turn.sin()
        time = net.t_embedder.mlp(time_features(t).to(x.dtype)).unsqueeze(1)
        interval = net.delta_embedder.mlp(time_features(t - r).to(x.dtype)).unsqueeze(1)
        condition = time + interval
        y = self.gated(net.y_embedder.mlp, net.y_embedder.norm(y))
        x = net.x_embedder.proj(x).flatten(2).transpose(1, 2)
        for block in net.blocks:
            modulation = self.gated(block.adaLN_modulation, condition).chunk(9, dim=-1)
            x = x + modulation[2] * self.attend(block.attn, self.norm(x) * (1 + modulation[1]) + modulation[0], interval)
            x = x + modulation[5] * self.attend_text(block.cross_attn, self.norm(x) * (1 + modulation[4]) + modulation[3], self.norm(y))
            x = x + modulation[8] * self.gated(block.mlp, self.norm(x) * (1 + modulation[7]) + modulation[6])
        shift, scale = self.gated(net.final_layer.adaLN_modulation, condition).chunk(2, dim=-1)
        x = net.final_layer.linear(self.norm(x) * (1 + scale) + shift)
        patch = config.patch_size
        x = x.reshape(len(x), height, width, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), -1, height * patch, width * patch)

    def norm(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def gated(self, mlp, x):
        return mlp.fc2(F.silu(mlp.fc1_g(x)) * mlp.fc1_x(x))

    def rotate(self, x):
        first, second = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        half = torch.stack((-second, first), dim=-1).reshape(x.shape)
        return (x.float() * self.cos + half * self.sin).to(x.dtype)

    def heads(self, x, count):
        return x.reshape(len(x), x.shape[1], count, self.config.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, attention, x, interval):
        q, k, v = self.heads(attention.qkv(x) + attention.qkv_d(interval), 3)
        q, k = self.rotate(attention.q_norm(q)), self.rotate(attention.k_norm(k))
        return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def attend_text(self, attention, x, y):
        (q,) = self.heads(attention.q(x), 1)
        k, v = self.heads(attention.kv(y), 2)
        q, k = self.rotate(attention.q_norm(q)), attention.k_norm(k)
        return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def build(config: TransformerConfig, dtype: torch.dtype, device: str | torch.device = "cpu") -> TransitionTransformer:
    """The network with random weights, small enough that its values stay near 1."""
    torch.manual_seed(0)
    network = TransitionTransformer(config, dtype=dtype, device=device).eval().requires_grad_(False)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
    return network


def inputs(config: TransformerConfig, tokens: int, dtype: torch.dtype, device="cpu", batch: int = 1, text_tokens: int = 32):
    """x of a square image with `tokens` tokens, t, r, y."""
    side = round(tokens**0.5) * config.patch_size
    torch.manual_seed(1)
    x = torch.randn(batch, config.in_channels, side, side)
    y = torch.randn(batch, text_tokens, config.text_dim)
    return x.to(device, dtype), torch.ones(batch, device=device), torch.zeros(batch, device=device), y.to(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024", help="image tokens, several separated by commas (default: 1024)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="default: float32,bfloat16")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of evaluations (default: 5)")
    parser.add_argument("--blocks", type=int, default=28, help="number of blocks (default: 28, as released)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu counts processor time (default: wall)")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the script")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    args = parser.parse_args()
    config, rows = SMALL if args.small else replace(RELEASED, depth=args.blocks), []
    with torch.inference_mode():
        for dtype in (getattr(torch, name) for name in args.dtype.split(",")):
            network = build(config, dtype)
            plain = PlainNetwork(network)
            for tokens in map(int, args.tokens.split(",")):
                arguments = inputs(config, tokens, dtype)
                ours, theirs = network(*arguments).float(), plain(*arguments).float()
                times = pairs(lambda: network(*arguments), lambda: plain(*arguments), args.pairs, args.clock)
                rows.append({"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, **ratio(times, "ours", "plain"),
                             "difference": ((ours - theirs).abs().max() / theirs.abs().max()).item()})
    report(f"one evaluation, {device_name()}, {args.clock} clock", rows, args.json)


if __name__ == "__main__":
    main()
