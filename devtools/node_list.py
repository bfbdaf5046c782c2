"""Writes node_list.json: `python -m devtools.node_list`, from the root.

ComfyUI Manager finds the pack for a missing node by the ids in its sources, or by this list.
"""
import json
import tempfile

from devtools import ROOT
from devtools.host.server import PACK, Server

PATH = ROOT / "node_list.json"


def main():
    with tempfile.TemporaryDirectory() as base, Server(base) as server:
        nodes = server.object_info()
    names = {node_id: node["display_name"] for node_id, node in sorted(nodes.items())
             if node["python_module"] == f"custom_nodes.{PACK}"}
    PATH.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    print(f"{PATH}: {len(names)} nodes")


if __name__ == "__main__":
    main()
