"""Tokenizers: the one of coloured shapes, padding, closed vocabularies, damaged files, folders."""

import json

import pytest
import torch

from tests.support import mentions
from tim_core.errors import TimError
from tim_core.models.tokenizer import MAX_LENGTH, Tokenizer, tokenizer_file
from tim_core.shapes.tokenizer import VOCABULARY_SIZE, WORDS, shapes_tokenizer, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_json(shapes_tokenizer())


def tokens_of(tokenizer, prompt):
    ids, mask = tokenizer([prompt])
    names = {i: token for token, i in vocabulary().items()}
    return [names[i] for i in ids[0][mask[0]].tolist()]


# The tokenizer of coloured shapes


def test_each_word_is_one_token_everywhere(tokenizer):
    for word in WORDS:
        for prompt in (word, f"a {word}", f"{word} a", f"  {word.upper()}\n", f"({word})", f'"{word}".'):
            assert f"\u2581{word}" in tokens_of(tokenizer, prompt), prompt
        assert tokens_of(tokenizer, word) == ["<bos>", f"\u2581{word}"]


def test_case_space_and_punctuation_do_not_matter(tokenizer):
    plain = tokens_of(tokenizer, "a red circle left of a blue square")
    assert len(plain) == 9
    same = ("A Red CIRCLE left of a blue square.", " a red\tcircle, left-of\n\na blue  square!", "a red circle left of (a blue square)")
    for prompt in same:
        assert tokens_of(tokenizer, prompt) == plain


ODD = ["cat", "caf\u00e9", "\U0001f916 robot", "\u4e00\u53ea\u732b", "\x00\x07", "<unused1>", "circlesque", "\ud800", "1 < 2"]


@pytest.mark.parametrize("prompt", ODD, ids=ascii)
def test_other_words_are_bytes_never_unk(tokenizer, prompt):
    tokens = tokens_of(tokenizer, prompt)
    assert "<unk>" not in tokens and "<pad>" not in tokens
    known = {f"\u2581{word}" for word in WORDS}
    assert all(token == "<bos>" or token == "\u2581" or token.startswith("<0x") or token in known for token in tokens)


def test_new_words_differ(tokenizer):
    assert tokens_of(tokenizer, "a cat") != tokens_of(tokenizer, "a dog")
    assert tokens_of(tokenizer, "cat dog") != tokens_of(tokenizer, "catdog")
    assert tokens_of(tokenizer, "a") == ["<bos>", "\u2581a"] and "\u2581a" not in tokens_of(tokenizer, "banana")


def test_vocabulary_is_final():
    ids = vocabulary()
    assert [ids[token] for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<0x00>", "<0xFF>")] == [0, 1, 2, 3, 4, 259]
    assert len(ids) == VOCABULARY_SIZE and sum(token.startswith("<unused") for token in ids) >= 32
    assert (ids["\u2581"], ids["\u2581a"], ids["\u2581circle"], ids["\u2581below"]) == (260, 261, 265, 282)


def test_empty_and_endless_prompts(tokenizer):
    ids, mask = tokenizer(["", "   \n", "...", "x" * 10_000, "circle " * 10_000])
    assert mask.sum(1).tolist() == [1, 1, 1, MAX_LENGTH, MAX_LENGTH]
    assert ids.shape == (5, MAX_LENGTH) and ids[0].tolist() == [2] + [0] * (MAX_LENGTH - 1)
    assert torch.equal(ids[4, 1:], torch.full((MAX_LENGTH - 1,), 265))


def test_padding_is_on_the_right_whatever_the_file_says():
    import tokenizers

    file = tokenizers.Tokenizer.from_str(shapes_tokenizer().decode())
    file.enable_padding(direction="left", length=12)
    file.enable_truncation(4)
    ids, mask = Tokenizer.from_json(file.to_str().encode())(["a red circle and a blue square"])
    assert mask[0].tolist() == [True] * 8 + [False] * (MAX_LENGTH - 8) and ids[0, 0] == 2


def test_a_prompt_must_be_text(tokenizer):
    with pytest.raises(TimError, match="NoneType"):
        tokenizer([None])


def test_damaged_tokenizers_are_one_line():
    for data in (b"{", b"{}", b"not a tokenizer", b""):
        with pytest.raises(TimError) as error:
            Tokenizer.from_bytes(data, "some/file")
        assert "some/file" in str(error.value) and "\n" not in str(error.value)


PRECOMPILED = ["", "AA==", "AAAAAA==", "!!!", None]  # what panics in tokenizers as it is read, or as it is used


@pytest.mark.parametrize("name", ["Precompiled", "\\u0050recompiled"], ids=["plain", "escaped"])
@pytest.mark.parametrize("charsmap", PRECOMPILED, ids=str)
def test_a_damaged_normaliser_is_one_line(charsmap, name, capfd):
    """PanicException of Rust is no Exception. Where the name is plain, the library does not get to print its pages."""
    value = json.loads(shapes_tokenizer())
    value["normalizer"] = {"type": "NAME", "precompiled_charsmap": charsmap}
    with pytest.raises(TimError) as error:
        Tokenizer.from_bytes(json.dumps(value).replace("NAME", name).encode(), "some/file")(["a caf\u00e9"])
    assert "some/file" in str(error.value) and "\n" not in str(error.value)
    assert name != "Precompiled" or not capfd.readouterr().err


def test_interrupts_pass_through(tokenizer, monkeypatch):
    def interrupted(texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer(["a"])


def test_a_prompt_that_is_too_long_is_cut_and_said(tokenizer, caplog):
    ids, mask = tokenizer(["a circle " * 200])
    assert mask.all() and ids.shape == (1, 256)
    assert mentions(caplog.text, 400, "tokens", 255)
    caplog.clear()
    tokenizer(["a circle"])
    assert not caplog.text


def test_a_tokenizer_with_merges_knows_all_words():
    data = json.loads(shapes_tokenizer())
    start = data["model"]["vocab"]["<unused0>"]
    data["model"]["vocab"] = {("\u2581b" if i == start else token): i for token, i in data["model"]["vocab"].items()}
    data["model"]["vocab"]["b"] = VOCABULARY_SIZE
    data["model"]["merges"] = [["\u2581", "b"]]
    assert Tokenizer.from_json(json.dumps(data).encode()).unknown_words("a cat") == []


def test_the_tokenizer_of_a_folder(tmp_path):
    assert tokenizer_file(tmp_path) is None
    for name in ("tokenizer.model", "tokenizer.json"):  # the second goes first
        (tmp_path / name).write_bytes(shapes_tokenizer())
        assert tokenizer_file(tmp_path) == tmp_path / name


def test_sentencepiece_folder(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = ["a red circle", "a blue square left of a circle", "two green triangles and a square"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer.from_bytes(tokenizer_file(tmp_path).read_bytes())
    ids, mask = tokenizer(["a red circle", ""])
    direct = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ids[0][mask[0]].tolist() == [2] + direct.encode("a red circle")
    assert mask[1].sum() == 1 and ids[1, 1] == 0 and not tokenizer.is_json
