"""Writes the example workflows and the blueprints: `python -m devtools.workflows`, from the
root."""
import json
import tempfile

from devtools.host.server import Server
from devtools.workflows import BLUEPRINT_FOLDER, BLUEPRINTS, FOLDER, WORKFLOWS
from devtools.workflows.editor import Workflow, as_ui
from devtools.workflows.subgraphs import Blueprint, as_blueprint

HEAD = """# Example workflows

In ComfyUI: *Workflow → Browse Templates*, then the name of the pack's folder. A note in each \
workflow says which file goes into
which folder and what memory it takes. `python -m devtools.workflows` writes them and this page, and
`python -m devtools.workflows.covers` their covers: the model, its type, what its weights take, \
and what goes in and comes out.
"""
BLUEPRINT_HEAD = """# Blueprints

Each is a whole workflow as one node, in ComfyUI's node library under *Subgraph Blueprints*, in
*Comfy Blueprints*, *Featherweight*. The library shows the same text when the mouse is on a name. A
note inside each has the links to its files and says what memory it takes.
`python -m devtools.workflows` writes the blueprints and this page.
"""


def written(workflow: dict) -> str:
    """A workflow as JSON with a node or a link in each line, those of subgraphs too: half as large
    as with a value in each."""
    return _lines(workflow) + "\n"


def _lines(graph: dict) -> str:
    def text(value) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def part(key: str, value) -> str:
        if key == "definitions":
            return '{"subgraphs":[' + ",".join(map(_lines, value["subgraphs"])) + "]}"
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(text, value)) + "\n]"
        return text(value)

    return "{\n" + ",\n".join(
        f"{text(key)}: {part(key, value)}" for key, value in graph.items()
    ) + "\n}"


def index(workflows: list[Workflow]) -> str:
    """The page of the examples: a row for each workflow."""
    rows = [(workflow.name, _first_paragraph(workflow.about)) for workflow in workflows]
    return _table(HEAD, ("workflow", "what it shows"), rows)


def blueprint_index(blueprints: list[Blueprint]) -> str:
    """The page of the blueprints: a row for each."""
    rows = [
        (
            blueprint.name,
            blueprint.workflow.about,
            "<br>".join(f"`{file.folder}/{file.name}`" for file in blueprint.inside.files),
        )
        for blueprint in blueprints
    ]
    titles = ("blueprint", "what it does and what to connect", "files, in `ComfyUI/models`")
    return _table(BLUEPRINT_HEAD, titles, rows)


def _table(head: str, titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (titles, *rows))
    first, _, others = lines.partition("\n")
    return f"{head}\n{first}\n{'|---' * len(titles)}|\n{others}\n"


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def main():
    workflows, blueprints = [make() for make in WORKFLOWS], [make() for make in BLUEPRINTS]
    (FOLDER / "README.md").write_text(index(workflows), encoding="utf-8")
    (BLUEPRINT_FOLDER / "README.md").write_text(blueprint_index(blueprints), encoding="utf-8")
    with tempfile.TemporaryDirectory() as base, Server(base) as server:
        object_info = server.object_info()
    files = {FOLDER / f"{workflow.name}.json": as_ui(workflow, object_info)
             for workflow in workflows}
    files |= {BLUEPRINT_FOLDER / f"{blueprint.name}.json": as_blueprint(blueprint, object_info)
              for blueprint in blueprints}
    for path, workflow in files.items():
        path.write_text(written(workflow), encoding="utf-8")
        print(path.stem)


if __name__ == "__main__":
    main()
