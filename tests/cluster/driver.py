"""Runs a batch whose workers log what they begin and end.

    python driver.py WORKFLOW ROWS OUT ADDRESS LOG [--painted]

--painted: workers run a painter instead of ComfyUI, for tests that need no models. Its workflow is
one node, {"class_type": "Paint", "inputs": {"text", "seed", "seconds"}}; the text "crash" ends its
process.
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
import devtools.cluster  # noqa: F401  it sets the environment that ray reads

from devtools import product_module

Batch = product_module("cluster.batch_run").Batch
RowRenderer = product_module("cluster.worker").RowRenderer
digest = product_module("cluster.workflow_graph").digest


def painted(graph: dict) -> bytes:
    """Returns what the painter makes of a workflow."""
    return hashlib.sha256(digest(graph).encode()).digest() * 100


class Painter:
    def runs_prompts(self) -> bool:
        return True

    def run(self, graph: dict) -> dict[str, bytes]:
        inputs = graph["1"]["inputs"]
        if inputs["text"] == "crash":
            ctypes.string_at(0)
        time.sleep(inputs["seconds"])
        return {"1_0.png": painted(graph)}


class LoggingHost:
    """A host that logs "begins" and "ends", each with the workflow's digest and the process."""

    def __init__(self, host, log: str):
        self.host, self.log = host, log
        self.runs_prompts = host.runs_prompts

    def run(self, graph: dict) -> dict[str, bytes]:
        self.write("begins", graph)
        result = self.host.run(graph)
        self.write("ends", graph)
        return result

    def write(self, event: str, graph: dict):
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{event} {digest(graph)} {os.getpid()}\n")


def logging_renderer(log: str, is_painted: bool) -> type[RowRenderer]:
    class LoggingRenderer(RowRenderer):
        def boot(self, comfyui):
            return LoggingHost(Painter() if is_painted else super().boot(comfyui), log)

    return LoggingRenderer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("workflow", "rows", "out", "address", "log"):
        parser.add_argument(name)
    parser.add_argument("--painted", action="store_true")
    options = parser.parse_args()
    workflow = json.loads(Path(options.workflow).read_text(encoding="utf-8"))
    counts = Batch(workflow, options.rows, options.out, cpus=1, gpus=0, address=options.address,
                   worker=logging_renderer(options.log, options.painted)).run()
    print(json.dumps(counts), flush=True)
