"""Makes the templates' thumbnails and the help pages' pictures of nodes, in a real ComfyUI: `python docs/node_pictures.py [NAME ...]`.

Every template is run, and its last picture is its thumbnail; every node is photographed in the editor (Debian's chromium), in a
template that has it. Look at them. ComfyUI is found as the tests find it; NAMEs are templates and nodes, all if there are none.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests import comfy_support  # noqa: E402
from tests.test_browser import READY, START_EMPTY, TROUBLE  # noqa: E402

SIDE = 400
LAST = {  # template -> the prefix of the picture to show, where there are several
    "draft-and-refine": "TiM-refined", "native-upscale": "TiM-large", "image-to-image": "TiM-after", "inpainting": "TiM-after",
}
WHERE = {  # node -> the template that shows it
    "TiMCheckpointLoader": "text-to-image", "TiMEmptyLatent": "text-to-image", "TiMSampler": "text-to-image",
    "TiMModelLoader": "class-conditional", "TiMVAELoader": "class-conditional", "TiMClassLabel": "class-conditional",
    "TiMSamplerSelect": "custom-sampling", "TiMScheduler": "custom-sampling", "TiMGuidanceInterval": "custom-sampling",
    "TiMNativeUpscale": "native-upscale", "TiMStepSweep": "few-steps-to-many", "TiMTextEncoderLoader": "text-to-image",
}
CENTRE = """name => { const node = app.graph._nodes.find(node => node.type === name), canvas = app.canvas, [w, h] = node.size
    const view = canvas.canvas.getBoundingClientRect(); canvas.ds.scale = 1
    canvas.ds.offset[0] = view.width / 2 - node.pos[0] - w / 2; canvas.ds.offset[1] = view.height / 2 - node.pos[1] - h / 2
    canvas.setDirty(true, true); canvas.draw(true, true)
    return [view.left + view.width / 2, view.top + view.height / 2, w, h] }"""


def workflow(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def with_text_encoder_loader(graph: dict) -> dict:
    """The template with its CLIP from a loader of its own."""
    loader = next(node for node in graph["nodes"] if node["type"] == "TiMCheckpointLoader")
    number = graph["last_node_id"] + 1
    links = [link for link in graph["links"] if link[5] == "CLIP"]
    x, y = loader["pos"]
    graph["nodes"].append({
        "id": number, "type": "TiMTextEncoderLoader", "pos": [x, y + 160], "size": [320, 90], "flags": {}, "order": 0, "mode": 0,
        "inputs": [], "outputs": [{"name": "CLIP", "type": "CLIP", "links": [link[0] for link in links], "slot_index": 0}],
        "properties": {}, "widgets_values": ["tim-shapes (bundled)"]})
    for link in links:
        link[1:3] = [number, 0]
    for output in loader["outputs"]:
        output["links"] = [] if output["type"] == "CLIP" else output["links"]
    graph["last_node_id"] = number
    return graph


def thumbnail(server, name: str) -> None:
    prompt = comfy_support.to_api(workflow(name), server.object_info)
    outputs = server.run(prompt)
    saves = {node["inputs"]["filename_prefix"]: key for key, node in prompt.items() if node["class_type"] == "SaveImage"}
    key = saves[LAST.get(name, next(iter(saves)))]
    with Image.open(server.file(outputs[key]["images"][0])) as picture:
        small = picture.convert("RGB")
    factor = max(1, SIDE // max(small.size))
    large = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    ImageOps.pad(large, (SIDE, SIDE), color=(25, 25, 30)).save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def photograph(page, server, name: str) -> None:
    graph = workflow(WHERE[name])
    graph = with_text_encoder_loader(graph) if name == "TiMTextEncoderLoader" else graph
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'shown')", graph)
    time.sleep(2)
    if trouble := page.evaluate(TROUBLE):
        raise SystemExit(f"{name}: the editor says {trouble}")
    x, y, w, h = page.evaluate(CENTRE, name)
    time.sleep(1)
    width, height = max(w + 380, 720), max(h + 150, 330)
    left, top = max(60, x - width / 2), max(50, y - height / 2 - 15)
    clip = {"x": left, "y": top, "width": min(width, 1490 - left), "height": min(height, 940 - top)}
    page.screenshot(path=str(ROOT / "web" / "docs" / name / "graph.jpg"), type="jpeg", quality=80, clip=clip)


def main(names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    from tests.conftest import find_chromium

    base = Path(tempfile.mkdtemp())
    server = comfy_support.Server(base / "comfyui", *comfy_support.find())
    try:
        comfy_support.make_class_files(server, base / "class")
        for file in sorted((ROOT / "workflows").glob("*.json")):
            if not names or file.stem in names:
                thumbnail(server, file.stem)
                print(file.stem)
        wanted = [name for name in WHERE if not names or name in names]
        if not wanted:
            return
        with sync_playwright() as playwright:
            options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=options)
            page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
            page.set_default_timeout(240_000)
            server.read("settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False})
            page.add_init_script(START_EMPTY)
            page.goto(f"http://127.0.0.1:{server.port}")
            page.wait_for_function(READY)
            for name in wanted:
                photograph(page, server, name)
                print(name)
            browser.close()
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
