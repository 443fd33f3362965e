"""The text encoder as a CLIP: transformers' Gemma 3, loaded and unloaded as a whole."""

import logging
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.cli_args import args
from torch import Tensor

from ...tim_core.errors import TimError
from ...tim_core.finite import check_finite
from ...tim_core.models.text_encoder import TextEncoder
from ...tim_core.models.tokenizer import MAX_LENGTH
from ...tim_core.prompts import take_off_syntax
from ...tim_core.weights.load import load_text_encoder
from ...tim_core.weights.parts import Parts
from ...tim_core.weights.read import read_parts
from ...tim_core.weights.write import json_tensor
from .compat import supported_kwargs
from .model import WholePatcher
from .run import PADDED


class Tokens(dict):
    """The tokens of a prompt, under the one name of our text encoder; nodes for other text encoders ask for other names."""

    def __missing__(self, name):
        raise TimError(f"CLIP: this TiM CLIP has no text encoder '{name}'; use CLIP Text Encode")


class TiMTokenizer:
    """Turns text into token ids that start with <bos>. The syntax of prompt weights is taken off: the model has no use for them."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        if extra := sorted(name for name, value in kwargs.items() if value and name != "tokenizer_options"):
            raise TimError(f"CLIP: this TiM CLIP takes text only, not {', '.join(extra)}; use CLIP Text Encode")
        if kwargs.get("tokenizer_options"):
            logging.warning("TiM: tokenizer options have no effect: prompts are not padded to a minimum length")
        text, taken_off = take_off_syntax(text)
        for line in filter(None, (taken_off, self.encoder.unknown_words([text])[1])):
            logging.warning(f"TiM: {line}")
        ids, mask = self.encoder.tokenize([text])
        word = (0,) if return_word_ids else ()
        return Tokens(tim=[[(token, 1.0, *word) for token in ids[0, mask[0]].tolist()]])

    def state_dict(self) -> dict[str, Tensor]:
        """Tokenizer and config that CheckpointSave and CLIPSave write beside the weights, so that their files load again."""
        tokenizer = self.encoder.tokenizer
        name = "tokenizer_json" if tokenizer.is_json else "spiece_model"
        config = {**self.encoder.gemma_config, "escape_prompts": self.encoder.escape}
        return {name: torch.frombuffer(bytearray(tokenizer.data), dtype=torch.uint8), "config_json": json_tensor(config)}


class TiMTextModel(torch.nn.Module):
    """The model inside core's CLIP. Its weights are named `transformer.*`, as in checkpoints and LoRAs."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.transformer = encoder.transformer
        object.__setattr__(self, "encoder", encoder)  # not a submodule: its weights would be listed twice
        self.dtypes = {encoder.dtype}

    def set_clip_options(self, options: dict) -> None:
        """Logs a line for a layer; projection does not apply, and the device is that of the weights."""
        if options.get("layer") not in (None, -1):
            logging.warning("TiM: CLIP Set Last Layer has no effect: the model was trained on the last layer")

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None, dict[str, Tensor]]:
        """-> features of the prompt (1, M, D), no pooled output, and all 256 rows for _fit_conditionings. TimError if not finite."""
        if other := sorted(tokens.keys() - {"tim"}):
            raise TimError(f"CLIP: this TiM CLIP has no text encoder '{other[0]}'; use CLIP Text Encode")
        ids = [token[0] for token in tokens["tim"][0]]
        length = len(ids)
        ids = (ids + [self.encoder.tokenizer.pad_id])[:MAX_LENGTH]  # one pad row: all are equal
        mask = torch.arange(len(ids)) < length
        rows = self.encoder.encode_ids(torch.tensor([ids], device=self.encoder.device), mask[None])
        rows = rows.float().to(mm.intermediate_device())
        check_finite(rows, "text encoder", self.encoder, float32="ComfyUI's option --fp32-text-enc")
        padded = torch.cat((rows, rows[:, -1:].expand(-1, MAX_LENGTH - len(ids), -1)), dim=1)
        return rows[:, :length], None, {PADDED: padded}


class TiMCLIP(comfy.sd.CLIP):
    """Encodes with the model of its current patcher, since Select CLIP Device replaces only the patcher."""

    def load_model(self, *args, **kwargs):
        self.cond_stage_model = self.patcher.model
        return super().load_model(*args, **kwargs)

    def clone(self, **kwargs):
        clip = super().clone(**kwargs)
        clip.__class__ = TiMCLIP  # core's clone() returns its own class
        return clip


def build_clip(parts: Parts) -> TiMCLIP:
    """Builds the CLIP of a checkpoint. TimError if it holds no text encoder, or transformers is missing or too old."""
    dtype = text_dtype(mm.text_encoder_device())
    encoder = load_text_encoder(parts, dtype=dtype).requires_grad_(False)
    target = SimpleNamespace(
        params={},
        clip=lambda device, **kwargs: TiMTextModel(encoder.to(device)),
        tokenizer=lambda **kwargs: TiMTokenizer(encoder),
    )
    parameters = sum(weight.numel() for weight in encoder.parameters())
    no_offload = supported_kwargs(comfy.sd.CLIP.__init__, disable_dynamic=True)
    clip = TiMCLIP(target, parameters=parameters, model_options={"dtype": dtype}, **no_offload)
    clip.patcher.__class__ = WholePatcher  # CLIP makes its patcher itself; clones keep the class
    clip.patcher.cached_patcher_init = (_reload_clip, (parts.path,))
    return clip


def _reload_clip(source: str, disable_dynamic: bool = False) -> WholePatcher:
    """Second patcher of the same file: core calls it for another device."""
    return build_clip(read_parts(source)).patcher


def text_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32. Core would choose float16, in which Gemma 3 overflows."""
    if args.fp32_text_enc:
        return torch.float32
    return torch.bfloat16 if args.bf16_text_enc or mm.should_use_bf16(device) else torch.float32
