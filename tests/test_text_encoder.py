"""The text encoder: padding, trimming, escaping, unknown words, config spellings, training."""

import copy
import json

import pytest
import torch

from tests.support import mentions
from tim_core.errors import TimError
from tim_core.models.gemma import normalise_config
from tim_core.models.text_encoder import TextEncoder
from tim_core.models.tokenizer import MAX_LENGTH, Tokenizer
from tim_core.shapes.tokenizer import VOCABULARY_SIZE, WORDS, shapes_tokenizer

OLD_CONFIG = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512, "max_position_embeddings": 512,
    "rope_theta": 500000.0, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 3, "rope_scaling": None,
}
NEW_CONFIG = {key: value for key, value in OLD_CONFIG.items() if not key.startswith(("rope", "sliding_window_pattern"))} | {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_json(shapes_tokenizer())


@pytest.fixture(scope="module")
def encoder(tokenizer):
    torch.manual_seed(0)
    encoder = TextEncoder(OLD_CONFIG, tokenizer)
    with torch.no_grad():
        for parameter in encoder.parameters():  # norms and the pad embedding too
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def with_vocabulary(change) -> Tokenizer:
    value = json.loads(shapes_tokenizer())
    change(value["model"]["vocab"])
    for token in value["added_tokens"]:
        token["id"] = value["model"]["vocab"].get(token["content"], token["id"])
    return Tokenizer.from_bytes(json.dumps(value).encode(), "some/file")


@pytest.mark.parametrize("token", ["\u2581circle", "<bos>", "<pad>"])
def test_ids_beyond_the_vocabulary_name_the_tokenizer(token):
    encoder = TextEncoder(OLD_CONFIG, with_vocabulary(lambda vocab: vocab.update({token: 10**6})))
    for use in (encoder.encode, encoder.conditioning):
        with pytest.raises(TimError, match="some/file") as error:
            use(["a red circle"])
        assert "1000000" in str(error.value) and str(VOCABULARY_SIZE) in str(error.value)
    if token == "\u2581circle":
        assert encoder.encode(["a red"]).rows.isfinite().all()


@pytest.mark.parametrize(
    "prompt, unknown",
    [
        ("a red circle left of a blue square", []), ("(A Red) CIRCLE, and two squares.", []), ("", []),
        ("a cat on a sofa", ["cat", "on", "sofa"]), ("five red circles", ["five"]),
        ("a Cat, a cat; the cats", ["Cat", "cat", "the", "cats"]),
        ("a \u732b\U0001f408 circle", ["\u732b\U0001f408"]), ("a \ud800 circle", []), ("redcircle", ["redcircle"]),
    ],
)
def test_the_words_of_a_closed_vocabulary(encoder, prompt, unknown):
    assert encoder.tokenizer.unknown_words(prompt) == unknown
    found, line = encoder.unknown_words([prompt, "a circle"])
    assert found == unknown and (line is None) == (not found)
    if found:
        known = f"know the word{'s' if found[1:] else ''} {', '.join(map(ascii_text, found))}; it knows: {', '.join(sorted(WORDS))}"
        assert line.endswith(known)


def ascii_text(word):
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in word)


def test_unknown_words_are_few_in_a_line(encoder):
    found, line = encoder.unknown_words([" ".join(f"word{i}" for i in range(500))], {"word1"})
    assert len(found) == 499 and "word1," not in line and mentions(line, "word0", "489 more") and len(line) < 500


# The features


def test_text_rows_equal_the_unpadded_model(encoder):
    prompts = ["a red circle", "", "two green triangles and a zebra", "circle " * 400]
    features = encoder.encode(prompts)
    assert features.rows.shape == (4, MAX_LENGTH, 32) and features.lengths[3] == MAX_LENGTH
    ids, _ = encoder.tokenize(prompts)
    with torch.no_grad():
        for row, length, tokens in zip(features.rows, features.lengths, ids):
            alone = encoder.encode_ids(tokens[None, :length], torch.ones(1, length, dtype=torch.bool))
            assert torch.allclose(row[:length], alone[0], atol=2e-5)


def test_pad_rows_see_no_attention(encoder):
    """Every pad row is the pad token's embedding taken through the blocks with their attention left out."""
    rows = encoder.encode(["a red circle", ""]).rows
    model = encoder.transformer
    with torch.no_grad():
        x = model.embed_tokens(torch.tensor([[0]]))
        for layer in model.layers:
            x = x + layer.post_attention_layernorm(torch.zeros_like(x))
            x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
        expected = model.norm(x)[0, 0]
    assert torch.allclose(rows[0, 4:], expected.expand(MAX_LENGTH - 4, -1), atol=2e-5)
    assert torch.allclose(rows[1, 1:], expected.expand(MAX_LENGTH - 1, -1), atol=2e-5)


def test_short_run_equals_the_whole_256(encoder):
    prompts = ["a red circle", "", "a purple square above a white triangle"]
    with torch.no_grad():
        whole = encoder.encode_ids(*encoder.tokenize(prompts))
    assert torch.allclose(encoder.encode(prompts).rows, whole, atol=2e-5)


def test_trimming(encoder):
    prompts = ["a circle", "a red circle and a blue square"]
    cond, null = encoder.conditioning(prompts)
    rows, empty = encoder.encode(prompts).rows, encoder.encode([""]).rows
    assert cond.shape == null.shape == (2, 8, 32)
    assert torch.allclose(cond, rows[:, :8], atol=1e-6) and torch.allclose(null, empty[:, :8].expand(2, -1, -1), atol=1e-6)

    cond, null = encoder.conditioning(["a circle"], ["a red circle and a blue square"])  # a longer negative pads the positive
    assert cond.shape == (1, 8, 32) and torch.allclose(cond, rows[:1, :8], atol=1e-6) and torch.allclose(null, rows[1:, :8], atol=1e-6)
    with pytest.raises(TimError, match="2 for 3 prompts"):
        encoder.conditioning(["a"] * 3, ["b"] * 2)


def test_escaping(tokenizer):
    escaping = TextEncoder(OLD_CONFIG, tokenizer, escape=True)
    ids, _ = escaping.tokenize(["caf\u00e9\n\\"])
    assert torch.equal(ids, tokenizer(["caf\\xe9\\n\\\\"])[0])
    assert not torch.equal(ids, tokenizer(["caf\u00e9\n\\"])[0])


def test_both_config_spellings_are_one_model(encoder, tokenizer):
    assert normalise_config(OLD_CONFIG) == normalise_config(normalise_config(OLD_CONFIG))
    assert normalise_config(OLD_CONFIG)["rope_parameters"] == normalise_config(NEW_CONFIG)["rope_parameters"]
    state = encoder.transformer.state_dict()
    rows = encoder.encode(["a red circle and a blue square"]).rows
    for config in (NEW_CONFIG, {"text_config": NEW_CONFIG}, normalise_config(OLD_CONFIG)):
        for device in ("cpu", "meta"):
            other = TextEncoder(config, tokenizer, device=device).load(state)
            assert torch.equal(other.encode(["a red circle and a blue square"]).rows, rows)
    other = TextEncoder(OLD_CONFIG | {"rope_theta": 10.0}, tokenizer).load(state)
    assert not torch.allclose(other.encode(["a red circle and a blue square"]).rows, rows, atol=1e-4)


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"hidden_size": 8}])
def test_other_configs_are_refused(config, tokenizer):
    with pytest.raises(TimError, match="text encoder config"):
        TextEncoder(config, tokenizer)


def test_wrong_weights_are_refused(encoder, tokenizer):
    state = dict(encoder.transformer.state_dict())
    state["extra"] = state.pop("norm.weight")
    with pytest.raises(TimError, match="missing norm.weight, unknown extra"):
        TextEncoder(OLD_CONFIG, tokenizer, device="meta").load(state)


def test_old_transformers_is_one_line(monkeypatch, tokenizer):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.49.0")
    with pytest.raises(TimError, match=r"transformers 4\.49\.0 is too old; run: pip install") as error:
        TextEncoder(OLD_CONFIG, tokenizer)
    assert "\n" not in str(error.value)


def test_bfloat16_keeps_its_tables_exact(encoder):
    half = copy.deepcopy(encoder).bfloat16()
    assert half.dtype == torch.bfloat16
    tables = [buffer for name, buffer in half.transformer.named_buffers() if "inv_freq" in name]
    assert tables and all(table.dtype == torch.float32 for table in tables)
    prompt = ["a red circle left of a blue square"]
    assert (half.encode(prompt).rows.float() - encoder.encode(prompt).rows).abs().max() < 0.15
    assert torch.equal(half.float().encode(["a"]).rows.isfinite(), encoder.encode(["a"]).rows.isfinite())


def test_it_trains(encoder):
    model = copy.deepcopy(encoder)
    ids, mask = model.tokenize(["a red circle", "two squares and a circle", ""])
    length = int(mask.sum(1).max())
    rows = model.encode_ids(ids[:, :length], mask[:, :length])
    rows.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_copies_do_not_share_their_masks(encoder):
    one, two = encoder, copy.deepcopy(encoder)
    expected = one.encode(["a red circle", ""]).rows
    two.encode(["a"])
    assert torch.equal(two.encode(["a red circle", ""]).rows, expected)
    assert two._text_rows is not one._text_rows


def test_torch_compile(encoder):
    ids, mask = encoder.tokenize(["a red circle", "a"])
    with torch.no_grad():
        compiled = torch.compile(encoder.encode_ids, backend="eager", fullgraph=True)(ids[:, :6], mask[:, :6])
        # equal on torch 2.13; on 2.7 they differ by rounding, 7e-7 where the largest value is 3
        torch.testing.assert_close(compiled, encoder.encode_ids(ids[:, :6], mask[:, :6]), rtol=1e-5, atol=1e-5)
