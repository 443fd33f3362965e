"""The shipped workflows, read as files: what the editor and the Manager take from them."""

import json
import re
from pathlib import Path

import pytest

import tim_core
from tim_core.weights.download import RELEASES

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
OURS = "TiM"
HUB = "https://huggingface.co"
ENDINGS = (".safetensors", ".bin")
PUBLISHED = {  # folder and name -> link, as `tim download --comfyui` places them
    tuple(asset.place.split("/", 1)): f"{HUB}/{asset.source.repository}/resolve/main/{asset.name}"
    for release in RELEASES.values() for asset in release
}  # fmt: skip


def test_only_templates_are_in_the_folder():
    names = {file.name for file in FOLDER.iterdir()}
    assert names and names == {file.with_suffix(suffix).name for file in WORKFLOWS for suffix in (".json", ".jpg")}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow(file):
    workflow = json.loads(file.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    for link_id, source, output, target, slot, kind in workflow["links"]:
        assert link_id in nodes[source]["outputs"][output]["links"] and nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == link_id and nodes[target]["inputs"][slot]["type"] == kind
    ours = [node for node in nodes.values() if node["type"].startswith(OURS)]
    assert ours
    for node in ours:
        wanted = {"cnr_id": "transition-models", "ver": tim_core.__version__, "Node name for S&R": node["type"]}
        assert node["properties"].items() >= wanted.items()
        if "Loader" in node["type"]:  # none where the chosen file comes with the pack: the editor offers to download what is listed
            models = node["properties"]["models"]
            assert [model["name"] for model in models] == [name for name in node["widgets_values"] if name.endswith(ENDINGS)]
            for model in models:
                assert model["url"] == PUBLISHED[model["directory"], model["name"]]
    note = " ".join(text for node in nodes.values() if "Note" in node["type"] for text in node["widgets_values"])
    licences = ("Apache-2.0", "MIT") if file.stem == "class-conditional" else ("Apache-2.0", "MIT", "Gemma terms")
    folders = ("| vae |",) if file.stem == "class-conditional" else ("| text_encoders/", "| vae", "models/checkpoints")
    for word in ("| diffusion_models |", *folders, *licences):
        assert word in note
    assert re.search(r"\d+ (equal )?steps|steps \"?\d", note) and re.search(r"cfg \d", note)
    assert "`" not in note  # inline code is hard to read in the notes of Nodes 2.0


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_second_run_makes_other_images(file):
    """The seed changes after the first run, which is the one of the thumbnail; samplers to compare share one."""
    workflow = json.loads(file.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert any("randomize" in node.get("widgets_values", []) for node in nodes.values())
    pairs = [(nodes[source], nodes[target]) for _, source, _, target, _, _ in workflow["links"]]
    assert all(source["widgets_values"][0] == target["widgets_values"][0] for source, target in pairs if source["type"] == "PrimitiveNode")
