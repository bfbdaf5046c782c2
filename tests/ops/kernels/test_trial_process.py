"""Kernels are tried in another process, where a bad one harms nothing else."""
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import planted_backends
import pytest
import torch

from featherweight.ops import formats  # noqa: F401
from featherweight.ops.formats._names import format_named
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import trial_process
from featherweight.ops.kernels.kernel import Case
from featherweight.ops.kernels.trial_process import MAX_RESTARTS, run_trial
from featherweight.ops.kernels.verdicts import Verdicts

CPU = torch.device("cpu")
PACK = Path(__file__).parents[3]
Q4_0, Q8_0 = (Case("dequantize", name, torch.float32) for name in ("Q4_0", "Q8_0"))
CASE_SECONDS = 9  # on a machine that others use too
HANG_SECONDS = 4  # of a kernel that takes all the time it has
run_planted = functools.partial(run_trial, command=planted_backends.COMMAND,
                                case_seconds=CASE_SECONDS)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """The empty file of a device."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "cache").mkdir(mode=0o700)
    return Verdicts(tmp_path / "cache" / "verdicts.jsonl")


@pytest.fixture
def backend_log(tmp_path, monkeypatch, verdicts):
    """Makes each planted backend write a file of its name when it dequantises Q4_0."""
    monkeypatch.setenv(planted_backends.LOG, str(tmp_path))


def name_of(case: Case, backend: str) -> str:
    return f"{case}, rows 1 to any by {backend}"


EXPECTED = {"segfaults": "crashed", "leaves": "crashed", "is_killed": "killed", "loops": "hung",
            "holds_on": "hung", "loses_the_device": "crashed", "wrong_in_the_tail": "wrong",
            "wrong_at_odd_addresses": "wrong", "slow": "slower", "refuses": "refused",
            "garbage": "right", "fine": "right", "known": "right", "stopped_the_computer": "begun"}
HANGS = ("loops", "holds_on")
ENDS_ITS_PROCESS = ("loses_the_device_at_once", *(name for name, verdict in EXPECTED.items()
                                                  if verdict in ("crashed", "killed")))
BACKENDS = ("loses_the_device_at_once", "out_of_memory", "no_probe",
            *(name for name in EXPECTED if name not in HANGS))


class PlantedTrials(NamedTuple):
    """The results of trials with planted backends.

    Attributes:
        verdicts: By backend; `None`: of all that share one file.
        reasons: Why each trial with that file was incomplete.
    """
    verdicts: dict[str | None, Verdicts]
    reasons: list[str]

    def verdict(self, case: Case, name: str) -> str | None:
        results = self.verdicts.get(name, self.verdicts[None]).results()
        return results.verdict(name_of(case, name))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Trials of a device whose backends all misbehave.

    Two kernels have verdicts already: `planted_backends` says what a second trial of them would do.
    """
    folder = tmp_path_factory.mktemp("planted")
    folder.chmod(0o700)
    verdicts = {name: Verdicts(folder / f"{name}.jsonl") for name in (None, *HANGS)}
    verdicts[None].add(name_of(Q4_0, "known"), "right", seconds=[1, 2])
    verdicts[None].add(name_of(Q4_0, "stopped_the_computer"), "begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # These run in parallel, because each takes all the time that a kernel has.
        threads = [threading.Thread(target=run_planted,
                                    args=(CPU, [name], verdicts[name], [Q4_0, Q8_0]),
                                    kwargs={"case_seconds": HANG_SECONDS})
                   for name in HANGS]
        for thread in threads:
            thread.start()
        reasons = []
        while reasons[-1:] != [""]:
            assert len(reasons) < len(BACKENDS)
            reasons.append(run_planted(CPU, BACKENDS, verdicts[None], [Q4_0, Q8_0]))
        for thread in threads:
            thread.join()
    return PlantedTrials(verdicts, reasons)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kernel_gets_its_verdict_and_harms_no_other(name, planted):
    assert planted.verdict(Q4_0, name) == EXPECTED[name] and planted.verdict(Q8_0, name) == "right"


def test_a_trial_is_started_again_three_times_at_most(planted):
    trials, rest = divmod(len(ENDS_ITS_PROCESS), MAX_RESTARTS + 1)
    reason = f"{MAX_RESTARTS + 1} kernels ended their process"
    assert rest and planted.reasons == [reason] * trials + [""]


@pytest.mark.parametrize(("name", "verdict", "why"), [
    ("no_probe", "refused", "no driver"),
    ("loses_the_device_at_once", "crashed", "its process ended with")])
def test_a_backend_that_does_not_work_has_its_reason_and_no_kernel_of_it_is_tried(
        name, verdict, why, planted):
    results = planted.verdicts[None].results()
    probe = results.lines[f"probe by {name}"]
    assert probe["verdict"] == verdict and why in probe["why"]
    assert not [line for line in results.lines if line.endswith(f"rows 1 to any by {name}")]
    assert results.verdict("probe by fine") == "works"


@pytest.mark.parametrize(("days", "cases"), [(0, [Q4_0]), (8, [Q4_0, Q8_0])])
def test_a_case_is_tried_again_where_a_verdict_may_change(days, cases, planted, monkeypatch):
    """A kernel that lacked memory at the next start, a backend that did not work after a week."""
    assert planted.verdict(Q4_0, "out_of_memory") is None
    assert planted.verdict(Q8_0, "out_of_memory") == "right"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + days * 86400)
    assert planted.verdicts[None].results().untried([Q4_0, Q8_0]) == cases


def test_where_memory_is_short_nothing_is_tried(verdicts, monkeypatch):
    monkeypatch.setattr(trial_process, "free_bytes", lambda device: trial_process.FREE_TO_BEGIN - 1)
    reason = run_planted(CPU, ("fine",), verdicts, [Q4_0])
    assert reason == "less than 1.5 GB of its memory was free"
    monkeypatch.setattr(trial_process, "free_bytes", lambda device: trial_process.FREE_TO_GO_ON - 1)
    monkeypatch.setattr(os, "_exit", sys.exit)
    job = {"device": "cpu", "backends": ["cpp"], "file": str(verdicts.path), "case_seconds": 9,
           "cases": [Q4_0.as_json()]}
    with pytest.raises(SystemExit) as ended:
        trial_process.Trial(job).run()
    assert ended.value.code == trial_process.WITHOUT_MEMORY and verdicts.read() == []


@pytest.mark.parametrize(("status", "reason"), [
    (trial_process.WITHOUT_MEMORY, "less than 1.0 GB of its memory was free"),
    (9, "its process ended with 9")])
def test_a_process_that_ends_between_two_kernels_blames_none(status, reason, verdicts):
    verdicts.add("a kernel", "begun")  # by an earlier process
    command = sys.executable, "-c", f"raise SystemExit({status})"
    assert run_trial(CPU, ("fine",), verdicts, [Q4_0], command) == reason
    assert [line["verdict"] for line in verdicts.read()] == ["begun"]


@pytest.mark.parametrize(("sent", "expected"), [("SIGKILL", "killed"), ("SIGTERM", "killed"),
                                            ("SIGHUP", "killed"), ("SIGSEGV", "crashed")])
def test_a_signal_of_another_program_is_no_crash_of_the_kernel(sent, expected, verdicts):
    script = ("import json, os, signal, sys, time; job = json.loads(sys.stdin.readline());"
              " signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # which nohup ignores
              " line = {'name': 'a kernel', 'verdict': 'begun', 'at': time.time()};"
              " open(job['file'], 'a').write('\\n' + json.dumps(line));"
              f" os.chmod(job['file'], 0o600); os.kill(os.getpid(), signal.{sent})")
    run_trial(CPU, ("fine",), verdicts, [Q4_0], (sys.executable, "-c", script))
    assert verdicts.results().verdict("a kernel") == expected


def test_a_format_has_a_name_that_leads_back_to_it():
    expected = [FORMATS["NF4"].of_block_length(128), FORMATS["NF4"], format_named("INT8_96"),
                FORMATS["Q4_K"], FORMATS["Q4_0"], format_named("Q4_K_5120_8x2")]
    assert [format_named(packed.name) for packed in expected] == expected
    assert expected[-1].outer == 8
    for unknown in ("Q9_9", "Q4_K_128", "Q9_9_5120_8x2"):
        with pytest.raises(KeyError):
            format_named(unknown)


# --- the end of the process that started a trial ---


PROCESS = """
import sys, threading, types
from pathlib import Path
pack = types.ModuleType("featherweight")
pack.__path__ = [sys.argv[1]]
sys.modules["featherweight"] = pack
sys.path[:0] = [sys.argv[2]]
import planted_backends, time, torch
from featherweight.ops import formats
from featherweight.ops.kernels.background import start_thread
from featherweight.ops.kernels.kernel import Case
from featherweight.ops.kernels.trial_process import run_trial
from featherweight.ops.kernels.verdicts import Verdicts
folder, names = Path(sys.argv[3]), sys.argv[4:]
for name in names:
    start_thread(lambda name=name: run_trial(
        torch.device("cpu"), (name,), Verdicts(folder / "cache" / name),
        [Case("dequantize", "Q4_0", torch.float32)], planted_backends.COMMAND, SECONDS))
end = time.monotonic() + 300
while not all((folder / name).exists() for name in names):
    assert time.monotonic() < end
    time.sleep(0.05)
""".replace("SECONDS", str(HANG_SECONDS))


def start(folder: Path, *names: str, more: str = "") -> subprocess.Popen:
    """Starts a process whose trials try these kernels, and that runs `more` once they do."""
    arguments = [str(PACK), str(PACK / "tests" / "support"), str(folder), *names]
    return subprocess.Popen([sys.executable, "-c", PROCESS + more, *arguments],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def is_alive(pid: int) -> bool:
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return status.stdout.strip() not in ("", "Z")


def wait_for_end(pid: int):
    end = time.monotonic() + 300
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} runs on"
        time.sleep(0.05)


def verdict_in(folder: Path, name: str) -> str | None:
    return Verdicts(folder / "cache" / name).results().verdict(name_of(Q4_0, name))


@pytest.mark.usefixtures("backend_log")
def test_no_trial_outlives_the_process_that_started_it(tmp_path):
    """A trial whose kernel keeps Python from running ends when the kernel's time is up."""
    parent = start(tmp_path, *HANGS, more="print('tried', flush=True); time.sleep(600)")
    assert parent.stdout.readline() == "tried\n"
    parent.kill()
    parent.communicate()
    for name in HANGS:
        wait_for_end(int((tmp_path / name).read_text()))
    assert verdict_in(tmp_path, "loops") is None  # the kernel is not to blame
    assert verdict_in(tmp_path, "holds_on") == "begun"


@pytest.mark.usefixtures("backend_log")
def test_a_process_that_ends_ends_its_trial_without_error(tmp_path):
    parent = start(tmp_path, "loops")
    _, errors = parent.communicate(timeout=300)
    assert parent.returncode == 0 and not errors
    wait_for_end(int((tmp_path / "loops").read_text()))
    assert verdict_in(tmp_path, "loops") is None


def test_a_forked_process_that_ends_ends_no_trial_and_no_compiler():
    script = ("import os, sys, time\n"
              "sys.path[:0] = [sys.argv[1]]\n"
              "import child_process\n"
              "started = child_process.start_process('sleep', '3600')\n"
              "if os.fork() == 0:\n    sys.exit(0)\n"
              "os.wait(); time.sleep(0.3)\n"
              "print('runs' if started.poll() is None else 'killed', started.pid)")
    state, pid = subprocess.run([sys.executable, "-c", script, str(PACK)], capture_output=True,
                                text=True, timeout=300, check=True).stdout.split()
    assert state == "runs"
    wait_for_end(int(pid))


def test_a_process_whose_main_thread_has_ended_logs_no_trial_that_it_cannot_start(tmp_path):
    """From Python 3.12 on neither threads nor processes can be started then."""
    script = ("import sys, threading, time, types\n"
              "pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]]\n"
              "sys.modules['featherweight'] = pack\n"
              "import torch\n"
              "from featherweight.ops import formats, kernels\n"
              "from featherweight.ops.kernels import trial_startup\n"
              "def run(*arguments):\n"
              "    while threading.main_thread().is_alive(): time.sleep(0.01)\n"
              "    raise RuntimeError('no new thread at interpreter shutdown')\n"
              "trial_startup.run_trial = run\n"
              "kernels.TRIALED = {'cpu'}\n"
              "kernels.start_trials([torch.device('cpu')])\n"
              "threading.Thread(target=time.sleep, args=[2]).start()\n")
    ended = subprocess.run(
        [sys.executable, "-c", script, str(PACK)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "FEATHERWEIGHT_KERNELS": ""})
    assert ended.returncode == 0 and not ended.stderr


# --- the real command, with real backends on this CPU ---


def run_real_trial(verdicts: Verdicts, backends: tuple[str, ...], cases: list[Case],
                   first: str = "", before: str = "") -> dict:
    """Runs a trial. Returns name -> the last line.

    Args:
        verdicts: Where the results go.
        backends: Names.
        cases: What to try.
        first: Python that the process runs at its start.
        before: Python that it runs before it tries anything.
    """
    start = trial_process.START.replace("trial.main()",
                                f"trial.ROWS, trial.COLUMNS = 16, 512;{before} trial.main()")
    assert run_trial(CPU, backends, verdicts, cases,
                     (sys.executable, "-c", first + start, str(PACK)), 240) == ""
    results = verdicts.results()
    assert not results.untried(cases)
    return {name: line for name, line in results.lines.items() if "tried" not in line["verdict"]}


REFUSES_THE_HOST = """
import builtins; real = builtins.__import__
HOST = ('comfy', 'comfy_kitchen', 'comfy_aimdo', 'folder_paths', 'nodes')
def refused(name, globals=None, locals=None, fromlist=(), level=0):
    assert level or name.split('.')[0] not in HOST, name
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = refused
"""


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_the_kernels_of_a_cpu_are_right_in_a_trial_which_needs_neither_the_host_nor_its_packages(
        verdicts):
    cases = [Case("linear", "Q4_K", torch.float16),
             Case("dequantize", "Q4_K", torch.float16),
             Case("dequantize", "NF4_128", torch.float32),
             Case("int8_rows", "Q8_0", torch.int8),
             Case("int8_tokens", None, torch.bfloat16)]
    lines = run_real_trial(verdicts, ("absent", "cpp"), cases, REFUSES_THE_HOST)
    assert "KeyError('absent')" in lines.pop("probe by absent")["why"]
    assert lines.pop("probe by cpp")["verdict"] == "works" and len(lines) == 6
    assert {line["verdict"] for line in lines.values()} <= {"right", "slower"}
    assert next(iter(lines)).startswith("dequantize")
    assert "linear of Q4_K to float16, rows 2 to 4 by cpp" in lines
    assert lines["dequantize of NF4_128 to float32, rows 1 to any by cpp"]["verdict"] == "right"
