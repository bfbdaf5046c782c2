"""What *Run on Ray* takes from a workflow, and what comes back to it."""
import io
import json
import random

from ..mutations import bytes_damaged, json_damaged, text_damaged
from . import Target
from .weights import as_text


class RayAddress(Target):
    """Input: the cluster that the owner named, a line break, and the value in the workflow, as JSON
    or as it is."""

    name, reads = (
        "ray_address",
        "the choice of a Ray: this computer, or the cluster that the owner named",
    )
    longest = 1 << 11

    def prepare(self):
        from featherweight.cluster import ray_connection
        from featherweight.cluster.comfyui_install import MachineError
        self.joining, self.own = ray_connection, (MachineError,)
        return [
            b"\n\"this computer\"", b"head:6379\n\"the cluster\"", b"head:6379\nHEAD.:06379",
            b"\n127.0.0.1:6379", b"[::1]:6379\n::1:6379", b"auto\nauto",
            b"head:6379\n{\"a\": [\"head:6379\"]}", b"192.168.1.1:6379\nhead:6379"
        ]

    def damaged(self, data, chance: random.Random):
        cluster, _, value = data.partition(b"\n")
        return (
            cluster
            + b"\n"
            + (json_damaged if chance.random() < 0.3 else text_damaged)(value, chance)
        )

    def read(self, data):
        cluster, _, text = as_text(data).partition("\n")
        cluster = self.joining.named_cluster({self.joining.ADDRESS_ENV: cluster})
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        chosen = value.strip() if isinstance(value, str) else repr(value)
        # what is joined is the owner's text, whatever this value is
        if self.joining.is_cluster(value, cluster):
            assert cluster and (
                chosen == self.joining.THE_CLUSTER
                or plain(chosen).rpartition(":")[0] == plain(cluster).rpartition(":")[0]
            )
        else:
            assert chosen in ("", self.joining.THIS_COMPUTER)


def plain(address: str) -> str:
    return "".join(letter for letter in address.strip().casefold() if letter not in "[]. ")


class RayRequest(Target):
    """Input: JSON with a prompt, the link whose pictures are wanted, the number of items and their
    lines of text."""

    name, reads = (
        "ray_request",
        "a prompt on its way to Ray: what is before the node, and what differs from item to item",
    )
    damaged = staticmethod(json_damaged)

    def prepare(self):
        from featherweight.cluster import ray_driver_messages, workflow_graph, workflow_variants
        from featherweight.cluster.comfyui_install import MachineError
        self.graph, self.items = workflow_graph, workflow_variants
        self.messages = ray_driver_messages
        self.own = (workflow_graph.GraphError, MachineError, ray_driver_messages.MessageError)
        nodes = {
            "1": ("Load", {"model_name": "a.gguf"}),
            "4": ("CLIPTextEncode", {"text": "a %text% house", "clip": ["1", 1]}),
            "5": ("CLIPTextEncode", {"text": "bad", "clip": ["1", 1]}), "6": ("Seed", {"value": 5}),
            "7": ("KSampler",
                  {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0],
                   "seed": ["6", 0]}), "8": ("VAEDecode", {"samples": ["7", 0], "vae": ["1", 2]})
        }
        prompt = {
            name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()
        }
        other = json.loads(json.dumps(prompt).replace("%text% ", ""))
        return [json.dumps({"prompt": each, "link": ["8", 0], "count": 3, "texts": texts}).encode()
                for each, texts in ((prompt, "red\nblue"), (other, "red\n\nblue"), (other, ""))]

    def read(self, data):
        try:
            request = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(request, dict) or not self.graph.is_link(request.get("link")):
            return  # as the host has seen to
        count, texts = request.get("count"), request.get("texts")
        if type(count) is not int or not 1 <= count <= 10 or not isinstance(texts, str):
            return
        whole = self.graph.read(json.dumps(request.get("prompt")))
        part = self.graph.upstream(whole, request["link"])
        changes = self.items.make_variants(part, count, texts)
        assert len(changes) == count and self.items.nodes_affected(part, changes) <= part.keys()
        sent = self.graph.with_result(part, request["link"])
        for change in changes:
            drawn = self.graph.apply_changes(sent, change)
            assert drawn.keys() == sent.keys() and self.graph.classes(drawn) == self.graph.classes(
                sent
            )
            self.graph.digest(drawn), self.graph.texts(drawn)
        stream = io.BytesIO()
        self.messages.write(stream, {"op": "run", "number": 0, "graph": sent, "changes": changes})
        stream.seek(0)
        assert self.messages.read(stream)[0]["graph"].keys() == sent.keys()


class RayMessages(Target):
    """Input: a stream of messages."""
    name, reads = "ray_messages", "the stream between ComfyUI and the driver of Run on Ray"

    def prepare(self):
        from featherweight.cluster import ray_driver_messages
        self.messages, self.own = ray_driver_messages, (ray_driver_messages.MessageError,)
        stream = io.BytesIO()
        for header, content in (
            ({"number": None, "event": "joined"}, b""),
            ({"number": 1, "event": "preview"}, b"\xff\xd8"),
        ):
            ray_driver_messages.write(stream, header, content)
        return [stream.getvalue(), stream.getvalue()[:40]]

    def damaged(self, data, chance: random.Random):
        length = int.from_bytes(data[:4], "big")
        if chance.random() < 0.5 and 12 + length <= len(data):
            header = json_damaged(data[12:12 + length], chance)
            return len(header).to_bytes(4, "big") + data[4:12] + header + data[12 + length:]
        return bytes_damaged(data, chance)

    def read(self, data):
        stream = io.BytesIO(data)
        while (message := self.messages.read(stream)) is not None:
            header, content = message
            assert isinstance(header, dict) and len(content) <= len(data)


class RayPictures(Target):
    """Input: JSON, a list of [header, number of bytes of data]."""

    name, reads = (
        "ray_pictures",
        "what the driver of Run on Ray says: who draws, steps, and pictures",
    )
    damaged = staticmethod(json_damaged)
    longest = 1 << 13

    def prepare(self):
        from featherweight.cluster.comfyui_install import MachineError
        from featherweight.cluster.image_collector import ImageCollector
        from featherweight.cluster.workflow_graph import GraphError
        self.collector, self.own = ImageCollector, (GraphError, MachineError)
        events = [[{"event": "workers", "value": 2}, 0]]
        for item in range(2):
            events += [[{"event": "begins", "item": item, "value": "desk"}, 0],
                       [{"event": "progress", "item": item, "value": ["7", 1, 2]}, 0],
                       [{"event": "lost", "item": item, "value": None}, 0],
                       [{"event": "image", "item": item, "index": 0, "of": 1, "shape": [2, 2, 3]},
                        48]]
        return [json.dumps(each).encode() for each in (
            events, [[{"event": "failed", "item": 0, "value": "why"}, 0]],
            [[{"event": "unusable", "item": 1, "value": "desk: why"}, 0]])]

    def read(self, data):
        try:
            events = json.loads(data)
        except (ValueError, RecursionError):
            return
        collector = self.collector(2, {"7"})
        for event in events if isinstance(events, list) else ():
            match event:
                case [dict(header), int(size)]:
                    collector.receive({"item": 0, **header}, bytes(min(max(size, 0), 1 << 12)))
                    done, total = collector.progress()
                    assert isinstance(collector.status_text(), str)
                    assert 0 <= done <= total or total < 0
        assert collector.all_images().shape[0] % 2 == 0
