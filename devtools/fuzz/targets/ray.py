"""What *Run on Ray* takes from a workflow."""
import json
from pathlib import Path

from . import Target, target
from .workflow import as_text, loaded


@target
def ray_address(folder: Path) -> Target:
    """the choice of a Ray: this computer, or the cluster that the owner named"""
    # an input: the cluster that the owner named, a line break, the workflow's value, JSON or not
    from featherweight.cluster import ray_connection as ray
    from featherweight.cluster.comfyui_install import MachineError

    def plain(address: str) -> str:
        return "".join(letter for letter in address.strip().casefold() if letter not in "[]. ")

    def read(data: bytes):
        cluster, _, text = as_text(data).partition("\n")
        cluster = ray.named_cluster({ray.ADDRESS_ENV: cluster})
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        chosen = value.strip() if isinstance(value, str) else repr(value)
        # what is joined is the owner's text, whatever this value is
        if ray.is_cluster(value, cluster):
            assert cluster and (
                chosen == ray.THE_CLUSTER
                or plain(chosen).rpartition(":")[0] == plain(cluster).rpartition(":")[0])
        else:
            assert chosen in ("", ray.THIS_COMPUTER)

    return Target(folder, [
        b"\n\"this computer\"", b"head:6379\n\"the cluster\"", b"head:6379\nHEAD.:06379",
        b"\n127.0.0.1:6379", b"[::1]:6379\n::1:6379", b"auto\nauto",
        b"head:6379\n{\"a\": [\"head:6379\"]}", b"192.168.1.1:6379\nhead:6379"
    ], read, (MachineError,), longest=1 << 11)


@target
def ray_request(folder: Path) -> Target:
    """a prompt on its way to Ray: what is before the node, and what differs from item to item"""
    # an input: JSON with a prompt, the link whose pictures are wanted, the number of items and
    # their lines of text
    from featherweight.cluster import workflow_graph as graphs
    from featherweight.cluster.comfyui_install import MachineError
    from featherweight.cluster.workflow_variants import make_variants

    nodes = {
        "1": ("Load", {"model_name": "a.gguf"}),
        "4": ("CLIPTextEncode", {"text": "a %text% house", "clip": ["1", 1]}),
        "5": ("CLIPTextEncode", {"text": "bad", "clip": ["1", 1]}), "6": ("Seed", {"value": 5}),
        "7": ("KSampler",
              {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "seed": ["6", 0]}),
        "8": ("VAEDecode", {"samples": ["7", 0], "vae": ["1", 2]})}
    prompt = {name: {"class_type": kind, "inputs": inputs}
              for name, (kind, inputs) in nodes.items()}
    other = json.loads(json.dumps(prompt).replace("%text% ", ""))

    def read(data: bytes):
        request = loaded(data)
        if not isinstance(request, dict) or not graphs.is_link(request.get("link")):
            return  # as the host has seen to
        count, texts = request.get("count"), request.get("texts")
        if type(count) is not int or not 1 <= count <= 10 or not isinstance(texts, str):
            return
        part = graphs.upstream(graphs.read(json.dumps(request.get("prompt"))), request["link"])
        changes = make_variants(part, count, texts)
        assert len(changes) == count
        sent, _ = graphs.with_result(part, request["link"])
        for change in changes:
            drawn = graphs.apply_changes(sent, change)
            assert drawn.keys() == sent.keys() and graphs.classes(drawn) == graphs.classes(sent)
            graphs.digest(drawn)
            graphs.texts(drawn)
        line = json.dumps({"graph": sent, "changes": changes})
        assert "\n" not in line and json.loads(line)["graph"].keys() == sent.keys()

    return Target(folder, [
        json.dumps({"prompt": each, "link": ["8", 0], "count": 3, "texts": texts}).encode()
        for each, texts in ((prompt, "red\nblue"), (other, "red\n\nblue"), (other, ""))
    ], read, (graphs.GraphError, MachineError))
