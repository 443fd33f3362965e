"""`tim inspect`: size, dtypes, where a file belongs, what an image still needs; as text and as JSON."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import mentions
from tim_core.models.config import POSITIONS, TransformerConfig
from tim_core.models.gemma import gemma_shapes
from tim_core.models.text_encoder import TextEncoder
from tim_core.models.tokenizer import Tokenizer
from tim_core.models.transformer import TransitionTransformer
from tim_core.shapes.tokenizer import VOCABULARY_SIZE, shapes_tokenizer
from tim_core.weights.describe import ONE_FILE, PLACES, describe
from tim_core.weights.load import load_text_encoder
from tim_core.weights.read import read_parts
from tim_core.weights.save import convert, pack

ROOT = Path(__file__).parents[1]
GEMMA = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window_pattern": 2,
    "model_type": "gemma3_text",
}
PREFIXES = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.transformer.", "vae": "vae."}


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny checkpoint as a folder of parts."""
    tensors, made = load_file(tiny), tmp_path / "parts"
    for name, prefix in PREFIXES.items():
        (made / name).mkdir(parents=True)
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        save_file(own, made / name / "model.safetensors")
    (made / "text_encoder" / "tokenizer.json").write_bytes(shapes_tokenizer())
    (made / "text_encoder" / "config.json").write_text(json.dumps(GEMMA))
    return made


def places(description) -> list[tuple[str, str, str]]:
    return [(place.folder, place.node, place.option) for place in description.places]


def test_nothing_is_missing_of_a_whole_checkpoint(tiny):
    found = describe(tiny)
    assert found.bytes == tiny.stat().st_size and not found.missing and not found.advice
    assert places(found) == [("checkpoints", "Load TiM Checkpoint", "--model")]
    assert (found.defaults.width, found.defaults.height) == (64, 64)
    assert mentions(str(found), f"{tiny.stat().st_size:,} bytes") and mentions(str(found), "models/checkpoints", "Load TiM Checkpoint")
    assert places(describe("tim-shapes")) == [("", "Load TiM Checkpoint", "--model")]


@pytest.mark.parametrize(
    "name, own, lacking",
    [
        ("transformer", "transformer", ["Gemma-3 text model of width 32", "DC-AE with 16 latent channels"]),
        ("text_encoder", "text_encoder", ["TiM transformer that reads text features of width 32", "DC-AE"]),
        ("vae", "autoencoder", ["TiM transformer with 16 latent channels", "Gemma-3 text model"]),
    ],
)
def test_what_one_part_lacks(name, own, lacking, folder):
    found = describe(folder / name)
    assert places(found) == [(PLACES[own].folder, PLACES[own].node, PLACES[own].option)]
    assert len(found.missing) == len(lacking) and all(mentions(has, wanted) for has, wanted in zip(found.missing, lacking))
    assert all(missing in str(found) for missing in found.missing)
    assert found.bytes == sum(file.stat().st_size for file in (folder / name).iterdir())


def test_a_folder_of_parts_is_whole(folder):
    found = describe(folder)
    assert not found.missing and found.bytes == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert {option for _, _, option in places(found)} == {"--model"}
    assert [node for _, node, _ in places(found)] == ["Load TiM Model", "Load TiM Text Encoder", "Load TiM VAE"]
    (folder / "text_encoder" / "tokenizer.json").unlink()
    assert mentions(describe(folder).missing[0], "tokenizer.json")


@pytest.mark.parametrize(
    "channels, factor, lacking, release",
    [
        (32, 32, "DC-AE with 32 latent channels", "c2i-512"),
        (4, 8, "Stable Diffusion's VAE", "c2i-256"),
    ],
)
def test_class_conditional_models(channels, factor, lacking, release, tmp_path):
    network = TransitionTransformer(
        TransformerConfig(
            in_channels=channels,
            hidden_size=32,
            depth=1,
            num_heads=2,
            num_classes=9,
            text_dim=None,
            patch_size=2 if channels == 4 else 1,
            lora_hidden_size=8,
        )
    )
    found = describe(pack({"model": network}, tmp_path / "a.safetensors"))
    assert len(found.missing) == 1 and mentions(found.missing[0], lacking) and mentions(found.advice, f"tim download {release}")
    assert "diffusion_models" in places(found)[0]


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_other_than_the_official_ones_are_named(tmp_path, positions):
    config = TransformerConfig(in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=9, positions=positions)
    found = describe(pack({"model": TransitionTransformer(config)}, tmp_path / "a.safetensors"))
    assert found.parts[0].architecture.positions == positions
    assert ("positions grid" in str(found)) == (positions == "grid")


def test_released_text_to_image_files_name_their_download(tmp_path):
    network = TransitionTransformer(
        TransformerConfig(in_channels=32, hidden_size=32, depth=1, num_heads=2, text_dim=1152, lora_hidden_size=8)
    )
    torch.save(network.state_dict(), tmp_path / "t2i_model.bin")
    found = describe(tmp_path / "t2i_model.bin")
    assert mentions(found.advice, "tim download t2i") and (found.defaults.width, found.defaults.height) == (1024, 1024)


def test_dtypes_by_part_with_counts(tiny, tmp_path):
    tensors = load_file(tiny)
    tensors |= {key: value.bfloat16() for key, value in tensors.items() if key.startswith("vae.encoder.")}
    save_file(tensors, tmp_path / "a.safetensors")
    vae = describe(tmp_path / "a.safetensors").parts[2]
    halves = [value for key, value in tensors.items() if key.startswith("vae.encoder.")]
    assert vae.dtypes["bfloat16"].tensors == len(halves) and vae.dtypes["bfloat16"].parameters == sum(v.numel() for v in halves)
    assert vae.dtypes["bfloat16"].tensors + vae.dtypes["float32"].tensors == vae.tensors
    assert vae.bytes == sum(v.nbytes for key, v in tensors.items() if key.startswith("vae.") and key != "vae.config_json")
    assert mentions(str(describe(tmp_path / "a.safetensors")), "bfloat16", len(halves), "tensors")


def test_other_files(tmp_path):
    save_file({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, tmp_path / "sd-vae.safetensors")
    assert places(describe(tmp_path / "sd-vae.safetensors")) == [("vae", "Load VAE", "")]
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert places(describe(tmp_path / "other.safetensors")) == [] and describe(tmp_path / "other.safetensors").bytes > 8


def test_json_says_what_the_text_says(tiny, folder, tmp_path, capsys):
    from tim_core.cli import main

    (tmp_path / "bad.safetensors").write_text("hello")
    assert main(["inspect", "--json", str(tiny), str(tmp_path / "bad.safetensors"), str(folder / "vae")]) == 1
    out, err = capsys.readouterr()
    whole, vae = map(json.loads, out.splitlines())
    assert len(err.splitlines()) == 1 and "bad.safetensors" in err
    assert whole["path"] == str(tiny) and whole["bytes"] == tiny.stat().st_size and whole["missing"] == []
    assert whole["places"] == [{"folder": "checkpoints", "node": "Load TiM Checkpoint", "option": "--model"}]
    transformer = whole["parts"][0]
    assert transformer["part"] == "transformer" and transformer["architecture"]["hidden_size"] == 32 and transformer["problem"] == ""
    assert transformer["dtypes"] == {"float32": {"tensors": transformer["tensors"], "parameters": transformer["parameters"]}}
    assert whole["defaults"]["width"] == 64 and vae["missing"] == list(describe(folder / "vae").missing)


def test_json_is_strict(weights_with_odd_record, capsys):
    from tim_core.cli import main

    assert main(["inspect", "--json", str(weights_with_odd_record)]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["metadata"]["training"] == {"loss": None}


@pytest.fixture
def weights_with_odd_record(tiny, tmp_path):
    save_file(load_file(tiny), tmp_path / "odd.safetensors", metadata={"tim": '{"training": {"loss": NaN}}'})
    return tmp_path / "odd.safetensors"


def test_transformers_is_not_imported(tiny, tmp_path):
    text = convert(read_parts({"text-encoder": tiny}), tmp_path / "text.safetensors")
    code = "import sys; from tim_core.cli import main; code = main(sys.argv[1:]); print('transformers' in sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, "inspect", str(tiny), str(text)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and ran.stdout.endswith("False\n") and "does not load" not in ran.stdout


VARIANTS = {"plain": {}, "bias": {"attention_bias": True}, "defaults": {"num_key_value_heads": None, "intermediate_size": None}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_of_gemma_are_those_of_transformers(variant):
    config = {**GEMMA, "num_attention_heads": 4, **VARIANTS[variant]}
    config = {key: value for key, value in config.items() if value is not None}
    model = TextEncoder(config, Tokenizer.from_json(shapes_tokenizer()), device="meta").transformer
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == gemma_shapes(config)


def test_a_text_model_that_does_not_load_says_why(tiny, tmp_path):
    tensors = load_file(tiny)
    del tensors["text_encoders.transformer.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    problem = describe(tmp_path / "a.safetensors").parts[1].problem
    assert "layers.1.mlp.up_proj.weight" in problem
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight"):
        load_text_encoder(tmp_path / "a.safetensors")


def test_nodes_and_folders_are_those_of_the_loaders():
    calls = {}
    for node in ast.walk(ast.parse((ROOT / "nodes" / "loaders.py").read_text())):
        if isinstance(node, ast.ClassDef):
            strings = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            title = next(
                word.value.value
                for call in strings
                for word in call.keywords
                if word.arg == "display_name" and word.value.value.startswith("Load")
            )
            opened = next(call for call in strings if getattr(call.func, "id", "") == "open_parts")
            calls[title] = opened.args[0].value
    assert {place.node: place.folder for place in (ONE_FILE, *PLACES.values())} == calls


@pytest.fixture(params=["one file", "folder of parts", "classes"])
def model(request, tiny, folder, tmp_path):
    """The forms of --model, and a size that each cannot make."""
    if request.param != "classes":
        return (tiny if request.param == "one file" else folder), "63x64"
    config = TransformerConfig(in_channels=16, hidden_size=32, depth=1, num_heads=2, num_classes=9, text_dim=None, lora_hidden_size=8)
    return pack({"model": TransitionTransformer(config), "vae": folder / "vae"}, tmp_path / "classes.safetensors"), "63x64"


def test_sizes_and_records_are_checked_before_weights_are_loaded(model, tmp_path, monkeypatch, capsys):
    """A full-size model takes a minute to load."""
    from tim_core.cli import main

    source, size = model
    for name in ("load_transformer", "load_text_encoder", "load_autoencoder"):
        monkeypatch.setattr(f"tim_core.pipeline.{name}", lambda *args, **options: pytest.fail("weights are loaded"))
    command = ["sample", "1", "--model", str(source), "-o", str(tmp_path / "a.png")]
    assert main([*command, "--size", size]) == 1
    assert mentions(capsys.readouterr().err, "size", size, "64x64")
    bad = read_parts(source)
    bad.parts["transformer"].record["steps"] = 0
    monkeypatch.setattr("tim_core.weights.read.read_parts", lambda source: bad)
    assert main(command) == 1
    assert mentions(capsys.readouterr().err, "steps", "0", "1000")
