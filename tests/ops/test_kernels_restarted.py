"""A trial that goes on where another ended, and what is no fault of the kernel that it ended at."""
import os
import subprocess
import sys
from pathlib import Path

import planted_backends
import pytest
import torch
from featherweight.ops import formats  # noqa: F401
from featherweight import child_process
from featherweight.ops.kernels import backends, trial
from featherweight.ops.kernels.kernel import Backend, Kernel
from featherweight.ops.kernels.trial_process import run_trial
from featherweight.ops.kernels.verdicts import Case, kernel_text

PACK = Path(__file__).parents[2]
UNPACK, LINEAR = (Case(op, "Q8_0", torch.float32, None) for op in ("unpack", "linear"))
JOB = {"device": "cpu", "shapes": {"Q8_0": [[16, 256]]}, "known": {}, "least_free": 0}
posix_only = pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")


def unpack(packed_format, tensors, out, value_dtype, first):
    packed_format.unpack_into(tensors, out, value_dtype, first)


def multiply(packed_format, tensors, input, addend, out, value_dtype):
    weight = torch.empty((out.shape[1], input.shape[1]), dtype=torch.float32)
    torch.matmul(input, packed_format.unpack_into(tensors, weight, value_dtype).t(), out=out)
    if addend is not None:
        out += addend


@pytest.mark.parametrize("known", [{}, {
    "probe": {"verdict": "right"}, str(UNPACK): {"verdict": "tried"},
    kernel_text(UNPACK, [1, None]): {"verdict": "right", "case": str(UNPACK), "rows": [1, None], "times": {"": [1, 2]}}}],
    ids=["first", "restarted"])
@pytest.mark.parametrize("cases", [[UNPACK, LINEAR], [LINEAR]], ids=["both", "product"])
def test_a_product_is_timed_beside_the_kernel_that_unpacks_for_torchs(cases, known, monkeypatch, one_thread):
    floats = frozenset([torch.float32])
    backend = Backend("stub", lambda device: None, tuple(Kernel(op, frozenset(["Q8_0"]), floats, run)
                                                         for op, run in (("unpack", unpack), ("linear", multiply))))
    monkeypatch.setitem(backends.IMPORTS, "stub", lambda: backend)
    job = JOB | {"backends": ["stub"], "cases": [case.as_json() for case in cases], "known": {"stub": known}}
    said = []
    tried = trial.Trial(job, said.append)
    monkeypatch.setattr(tried.timing, "times", lambda *about: {})
    tried.run()
    expected = set() if known == {} and UNPACK not in cases else {unpack}
    assert tried.timing._unpackers.get(("Q8_0", torch.float32, None), set()) == expected
    assert {"verdict": "tried"} in [line.get("verdict") for line in said]


@posix_only
def test_a_probe_that_loses_the_device_takes_no_other_backend_with_it():
    said = {}
    job = JOB | {"backends": ["loses_the_device_at_once", "fine"], "cases": [UNPACK.as_json()]}
    outcome = run_trial(job, lambda name, text, verdict: said.update({(name, text): verdict["verdict"]}), 300,
                        command=planted_backends.COMMAND)
    assert (outcome.how, outcome.at, said) == ("crashed", ("loses_the_device_at_once", "probe"), {})


@posix_only
@pytest.mark.parametrize("sent, how", [("SIGKILL", "killed"), ("SIGTERM", "failed"), ("SIGHUP", "failed"), ("SIGALRM", "late"),
                                       ("SIGSEGV", "crashed")])
def test_a_signal_of_another_program_is_no_crash_of_the_kernel(sent, how):
    script = ('import os, signal, sys; sys.stdin.readline();'
              'print(\'{"trying": ["fine", "a kernel"]}\', flush=True);'
              f' signal.signal(signal.{sent}, signal.SIG_DFL) if "{sent}" != "SIGKILL" else None;'
              f' os.kill(os.getpid(), signal.{sent})')
    outcome = run_trial(JOB, lambda *line: None, 60, command=(sys.executable, "-c", script))
    assert (outcome.how, outcome.at) == (how, ("fine", "a kernel"))


@posix_only
def test_a_copy_of_the_process_that_ends_takes_no_trial_and_no_compiler_with_it():
    script = ("import os, sys, time, types; pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]]\n"
              "sys.modules['featherweight'] = pack\n"
              "from featherweight import child_process\nfrom featherweight.ops.kernels import background\n"
              "started = child_process.start_process('sleep', '60')\n"
              "if os.fork() == 0:\n    sys.exit(0)\n"
              "os.wait(); time.sleep(0.3)\n"
              "print('runs' if started.poll() is None else 'killed', started.pid)")
    said, pid = subprocess.run([sys.executable, "-c", script, str(PACK)], capture_output=True, text=True, timeout=120,
                               check=True).stdout.split()
    assert said == "runs"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert not child_process.is_forked()
