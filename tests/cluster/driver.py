"""A batch whose workers write down what they begin and end: python driver.py WORKFLOW ROWS OUT
ADDRESS LOG [--painted]

--painted: in ComfyUI's place a painter without models or steps, for tests of what happens around
it. Its workflow is one node: {"class_type": "Paint", "inputs": {"text", "seed", "seconds"}}. The
text "crash" ends its process.
"""
import argparse
import ctypes
import hashlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
import devtools.cluster  # noqa: F401  before ray

from devtools import product_module

batch, worker, graph = (product_module(f"cluster.{name}") for name in ("batch", "worker", "graph"))
PromptResult, RowRenderer, digest = (
    product_module("cluster.embedded_comfyui").PromptResult,
    worker.RowRenderer,
    graph.digest,
)


def painted(asked: dict) -> bytes:
    """What the painter makes of a workflow."""
    return hashlib.sha256(digest(asked).encode()).digest() * 100


class Painter:
    def run(self, asked: dict) -> PromptResult:
        given = asked["1"]["inputs"]
        if given["text"] == "crash":
            ctypes.string_at(0)
        time.sleep(given["seconds"])
        return PromptResult({"1_0.png": painted(asked)})


class Noting:
    """A host that writes "begins" and "ends" down, with what it draws and its process."""

    def __init__(self, host, log: str):
        self.host, self.log = host, log

    def run(self, asked: dict) -> PromptResult:
        self.note("begins", asked)
        answer = self.host.run(asked)
        self.note("ends", asked)
        return answer

    def note(self, what: str, asked: dict):
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{what} {digest(asked)} {os.getpid()}\n")


def noting_renderer(log: str, is_painted: bool) -> type[RowRenderer]:
    class NotingRenderer(RowRenderer):
        def boot(self, comfyui):
            return Noting(Painter() if is_painted else super().boot(comfyui), log)

    return NotingRenderer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("workflow", "rows", "out", "address", "log"):
        parser.add_argument(name)
    parser.add_argument("--painted", action="store_true")
    options = parser.parse_args()
    asked = json.loads(Path(options.workflow).read_text(encoding="utf-8"))
    found = batch.Batch(asked, options.rows, options.out, cpus=1, gpus=0, address=options.address,
                        worker=noting_renderer(options.log, options.painted)).run()
    print(json.dumps(found), flush=True)
