"""The road of the released weights at full size, with random weights: run by hand, with 20 GiB of memory and 25 GB of disk.

    pytest -m full tests/test_full_size.py -s

It takes three quarters of an hour on two busy cores. Commands run in processes of their own, so that the memory of each is known.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import comfy_support, full_size
from tests.comfy_graph import Graph, images_of
from tests.comfy_support import Server, find

pytestmark = [pytest.mark.full, pytest.mark.skipif(os.name != "posix", reason="counts memory as POSIX does")]
ROOT = Path(__file__).parents[1]
PROMPT = "a red circle left of a blue square"
MOST_MEMORY = 20 * 2**30
ANSWER = """
import sys, torch
from tim_core.pipeline import Pipeline
source, target, dtype, width, steps = eval(sys.argv[1])
pipe = Pipeline.load(source, "cpu", dtype)
prompt = "golden retriever" if pipe.class_conditional else "a red circle left of a blue square"
torch.save((pipe([prompt], steps=steps, width=width, height=width), pipe.defaults), target)
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(comfy_support, "RUN_SECONDS", 3600)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released files under their published names."""
    folder = tmp_path_factory.mktemp("released")
    full_size.write_transformer("t2i", folder / "t2i_model.bin")
    full_size.write_transformer("c2i-256", folder / "c2i_model_256.safetensors")
    full_size.write_transformer("c2i-512", folder / "c2i_model_512.safetensors")
    full_size.write_gemma(folder / "gemma-3-1b-it")
    full_size.write_dc_ae(folder / "dc-ae-f32c32-sana-1.1-diffusers")
    full_size.write_sd_vae(folder / "sd-vae-ft-ema")
    yield folder
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"\npeak memory of a command or server {peak / 2**30:.1f} GiB, of the tests {own / 2**30:.1f} GiB; disk {disk / 1e9:.1f} GB")
    shutil.rmtree(folder)
    assert peak < MOST_MEMORY and own < MOST_MEMORY


@pytest.fixture(scope="module")
def folder_of_parts(released):
    return link_parts(released, "parts", transformer="t2i_model.bin", text_encoder="gemma-3-1b-it", vae="dc-ae-f32c32-sana-1.1-diffusers")


def link_parts(released: Path, name: str, **parts: str) -> Path:
    """A folder of parts, of links."""
    for part, source in parts.items():
        (released / name / part).mkdir(parents=True)
        files = (released / source).iterdir() if (released / source).is_dir() else [released / source]
        for file in files:
            (released / name / part / file.name).symlink_to(file)
    return released / name


def child(*command: object) -> str:
    """Runs Python in a process of its own -> what it printed, with its seconds and its memory on our own output."""
    started = time.monotonic()
    ran = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    words = [str(word) for word in command if "\n" not in str(word)]
    print(f"\n{time.monotonic() - started:.0f} s, peak so far {peak:.1f} GiB: {' '.join(words)[-160:]}")
    return ran.stdout


def tim(*words: object) -> str:
    return child("-m", "tim_core", *words)


def answer(tmp_path: Path, source, dtype: str, width: int, steps: int = 1):
    """What a Pipeline makes of the prompt -> (H, W, 3), its defaults."""
    target = tmp_path / "answer.pt"
    child("-c", ANSWER, repr((str(source) if isinstance(source, Path) else source, str(target), dtype, width, steps)))
    images, defaults = torch.load(target, weights_only=False)
    assert images.shape == (1, width, width, 3) and images.isfinite().all() and images.std() > 0.02
    return images, defaults


@pytest.mark.parametrize("name, parameters, size, node, missing", [
    ("t2i_model.bin", 864_978_080, 3_492_707_595, "Load TiM Model", 2),
    ("gemma-3-1b-it", 999_885_952, 1_999_811_208, "Load TiM Text Encoder", 2),
    ("dc-ae-f32c32-sana-1.1-diffusers", 312_250_275, 1_249_044_836, "Load TiM VAE", 2),
    ("sd-vae-ft-ema", 83_653_863, 334_643_276, "Load VAE", 2),
    ("c2i_model_256.safetensors", 664_128_016, 2_689_099_888, "Load TiM Model", 1),
    ("c2i_model_512.safetensors", 664_164_896, 2_689_247_408, "Load TiM Model", 1),
])  # fmt: skip
def test_inspect(released, name, parameters, size, node, missing):
    found = json.loads(tim("inspect", "--json", released / name))
    (part,) = found["parts"]
    assert part["parameters"] == parameters and not part["problem"] and len(found["missing"]) == missing
    assert found["places"][0]["node"] == node
    file = released / name
    weights = next(file.glob("*.safetensors")) if file.is_dir() else file
    assert weights.stat().st_size == pytest.approx(size, abs=10_000)


@pytest.fixture(scope="module")
def converted(released):
    for dtype in ("bf16", "fp8"):
        tim("convert", released / "t2i_model.bin", released / f"t2i-{dtype}.safetensors", "--dtype", dtype)
    return {dtype: released / f"t2i-{dtype}.safetensors" for dtype in ("bf16", "fp8")}


def test_convert(converted):
    header = 200_000  # bytes, at most
    assert 0 < converted["bf16"].stat().st_size - 2 * 873_109_408 < header
    assert 0 < converted["fp8"].stat().st_size - (2 * 873_109_408 - 842_268_672) < header
    (part,) = json.loads(tim("inspect", "--json", converted["fp8"]))["parts"]
    assert part["quantized_layers"] == 28 * 12 and part["dtypes"]["float8_e4m3fn"]["parameters"] == 842_268_672 and not part["problem"]


@pytest.fixture(scope="module")
def packed(released, folder_of_parts):
    words = ["--model", released / "t2i_model.bin", "--text-encoder", released / "gemma-3-1b-it"]
    tim("pack", *words, "--vae", released / "dc-ae-f32c32-sana-1.1-diffusers", released / "packed.safetensors", "--dtype", "bf16")
    return released / "packed.safetensors"


def test_one_step_at_512(released, folder_of_parts, packed, converted, tmp_path):
    """From a folder of parts, from one file, from parts in fp8; on the command line and in Python."""
    whole, defaults = answer(tmp_path, packed, "bfloat16", 512)
    parts, _ = answer(tmp_path, folder_of_parts, "bfloat16", 512)
    assert torch.equal(whole, parts) and (defaults.width, defaults.height, defaults.steps, defaults.cfg) == (1024, 1024, 4, 2.5)
    tim("sample", PROMPT, "--model", folder_of_parts, "--dtype", "bf16", "--size", "512x512", "--steps", 1, "-o", tmp_path / "a.png")
    shown = np.asarray(Image.open(tmp_path / "a.png"), np.float32)
    assert np.abs(shown - 255 * whole[0].numpy()).max() <= 1
    small, _ = answer(tmp_path, {"model": str(converted["fp8"]), "text-encoder": str(released / "gemma-3-1b-it"),
                                 "vae": str(released / "dc-ae-f32c32-sana-1.1-diffusers")}, "bfloat16", 512)  # fmt: skip
    difference = (small - whole).std() / whole.std()
    print(f"fp8 against bf16: {difference:.3f} of the deviation")
    assert 0 < difference < 0.5


def run_graph(tmp_path: Path, links: dict[str, Path], build) -> torch.Tensor:
    """Runs a graph in a server of its own -> its image. links: places in the models folder -> files. build(graph) -> latent."""
    server = Server(tmp_path / "comfyui", *find())
    try:
        for place, file in links.items():
            (server.base / "models" / place).parent.mkdir(exist_ok=True)
            (server.base / "models" / place).symlink_to(file, target_is_directory=file.is_dir())
        graph = Graph()
        graph.prompt.clear()
        picture = graph.picture(build(graph))
        started = time.monotonic()
        outputs = server.run(graph.prompt)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        print(f"\n{time.monotonic() - started:.0f} s, peak {peak / 2**20:.1f} GiB: graph with {', '.join(links)}")
        assert peak * 1024 < MOST_MEMORY
        return images_of(server, outputs, picture)
    finally:
        server.stop()


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The image of a graph, in 0..255, and that of Pipeline: within rounding of float32."""
    difference = (found - 255 * expected).abs()
    print(f"graph against Pipeline: at most {difference.max():.2f}, on average {difference.mean():.4f} of 255")
    assert found.shape == expected.shape and difference.max() <= 2


@pytest.mark.comfyui
def test_the_released_parts_in_comfyui(released, folder_of_parts, tmp_path):
    links = {"diffusion_models/t2i_model.bin": released / "t2i_model.bin", "text_encoders/gemma-3-1b-it": released / "gemma-3-1b-it",
             "vae/dc-ae.safetensors": released / "dc-ae-f32c32-sana-1.1-diffusers" / "diffusion_pytorch_model.safetensors"}  # fmt: skip

    def build(graph: Graph) -> list:
        graph.model = graph.add("TiMModelLoader", model_name="t2i_model.bin", weight_dtype="default")
        graph.clip = graph.add("TiMTextEncoderLoader", text_encoder_name="gemma-3-1b-it/")
        graph.vae = graph.add("TiMVAELoader", vae_name="dc-ae.safetensors")
        return graph.tim(graph.empty(512, 512), steps=1)

    found = run_graph(tmp_path, links, build)
    agree(found, answer(tmp_path, folder_of_parts, "float32", 512)[0])


@pytest.mark.comfyui
@pytest.mark.parametrize("kind", ["packed", "fp8"])
def test_converted_files_in_comfyui(kind, released, packed, converted, tmp_path):
    def build(graph: Graph) -> list:
        graph.model, graph.clip, graph.vae = ([graph.add("TiMCheckpointLoader", ckpt_name="packed.safetensors")[0], i] for i in range(3))
        if kind == "fp8":
            graph.model = graph.add("TiMModelLoader", model_name="fp8.safetensors", weight_dtype="default")
        return graph.tim(graph.empty(512, 512), steps=1)

    found = run_graph(tmp_path, {"checkpoints/packed.safetensors": packed, "diffusion_models/fp8.safetensors": converted["fp8"]}, build)
    parts = {"model": str(packed if kind == "packed" else converted["fp8"]), "text-encoder": str(packed), "vae": str(packed)}
    agree(found, answer(tmp_path, parts, "float32", 512)[0])


@pytest.mark.comfyui
def test_classes_at_512(released, tmp_path):
    source = link_parts(released, "classes", transformer="c2i_model_512.safetensors", vae="dc-ae-f32c32-sana-1.1-diffusers")
    assert not json.loads(tim("inspect", "--json", source))["missing"]
    expected, defaults = answer(tmp_path, source, "float32", 512)
    assert (defaults.width, defaults.cfg, defaults.guidance_interval) == (512, 3.0, (0.0, 0.7))
    tim("sample", "golden retriever", "--model", source, "--steps", 1, "-o", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (512, 512)
    links = {"diffusion_models/c2i_model_512.safetensors": released / "c2i_model_512.safetensors",
             "vae/dc-ae.safetensors": released / "dc-ae-f32c32-sana-1.1-diffusers" / "diffusion_pytorch_model.safetensors"}  # fmt: skip

    def build(graph: Graph) -> list:
        graph.model = graph.add("TiMModelLoader", model_name="c2i_model_512.safetensors", weight_dtype="default")
        graph.vae = graph.add("TiMVAELoader", vae_name="dc-ae.safetensors")
        return of_class(graph, 207, 512)

    agree(run_graph(tmp_path, links, build), expected)


@pytest.mark.comfyui
def test_classes_at_256(released, tmp_path):
    """With Stable Diffusion's VAE, which core's own loader loads in the graph."""
    vae = released / "sd-vae-ft-ema" / "diffusion_pytorch_model.safetensors"
    source = link_parts(released, "classes-256", transformer="c2i_model_256.safetensors", vae="sd-vae-ft-ema")
    assert not json.loads(tim("inspect", "--json", source))["missing"]
    expected, defaults = answer(tmp_path, source, "float32", 256)
    assert (defaults.width, defaults.cfg, defaults.guidance_interval) == (256, 2.5, (0.0, 0.6))
    tim("sample", "golden retriever", "--model", source, "--steps", 1, "-o", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (256, 256)

    def build(graph: Graph) -> list:
        graph.model = graph.add("TiMModelLoader", model_name="c2i_model_256.safetensors", weight_dtype="default")
        graph.vae = graph.add("VAELoader", vae_name="sd-vae-ft-ema.safetensors")
        return of_class(graph, 207, 256)

    links = {"diffusion_models/c2i_model_256.safetensors": released / "c2i_model_256.safetensors", "vae/sd-vae-ft-ema.safetensors": vae}
    agree(run_graph(tmp_path, links, build), expected)


def of_class(graph: Graph, label: int, side: int) -> list:
    positive = graph.add("TiMClassLabel", label=str(label))
    return graph.tim(graph.empty(side, side), positive, graph.add("TiMClassLabel", label=""), steps=1)
