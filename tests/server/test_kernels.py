"""A session on a device whose kernels need a trial: its first prompt runs on torch, a later one on what was proven."""
import os
import shutil
import sys
import time

import pytest
from fake_gpu_server import pictures

from devtools import demo
from devtools.files import demo_files
from devtools.host.server import Server

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
                       reason="needs a C++ compiler"),
    pytest.mark.not_on_fake_gpus(reason="what is tried here is for the CPU")]

NEEDS_TRIALS = '''
"""A node after which the CPU of this ComfyUI is a device whose kernels need a trial, as a GPU's do."""
import sys


class NeedsTrials:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        (kernels,) = [module for name, module in sys.modules.items() if name.endswith(".ops.kernels")]
        kernels.CheckedUntilProven = kernels.ProvenInTrials
        kernels._choices.clear()
        return {}


NODE_CLASS_MAPPINGS = {"NeedsTrials": NeedsTrials}
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("trials")
    demo_files.make_models(base)
    env = {"XDG_CACHE_HOME": str(base / "cache"), "TMPDIR": str(base), "OMP_NUM_THREADS": "1", "FEATHERWEIGHT_KERNELS": ""}
    with Server(base, extra_custom_nodes={"needs_trials": NEEDS_TRIALS}, env=os.environ | env) as server:
        server.queue({"1": {"class_type": "NeedsTrials", "inputs": {}}})
        yield server


def test_the_second_prompt_runs_on_what_was_proven_and_draws_the_same(server):
    first, prompt = demo.run_workflow(server)
    end = time.monotonic() + 300
    while "kernels proven" not in server.log():
        assert time.monotonic() < end, server.log()[-4000:]
        time.sleep(0.1)
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.queue({"1": {"class_type": "PreviewAny", "inputs": {"source": "freed, after this at the latest"}}})
    second = server.queue(prompt)
    assert list(pictures(server, second).values()) == list(pictures(server, first).values())
    loader = next(node for node, made in prompt.items() if made["class_type"] == demo.LOADER)
    assert first.texts[loader][-1].endswith("unpacked by torch until kernels are proven")
    assert second.texts[loader][-1].endswith("unpacked by cpp")
    log = server.log()
    assert log.count("are tried on cpu in the background") == log.count("kernels proven") and "wrong values" not in log
