"""The pack in ComfyUI's own editor, driven in a browser: its templates open and run, its nodes have their help.

TIM_SCREENSHOTS names a folder for the screenshots; without it they are in pytest's own.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.comfy_support import FOLDER, ROOT, RUN_SECONDS

pytestmark = [pytest.mark.browser, pytest.mark.comfyui]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PREPARE = {"class-conditional": "class_files"}  # workflow -> the fixture that makes the files it names

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


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_template(request, comfyui, page, file):
    if file.stem in PREPARE:
        request.getfixturevalue(PREPARE[file.stem])
    open_editor(page, comfyui)
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    page.get_by_text(FOLDER, exact=True).click()
    card = page.get_by_test_id(f"template-workflow-{file.stem}")
    card.click()
    card.wait_for(state="hidden")
    page.wait_for_function("() => app.graph._nodes.length > 0")
    nodes = json.loads(file.read_text())["nodes"]
    assert sorted(page.evaluate(NODES)) == sorted([str(node["id"]), node["type"], node.get("widgets_values", [])] for node in nodes)
    assert page.evaluate(TROUBLE) == [] and page.evaluate(HIDDEN) == []

    page.evaluate("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    page.evaluate(LISTEN)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"() => ended.length > 0 || ({TROUBLE})().length > 0")
    assert page.evaluate("() => ended") == [["execution_success", ""]], page.evaluate(TROUBLE)
    page.wait_for_function(IMAGES)
    assert page.evaluate(TROUBLE) == []


CONNECT = """([kind, name]) => { const source = LiteGraph.createNode(kind), target = LiteGraph.createNode(name)
    app.graph.add(source); app.graph.add(target); const slot = target.findInputSlot('steps')
    return [Boolean(source.connect(0, target, slot)), target.inputs[slot].link != null, target.widgets.some(w => w.name === 'steps')] }"""


@pytest.mark.parametrize("name", ["TiMNativeUpscale", "TiMStepSweep"])
def test_steps_are_a_widget_that_takes_numbers_and_text(comfyui, page, name):
    open_editor(page, comfyui)
    for kind in ("PrimitiveInt", "PrimitiveString"):
        assert page.evaluate(CONNECT, [kind, name]) == [True, True, True], kind
    assert page.evaluate(CONNECT, ["PrimitiveFloat", name]) == [False, False, True]


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
