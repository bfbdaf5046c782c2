"""The real editor in Chromium: workflows open, run and show their picture, templates and help pages are there.

Each test leaves screenshots in `.dev/screenshots`.
"""
import json
import time

import pytest

from devtools import demo
from devtools.browser import SETTINGS, Browser, find_chromium
from devtools.environment import DEV
from devtools.server import PACK, ROOT

WORKFLOWS = [*sorted((ROOT / "example_workflows").glob("*.json")),
             *sorted((ROOT / "tests" / "server" / "legacy_workflows").glob("*.json"))]
NODES = "[app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap(graph => graph.nodes)"  # also inside subgraphs
MISSING_NODES = f"{NODES}.filter(node => !(node.type in LiteGraph.registered_node_types)).map(node => node.type)"
RED_NODES = f"{NODES}.filter(node => node.has_errors).map(node => node.type)"  # also those that want files which are not here
# Opens a workflow as a file that is dropped on the page; gives how many nodes it then has.
OPEN = """(async (name, text) => {
  app.graph.clear()
  await app.handleFile(new File([text], name, {type: 'application/json'}))
  return app.graph.nodes.length
})"""
SAVED = "app.graph.nodes.find(node => node.type === 'SaveImage')"
# Where on the page the right arrow of a number is.
ARROW = """((type, name) => {
  const node = app.graph.nodes.find(node => node.type === type), {scale, offset} = app.canvas.ds
  const widget = node.widgets.find(widget => widget.name === name), box = app.canvas.canvas.getBoundingClientRect()
  return [box.x + (node.pos[0] + node.size[0] - 25 + offset[0]) * scale,
          box.y + (node.pos[1] + widget.last_y + 10 + offset[1]) * scale]
})"""


@pytest.fixture(scope="module")
def browser(server):
    if find_chromium() is None:
        pytest.skip("there is no Chromium: install it, or let `python3 dev.py test` fetch one")
    server.post("/settings", SETTINGS)
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    browser.open_editor(server.url)
    return browser


def keep(page, name: str):
    """A screenshot for whoever wants to look."""
    folder = DEV / "screenshots"
    folder.mkdir(exist_ok=True)
    page.screenshot().save(folder / f"{name}.png")


def test_a_dropped_workflow_runs_with_a_changed_number_and_shows_its_picture(page, server):
    page.drop(demo.WORKFLOW)
    page.wait_for(f"!!{SAVED}")
    assert not page.evaluate(RED_NODES)
    keep(page, "workflow")
    nodes = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))["nodes"]
    sampler, latent = (next(node for node in nodes if node["type"] == kind) for kind in ("KSampler", "EmptySD3LatentImage"))
    page.click(*page.evaluate(f"{ARROW}('KSampler', 'steps')"))
    page.click_on("document.querySelector('[data-testid=queue-button]')")
    width, source = page.wait_for(f"(img => img?.naturalWidth && [img.naturalWidth, img.src])({SAVED}.imgs?.[0])", 600)
    keep(page, "picture")
    assert width == latent["widgets_values"][0] and "filename=featherweight_demo" in source
    ran = list(server.get_json("/history").values())[-1]["prompt"][2]
    assert ran[str(sampler["id"])]["inputs"]["steps"] == sampler["widgets_values"][2] + 1


def test_a_template_opens_from_the_template_browser(page):
    page.click_on("[...document.querySelectorAll('button')].find(button => button.ariaLabel === 'Templates')")
    page.click_on(f"[...document.querySelectorAll('[role=dialog] *')].find(item => item.textContent.trim() === '{PACK}'"
                  " && !item.children.length)")
    card = f"document.querySelector('[data-testid=\"template-workflow-{demo.LORA_WORKFLOW.stem}\"]')"
    page.wait_for(f"{card}?.querySelector('img')?.naturalWidth")
    keep(page, "templates")
    page.click_on(card)
    page.wait_for("app.graph.nodes.some(node => node.type === 'FeatherweightApplyLora')")
    assert not page.evaluate(RED_NODES)
    keep(page, "template")


def test_the_help_page_of_a_node_opens(page):
    page.drop(demo.LORA_WORKFLOW)
    node = "app.graph.nodes.find(node => node.type === 'FeatherweightApplyLora')"
    page.wait_for(node + " !== undefined")
    page.evaluate(f"(node => {{ app.canvas.centerOnNode(node); app.canvas.selectNode(node) }})({node})")
    time.sleep(1.5)  # the buttons above the node move with it
    page.click_on("document.querySelector('[data-testid=info-button]')")
    page.wait_for("!!document.querySelector('.node-help-content h1')")
    text = page.evaluate("document.querySelector('.node-help-content').innerText")
    keep(page, "help")
    written = (ROOT / "nodes" / "web" / "docs" / "FeatherweightApplyLora.md").read_text(encoding="utf-8")
    assert text.startswith(written.splitlines()[0].removeprefix("# ")) and "block_weights" in text


def test_no_workflow_opens_with_a_missing_node(page):
    missing = {}
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        assert page.evaluate(f"{OPEN}({json.dumps(path.name)}, {json.dumps(text)})"), path.name
        if found := page.evaluate(MISSING_NODES):
            missing[path.name] = found
    assert not missing
    strange = demo.WORKFLOW.read_text(encoding="utf-8").replace('"VAELoader"', '"NoSuchNode"')
    page.evaluate(f"{OPEN}('strange.json', {json.dumps(strange)})")
    assert page.evaluate(MISSING_NODES) == page.evaluate(RED_NODES) == ["NoSuchNode"]
    keep(page, "missing")
