"""Configurations of the kinds that train on images of coloured shapes: `autoencoder` and `tim`."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ..errors import TimError
from ..models.config import TransformerConfig
from ..settings import CONFIG, Depth, FractionBelowOne, NotNegative, Size, Text, WholeNumber, require
from ..shapes.config import SizesConfig
from ..shapes.tokenizer import WORDS
from .config import RunConfig, TransformerTraining
from .objectives.distillation import DistillationConfig
from .objectives.matching import MatchingConfig
from .objectives.transition import ObjectiveConfig

Widths = Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0, le=64)], ...], Field(min_length=1, max_length=8)]
NOT_START = "another file than start, whose weights are needed to resume the run"


@dataclass(config=CONFIG, frozen=True, kw_only=True)
class AutoencoderTraining(RunConfig):
    """`kind: autoencoder`: a DC-AE on images of coloured shapes."""

    start: Text | None = None                    # weights to initialise from, of the same architecture
    freeze_encoder: bool = False                 # train the decoder alone, so that latents stay as they are
    encoder_widths: Widths = (32, 32, 64, 128)
    encoder_layers: Layers = (0, 1, 1, 1)
    decoder_widths: Widths = (32, 32, 64, 128)
    decoder_layers: Layers = (0, 2, 2, 2)
    attention_stages: WholeNumber = 1  # the deepest ones are EfficientViT blocks
    head_dim: Size = 16
    latent_channels: Size = 16
    latent_noise: NotNegative = 0.3              # maximal standard deviation of the noise added to latents before decoding
    latent_weight: NotNegative = 0.05            # weight of the distance from mean 0 per channel and variance 1 on average
    color_weight: NotNegative = 0.0              # weight of the part of the colours that no linear map of the noised latent explains
    crop_weight: NotNegative = 0.0               # weight of the difference between a crop's latents with and without the rest of the image
    edge_weight: NotNegative = 0.0               # weight of the error near edges, times their contrast; 0 counts all pixels alike
    data: SizesConfig = SizesConfig()

    @property
    def export_name(self) -> str:
        return "autoencoder.safetensors"

    @model_validator(mode="after")
    def _check(self) -> "AutoencoderTraining":
        require(not self.checkpoint or self.checkpoint != self.start, "checkpoint", self.checkpoint, NOT_START)
        stages = len(self.encoder_widths)
        for name in ("encoder_layers", "decoder_widths", "decoder_layers"):
            found = list(getattr(self, name))
            require(len(found) == stages, name, found, f"{stages} numbers, as many as encoder_widths")
            require(all(found[1:]), name, found, "0 at the first stage only")
        for name in ("encoder_widths", "decoder_widths"):
            require(getattr(self, name)[-1] % self.latent_channels == 0, "latent_channels", self.latent_channels,
                    f"a divisor of {getattr(self, name)[-1]}, the last of {name}")
        require(self.attention_stages <= stages, "attention_stages", self.attention_stages, f"at most the number of stages, {stages}")
        cell = 2 ** (stages - 1)
        misfit = self.data.misfit(cell)
        require(misfit is None, "data.sizes", misfit, f"multiples of {cell} pixels")
        for name in ("compile", "checkpointing"):
            require(not getattr(self.loop, name), f"loop.{name}", True, "false for an autoencoder")
        require(self.loop.parallel == "ddp", "loop.parallel", self.loop.parallel, "ddp for an autoencoder")
        return self


@dataclass(config=CONFIG, frozen=True)
class TransformerShape:
    """The transformer to train; latent channels and text width follow from the autoencoder and the text model."""

    hidden_size: Size = 192
    depth: Depth = 7
    num_heads: Depth = 6
    patch_size: Depth = 1
    lora_hidden_size: Size = 48
    new_condition: Text = "t-r"
    use_new_embed: bool = True
    distance_aware: bool = True
    z_dim: Size | None = None                    # width of the image encoder's features, for REPA; null: no projector
    encoder_depth: Depth = 4                     # number of the block, from 1, whose output is projected
    projector_dim: Size = 512
    qk_norm: bool = True
    positions: Text = "grid"                     # column and row of each token; "official": those of the released weights

    @model_validator(mode="after")
    def _check(self) -> "TransformerShape":
        """The rules of the architecture, whose errors name the key after a colon."""
        try:
            TransformerConfig(in_channels=1, text_dim=1, **vars(self))
        except TimError as error:
            key, _, use = str(error).removeprefix("TiM configuration: ").partition(" ")
            require(False, key, getattr(self, key), f"another value ({key} {use})")
        return self


@dataclass(config=CONFIG, frozen=True)
class TextShape:
    """The Gemma-3 text model to train, with the tokenizer of tim_core.shapes; every second layer has global attention."""

    hidden_size: Size = 128
    layers: Depth = 2
    heads: Depth = 2
    head_dim: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] = 64
    intermediate_size: Size = 256

    @model_validator(mode="after")
    def _check(self) -> "TextShape":
        require(self.hidden_size % self.heads == 0, "heads", self.heads, f"a divisor of hidden_size, {self.hidden_size}")
        return self


@dataclass(config=CONFIG, frozen=True, kw_only=True)
class TransitionTraining(TransformerTraining):
    """`kind: tim`: a transformer and its text model, trained together on images of coloured shapes."""

    autoencoder: Text                            # safetensors file of the DC-AE, which is not trained
    start: Text | None = None                    # checkpoint to initialise both from, of the same architecture
    interpolate_start: FractionBelowOne = 0.0    # weight of `start` in the exported weights (WiSE-FT, arXiv 2109.01903)
    add_embedding: dict[str, str] = Field(default_factory=dict)   # word -> word; adds the embedding of the second
    transformer: TransformerShape = TransformerShape()
    text: TextShape = TextShape()
    objective_from: dict[str, ObjectiveConfig] = Field(default_factory=dict)   # step -> the objective from that step on
    matching: MatchingConfig | None = None       # adds distribution matching
    distillation: DistillationConfig | None = None   # adds distillation of guided steps of `start`
    freeze_text: bool = False                    # keep the text model of `start`
    text_dropout: FractionBelowOne = 0.1
    cached_batches: WholeNumber = 0              # number of batches to train on again and again, as cached latents; 0: new images
    data: SizesConfig = SizesConfig()

    @field_validator("objective_from")
    @classmethod
    def _check_steps(cls, objectives: dict[str, ObjectiveConfig]) -> dict[str, ObjectiveConfig]:
        for step in objectives:
            require(step.isascii() and step.isdecimal(), "", step, "whole numbers, the steps from which on each objective applies")
        return objectives

    @field_validator("add_embedding")
    @classmethod
    def _check_words(cls, words: dict[str, str]) -> dict[str, str]:
        for word, other in words.items():
            require(word in WORDS and other in WORDS and word != other, "", f"{word}: {other}", "two words of the vocabulary")
        return words

    @model_validator(mode="after")
    def _check(self) -> "TransitionTraining":
        require(self.start or not self.matching or self.matching.teacher != "start", "matching.teacher", "start",
                "average, or set start, the checkpoint whose weights teach")
        require(self.start or not self.distillation, "start", self.start, "a checkpoint, whose guided steps are distilled")
        require(not self.freeze_text or self.start and not self.add_embedding, "freeze_text", True,
                "false without start (there is no text model to keep) and with add_embedding (which changes it)")
        if self.matching:
            require(self.matching.critic_warmup_steps < self.loop.steps, "matching.critic_warmup_steps", self.matching.critic_warmup_steps,
                    f"less than loop.steps, {self.loop.steps}")
        require(not self.cached_batches or self.transformer.z_dim is None, "cached_batches", self.cached_batches,
                "0 with transformer.z_dim, whose image encoder needs the images")
        require(self.start or not self.interpolate_start, "interpolate_start", self.interpolate_start, "0 without start")
        require(not self.checkpoint or self.checkpoint != self.start, "checkpoint", self.checkpoint, NOT_START)
        for name, objective in self.objectives.items():
            require(self.start or objective.target != "teacher", f"{name}.target", "teacher",
                    "differential or composed, or set start, the checkpoint whose predictions are the target")
        return self

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
