"""Opens workflows in ComfyUI's editor and saves what it writes:
`python -m devtools.workflows FILE...`, from the root.

Also writes the pages that list the examples and the blueprints. A blueprint is only opened: the
editor saves it otherwise, as *Publish Subgraph* does.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from devtools import markdown_table
from devtools.host.browser import Browser, BrowserError
from devtools.host.server import Server, ServerError
from devtools.workflows import BLUEPRINT_FOLDER, FOLDER, blueprint_paths, example_paths
from devtools.workflows.stand_ins import stand_in_files
from devtools.workflows.workflow import Workflow

HEAD = """# Example workflows

In ComfyUI: *Templates*, at the side, then the name of the pack's folder. A note in each
workflow says which file goes into which folder. On a smaller card than the table says, the rest of
the model stays in main memory.
"""
BLUEPRINT_HEAD = """# Blueprints

Each is a whole workflow as one node, in ComfyUI's node library under *Subgraph Blueprints*, in
*Comfy Blueprints*, *Featherweight*. The library shows the same text when the mouse is on a name. A
note inside each has the links to its files and says which card it fits.
"""
SAVED = "app.graphToPrompt().then(prompt => prompt.workflow)"  # as the editor exports it


def written(graph: dict) -> str:
    """Returns a workflow as JSON with a node or a link in each line: half as large as with a value
    in each."""
    def text(value) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def part(value) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(text, value)) + "\n]"
        return text(value)

    lines = (f"{text(key)}: {part(value)}" for key, value in graph.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def opened(browser: Browser, path: Path) -> dict:
    """Returns the workflow as the editor saves it, but without images: each user has others.

    Raises:
        BrowserError: The editor marks a node or complains.
    """
    browser.open_workflow(path.name, path.read_text(encoding="utf-8"))
    wrong = set(browser.complaints())
    if wrong or not browser.types():
        raise BrowserError(f"{path.name} does not open: {', '.join(sorted(wrong)) or 'no nodes'}")
    graph = browser.evaluate(SAVED)
    for node in graph["nodes"]:
        if node["type"] == "LoadImage":
            node["widgets_values"] = []
    return graph


def index() -> str:
    """Returns the page of the examples, in the order of the template browser."""
    workflows = map(Workflow, example_paths())
    rows = [(workflow.name, workflow.card, workflow.about) for workflow in workflows]
    return HEAD + "\n" + markdown_table(("workflow", "for", "what it shows"), rows)


def blueprint_index() -> str:
    """Returns the page of the blueprints."""
    rows = []
    for path in blueprint_paths():
        about, files = Workflow(path).description
        rows.append((path.stem, about, "<br>".join(f"`{file}`" for file in files)))
    titles = ("blueprint", "what it does and what to connect", "files, in `ComfyUI/models`")
    return BLUEPRINT_HEAD + "\n" + markdown_table(titles, rows)


def write_pages():
    for folder, text in ((FOLDER, index()), (BLUEPRINT_FOLDER, blueprint_index())):
        (folder / "README.md").write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m devtools.workflows", description="Open workflows in ComfyUI's editor, save"
        " what it writes, and write the pages that list them.")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE",
                        help="a workflow in example_workflows, or a blueprint in subgraphs")
    options = parser.parse_args(arguments)
    try:
        if options.files:
            with tempfile.TemporaryDirectory() as base:
                stand_in_files(Path(base), options.files)
                with Server(base) as server, Browser() as browser:
                    browser.open_editor(server)
                    for path in options.files:
                        graph = opened(browser, path)
                        if path.resolve().parent != BLUEPRINT_FOLDER:
                            path.write_text(written(graph), encoding="utf-8")
        print(*(path.stem for path in options.files), sep="\n")
        write_pages()
    except (BrowserError, ServerError, ValueError, OSError) as error:
        print(f"Failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
