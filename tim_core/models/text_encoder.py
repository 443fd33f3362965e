"""Encodes prompts with Gemma 3: the last hidden state over 256 positions, as in the official pipeline.

A prompt is <bos>, its tokens, and padding on the right, without a chat template. The attention output of pad rows is zero, as in the
official encoder, which runs with flash-attention; so all pad rows are equal.
"""

import hashlib
import json
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TimError, printable, state_dict_mismatch
from ..files import digest
from .gemma import build_gemma, normalise_config, text_mismatch
from .tokenizer import MAX_LENGTH, Tokenizer, check_ids

MOST_SHOWN = 10  # unknown words in a line


@dataclass(frozen=True)
class Features:
    """rows (B, 256, D): last hidden states; from `lengths[b]` on, all rows are the pad row."""

    rows: Tensor
    lengths: list[int]


class TextEncoder(nn.Module):
    """transformers' Gemma3TextModel as `.transformer`, with padding as in the official pipeline.

    escape: unicode-escape prompts, as in the training of the released weights (`é` becomes the four characters `\\xe9`).
    device="meta" allocates nothing; `load` then takes over the tensors it is given.
    """

    damaged_weight: str | None = None  # set by loaders, see tim_core.finite

    def __init__(self, gemma_config: dict, tokenizer: Tokenizer, escape: bool = False, dtype=None, device=None):
        super().__init__()
        self.gemma_config = normalise_config(gemma_config)
        self.tokenizer = tokenizer
        self.escape = bool(escape)
        self.transformer = build_gemma(self.gemma_config, torch.device(device or "cpu"))
        self._text_rows = _TextRows()
        for layer in self.transformer.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(self._text_rows)
        if dtype is not None:
            self.to(dtype)

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.gemma_config["hidden_size"]

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.embed_tokens.weight.device

    def _apply(self, fn, recurse=True):
        """Moves and casts weights. Rotary frequencies and the embedding scale stay float32; transformers rounds them at use."""
        buffers = {name: buffer for name, buffer in self.transformer.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            _set_buffer(self.transformer, name, buffer.to(self.device))
        self._round_embed_scale()
        return self

    def _round_embed_scale(self) -> None:
        """Rounds the embedding scale of transformers 4.50, a plain number, to the dtype of the weights, as later versions do."""
        embed = self.transformer.embed_tokens
        if "embed_scale" not in embed._buffers:
            embed.embed_scale = torch.tensor(self.width**0.5).to(self.dtype).item()

    def fingerprint(self) -> str:
        """sha256 of all that features depend on: weights in their dtype, settings, tokenizer."""
        settings = (json.dumps(self.gemma_config, sort_keys=True), self.escape, hashlib.sha256(self.tokenizer.data).hexdigest())
        return hashlib.sha256(f"{digest(self.transformer.state_dict().items())} {settings}".encode()).hexdigest()

    def load(self, state_dict: dict, dtype=None) -> "TextEncoder":
        """Takes over the tensors of `state_dict` (names of Gemma3TextModel). TimError unless every name and shape agrees."""
        if wrong := state_dict_mismatch(self.transformer.state_dict(), state_dict):
            raise TimError(text_mismatch(wrong))
        tensors = {name: value if dtype is None else value.to(dtype) for name, value in state_dict.items()}
        self.transformer.load_state_dict(tensors, assign=True)
        self._round_embed_scale()
        return self

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, 256), mask (B, 256) on the CPU; escapes prompts if `escape` is set. TimError for ids that the model does not have."""
        if self.escape:
            prompts = [p.encode("unicode-escape").decode("utf-8") if isinstance(p, str) else p for p in prompts]
        ids, mask = self.tokenizer(prompts)
        check_ids(ids, self.tokenizer, self.gemma_config["vocab_size"])
        return ids, mask

    def unknown_words(self, prompts: Iterable[str], mentioned: Container[str] = ()) -> tuple[list[str], str | None]:
        """The words of prompts that the model does not know, except those mentioned before; and a line that names them, if any."""
        found = dict.fromkeys(word for prompt in prompts for word in self.tokenizer.unknown_words(prompt) if word not in mentioned)
        if not found:
            return [], None
        shown = ", ".join([*found][:MOST_SHOWN]) + (f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else "")
        known = ", ".join(self.tokenizer.words)
        return [*found], printable(f"prompt: this model does not know the word{'s' if len(found) > 1 else ''} {shown}; it knows: {known}")

    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), T <= 256, padded on the right -> last hidden states (B, T, D). Differentiable."""
        self._text_rows.mask = mask.to(device=ids.device, dtype=self.dtype)[..., None]
        # Attention is causal, so text does not see the padding behind it: no padding mask is needed.
        return self.transformer(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Features:
        """The 256 rows of each prompt. Computes the longest text and one pad row: pad rows depend on neither position nor prompt."""
        unique = list(dict.fromkeys(prompts))
        ids, mask = self.tokenize(unique)
        lengths = mask.sum(1).tolist()
        length = min(max(lengths) + 1, MAX_LENGTH)
        rows = self.encode_ids(ids[:, :length].to(self.device), mask[:, :length].to(self.device))
        rows = torch.cat([rows, rows[:, -1:].expand(-1, MAX_LENGTH - length, -1)], dim=1)
        order = [unique.index(prompt) for prompt in prompts]
        return Features(rows[order], [lengths[i] for i in order])

    @torch.no_grad()
    def conditioning(self, prompts: list[str], negatives: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """-> cond, null (B, L, D), L being the longest text of prompts and negatives. One negative may serve all prompts."""
        prompts = list(prompts)
        negatives = list(negatives or [""])
        if len(negatives) == 1:
            negatives *= len(prompts)
        if not prompts or len(negatives) != len(prompts):
            raise TimError(f"negative prompts: {len(negatives)} for {len(prompts)} prompts; give one, or one per prompt")
        features = self.encode(prompts + negatives)
        rows = features.rows[:, : max(features.lengths)]
        return rows[: len(prompts)], rows[len(prompts) :]


class _TextRows:
    """Forward pre-hook of every o_proj that zeroes the attention of pad rows. mask: (B, T, 1), of the current call."""

    mask: Tensor | None = None

    def __call__(self, module, args):
        return (args[0] * self.mask, *args[1:])


def _set_buffer(root: nn.Module, name: str, buffer: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._buffers[leaf] = buffer
