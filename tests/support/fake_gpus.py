"""Runs tests on fake GPUs (`devtools/fakegpu`), in a separate process, because torch must see the
GPUs from its start.

    pytestmark = pytest.mark.fake_gpus(devices=3, late=True, dynamic=True)

The tests are collected in this process. When the first is due, a second process runs all tests of
the same GPUs, and this one reports their outcomes. dynamic: whether ComfyUI's dynamic VRAM is on,
with the real comfy-aimdo. Where there are no fake GPUs the tests are skipped. On fake GPUs ComfyUI
computes as on a CPU, in float32.

In such a process `import fakegpu` gives the counters.
"""
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import pytest

from devtools import ROOT, fakegpu

CAPACITY = 4 << 30  # bytes of each GPU, until a test sets another
ON_FAKE_GPUS = "FAKEGPU" in os.environ
AS_ON_A_CPU = "--fp32-unet --fp32-vae --fp32-text-enc --use-pytorch-cross-attention"
# Environment variable: the file to which a process on fake GPUs writes its outcomes.
OUTCOMES = "FEATHERWEIGHT_TEST_OUTCOMES"


# --- in the process that collects the tests ---


class TestGroup:
    """The tests that run on the same GPUs, and their outcomes once they have run.

    Attributes:
        name: Of the GPUs, such as "3-late-dynamic".
        nodes: The tests, as this process collected them.
    """

    __test__ = False

    def __init__(self, devices: int = 3, late: bool = True, dynamic: bool = False):
        self.arguments = devices, CAPACITY >> 30, late
        self.dynamic = dynamic
        self.name = f"{devices}{'-late' if late else ''}{'-dynamic' if dynamic else ''}"
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
        outcomes_by_name = {}
        for line in map(json.loads, lines):  # of a test's three phases the worst counts
            if line["name"] not in outcomes_by_name or line["outcome"] != "passed":
                outcomes_by_name[line["name"]] = line
        return outcomes_by_name, child.stdout


class ForwardedTest(pytest.Item):
    """A test that runs on fake GPUs."""

    def __init__(self, *, group: TestGroup, node: pytest.Item, **kwargs):
        super().__init__(**kwargs)
        self.group, self.node = group, node
        self.own_markers = node.own_markers
        self.keywords.update(dict(node.keywords.items()))

    def runtest(self):
        outcome = self.group.outcome(self.node.nodeid)
        if outcome["outcome"] == "skipped":
            pytest.skip(outcome["text"])
        if outcome["outcome"] == "failed":
            raise ForwardedFailure(outcome["text"])

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, ForwardedFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.node.reportinfo()


class ForwardedFailure(Exception):
    """The failure that the process on fake GPUs reported."""


def forward(items: list[pytest.Item]):
    """Replaces the marked tests by those that run on fake GPUs, or skips them where there are
    none."""
    groups = {}
    for index, item in enumerate(items):
        marker = item.get_closest_marker("fake_gpus")
        if marker is None or ON_FAKE_GPUS:
            continue
        if fakegpu.why_not():
            version = importlib.metadata.version("torch")  # no import: ComfyUI comes first
            if "CI" in os.environ and version.endswith("+cpu"):
                raise pytest.UsageError(f"tests on fake GPUs would be skipped: {fakegpu.why_not()}")
            item.add_marker(pytest.mark.skip(reason=fakegpu.why_not()))
            continue
        group = TestGroup(**marker.kwargs)
        group = groups.setdefault(group.name, group)
        group.nodes.append(item)
        name = item.name
        if "PYTEST_XDIST_WORKER" in os.environ:
            name = processes.in_group(name, group.name)
        items[index] = ForwardedTest.from_parent(item.parent, name=name, group=group, node=item)


# --- in a process on fake GPUs ---


def report(report: pytest.TestReport):
    """Writes an outcome for the process that collected the tests."""
    if OUTCOMES in os.environ:
        text = report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            text = report.longrepr[2]
        if report.failed:
            text = "\n".join([text, *(f"{title}\n{content}" for title, content in report.sections)])
        line = {
            "name": report.nodeid, "outcome": report.outcome, "text": text.removeprefix("Skipped: ")
        }
        with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def start():
    """Sets up ComfyUI's modules as its main.py does on a machine with a GPU, with dynamic VRAM
    unless an argument turns it off."""
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
