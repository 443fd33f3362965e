"""Configurations of the kinds that train on images of the small world: `autoencoder` and `tim`."""

from dataclasses import dataclass, field

from ..shapes.config import SizesConfig
from ..shapes.tokenizer import WORDS
from .config import LoopConfig, check, check_attention, check_times
from .objectives.distillation import DistillationConfig
from .objectives.matching import MatchingConfig
from .objectives.transition import ObjectiveConfig


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
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("encoder_widths", "decoder_widths", "encoder_layers", "decoder_layers"):
            least = 0 if name.endswith("layers") else 1
            check(min(getattr(self, name), default=-1) >= least, name, list(getattr(self, name)), f"numbers of at least {least}")
        n = {len(getattr(self, f"{side}_{what}")) for side in ("encoder", "decoder") for what in ("widths", "layers")}
        check(len(n) == 1, "encoder_widths", list(self.encoder_widths), "as many widths as layers, for the encoder and the decoder")
        self.data.check_multiples(2 ** (len(self.encoder_widths) - 1))
        check(self.encoder_widths[-1] % self.latent_channels == 0 and self.decoder_widths[-1] % self.latent_channels == 0,
               "latent_channels", self.latent_channels, "a divisor of the last encoder and decoder width")
        for name in ("compile", "checkpointing"):
            check(not getattr(self.loop, name), f"loop.{name}", True, "false for an autoencoder")
        check(self.loop.parallel == "ddp", "loop.parallel", self.loop.parallel, "ddp for an autoencoder")
        stages = len(self.encoder_widths)
        check(0 <= self.attention_stages <= stages, "attention_stages", self.attention_stages, f"0 to the number of stages, {stages}")
        for name in ("latent_noise", "latent_weight"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("encoder_layers", "decoder_layers"):
            layers = list(getattr(self, name))
            check(all(layers[1:]), name, layers, "0 at the first stage only")


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
        check(self.lora_hidden_size >= 1, "transformer.lora_hidden_size", self.lora_hidden_size, "1 or more")


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
            check(value >= 1, f"text.{name}", value, "1 or more")
        check(self.head_dim % 2 == 0, "text.head_dim", self.head_dim, "an even number")


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
            check(step.isdecimal(), "objective_from", step, "the steps from which on each objective applies")
        for word, other in self.add_embedding.items():
            check(word in WORDS and other in WORDS and word != other, "add_embedding", f"{word}: {other}", "two words of the small world")
        check(self.start or not self.matching or self.matching.teacher != "start", "matching.teacher", "start",
               "average, or set start, the checkpoint whose weights teach")
        check(self.start or not self.distillation, "start", self.start, "a checkpoint, whose guided steps are distilled")
        check(not self.freeze_text or self.start and not self.add_embedding, "freeze_text", True,
               "false without start (there is no text model to keep) and with add_embedding (which changes it)")
        check(not self.matching or self.matching.critic_warmup_steps < self.loop.steps, "matching.critic_warmup_steps",
               self.matching and self.matching.critic_warmup_steps, f"less than loop.steps, {self.loop.steps}")
        check(0 <= self.interpolate_start < 1 and (self.start or not self.interpolate_start), "interpolate_start", self.interpolate_start,
               "at least 0 and less than 1, and 0 without start")
        check(not (self.interpolate_start or self.needs_start) or not self.checkpoint or self.checkpoint != self.start, "checkpoint",
               self.checkpoint, "another file than start, whose weights are needed until the end")
        check(0 <= self.text_dropout < 1, "text_dropout", self.text_dropout, "at least 0 and less than 1")
        check_times(self.p_mean, self.p_std, self.shift_base)
        for name, objective in self.objectives.items():
            check_attention(self.attention, objective, self.loop.autocast)
            check(self.start or objective.target != "teacher", f"{name}.target", "teacher",
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
