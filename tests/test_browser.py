"""The pack in ComfyUI's own editor, driven in a browser: its templates open and run, its nodes have their help.

TIM_SCREENSHOTS names a folder for the screenshots; without it they are in pytest's own.
"""

import base64
import contextlib
import json
import os
import re
from pathlib import Path

import pytest

from tests.comfy_support import FOLDER, OWN_IMAGE, RELEASED, ROOT, RUN_SECONDS

pytestmark = [pytest.mark.browser, pytest.mark.comfyui]
WITHOUT_WEIGHTS = [ROOT / "workflows" / f"{stem}.json" for stem in (*RELEASED, *OWN_IMAGE)]
WORKFLOWS = sorted({*(ROOT / "workflows").glob("*.json")} - {*WITHOUT_WEIGHTS})
PREPARE = {"class-conditional": "class_files", "lora": "lora_file"}  # workflow -> the fixture that makes the files it names

# a saved empty graph: on a first visit the editor opens a workflow of its own, with models that are missing here
START_EMPTY = "localStorage.setItem('workflow', JSON.stringify({last_node_id: 0, last_link_id: 0, nodes: [], links: [], version: 0.4}))"
READY = """() => window.app?.graph && app.extensionManager && window.LiteGraph?.registered_node_types.KSampler
    && !document.querySelector('#splash-loader')"""
NODES = "() => app.graph.serialize().nodes.map(node => [String(node.id), node.type, node.widgets_values ?? []])"
# missing nodes, missing models and failed runs: dialogs in old front ends, an overlay and errors of the nodes in new ones
TROUBLE = """() => [...document.querySelectorAll('[role=dialog], [role=alertdialog], [data-testid=error-overlay]')]
    .filter(element => element.checkVisibility()).map(element => element.innerText)
    .concat(app.graph._nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types)).map(node => node.type))"""
LISTEN = """() => { window.ended = []; for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    app.api.addEventListener(kind, event => ended.push([kind, event.detail.exception_message ?? ''])) }"""
# advanced inputs that a node sets, but does not show
HIDDEN = """() => app.graph._nodes.filter(node => !node.showAdvanced).flatMap(node => (node.widgets ?? []).filter(widget => {
    const spec = node.constructor.nodeData?.input, [, options] = spec?.required?.[widget.name] ?? spec?.optional?.[widget.name] ?? []
    return options?.advanced && widget.value !== options.default }).map(widget => `${node.title}: ${widget.name}`))"""
IMAGES = """() => { const nodes = app.graph._nodes.filter(node => ['SaveImage', 'PreviewImage'].includes(node.type))
    return nodes.length > 0 && nodes.every(node => node.imgs?.[0]?.naturalWidth > 0) }"""
ALONE = """name => { app.graph._nodes.slice().forEach(node => app.graph.remove(node)); const node = LiteGraph.createNode(name)
    app.graph.add(node); app.canvas.selectNode(node); app.canvas.centerOnNode(node) }"""
PAGE_IMAGES = "[...document.querySelectorAll('.node-help-content img')]"


@pytest.fixture(scope="module")  # not session: while playwright runs, no other test can asyncio.run()
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options, timeout=1000 * RUN_SECONDS)
        yield browser
        browser.close()


@pytest.fixture
def shoot(comfyui, tmp_path):
    """A function that writes a page's screenshot."""
    folder = Path(os.environ.get("TIM_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}-{comfyui.stats['system']['comfyui_version']}.png")


@pytest.fixture
def page(browser, request, shoot):
    """A page that has been nowhere; its last state is kept as a screenshot, whether the test passed or not."""
    context = browser.new_context(viewport={"width": 1920, "height": 1200})
    context.set_default_timeout(1000 * RUN_SECONDS)
    page = context.new_page()
    yield page
    shoot(page, request.node.name.replace("[", "-").rstrip("]"))
    context.close()


def open_editor(page, server) -> None:
    """The empty editor, past its first-run tour, with no way out to other servers."""
    address = f"http://127.0.0.1:{server.port}"
    server.read("settings", {"Comfy.TutorialCompleted": True})
    page.context.route(lambda url: not url.startswith(address), lambda route: route.abort())
    page.add_init_script(START_EMPTY)
    page.goto(address)
    page.wait_for_function(READY)


def open_template(page, server, file: Path) -> None:
    """Opens a template from the gallery: all its nodes and values are there."""
    open_editor(page, server)
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    page.get_by_text(FOLDER, exact=True).click()
    card, cards = page.get_by_test_id(f"template-workflow-{file.stem}"), page.locator("[data-testid^=template-workflow-]")
    cards.first.wait_for()
    if not card.count():  # 0.3.64 makes twelve, and the rest when the last is in view
        cards.last.scroll_into_view_if_needed()
    card.click()
    card.wait_for(state="hidden")
    page.wait_for_function("() => app.graph._nodes.length > 0")
    nodes = json.loads(file.read_text())["nodes"]
    assert sorted(page.evaluate(NODES)) == sorted([str(node["id"]), node["type"], node.get("widgets_values", [])] for node in nodes)


@pytest.fixture
def nothing_released(comfyui):
    """The released model's files are not in the models folders; they come back afterwards."""
    names = ("diffusion_models/t2i_model.bin", "text_encoders/gemma-3-1b-it", "vae/dc-ae-f32c32-sana-1.1.safetensors")
    there = [name for name in (*names, "loras/lora-1024.safetensors") if (comfyui.base / "models" / name).exists()]
    away = comfyui.base / "away"
    for name in there:
        (away / name).parent.mkdir(parents=True, exist_ok=True)
        (comfyui.base / "models" / name).rename(away / name)
    yield
    for name in there:
        (away / name).rename(comfyui.base / "models" / name)


@pytest.mark.parametrize("file", WITHOUT_WEIGHTS, ids=lambda file: file.stem)
def test_missing_models_are_listed(comfyui, nothing_released, page, file):
    """In a dialog, or behind a button of the error message. No node is unknown."""
    open_template(page, comfyui, file)
    models = [model for node in json.loads(file.read_text())["nodes"] for model in node["properties"].get("models", [])]
    assert len(models) == 3
    listed = f"() => {json.dumps([model['name'] for model in models])}.every(name => document.body.innerText.includes(name))"
    more = page.get_by_text(re.compile("^(View details|Show missing models)$"))
    more.or_(page.get_by_text("Missing Models", exact=True)).first.wait_for()
    if more.count():
        more.first.click()
    page.wait_for_function(listed)
    assert page.evaluate("() => app.graph._nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).length") == 0


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_template(request, comfyui, page, file):
    if file.stem in PREPARE:
        request.getfixturevalue(PREPARE[file.stem])
    open_template(page, comfyui, file)
    assert page.evaluate(TROUBLE) == [] and page.evaluate(HIDDEN) == []

    page.evaluate("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    page.evaluate(LISTEN)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"() => ended.length > 0 || ({TROUBLE})().length > 0")
    assert page.evaluate("() => ended") == [["execution_success", ""]], page.evaluate(TROUBLE)
    page.wait_for_function(IMAGES)
    assert page.evaluate(TROUBLE) == []


# what a node hides: another node, or a link that passes behind it; the node's own links may reach 16 pixels in. At half the size.
HIDDEN_BEHIND = """() => { const graph = app.graph, found = [], paths = [], canvas = new OffscreenCanvas(1, 1)
    const title = node => node.title ?? node.type
    const box = node => [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]
    for (const a of graph._nodes) for (const b of graph._nodes) { const [l, t, r, d] = box(a), [L, T, R, D] = box(b)
        if (a.id < b.id && l < R && L < r && t < D && T < d) found.push(`${title(a)}: overlaps ${title(b)}`) }
    for (const link of graph.links.values()) { paths.push([link, link.path])
        for (let id = link.parentId; id != null; id = graph.reroutes.get(id).parentId) paths.push([link, graph.reroutes.get(id).path]) }
    for (const node of graph._nodes) { const [l, t, r, d] = box(node), w = canvas.width = (r - l) / 2, h = canvas.height = (d - t) / 2
        const context = canvas.getContext('2d', {willReadFrequently: true}); context.scale(0.5, 0.5); context.translate(-l, -t)
        const own = ([link]) => [link.origin_id, link.target_id].includes(node.id), other = pair => !own(pair)
        const seen = (pairs, edge) => { context.clearRect(l, t, r - l, d - t); pairs.forEach(([, path]) => context.stroke(path))
            return new Uint32Array(context.getImageData(edge, edge, w - 2 * edge, h - 2 * edge).data.buffer).some(pixel => pixel) }
        for (const [kind, edge] of [[own, 8], [other, 2]]) if (seen(paths.filter(kind), edge))
            for (const pair of paths.filter(kind)) if (seen([pair], edge))
                found.push(`${title(node)}: hides the ${pair[0].type} of ${title(graph.getNodeById(pair[0].origin_id))}`) }
    return [...new Set(found)] }"""
FIT = """() => { const {canvas, graph} = app; canvas.ds.scale = 0.4; canvas.ds.offset[0] = 400; canvas.ds.offset[1] = 300
    canvas.setDirty(true, true); canvas.draw(true, true) }"""
DRAWN = "() => app.graph.links.size > 0 && [...app.graph.links.values()].every(link => link.path)"


@pytest.mark.parametrize("nodes_2", [False, True], ids=["litegraph", "nodes-2"])
def test_templates_hide_nothing(comfyui, page, nodes_2):
    from playwright.sync_api import TimeoutError

    comfyui.read("settings", {"Comfy.VueNodes.Enabled": nodes_2})
    found = {}
    try:
        open_editor(page, comfyui)
        if nodes_2 and page.evaluate("() => app.ui.settings.settingsLookup['Comfy.VueNodes.Enabled'].type") == "hidden":
            pytest.skip("Nodes 2.0 is hidden in this version's settings")
        for file in sorted((ROOT / "workflows").glob("*.json")):
            page.evaluate("graph => app.loadGraphData(graph, true, true, 'shown')", json.loads(file.read_text(encoding="utf-8")))
            page.evaluate(FIT)
            page.wait_for_function(DRAWN)
            with contextlib.suppress(TimeoutError):  # until Nodes 2.0 has measured its nodes
                page.wait_for_function(f"() => ({HIDDEN_BEHIND})().length === 0", timeout=4000, polling=200)
            found[file.stem] = page.evaluate(HIDDEN_BEHIND)
    finally:
        comfyui.read("settings", {"Comfy.VueNodes.Enabled": False})
    assert {name: hidden for name, hidden in found.items() if hidden} == {}


CONNECT = """([kind, name]) => { const source = LiteGraph.createNode(kind), target = LiteGraph.createNode(name)
    app.graph.add(source); app.graph.add(target); const slot = target.findInputSlot('steps')
    return [Boolean(source.connect(0, target, slot)), target.inputs[slot].link != null, target.widgets.some(w => w.name === 'steps')] }"""


@pytest.mark.parametrize("name", ["TiMNativeUpscale", "TiMStepSweep"])
def test_steps_are_a_widget_that_takes_numbers_and_text(comfyui, page, name):
    open_editor(page, comfyui)
    for kind in ("PrimitiveInt", "PrimitiveString"):
        assert page.evaluate(CONNECT, [kind, name]) == [True, True, True], kind
    assert page.evaluate(CONNECT, ["PrimitiveFloat", name]) == [False, False, True]


DROP = """async ([name, data]) => { app.graph.clear()
    const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0))
    await app.handleFile(new File([bytes], name, {type: 'image/png'})) }"""


def test_an_image_dragged_back_restores_the_graph(comfyui, page):
    """Also the seed, which the editor changes after the run."""
    workflow = json.loads((ROOT / "workflows" / "text-to-image.json").read_text(encoding="utf-8"))
    before = sorted([str(node["id"]), node["type"], node.get("widgets_values", [])] for node in workflow["nodes"])
    open_editor(page, comfyui)
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'shared')", workflow)
    page.evaluate(LISTEN)
    page.evaluate("() => app.queuePrompt(0)")
    page.wait_for_function("() => ended.length > 0")
    assert page.evaluate("() => ended") == [["execution_success", ""]] and sorted(page.evaluate(NODES)) != before
    image = max((comfyui.base / "output").glob("TiM_*.png"), key=lambda file: file.stat().st_mtime)
    page.evaluate(DROP, [image.name, base64.b64encode(image.read_bytes()).decode()])
    page.wait_for_function("() => app.graph._nodes.length > 0")
    assert sorted(page.evaluate(NODES)) == before and page.evaluate(TROUBLE) == []


SEARCH = """word => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef')
    .nodeSearchService.searchNode(word).map(node => node.name)"""
WORDS = {
    "imagenet": "TiMClassLabel", "few step": "TiMSampler", "hires fix": "TiMNativeUpscale", "xy plot": "TiMStepSweep",
    "sigmas": "TiMScheduler", "aspect ratio": "TiMEmptyLatent", "transition models": "TiMModelLoader",
    "tim checkpoint": "TiMCheckpointLoader", "gemma": "TiMTextEncoderLoader", "dc-ae": "TiMVAELoader",
    "step sweep": "TiMStepSweep", "native upscale": "TiMNativeUpscale",
}


# how often nodes are used, which the editor reads after its start, puts them first among what matches by more than its name
FREQUENCIES = """() => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeFrequency')
    ?.nodeNamesByFrequency.length > 0"""
VISIBLE_ROWS = 12


def test_search_finds_the_nodes(comfyui, page):
    """Without scrolling."""
    open_editor(page, comfyui)
    page.wait_for_function(FREQUENCIES)
    found = {word: page.evaluate(SEARCH, word)[:VISIBLE_ROWS] for word in WORDS}
    assert {word: name for word, name in WORDS.items() if name not in found[word]} == {}


def test_help(comfyui, page, shoot):
    """The page's heading, first paragraph and images; without a page the editor shows the node's description."""
    ours = [name for name, info in comfyui.object_info.items() if info["python_module"] == f"custom_nodes.{FOLDER}"]
    assert ours and all(name.startswith("TiM") for name in ours)
    pages = {name: ROOT / "web" / "docs" / name / "en.md" for name in ours}
    lacking = [name for name in ours if not pages[name].is_file()]
    open_editor(page, comfyui)
    for name in (name for name in ours if name not in lacking):
        heading, first = pages[name].read_text().split("\n\n")[:2]
        page.evaluate(ALONE, name)
        page.get_by_test_id("info-button").click()
        shown = page.locator(".node-help-content").filter(has=page.get_by_role("heading", name=heading.lstrip("# "), exact=True))
        shown.filter(has_text=re.sub(r"[*`]", "", first)).wait_for()
        page.wait_for_function(f"() => {PAGE_IMAGES}.every(image => image.complete)")
        lacking += page.evaluate(f"() => {PAGE_IMAGES}.filter(image => !image.naturalWidth).map(image => image.src)")
        shoot(page, f"test_help-{name}")
    assert lacking == []
