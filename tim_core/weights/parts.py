"""What weight files hold, taken apart: a transformer, a text encoder and an autoencoder.

The one-file layout (safetensors):

    model.diffusion_model.<official name>        the transformer
    text_encoders.transformer.<Gemma3TextModel name>
    text_encoders.tokenizer_json                 uint8, the tokenizer.json (or spiece_model, a SentencePiece tokenizer.model)
    vae.<diffusers AutoencoderDC or AutoencoderKL name>

Each part also has a `config_json` (uint8), a record of the settings that tensor shapes do not determine; that of the text encoder is its
Gemma config. The safetensors metadata "tim" repeats these records and adds how the model was trained. A file without metadata, as
ComfyUI's CheckpointSave writes it, loads the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..errors import TimError, one_line
from ..models.config import AutoencoderConfig, TransformerConfig
from ..models.gemma import check_gemma, gemma_1b_config, normalise_config
from ..models.kl_autoencoder import KLAutoencoderConfig
from ..models.released import ESCAPE_PROMPTS, latent_factor
from .detect import AUTOENCODER, TEXT_ENCODER, TITLES, TRANSFORMER
from .open import StateDict
from .quantized import Quantization, dequantize

FORMAT = 1
BUNDLED = {"tim-shapes": Path(__file__).parents[1] / "bundled" / "tim-shapes.safetensors"}

PREFIXES = {TRANSFORMER: "model.diffusion_model.", TEXT_ENCODER: "text_encoders.transformer.", AUTOENCODER: "vae."}
CONFIG_KEYS = {
    TRANSFORMER: "model.diffusion_model.config_json",
    TEXT_ENCODER: "text_encoders.config_json",
    AUTOENCODER: "vae.config_json",
}
MOST_FACTOR = 256


@dataclass(frozen=True, eq=False)
class Part:
    """One model of a checkpoint.

    tensors: under their official names, as the file stores them; the REPA projector of a transformer is kept apart.
    record: the settings that tensor shapes do not determine. A key comes from the part's own `config_json`, else from the file's
    metadata; where neither has any, the record is read from a config.json in the same folder.
    """

    kind: str
    source: str  # file, folder, bundled name or class, for error messages
    tensors: StateDict
    record: dict = field(default_factory=dict)
    prefix: str = ""  # of its keys in the file
    projector: StateDict = field(default_factory=dict)
    tokenizer: bytes | None = None
    quantized: dict[str, Quantization] = field(default_factory=dict)  # layers whose weight is stored in 8 bits with a scale

    def weight(self, name: str) -> Tensor:
        """A tensor as the network needs it: scaled to float32 if it is quantised."""
        layer = name.removesuffix(".weight")
        return dequantize(self.tensors[name], self.quantized[layer]) if layer != name and layer in self.quantized else self.tensors[name]

    def with_projector(self) -> Part:
        """This part with the REPA projector among its tensors."""
        return replace(self, tensors=self.tensors | self.projector, projector={})

    @property
    def title(self) -> str:
        return autoencoder_config(self.tensors).TITLE if self.kind == AUTOENCODER else TITLES[self.kind]

    @cached_property
    def config(self):
        """TransformerConfig, AutoencoderConfig, KLAutoencoderConfig, or the Gemma config as a dict. TimError naming the source."""
        with naming(self.source, self.kind):
            if self.kind == TRANSFORMER:
                return TransformerConfig.from_state_dict(self.tensors, self.record)
            if self.kind == AUTOENCODER:
                return autoencoder_config(self.tensors).from_state_dict(self.tensors, self.record)
            gemma = {key: value for key, value in self.record.items() if key != "escape_prompts"}
            config = normalise_config(gemma or gemma_1b_config(self.tensors))
            check_gemma(config, self.tensors)
            return config


@dataclass
class Parts:
    """The parts of one or several files. `parts[kind]` is a Part; TimError naming the source if there is none."""

    source: str  # as errors name it
    parts: dict[str, Part] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)  # the "tim" record of the file
    rest: list[str] = field(default_factory=list)  # names of tensors that belong to no part
    path: str = ""  # what read_parts takes to read them again, by default the source

    def __post_init__(self) -> None:
        self.path = self.path or self.source

    def __contains__(self, kind: str) -> bool:
        return kind in self.parts

    def __getitem__(self, kind: str) -> Part:
        if kind not in self.parts:
            raise TimError(f"{self.source}: has no {TITLES[kind]}; it holds {_list(self)}")
        return self.parts[kind]

    def require(self, *kinds: str) -> None:
        """TimError naming the first kind that is missing."""
        for kind in kinds:
            self[kind]

    def check_fit(self, latent_factor: int | None = None) -> None:
        """TimError if the transformer cannot read the text model's features or the autoencoder cannot decode its latents.

        latent_factor: instead of the one in the transformer's record.
        """
        if TRANSFORMER not in self:
            return
        config = self[TRANSFORMER].config
        if AUTOENCODER in self and (channels := self[AUTOENCODER].config.latent_channels) != config.in_channels:
            own = f"the transformer has {config.in_channels}; use the autoencoder it was trained with"
            raise TimError(f"{self.source}: the autoencoder has {channels} latent channels, {own}")
        factor = self.latent_factor if latent_factor is None else latent_factor
        if AUTOENCODER in self and (pixels := self[AUTOENCODER].config.factor) != factor:
            advice = "use the autoencoder it was trained with, or correct the file's metadata"
            raise TimError(f"{self.source}: the transformer's latent_factor is {factor}, the autoencoder has {pixels}; {advice}")
        if TEXT_ENCODER in self and (width := self[TEXT_ENCODER].tensors["embed_tokens.weight"].shape[1]) != config.text_dim:
            if config.text_dim is None:
                raise TimError(f"{self.source}: the transformer is class-conditional; leave out the text model")
            own = f"the transformer reads width {config.text_dim}; use the text model it was trained with"
            raise TimError(f"{self.source}: the text model has width {width}, {own}")

    @property
    def escape(self) -> bool:
        """Whether prompts are unicode-escaped, as in training: from the transformer's record, else the text model's, else as released."""
        records = (self.parts[kind].record for kind in (TRANSFORMER, TEXT_ENCODER) if kind in self)
        escape = next((r["escape_prompts"] for r in records if r.get("escape_prompts") is not None), ESCAPE_PROMPTS)
        if not isinstance(escape, bool):
            raise TimError(f"{self.source}: escape_prompts is {escape!r}; it must be true or false")
        return escape

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell: from the transformer's record, else the autoencoder, else the latent's channels."""
        factor = self.parts[TRANSFORMER].record.get("latent_factor") if TRANSFORMER in self else None
        if factor is not None:
            if isinstance(factor, bool) or not isinstance(factor, int) or not 1 <= factor <= MOST_FACTOR:
                raise TimError(f"{self.source}: latent_factor is {factor!r}; it must be a whole number from 1 to {MOST_FACTOR}")
            return factor
        if AUTOENCODER in self:
            return self[AUTOENCODER].config.factor
        return latent_factor(self[TRANSFORMER].tensors["x_embedder.proj.weight"].shape[1])

    @property
    def size_multiple(self) -> int:
        """Sides of images are multiples of this many pixels: the latent factor times the patch size."""
        return self.latent_factor * self[TRANSFORMER].config.patch_size


def _list(parts: Parts) -> str:
    return ", ".join(f"a {parts[kind].title}" for kind in TITLES if kind in parts) or "no part of a TiM checkpoint"


def autoencoder_config(tensors: Mapping[str, Tensor]) -> type[AutoencoderConfig] | type[KLAutoencoderConfig]:
    """The class of the configuration of an autoencoder with these tensors."""
    return KLAutoencoderConfig if "quant_conv.weight" in tensors else AutoencoderConfig


@contextmanager
def naming(source: str, kind: str) -> Iterator[None]:
    """Turns errors inside into a TimError that names the source."""
    try:
        yield
    except TimError as error:
        message = str(error)
        raise TimError(message if message.startswith(f"{source}: ") else f"{source}: {message}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise TimError(f"{source}: malformed metadata or tensors of the {TITLES[kind]} ({reason})") from None
