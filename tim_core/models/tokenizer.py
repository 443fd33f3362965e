"""Gemma's tokenizer without transformers: prompts to token ids."""

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TimError, one_line, printable
from ..files import is_file

MAX_LENGTH = 256  # tokens of a prompt, <bos> included
MOST_TOKENIZER = 2**28  # bytes; those of Gemma 3 have 33 MB
WORD_START = "\u2581"  # precedes a word in Gemma's vocabulary
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference
MOST_GROWTH = 100  # times that a tokenizer's normaliser may lengthen a text; Gemma's keeps its length


class Tokenizer:
    """Gemma's tokenizer without transformers: text -> <bos> and at most 255 ids, padded on the right to 256."""

    def __init__(self, encode, data: bytes, pad_id: int = 0, bos_id: int = 2, name: str = "tokenizer", spelled=None, words=()):
        """encode: a list of texts -> lists of ids without special tokens. data: the bytes of the tokenizer's file; name: of the file.

        words: all words of a tokenizer that spells every other word in bytes; spelled: a text -> those of its words.
        """
        self._encode, self.data, self.pad_id, self.bos_id, self.name = encode, data, pad_id, bos_id, name
        self._spelled, self.words = spelled, tuple(words)

    @classmethod
    def from_json(cls, data: bytes, name: str = "tokenizer.json") -> "Tokenizer":
        """From the bytes of a tokenizer.json. TimError naming the file if they are damaged."""
        import tokenizers

        if re.search(rb'"type"\s*:\s*"Precompiled"', data):  # where it is damaged, the library prints pages before it raises
            raise TimError(f"{name}: not Gemma 3's tokenizer (it has a Precompiled normaliser); use the tokenizer.json of Gemma 3")
        with _rust_errors(f"{name}: not a valid tokenizer.json"):
            model = tokenizers.Tokenizer.from_str(bytes(data).decode("utf-8"))
        growth = _growth(json.loads(model.normalizer.__getstate__())) if model.normalizer is not None else 1
        if growth > MOST_GROWTH:
            raise TimError(f"{name}: its normaliser makes text up to {growth} times as long; use the tokenizer.json of Gemma 3")
        model.no_padding()
        model.no_truncation()
        ids = {token: model.token_to_id(token) for token in ("<pad>", "<bos>")}
        closed = re.search(rb'"merges"\s*:\s*\[\s*\]', data)  # without merges a word has its own token, or one for each byte
        words = sorted(token[1:] for token in model.get_vocab() if token[:1] == WORD_START and token[1:]) if closed else ()
        return cls(
            lambda texts: [e.ids for e in model.encode_batch(texts, add_special_tokens=False)],
            bytes(data),
            pad_id=0 if ids["<pad>"] is None else ids["<pad>"],
            bos_id=2 if ids["<bos>"] is None else ids["<bos>"],
            name=name,
            spelled=lambda text: _spelled_words(model, text),
            words=words,
        )

    @classmethod
    def from_sentencepiece(cls, data: bytes, name: str = "tokenizer.model") -> "Tokenizer":
        """From the bytes of a SentencePiece tokenizer.model. TimError if they are damaged, or sentencepiece is not installed."""
        try:
            import sentencepiece
        except ImportError:
            raise TimError(f"{name}: sentencepiece is not installed; run: pip install sentencepiece") from None
        try:
            model = sentencepiece.SentencePieceProcessor()
            model.LoadFromSerializedProto(bytes(data))
        except Exception as error:
            raise TimError(f"{name}: not a valid SentencePiece model ({one_line(error)})") from None
        return cls(
            lambda texts: [model.encode(text) for text in texts],
            bytes(data),
            pad_id=model.pad_id() if model.pad_id() >= 0 else 0,
            bos_id=model.bos_id() if model.bos_id() >= 0 else 2,
            name=name,
        )

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer") -> "Tokenizer":
        """From the bytes of either file; its first character tells which."""
        return (cls.from_json if is_json(data) else cls.from_sentencepiece)(data, name)

    @property
    def is_json(self) -> bool:
        """Whether it was read from a tokenizer.json, not from a SentencePiece model."""
        return is_json(self.data)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the tokenizer spells in bytes, if it has a closed list of words; else none."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        with _rust_errors(f"{self.name}: cannot encode text"):
            return self._spelled(text) if self.words else []

    def __deepcopy__(self, memo) -> "Tokenizer":
        return self  # immutable

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, 256) int64, mask (B, 256) bool, true on <bos> and text."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TimError(f"prompt: {prompt!r} is {type(prompt).__name__}, not text")
        texts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]  # lone surrogates become ?
        ids = torch.full((len(prompts), MAX_LENGTH), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(prompts), MAX_LENGTH, dtype=torch.bool)
        with _rust_errors(f"{self.name}: cannot encode text"):
            encoded = self._encode(texts)
        for row, tokens in enumerate(encoded):
            if len(tokens) >= MAX_LENGTH:
                start = printable(texts[row][:40])
                logging.warning(f"prompt: has {len(tokens)} tokens; only the first {MAX_LENGTH - 1} are used: {start}...")
            tokens = [self.bos_id, *tokens[: MAX_LENGTH - 1]]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask


def _spelled_words(model, text: str) -> list[str]:
    """The words of a text of which `model`, a tokenizers.Tokenizer, makes byte tokens; each once, in their order."""
    encoding = model.encode(text, add_special_tokens=False)
    places: dict[int, tuple[int, int]] = {}
    for token, word, (start, end) in zip(encoding.tokens, encoding.word_ids, encoding.offsets):
        if BYTE_TOKEN.fullmatch(token):
            first, last = places.get(word, (start, end))
            places[word] = min(first, start), max(last, end)
    return list(dict.fromkeys(text[start:end].strip() for start, end in places.values()))


def _growth(normaliser: dict) -> int:
    """By how much the replacements of a tokenizers normaliser, in its JSON form, may lengthen a text."""
    if normaliser.get("type") == "Sequence":
        return math.prod(map(_growth, normaliser["normalizers"]))
    return max(1, len(normaliser.get("content", "")), len(normaliser.get("prepend", "")))


@contextmanager
def _rust_errors(message: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into a TimError: bare Exceptions, and PanicException, which is not an Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TimError(f"{message} ({one_line(error)})") from None


def is_json(data: bytes) -> bool:
    """Whether the bytes of a tokenizer are a tokenizer.json, not a SentencePiece model."""
    return bytes(data[:64]).lstrip()[:1] == b"{"


def tokenizer_file(folder: str | Path) -> Path | None:
    """The tokenizer of a folder in Hugging Face layout, None if there is none. TimError if it is not a regular file."""
    return next((file for name in TOKENIZER_FILES if is_file(file := Path(folder) / name)), None)


def check_ids(ids: Tensor, tokenizer: Tokenizer, vocab_size: int) -> None:
    """TimError for a token id that a text model of this vocabulary does not have."""
    if ids.numel() and (largest := int(ids.max())) >= vocab_size:
        raise TimError(f"{tokenizer.name}: gives token {largest}, the text model has {vocab_size}; use the tokenizer of this model")
