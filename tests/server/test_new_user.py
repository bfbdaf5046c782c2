"""The pack as a new user meets it: the registry's package in an empty ComfyUI, in its editor.

Each step leaves screenshots at two sizes of the window in `.dev/screenshots/new_user`.
"""
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from editor import (
    SAVED,
    TEMPLATES,
    becomes,
    open_help,
    open_templates,
    run,
    template_card,
    text_on,
)
from PIL import Image

from devtools import ROOT, demo
from devtools.files import demo_files
from devtools.host.browser import RED, SETTINGS
from devtools.host.environment import DEV
from devtools.host.package import FOLDER, unpack
from devtools.host.server import JOINER, Server
from devtools.workflows import FIRST, example_paths
from devtools.workflows.workflow import Workflow

if not (ROOT / ".git").exists() or not shutil.which("git"):
    pytest.skip("needs git and its checkout", allow_module_level=True)
pytestmark = pytest.mark.heavy
SIZES = ((1440, 900), (1024, 768))  # of a window, in pixels
SCREENSHOTS = DEV / "screenshots" / "new_user"
EARLIER = Path(__file__).with_name("workflow_of_0_2_1.json")  # as that version shipped it
LOADER = "FeatherweightLoadDiffusionModel"
SAVE = "FeatherweightSavePackedModel"
TITLE = "Load Diffusion Model (GGUF, Featherweight)"
WEB_PAGE = "not_the_model.gguf"
MODERN = "Comfy.VueNodes.Enabled"
FIT_VIEW = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
COMPLAINT = "document.querySelector('[data-testid=error-overlay]')"
NODE = "(type => app.graph.nodes.find(node => node.type === type))"
# From now on the page keeps the texts that nodes are sent.
LISTEN = ("window.told = []; comfyAPI.api.api.addEventListener('progress_text', "
          "event => told.push(event.detail.text))")


@pytest.fixture(scope="module")
def computer(tmp_path_factory):
    """A ComfyUI without models, with the package and nothing else of this project."""
    base = tmp_path_factory.mktemp("new_user")
    unpack(base)
    with Server(base, with_pack=False) as server:
        yield server


@pytest.fixture(scope="module")
def models(computer):
    """What the user has downloaded by now: models, and two files that are none of them."""
    demo_files.make_models(computer.base)
    folder = computer.base / "models"
    shutil.copy(folder / "text_encoders" / demo_files.ENCODER_NAME, folder / "diffusion_models")
    (folder / "diffusion_models" / WEB_PAGE).write_text(
        "<!DOCTYPE html>\n<html><head><title>Log in</title></head><body>Log in</body></html>\n")


@pytest.fixture
def page(browser, computer):
    browser.open_editor(computer, SETTINGS | {"Comfy.RightSidePanel.IsOpen": False})
    browser.resize(*SIZES[0])
    yield browser
    browser.close_editor()


def keep(page, name: str):
    """A screenshot at each size, for whoever wants to look."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width, height in reversed(SIZES):
        page.resize(width, height)
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=width / 2, y=height - 3)
        time.sleep(1)  # what moves, and the canvas
        (SCREENSHOTS / f"{name} at {width}.png").write_bytes(page.screenshot())


def open_demo(page, text: str | None = None):
    """Opens the demo's workflow, or another, and shows all of it."""
    page.open_workflow("demo.json", text or demo.WORKFLOW.read_text(encoding="utf-8"))
    page.evaluate(FIT_VIEW)


def complaint(page) -> str:
    """Waits for the editor's message about an error, and returns the panel that explains it."""
    page.wait_for(f"!!{COMPLAINT}?.checkVisibility()")
    page.click_on("document.querySelector('[data-testid=error-overlay-see-errors]')")
    time.sleep(1)
    return page.evaluate("document.body.innerText").replace(JOINER, "")


def image(page, server) -> np.ndarray:
    """The pixels that Save Image shows."""
    page.evaluate(FIT_VIEW)  # what is out of sight has no image
    page.wait_for(f"{SAVED}.imgs?.[0]?.naturalWidth", 60)
    outputs = list(server.get_json("/history").values())[-1]["outputs"]
    entry, = (entry for output in outputs.values() for entry in output.get("images", ())
              if entry["type"] == "output")
    return np.asarray(Image.open(server.base / "output" / entry["subfolder"] / entry["filename"]))


def test_1_the_first_start_has_the_nodes_and_no_complaint(browser, computer):
    browser.resize(*SIZES[0])
    browser.open_editor(computer, {})
    log = computer.log()
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    assert not [line for line in log.splitlines() if "[Featherweight]" in line]
    browser.wait_for(f"{TEMPLATES}.length")  # which ComfyUI shows on the first start
    keep(browser, "1 first start")
    own = {name for name, node in computer.object_info().items()
           if node["python_module"] == f"custom_nodes.{FOLDER}"}
    assert LOADER in own
    assert own <= {*browser.evaluate("Object.keys(LiteGraph.registered_node_types)")}
    assert not browser.evaluate(f"!!{COMPLAINT}")
    assert not browser.evaluate("!!document.querySelector('.p-toast-message-error')")
    browser.close_editor()


def test_2_the_templates_are_in_order_and_the_first_says_what_to_download(page):
    names = [path.stem for path in example_paths()]
    shown = open_templates(page, FOLDER)
    assert shown == names[:len(shown)]
    page.wait_for("[...document.querySelectorAll('[data-testid^=\"template-workflow-\"] img')]"
                  ".filter(cover => cover.naturalWidth).length > 5")
    keep(page, "2 templates")
    first = next(name for name in names if name.startswith(FIRST))
    page.click_on(template_card(first))
    page.wait_for(f"app.graph.nodes.some(node => node.type === '{LOADER}')")
    files = [Path(file).name
             for file in Workflow(next(p for p in example_paths() if p.stem == first)).files
             if file.endswith(".safetensors")]
    becomes(page, lambda: len(page.types(RED)), 3)
    keep(page, "2 start here")
    text = complaint(page)
    keep(page, "2 start here, missing files")
    assert [file for file in files if file not in text] == [] != files


def test_3_the_face_of_the_loader_is_the_model_and_what_it_is_packed_to(browser, computer):
    """Where nodes have the modern design: the classic one shows the advanced inputs of any node."""
    computer.post("/settings", {MODERN: True})
    try:
        browser.open_editor(computer)
        browser.resize(*SIZES[0])
        browser.evaluate("app.graph.clear()")
        browser.evaluate(f"void app.graph.add(LiteGraph.createNode('{LOADER}'))")
        browser.evaluate(f"app.canvas.centerOnNode({NODE}('{LOADER}'))")
        text = "document.querySelector('[data-node-id]').innerText.split('\\n')"
        face = {"model", "pack to"}
        more = {"compute", "disable dynamic VRAM", "module"}
        becomes(browser, lambda: {*browser.evaluate(text)} & (face | more), face)
        keep(browser, "3 face")
        browser.click_on("[...document.querySelectorAll('[data-node-id] button')].find("
                         "button => /advanced/i.test(button.innerText))")
        becomes(browser, lambda: {*browser.evaluate(text)} & (face | more), face | more)
        keep(browser, "3 advanced")
        open_help(browser, LOADER)
        keep(browser, "3 help")
        assert TITLE in browser.evaluate("document.querySelector('.node-help-content').innerText")
    finally:
        computer.post("/settings", {MODERN: False})
        browser.close_editor()


@pytest.mark.parametrize(("file", "advice"), [
    (demo_files.ENCODER_NAME, ["text encoder", "Load Text Encoder (GGUF, Featherweight)"]),
    (WEB_PAGE, ["it is a web page, not the model", "Download the model itself"]),
], ids=["text encoder", "web page"])
def test_4_a_wrong_file_is_named_with_what_to_do(page, computer, models, file, advice):
    open_demo(page, demo.WORKFLOW.read_text(encoding="utf-8").replace(demo.MODEL_NAME, file))
    run(page, computer)
    page.wait_for(f"!!{COMPLAINT}?.checkVisibility()")
    keep(page, f"4 wrong file {file}")
    text = text_on(page, LOADER)
    assert [part for part in (file, *advice) if part not in text] == []
    text = complaint(page)
    keep(page, f"4 wrong file {file}, details")
    assert [part for part in (file, *advice) if part not in text] == []


def test_5_a_saved_model_is_in_the_list_of_the_loader_and_runs(page, computer, models):
    open_demo(page)
    page.evaluate(f"""(() => {{
        const save = LiteGraph.createNode('{SAVE}'), loader = {NODE}('{LOADER}');
        app.graph.add(save);
        save.pos = [loader.pos[0], loader.pos[1] - save.size[1] - 120];
        loader.connect(0, save, 0);
    }})()""")
    hidden = f"{NODE}('{SAVE}').widgets.find(widget => widget.name === 'size_gb').hidden"
    assert page.evaluate(hidden)
    page.evaluate(FIT_VIEW)
    keep(page, "5 to save")
    page.evaluate(LISTEN)
    run(page, computer)
    page.evaluate("app.canvas.ds.scale = 1;" f"app.canvas.centerOnNode({NODE}('{SAVE}'))")
    keep(page, "5 saved")
    texts = [text.replace(JOINER, "") for text in page.evaluate("told")]
    saved = max((computer.base / "output" / "diffusion_models").iterdir())
    assert re.fullmatch(r"ComfyUI_Q4_K_0000\d_\.gguf", saved.name)
    assert any(saved.name in text for text in texts)
    values = f"{NODE}('{LOADER}').widgets[0].options.values"
    assert saved.name not in page.evaluate(values)
    page.press("r", "KeyR")
    becomes(page, lambda: saved.name in page.evaluate(values), True)
    page.evaluate(f"app.graph.remove({NODE}('{SAVE}'));"
                  f"{NODE}('{LOADER}').widgets[0].value = '{saved.name}'")
    run(page, computer)
    assert image(page, computer).std() > 10
    page.evaluate(FIT_VIEW)
    keep(page, "5 loaded again")


def test_6_a_workflow_of_0_2_1_opens_and_runs_as_it_did(page, computer, models):
    open_demo(page, EARLIER.read_text(encoding="utf-8"))
    assert not page.types(RED) and not page.evaluate(f"!!{COMPLAINT}")
    values = {node["class_type"]: node["inputs"] for node in page.prompt().values()}
    assert values[LOADER]["pack_to"] == "no change"
    assert values["FeatherweightApplyLora"]["misfits"] == "skip"
    run(page, computer)
    earlier = image(page, computer)
    keep(page, "6 earlier")
    open_demo(page, demo.LORA_WORKFLOW.read_text(encoding="utf-8"))
    run(page, computer)
    assert np.array_equal(earlier, image(page, computer))
