"""Live previews' factors, and the names of ImageNet's classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import mentions
from tim_core.cli import main
from tim_core.errors import TimError
from tim_core.imagenet import NULL_CLASS, class_number, names
from tim_core.shapes.batches import render_samples
from tim_core.weights import previews
from tim_core.weights.load import load_autoencoder, load_transformer
from tim_core.weights.parts import BUNDLED
from tim_core.weights.read import read_parts
from tim_core.weights.save import convert


class Mean(torch.nn.Module):
    """An autoencoder whose latent is a mixture of the mean colours of 4 x 4 cells."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        self.config = type("Config", (), {"factor": 4})

    def encode(self, x):
        return torch.einsum("kc,bchw->bkhw", self.mix, torch.nn.functional.avg_pool2d(x, 4)) + 0.5


def test_a_linear_latent_is_fitted_exactly():
    model = Mean()
    preview = previews.fit(model, render_samples(20, 32))
    assert preview["r2"] == 1.0 and len(preview["factors"]) == 5 and len(preview["bias"]) == 3
    image = next(iter(render_samples(1, 32, seed=9)))[None]
    shown = torch.einsum("bkhw,kc->bchw", model.encode(image), torch.tensor(preview["factors"]))
    shown = shown + torch.tensor(preview["bias"]).view(3, 1, 1)
    assert torch.allclose(shown, torch.nn.functional.avg_pool2d(image, 4), atol=2e-3)


def test_the_command_writes_into_the_file_and_nothing_else(tiny, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(tiny.read_bytes())
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    assert main(["previews", str(file), "--images", str(tmp_path)]) == 0
    record = read_parts(file)["transformer"].record["preview"]
    assert mentions(capsys.readouterr().out, "model.safetensors", f"{100 * record['r2']:.1f}")
    assert len(record["factors"]) == 16 and all(len(row) == 3 for row in record["factors"])
    before, after = load_file(tiny), load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("config_json"))


def test_a_better_preview_is_kept_unless_forced(tiny, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    good = {"factors": [[0.25, 0.5, 0.75]] * 16, "bias": [0.0, 0.0, 0.0], "r2": 1.0}
    convert(tiny, file, metadata={"preview": good})
    before = file.read_bytes()
    (tmp_path / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "images" / "1.png")
    command = ["previews", str(file), "--images", str(tmp_path / "images")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "kept" in said and "100.0 %" in said and "--force" in said and file.read_bytes() == before
    assert main([*command, "--force"]) == 0
    assert read_parts(file)["transformer"].record["preview"]["r2"] < 1


def test_a_lone_transformer_takes_another_files_vae(tiny, tmp_path):
    weights = load_file(tiny)
    prefix = "model.diffusion_model."
    lone = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix) and "config_json" not in key}
    save_file(lone, tmp_path / "lone.safetensors", metadata={"tim": json.dumps({"latent_factor": 8})})
    assert main(["previews", str(tmp_path / "lone.safetensors")]) == 1
    assert main(["previews", str(tmp_path / "lone.safetensors"), "--vae", str(tiny)]) == 0
    assert read_parts(tmp_path / "lone.safetensors")["transformer"].record["preview"]
    assert load_transformer(tmp_path / "lone.safetensors").config.in_channels == 16


def test_a_name_that_is_no_file_of_weights_is_refused_at_once(capsys):
    assert main(["previews", "tim-shapes"]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(TimError, match="no images"):
        list(previews.photographs(tmp_path, 64))
    (tmp_path / "broken.png").write_text("no")
    with pytest.raises(TimError, match="broken.png"):
        list(previews.photographs(tmp_path, 64))


def test_inspect_says_what_previews_are_worth(capsys):
    assert main(["inspect", "tim-shapes"]) == 0
    share = round(100 * read_parts("tim-shapes")["transformer"].record["preview"]["r2"])
    assert f"live previews: {share} % of the colour variance" in capsys.readouterr().out


def test_the_bundled_model_has_previews():
    preview = read_parts("tim-shapes")["transformer"].record["preview"]
    fitted = previews.fit(load_autoencoder(BUNDLED["tim-shapes"], dtype=torch.float32), render_samples(60, 64, seed=1))
    assert preview["r2"] == pytest.approx(fitted["r2"], abs=0.1) and preview["r2"] > 0.4


def test_class_names():
    assert len(names()) == 1000 and names()[0] == "tench" and names()[999] == "toilet tissue" and names()[207] == "golden retriever"
    assert class_number("golden retriever") == class_number("Golden_Retriever") == class_number(" 207 ") == 207
    assert class_number("") == class_number("null") == NULL_CLASS
    assert class_number("Cardigan") == 264 and class_number("cardigan") == 474
    with pytest.raises(TimError, match="golden retriever"):
        class_number("golden retreiver")
