"""Workflows that other packs publish, in clones of these in .dev/packs, open and are accepted
without those packs."""
import json
import re
import urllib.error

import pytest
from cloned_packs import cloned
from empty_models import touch, touch_named

from devtools.host.server import PACK, Server

# A folder of Nunchaku, as its first versions were published.
FOLDER = re.compile(r'"(svdq-\w+-[\w.-]+-(?:dev|schnell))"')


@pytest.fixture(params=["ComfyUI-MultiGPU", "ComfyUI-nunchaku"])
def paths(request):
    """The example workflows of a pack."""
    return sorted((cloned(request.param) / "example_workflows").glob("*.json"))


@pytest.mark.heavy
def test_each_opens_and_every_value_of_our_nodes_is_accepted(paths, browser, tmp_path):
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    for text in texts.values():
        touch_named(tmp_path, text)
        for name in FOLDER.findall(text):
            touch(tmp_path, "diffusion_models", f"{name}/transformer_blocks.safetensors")
    ours, refused = set(), {}
    with Server(tmp_path) as server:
        info = server.object_info()
        own_ids = {name for name, node in info.items() if node["python_module"].endswith(PACK)}
        browser.open_editor(server)
        for name, text in texts.items():
            browser.open_workflow(name, text)
            assert browser.types(), name
            for node_id, node in browser.prompt().items():
                if node.get("class_type") in own_ids:
                    ours.add(node["class_type"])
                    if error := refusal(server, node_id, node):
                        refused[name, node["class_type"]] = error
        browser.close_editor()
    assert len(ours) > 4 and not refused


def refusal(server: Server, node_id: str, node: dict) -> str:
    """What ComfyUI says against a node's own values; its links are left out."""
    values = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
    prompt = {node_id: {"class_type": node["class_type"], "inputs": values},
              "shown": {"class_type": "PreviewAny", "inputs": {"source": [node_id, 0]}}}
    try:
        server.post("/prompt", {"prompt": prompt, "client_id": "none"})
    except urllib.error.HTTPError as answer:
        errors = json.loads(answer.read())["node_errors"].get(node_id, {}).get("errors", [])
        return " ".join(each["details"] for each in errors
                        if each["type"] != "required_input_missing")
    server.post("/interrupt", {})
    server.post("/queue", {"clear": True})
    return ""
