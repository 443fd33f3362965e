"""The text encoder as a CLIP: transformers' Gemma 3 on a plain patcher, so it loads and unloads as a whole."""

from types import SimpleNamespace

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.cli_args import args
from torch import Tensor

from ..tim_core.checkpoint import Parts, json_tensor, load_text_encoder
from ..tim_core.text_encoder import MAX_LENGTH, TextEncoder
from .compat import accepted
from .model import PADDED


class TiMTokenizer:
    """Text to <bos> and its ids. Weights such as (red:1.3) are read literally, as for core's other language models."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        ids, mask = self.encoder.tokenize([text])
        word = (0,) if return_word_ids else ()
        return {"tim": [[(token, 1.0, *word) for token in ids[0, mask[0]].tolist()]]}

    def state_dict(self) -> dict[str, Tensor]:
        """What CheckpointSave and CLIPSave write beside the weights, so that their files load again."""
        tokenizer = self.encoder.tokenizer
        name = "tokenizer_json" if tokenizer.is_json else "spiece_model"
        config = {**self.encoder.gemma_config, "escape_prompts": self.encoder.escape}
        return {name: torch.frombuffer(bytearray(tokenizer.data), dtype=torch.uint8), "config_json": json_tensor(config)}


class TiMTextModel(torch.nn.Module):
    """What core's CLIP drives. Its state dict holds the text model as `transformer.*`, the names of checkpoints and LoRAs."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.transformer = encoder.transformer
        object.__setattr__(self, "encoder", encoder)  # not a submodule: its weights would be there twice
        self.dtypes = {encoder.dtype}

    def set_clip_options(self, options: dict) -> None:
        """Layer and projection mean nothing here; the device is the weights' own."""

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None, dict[str, Tensor]]:
        """-> the prompt's rows (1, M, D), no pooled output, and all 256 rows for _fit_conditionings."""
        ids = [token[0] for token in tokens["tim"][0]]
        length = len(ids)
        ids = (ids + [self.encoder.tokenizer.pad_id])[:MAX_LENGTH]  # one pad row: they are all alike
        mask = torch.arange(len(ids)) < length
        rows = self.encoder.encode_ids(torch.tensor([ids], device=self.encoder.device), mask[None])
        rows = rows.float().to(mm.intermediate_device())
        padded = torch.cat((rows, rows[:, -1:].expand(-1, MAX_LENGTH - len(ids), -1)), dim=1)
        return rows[:, :length], None, {PADDED: padded}


def build_clip(parts: Parts) -> comfy.sd.CLIP:
    """The CLIP of a checkpoint. TimError if it holds no text model, or transformers is missing or too old."""
    dtype = text_dtype(mm.text_encoder_device())
    encoder = load_text_encoder(parts, dtype=dtype).requires_grad_(False)
    target = SimpleNamespace(
        params={},
        clip=lambda device, **kwargs: TiMTextModel(encoder.to(device)),
        tokenizer=lambda **kwargs: TiMTokenizer(encoder),
    )
    parameters = sum(weight.numel() for weight in encoder.parameters())
    # transformers' layers cannot be offloaded one by one
    plain = accepted(comfy.sd.CLIP.__init__, disable_dynamic=True)
    return comfy.sd.CLIP(target, parameters=parameters, model_options={"dtype": dtype}, **plain)


def text_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32. Core's own choice is float16, in which Gemma 3 overflows."""
    if args.fp32_text_enc:
        return torch.float32
    return torch.bfloat16 if args.bf16_text_enc or mm.should_use_bf16(device) else torch.float32
