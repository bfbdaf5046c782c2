"""Writes the example workflows: `python -m devtools.workflows`, from the root."""
import json
import tempfile

from devtools.host.server import Server
from devtools.workflows import FOLDER, WORKFLOWS
from devtools.workflows.editor import Workflow, as_ui

HEAD = """# Example workflows

In ComfyUI: *Workflow → Browse Templates*, then the name of the pack's folder. A note in each \
workflow says which file goes into
which folder and what memory it takes. `python -m devtools.workflows` writes them and this page, and
`python -m devtools.workflows.covers` their covers.
"""


def written(workflow: dict) -> str:
    """A workflow as JSON with a node or a link in each line: half as large as with a value in
    each."""
    def text(value) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def lines(values: list) -> str:
        return "[\n" + ",\n".join(map(text, values)) + "\n]"

    parts = (f"{text(key)}: {lines(value) if isinstance(value, list) and value else text(value)}"
             for key, value in workflow.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def index(workflows: list[Workflow]) -> str:
    """The page of the folder: a row for each workflow."""
    rows = "\n".join(
        f"| {workflow.name} | {_first_paragraph(workflow.about)} |" for workflow in workflows
    )
    return f"{HEAD}\n| workflow | what it shows |\n|---|---|\n{rows}\n"


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def main():
    workflows = [make() for make in WORKFLOWS]
    (FOLDER / "README.md").write_text(index(workflows), encoding="utf-8")
    with tempfile.TemporaryDirectory() as base, Server(base) as server:
        object_info = server.object_info()
    for workflow in workflows:
        (FOLDER / f"{workflow.name}.json").write_text(
            written(as_ui(workflow, object_info)), encoding="utf-8"
        )
        print(workflow.name)


if __name__ == "__main__":
    main()
