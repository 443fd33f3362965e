"""Typed training configurations, read from YAML; unknown keys, wrong types and impossible values name the key."""

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


def _check(ok: bool, key: str, found, expected: str) -> None:
    if not ok:
        raise TimError(f"training config: {key}: found {found!r}, expected {expected}")


def _check_times(p_mean: float, p_std: float, shift_base: int | None) -> None:
    _check(abs(p_mean) <= 20, "p_mean", p_mean, "-20 to 20: it is of a logit")
    _check(0 < p_std <= 20, "p_std", p_std, "more than 0, up to 20")
    _check(shift_base is None or shift_base > 0, "shift_base", shift_base, "1 or more")


def _check_attention(attention: str, objective: ObjectiveConfig, autocast: bool) -> None:
    _check(attention in BACKENDS, "attention", attention, " or ".join(BACKENDS))
    _check(attention != "flash" or autocast, "attention", attention, "eager or sdpa with autocast: false, since flash-attn has no float32")
    _check(attention != "flash" or objective.derivative == "dde" or objective.target != "differential", "attention", attention,
           "eager or sdpa with derivative: jvp, which flash-attn does not have")


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast, and what is kept. Rates are per step; `seconds` stops a run early (0: never), to be resumed."""

    steps: int = 10_000
    batch: int = 64
    optimizer: str = "adamw"                     # or "muon": Muon for the matrices inside blocks, AdamW for the rest
    lr: float = 1e-3
    muon_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 200
    schedule: str = "cosine"                     # or "constant"
    final_lr: float = 0.02                       # of lr, at the end of a cosine
    ema: float = 0.999
    seed: int = 0
    autocast: bool = True                        # bfloat16
    compile: bool = False
    checkpointing: bool = False                  # compute a block's activations again instead of keeping them
    accumulate: int = 1                          # parts of a batch, one after another, before the optimiser's step
    parallel: str = "ddp"                        # or "fsdp2": how several processes share the weights
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
        _check(all(0 <= beta < 1 for beta in self.betas), "loop.betas", list(self.betas), "two numbers from 0 to below 1")
        _check(0 <= self.ema < 1, "loop.ema", self.ema, "0 to below 1")
        _check(self.optimizer in ("adamw", "muon"), "loop.optimizer", self.optimizer, "adamw or muon (which needs torch 2.9)")
        _check(self.parallel in ("ddp", "fsdp2"), "loop.parallel", self.parallel, "ddp or fsdp2")
        _check(self.parallel == "ddp" or self.optimizer == "adamw", "loop.optimizer", self.optimizer, "adamw with parallel: fsdp2")
        _check(self.schedule in ("cosine", "constant"), "loop.schedule", self.schedule, "cosine or constant")


@dataclass(frozen=True)
class SizesConfig:
    """Picture sizes of a step, drawn by weight, "WIDTHxHEIGHT", the forms of its captions, drawn by weight too, and their relations."""

    sizes: dict[str, float] = field(default_factory=lambda: {"64x64": 1.0})
    forms: dict[str, float] = field(default_factory=lambda: dict(TRAINING_FORMS))
    relations: tuple[str, ...] = RELATIONS       # drawn evenly

    def __post_init__(self):
        _check(bool(self.sizes), "data.sizes", "none", "at least one size")
        for size, weight in self.sizes.items():
            _check(re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", size) is not None, "data.sizes", size, "sizes such as 64x64")
            _check(weight > 0, f"data.sizes.{size}", weight, "more than 0")
        _check(bool(self.forms), "data.forms", "none", f"some of {', '.join(TRAINING_FORMS)}")
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
        """TimError for a size that is no whole number of latent cells (or of the transformer's patches) of `unit` pixels."""
        for size, (width, height) in zip(self.sizes, self.table()[0]):
            _check(width % unit == 0 and height % unit == 0, "data.sizes", size, f"multiples of {unit} pixels")


@dataclass(frozen=True)
class AutoencoderTraining:
    """`kind: autoencoder`: a DC-AE on pictures of the small world."""

    output: str
    start: str | None = None                     # weights to begin from, a file of the same architecture
    freeze_encoder: bool = False                 # train the decoder alone: the latents stay what they are
    encoder_widths: tuple[int, ...] = (32, 32, 64, 128)
    encoder_layers: tuple[int, ...] = (0, 1, 1, 1)
    decoder_widths: tuple[int, ...] = (32, 32, 64, 128)
    decoder_layers: tuple[int, ...] = (0, 2, 2, 2)
    attention_stages: int = 1                    # the deepest ones are EfficientViT blocks
    head_dim: int = 16
    latent_channels: int = 16
    latent_noise: float = 0.3                    # largest standard deviation added to the latent before decoding
    latent_weight: float = 0.05                  # pull of the latent towards mean 0, variance 1 per channel
    loop: LoopConfig = LoopConfig()
    data: SizesConfig = SizesConfig()

    def __post_init__(self):
        for name in ("head_dim", "latent_channels"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("encoder_widths", "decoder_widths", "encoder_layers", "decoder_layers"):
            least = 0 if name.endswith("layers") else 1
            _check(min(getattr(self, name), default=-1) >= least, name, list(getattr(self, name)), f"numbers of {least} or more")
        n = {len(getattr(self, f"{side}_{what}")) for side in ("encoder", "decoder") for what in ("widths", "layers")}
        _check(len(n) == 1, "encoder_widths", sorted(n), "widths and layers of equal number")
        self.data.check_multiples(2 ** (len(self.encoder_widths) - 1))
        _check(self.encoder_widths[-1] % self.latent_channels == 0 and self.decoder_widths[-1] % self.latent_channels == 0,
               "latent_channels", self.latent_channels, "a divisor of the deepest widths")
        for name in ("compile", "checkpointing"):
            _check(not getattr(self.loop, name), f"loop.{name}", True, "false for an autoencoder")
        _check(self.loop.parallel == "ddp", "loop.parallel", self.loop.parallel, "ddp for an autoencoder")
        _check(0 <= self.attention_stages <= len(self.encoder_widths), "attention_stages", self.attention_stages, "at most one a stage")
        for name in ("latent_noise", "latent_weight"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("encoder_layers", "decoder_layers"):
            layers = list(getattr(self, name))
            _check(all(layers[1:]), name, layers, "no 0 but at the first stage")


@dataclass(frozen=True)
class TransformerShape:
    """The TiM transformer to train; latent channels and text width come from its neighbours."""

    hidden_size: int = 192
    depth: int = 7
    num_heads: int = 6
    patch_size: int = 1
    lora_hidden_size: int = 48
    new_condition: str = "t-r"
    use_new_embed: bool = True
    distance_aware: bool = True
    z_dim: int | None = None                     # width of an image encoder's features, for REPA; none: no projector
    encoder_depth: int = 4                       # the block, from 1, whose output is compared with them
    projector_dim: int = 512
    qk_norm: bool = True

    def __post_init__(self):
        _check(self.lora_hidden_size >= 1, "transformer.lora_hidden_size", self.lora_hidden_size, "1 or more")


@dataclass(frozen=True)
class TextShape:
    """The Gemma-3 text model to train with it, on the small world's tokenizer; every second layer sees the whole prompt."""

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
    """`kind: tim`: a transformer and its text model, together, on pictures of the small world."""

    output: str
    autoencoder: str                             # safetensors file of the DC-AE, which stays as it is
    start: str | None = None                     # a checkpoint of the same architecture whose two networks to begin from
    keep_start: float = 0.0                      # share of the weights of `start` in the exported ones (WiSE-FT, arXiv 2109.01903)
    alike: dict[str, str] = field(default_factory=dict)   # word -> another, whose embedding is added to its own before the first step
    checkpoint: str | None = None                # where the one-file model goes; none: model.safetensors in output
    transformer: TransformerShape = TransformerShape()
    text: TextShape = TextShape()
    p_mean: float = 0.0                          # of the logit-normal times, on the OT-FM transport
    p_std: float = 1.6
    objective: ObjectiveConfig = ObjectiveConfig()
    objective_from: dict[str, ObjectiveConfig] = field(default_factory=dict)   # step -> the objective from that step on
    matching: MatchingConfig | None = None       # distribution matching beside the objective; none: without
    distillation: DistillationConfig | None = None   # of guided steps of `start` into the first jumps; none: without
    freeze_text: bool = False                    # the text model stays what it is in `start`
    text_dropout: float = 0.1
    shift_base: int | None = None                # pixels a side at which times are not shifted (Eq. 50: 1024); none: never shifted
    attention: str = "eager"                     # the fastest on a CPU; or "sdpa" or, on a GPU, "flash"
    loop: LoopConfig = LoopConfig()
    data: SizesConfig = SizesConfig()

    def __post_init__(self):
        for step in self.objective_from:
            _check(step.isdecimal(), "objective_from", step, "steps, and the objective from each on")
        for word, other in self.alike.items():
            _check(word in WORDS and other in WORDS and word != other, "alike", f"{word}: {other}", "two words of the small world")
        _check(self.start or not self.matching or self.matching.teacher != "start", "matching.teacher", "start",
               "average without start: there are no weights that the run begins from")
        _check(self.start or not self.distillation, "start", self.start, "a checkpoint, whose guided steps the distillation teaches")
        _check(not self.freeze_text or self.start and not self.alike, "freeze_text", True,
               "false without start, where there is no text model to keep, and with alike, which changes it")
        _check(not self.matching or self.matching.critic_first < self.loop.steps, "matching.critic_first",
               self.matching and self.matching.critic_first, f"less than loop.steps, {self.loop.steps}")
        _check(0 <= self.keep_start < 1 and (self.start or not self.keep_start), "keep_start", self.keep_start,
               "0 to below 1, and 0 without start")
        _check(not (self.keep_start or self.needs_start) or not self.checkpoint or self.checkpoint != self.start, "checkpoint",
               self.checkpoint, "another file than start, whose weights are used")
        _check(0 <= self.text_dropout < 1, "text_dropout", self.text_dropout, "0 to below 1")
        _check_times(self.p_mean, self.p_std, self.shift_base)
        for name, objective in self.objectives.items():
            _check_attention(self.attention, objective, self.loop.autocast)
            _check(self.start or objective.target != "teacher", f"{name}.target", "teacher",
                   "differential or composed without start, whose answers are the target")

    @property
    def objectives(self) -> dict[str, ObjectiveConfig]:
        return {"objective": self.objective, **{f"objective_from.{step}": one for step, one in self.objective_from.items()}}

    @property
    def needs_start(self) -> bool:
        """Whether anything is learned from the weights that the run began from."""
        return bool(self.distillation) or bool(self.matching and self.matching.teacher == "start") or any(
            objective.target == "teacher" for objective in self.objectives.values())

    def objective_at(self, step: int) -> ObjectiveConfig:
        begun = [int(first) for first in self.objective_from if int(first) <= step]
        return self.objective_from[str(max(begun))] if begun else self.objective


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter in place of all weights: of which layers (patterns of names), and how large."""

    rank: int = 16
    alpha: float | None = None                   # the adapter is scaled by alpha / rank; none: by 1
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
    """Pictures and their captions: a folder with a .txt beside each picture, or a .jsonl of {"image": path, "caption": text}.

    A class-conditional model takes {"image": path, "label": number}, or a folder for each class, numbered from 0 in the order of their
    names.
    """

    path: str
    cache: str | None = None                     # where latents and text features are kept; none: <path>.cache
    max_pixels: int = 1024 * 1024                # larger pictures are made smaller
    base_pixels: int = 1024 * 1024               # loop.batch is for pictures of this many pixels; a batch of others has as many tokens
    least: int = 4                               # pictures of a size that fewer have are cut to a similar one, where there is any

    def __post_init__(self):
        for name in ("max_pixels", "base_pixels", "least"):
            _check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache or f"{self.path.rstrip('/')}.cache").expanduser()


@dataclass(frozen=True)
class FineTuning:
    """`kind: finetune`: a released or bundled transformer on your own pictures, whole or as a LoRA. The other parts stay as they are."""

    output: str
    model: str                                   # a one-file checkpoint, or the transformer's file
    data: FolderConfig
    text_encoder: str | None = None              # where `model` does not hold them
    autoencoder: str | None = None
    checkpoint: str | None = None                # where the result goes; none: model.safetensors or lora.safetensors in output
    lora: LoraConfig | None = None               # none: all weights of the transformer learn
    p_mean: float = 0.0                          # of the logit-normal times: 0 and 1.6 for text to image, -0.4 and 1 for classes
    p_std: float = 1.6
    shift_base: int | None = 1024                # pixels a side at which times are not shifted (Eq. 50); none: never shifted
    objective: ObjectiveConfig = ObjectiveConfig()
    attention: str = "sdpa"                      # or "flash" on a GPU, or "eager"
    dropout: float = 0.1                         # share of captions, or classes, left out
    loop: LoopConfig = LoopConfig()

    def __post_init__(self):
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "0 to below 1")
        _check_times(self.p_mean, self.p_std, self.shift_base)
        _check_attention(self.attention, self.objective, self.loop.autocast)
        _check(self.objective.target != "teacher", "objective.target", "teacher", "differential or composed for fine-tuning")


def time_shift(height: int, width: int, base: int | None) -> float:
    """s of the resolution-dependent time shift (paper Eq. 50) for pictures of this size; 1 without a base."""
    return 1.0 if base is None else (height * width) ** 0.5 / base


def target(config: TransitionTraining | FineTuning, step: int, name: str = "model.safetensors") -> Path:
    """The file that a run writes at a step: `checkpoint` at its end, if it names one, and before it `name` in its folder."""
    ended = config.checkpoint and step >= config.loop.steps
    return Path(config.checkpoint).expanduser() if ended else Path(config.output).expanduser() / name


def recorded(config) -> dict:
    """What the file that a run makes says of its configuration: nothing of where it went, and `~` for the home of who ran it."""
    home = str(Path.home()) + "/"

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return "~/" + value.removeprefix(home) if isinstance(value, str) and value.startswith(home) else value

    return {name: plain(value) for name, value in asdict(config).items() if name not in ("output", "checkpoint")}


def read(path: str | Path, kinds: dict[str, type]):
    """Reads one YAML file: its `kind` picks the dataclass of `kinds`, every other key must be a field of it."""
    try:
        import yaml
    except ImportError as error:
        raise TimError("training needs PyYAML: found none, expected it from: pip install pyyaml") from error

    class Unique(yaml.SafeLoader):
        """PyYAML takes the last of several equal keys without a word."""

        def compose_mapping_node(self, anchor):  # before merge keys (<<) bring in what may be there already
            node, seen = super().compose_mapping_node(anchor), set()
            for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
                if key in seen:
                    raise TimError(f"training config {path}: {key}: found it twice, expected it once")
                seen.add(key)
            return node

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Unique)
    except OSError as error:
        raise TimError(f"training config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TimError(f"training config {path}: found no UTF-8 text, expected YAML") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the latter for tags on what they do not fit
        raise TimError(f"training config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise TimError(f"training config {path}: found {type(values).__name__}, expected keys and values")
    kind = values.pop("kind", None)
    try:
        _check(isinstance(kind, str) and kind in kinds, "kind", kind, " or ".join(kinds))
        return build(kinds[kind], values)
    except TimError as error:
        raise TimError(f"{path}: {error}") from None


def build(cls: type, values: dict, where: str = ""):
    """Makes a (nested) dataclass of plain values; raises TimError naming the key that is unknown, missing or of the wrong type."""
    _check(isinstance(values, dict), where.rstrip("."), values, "keys and values")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}
    for key in values:
        _check(key in known, where + str(key), "an unknown key", "one of " + ", ".join(known))
    for name, f in known.items():
        _check(name in values or f.default is not MISSING or f.default_factory is not MISSING, where + name, "nothing", "a value")
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
            value = float(value)  # YAML 1.1 reads 1e-3 as a word
        except (ValueError, OverflowError):
            pass
    _check(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    _check(type(value) is hint, key, value, names.get(hint, str(hint)))
    _check(value != "", key, value, "some text")
    return value
