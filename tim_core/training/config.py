"""Typed training configurations, read from YAML. Errors are one line that names the key."""

import math
import re
import types
import typing
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path

from ..errors import TimError
from ..models.attention import BACKENDS
from .objectives.transition import ObjectiveConfig

KINDS = ("finetune", "tim", "autoencoder")


def check(ok: bool, key: str, value, use: str) -> None:
    if not ok:
        raise TimError(f"training config: {key} is {value!r}; use {use}")


def check_times(p_mean: float, p_std: float, shift_base: int | None) -> None:
    check(abs(p_mean) <= 20, "p_mean", p_mean, "-20 to 20, since it is a logit")
    check(0 < p_std <= 20, "p_std", p_std, "more than 0, up to 20")
    check(shift_base is None or shift_base > 0, "shift_base", shift_base, "1 or more")


def check_attention(attention: str, objective: ObjectiveConfig, autocast: bool) -> None:
    check(attention in BACKENDS, "attention", attention, " or ".join(BACKENDS))
    check(attention != "flash" or autocast, "attention", attention, "eager or sdpa without loop.autocast; flash-attn has no float32")
    check(attention != "flash" or objective.derivative == "dde" or objective.target != "differential", "attention", attention,
           "eager or sdpa with derivative: jvp, which flash-attn does not support")


@dataclass(frozen=True)
class LoopConfig:
    """The training loop. `seconds` stops a run early, to be resumed (0: never)."""

    steps: int = 10_000
    batch: int = 64
    optimizer: str = "adamw"                     # or "muon": Muon for the weight matrices of blocks, AdamW for the rest
    lr: float = 1e-3
    muon_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 200
    schedule: str = "cosine"                     # or "constant"
    final_lr: float = 0.02                       # fraction of lr at the end of a cosine
    ema: float = 0.999
    seed: int = 0
    autocast: bool = True                        # bfloat16
    compile: bool = False
    checkpointing: bool = False                  # recompute the activations of a block in the backward pass
    accumulate: int = 1                          # parts that a batch is split into, for one optimiser step
    parallel: str = "ddp"                        # or "fsdp2", which shards weights over processes
    workers: int = 1
    log_every: int = 50
    save_every: int = 500
    keep: int = 2
    seconds: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "save_every", "keep", "accumulate"):
            check(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "1 or more")
        for name in ("lr", "muon_lr", "clip"):
            check(getattr(self, name) > 0, f"loop.{name}", getattr(self, name), "more than 0")
        for name in ("warmup", "workers", "seconds", "seed", "weight_decay"):
            check(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "0 or more")
        check(self.seed < 2**40, "loop.seed", self.seed, "less than 2^40")
        check(0 <= self.final_lr <= 1, "loop.final_lr", self.final_lr, "0 to 1")
        check(all(0 <= beta < 1 for beta in self.betas), "loop.betas", list(self.betas), "two numbers of at least 0 and less than 1")
        check(0 <= self.ema < 1, "loop.ema", self.ema, "at least 0 and less than 1")
        check(self.optimizer in ("adamw", "muon"), "loop.optimizer", self.optimizer, "adamw or muon (which needs torch 2.9)")
        check(self.parallel in ("ddp", "fsdp2"), "loop.parallel", self.parallel, "ddp or fsdp2")
        check(self.parallel == "ddp" or self.optimizer == "adamw", "loop.optimizer", self.optimizer, "adamw with parallel: fsdp2")
        check(self.schedule in ("cosine", "constant"), "loop.schedule", self.schedule, "cosine or constant")


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter on the layers whose names match `targets`."""

    rank: int = 16
    alpha: float | None = None                   # the adapter is scaled by alpha / rank (default: by 1)
    targets: tuple[str, ...] = (r"^blocks\.\d+\.(attn|cross_attn)\.(qkv|q|kv|proj)$", r"^blocks\.\d+\.mlp\.fc")

    def __post_init__(self):
        check(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        check(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                check(False, "lora.targets", target, f"a regular expression ({error})")


@dataclass(frozen=True)
class FolderConfig:
    """Images and their captions: a folder with a .txt beside each image, or a .jsonl of {"image": path, "caption": text}.

    A class-conditional model takes {"image": path, "label": number}, or one folder per class, numbered from 0 by name.
    """

    path: str
    cache: str | None = None                     # folder of cached latents and text features (default: <path>.cache)
    max_pixels: int = 1024 * 1024                # larger images are scaled down
    base_pixels: int = 1024 * 1024               # loop.batch is for images of this size; other batches have as many tokens
    min_bucket_size: int = 4                     # sizes with fewer images are cropped to a similar size, if there is one

    def __post_init__(self):
        for name in ("max_pixels", "base_pixels", "min_bucket_size"):
            check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache or f"{self.path.rstrip('/')}.cache").expanduser()


@dataclass(frozen=True)
class FineTuning:
    """`kind: finetune`: trains a released or bundled transformer on a folder of images, all weights or a LoRA."""

    output: str
    model: str                                   # one-file checkpoint, or file of the transformer
    data: FolderConfig
    text_encoder: str | None = None              # these two where `model` does not hold them
    autoencoder: str | None = None
    checkpoint: str | None = None                # path of the result (default: model.safetensors or lora.safetensors in output)
    lora: LoraConfig | None = None               # null: train all weights of the transformer
    p_mean: float = 0.0                          # mean of the logit-normal times: 0 and 1.6 for text to image, -0.4 and 1 for classes
    p_std: float = 1.6
    shift_base: int | None = 1024                # image side at which times are not shifted (Eq. 50); null: no shift
    objective: ObjectiveConfig = ObjectiveConfig()
    attention: str = "sdpa"                      # or "flash" on a GPU, or "eager"
    dropout: float = 0.1                         # probability of dropping a caption or a class
    loop: LoopConfig = LoopConfig()

    def __post_init__(self):
        check(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        check_times(self.p_mean, self.p_std, self.shift_base)
        check_attention(self.attention, self.objective, self.loop.autocast)
        check(self.objective.target != "teacher", "objective.target", "teacher", "differential or composed in kind: finetune")


def time_shift(height: int, width: int, base: int | None) -> float:
    """s of the resolution-dependent time shift (paper Eq. 50) for images of this size; 1 without a base."""
    return 1.0 if base is None else (height * width) ** 0.5 / base


def export_path(config, step: int, name: str = "model.safetensors") -> Path:
    """The file that a run writes at a step: `checkpoint` at the end, if set, else `name` in its folder."""
    ended = config.checkpoint and step >= config.loop.steps
    return Path(config.checkpoint).expanduser() if ended else Path(config.output).expanduser() / name


def recorded(config) -> dict:
    """The configuration as exported files record it: without output paths, and with `~` for the home folder."""
    home = str(Path.home()) + "/"

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return "~/" + value.removeprefix(home) if isinstance(value, str) and value.startswith(home) else value

    return {name: plain(value) for name, value in asdict(config).items() if name not in ("output", "checkpoint")}


def class_of(kind: str) -> type:
    """The dataclass of a kind. That of fine-tuning is here, so that it loads nothing of the small world."""
    if kind == "finetune":
        return FineTuning
    from .shapes_config import AutoencoderTraining, TransitionTraining

    return {"autoencoder": AutoencoderTraining, "tim": TransitionTraining}[kind]


def read(path: str | Path):
    """Reads a YAML file into the dataclass of its `kind`. TimError naming the file and the key."""
    try:
        import yaml
    except ImportError as error:
        raise TimError("PyYAML is not installed, and training needs it: pip install pyyaml") from error

    class Unique(yaml.SafeLoader):
        """Refuses duplicate keys, of which PyYAML would silently take the last."""

        def compose_mapping_node(self, anchor):  # before merge keys (<<) add theirs
            node, seen = super().compose_mapping_node(anchor), set()
            for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
                if key in seen:
                    raise TimError(f"training config {path}: {key} is given twice; keep one")
                seen.add(key)
            return node

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Unique)
    except OSError as error:
        raise TimError(f"training config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TimError(f"training config {path}: not UTF-8; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two for a tag on a value of another type
        raise TimError(f"training config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise TimError(f"training config {path}: holds {type(values).__name__}; write keys and values")
    kind = values.pop("kind", None)
    try:
        check(isinstance(kind, str) and kind in KINDS, "kind", kind, " or ".join(KINDS))
        return build(class_of(kind), values)
    except TimError as error:
        raise TimError(f"{path}: {error}") from None


def build(cls: type, values: dict, where: str = ""):
    """Builds a (nested) dataclass from plain values. TimError naming a key that is unknown, missing or of the wrong type."""
    check(isinstance(values, dict), where.rstrip("."), values, "keys and values")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise TimError(f"training config: {where}{key} is an unknown key; use one of {', '.join(known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise TimError(f"training config: {where}{name} is missing; set it")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in values.items()})


def _convert(hint, value, key: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return build(hint, value, key + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key)
    if origin is tuple:
        check(isinstance(value, list) and (args[-1] is Ellipsis or len(value) == len(args)), key, value, "a list"
               + ("" if args[-1] is Ellipsis else f" of {len(args)}"))
        return tuple(_convert(args[0] if args[-1] is Ellipsis else args[i], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        check(isinstance(value, dict), key, value, "keys and values")
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    check(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    check(type(value) is hint, key, value, names.get(hint, str(hint)))
    check(value != "", key, value, "a text that is not empty")
    return value
