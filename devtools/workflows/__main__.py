"""Writes the example workflows: `python -m devtools.workflows`, from the root."""
import json
import tempfile

from devtools.host.server import Server
from devtools.workflows import FOLDER, WORKFLOWS
from devtools.workflows.editor import as_ui


def written(workflow: dict) -> str:
    """A workflow as JSON with a node or a link in each line: half as large as with a value in each."""
    def text(value) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def lines(values: list) -> str:
        return "[\n" + ",\n".join(map(text, values)) + "\n]"

    parts = (f"{text(key)}: {lines(value) if isinstance(value, list) and value else text(value)}"
             for key, value in workflow.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    with tempfile.TemporaryDirectory() as base, Server(base) as server:
        object_info = server.object_info()
    for workflow in (make() for make in WORKFLOWS):
        (FOLDER / f"{workflow.name}.json").write_text(written(as_ui(workflow, object_info)), encoding="utf-8")
        print(workflow.name)


if __name__ == "__main__":
    main()
