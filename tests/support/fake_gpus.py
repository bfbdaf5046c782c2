"""Tests that run on fake GPUs (`devtools/fakegpu`), in a process of their own, for torch must know
them from its start.

    pytestmark = pytest.mark.fake_gpus(devices=3, gib=4, late=True, dynamic=True)

They are collected here and run there: all that run on the same GPUs at once, when the first is
asked for. Each then has its outcome from there. dynamic: whether the host has dynamic VRAM on, with
the real comfy-aimdo. Where there are no fake GPUs the tests are skipped. On them the host computes
as it does on a CPU, in float32.

In such a process `import fakegpu` gives the counters.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import pytest

from devtools import ROOT, fakegpu

ON_FAKE_GPUS = "FAKEGPU" in os.environ
AS_ON_A_CPU = "--fp32-unet --fp32-vae --fp32-text-enc --use-pytorch-cross-attention"
# environment variable: where a process on fake GPUs writes them
OUTCOMES = "FEATHERWEIGHT_TEST_OUTCOMES"


# --- in the process that was asked for the tests ---


class TestGroup:
    """The tests that run on the same GPUs, and their outcomes once they have run.

    Attributes:
        name: Of the GPUs, such as "3x4-late-dynamic".
        nodes: The tests, as pytest found them here.
    """

    __test__ = False

    def __init__(self, devices: int = 3, gib: float = 4, late: bool = True, dynamic: bool = False):
        self.arguments = devices, gib, late
        self.dynamic = dynamic
        self.name = f"{devices}x{gib}" + "-late" * late + "-dynamic" * dynamic
        self.nodes = []
        self._outcomes = None

    def outcome(self, name: str) -> dict:
        if self._outcomes is None:
            self._outcomes, self._output = self._run()
        crashed = {
            "outcome": "failed",
            "text": f"The process on fake GPUs ended before this test.\n{self._output[-4000:]}"
        }
        return self._outcomes.get(name, crashed)

    def _run(self) -> tuple[dict, str]:
        nodes = [
            f"{node.path}::{node.nodeid.partition('::')[2]}" for node in self.nodes
            if not node.get_closest_marker("skip")
        ]
        heavy = ["--heavy"] if self.nodes[0].config.getoption("--heavy") else []
        with tempfile.NamedTemporaryFile() as outcomes:
            vram = "" if self.dynamic else " --disable-dynamic-vram"
            variables = {"HOST_ARGUMENTS": AS_ON_A_CPU + vram, OUTCOMES: outcomes.name}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *heavy, *nodes]
            child = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **fakegpu.environment(*self.arguments), **variables})
            lines = Path(outcomes.name).read_text(encoding="utf-8").splitlines()
        found = {}
        for line in map(json.loads, lines):  # of a test's three phases the worst counts
            if line["name"] not in found or line["outcome"] != "passed":
                found[line["name"]] = line
        return found, child.stdout


class ForwardedTest(pytest.Item):
    """A test that runs on fake GPUs."""

    def __init__(self, *, group: TestGroup, node: pytest.Item, **kwargs):
        super().__init__(**kwargs)
        self.group, self.node = group, node
        self.own_markers = node.own_markers
        self.keywords.update(dict(node.keywords.items()))

    def runtest(self):
        found = self.group.outcome(self.node.nodeid)
        if found["outcome"] == "skipped":
            pytest.skip(found["text"])
        if found["outcome"] == "failed":
            raise FailedThere(found["text"])

    def repr_failure(self, excinfo):
        return (
            str(excinfo.value)
            if isinstance(excinfo.value, FailedThere)
            else super().repr_failure(excinfo)
        )

    def reportinfo(self):
        return self.node.reportinfo()


class FailedThere(Exception):
    """What the test's own process says of its failure."""


def forward(items: list[pytest.Item]):
    """Replace the marked tests by those that run on fake GPUs, or skip them where there are
    none."""
    groups = {}
    for index, item in enumerate(items):
        marker = item.get_closest_marker("fake_gpus")
        if marker is None or ON_FAKE_GPUS:
            continue
        if fakegpu.why_not():
            item.add_marker(pytest.mark.skip(reason=fakegpu.why_not()))
            continue
        group = TestGroup(**marker.kwargs)
        group = groups.setdefault(group.name, group)
        group.nodes.append(item)
        name = (
            processes.in_group(item.name, group.name)
            if "PYTEST_XDIST_WORKER" in os.environ
            else item.name
        )
        items[index] = ForwardedTest.from_parent(item.parent, name=name, group=group, node=item)


# --- in a process on fake GPUs ---


def report(report: pytest.TestReport):
    """Tell the process that asked for the tests."""
    if OUTCOMES in os.environ:
        text = (
            report.longrepr[2]
            if report.skipped and isinstance(report.longrepr, tuple)
            else report.longreprtext
        )
        if report.failed:
            text = "\n".join([text, *(f"{title}\n{content}" for title, content in report.sections)])
        line = {
            "name": report.nodeid, "outcome": report.outcome, "text": text.removeprefix("Skipped: ")
        }
        with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def start():
    """Make the host's modules what its main.py makes of them where it finds a GPU, unless it is
    told not to."""
    from comfy.cli_args import enables_dynamic_vram

    if enables_dynamic_vram():
        import comfy_aimdo.control

        comfy_aimdo.control.init(nvml_pressure=False)
    import as_on_a_cpu  # noqa: F401
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    if enables_dynamic_vram():
        devices = comfy.model_management.get_all_torch_devices()
        if not comfy_aimdo.control.init_devices([(device.index, 0) for device in devices]):
            raise RuntimeError("comfy-aimdo finds no fake GPU")
        comfy_aimdo.control.set_log_warning()
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
