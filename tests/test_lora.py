"""LoRA files: the spellings of several trainers, what is refused, and that merging is W + strength * alpha / rank * B A."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import mentions
from tim_core import Pipeline, TimError
from tim_core.cli.options import lora as parse
from tim_core.weights.describe import describe
from tim_core.weights.detect import TEXT_ENCODER, TRANSFORMER
from tim_core.weights.lora import read_lora
from tim_core.weights.save import convert

PROMPT = "a red circle"
RANK, ALPHA = 2, 1.0


@pytest.fixture
def adapters(tiny):
    """{layer of the transformer: (down, up)}, in blocks.1.attn.qkv and final_layer.linear."""
    weights, generator = load_file(tiny), torch.Generator().manual_seed(0)
    found = {}
    for layer in ("blocks.1.attn.qkv", "blocks.0.adaLN_modulation.fc1_g", "final_layer.linear"):
        rows, columns = weights[f"model.diffusion_model.{layer}.weight"].shape
        found[layer] = torch.randn(RANK, columns, generator=generator) / 2, torch.randn(rows, RANK, generator=generator) / 2
    return found


def write(path, adapters, prefix="diffusion_model.", down="lora_A.weight", up="lora_B.weight", alpha=True, dots=True):
    tensors = {}
    for layer, (a, b) in adapters.items():
        key = prefix + (layer if dots else layer.replace(".", "_"))
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


def refused(call, *arguments, **keywords) -> str:
    with pytest.raises(TimError) as error:
        call(*arguments, **keywords)
    return str(error.value)


SPELLINGS = {
    "core": {},
    "core, official prefix": {"prefix": "model.diffusion_model.", "down": "lora_down.weight", "up": "lora_up.weight"},
    "PEFT": {"prefix": "base_model.model."},
    "PEFT, named adapter": {"prefix": "base_model.model.", "down": "lora_A.default.weight", "up": "lora_B.default.weight"},
    "diffusers": {"prefix": "transformer."},
    "old diffusers": {"prefix": "transformer.", "down": "lora.down.weight", "up": "lora.up.weight"},
    "bare": {"prefix": ""},
    "kohya": {"prefix": "lora_unet_", "down": "lora_down.weight", "up": "lora_up.weight", "dots": False},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(spelling, adapters, tmp_path):
    found = read_lora(write(tmp_path / "a.safetensors", adapters, **SPELLINGS[spelling])).layers
    assert found.keys() == {TRANSFORMER} and found[TRANSFORMER].keys() == adapters.keys()
    for layer, (down, up) in adapters.items():
        adapter = found[TRANSFORMER][layer]
        assert torch.equal(adapter.down, down) and torch.equal(adapter.up, up) and adapter.scale == ALPHA / RANK


def test_without_alpha_the_scale_is_one(adapters, tmp_path):
    found = read_lora(write(tmp_path / "a.safetensors", adapters, alpha=False)).layers[TRANSFORMER]
    assert {adapter.scale for adapter in found.values()} == {1.0}


def test_state_dict_reads_back(adapters, tmp_path):
    lora = read_lora(write(tmp_path / "a.safetensors", adapters, **SPELLINGS["kohya"]))
    save_file(lora.state_dict(), tmp_path / "b.safetensors")
    expected = load_file(write(tmp_path / "c.safetensors", adapters))
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


CORE_READS = ("core", "kohya")  # what ComfyUI's loaders map without conversion


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_convert_and_describe(spelling, adapters, tmp_path):
    file = write(tmp_path / "a.safetensors", adapters, **SPELLINGS[spelling])
    described = describe(file)
    assert described.kind == "LoRA of a TiM transformer, 3 layers, rank 2"
    assert [(place.node, place.folder, place.option) for place in described.places] == [("LoraLoaderModelOnly", "loras", "--lora")]
    assert ("tim convert" in str(described)) == (spelling not in CORE_READS)
    made = convert(file, tmp_path / "b.safetensors")
    expected, found = load_file(write(tmp_path / "c.safetensors", adapters)), load_file(made)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert "tim convert" not in str(describe(made))
    half = load_file(convert(file, tmp_path / "d.safetensors", torch.bfloat16))
    assert {value.dtype for key, value in half.items() if not key.endswith("alpha")} == {torch.bfloat16}


def test_a_trained_lora_keeps_its_record(adapters, tmp_path):
    file = write(tmp_path / "a.safetensors", adapters)
    save_file(load_file(file), file, metadata={"tim_lora": '{"step": 3}'})
    assert describe(convert(file, tmp_path / "b.safetensors")).metadata["training"] == {"step": 3}


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_merging(tiny, adapters, tmp_path, strength):
    file = write(tmp_path / "a.safetensors", adapters)
    plain, merged = Pipeline.load(tiny, "cpu"), Pipeline.load(tiny, "cpu", lora={file: strength})
    before, after = plain.transformer.state_dict(), merged.transformer.state_dict()
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if layer in adapters and name.endswith(".weight"):
            down, up = adapters[layer]
            torch.testing.assert_close(after[name], value + strength * ALPHA / RANK * (up @ down))
        else:
            assert torch.equal(after[name], value)
    options = dict(steps=1, width=16, height=16)
    assert not torch.equal(plain(PROMPT, **options), merged(PROMPT, **options))
    plain.load_lora(file, strength)
    assert torch.equal(plain(PROMPT, **options), merged(PROMPT, **options))


def test_a_lora_that_changes_nothing_is_named(tiny, adapters, tmp_path, caplog):
    untrained = write(tmp_path / "untrained.safetensors", {layer: (down, torch.zeros_like(up)) for layer, (down, up) in adapters.items()})
    tensors = load_file(write(tmp_path / "a.safetensors", adapters))
    save_file({name: value * (not name.endswith(".alpha")) for name, value in tensors.items()}, tmp_path / "alphas.safetensors")
    for file, said in ((untrained, True), (tmp_path / "alphas.safetensors", True), (tmp_path / "a.safetensors", False)):
        caplog.clear()
        Pipeline.load(tiny, "cpu", lora={file: 0.0})
        assert [mentions(message, file, "changes nothing") for message in caplog.messages] == [True] * said


def test_the_text_encoder_has_layers_too(tiny, tmp_path):
    name, shape = "layers.0.mlp.down_proj", load_file(tiny)["text_encoders.transformer.layers.0.mlp.down_proj.weight"].shape
    file = write(tmp_path / "a.safetensors", {name: (torch.ones(1, shape[1]), torch.ones(shape[0], 1))}, "text_encoders.transformer.")
    assert read_lora(file).layers.keys() == {TEXT_ENCODER}
    plain, merged = Pipeline.load(tiny, "cpu"), Pipeline.load(tiny, "cpu", lora=file)
    torch.testing.assert_close(
        merged.text_encoder.transformer.layers[0].mlp.down_proj.weight, plain.text_encoder.transformer.layers[0].mlp.down_proj.weight + 1)


def bad(adapters, kind):
    layer, (down, up) = next(iter(adapters.items()))
    key = f"diffusion_model.{layer}"
    good = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return {
        "no LoRA": {"a.weight": down},
        "another model": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": down, "x.lora_B.weight": up},
        "LoKr": good | {f"{key}.lokr_w1": down},
        "LoHa": good | {f"{key}.hada_w1_a": down},
        "DoRA": good | {f"{key}.dora_scale": up},
        "half": {f"{key}.lora_A.weight": down},
        "ranks": {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up[:, :1].contiguous()},
        "integers": {f"{key}.lora_A.weight": down.int(), f"{key}.lora_B.weight": up.int()},
        "alpha": good | {f"{key}.alpha": torch.tensor(float("nan"))},
        "alphas": good | {f"{key}.alpha": torch.ones(3)},
        "twice": good | {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up},
        "more": good | {f"{key}.bias": up},
    }[kind]


@pytest.mark.parametrize("kind, named", [
    ("no LoRA", "is not a LoRA"), ("another model", "another model's LoRA"), ("LoKr", "is LoKr"), ("LoHa", "is LoHa"), ("DoRA", "is DoRA"),
    ("half", "lora_up tensor is missing"), ("ranks", "(rank, in) and (out, rank)"), ("integers", "not floating-point"), ("alpha", "alpha"),
    ("alphas", "alpha"), ("twice", "occurs twice"), ("more", ".bias'"),
])
def test_what_is_no_lora_of_ours_is_named(adapters, tmp_path, kind, named):
    save_file({key: value.clone() for key, value in bad(adapters, kind).items()}, tmp_path / "a.safetensors")
    message = refused(read_lora, tmp_path / "a.safetensors")
    assert named in message and str(tmp_path / "a.safetensors") in message and "\n" not in message


@pytest.mark.parametrize("layer, named", [("blocks.99.attn.qkv", "blocks.99.attn.qkv"), ("blocks.1.attn.qkv", "shape")])
def test_a_lora_of_another_size_changes_nothing(tiny, adapters, tmp_path, layer, named):
    down, up = adapters["blocks.1.attn.qkv"]
    odd = {"final_layer.linear": adapters["final_layer.linear"], layer: (down, up if "99" in layer else torch.cat((up, up)))}
    pipe = Pipeline.load(tiny, "cpu")
    before = pipe.fingerprint()
    assert named in refused(pipe.load_lora, write(tmp_path / "a.safetensors", odd)) and pipe.fingerprint() == before
    file = write(tmp_path / "b.safetensors", adapters)
    for strength in (float("nan"), float("inf"), "1", True, 1e9, -100.001):
        assert mentions(refused(pipe.load_lora, file, strength), "b.safetensors", "strength", repr(strength), "-100 to 100")
    assert pipe.fingerprint() == before


@pytest.mark.parametrize("strength", [1e9, float("nan")])
def test_a_strength_beyond_the_bound_is_refused_before_weights_are_loaded(strength, tiny, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("tim_core.pipeline.load_transformer", lambda *args, **options: pytest.fail("weights are loaded"))
    file = write(tmp_path / "a.safetensors", adapters)
    assert mentions(refused(Pipeline.load, tiny, "cpu", lora={file: strength}), "a.safetensors", "strength", f"{strength!r}", "100")


def test_the_option(tmp_path):
    assert parse("a.safetensors") == ("a.safetensors", 1.0) and parse("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert parse("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0) and parse("C:\\a.safetensors:-1") == ("C:\\a.safetensors", -1.0)
    odd = tmp_path / "a:2"
    odd.write_bytes(b"")
    assert parse(str(odd)) == (str(odd), 1.0) and parse(f"{odd}:3") == (str(odd), 3.0)
