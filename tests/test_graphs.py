"""The tables of tests/graphs in the real ComfyUI."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.comfy_graph import BUNDLED_NAME
from tests.graphs import conditioning, guiders, latents, patches, samplers, schedules, surgery
from tests.graphs.case import COMPLETE, Case, CaseGraph, Missing
from tim_core.weights.parts import BUNDLED

pytestmark = pytest.mark.comfyui

FAMILIES = (samplers, schedules, guiders, patches, conditioning, latents, surgery)
CASES = [
    pytest.param(case, id=f"{family.__name__.rsplit('.', 1)[-1]}: {case.name}") for family in FAMILIES for case in family.CASES
]


def at_least(version: str, wanted: str) -> bool:
    return [int(number) for number in version.split(".")[:3]] >= [int(number) for number in wanted.split(".")]


def make_loras(server, folder) -> None:
    """Of the bundled model, of another one, and of wrong shapes."""
    torch.manual_seed(0)
    key = "blocks.3.attn.qkv"
    with safe_open(BUNDLED["tim-shapes"], "pt") as file:
        rows, columns = file.get_slice(f"model.diffusion_model.{key}.weight").get_shape()

    def lora(name: str, rows: int) -> dict:
        return {f"{name}.lora_A.weight": 0.1 * torch.randn(4, columns), f"{name}.lora_B.weight": 0.1 * torch.randn(rows, 4)}

    files = {
        surgery.LORA: lora(f"diffusion_model.{key}", rows), surgery.FOREIGN: lora("lora_unet_input_blocks_1_attn", rows),
        surgery.MISSHAPEN: lora(f"diffusion_model.{key}", rows + 8),
    }
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        server.add("loras", folder / name, name)


@pytest.fixture(scope="module")
def loras(comfyui, tmp_path_factory) -> None:
    make_loras(comfyui, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def saved_latent(comfyui) -> None:
    graph = CaseGraph(comfyui, BUNDLED_NAME, 1)
    save = graph.save(latents.image(graph))
    shutil.copyfile(comfyui.file(comfyui.run(graph.prompt)[save]["latents"][0]), comfyui.base / "input" / latents.SAVED)


@pytest.mark.usefixtures("loras", "saved_latent")
@pytest.mark.parametrize("case", CASES)
def test_graph(comfyui, case: Case):
    try:
        case.run(comfyui)
    except Missing as missing:
        version = comfyui.stats["system"]["comfyui_version"]
        assert not at_least(version, COMPLETE), f"{missing}: misspelt, or gone from ComfyUI {version}"
        pytest.skip(f"ComfyUI {version} has {missing}")
