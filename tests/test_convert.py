"""`tim convert` and `tim pack`: dtypes by part, equal bytes from run to run, progress, 8-bit weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import mentions
from tim_core.cli import main
from tim_core.errors import TimError
from tim_core.pipeline import Pipeline
from tim_core.weights.describe import describe
from tim_core.weights.load import load_text_encoder, load_transformer
from tim_core.weights.parts import BUNDLED
from tim_core.weights.quantized import is_large
from tim_core.weights.read import read_parts
from tim_core.weights.save import convert, pack
from tim_core.weights.write import DTYPES, Entry, entry, write_safetensors

ROOT = Path(__file__).parents[1]
PREFIX = "model.diffusion_model."
PROMPT = "a red circle left of a blue square"


def dtypes(file, prefix: str) -> set[torch.dtype]:
    return {value.dtype for key, value in load_file(file).items() if key.startswith(prefix) and not key.endswith(("_json", "comfy_quant"))}


def test_the_vae_keeps_its_dtype_unless_it_is_named(tiny, tmp_path):
    half, both, vae = (tmp_path / f"{name}.safetensors" for name in ("half", "both", "vae"))
    parts = ["--model", str(tiny), "--text-encoder", str(tiny), "--vae", str(tiny)]
    assert main(["pack", *parts, str(half), "--dtype", "bf16"]) == 0
    assert dtypes(half, PREFIX) == dtypes(half, "text_encoders.") == {torch.bfloat16} and dtypes(half, "vae.") == {torch.float32}
    assert main(["convert", str(tiny), str(both), "--dtype", "bf16", "--vae-dtype", "bf16"]) == 0
    assert dtypes(both, "vae.") == {torch.bfloat16}
    convert(read_parts({"vae": tiny}), vae, torch.bfloat16)
    assert dtypes(vae, "") == {torch.bfloat16}


@pytest.mark.parametrize("prefix, name", [(PREFIX, "blocks.1.attn.proj.weight"), ("vae.", "decoder.conv_in.bias")])
def test_a_part_that_does_not_load_is_said(prefix, name, tiny, tmp_path, caplog):
    file, out = tmp_path / "part.safetensors", tmp_path / "out.safetensors"
    save_file({key: value for key, value in load_file(tiny).items() if key != prefix + name}, file)
    convert(file, out)
    assert mentions(caplog.text, "the new file will not load", "part.safetensors", name)
    caplog.clear()
    convert(tiny, out)
    assert not caplog.messages


@pytest.mark.parametrize("option", ["--dtype", "--vae-dtype"])
def test_unknown_dtypes(option, tiny, tmp_path, capsys):
    assert main(["convert", str(tiny), str(tmp_path / "a.safetensors"), option, "int3"]) == 1
    assert mentions(capsys.readouterr().err, option, "int3", "bf16")


RUN = """
import sys, torch
from tim_core.weights.save import convert
source, folder = sys.argv[1:]
for name, dtype in (("stored", None), ("fp8", torch.float8_e4m3fn)):
    convert(source, f"{folder}/{name}.safetensors", dtype)
"""


def test_equal_bytes_from_run_to_run(tiny, tmp_path):
    """In processes with other hash seeds; the library's own writer differs in the order of its metadata."""
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", RUN, str(tiny), str(tmp_path / seed)], cwd=ROOT, check=True, env=environment)
    for name in ("stored", "fp8"):
        first, second = ((tmp_path / seed / f"{name}.safetensors") for seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes()
        with safe_open(first, "pt") as file:
            assert set(file.metadata()) == {"format", "tim"}


def test_progress_is_in_bytes_and_on_stderr(tiny, tmp_path, capsys):
    assert main(["convert", str(tiny), str(tmp_path / "a.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'a.safetensors'}\n" and "B/s" in err and "a.safetensors" in err


def test_what_is_written_is_what_the_library_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {
        "": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
        'é\n"': torch.ones(3, dtype=torch.bfloat16),
        "turned": torch.rand(4, 3).T,
    }
    metadata, seen = {"b": 'é"', "a": "1"}, []
    write_safetensors(tmp_path / "a", {name: entry(value) for name, value in tensors.items()}, metadata, lambda *done: seen.append(done))
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name].float(), value.float()) for name, value in tensors.items())
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
    size = sum(value.nbytes for value in tensors.values())
    assert seen[-1] == (size, size) and seen == sorted(seen)
    with pytest.raises(TimError, match="odd"):
        write_safetensors(tmp_path / "b", {"odd": entry(torch.zeros(1, dtype=torch.complex128))}, {})


@pytest.mark.parametrize("made", [torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.float16)])
def test_a_tensor_that_is_made_unlike_its_entry_is_an_error(made, tmp_path):
    """Written as it is, it would shift every tensor behind it."""
    entries = {"a.weight": Entry((2, 3), torch.float32, lambda: made), "b": entry(torch.ones(4))}
    with pytest.raises(TimError) as error:
        write_safetensors(tmp_path / "a", entries, {})
    assert mentions(str(error.value), "a.weight", list(made.shape), "[2, 3]")


GATE = "blocks.0.mlp.fc1_x.weight"


def with_small(tiny, path, share, count=1, value=1e-9):
    """The tiny checkpoint with a share of the values of a weight, half of it in a second, so small that float16 and fp8 make them 0."""
    tensors = load_file(tiny)
    for number, name in enumerate((GATE, GATE.replace("fc1_x", "fc1_g"))[:count], 1):
        flat = tensors[PREFIX + name].view(-1)
        flat[: round(share / number * len(flat))] = value
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_values_that_become_zero_are_one_line(dtype, tiny, tmp_path, caplog):
    """The tensor with the largest share is named."""
    source = with_small(tiny, tmp_path / "a.safetensors", 0.25, count=2)
    convert(source, tmp_path / "b.safetensors", getattr(torch, dtype))
    (line,) = caplog.messages
    assert mentions(line, "a.safetensors", "25.0", GATE, "1 more", dtype, "bfloat16")
    stored = load_file(tmp_path / "b.safetensors")[PREFIX + GATE]
    assert 0.25 <= (stored.float() == 0).float().mean() < 0.27


@pytest.mark.parametrize("share", [0.004, 0])
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "bfloat16"])
def test_a_handful_of_small_values_is_no_line(dtype, share, tiny, tmp_path, caplog):
    convert(with_small(tiny, tmp_path / "a.safetensors", share), tmp_path / "b.safetensors", getattr(torch, dtype))
    assert not caplog.messages


@pytest.mark.parametrize("dtype, value", [("float16", 1e-9), ("float8_e4m3fn", 1e-42)])
def test_a_tensor_that_would_become_zero_is_refused(dtype, value, tiny, tmp_path):
    source = with_small(tiny, tmp_path / "a.safetensors", 1, value=value)
    with pytest.raises(TimError) as error:
        convert(source, tmp_path / "b.safetensors", getattr(torch, dtype))
    assert mentions(str(error.value), GATE, dtype, "bfloat16") and not (tmp_path / "b.safetensors").exists()
    if dtype == "float16":
        with pytest.raises(TimError, match=GATE):
            load_transformer(source, dtype=torch.float16)


def test_zeros_may_stay_zeros(tiny, tmp_path, caplog):
    source = with_small(tiny, tmp_path / "a.safetensors", 1, value=0.0)
    for dtype in (torch.float16, torch.float8_e4m3fn):
        convert(source, tmp_path / "b.safetensors", dtype)
    assert not caplog.messages


# 8-bit weights


@pytest.fixture(scope="module")
def fp8(tiny, tmp_path_factory):
    """The tiny checkpoint in 8 bits, in both spellings."""
    return write_fp8(tiny, tmp_path_factory.mktemp("fp8"))


def write_fp8(source, folder):
    current = convert(source, folder / "current.safetensors", torch.float8_e4m3fn)
    older = {PREFIX + "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in load_file(current).items():
        if not key.endswith(".comfy_quant"):
            older[key.replace(".weight_scale", ".scale_weight")] = value
    save_file(older, folder / "older.safetensors")
    in_metadata = {key: value for key, value in load_file(current).items() if not key.endswith(".comfy_quant")}
    layers = {key.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for key in in_metadata if key.endswith(".weight_scale")}
    save_file(in_metadata, folder / "metadata.safetensors", {"_quantization_metadata": json.dumps({"layers": layers})})
    return folder


def test_fp8_is_for_the_blocks_of_the_transformer(tmp_path):
    tensors = load_file(convert("tim-shapes", tmp_path / "a.safetensors", torch.float8_e4m3fn))
    stored = load_file(BUNDLED["tim-shapes"])
    large = {key for key, value in stored.items() if key.startswith(PREFIX) and is_large(key.removeprefix(PREFIX), value)}
    assert large == {key for key, value in tensors.items() if value.dtype == torch.float8_e4m3fn}
    assert sum(stored[key].numel() for key in large) > 0.89 * sum(v.numel() for k, v in stored.items() if k.startswith(PREFIX))
    for key in large:
        layer = key.removesuffix(".weight")
        scale, settings = tensors[f"{layer}.weight_scale"], bytes(tensors[f"{layer}.comfy_quant"].tolist())
        assert scale.dtype == torch.float32 and scale.shape == () and json.loads(settings) == {"format": "float8_e4m3fn"}
        wanted = stored[key].float()
        error = (tensors[key].float() * scale - wanted).norm() / wanted.norm()
        assert error < 0.03, (key, error)
        assert (tensors[key].float() * scale).abs().max() == pytest.approx(float(wanted.abs().max()), rel=1e-5)
    assert all(torch.equal(tensors[key], value) for key, value in stored.items() if key not in large and key.startswith(("vae.", "text")))


def test_inspection_counts_the_quantised_layers(fp8):
    part = describe(fp8 / "older.safetensors").parts[0]
    layers = sum(key.endswith(".comfy_quant") for key in load_file(fp8 / "current.safetensors"))
    assert part.quantized_layers == layers == part.dtypes["float8_e4m3fn"].tensors and not part.problem
    assert mentions(str(describe(fp8 / "older.safetensors")), layers, "layers with scales")


@pytest.mark.parametrize("spelling", ["current", "older", "metadata"])
def test_both_spellings_load_with_their_scales(spelling, fp8):
    stored = load_file(fp8 / "current.safetensors")
    weights = load_transformer(fp8 / f"{spelling}.safetensors", dtype=torch.float32).state_dict()
    assert load_transformer(fp8 / f"{spelling}.safetensors").dtype == torch.bfloat16
    scaled = [name for name in weights if PREFIX + name.replace(".weight", ".weight_scale") in stored and name.endswith(".weight")]
    assert scaled
    for name in scaled:
        key = PREFIX + name
        assert torch.equal(weights[name], stored[key].float() * stored[key.replace(".weight", ".weight_scale")])


def test_an_image_in_8_bits_is_near_that_in_16(tmp_path):
    fp8 = write_fp8("tim-shapes", tmp_path)
    options = dict(steps=4, seed=3)
    plain = Pipeline.load("tim-shapes", "cpu", "float32")(PROMPT, **options)
    small = Pipeline.load(fp8 / "current.safetensors", "cpu", "float32")(PROMPT, **options)
    assert torch.equal(small, Pipeline.load(fp8 / "older.safetensors", "cpu", "float32")(PROMPT, **options))
    difference = (plain - small).abs()
    assert 0 < difference.mean() < 0.02, difference.mean()


@pytest.mark.parametrize("spelling", ["current", "older", "metadata"])
def test_quantised_files_convert(spelling, fp8, tmp_path):
    source = fp8 / f"{spelling}.safetensors"
    same, wide = convert(source, tmp_path / "same.safetensors"), convert(source, tmp_path / "wide.safetensors", torch.float32)
    expected, found = load_file(fp8 / "current.safetensors"), load_file(same)
    names = [key for key in expected if key.startswith(PREFIX) and not key.endswith(("config_json", "comfy_quant"))]
    assert names and all(
        torch.equal(found[key].float(), expected[key].float()) and found[key].dtype == expected[key].dtype for key in names
    )
    assert all(key in found for key in expected if key.endswith("comfy_quant"))
    again = load_file(convert(source, tmp_path / "again.safetensors", torch.float8_e4m3fn))
    assert all(torch.equal(again[key].float(), expected[key].float()) for key in names)
    assert not any(key.endswith(("weight_scale", "comfy_quant", "scaled_fp8")) for key in load_file(wide))
    weights = load_transformer(source, dtype=torch.float32).state_dict()
    assert all(torch.equal(weights[key], load_file(wide)[PREFIX + key]) for key in weights)


def test_a_quantised_text_model_and_its_input_scales(tiny, tmp_path):
    """Input scales are for 8-bit products, which a Pipeline does not compute; they are kept."""
    tensors = load_file(tiny)
    layer = "text_encoders.transformer.layers.0.mlp.up_proj"
    scale = torch.tensor(0.5)
    wanted = (tensors[f"{layer}.weight"] * 2).to(torch.float8_e5m2)
    tensors |= {f"{layer}.weight": wanted, f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(0.25)}
    tensors["text_encoders.transformer.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e5m2)
    save_file(tensors, tmp_path / "a.safetensors")
    assert not read_parts(tmp_path / "a.safetensors").rest
    model = load_text_encoder(tmp_path / "a.safetensors", torch.float32).transformer
    assert torch.equal(model.layers[0].mlp.up_proj.weight, wanted.float() * 0.5)
    made = load_file(convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert made[f"{layer}.weight"].dtype == torch.float8_e5m2 and made[f"{layer}.input_scale"] == 0.25
    assert json.loads(bytes(made[f"{layer}.comfy_quant"].tolist())) == {"format": "float8_e5m2"}


def test_what_fp8_is_not_for(tiny, tmp_path, capsys):
    text, vae = convert(read_parts({"text-encoder": tiny}), tmp_path / "t.safetensors"), read_parts({"vae": tiny})
    for source, named in ((text, "t.safetensors"), (vae, "")):
        with pytest.raises(TimError) as error:
            convert(source, tmp_path / "a.safetensors", torch.float8_e4m3fn)
        assert mentions(str(error.value), named, "fp8") and "bf16" in str(error.value)
    assert main(["convert", str(tiny), str(tmp_path / "a.safetensors"), "--vae-dtype", "fp8"]) == 1
    assert mentions(capsys.readouterr().err, "fp8", "bf16")
    tensors = load_file(tiny)
    tensors[PREFIX + "blocks.0.mlp.fc2.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(TimError, match="blocks.0.mlp.fc2.weight"):
        pack(tmp_path / "nan.safetensors", tmp_path / "a.safetensors", torch.float8_e4m3fn)
    assert not (tmp_path / "a.safetensors").exists()


LAYER = PREFIX + "blocks.0.mlp.fc2"


def settings(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, named",
    [
        ({f"{LAYER}.comfy_quant": settings('{"format": "nvfp4"}')}, "nvfp4"),
        ({f"{LAYER}.comfy_quant": settings("{}")}, "None"),
        ({f"{LAYER}.comfy_quant": settings("[1]")}, "comfy_quant"),
        ({f"{LAYER}.comfy_quant": settings("{")}, "comfy_quant"),
        ({f"{LAYER}.weight_scale": torch.ones(3)}, "[3]"),
        ({f"{LAYER}.weight_scale": torch.tensor(float("nan"))}, "nan"),
        ({f"{LAYER}.weight_scale": torch.tensor(-1.0)}, "-1"),
        ({f"{LAYER}.weight_scale": torch.tensor(1)}, "int64"),
        ({f"{LAYER}.weight": torch.ones(32, 85, dtype=torch.int8)}, "int8"),
        ({f"{PREFIX}blocks.0.other.weight_scale": torch.tensor(1.0)}, "blocks.0.other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantisation_that_cannot_be_read_is_one_line(change, named, fp8, tmp_path):
    tensors = load_file(fp8 / "current.safetensors") | change
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(TimError) as error:
        read_parts(tmp_path / "odd.safetensors")
    assert mentions(str(error.value), "odd.safetensors") and named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": []}', '{"layers": {"a": 1}}'])
def test_malformed_quantisation_metadata_is_one_line(text, fp8, tmp_path):
    save_file(load_file(fp8 / "metadata.safetensors"), tmp_path / "odd.safetensors", {"_quantization_metadata": text})
    with pytest.raises(TimError, match="odd.safetensors.*_quantization_metadata"):
        read_parts(tmp_path / "odd.safetensors")
