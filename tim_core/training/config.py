"""Typed training configurations, read from YAML. Errors are one line that names the key."""

import math
import re
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from ..errors import TimError
from ..models.attention import BACKENDS
from ..shapes.scenes import RELATIONS, TRAINING_FORMS
from ..shapes.tokenizer import WORDS
from .objectives.distillation import DistillationConfig
from .objectives.matching import MatchingConfig
from .objectives.transition import ObjectiveConfig


def _check(ok: bool, key: str, value, use: str) -> None:
    if not ok:
        raise TimError(f"training config: {key} is {value!r}; use {use}")


def _check_times(p_mean: float, p_std: float, shift_base: int | None) -> None:
    _check(abs(p_mean) <= 20, "p_mean", p_mean, "-20 to 20, since it is a logit")
    _check(0 < p_std <= 20, "p_std", p_std, "more than 0, up to 20")
    _check(shift_base is None or shift_base > 0, "shift_base", shift_base, "1 or more")


def _check_attention(attention: str, objective: ObjectiveConfig, autocast: bool) -> None:
    _check(attention in BACKENDS, "attention", attention, " or ".join(BACKENDS))
    _check(attention != "flash" or autocast, "attention", attention, "eager or sdpa without loop.autocast; flash-attn has no float32")
    _check(attention != "flash" or objective.derivative == "dde" or objective.target != "differential", "attention", attention,
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
            _check(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "1 or more")
        for name in ("lr", "muon_lr", "clip"):
            _check(getattr(self, name) > 0, f"loop.{name}", getattr(self, name), "more than 0")
        for name in ("warmup", "workers", "seconds", "seed", "weight_decay"):
            _check(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "0 or more")
        _check(self.seed < 2**40, "loop.seed", self.seed, "less than 2^40")
        _check(0 <= self.final_lr <= 1, "loop.final_lr", self.final_lr, "0 to 1")
        _check(all(0 <= beta < 1 for beta in self.betas), "loop.betas", list(self.betas), "two numbers of at least 0 and less than 1")
        _check(0 <= self.ema < 1, "loop.ema", self.ema, "at least 0 and less than 1")
        _check(self.optimizer in ("adamw", "muon"), "loop.optimizer", self.optimizer, "adamw or muon (which needs torch 2.9)")
        _check(self.parallel in ("ddp", "fsdp2"), "loop.parallel", self.parallel, "ddp or fsdp2")
        _check(self.parallel == "ddp" or self.optimizer == "adamw", "loop.optimizer", self.optimizer, "adamw with parallel: fsdp2")
        _check(self.schedule in ("cosine", "constant"), "loop.schedule", self.schedule, "cosine or constant")


@dataclass(frozen=True)
class SizesConfig:
    """What the small world draws: image sizes "WIDTHxHEIGHT" and caption forms with their weights, and relations."""

    sizes: dict[str, float] = field(default_factory=lambda: {"64x64": 1.0})
    forms: dict[str, float] = field(default_factory=lambda: dict(TRAINING_FORMS))
    relations: tuple[str, ...] = RELATIONS       # equally likely

    def __post_init__(self):
        _check(bool(self.sizes), "data.sizes", self.sizes, "at least one size, such as 64x64: 1")
        for size, weight in self.sizes.items():
            _check(re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size) is not None, "data.sizes", size, "sizes such as 64x64")
            _check(weight > 0, f"data.sizes.{size}", weight, "more than 0")
        _check(bool(self.forms), "data.forms", self.forms, f"some of {', '.join(TRAINING_FORMS)}")
        for form, weight in self.forms.items():
            _check(form in TRAINING_FORMS, "data.forms", form, f"some of {', '.join(TRAINING_FORMS)}")
            _check(weight > 0, f"data.forms.{form}", weight, "more than 0")
        _check(bool(self.relations) and set(self.relations) <= set(RELATIONS), "data.relations", list(self.relations),
               f"some of {', '.join(RELATIONS)}")

    def table(self) -> tuple[list[tuple[int, int]], list[float]]:
        """The (width, height) pairs and their probabilities."""
        total = sum(self.sizes.values())
        return [tuple(map(int, s.split("x"))) for s in self.sizes], [w / total for w in self.sizes.values()]

    def check_multiples(self, unit: int) -> None:
        """TimError for a size that is not a multiple of `unit` pixels, the size of a latent cell or of a patch."""
        for size, (width, height) in zip(self.sizes, self.table()[0]):
            _check(width % unit == 0 and height % unit == 0, "data.sizes", size, f"multiples of {unit} pixels")


@dataclass(frozen=True)
class AutoencoderTraining:
    """`kind: autoencoder`: a DC-AE on images of the small world."""

    output: str
    start: str | None = None                     # weights to initialise from, of the same architecture
    freeze_encoder: bool = False                 # train the decoder alone, so that latents stay as they are
    encoder_widths: tuple[int, ...] = (32, 32, 64, 128)
    encoder_layers: tuple[int, ...] = (0, 1, 1, 1)
    decoder_widths: tuple[int, ...] = (32, 32, 64, 128)
    decoder_layers: tuple[int, ...] = (0, 2, 2, 2)
    attention_stages: int = 1                    # the deepest ones are EfficientViT blocks
    head_dim: int = 16
    latent_channels: int = 16
    latent_noise: float = 0.3                    # maximal standard deviation of the noise added to latents before decoding
    latent_weight: float = 0.05                  # weight of the distance from mean 0 and variance 1 per channel
    loop: LoopConfig = LoopConfig()
    data: SizesConfig = SizesConfig()

    def __post_init__(self):
        for name in ("head_dim", "latent_channels"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("encoder_widths", "decoder_widths", "encoder_layers", "decoder_layers"):
            least = 0 if name.endswith("layers") else 1
            _check(min(getattr(self, name), default=-1) >= least, name, list(getattr(self, name)), f"numbers of at least {least}")
        n = {len(getattr(self, f"{side}_{what}")) for side in ("encoder", "decoder") for what in ("widths", "layers")}
        _check(len(n) == 1, "encoder_widths", list(self.encoder_widths), "as many widths as layers, for the encoder and the decoder")
        self.data.check_multiples(2 ** (len(self.encoder_widths) - 1))
        _check(self.encoder_widths[-1] % self.latent_channels == 0 and self.decoder_widths[-1] % self.latent_channels == 0,
               "latent_channels", self.latent_channels, "a divisor of the last encoder and decoder width")
        for name in ("compile", "checkpointing"):
            _check(not getattr(self.loop, name), f"loop.{name}", True, "false for an autoencoder")
        _check(self.loop.parallel == "ddp", "loop.parallel", self.loop.parallel, "ddp for an autoencoder")
        stages = len(self.encoder_widths)
        _check(0 <= self.attention_stages <= stages, "attention_stages", self.attention_stages, f"0 to the number of stages, {stages}")
        for name in ("latent_noise", "latent_weight"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("encoder_layers", "decoder_layers"):
            layers = list(getattr(self, name))
            _check(all(layers[1:]), name, layers, "0 at the first stage only")


@dataclass(frozen=True)
class TransformerShape:
    """The transformer to train; latent channels and text width follow from the autoencoder and the text model."""

    hidden_size: int = 192
    depth: int = 7
    num_heads: int = 6
    patch_size: int = 1
    lora_hidden_size: int = 48
    new_condition: str = "t-r"
    use_new_embed: bool = True
    distance_aware: bool = True
    z_dim: int | None = None                     # width of the image encoder's features, for REPA; null: no projector
    encoder_depth: int = 4                       # number of the block, from 1, whose output is projected
    projector_dim: int = 512
    qk_norm: bool = True

    def __post_init__(self):
        _check(self.lora_hidden_size >= 1, "transformer.lora_hidden_size", self.lora_hidden_size, "1 or more")


@dataclass(frozen=True)
class TextShape:
    """The Gemma-3 text model to train, with the small world's tokenizer; every second layer has global attention."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 256

    def __post_init__(self):
        for name, value in vars(self).items():
            _check(value >= 1, f"text.{name}", value, "1 or more")
        _check(self.head_dim % 2 == 0, "text.head_dim", self.head_dim, "an even number")


@dataclass(frozen=True)
class TransitionTraining:
    """`kind: tim`: a transformer and its text model, trained together on images of the small world."""

    output: str
    autoencoder: str                             # safetensors file of the DC-AE, which is not trained
    start: str | None = None                     # checkpoint to initialise both from, of the same architecture
    interpolate_start: float = 0.0               # weight of `start` in the exported weights (WiSE-FT, arXiv 2109.01903)
    add_embedding: dict[str, str] = field(default_factory=dict)   # word -> word; adds the embedding of the second
    checkpoint: str | None = None                # path of the one-file model (default: model.safetensors in output)
    transformer: TransformerShape = TransformerShape()
    text: TextShape = TextShape()
    p_mean: float = 0.0                          # mean of the logit-normal times, on the OT-FM transport
    p_std: float = 1.6
    objective: ObjectiveConfig = ObjectiveConfig()
    objective_from: dict[str, ObjectiveConfig] = field(default_factory=dict)   # step -> the objective from that step on
    matching: MatchingConfig | None = None       # adds distribution matching
    distillation: DistillationConfig | None = None   # adds distillation of guided steps of `start`
    freeze_text: bool = False                    # keep the text model of `start`
    text_dropout: float = 0.1
    shift_base: int | None = None                # image side at which times are not shifted (Eq. 50: 1024); null: no shift
    attention: str = "eager"                     # fastest on a CPU; or "sdpa", or "flash" on a GPU
    loop: LoopConfig = LoopConfig()
    data: SizesConfig = SizesConfig()

    def __post_init__(self):
        for step in self.objective_from:
            _check(step.isdecimal(), "objective_from", step, "the steps from which on each objective applies")
        for word, other in self.add_embedding.items():
            _check(word in WORDS and other in WORDS and word != other, "add_embedding", f"{word}: {other}", "two words of the small world")
        _check(self.start or not self.matching or self.matching.teacher != "start", "matching.teacher", "start",
               "average, or set start, the checkpoint whose weights teach")
        _check(self.start or not self.distillation, "start", self.start, "a checkpoint, whose guided steps are distilled")
        _check(not self.freeze_text or self.start and not self.add_embedding, "freeze_text", True,
               "false without start (there is no text model to keep) and with add_embedding (which changes it)")
        _check(not self.matching or self.matching.critic_warmup_steps < self.loop.steps, "matching.critic_warmup_steps",
               self.matching and self.matching.critic_warmup_steps, f"less than loop.steps, {self.loop.steps}")
        _check(0 <= self.interpolate_start < 1 and (self.start or not self.interpolate_start), "interpolate_start", self.interpolate_start,
               "at least 0 and less than 1, and 0 without start")
        _check(not (self.interpolate_start or self.needs_start) or not self.checkpoint or self.checkpoint != self.start, "checkpoint",
               self.checkpoint, "another file than start, whose weights are needed until the end")
        _check(0 <= self.text_dropout < 1, "text_dropout", self.text_dropout, "at least 0 and less than 1")
        _check_times(self.p_mean, self.p_std, self.shift_base)
        for name, objective in self.objectives.items():
            _check_attention(self.attention, objective, self.loop.autocast)
            _check(self.start or objective.target != "teacher", f"{name}.target", "teacher",
                   "differential or composed, or set start, the checkpoint whose predictions are the target")

    @property
    def objectives(self) -> dict[str, ObjectiveConfig]:
        return {"objective": self.objective, **{f"objective_from.{step}": one for step, one in self.objective_from.items()}}

    @property
    def needs_start(self) -> bool:
        """Whether the weights in `start` are a teacher during training."""
        return bool(self.distillation) or bool(self.matching and self.matching.teacher == "start") or any(
            objective.target == "teacher" for objective in self.objectives.values())

    def objective_at(self, step: int) -> ObjectiveConfig:
        """The objective of a step, the first being 0."""
        started = [int(first) for first in self.objective_from if int(first) <= step]
        return self.objective_from[str(max(started))] if started else self.objective


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter on the layers whose names match `targets`."""

    rank: int = 16
    alpha: float | None = None                   # the adapter is scaled by alpha / rank (default: by 1)
    targets: tuple[str, ...] = (r"^blocks\.\d+\.(attn|cross_attn)\.(qkv|q|kv|proj)$", r"^blocks\.\d+\.mlp\.fc")

    def __post_init__(self):
        _check(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        _check(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                _check(False, "lora.targets", target, f"a regular expression ({error})")


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
            _check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")

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
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        _check_times(self.p_mean, self.p_std, self.shift_base)
        _check_attention(self.attention, self.objective, self.loop.autocast)
        _check(self.objective.target != "teacher", "objective.target", "teacher", "differential or composed in kind: finetune")


def time_shift(height: int, width: int, base: int | None) -> float:
    """s of the resolution-dependent time shift (paper Eq. 50) for images of this size; 1 without a base."""
    return 1.0 if base is None else (height * width) ** 0.5 / base


def export_path(config: TransitionTraining | FineTuning, step: int, name: str = "model.safetensors") -> Path:
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


def read(path: str | Path, kinds: dict[str, type]):
    """Reads a YAML file into the dataclass that its key `kind` selects from `kinds`. TimError naming the file and the key."""
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
        _check(isinstance(kind, str) and kind in kinds, "kind", kind, " or ".join(kinds))
        return build(kinds[kind], values)
    except TimError as error:
        raise TimError(f"{path}: {error}") from None


def build(cls: type, values: dict, where: str = ""):
    """Builds a (nested) dataclass from plain values. TimError naming a key that is unknown, missing or of the wrong type."""
    _check(isinstance(values, dict), where.rstrip("."), values, "keys and values")
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
        _check(isinstance(value, list) and (args[-1] is Ellipsis or len(value) == len(args)), key, value, "a list"
               + ("" if args[-1] is Ellipsis else f" of {len(args)}"))
        return tuple(_convert(args[0] if args[-1] is Ellipsis else args[i], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        _check(isinstance(value, dict), key, value, "keys and values")
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    _check(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    _check(type(value) is hint, key, value, names.get(hint, str(hint)))
    _check(value != "", key, value, "a text that is not empty")
    return value
