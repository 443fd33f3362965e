"""What saved graphs depend on: the nodes' ids, their inputs in the order of the editor's widgets, their outputs.

interface.json holds them. A change to it breaks the workflows of users, whose widgets are saved by position: add inputs at the end, as
optional ones.
"""

import json
from pathlib import Path

import pytest

from tests.comfy_support import FOLDER

pytestmark = pytest.mark.comfyui
PINNED = json.loads(Path(__file__).with_name("interface.json").read_text(encoding="utf-8"))


def interface(info: dict) -> dict:
    """A node's entry in object_info without its texts, defaults, ranges and file names."""

    def inputs(group: str) -> dict:
        described = {}
        for name in info["input_order"].get(group, []):
            kind, options = (info["input"][group][name] + [{}])[:2]
            known = {key: options[key] for key in ("advanced", "control_after_generate") if key in options}
            choices = None if name.endswith("_name") else options.get("options")
            described[name] = {"type": kind, **known, **({"options": choices} if choices else {})}
        return described

    outputs = [list(each) for each in zip(info["output"], info["output_name"])]
    return {"required": inputs("required"), "optional": inputs("optional"), "outputs": outputs}


def test_nodes_are_as_saved_graphs_know_them(comfyui):
    found = {name: interface(info) for name, info in comfyui.object_info.items() if info["python_module"] == f"custom_nodes.{FOLDER}"}
    assert list(found) == list(PINNED)
    for name, pinned in PINNED.items():
        assert json.dumps(found[name], indent=1) == json.dumps(pinned, indent=1), name  # as text: the order counts
