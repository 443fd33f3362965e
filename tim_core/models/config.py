"""Frozen descriptions of the architectures, read from weights or from a diffusers config.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Mapping

from torch import Tensor

from ..errors import TimError
from .released import DC_AE_CHANNELS, DC_AE_SCALE

# How the interval is embedded: as a sum of embeddings, the last through its own embedder.
CONDITIONS = ("t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r")
# Positions of the tokens in oblong images, see `rope.positions`.
POSITIONS = ("official", "grid")


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a transition transformer. TimError if the numbers do not fit together."""

    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 1
    text_dim: int | None = None  # width of the text features; None for a class-conditional model
    num_classes: int | None = None  # excluding the null class; None for a text-to-image model
    null_class: bool = True  # the class table has one more row, for guidance
    qk_norm: bool = True
    new_condition: str = "t-r"
    use_new_embed: bool = True  # the interval has its own embedder
    distance_aware: bool = True  # interval-aware attention (paper Eq. 15)
    lora_hidden_size: int | None = None  # rank of the modulation; None is the official default
    encoder_depth: int = 8  # the block, counted from 1, whose output the projector reads
    projector_dim: int = 2048
    z_dim: int | None = None  # width of the projected features (REPA); None for no projector
    # Not in the repr, so that older models keep their fingerprints; `Pipeline.fingerprint` adds what weights do not show.
    mlp_hidden_size: int | None = field(default=None, repr=False)  # width of the gated MLP; None: that of the official mlp_ratio, 4
    positions: str = field(default="official", repr=False)

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise TimError(f"TiM configuration: {name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise TimError(
                f"TiM configuration: hidden_size {self.hidden_size} with {self.num_heads} heads; their width must be a multiple of 4"
            )
        if (self.text_dim is None) == (self.num_classes is None):
            raise TimError(
                f"TiM configuration: text_dim is {self.text_dim} and num_classes is {self.num_classes}; set exactly one of them"
            )
        if self.new_condition not in CONDITIONS:
            known = ", ".join(map(repr, CONDITIONS))
            raise TimError(f"TiM configuration: new_condition is {self.new_condition!r}; use one of {known}")
        if self.positions not in POSITIONS:
            known = ", ".join(map(repr, POSITIONS))
            raise TimError(f"TiM configuration: positions is {self.positions!r}; use one of {known}")
        if self.z_dim is not None and not 1 <= self.encoder_depth <= self.depth:
            raise TimError(f"TiM configuration: encoder_depth is {self.encoder_depth}; it must be from 1 to depth, {self.depth}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def modulation_rank(self) -> int:
        return self.lora_hidden_size or self.hidden_size // 4 * 3

    @property
    def mlp_width(self) -> int:
        return self.mlp_hidden_size or 4 * self.hidden_size * 2 // 3

    def record(self) -> dict[str, Any]:
        """The settings that tensor shapes do not determine, as from_state_dict takes them in metadata."""
        names = ("num_heads", "new_condition", "null_class", "positions") + (("encoder_depth",) if self.z_dim is not None else ())
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> TransformerConfig:
        """Reads the architecture from key names and shapes.

        metadata: settings that these do not determine: num_heads (without qk-norm), new_condition, null_class, encoder_depth, positions.
        TimError naming the tensor or key if this is not a TiM transformer.
        """
        metadata = {name: value for name, value in (metadata or {}).items() if value is not None}

        def number(name: str, default: int) -> int:
            value = metadata.get(name, default)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TimError(f"TiM metadata: {name} is {value!r}; it must be a whole number of at least 1")
            return value

        def shape(name: str, *expected: int | None) -> tuple[int, ...]:
            """The shape of a required tensor; None in `expected` stands for any length."""
            wanted = "[" + ", ".join("any" if length is None else str(length) for length in expected) + "]"
            if name not in state_dict:
                raise TimError(f"not a TiM transformer: tensor '{name}' of shape {wanted} is missing (there are {len(state_dict)} tensors)")
            found = tuple(getattr(state_dict[name], "shape", ()))
            if len(found) != len(expected) or any(b is not None and a != b for a, b in zip(found, expected)):
                raise TimError(f"not a TiM transformer: tensor '{name}' has shape {list(found)} in place of {wanted}")
            return found

        hidden, channels, patch, _ = shape("x_embedder.proj.weight", None, None, None, None)
        shape("x_embedder.proj.weight", hidden, channels, patch, patch)
        shape("final_layer.linear.weight", patch * patch * channels, hidden)
        shape("t_embedder.mlp.0.weight", hidden, 256)
        shape("blocks.0.attn.qkv.weight", 3 * hidden, hidden)
        mlp_width, _ = shape("blocks.0.mlp.fc1_g.weight", None, hidden)
        shape("blocks.0.mlp.fc2.weight", hidden, mlp_width)

        numbers = {int(match[1]) for match in (re.match(r"blocks\.([0-9]{1,18})\.", name) for name in state_dict) if match}
        depth = max(numbers) + 1
        if len(numbers) != depth:
            raise TimError(f"not a complete TiM transformer: it has {len(numbers)} of {depth} blocks (0 to {depth - 1})")

        is_class = "y_embedder.embedding_table.weight" in state_dict
        if not isinstance(null_class := metadata.get("null_class", True), bool):
            raise TimError(f"TiM metadata: null_class is {null_class!r}; it must be true or false")
        if is_class:
            rows, _ = shape("y_embedder.embedding_table.weight", None, hidden)
            text_dim, num_classes = None, rows - null_class
        else:
            (text_dim,) = shape("y_embedder.norm.weight", None)
            shape("y_embedder.mlp.fc1_g.weight", 4 * hidden, text_dim)
            num_classes = None
        rank, _ = shape("blocks.0.adaLN_modulation.fc1_g.weight", None, hidden)
        shape("blocks.0.adaLN_modulation.fc2.weight", (6 if is_class else 9) * hidden, rank)

        qk_norm = "blocks.0.attn.q_norm.weight" in state_dict
        if qk_norm:
            (head_dim,) = shape("blocks.0.attn.q_norm.weight", None)
            num_heads = hidden // max(head_dim, 1)
            if head_dim < 1 or hidden % head_dim:
                raise TimError(f"not a TiM transformer: heads of width {head_dim} do not divide the hidden size, {hidden}")
            number("num_heads", num_heads)  # of no consequence, but no nonsense either
        else:
            num_heads = number("num_heads", 16)
            if "num_heads" not in metadata and hidden % (4 * num_heads):
                raise TimError(f"TiM transformer of width {hidden} without qk-norm: num_heads is not in the metadata; add it")

        has_projector = "projector.0.weight" in state_dict
        projector_dim, _ = shape("projector.0.weight", None, hidden) if has_projector else (2048, hidden)
        return cls(
            in_channels=channels,
            hidden_size=hidden,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch,
            text_dim=text_dim,
            num_classes=num_classes,
            null_class=null_class,
            qk_norm=qk_norm,
            new_condition=metadata.get("new_condition", "t-r"),
            use_new_embed="delta_embedder.mlp.0.weight" in state_dict,
            distance_aware="blocks.0.attn.qkv_d.weight" in state_dict,
            lora_hidden_size=rank,
            encoder_depth=number("encoder_depth", min(8, depth)),
            projector_dim=projector_dim,
            z_dim=shape("projector.4.weight", None, projector_dim)[0] if has_projector else None,
            mlp_hidden_size=None if mlp_width == 4 * hidden * 2 // 3 else mlp_width,
            positions=metadata.get("positions", "official"),
        )


MIN_SCALE = 1e-3  # of a DC-AE's latents; those of the released ones are 0.18 to 1.03
ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "mish")


@dataclass(frozen=True)
class StageConfig:
    """One resolution of a DC-AE. `kernels`: sizes of the multi-scale attention."""

    width: int
    layers: int
    block: str = "ResBlock"                 # or "EfficientViTBlock"
    kernels: tuple[int, ...] = ()
    norm: str = "rms_norm"                  # or "batch_norm"
    activation: str = "silu"                # or "relu"


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of a DC-AE (arXiv 2410.10733); stage 0 is the finest."""

    TITLE: ClassVar = "DC-AE"
    DIFFUSERS: ClassVar = ("AutoencoderDC", "encoder_block_out_channels")  # its class there, and a key of every config.json
    RECORD: ClassVar = ("scaling_factor", "force_upcast", "head_dim", "in_shortcut", "out_shortcut", "out_activation",
                        "encoder_activations", "decoder_activations")

    encoder: tuple[StageConfig, ...]
    decoder: tuple[StageConfig, ...]
    in_channels: int = 3
    latent_channels: int = 32
    head_dim: int = 32
    downsample: str = "conv"                # or "pixel_unshuffle"
    upsample: str = "interpolate"           # or "pixel_shuffle"
    out_shortcut: bool = True
    in_shortcut: bool = True
    out_activation: str = "relu"
    scaling_factor: float = 1.0
    force_upcast: bool = False              # compute in float32 only

    def __post_init__(self) -> None:
        scale = self.scaling_factor
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not MIN_SCALE <= scale <= 1 / MIN_SCALE:
            raise TimError(f"DC-AE: scaling_factor is {scale!r}; it must be a number from {MIN_SCALE:g} to {1 / MIN_SCALE:g}")
        for name in ("out_shortcut", "in_shortcut", "force_upcast"):
            if not isinstance(getattr(self, name), bool):
                raise TimError(f"DC-AE: {name} is {getattr(self, name)!r}; it must be true or false")
        for name in ("in_channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise TimError(f"DC-AE: {name} is {getattr(self, name)}; it must be at least 1")
        if isinstance(self.head_dim, bool) or not isinstance(self.head_dim, int) or self.head_dim < 1:
            raise TimError(f"DC-AE: head_dim is {self.head_dim!r}; it must be a whole number of at least 1")
        for stage in (*self.encoder, *self.decoder):
            if stage.block == "EfficientViTBlock" and (stage.width < self.head_dim or stage.width % self.head_dim):
                raise TimError(f"DC-AE: head_dim is {self.head_dim}; it must divide the width of attention, {stage.width}")
        for name in ("out_activation", "encoder_activations", "decoder_activations"):
            value = getattr(self, name)
            if any(activation not in ACTIVATIONS for activation in ([value] if name == "out_activation" else value)):
                raise TimError(f"DC-AE: {name} is {value!r}; use {', '.join(ACTIVATIONS)}")

    @property
    def encoder_activations(self) -> list[str]:
        return [stage.activation for stage in self.encoder]

    @property
    def decoder_activations(self) -> list[str]:
        return [stage.activation for stage in self.decoder]

    def record(self) -> dict[str, Any]:
        """The settings that tensor shapes do not determine, as from_state_dict takes them in metadata."""
        return {name: getattr(self, name) for name in self.RECORD}

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.encoder) - 1)

    @classmethod
    def from_diffusers(cls, config: dict) -> "AutoencoderConfig":
        """Reads the config.json of a diffusers AutoencoderDC; missing keys take the defaults of that class."""
        multiscales = ((), (), (), (5,), (5,), (5,))

        def stages(side, layers, norms="rms_norm", activations="silu"):
            widths = config.get(f"{side}_block_out_channels", (128, 256, 512, 512, 1024, 1024))
            columns = [config.get(f"{side}_block_types", "ResBlock"), norms, activations]
            blocks, norms, activations = ([c] * len(widths) if isinstance(c, str) else c for c in columns)
            layers = config.get(f"{side}_layers_per_block", layers)
            kernels = map(tuple, config.get(f"{side}_qkv_multiscales", multiscales))
            columns = zip(widths, layers, blocks, kernels, norms, activations)
            return tuple(
                StageConfig(width=width, layers=count, block=block, kernels=sizes, norm=norm, activation=activation)
                for width, count, block, sizes, norm, activation in columns
            )

        decoder_norms, decoder_activations = config.get("decoder_norm_types", "rms_norm"), config.get("decoder_act_fns", "silu")
        return cls(
            encoder=stages("encoder", (2, 2, 2, 3, 3, 3)),
            decoder=stages("decoder", (3, 3, 3, 3, 3, 3), decoder_norms, decoder_activations),
            in_channels=config.get("in_channels", 3),
            latent_channels=config.get("latent_channels", 32),
            head_dim=config.get("attention_head_dim", 32),
            downsample="pixel_unshuffle" if config.get("downsample_block_type", "pixel_unshuffle") == "pixel_unshuffle" else "conv",
            upsample="interpolate" if config.get("upsample_block_type", "pixel_shuffle") == "interpolate" else "pixel_shuffle",
            out_shortcut=config.get("encoder_out_shortcut", True),
            in_shortcut=config.get("decoder_in_shortcut", True),
            out_activation=config.get("decoder_conv_act_fn", "relu"),
            scaling_factor=config.get("scaling_factor", 1.0),
            force_upcast=config.get("force_upcast") or False,
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], metadata: dict | None = None) -> "AutoencoderConfig":
        """Reads the architecture from key names and shapes.

        metadata: what `record` writes. Without it, both shortcuts are on, batch-norm stages use relu, as in every released DC-AE, and the
        scaling factor is that of dc-ae-f32c32-sana for its number of channels, else 1. TimError if this is not a DC-AE.
        """
        metadata = metadata or {}
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}

        def shape(key: str, dimensions: int) -> tuple[int, ...]:
            if len(shapes[key]) != dimensions:
                raise TimError(f"not a DC-AE: tensor '{key}' has shape {list(shapes[key])} in place of {dimensions} dimensions")
            return shapes[key]

        for key in ("encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.norm_out.weight"):
            if key not in shapes:
                raise TimError(f"not a DC-AE: tensor '{key}' is missing (there are {len(shapes)} tensors)")

        def stages(side: str) -> tuple[StageConfig, ...]:
            places = set()  # of stages and of the layers in them
            for key in shapes:
                if key.startswith(f"{side}."):
                    if (match := re.match(r"\.([0-9]{1,18})\.([0-9]{1,18})\.", key[len(side) :])) is None:
                        raise TimError(f"not a DC-AE: tensor '{key}' is in no layer of a stage")
                    places.add((int(match[1]), int(match[2])))
            numbers = {stage for stage, _ in places} | {0}  # the finest stage may have no tensors
            found, n = [], 1 + max(numbers)
            if len(numbers) != n:
                raise TimError(f"not a complete DC-AE: {side} has {len(numbers)} of {n} stages (0 to {n - 1})")
            for i in range(n):
                prefix = f"{side}.{i}."
                layers = [j for stage, j in sorted(places) if stage == i and f"{prefix}{j}.conv.weight" not in shapes]
                first = f"{prefix}{layers[0]}." if layers else None
                if first is None:
                    found.append(StageConfig(width=0, layers=0))
                elif f"{first}conv1.weight" in shapes:
                    batch_norm = f"{first}norm.running_mean" in shapes
                    norm, activation = ("batch_norm", "relu") if batch_norm else ("rms_norm", "silu")
                    width = shape(f"{first}conv1.weight", 4)[0]
                    found.append(StageConfig(width=width, layers=len(layers), norm=norm, activation=activation))
                elif f"{first}attn.to_q.weight" in shapes:
                    kernels = []
                    while (key := f"{first}attn.to_qkv_multiscale.{len(kernels)}.proj_in.weight") in shapes:
                        kernels.append(shape(key, 4)[-1])
                    norm = "batch_norm" if f"{first}attn.norm_out.running_mean" in shapes else "rms_norm"
                    width = shape(f"{first}attn.to_q.weight", 2)[1]
                    found.append(StageConfig(width=width, layers=len(layers), block="EfficientViTBlock", kernels=tuple(kernels), norm=norm))
                else:
                    raise TimError(f"not a DC-AE: the tensors under {first} are neither a ResBlock nor an EfficientViTBlock")
            name = f"{side.partition('.')[0]}_activations"
            activations = metadata.get(name) or [stage.activation for stage in found]
            if not isinstance(activations, list) or len(activations) != n:
                raise TimError(f"DC-AE: {name} is {activations!r}; it must be a list of {n}, one per stage")
            return tuple(replace(stage, activation=activation) for stage, activation in zip(found, activations))

        channels = shape("encoder.conv_out.weight", 4)[0]
        encoder, decoder = stages("encoder.down_blocks"), stages("decoder.up_blocks")
        heads = [shape(key, 4)[1] for key in shapes if key.endswith("to_qkv_multiscale.0.proj_out.weight")]
        down = [(shapes.get(f"encoder.down_blocks.{i}.{stage.layers}.conv.weight") or (0,))[0] == encoder[i + 1].width
                for i, stage in enumerate(encoder[:-1]) if stage.layers]
        up = [(shapes.get(f"decoder.up_blocks.{i}.0.conv.weight") or (0,))[0] == stage.width
              for i, stage in enumerate(decoder[:-1]) if stage.layers]
        if heads and metadata.get("head_dim", heads[0]) != heads[0]:
            raise TimError(f"DC-AE: head_dim is {metadata['head_dim']!r}; the tensors have {heads[0]}; correct the metadata")
        first = "encoder.conv_in.weight" if encoder[0].layers else "encoder.conv_in.conv.weight"
        if first not in shapes:
            raise TimError(f"not a DC-AE: tensor '{first}' is missing (there are {len(shapes)} tensors)")
        return cls(
            encoder=encoder,
            decoder=decoder,
            in_channels=shape(first, 4)[1],
            latent_channels=channels,
            head_dim=metadata.get("head_dim", heads[0] if heads else 32),
            downsample="conv" if all(down) else "pixel_unshuffle",
            upsample="interpolate" if all(up) else "pixel_shuffle",
            out_shortcut=metadata.get("out_shortcut", True),
            in_shortcut=metadata.get("in_shortcut", True),
            out_activation=metadata.get("out_activation", "relu"),
            scaling_factor=metadata.get("scaling_factor", DC_AE_SCALE if channels == DC_AE_CHANNELS else 1.0),
            force_upcast=metadata.get("force_upcast") or False,
        )
