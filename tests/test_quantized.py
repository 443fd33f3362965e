"""8-bit checkpoints in the real ComfyUI: core's own quantised layers, the same image as Pipeline, LoRA, saving."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfy_graph import Graph, close, latent_of, run_images, run_latents, same_image
from tests.comfy_support import probe
from tests.test_convert import PREFIX, PROMPT, write_fp8
from tim_core.pipeline import Pipeline
from tim_core.weights.precision import Losses
from tim_core.weights.quantized import quantize
from tim_core.weights.read import read_parts
from tim_core.weights.save import convert

pytestmark = pytest.mark.comfyui
SPELLINGS = ("current", "older")


@pytest.fixture(scope="module")
def fp8(comfyui, tiny, tmp_path_factory):
    """The tiny checkpoint in 8 bits, in both spellings, among the server's checkpoints."""
    folder = write_fp8(tiny, tmp_path_factory.mktemp("fp8"))
    for name in SPELLINGS:
        comfyui.add("checkpoints", folder / f"{name}.safetensors", f"fp8-{name}.safetensors")
    convert(folder / "current.safetensors", folder / "wide.safetensors", torch.float32)
    return folder


def stored(model):

    found = {}
    for name, module in model.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear" and weight is not None:
            raw = getattr(weight, "_qdata", weight)
            found[name] = [str(raw.dtype), type(weight).__name__ if raw is not weight else "", hasattr(module, "scale_weight")]
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_core_s_own_layers_hold_the_8_bit_weights(comfyui, fp8, spelling):
    graph = Graph(f"fp8-{spelling}.safetensors")
    node = graph.add("TiMTestProbe", **probe(stored), model=graph.model)[0]
    latent = graph.save(graph.tim())
    outputs = comfyui.run(graph.prompt)
    layers = json.loads(outputs[node]["text"][0])
    quantized = read_parts(fp8 / "current.safetensors")["transformer"].quantized
    assert quantized.keys() == {name for name, (dtype, *_) in layers.items() if dtype == "torch.float8_e4m3fn"}
    assert all(kind == "QuantizedTensor" or has_scale for dtype, kind, has_scale in (layers[name] for name in quantized))
    plain = run_latents(comfyui, graph := Graph(), graph.tim())[0]
    difference = (latent_of(comfyui, outputs, latent) - plain).std() / plain.std()
    assert 0 < difference < 0.1, difference


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_image_is_that_of_pipeline(comfyui, fp8, spelling):
    found = run_images(comfyui, graph := Graph(f"fp8-{spelling}.safetensors"), graph.tim())
    same_image(found, Pipeline.load(fp8 / f"{spelling}.safetensors", "cpu", "float32")([PROMPT]))


def test_bf16_takes_the_scales_off(comfyui, fp8, tmp_path):
    weights = {key: value for key, value in load_file(fp8 / "current.safetensors").items() if key.startswith(PREFIX)}
    save_file(weights, tmp_path / "model.safetensors")
    comfyui.add("diffusion_models", tmp_path / "model.safetensors", "fp8-model.safetensors")
    kinds = {}
    for weight_dtype in ("default", "bf16", "fp8_e4m3fn", "fp8_e4m3fn_fast"):
        graph = Graph()
        graph.model = graph.add("TiMModelLoader", model_name="fp8-model.safetensors", weight_dtype=weight_dtype)
        node = graph.add("TiMTestProbe", **probe(stored), model=graph.model)[0]
        save = graph.save(graph.tim())
        outputs = comfyui.run(graph.prompt)
        kinds[weight_dtype] = json.loads(outputs[node]["text"][0])["blocks.0.mlp.fc2"][0], latent_of(comfyui, outputs, save)
    assert [dtype for dtype, _ in kinds.values()] == [f"torch.{name}" for name in ("float8_e4m3fn", "bfloat16", *["float8_e4m3fn"] * 2)]
    default = kinds["default"][1]
    assert all((latent - default).std() < 0.05 * default.std() for _, latent in kinds.values())


def test_a_lora_and_saving(comfyui, fp8, tmp_path):
    """Core rounds the patched weight to 8 bits, stochastically: the result differs from the exact sum by that rounding and no more."""
    torch.manual_seed(0)
    key = "diffusion_model.blocks.1.attn.qkv"
    name = f"model.{key}.weight"
    weights, strength = load_file(fp8 / "wide.safetensors"), 0.7
    weights[name][0, 0] = 4 * weights[name].abs().max()  # so that the sum fits the scale of the weight, which 0.3.64 keeps
    save_file(weights, tmp_path / "base.safetensors")
    convert(tmp_path / "base.safetensors", tmp_path / "small.safetensors", torch.float8_e4m3fn)
    exact = load_file(convert(tmp_path / "small.safetensors", tmp_path / "exact.safetensors", torch.float32))
    rows, columns = exact[name].shape
    lora = {f"{key}.lora_A.weight": torch.randn(2, columns) / 8, f"{key}.lora_B.weight": torch.randn(rows, 2) / 2}
    lora[f"{key}.lora_B.weight"][0] = 0  # leaves the largest value
    change = strength * lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
    merged = exact | {name: exact[name] + change}
    assert merged[name].abs().max() <= exact[name].abs().max()
    stored, scale = quantize(name, merged[name], Losses())
    rounding = (stored.float() * scale - merged[name]).norm() / change.norm()  # to nearest; stochastically sqrt(2) times as much
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    comfyui.add("loras", tmp_path / "lora.safetensors", "fp8-lora.safetensors")
    for file in ("small", "merged"):
        comfyui.add("checkpoints", tmp_path / f"{file}.safetensors", f"fp8-lora-{file}.safetensors")
    graph = Graph("fp8-lora-small.safetensors")
    graph.add("CheckpointSave", model=graph.model, clip=graph.clip, vae=graph.vae, filename_prefix="saved/fp8")
    plain = run_latents(comfyui, graph, graph.tim())[0]
    graph = Graph("fp8-lora-small.safetensors")
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name="fp8-lora.safetensors", strength_model=strength)
    patched = run_latents(comfyui, graph, graph.tim())[0]
    expected = run_latents(comfyui, graph := Graph("fp8-lora-merged.safetensors"), graph.tim())[0]
    difference = (patched - expected).std() / (expected - plain).std()
    assert 0 < difference < 2 * 2**0.5 * rounding < 0.2, (difference, rounding)
    saved = next((comfyui.base / "output" / "saved").glob("fp8*.safetensors"))
    assert read_parts(saved)["transformer"].quantized.keys() == read_parts(fp8 / "current.safetensors")["transformer"].quantized.keys()
    comfyui.add("checkpoints", saved, "fp8-saved.safetensors")
    close(run_latents(comfyui, graph := Graph("fp8-saved.safetensors"), graph.tim())[0], plain, 1e-5)
