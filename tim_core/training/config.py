"""Typed training configurations, read from YAML. Errors are one line that names the file and the key."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ..errors import TimError
from ..files import user_path
from ..images import MOST_PIXELS
from ..settings import CONFIG, Count, Fraction, FractionBelowOne, Rate, Size, Text, WholeNumber, require, shown, validate
from ..weights.defaults import Defaults
from .kinds import KINDS
from .objectives.transition import ObjectiveConfig
from .yaml_file import read_values

MOST_ITEMS = 2**14  # items of one step
MOST_REPEATS = 4  # in a pattern of layer names
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]


@dataclass(config=CONFIG, frozen=True)
class LoopConfig:
    """The training loop. `seconds` stops a run early, to be resumed (0: never)."""

    steps: Count = 10_000
    batch: Annotated[int, Field(ge=1, le=MOST_ITEMS)] = 64
    optimizer: Literal["adamw", "muon"] = "adamw"    # Muon, of torch 2.9, is for matrices and kernels of blocks; AdamW for the rest
    lr: Rate = 1e-3
    muon_lr: Rate = 0.01
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    clip: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    warmup: WholeNumber = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: Fraction = 0.02                    # fraction of lr at the end of a cosine
    ema: FractionBelowOne = 0.999
    seed: WholeNumber = 0
    autocast: bool = True                        # bfloat16
    compile: bool = False
    checkpointing: bool = False                  # recompute the activations of a block in the backward pass
    accumulate: Count = 1                        # parts that a batch is split into, for one optimiser step
    parallel: Literal["ddp", "fsdp2"] = "ddp"    # FSDP2 shards weights over processes
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    log_every: Count = 50
    save_every: Count = 500
    keep: Count = 2
    seconds: WholeNumber = 0

    @model_validator(mode="after")
    def _check(self) -> "LoopConfig":
        require(self.accumulate <= self.batch, "accumulate", self.accumulate, f"at most batch, {self.batch}")
        require(self.parallel == "ddp" or self.optimizer == "adamw", "optimizer", self.optimizer, "adamw with parallel: fsdp2")
        return self


@dataclass(config=CONFIG, frozen=True, kw_only=True)
class RunConfig:
    """What all kinds share."""

    output: Text                                 # folder of the run
    checkpoint: Text | None = None               # path of the result (default: export_name in output)
    loop: LoopConfig = LoopConfig()

    @property
    def export_name(self) -> str:
        """The name of the result in `output`."""
        return "model.safetensors"

    def export_path(self, step: int) -> Path:
        """The file that a run writes at a step: `checkpoint` at the end, if set, else one in its folder."""
        ended = self.checkpoint and step >= self.loop.steps
        return user_path(self.checkpoint) if ended else user_path(self.output) / self.export_name


@dataclass(config=CONFIG, frozen=True, kw_only=True)
class TransformerTraining(RunConfig):
    """What `kind: tim` and `kind: finetune` share."""

    p_mean: Annotated[float, Field(ge=-20, le=20)] = 0.0   # mean of the logit-normal times, on the OT-FM transport
    p_std: Annotated[float, Field(ge=1e-6, le=20)] = 1.6
    shift_base: Size | None = None              # image side at which times are not shifted (Eq. 50: 1024); null: no shift
    objective: ObjectiveConfig = ObjectiveConfig()
    attention: Literal["eager", "sdpa", "flash"] = "eager"   # flash on a GPU; eager is the fastest on a CPU

    @property
    def objectives(self) -> dict[str, ObjectiveConfig]:
        """The objectives of all steps, by key."""
        return {"objective": self.objective}

    @model_validator(mode="after")
    def _check_attention(self) -> "TransformerTraining":
        if self.attention == "flash":
            require(self.loop.autocast, "attention", "flash", "eager or sdpa without loop.autocast; flash-attn has no float32")
            for objective in self.objectives.values():
                require(objective.derivative == "dde" or objective.target != "differential", "attention", "flash",
                        "eager or sdpa with derivative: jvp, which flash-attn does not support")
        return self


@dataclass(config=CONFIG, frozen=True)
class LoraConfig:
    """A low-rank adapter on the layers whose names match `targets`."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None   # the adapter is scaled by alpha / rank (default: by 1)
    targets: Annotated[tuple[Text, ...], Field(min_length=1)] = (
        r"^blocks\.\d+\.(attn|cross_attn)\.(qkv|q|kv|proj)$", r"^blocks\.\d+\.mlp\.fc")

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            try:
                re.compile(target)
            except (re.error, OverflowError, RecursionError) as error:
                require(False, "", target, f"a regular expression ({error})")
            plain = re.sub(r"\\.|\[[^\]]*\]", "x", target)
            repeats = re.findall(r"[*+{]", plain)
            require(len(repeats) <= MOST_REPEATS and not re.search(r"\)[*+{]", plain), "", target,
                    f"a regular expression with at most {MOST_REPEATS} repeats, and none of a group; others may take for ever")
        return targets


@dataclass(config=CONFIG, frozen=True)
class FolderConfig:
    """Images and their captions: a folder with a .txt beside each image, or a .jsonl of {"image": path, "caption": text}.

    A class-conditional model takes {"image": path, "label": number}, or one folder per class, numbered from 0 by name.
    """

    path: Text
    cache: Text | None = None                    # folder of cached latents and text features (default: <path>.cache)
    max_pixels: Pixels = 1024 * 1024               # larger images are scaled down
    base_pixels: Pixels | None = None              # loop.batch is for images of this size; other batches have as many tokens
                                                 # (default: that of the model's native size)
    min_bucket_size: Count = 4                     # sizes with fewer images are cropped to a similar size, if there is one

    @property
    def cache_folder(self) -> Path:
        return user_path(self.cache or f"{self.path.rstrip('/')}.cache")


@dataclass(config=CONFIG, frozen=True, kw_only=True)
class FineTuning(TransformerTraining):
    """`kind: finetune`: trains a released or bundled transformer on a folder of images, all weights or a LoRA.

    p_mean and p_std: 0 and 1.6 for text to image, -0.4 and 1 for classes.
    """

    model: Text                                  # one-file checkpoint, folder of parts, bundled name, or file of the transformer
    data: FolderConfig
    text_encoder: Text | None = None             # these two take the place of those in `model`
    autoencoder: Text | None = None
    lora: LoraConfig | None = None               # null: train all weights of the transformer
    shift_base: Size | None = 1024
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    dropout: FractionBelowOne = 0.1              # probability of dropping a caption or a class

    @property
    def export_name(self) -> str:
        return "lora.safetensors" if self.lora else super().export_name

    def for_model(self, defaults: Defaults) -> "FineTuning":
        """The configuration with the values that depend on what the model is made for."""
        pixels = self.data.base_pixels or defaults.width * defaults.height
        return replace(self, data=replace(self.data, base_pixels=pixels))

    @model_validator(mode="after")
    def _check(self) -> "FineTuning":
        require(self.objective.target != "teacher", "objective.target", "teacher", "differential or composed in kind: finetune")
        return self


def time_shift(height: int, width: int, base: int | None) -> float:
    """s of the resolution-dependent time shift (paper Eq. 50) for images of this size; 1 without a base."""
    return 1.0 if base is None else (height * width) ** 0.5 / base


def recorded(config: Any) -> dict:
    """The configuration as exported files record it: without output paths, and with `~` for the home folder."""
    home = f"{user_path('~')}/"

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return "~/" + value.removeprefix(home) if isinstance(value, str) and value.startswith(home) else value

    return {name: plain(value) for name, value in asdict(config).items() if name not in ("output", "checkpoint")}


def read(path: str | Path) -> Any:
    """Reads a YAML file into the dataclass of its `kind`. TimError naming the file and the key."""
    values, sources = read_values(path)

    def source(key: tuple[str, ...]) -> Path:
        return next((sources[key[:n]] for n in range(len(key), 0, -1) if key[:n] in sources), Path(path))

    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise TimError(f"{source(('kind',))}: kind is {shown(kind)}; use one of {', '.join(KINDS)}")
    return validate(KINDS[kind].config_class(), values, source)
