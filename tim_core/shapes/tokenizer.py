"""The tokenizer of coloured shapes: one token per word that their captions use, bytes for every other word."""

import json

from .scenes import COLORS, COUNTS, SHAPES

NUMBERS = tuple(COUNTS.values())
NOUNS = tuple(noun for shape in SHAPES for noun in (shape, f"{shape}s"))
CONNECTIVES = ("and", "left", "right", "of", "above", "below")  # in the order of the trained embedding table, not of scenes.RELATIONS
WORDS = (*NUMBERS, *NOUNS, *COLORS, *CONNECTIVES)

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # Gemma's ids 0 to 3
WORD_START = "\u2581"  # Gemma's word-start mark; alone, it precedes a word spelled in bytes
VOCABULARY_SIZE = 320  # ids after the last word are <unused0>, <unused1>, ...
IGNORED = r"""[.,;:!?'"()\[\]{}_/\-\u2013\u2014\u2018\u2019\u201c\u201d]"""  # punctuation, read as a space


def vocabulary() -> dict[str, int]:
    """Token -> id. The order is final: a trained embedding table depends on it."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), WORD_START, *(WORD_START + word for word in WORDS)]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY_SIZE - len(tokens))]
    return {token: i for i, token in enumerate(tokens)}


def shapes_tokenizer() -> bytes:
    """The tokenizer.json, as bytes: case, white space and punctuation are ignored, no input is ever <unk>."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    # Without merges, a word is either in the vocabulary as a whole (ignore_merges) or falls back to bytes.
    tokenizer = Tokenizer(BPE(vocab=vocabulary(), merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(IGNORED), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always", split=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")).encode("utf-8")
