"""Writes the example workflows: `python -m devtools.workflows`, from the root."""
import json
import tempfile

from devtools.host.server import Server
from devtools.workflows import FOLDER, WORKFLOWS
from devtools.workflows.editor import as_ui


def main():
    with tempfile.TemporaryDirectory() as base, Server(base) as server:
        object_info = server.object_info()
    for workflow in (make() for make in WORKFLOWS):
        text = json.dumps(as_ui(workflow, object_info), indent=2, ensure_ascii=False) + "\n"
        (FOLDER / f"{workflow.name}.json").write_text(text, encoding="utf-8")
        print(workflow.name)


if __name__ == "__main__":
    main()
