"""The tables of tests/graphs in the real ComfyUI."""

import pytest

from tests.graphs import conditioning, guiders, latents, patches, samplers, schedules
from tests.graphs.case import COMPLETE, Case, Missing

pytestmark = pytest.mark.comfyui

FAMILIES = (samplers, schedules, guiders, patches, conditioning, latents)
CASES = [
    pytest.param(case, id=f"{family.__name__.rsplit('.', 1)[-1]}: {case.name}") for family in FAMILIES for case in family.CASES
]


def at_least(version: str, wanted: str) -> bool:
    return [int(number) for number in version.split(".")[:3]] >= [int(number) for number in wanted.split(".")]


@pytest.mark.parametrize("case", CASES)
def test_graph(comfyui, case: Case):
    try:
        case.run(comfyui)
    except Missing as missing:
        version = comfyui.stats["system"]["comfyui_version"]
        assert not at_least(version, COMPLETE), f"{missing}: misspelt, or gone from ComfyUI {version}"
        pytest.skip(f"ComfyUI {version} has {missing}")
