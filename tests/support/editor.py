"""What tests do in ComfyUI's editor, as its user does."""
import contextlib
import json
import time

from devtools.host.browser import BrowserError
from devtools.host.server import JOINER

# What the editor itself knows, by its names.
STORES = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s"
QUEUE = "document.querySelector('[data-testid=queue-button]')"
SAVED = "app.graph.nodes.find(node => node.type === 'SaveImage')"
SELECT = """(type => {
  const node = app.graph.nodes.find(node => node.type === type)
  app.canvas.deselectAll()
  app.canvas.centerOnNode(node)
  app.canvas.selectNode(node)
})"""
SEARCH_INPUT = "document.querySelector('[role=search] input')"
# The titles that the search shows, in their order.
RESULTS = ("[...document.querySelectorAll('[data-testid=result-item]')]"
           ".map(item => item.querySelector('.truncate').textContent.trim())")
FREE_PLACE = (500, 450)  # on an empty canvas, in pixels
# The names of the templates that are shown; the editor shows more as one scrolls.
TEMPLATES = ("[...document.querySelectorAll('[data-testid^=\"template-workflow-\"]')]"
             ".map(card => card.dataset.testid.slice(18))")


def becomes(editor, question, expected, seconds=60):
    """Wait until the editor, which marks nodes a moment after it has opened a workflow, gives this
    answer."""
    deadline = time.monotonic() + seconds
    while (answer := question()) != expected:
        assert time.monotonic() < deadline, f"{answer} is not {expected}"
        time.sleep(0.1)


def run(page, server):
    """Runs the open workflow to its end, whatever that is."""
    before = len(server.get_json("/history"))
    page.click_on(QUEUE)
    becomes(page, lambda: len(server.get_json("/history")) > before, True, 300)


def with_texts(page) -> list[str]:
    """The types of the nodes that show a text, once the editor has had time to take it away."""
    time.sleep(1)
    return sorted(page.types(
        "node.widgets?.some(widget => widget.name === '$$node-text-preview' && widget.value)"))


def text_on(page, type: str) -> str:
    """The text that a node shows, as people read it."""
    shown = page.evaluate(f"app.graph.nodes.find(node => node.type === '{type}').widgets.find("
                          "widget => widget.name === '$$node-text-preview').value")
    return shown.replace(JOINER, "")


def open_help(editor, type: str):
    """Press the button above a node that opens its help page. The buttons move with the node, so a
    click may miss."""
    editor.evaluate(f"{SELECT}({json.dumps(type)})")
    for _ in range(5):
        editor.click_on("document.querySelector('[data-testid=info-button]')")
        with contextlib.suppress(BrowserError):
            editor.wait_for("!!document.querySelector('.node-help-content h1')", 10)
            return
    raise AssertionError(f"the help page of {type} does not open")


def search_nodes(page, word: str, title: str) -> list[str]:
    """Double-clicks the empty canvas and types a word. Returns the titles that the search shows,
    in their order, once this one is among them."""
    page.click(*FREE_PLACE, times=2)
    page.wait_for(f"!!{SEARCH_INPUT}")
    page.call("Input.insertText", text=word)
    becomes(page, lambda: title in page.evaluate(RESULTS), True)
    return page.evaluate(RESULTS)


def open_templates(page, folder: str) -> list[str]:
    """Opens the template browser at the templates of a pack. Returns those that it shows, in their
    order."""
    page.click_on(
        "[...document.querySelectorAll('button')].find(button => button.ariaLabel === 'Templates')")
    entry = (f"[...document.querySelectorAll('[role=dialog] *')].find(item => "
             f"item.textContent.trim() === '{folder}' && !item.children.length)")
    page.wait_for(f"!!{entry}")
    page.evaluate(f"{entry}.scrollIntoView()")  # the last of a long list
    page.click_on(entry)
    return page.wait_for(f"(cards => cards.length > 2 && cards)({TEMPLATES})")


def template_card(name: str) -> str:
    """Returns the expression for the card of a template."""
    return f"document.querySelector('[data-testid=\"template-workflow-{name}\"]')"


def sent_by(editor) -> dict:
    """Returns the prompt of the open workflow without the titles of its nodes.

    Inputs within an input, which newer versions of ComfyUI's nodes have, are left out too.
    """
    prompt = editor.prompt()
    for node in prompt.values():
        del node["_meta"]
        node["inputs"] = {name: value for name, value in node["inputs"].items() if "." not in name}
    return prompt
