"""Sessions on a device whose kernels need a trial: one notes what its prompt asks for, the next tries that as it starts."""
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
"""A node after which the CPU of this ComfyUI is a device whose kernels need a trial, as a GPU's do, and has just started."""
import sys


class NeedsTrials:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        import torch
        (kernels,) = [module for name, module in sys.modules.items() if name.endswith(".ops.kernels")]
        kernels.TRIALED.add("cpu")
        kernels._selectors.clear()
        kernels.selector.MOST_USED = ()
        kernels.start_trials([torch.device("cpu")])
        return {}


NODE_CLASS_MAPPINGS = {"NeedsTrials": NeedsTrials}
'''


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("trials")
    demo_files.make_models(base)
    return base


def session(base):
    env = {"XDG_CACHE_HOME": str(base / "cache"), "TMPDIR": str(base), "OMP_NUM_THREADS": "1", "FEATHERWEIGHT_KERNELS": ""}
    return Server(base, extra_custom_nodes={"needs_trials": NEEDS_TRIALS}, env=os.environ | env)


def wait_for(server, text: str):
    end = time.monotonic() + 300
    while text not in server.log():
        assert time.monotonic() < end, server.log()[-4000:]
        time.sleep(0.1)


def test_a_prompt_starts_no_trial_and_the_next_session_runs_on_what_was_proven(base):
    with session(base) as server:
        server.queue({"1": {"class_type": "NeedsTrials", "inputs": {}}})
        first, prompt = demo.run_workflow(server)
        loader = next(node for node, made in prompt.items() if made["class_type"] == demo.LOADER)
        assert first.texts[loader][-1].endswith("unpacked by torch")
        wait_for(server, "are not proven on cpu yet")
        assert "in the background" not in server.log()
        drawn = pictures(server, first)
    with session(base) as server:
        server.queue({"1": {"class_type": "NeedsTrials", "inputs": {}}})
        wait_for(server, "kernels proven")
        second = server.queue(prompt)
        assert second.texts[loader][-1].endswith("unpacked by cpp")
        assert pictures(server, second).keys() == drawn.keys()
        log = server.log()
        assert log.count("are tried on cpu in the background") == log.count("kernels proven") == 1
        assert "wrong values" not in log and "are not proven on cpu yet" not in log
