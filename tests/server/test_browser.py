"""The real editor in Chromium: workflows open, run and show their picture, templates and help pages
are there.

Each test leaves screenshots in `.dev/screenshots`.
"""
import contextlib
import itertools
import json
import os
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from blueprint_workflows import as_workflow
from editor import (
    QUEUE,
    SAVED,
    SELECT,
    STORES,
    becomes,
    open_help,
    open_templates,
    run,
    search_nodes,
    sent_by,
    template_card,
    text_on,
    with_texts,
)
from empty_models import touch, touch_named
from frontends import newest_frontend
from languages import DOCS, HELP_LANGUAGES, LOCALES, help_page
from pack_nodes import node_list
from PIL import Image
from safetensors.torch import save_file

from devtools import ROOT, demo, first_picture
from devtools.files import demo_files
from devtools.host.browser import COMPLAINTS, NODES, RED, SETTINGS, UNKNOWN, BrowserError
from devtools.host.environment import DEV, HOST_VERSION, SetupError
from devtools.host.server import JOINER, PACK, Server
from devtools.workflows import BLUEPRINT_FOLDER, FIRST, blueprint_paths, example_paths
from devtools.workflows import __main__ as command
from devtools.workflows.api_format import to_api
from devtools.workflows.stand_ins import stand_in_files
from featherweight.nodes.search_words import (
    CHECKPOINT_WORDS,
    ENCODER_WORDS,
    FORMATS,
    MODEL_WORDS,
    MODELS,
    PLACING_WORDS,
    SAVING_WORDS,
)

CATEGORY = "Featherweight"
EXAMPLES = example_paths()
LEGACY = sorted((ROOT / "tests" / "server" / "legacy_workflows").glob("*.json"))
MODERN = "Comfy.VueNodes.Enabled"
SHOWS_TEXT = (
    "FeatherweightLoadDiffusionModel", "FeatherweightLoadTextEncoder",
    "FeatherweightLoadCheckpoint", "FeatherweightCheckLora", "FeatherweightMeasureSensitivity",
    "FeatherweightSavePackedModel", "FeatherweightInspectModelFile"
)
# Has the editor show the help pages of a language, which it need not have itself, each with a mark
# at its end.
IN_LANGUAGE = """(language => {
  window.fetchAnything ??= window.fetch
  window.marks = {}
  window.fetch = async (url, ...rest) => {
    const page = /^(.*\\/docs\\/)(\\w+)(\\/en)?\\.md$/.exec(url)
    if (!page) return fetchAnything(url, ...rest)
    const source = language === 'en' ? url : `${page[1]}${page[2]}/${language}.md`
    const reply = await fetchAnything(source, ...rest)
    if (!reply.ok) return reply
    marks[page[2]] = `page ${Object.keys(marks).length} ${language}.`
    return new Response(`${await reply.text()}\\n\\n${marks[page[2]]}\\n`, reply)
  }
})"""
# Of each text that a node shows: the node's type, the text, whether a part of it is out of sight,
# and by how many pixels it leaves the node. Parts of the page that are out of sight have no size.
TEXTS = """(async () => {
  const shown = []
  for (const node of app.graph.nodes) {
    const text = node.widgets?.find(widget => widget.name === '$$node-text-preview')?.value
    if (!text) continue
    app.canvas.ds.scale = 1
    app.canvas.centerOnNode(node)
    app.canvas.setDirty(true, true)
    await new Promise(done => setTimeout(done, 500))
    const box = [...document.querySelectorAll('.dom-widget .overflow-y-auto')].find(
      box => box.checkVisibility() && box.textContent.trim() === text.replaceAll('\\n', '').trim())
    const floor = app.canvas.canvas.getBoundingClientRect().top
      + node.pos[1] + node.size[1] + app.canvas.ds.offset[1]
    shown.push([node.type, text.replaceAll('\u2060', ''),
                !box || box.scrollHeight > box.clientHeight || box.scrollWidth > box.clientWidth,
                box && Math.max(0, box.getBoundingClientRect().bottom - floor)])
  }
  return shown
})()"""
# What of a help page is cut at the edge of its panel. Blocks of code can be scrolled.
CUT = """(page => {
  const edge = page.getBoundingClientRect().left + page.clientWidth + 1
  return [...page.querySelectorAll('*')].filter(part => !part.closest('pre'))
    .filter(part => part.getBoundingClientRect().right > edge
      || part.tagName === 'TABLE' && part.scrollWidth > part.clientWidth)
    .map(part => `${part.tagName} ${part.innerText.slice(0, 80)}`)
})(document.querySelector('.node-help-content'))"""
# Shows the help page of each of these nodes; gives what of them is cut.
CUT_PAGES = f"""(async types => {{
  const cut = {{}}, end = performance.now() + 100000
  for (const type of types) {{
    {SELECT}(type)
    const shown = () => document.querySelector('.node-help-content')?.innerText
    while (!(type in marks && shown()?.includes(marks[type]))) {{
      if (performance.now() > end) throw new Error(`the help page of ${{type}} does not come`)
      await new Promise(done => setTimeout(done, 20))
    }}
    const parts = {CUT}
    if (parts.length) cut[type] = parts
  }}
  return cut
}})"""
TITLES_OF_OURS = {schema.display_name.partition(" (")[0]: schema.display_name for schema in (
    node.GET_SCHEMA() for node in node_list()) if schema.node_id.startswith("Featherweight")}
# The titles of the nodes that the editor's search finds by each of these words, in their order.
FOUND = f"""(words => {{
  const search = {STORES}.get('nodeDef').nodeSearchService
  return Object.fromEntries(words.map(word => [
    word, search.searchNode(word, [], {{limit: 64}}).map(node => node.display_name)]))
}})"""
# Where on the page the right arrow of a number is.
ARROW = """((type, name) => {
  const node = app.graph.nodes.find(node => node.type === type), {scale, offset} = app.canvas.ds
  const widget = node.widgets.find(widget => widget.name === name)
  const box = app.canvas.canvas.getBoundingClientRect()
  return [box.x + (node.pos[0] + node.size[0] - 25 + offset[0]) * scale,
          box.y + (node.pos[1] + widget.last_y + 10 + offset[1]) * scale]
})"""

# Of each node of the open workflow: where it is, its size on the page, and its height if it were as
# low as what is in it, in pixels of the canvas; the colors of a note's text and of what is behind.
LAID_OUT = """(() => app.graph.nodes.map(node => {
  const part = document.querySelector(`[data-node-id="${node.id}"]`)
  const height = () => Math.round(part.getBoundingClientRect().height / app.canvas.ds.scale)
  const shown = part ? height() : node.size[1] + LiteGraph.NODE_TITLE_HEIGHT
  let least = shown, colors = []
  if (part) {
    const style = part.style.cssText
    part.style.setProperty('--node-height', '0px')
    Object.assign(part.style, {height: 'auto', minHeight: '0'})
    least = height()
    part.style.cssText = style
    let text = part.querySelector('.comfy-markdown-content p')
    if (text) colors.push(getComputedStyle(text).color)
    const ground = () => getComputedStyle(text).backgroundColor
    while (text && ground() === 'rgba(0, 0, 0, 0)') text = text.parentElement
    if (text) colors.push(ground())
  }
  const [left, top] = [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT]
  const ends = app.graph.groups.map(({pos: [x, y], size: [width, height]}) =>
    x <= left && left < x + width && y <= top && top < y + height ? y + height : Infinity)
  return {type: node.type, left, top, width: node.size[0], height: shown, least, colors,
          beyond: top + shown > Math.min(...ends)}
}))()"""
# Nodes that keep room for what they show after a run, which may be a whole report.
OF_RESULTS = {"SaveImage", "PreviewImage", "SaveVideo", "FeatherweightCheckLora",
              "FeatherweightInspectModelFile", "MarkdownNote"}

# The field of the node library in which one types a name.
SEARCH = "document.querySelector('.side-bar-panel input[placeholder^=Search]')"
# Its entries: folders, and the names in them.
ENTRIES = "[...document.querySelectorAll('[role=treeitem]')].map(entry => entry.innerText.trim())"
# Titles, as they are written: shown, those of the library have capitals alone.
TITLES = "[...document.querySelectorAll('h3')].map(title => title.textContent.trim())"
SECTION, SHARED = "Subgraph Blueprints", "Comfy Blueprints"
GETTING_STARTED = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
BLUEPRINT_README = (ROOT / "subgraphs" / "README.md").read_text(encoding="utf-8")
FORM = "[...document.querySelectorAll('[data-testid=app-mode-widget-item]')]"
TOGGLE_APP_MODE = "app.extensionManager.command.execute('Comfy.ToggleLinear')"


@pytest.fixture
def page(browser, server):
    browser.open_editor(server)
    yield browser
    browser.close_editor()


@pytest.fixture(scope="module")
def newest_server(tmp_path_factory):
    """With the newest editor of the package index, and only this pack: it has the models of the
    demo, and an empty file of every other name that the workflows use."""
    try:
        frontend = newest_frontend()
    except SetupError as error:
        pytest.skip(f"The newest editor cannot be had: {error}")
    if frontend is None:
        pytest.skip("ComfyUI has the newest editor")
    base = tmp_path_factory.mktemp("newest")
    touch_all(base)
    demo_files.make_models(base)
    with Server(base, arguments=["--front-end-root", str(frontend)]) as server:
        yield server


@pytest.fixture(scope="module", params=["own", "newest"])
def any_server(request):
    """For tests that hold for the editor that ComfyUI is installed with, and for the newest."""
    return request.getfixturevalue("server" if request.param == "own" else "newest_server")


@pytest.fixture
def any_page(browser, any_server):
    browser.open_editor(any_server)
    yield browser
    browser.close_editor()


@pytest.fixture(scope="module")
def current(server):
    version = server.system_stats()["system"]["comfyui_version"]
    if [*map(int, version.split("."))] < [*map(int, HOST_VERSION.split("."))]:
        pytest.skip(f"ComfyUI {version} has an older editor, which shows texts in another way")


@pytest.fixture(scope="module")
def more_models(server):
    """Of the demo: what its other workflows load."""
    models = server.base / "models" / "diffusion_models"
    demo_files.write_model(models / demo_files.MODELS["F16"], "F16")
    if demo_files.has_bitsandbytes():
        demo_files.make_checkpoint(server.base)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A ComfyUI with only this pack, and with an empty file of every name that the workflows
    use."""
    base = tmp_path_factory.mktemp("fresh")
    touch_all(base)
    with Server(base) as server:
        yield server


@pytest.fixture
def fresh_page(browser, fresh):
    browser.open_editor(fresh)
    yield browser
    browser.close_editor()


@pytest.fixture(scope="module", params=["own", "newest"])
def fresh_server(request):
    """Like `any_server`, for tests with the names of files alone."""
    return request.getfixturevalue("fresh" if request.param == "own" else "newest_server")


@pytest.fixture
def fresh_editor(browser, fresh_server):
    browser.open_editor(fresh_server)
    yield browser
    browser.close_editor()


@pytest.fixture
def editor(browser, fresh):
    """The editor of `fresh`, in which a workflow takes the place of the one before; opened again
    where a test between has closed it."""
    if browser.evaluate("window.app?.graph && location.origin") != fresh.url.rstrip("/"):
        browser.open_editor(fresh)
    return browser


def touch_all(base: Path):
    """Makes an empty file of every name that the workflows use."""
    stand_in_files(base)
    for path in LEGACY:
        touch_named(base, path.read_text(encoding="utf-8"))


def keep(page, name: str):
    """A screenshot for whoever wants to look."""
    folder = DEV / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(page.screenshot())


def as_on_any_cpu(values: dict[str, list], has_bfloat16: bool) -> dict[str, list]:
    """Returns what nodes show without what another CPU has else: its kernels, and without
    bfloat16 all that a node says."""
    return {node: [[name, re.sub(r"dequantized by [\w ]+," if has_bfloat16 else "(?s).*", "", value)
                    if name == first_picture.TEXT else value] for name, value in widgets]
            for node, widgets in values.items()}


def test_a_dropped_workflow_runs_with_a_changed_number_and_shows_its_picture(page, server):
    page.drop(demo.WORKFLOW)
    page.wait_for(f"!!{SAVED}")
    assert not page.types(RED)
    keep(page, "workflow")
    nodes = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))["nodes"]
    sampler, latent = (next(node for node in nodes if node["type"] == kind)
                       for kind in ("KSampler", "EmptySD3LatentImage"))
    steps = ("app.graph.nodes.find(node => node.type === 'KSampler')"
             ".widgets.find(widget => widget.name === 'steps').value")
    page.click(*page.wait_for(
        f"(place => Number.isFinite(place[1]) && place)({ARROW}('KSampler', 'steps'))"))
    page.wait_for(f"{steps} === {sampler['widgets_values'][2] + 1}")
    page.click_on(QUEUE)
    width, source = page.wait_for(
        f"(img => img?.naturalWidth && [img.naturalWidth, img.src])({SAVED}.imgs?.[0])", 600)
    page.evaluate(f"{steps} = {sampler['widgets_values'][2]}; app.graph.setDirtyCanvas(true)")
    page.evaluate("new Promise(done => setTimeout(done, 500))")
    keep(page, "picture")  # the workflow as it is, with its image
    shown = first_picture.shown_values(page)
    with Image.open(first_picture.FIRST_PICTURE) as picture:
        recorded = json.loads(picture.text[first_picture.FACTS])
    has_bfloat16 = "bfloat16" in str(shown)
    shown, recorded = (as_on_any_cpu(values, has_bfloat16) for values in (shown, recorded))
    assert shown == recorded, "run `python -m devtools.first_picture`"
    assert width == latent["widgets_values"][0] and "filename=featherweight_demo" in source
    ran = list(server.get_json("/history").values())[-1]["prompt"][2]
    assert ran[str(sampler["id"])]["inputs"]["steps"] == sampler["widgets_values"][2] + 1


def test_a_workflow_runs_in_app_mode_and_shows_its_picture(page, server):
    workflow = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    sampler = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] = steps = 5
    page.open_workflow("form.json", json.dumps(workflow))
    page.click_on(
        "[...document.querySelectorAll('button')].find(button => "
        "button.ariaLabel === 'Enter app mode')")
    assert "*Enter app mode*" in GETTING_STARTED
    page.click_on(
        "[...document.querySelectorAll('[data-testid=linear-run-button] button')]"
        ".find(button => button.innerText.trim() === 'Run')")
    page.wait_for("[...document.querySelectorAll('img')].some(picture => picture.naturalWidth"
                  " && picture.clientWidth > 400 && /featherweight_demo/.test(picture.src))", 600)
    keep(page, "app_picture")
    ran = list(server.get_json("/history").values())[-1]["prompt"][2]
    assert ran[str(sampler["id"])]["inputs"]["steps"] == steps


def luminance(color: str) -> float:
    """Returns the relative luminance of rgb(r, g, b), as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
             for part in parts]
    return sum(part * share for part, share in zip(parts, (0.2126, 0.7152, 0.0722)))


def contrast(colors: list[str]) -> float:
    """Returns the contrast of two colors; 4.5 is what WCAG 2 asks of text."""
    dark, bright = sorted(luminance(color) for color in colors)
    return (bright + 0.05) / (dark + 0.05)


def overlap(one: dict, other: dict) -> bool:
    return all(one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
               for start, size in (("left", "width"), ("top", "height")))


@pytest.mark.parametrize(("fresh_server", "modern", "theme"), [
    ("own", False, "dark"), ("newest", True, "dark"), ("newest", True, "light")
], indirect=["fresh_server"])
def test_nodes_of_an_example_are_filled_and_apart_and_its_note_is_legible(
        fresh_server, modern, theme, browser, request):
    paths = EXAMPLES if request.config.getoption("--heavy") else random.sample(
        EXAMPLES, len(EXAMPLES) // 3)
    palette, wrong = "Comfy.ColorPalette", []
    try:
        browser.open_editor(fresh_server, SETTINGS | {MODERN: modern, palette: theme})
        for path in paths:
            browser.open_workflow(path.name, path.read_text(encoding="utf-8"))
            browser.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            nodes, before = browser.evaluate(LAID_OUT), None
            while nodes != before:  # until the editor has laid all out
                time.sleep(0.2)
                nodes, before = browser.evaluate(LAID_OUT), nodes
            keep(browser, f"example_{'modern' if modern else 'classic'}_{theme}_{path.stem}")
            wrong += [(path.stem, one["type"], other["type"])
                      for one, other in itertools.combinations(nodes, 2) if overlap(one, other)]
            wrong += [(path.stem, node["type"], node["least"] / node["height"]) for node in nodes
                      if node["type"] not in OF_RESULTS and node["least"] < 0.6 * node["height"]]
            wrong += [(path.stem, node["type"], "ends below its group") for node in nodes
                      if node["beyond"]]
            note, = (node for node in nodes if node["type"] == "MarkdownNote")
            if modern and contrast(note["colors"]) < 4.5:
                wrong.append((path.stem, note["colors"]))
    finally:
        fresh_server.post("/settings", {MODERN: False, palette: "dark"})
        browser.close_editor()
    assert not wrong, wrong


def test_a_template_opens_from_the_template_browser(fresh_page):
    page = fresh_page
    shown = open_templates(page, PACK)
    names = [path.stem for path in EXAMPLES]  # their folder lists them in no order
    assert names[0].startswith(FIRST)
    assert shown == names[:len(shown)]
    card = template_card(next(name for name in shown if "LoRA check" in name))
    page.wait_for(f"{card}?.querySelector('img')?.naturalWidth")
    keep(page, "templates")
    page.click_on(card)
    page.wait_for("app.graph.nodes.some(node => node.type === 'FeatherweightCheckLora')")
    assert not page.types(RED)
    keep(page, "template")


@pytest.mark.parametrize("path", [
    demo.WORKFLOW, *(pytest.param(path, marks=pytest.mark.heavy) for path in (
        demo.NF4_WORKFLOW, demo.LORA_WORKFLOW, demo.MIX_WORKFLOW))
], ids=lambda path: path.stem)
def test_nodes_of_the_examples_have_the_size_that_their_texts_need(
        path, current, more_models, page, server):
    if path == demo.NF4_WORKFLOW:
        pytest.importorskip("bitsandbytes", reason="it writes the file")
    workflow = with_one_step(json.loads(path.read_text(encoding="utf-8")))
    for node in workflow["nodes"]:
        if node["type"] == "FeatherweightMeasureSensitivity":
            node["widgets_values"][:2] = 1, 2  # samples and steps
            node["widgets_values"][4] = "fast"
    server.post("/free", {"free_memory": True})  # else a loader that has run says nothing
    page.open_workflow(path.name, json.dumps(workflow))
    types = sorted(node["type"] for node in workflow["nodes"])
    becomes(page, lambda: sorted(page.types()), types)
    before = len(server.get_json("/history"))
    page.click_on(QUEUE)
    becomes(page, lambda: len(server.get_json("/history")) > before, True, 300)
    expected = sorted(node["type"] for node in workflow["nodes"] if node["type"] in SHOWS_TEXT)
    becomes(page, lambda: sorted(page.types(
        "node.widgets?.some(widget => widget.name === '$$node-text-preview')")), expected)
    texts = page.evaluate(TEXTS)
    keep(page, f"texts_{path.stem.replace(' ', '_')}")
    assert [type for type, *_ in texts] and not [text for text in texts if text[2] or text[3] > 0]


def with_one_step(workflow: dict) -> dict:
    """For tests that do not look at the picture."""
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 1
    return workflow


@contextlib.contextmanager
def opened(browser, server, workflow: Path | dict, modern: bool, settings: Mapping = {}):
    """The editor with an example in it, whose nodes have the modern design or the classic one."""
    server.post("/settings", {MODERN: modern})
    try:
        browser.open_editor(server, {**SETTINGS, **settings})
        if isinstance(workflow, Path):
            workflow = json.loads(workflow.read_text(encoding="utf-8"))
        workflow = with_one_step(workflow)
        browser.open_workflow("workflow.json", json.dumps(workflow))
        types = sorted(node["type"] for node in workflow["nodes"])
        becomes(browser, lambda: sorted(browser.types()), types)
        yield browser
    finally:
        server.post("/settings", {MODERN: False})
        browser.close_editor()


@pytest.mark.parametrize(("any_server", "modern"), [
    ("own", False), ("newest", False), ("newest", True)
], indirect=["any_server"])
def test_texts_stay_after_a_run_and_a_node_that_fails_says_why_and_one_that_is_refused_nothing(
        any_server, modern, current, browser):
    loaders = ["FeatherweightLoadDiffusionModel", "FeatherweightLoadTextEncoder"]
    model, text_encoder = (
        any_server.base / "models" / folder / name for folder, name in (
            ("diffusion_models", demo.MODEL_NAME), ("text_encoders", demo_files.ENCODER_NAME)))
    kept = {path: path.read_bytes() for path in (model, text_encoder)}
    with opened(browser, any_server, demo.WORKFLOW, modern) as page:
        try:
            for _ in ("both load", "both are cached"):
                run(page, any_server)
                assert with_texts(page) == loaders
            keep(page, f"texts_stay_{'modern' if modern else 'classic'}")
            model.write_bytes(kept[model][:1000])
            run(page, any_server)
            assert with_texts(page) == loaders
            assert model.name in text_on(page, loaders[0])  # why it failed
            text_encoder.unlink()
            page.click_on(QUEUE)
            becomes(page, lambda: with_texts(page), loaders[:1])
            model.write_bytes(kept[model])
            text_encoder.write_bytes(kept[text_encoder])
            run(page, any_server)
            assert "in memory" in text_on(page, loaders[0])
        finally:
            for path, contents in kept.items():
                path.write_bytes(contents)


BOTH_DESIGNS = pytest.mark.parametrize(("any_server", "modern"), [
    ("own", False), ("own", True), ("newest", True)], indirect=["any_server"])
# For what differs by the design alone, or by the editor's version.
TWO_DESIGNS = pytest.mark.parametrize(("any_server", "modern"), [
    ("own", False), ("newest", True)], indirect=["any_server"])
LOADERS = ["FeatherweightLoadDiffusionModel", "FeatherweightLoadTextEncoder"]


def reload(page):
    """As F5 does, once the editor has stored the open workflow."""
    page.wait_for("Object.keys(localStorage).concat(Object.keys(sessionStorage)).some("
                  f"key => (localStorage[key] ?? sessionStorage[key]).includes('{LOADERS[0]}'))")
    page.evaluate("window.isOld = true")
    page.call("Page.reload")
    with contextlib.suppress(BrowserError):  # nothing can be asked of a page that leaves
        page.wait_for("!window.isOld")
    page.wait_for(
        f"window.app?.graph?.nodes?.some(node => node.type === '{LOADERS[0]}')"
        " && !app.extensionManager.spinner", 180)


def texts_on(page) -> list[str]:
    return [text_on(page, type) for type in with_texts(page)]


@BOTH_DESIGNS
def test_texts_come_back_after_a_reload_by_the_history_and_by_a_run_that_is_cached(
        any_server, modern, browser):
    name = f"{'newest' if any_server.arguments[1:] else 'own'}_{'modern' if modern else 'classic'}"
    stored = {"Comfy.Workflow.Persist": True}
    with opened(browser, any_server, demo.WORKFLOW, modern, stored) as page:
        run(page, any_server)
        becomes(page, lambda: with_texts(page), LOADERS)
        before = texts_on(page)
        assert "computes exactly in " in before[0]
        reload(page)
        becomes(page, lambda: with_texts(page), LOADERS)  # nothing runs
        assert texts_on(page) == before
        keep(page, f"texts_of_the_history_{name}")
        any_server.post("/history", {"clear": True})
        reload(page)
        assert with_texts(page) == []
        page.evaluate("app.graph.nodes.find(node => node.type === 'KSampler').widgets[0].value++")
        run(page, any_server)
        becomes(page, lambda: with_texts(page), LOADERS)
        assert texts_on(page) == before
        keep(page, f"texts_of_a_cached_run_{name}")
        last = list(any_server.get_json("/history").values())[-1]
        cached, = [data["nodes"] for event, data in last["status"]["messages"]
                   if event == "execution_cached"]
        types = {id: node["class_type"] for id, node in last["prompt"][2].items()}
        assert {types[id] for id in cached} >= set(LOADERS)


@TWO_DESIGNS
def test_another_tab_shows_the_texts_of_its_nodes_alone(any_server, modern, browser):
    any_server.post("/history", {"clear": True})
    with opened(browser, any_server, demo.WORKFLOW, modern) as page:
        run(page, any_server)
        becomes(page, lambda: with_texts(page), LOADERS)
        before = texts_on(page)
    with opened(browser, any_server, demo.WORKFLOW, modern) as page:
        becomes(page, lambda: with_texts(page), LOADERS)  # nothing runs
        assert texts_on(page) == before
        run(page, any_server)
        assert texts_on(page) == before
    other = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    loader, = (node for node in other["nodes"] if node["type"] == LOADERS[0])
    loader["widgets_values"][1] = "fast"  # compute
    with opened(browser, any_server, other, modern) as page:
        becomes(page, lambda: with_texts(page), LOADERS[1:])
        run(page, any_server)
        becomes(page, lambda: with_texts(page), LOADERS)
        text = text_on(page, LOADERS[0])
        assert "computes exactly" not in text or re.search("no int8 units|kernels are off", text)


@TWO_DESIGNS
def test_a_node_in_a_subgraph_shows_its_text_once_that_is_opened(any_server, modern, browser):
    with opened(browser, any_server, demo.WORKFLOW, modern) as page:
        any_server.post("/history", {"clear": True})
        page.evaluate(f"""(node => void app.graph.convertToSubgraph(new Set([node])))(
            app.graph.nodes.find(node => node.type === '{LOADERS[0]}'))""")
        run(page, any_server)
        becomes(page, lambda: with_texts(page), LOADERS[1:])
        page.evaluate("void app.canvas.setGraph("
                      "app.graph.nodes.find(node => node.subgraph).subgraph)")
        becomes(page, lambda: LOADERS[0] in with_texts(page), True)


@TWO_DESIGNS
def test_a_text_in_a_nodes_outputs_is_no_markup(any_server, modern, browser):
    text = "<img src=x onerror='window.harmed = true'> [[Note|https://example.com]]"
    with opened(browser, any_server, demo.WORKFLOW, modern) as page:
        page.evaluate(f"""(text => {{
            const node = app.graph.nodes.find(node => node.type === '{LOADERS[0]}')
            comfyAPI.api.api.dispatchCustomEvent('executed', {{
              node: String(node.id), output: {{featherweight_text: [[text]]}}}})
        }})({json.dumps(text)})""")
        becomes(page, lambda: LOADERS[0] in with_texts(page), True)
        assert text_on(page, LOADERS[0]).startswith("‹img src=x onerror=")
        assert not page.evaluate("!!window.harmed || !!document.querySelector('img[src=x]')")


@pytest.mark.parametrize("any_server", ["own", "newest"], indirect=True)
def test_comfyuis_lora_loader_says_of_a_lora_that_it_does_not_fit_and_then_that_no_more(
        any_server, current, browser):
    loader, loras = "LoraLoaderModelOnly", any_server.base / "models/loras"
    layer = "diffusion_model.double_blocks.0.img_attn.proj.lora_"
    loras.mkdir(exist_ok=True)
    save_file({f"{layer}A.weight": torch.ones(2, 7), f"{layer}B.weight": torch.ones(7, 2)},
              loras / "misfit.safetensors")
    with opened(browser, any_server, demo.WORKFLOW, modern=False) as page:
        page.evaluate(f"""(() => {{
            const graph = app.graph, lora = LiteGraph.createNode('{loader}');
            graph.add(lora);
            const of = (type) => graph.nodes.find((node) => node.type === type);
            const model = of('FeatherweightLoadDiffusionModel');
            for (const id of [...model.outputs[0].links]) {{
              const {{target_id, target_slot}} = graph.links[id] ?? graph.links.get(id);
              lora.connect(0, graph.getNodeById(target_id), target_slot);
            }}
            model.connect(0, lora, 0);
            lora.widgets[0].value = 'misfit.safetensors';
        }})()""")
        run(page, any_server)
        assert loader in with_texts(page)
        page.evaluate(f"app.graph.nodes.find((node) => node.type === '{loader}').widgets[1].value"
                      " = 0")
        run(page, any_server)
        assert loader not in with_texts(page)


def test_the_text_of_a_node_that_is_cancelled_goes(current, more_models, browser, server):
    measure = "FeatherweightMeasureSensitivity"
    server.post("/free", {"free_memory": True})  # a cancelled run sends nothing of the cache
    with opened(browser, server, demo.MIX_WORKFLOW, modern=False) as page:
        page.evaluate(
            f"app.graph.nodes.find(node => node.type === '{measure}').widgets"
            ".find(widget => widget.name === 'samples').value = 64")
        before = len(server.get_json("/history"))
        page.click_on(QUEUE)
        becomes(page, lambda: measure in with_texts(page), True, 300)
        server.post("/interrupt", {})
        becomes(page, lambda: len(server.get_json("/history")) > before, True)
        assert with_texts(page) == ["FeatherweightLoadTextEncoder"]


@pytest.mark.parametrize("modern", [False, True])
def test_texts_keep_their_lines_and_words_and_can_be_copied(
        modern, current, browser, any_server):
    """The modern design takes them for Markdown, the classic one breaks lines in words."""
    boxes = "[...document.querySelectorAll('.comfy-markdown-content, .featherweight-text')]"
    with opened(browser, any_server, demo.LORA_WORKFLOW, modern=modern):
        browser.click_on(QUEUE)
        shown = f"{boxes}.find(box => box.textContent.includes('all 20 layers'))"
        lines = browser.wait_for(f"{shown}?.innerText.split('\\n')", 300)
        keep(browser, "texts, modern" if modern else "texts, classic")
        if modern:
            assert browser.evaluate(f"(box => box.scrollHeight <= box.clientHeight)({shown})")
        else:
            assert browser.evaluate(f"{boxes}.every(box => getComputedStyle("
                                    "box.querySelector('span')).wordBreak === 'normal')")
        types = with_texts(browser)
        told = browser.evaluate("""app.graph.nodes.map(node => node.widgets?.find(
            widget => widget.name === '$$node-text-preview')?.value).filter(text => text)""")
        copied = browser.evaluate(boxes + """.map(box => {
            getSelection().selectAllChildren(box)
            return getSelection().toString() || box.innerText
        })""")  # nothing of the modern design can be selected but in its field, after two clicks
    assert {"file", "kind", "made for", "model", "strongest"} <= {
        line.split(":")[0] for line in lines}
    assert len(types) == len(told) > 1
    assert {" ".join(text.split()) for text in told} <= {" ".join(text.split()) for text in copied}
    assert not any(JOINER in text for text in copied)


def test_the_search_finds_no_node_of_the_pack_before_the_one_for_a_word(any_page, any_server):
    """And none at all that is there for old workflows alone."""
    model, text_encoder, controlnet, save, apply = map(TITLES_OF_OURS.get, (
        "Load Diffusion Model", "Load Text Encoder", "Load ControlNet", "Save Packed Model",
        "Apply LoRA"))
    wanted = dict.fromkeys(
        ["nf4", "fp8", "gptq", "awq", "sdnq", "svdquant", "nunchaku"], model)
    # ComfyUI's own nodes come first whose titles have the word, or one like it and are used more
    behind_others = {
        "int8": model, "unet": model, "clip loader": text_encoder, "quantize": save,
        "lora": apply, "controlnet": controlnet
    }
    own = {path.stem for path in BLUEPRINT_FOLDER.glob("*.json")} | {
        node["display_name"] for node in any_server.object_info().values()
        if node["python_module"].endswith(PACK)
    }
    found = any_page.evaluate(f"{FOUND}({json.dumps([*wanted, *behind_others])})")
    assert {word: titles[:1] for word, titles in found.items() if word in wanted} == {
        word: [title] for word, title in wanted.items()}
    for word, titles in found.items():
        ours = [title for title in titles if title in own]
        assert ours[0] == (wanted | behind_others)[word], word
        assert all("Featherweight)" in title for title in ours), word


@pytest.mark.parametrize(("any_server", "modern", "language"), [
    ("own", False, "en"), ("newest", True, "en"),
    *(("own", False, language) for language in LOCALES)
], indirect=["any_server"])
def test_a_double_click_and_the_word_gguf_show_the_loaders_of_ggufs_first(
        any_server, modern, language, current, browser):
    """Beside ComfyUI's own nodes, as Getting started says."""
    word, title = re.search(r"double-click on the canvas and\s+the word \*(\w+)\*\s+now find"
                            r"\s+\*([^*]+)\*", GETTING_STARTED).groups()
    loaders = {title for title in TITLES_OF_OURS.values() if "GGUF" in title}
    assert word == "gguf" and title in loaders and len(loaders) == 3
    any_server.post("/settings", {MODERN: modern, "Comfy.Locale": language})
    try:
        browser.open_editor(any_server)
        browser.evaluate("app.graph.clear()")
        titles = search_nodes(browser, word, title)
        keep(browser, f"search {word} {language} {'modern' if modern else 'classic'}")
        assert {*titles[:3]} == loaders
    finally:
        any_server.post("/settings", {MODERN: False, "Comfy.Locale": "en"})
        browser.close_editor()


def test_phrases_that_people_type_find_a_node_of_the_pack_among_the_first_three(
        any_page, any_server):
    """Beside ComfyUI's own nodes."""
    wanted = {phrase: TITLES_OF_OURS[title] for title, phrases in (
        ("Load Diffusion Model", MODEL_WORDS), ("Load Text Encoder", ENCODER_WORDS),
        ("Load Checkpoint", CHECKPOINT_WORDS), ("Save Packed Model", SAVING_WORDS),
        ("Place Model", PLACING_WORDS)) for phrase in phrases}
    # in which order the words are typed does not matter
    for title, phrases in (
        ("Load Diffusion Model", ("load gguf", "diffusion model gguf")), ("Load Text Encoder", (
            "cliploader (gguf)", "clip loader gguf", "triplecliploader (gguf)",
            "nunchaku text encoder loader")),
            ("Save Packed Model", ("gguf converter", "convert gguf", "quantize gguf"))):
        wanted |= dict.fromkeys(phrases, TITLES_OF_OURS[title])
    wanted |= dict.fromkeys(
        ("8gb", *(f"{name} {random.choice(FORMATS.split())}" for name in MODELS)),
        TITLES_OF_OURS["Load Diffusion Model"])
    wanted["gguf t5"] = TITLES_OF_OURS["Load Text Encoder"]
    found = any_page.evaluate(f"{FOUND}({json.dumps([*wanted])})")
    assert {phrase: titles[:3] for phrase, titles in found.items()
            if wanted[phrase] not in titles[:3]} == {}


@pytest.mark.more_with_heavy
def test_every_workflow_opens_without_a_red_node_and_the_examples_are_sent_as_they_are(
        fresh_server, browser, request):
    browser.open_editor(fresh_server)
    object_info, wrong, changed = fresh_server.object_info(), {}, {}
    paths = [*EXAMPLES, *LEGACY]
    if request.node.callspec.params["fresh_server"] == "newest" and not request.config.getoption(
            "--heavy"):  # the first, and others of which each has its turn
        paths = [paths[0], *random.sample(paths[1:], len(paths) // 3)]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        browser.open_workflow(path.name, text)
        assert browser.types(), path.name
        if found := browser.complaints():
            wrong[path.name] = found
        if path in EXAMPLES:
            sent, expected = sent_by(browser), to_api(json.loads(text), object_info)
            for node in expected.keys() | sent.keys():
                if sent.get(node) != expected.get(node):
                    changed[path.name, node] = sent.get(node), expected.get(node)
    browser.close_editor()
    assert not wrong and not changed


@pytest.mark.more_with_heavy
def test_the_help_page_of_a_node_opens_and_of_none_anything_is_cut_at_the_edge_of_its_panel(
        editor, fresh, request):
    """At the width that the panel has when it opens. Translations, whose words are shorter, are
    heavy."""
    is_heavy = request.config.getoption("--heavy")
    nodes = [
        node_id for node_id, node in fresh.object_info().items()
        if node["python_module"].endswith(PACK)
    ]
    names = {path.stem for path in DOCS.glob("*.md")}
    # which share theirs
    shown = [
        *sorted(names & set(nodes)), "LoaderGGUF", "GGUFLoaderKJ",
        "UnetLoaderGGUFDisTorch2MultiGPU", "NunchakuFluxLoraStack"
    ]
    assert len(shown) == len(names)
    editor.evaluate("app.graph.clear()")
    editor.evaluate(
        f"{json.dumps(shown)}.forEach(type => app.graph.add(LiteGraph.createNode(type)))")
    first = "FeatherweightApplyLora"
    open_help(editor, first)
    text = editor.evaluate("document.querySelector('.node-help-content').innerText")
    written = (DOCS / f"{first}.md").read_text(encoding="utf-8")
    assert text.startswith(written.splitlines()[0].removeprefix("# ")) and "block_weights" in text
    keep(editor, "help")
    cut = {}
    # the last: one that is shown is not fetched again
    shown.sort(key=lambda node_id: node_id == first)
    for language in HELP_LANGUAGES if is_heavy else ("en",):
        # under ids of other packs they are in English
        pages = [node for node in shown if language == "en" or help_page(node, language).exists()]
        editor.evaluate(f"{IN_LANGUAGE}('{language}')")
        cut |= {f"{node_id} {language}": parts
                for node_id, parts in editor.evaluate(f"{CUT_PAGES}({json.dumps(pages)})").items()}
        keep(editor, f"help_{language}")
    assert not cut


def test_the_editor_offers_every_language_that_help_pages_are_in(editor):
    options = f"{STORES}.get('setting').settingsById['Comfy.Locale'].options"
    offered = editor.evaluate(f"[...{options}].map(language => language.value)")
    assert set(offered) >= set(HELP_LANGUAGES)


def test_every_blueprint_is_in_the_node_library_and_added_with_its_values(editor):
    """With its description while the mouse is on its name."""
    assert f"*{SECTION}*, in *{SHARED}*, *{CATEGORY}*" in " ".join(BLUEPRINT_README.split())
    editor.evaluate("app.graph.clear()")
    if not editor.evaluate(f"!!{SEARCH}"):
        editor.click_on(
            "[...document.querySelectorAll('button')].find(button => /^Node Library/.test("
            "button.ariaLabel))")
    for path in blueprint_paths():
        blueprint = json.loads(path.read_text(encoding="utf-8"))
        editor.wait_for(f"!!{SEARCH}")
        editor.evaluate(f"{SEARCH}.select()")
        editor.call("Input.insertText", text=path.stem)
        names = editor.wait_for(
            f"(names => names.includes({json.dumps(path.stem)}) && names)({ENTRIES})")
        folder = names.index(SHARED)
        assert names[folder + 1] == CATEGORY and path.stem in names[folder + 2:]
        assert SECTION in editor.evaluate(TITLES)
        editor.click_on("[...document.querySelectorAll('[role=treeitem]')].find("
                        f"entry => entry.innerText.trim() === {json.dumps(path.stem)})")
        shown = "document.querySelector('[data-testid=node-preview-card]')?.innerText"
        description = blueprint["extra"]["BlueprintDescription"]
        editor.wait_for(f"{shown}?.includes({json.dumps(description)})")
        editor.click(1200, 300)  # on the canvas, where the node goes
        node = "app.graph.nodes[0]"
        title, widgets = editor.wait_for(
            f"{node} && [{node}.title, {node}.widgets.map(widget => [widget.name, widget.value])]")
        described, = blueprint["nodes"]
        names = [slot["name"] for slot in described["inputs"] if "widget" in slot]
        assert title == path.stem
        assert widgets == [[*pair] for pair in zip(names, described["widgets_values"])]
        keep(editor, f"blueprint_{path.stem}")
        assert not editor.complaints(), path.stem
        editor.evaluate("app.graph.clear()")


def test_the_editor_sends_what_is_inside_a_blueprint(editor, fresh):
    """What the tests run that draw with blueprints."""
    object_info = fresh.object_info()
    for path in blueprint_paths():
        workflow = as_workflow(path, object_info)
        editor.open_workflow("blueprint.json", json.dumps(workflow))
        assert sent_by(editor) == to_api(workflow, object_info)
        assert not editor.complaints()


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=pytest.mark.heavy if number > 1 else (), id=path.stem)
    for number, path in enumerate(EXAMPLES)])
def test_a_workflow_that_the_editor_saved_is_the_same_and_stays_so(editor, fresh, path, tmp_path):
    """What `python -m devtools.workflows` writes."""
    before = json.loads(path.read_text(encoding="utf-8"))
    again = tmp_path / path.name
    again.write_text(command.written(command.opened(editor, path)), encoding="utf-8")
    saved = json.loads(again.read_text(encoding="utf-8"))
    object_info = fresh.object_info()
    assert to_api(saved, object_info) == to_api(before, object_info)
    assert saved["extra"].get("linearData") == before["extra"].get("linearData")
    assert command.written(command.opened(editor, again)) == again.read_text(encoding="utf-8")


def test_a_loader_of_0_2_1_keeps_its_meaning_and_a_new_one_chooses_automatic(editor):
    """Workflows of 0.2.1 lack the input that says who computes ComfyUI's own formats."""
    workflow = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    loader = next(node for node in workflow["nodes"]
                  if node["type"] == "FeatherweightLoadDiffusionModel")
    name = loader["widgets_values"][0]
    for saved, (compute, host_formats) in (
            ([name, "exact", False, "as the file"], ("exact", "automatic")),
            ([name, "int8", False, "Q8_0"], ("int8", "automatic")),
            ([name, "exact", False, "as the file", "as ComfyUI computes them", "none"],
             ("exact", "as ComfyUI computes them")),
            ([name, "exact", False, "as the file", "by compute", "none"], ("exact", "by compute"))):
        loader["widgets_values"] = saved
        editor.open_workflow("earlier.json", json.dumps(workflow))
        inputs = sent_by(editor)[str(loader["id"])]["inputs"]
        assert (inputs["compute"], inputs["host_formats"]) == (compute, host_formats)
        pack_to = "no change" if saved[3] == "as the file" else saved[3]
        assert (inputs["pack_to"], inputs["module_name"]) == (pack_to, "none")
    added = editor.evaluate(
        "(node => (app.graph.add(node), node.widgets.map(widget => [widget.name, widget.value])))"
        "(LiteGraph.createNode('FeatherweightLoadDiffusionModel'))")
    assert {"compute": "automatic", "host_formats": "by compute"}.items() <= dict(added).items()


@pytest.mark.parametrize(("node_type", "name"), [
    ("FeatherweightSavePackedModel", "filename_prefix"),
    ("FeatherweightMeasureSensitivity", "name")])
def test_the_editor_fills_the_date_and_inputs_into_names_of_files(editor, node_type, name):
    editor.open_workflow("any.json", demo.WORKFLOW.read_text(encoding="utf-8"))
    sent = editor.evaluate(
        "(async node => { app.graph.add(node);"
        f"const widget = node.widgets.find(one => one.name === '{name}');"
        "widget.value = 'a/%date:yyyy%_%KSampler.steps%_%model%';"
        "return await widget.serializeValue(node, 0); })"
        f"(LiteGraph.createNode('{node_type}'))")
    assert re.fullmatch(r"a/20\d\d_\d+_%model%", sent)


def test_the_two_inputs_that_a_measurement_had_in_0_2_2_become_one(fresh_editor, fresh_server):
    """With its place in the links that it had, and in the list what was picked there."""
    editor = fresh_editor
    path = next(path for path in EXAMPLES if "packed to a size" in path.stem)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    measure, save = (next(node for node in workflow["nodes"] if node["type"] == f"{CATEGORY}{name}")
                     for name in ("MeasureSensitivity", "SavePackedModel"))
    link, = measure["outputs"][0]["links"]
    save["inputs"] = [slot for slot in save["inputs"] if slot["name"] != "measurement"]
    save["inputs"].insert(2, {"name": "sensitivity", "type": "STRING", "link": link})
    save["inputs"].append({"name": "measurement", "type": "COMBO", "link": None,
                           "widget": {"name": "measurement"}})
    next(one for one in workflow["links"] if one[0] == link)[4] = 2
    picked = fresh_server.base / "output" / "sensitivity" / "picked.sensitivity"
    picked.parent.mkdir(parents=True, exist_ok=True)
    picked.touch()
    node = f"app.graph.getNodeById({save['id']})"
    slots = f"{node}.inputs.filter(slot => /sens|meas/.test(slot.name)).map(slot => slot.name)"
    values = f"{node}.widgets.find(widget => widget.name === 'measurement').options.values"
    for is_connected in (True, False):
        if not is_connected:
            next(slot for slot in save["inputs"] if slot["name"] == "sensitivity")["link"] = None
            measure["outputs"][0]["links"] = []
            workflow["links"] = [one for one in workflow["links"] if one[0] != link]
            save["widgets_values"][-1] = "picked.sensitivity"
        editor.open_workflow(f"two inputs {is_connected}.json", json.dumps(workflow))
        sent = sent_by(editor)[str(save["id"])]["inputs"]
        assert sent["measurement"] == (
            [str(measure["id"]), 0] if is_connected else "picked.sensitivity")
        assert "sensitivity" not in sent and editor.evaluate(slots) == ["measurement"]
        assert not editor.types(RED)
        keep(editor, f"a measurement, {'connected' if is_connected else 'picked'}")
    made = picked.with_name("made.sensitivity")
    made.touch()
    assert made.name not in editor.evaluate(values)
    editor.press("r", "KeyR")
    editor.wait_for(f"{values}.includes('{made.name}')")
    connected = f"app.graph.getNodeById({measure['id']}).connect(0, {node}, 'measurement')"
    assert editor.evaluate(f"!!{connected}")
    assert sent_by(editor)[str(save["id"])]["inputs"]["measurement"] == [str(measure["id"]), 0]


def test_options_of_earlier_versions_become_todays_and_a_size_is_hidden_where_it_is_not_used(
        editor, fresh):
    """In a workflow that is opened, through a subgraph, in a new node, and after a change."""
    workflow = json.loads(demo.MIX_WORKFLOW.read_text(encoding="utf-8"))
    nodes = {node["type"].removeprefix(CATEGORY): node for node in workflow["nodes"]}
    nodes["LoadTextEncoder"]["widgets_values"][8] = "size in GB"
    nodes["MeasureSensitivity"]["widgets_values"][4] = "no runs"
    save = nodes["SavePackedModel"]  # where the measurement was a text that a link could replace
    save["widgets_values"] = ["size in GB", 0.005, "a", "output", "in the type asked for", True, ""]
    link = next(slot for slot in save["inputs"] if slot["name"] == "measurement")
    link |= {"name": "sensitivity", "type": "STRING", "widget": {"name": "sensitivity"}}
    editor.open_workflow("earlier.json", json.dumps(workflow))
    sent = {node["class_type"].removeprefix(CATEGORY): node["inputs"]
            for node in sent_by(editor).values()}
    assert sent["LoadTextEncoder"]["pack_to"] == sent["SavePackedModel"]["type"] == "mix for a size"
    assert sent["MeasureSensitivity"]["thoroughness"] == "fast"
    saved = sent["SavePackedModel"]
    assert {"size_gb": 0.005, "filename_prefix": "a", "folder": "output", "loras": "keep the size",
            "overwrite": True,
            "measurement": [str(nodes["MeasureSensitivity"]["id"]), 0]}.items() <= saved.items()
    assert not editor.types(RED)
    keep(editor, "earlier")
    path = next(path for path in blueprint_paths() if path.stem.startswith("Pack and Save"))
    workflow = as_workflow(path, fresh.object_info())
    shown = next(node for node in workflow["nodes"] if node["title"] == path.stem)
    shown["widgets_values"][0] = "as it is"
    editor.open_workflow("earlier blueprint.json", json.dumps(workflow))
    assert "keep types" in [node["inputs"].get("type") for node in sent_by(editor).values()]
    hidden = """(type => {
      const widgets = node => ["pack_to", "type", "size_gb"].map(
        name => node.widgets.find(widget => widget.name === name)).filter(Boolean);
      const node = LiteGraph.createNode(type), [choice] = widgets(node);
      app.graph.add(node);
      const isHidden = node => widgets(node).at(-1).hidden, seen = [isHidden(node)];
      for (const value of ["mix for a size", "Q4_K"]) {
        choice.value = value;
        choice.callback(value);
        seen.push(isHidden(node));
      }
      choice.value = "mix for a size";
      const opened = LiteGraph.createNode(type);
      app.graph.add(opened);
      opened.configure(node.serialize());
      return [...seen, isHidden(opened), opened.serialize().widgets_values.includes(6)];
    })"""
    for node in ("LoadDiffusionModel", "LoadCheckpoint", "LoadTextEncoder", "SavePackedModel"):
        assert editor.evaluate(f"{hidden}('Featherweight{node}')") == [
            True, False, True, False, True], node


def test_a_workflow_that_does_not_open_is_not_saved(editor, tmp_path):
    path = tmp_path / "strange.json"
    path.write_text(demo.WORKFLOW.read_text(encoding="utf-8").replace('"VAELoader"', '"NoSuch"'),
                    encoding="utf-8")
    with pytest.raises(BrowserError, match="strange.json does not open: .*NoSuch"):
        command.opened(editor, path)


@pytest.mark.more_with_heavy
def test_app_mode_shows_what_is_marked_as_a_form(editor, request):
    forms = {}
    for path in EXAMPLES if request.config.getoption("--heavy") else EXAMPLES[::4]:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if "linearData" not in workflow["extra"]:
            continue
        nodes = {node["id"]: node for node in workflow["nodes"]}
        labels = []
        for number, name in workflow["extra"]["linearData"]["inputs"]:
            slots = {slot["name"]: slot for slot in nodes[number]["inputs"]}
            labels.append(slots.get(name, {}).get("label", name))
        editor.open_workflow(path.name, path.read_text(encoding="utf-8"))
        editor.evaluate(TOGGLE_APP_MODE)
        forms[path.stem] = editor.wait_for(
            f"(labels => labels.length && labels)"
            f"({FORM}.map(item => item.innerText.split('\\n')[0].trim()))")
        keep(editor, f"app_{path.stem}")
        editor.evaluate(TOGGLE_APP_MODE)
        assert forms[path.stem] == labels, path.stem
    assert forms


def test_a_node_that_nobody_has_and_one_whose_file_is_missing_are_red(editor):
    """What the test above relies on."""
    workflow = demo.WORKFLOW.read_text(encoding="utf-8")
    editor.open_workflow("strange.json", workflow.replace('"VAELoader"', '"NoSuchNode"'))
    assert editor.types(RED) == editor.types(UNKNOWN) == ["NoSuchNode"]
    keep(editor, "missing")
    editor.open_workflow("missing.json", workflow.replace(demo.MODEL_NAME, "no_such_file.gguf"))
    assert editor.types(RED) == ["FeatherweightLoadDiffusionModel"]
    becomes(editor, lambda: bool(editor.evaluate(COMPLAINTS)), True)


@pytest.mark.skipif(os.name == "nt", reason="there a name cannot hold a backslash")
def test_a_name_written_on_another_system_becomes_the_listed_one(editor, fresh):
    """Also in a subgraph and where a refreshed list has the file; nodes of others are left as they
    are."""
    values = (f"{NODES}.flatMap(node => node.widgets ?? []).map(widget => widget.value)"
              ".filter(value => /flux/.test(value))")
    subgraph = next(path for path in LEGACY if "subgraph" in path.stem).read_text(encoding="utf-8")
    for written, listed in ((r"linux\flux.safetensors", "linux/flux.safetensors"),
                            # lists on Windows have backslashes
                            ("windows/flux.safetensors", r"windows\flux.safetensors")):
        workflow = subgraph.replace(r"legacy\\flux-Q8_0.gguf", json.dumps(written)[1:-1])
        editor.open_workflow("subgraph.json", workflow)
        assert editor.evaluate(values) == [written, written]
        frame = editor.types("node.subgraph")[0]
        # older editors frame the node inside too
        becomes(editor, lambda: frame in editor.types(RED), True)
        touch(fresh.base, "diffusion_models", listed)
        editor.evaluate("app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
        becomes(editor, lambda: editor.evaluate(values), [listed, listed])
        editor.open_workflow("subgraph.json", workflow)
        assert editor.evaluate(values) == [listed, listed] and not editor.types(RED)
        prompt = {number: {"class_type": kind, "inputs": {"unet_name": written}}
                  for number, kind in enumerate(("UnetLoaderGGUF", "UNETLoader"), 1)}
        editor.open_workflow("loaders.json", json.dumps(prompt))
        assert editor.evaluate(values) == [listed, written]
        becomes(editor, lambda: editor.types(RED), ["UNETLoader"])


# last: it opens the editor again in another language
@pytest.mark.parametrize("language", [
    LOCALES[0], *(pytest.param(name, marks=pytest.mark.heavy) for name in LOCALES[1:])
])
@pytest.mark.parametrize(("node", "written_in"), [
    ("FeatherweightLoadDiffusionModel", None), ("UnetLoaderGGUF", "en")])
def test_help_pages_follow_the_language_of_the_editor_and_of_other_packs_ids_are_in_english(
        editor, fresh, language, node, written_in):
    fresh.post("/settings", {"Comfy.Locale": language})
    try:
        editor.open_editor(fresh)
        editor.evaluate("app.graph.clear()")
        editor.evaluate(f"void app.graph.add(LiteGraph.createNode('{node}'))")
        open_help(editor, node)
        page = help_page(node, written_in or language)
        written = page.read_text(encoding="utf-8").split("\n\n")
        shown = editor.evaluate("document.querySelector('.node-help-content p').innerText")
        keep(editor, f"help_in_editor_{node}_{language}")
        assert shown == written[1].replace("*", "").replace("\n", " ")
    finally:
        fresh.post("/settings", {"Comfy.Locale": "en"})
