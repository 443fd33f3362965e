"""Make the README's screenshot, the templates' thumbnails and the help pages' images of nodes: `python docs/screenshots.py [NAME ...]`.

Every template is run in a real ComfyUI, and its last image is its thumbnail. Of a template whose weights are not here a photograph of its
main node is, and of those of the released text-to-image model, which has not been run, their graph. Nodes and graph are photographed in
the editor (Debian's chromium), each node in a template that has it. Look at the results. ComfyUI is found as the tests find it. NAMEs are
templates, nodes and `graph`, the README's screenshot; without one, all are made.
"""

import json
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests import comfy_support  # noqa: E402
from tests.test_browser import IMAGES, LISTEN, READY, START_EMPTY, TROUBLE  # noqa: E402

SIDE = 400
LAST = {  # template -> the prefix of the image to show, where there are several
    "draft-and-refine": "TiM-refined", "native-upscale": "TiM-large", "image-to-image": "TiM-after", "inpainting": "TiM-after",
    "outpainting": "TiM-after",
}
PHOTOGRAPHED = {"class-conditional": "TiMClassLabel", "lora": "LoraLoaderModelOnly"}  # templates without weights -> the node to show
WHERE = {  # node -> the template that shows it
    "TiMCheckpointLoader": "text-to-image", "TiMEmptyLatent": "text-to-image", "TiMSampler": "text-to-image",
    "TiMModelLoader": "class-conditional", "TiMVAELoader": "class-conditional", "TiMClassLabel": "class-conditional",
    "TiMSamplerSelect": "custom-sampling", "TiMScheduler": "custom-sampling", "TiMGuidanceInterval": "custom-sampling",
    "TiMNativeUpscale": "native-upscale", "TiMStepSweep": "few-steps-to-many", "TiMTextEncoderLoader": "text-to-image-1024",
}
CENTRE = """name => { const node = app.graph._nodes.find(node => node.type === name), canvas = app.canvas, [w, h] = node.size
    const view = canvas.canvas.getBoundingClientRect(); canvas.ds.scale = 1
    canvas.ds.offset[0] = view.width / 2 - node.pos[0] - w / 2; canvas.ds.offset[1] = view.height / 2 - node.pos[1] - h / 2
    canvas.setDirty(true, true); canvas.draw(true, true)
    return [view.left + view.width / 2, view.top + view.height / 2, w, h] }"""
RELEASED = (*comfy_support.RELEASED, *comfy_support.OWN_IMAGE)
GRAPH = """() => { const canvas = app.canvas, view = canvas.canvas.getBoundingClientRect()
    app.graph._nodes.filter(node => node.type === 'MarkdownNote').forEach(node => app.graph.remove(node))
    for (const node of app.graph._nodes.filter(node => node.type === 'TiMSampler')) {  // its live preview
        node.imgs = undefined; node.widgets = node.widgets.filter(widget => widget.name !== '$$canvas-image-preview')
        node.setSize([node.size[0], 0]); node.setSize([node.size[0], node.computeSize()[1]]) }
    const nodes = app.graph._nodes, side = (end, of) => end(...nodes.map(of))
    const left = side(Math.min, node => node.pos[0]), right = side(Math.max, node => node.pos[0] + node.size[0])
    const top = side(Math.min, node => node.pos[1]), bottom = side(Math.max, node => node.pos[1] + node.size[1])
    canvas.ds.scale = 1; canvas.ds.offset[0] = 90 - left; canvas.ds.offset[1] = 190 - top
    canvas.setDirty(true, true); canvas.draw(true, true)
    return [view.left + 90, view.top + 190, right - left, bottom - top] }"""


def workflow(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def thumbnail(server, name: str) -> None:
    prompt = comfy_support.to_api(workflow(name), server.object_info)
    outputs = server.run(prompt)
    saves = {node["inputs"]["filename_prefix"]: key for key, node in prompt.items() if node["class_type"] == "SaveImage"}
    key = saves[LAST.get(name, next(iter(saves)))]
    with Image.open(server.file(outputs[key]["images"][0])) as image:
        small = image.convert("RGB")
    factor = max(1, SIDE // max(small.size))
    large = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    ImageOps.pad(large, (SIDE, SIDE), color=(25, 25, 30)).save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def photograph_graph(page) -> None:
    """docs/graph.jpg: the text-to-image template after a run, without its note and the live preview."""
    show(page, workflow("text-to-image"))
    page.evaluate(LISTEN)
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_function("() => ended.length > 0")
    page.wait_for_function(IMAGES)
    time.sleep(8)  # until the editor's message about the run is gone
    x, y, w, h = page.evaluate(GRAPH)
    time.sleep(2)
    clip = {"x": x - 20, "y": y - 55, "width": w + 40, "height": h + 75}
    page.screenshot(path=str(ROOT / "docs" / "graph.jpg"), type="jpeg", quality=82, clip=clip)


def photograph_template(page, name: str) -> None:
    """The thumbnail of a template whose weights are not at hand: its graph, without the note."""
    show(page, workflow(name))
    x, y, w, h = page.evaluate(GRAPH)
    side = min(max(w + 20, h + 55), 1000)
    if "upscale" in name:  # its last nodes, which no other template has
        page.evaluate("pixels => { app.canvas.ds.offset[0] -= pixels; app.canvas.draw(true, true) }", w + 20 - side)
    time.sleep(2)
    picture = page.screenshot(type="png", clip={"x": x - 10, "y": y - 45, "width": side, "height": min(h + 55, side)})
    with Image.open(BytesIO(picture)) as image:
        ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), color=(25, 25, 30)).save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def photograph(page, name: str) -> None:
    show(page, workflow(WHERE[name]))
    x, y, w, h = page.evaluate(CENTRE, name)
    time.sleep(1)
    width, height = max(w + 380, 720), max(h + 150, 330)
    left, top = max(60, x - width / 2), max(50, y - height / 2 - 15)
    clip = {"x": left, "y": top, "width": min(width, 1690 - left), "height": min(height, 940 - top)}
    page.screenshot(path=str(ROOT / "web" / "docs" / name / "graph.jpg"), type="jpeg", quality=80, clip=clip)


def photograph_thumbnail(page, name: str) -> None:
    """A square around the main node of a template, for the gallery."""
    show(page, workflow(name))
    x, y, w, h = page.evaluate(CENTRE, PHOTOGRAPHED[name])
    time.sleep(1)
    clip = {"x": x - w / 2 - 20, "y": y - w / 2 - 20, "width": w + 40, "height": w + 40}
    shot = Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")
    shot.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def show(page, graph: dict) -> None:
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'shown')", graph)
    time.sleep(2)
    if trouble := page.evaluate(TROUBLE):
        raise SystemExit(f"the editor says {trouble}")


def main(names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    from tests.conftest import find_chromium

    base = Path(tempfile.mkdtemp())
    server = comfy_support.Server(base / "comfyui", *comfy_support.find())
    try:
        comfy_support.make_class_files(server, base / "class")
        comfy_support.make_lora(server, base)
        comfy_support.make_released_files(server, base / "released")
        for file in sorted((ROOT / "workflows").glob("*.json")):
            if file.stem not in (*PHOTOGRAPHED, *RELEASED) and (not names or file.stem in names):
                thumbnail(server, file.stem)
                print(file.stem)
        wanted = [name for name in (*PHOTOGRAPHED, *RELEASED, *WHERE, "graph") if not names or name in names]
        if not wanted:
            return
        with sync_playwright() as playwright:
            options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=options)
            page = browser.new_context(viewport={"width": 2000, "height": 1300}).new_page()
            page.set_default_timeout(240_000)
            server.read("settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False,
                                     "Comfy.Minimap.Visible": False})
            page.add_init_script(START_EMPTY)
            page.goto(f"http://127.0.0.1:{server.port}")
            page.wait_for_function(READY)
            for name in wanted:
                if name in PHOTOGRAPHED:
                    photograph_thumbnail(page, name)
                elif name == "graph":
                    photograph_graph(page)
                else:
                    photograph_template(page, name) if name in RELEASED else photograph(page, name)
                print(name)
            browser.close()
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
