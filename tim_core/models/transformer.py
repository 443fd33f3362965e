"""The network F(x_t, t, r, y) of Transition Models (arXiv 2509.04394, section 3.4). Parameter names are those of the released weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import TransformerConfig
from .rope import rotary_table, rotate

FREQUENCIES = 256
# Live tensors of an evaluation at its peak over one of (B, N, hidden), by itemsize, as benchmarks/memory.py counts them.
PEAK_TENSORS = {4: 9.2, 2: 12.2}


def peak_bytes(config: TransformerConfig, cells: int, dtype: torch.dtype) -> float:
    """Bytes that an evaluation of so many latent cells, those of the whole batch, takes at its peak in inference, beside the weights."""
    return PEAK_TENSORS[4 if dtype.itemsize >= 4 else 2] * dtype.itemsize * config.hidden_size * cells / config.patch_size**2


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale x by 1 + scale, then shift it (adaLN)."""
    return torch.addcmul(shift, x, 1 + scale)


def time_features(t: Tensor) -> Tensor:
    """t (B,) itself, not scaled up -> (B, 256) float32: cosines, then sines."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    """A time or an interval (B,) -> (B, 1, hidden)."""

    def __init__(self, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(FREQUENCIES, hidden, **factory), nn.SiLU(), operations.Linear(hidden, hidden, **factory)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_features(t).to(dtype)).unsqueeze(1)


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g(x)) * fc1_x(x))."""

    def __init__(self, width: int, hidden: int, out: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.fc1_g = operations.Linear(width, hidden, **factory)
        self.fc1_x = operations.Linear(width, hidden, **factory)
        self.fc2 = operations.Linear(hidden, out, **factory)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc1_g(x)
        if torch.is_grad_enabled():
            return self.fc2(F.silu(gate) * self.fc1_x(x))
        return self.fc2(F.silu(gate, inplace=True).mul_(self.fc1_x(x)))


class TextEmbedder(nn.Module):
    """Text features (B, M, text_dim) -> (B, M, hidden). There is no mask: padded rows count like any other."""

    def __init__(self, text_dim: int, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(text_dim, **factory)
        self.mlp = SwiGLU(text_dim, 4 * hidden, hidden, operations, **factory)

    def forward(self, y: Tensor) -> Tensor:
        return self.mlp(self.norm(y))


class ClassEmbedder(nn.Module):
    """Labels (B,) -> (B, 1, hidden)."""

    def __init__(self, rows: int, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.embedding_table = operations.Embedding(rows, hidden, **factory)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y).unsqueeze(1)


class PatchEmbedder(nn.Module):
    """(B, C, H, W) -> (B, N, hidden), tokens row by row."""

    def __init__(self, channels: int, patch: int, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = operations.Conv2d(channels, hidden, kernel_size=patch, stride=patch, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class HeadNorm(nn.Module):
    """Base of the attention layers: norms of queries and keys under the official names, or none."""

    def add_norms(self, config: TransformerConfig, operations: Any, **factory: Any) -> None:
        self.q_norm = operations.LayerNorm(config.head_dim, **factory) if config.qk_norm else nn.Identity()
        self.k_norm = operations.LayerNorm(config.head_dim, **factory) if config.qk_norm else nn.Identity()


class SelfAttention(HeadNorm):
    """Attention among the image tokens; the interval shifts q, k and v (paper Eq. 15)."""

    def __init__(self, config: TransformerConfig, operations: Any, attention: Attention, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.attention = attention
        self.qkv = operations.Linear(hidden, 3 * hidden, **factory)
        self.qkv_d = operations.Linear(hidden, 3 * hidden, bias=False, **factory) if config.distance_aware else None
        self.add_norms(config, operations, **factory)
        self.proj = operations.Linear(hidden, hidden, **factory)

    def forward(self, x: Tensor, interval: Tensor, table: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.qkv_d is not None:
            shift = self.qkv_d(interval)
            qkv = qkv + shift if torch.is_grad_enabled() else qkv.add_(shift)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv.chunk(3, dim=-1))
        # Under autocast the norms return float32.
        q = rotate(self.q_norm(q), table).to(v.dtype)
        k = rotate(self.k_norm(k), table).to(v.dtype)
        return self.proj(self.attention(*(part.transpose(1, 2) for part in (q, k, v))))


class CrossAttention(HeadNorm):
    """Attention of the image tokens to the text. Only the image has positions."""

    def __init__(self, config: TransformerConfig, operations: Any, attention: Attention, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.attention = attention
        self.q = operations.Linear(hidden, hidden, **factory)
        self.kv = operations.Linear(hidden, 2 * hidden, **factory)
        self.add_norms(config, operations, **factory)
        self.proj = operations.Linear(hidden, hidden, **factory)

    def forward(self, x: Tensor, y: Tensor, table: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (self.q(x), *self.kv(y).chunk(2, dim=-1)))
        q = rotate(self.q_norm(q), table).to(v.dtype)
        return self.proj(self.attention(*(part.transpose(1, 2) for part in (q, self.k_norm(k).to(v.dtype), v))))


class Block(nn.Module):
    """Self-attention, cross-attention (text models only) and a gated MLP, each modulated by the condition."""

    def __init__(self, config: TransformerConfig, operations: Any, attention: Attention, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size

        def plain_norm() -> nn.Module:
            return operations.LayerNorm(hidden, elementwise_affine=False, eps=1e-6, **factory)

        self.norm1 = plain_norm()
        self.attn = SelfAttention(config, operations, attention, **factory)
        self.cross_attn = None
        if config.text_dim is not None:
            self.norm2_i = plain_norm()
            self.cross_attn = CrossAttention(config, operations, attention, **factory)
        self.norm3 = plain_norm()
        self.mlp = SwiGLU(hidden, config.mlp_width, hidden, operations, **factory)
        self.chunks = 6 if self.cross_attn is None else 9
        self.adaLN_modulation = SwiGLU(hidden, config.modulation_rank, self.chunks * hidden, operations, **factory)

    def forward(self, x: Tensor, y: Tensor, condition: Tensor, interval: Tensor, table: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).chunk(self.chunks, dim=-1)
        shift, scale, gate = modulation[:3]
        x = torch.addcmul(x, gate, self.attn(modulate(self.norm1(x), shift, scale), interval, table))
        if self.cross_attn is not None:
            shift, scale, gate = modulation[3:6]
            x = torch.addcmul(x, gate, self.cross_attn(modulate(self.norm2_i(x), shift, scale), y, table))
        shift, scale, gate = modulation[-3:]
        return torch.addcmul(x, gate, self.mlp(modulate(self.norm3(x), shift, scale)))


class FinalLayer(nn.Module):
    """(B, N, hidden) -> (B, N, patch * patch * channels)."""

    def __init__(self, config: TransformerConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm_final = operations.LayerNorm(hidden, elementwise_affine=False, eps=1e-6, **factory)
        self.linear = operations.Linear(hidden, config.patch_size**2 * config.in_channels, **factory)
        self.adaLN_modulation = SwiGLU(hidden, hidden // 2, 2 * hidden, operations, **factory)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TransitionTransformer(nn.Module):
    """F(x_t, t, r, y) of a text-to-image or a class-conditional TiM.

    operations: a namespace with Linear, Conv2d, LayerNorm and Embedding (torch.nn, or ComfyUI's own).
    attention: (q, k, v), each (B, heads, N, head_dim), to (B, N, heads * head_dim).
    dtype: of new weights; ComfyUI's layers may store and compute in others.
    """

    damaged_weight: str | None = None  # set by loaders, see tim_core.finite

    def __init__(
        self,
        config: TransformerConfig,
        operations: Any = nn,
        attention: Attention = sdpa,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        hidden = config.hidden_size
        factory = {"device": device, "dtype": dtype}

        self.x_embedder = PatchEmbedder(config.in_channels, config.patch_size, hidden, operations, **factory)
        self.t_embedder = TimeEmbedder(hidden, operations, **factory)
        if config.use_new_embed:
            self.delta_embedder = TimeEmbedder(hidden, operations, **factory)
        if config.text_dim is not None:
            self.y_embedder = TextEmbedder(config.text_dim, hidden, operations, **factory)
            # norm2_t of every official block: it has no weights, and its input is the same in all
            self.norm_y = operations.LayerNorm(hidden, elementwise_affine=False, eps=1e-6, **factory)
        else:
            self.y_embedder = ClassEmbedder(config.num_classes + config.null_class, hidden, operations, **factory)
        self.blocks = nn.ModuleList(Block(config, operations, attention, **factory) for _ in range(config.depth))
        self.projector = None
        if config.z_dim is not None:
            self.projector = nn.Sequential(
                operations.Linear(hidden, config.projector_dim, **factory),
                nn.SiLU(),
                operations.Linear(config.projector_dim, config.projector_dim, **factory),
                nn.SiLU(),
                operations.Linear(config.projector_dim, config.z_dim, **factory),
            )
        self.final_layer = FinalLayer(config, operations, **factory)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, return_projection: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W), t and r (B,) as c_noise of the transport returns them, y (B, M, text_dim) or labels (B,) int64 -> (B, C, H, W).

        H and W are multiples of the patch size. Times stay float32 or float64, never rounded to the dtype of the network.
        return_projection: also returns the projector's features of block `encoder_depth`, (B, N, z_dim).
        """
        config = self.config
        height, width = x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size
        table = rotary_table(config.head_dim, height, width, x.device, at_least_float32(x.dtype), config.positions)
        table = table.unsqueeze(1)  # one for all heads

        time, interval = self.embed_times(t.to(at_least_float32(t.dtype)), r.to(at_least_float32(r.dtype)), x.dtype)
        condition = time + interval
        if config.text_dim is not None:
            y = self.norm_y(self.y_embedder(y.to(x.dtype)))
        else:
            condition = condition + self.y_embedder(y).to(x.dtype)

        x = self.x_embedder(x)
        projection = None
        for number, block in enumerate(self.blocks, start=1):
            x = self.run_block(number - 1, block, x, y, condition, interval, table)
            if return_projection and number == config.encoder_depth:
                projection = self.projector(x)
        x = self.final_layer(x, condition)
        # (B, h * w, p * p * C) -> (B, h, w, p, p, C) -> (B, C, h * p, w * p)
        x = x.unflatten(-1, (config.patch_size, config.patch_size, -1)).unflatten(1, (height, width))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return (x, projection) if return_projection else x

    def run_block(
        self, index: int, block: Block, x: Tensor, y: Tensor, condition: Tensor, interval: Tensor, table: Tensor
    ) -> Tensor:
        """Calls block number `index`, from 0, with the normalised text y; ComfyUI's network lets other packs replace it here."""
        return block(x, y, condition, interval, table)

    def embed_times(self, t: Tensor, r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings of the start time and of the interval, (B, 1, hidden) each (paper Eq. 14)."""
        values = {"t": t, "r": r, "t-r": t - r}
        *earlier, last = self.config.new_condition.split(",")
        own = self.delta_embedder if self.config.use_new_embed else self.t_embedder
        time = self.t_embedder(t, dtype)
        interval = own(values[last], dtype)
        for name in earlier:
            interval = interval + self.t_embedder(values[name], dtype)
        return time, interval

    def initialize_weights(self) -> None:
        """Initialises as the official code does: Xavier; modulation and output zero, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        normal_init = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        if self.config.text_dim is not None:
            normal_init += [self.y_embedder.mlp.fc1_g, self.y_embedder.mlp.fc1_x, self.y_embedder.mlp.fc2]
        else:
            normal_init += [self.y_embedder.embedding_table]
        for module in normal_init:
            nn.init.normal_(module.weight, std=0.02)
        zero_init = [block.adaLN_modulation.fc2 for block in self.blocks] + [self.final_layer.adaLN_modulation.fc2, self.final_layer.linear]
        for module in zero_init:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype in which times and angles are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
