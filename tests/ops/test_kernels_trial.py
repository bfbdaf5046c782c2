"""Kernels are tried in another process: what one does there costs nobody else anything."""
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import planted_backends
import pytest
import torch
from featherweight import child_process
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight.ops.formats._names import format_named
from featherweight.ops.kernels import trial
from featherweight.ops.kernels.kernel import Case
from featherweight.ops.kernels.trial import MAX_RESTARTS, run_trial
from featherweight.ops.kernels.verdicts import Verdicts

CPU = torch.device("cpu")
PACK = Path(__file__).parents[2]
Q4_0, Q8_0 = (Case("unpack", name, torch.float32, None) for name in ("Q4_0", "Q8_0"))
CASE_SECONDS = 15  # on a machine that others use too
run_planted = functools.partial(run_trial, command=planted_backends.COMMAND,
                                case_seconds=CASE_SECONDS)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """Of a device of which nothing is known; each kernel that is tried has a line in `log`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(planted_backends.LOG, str(tmp_path / "log"))
    return Verdicts(tmp_path / "cache" / "verdicts.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)


def name_of(case: Case, backend: str) -> str:
    return f"{case}, rows 1 to any by {backend}"


def verdict(results, case: Case, backend: str) -> str | None:
    return results.verdicts.get(name_of(case, backend), {}).get("verdict")


EXPECTED = {"aborts": "crashed", "segfaults": "crashed", "leaves": "crashed", "is_killed": "killed",
            "loops": "hung", "holds_on": "hung", "loses_the_device": "crashed",
            "wrong_in_the_tail": "wrong", "wrong_at_odd_addresses": "wrong", "slow": "slower",
            "refuses": "refused", "garbage": "right", "fine": "right"}
HANGS = ("loops", "holds_on")
ENDS_ITS_PROCESS = [name for name, verdict in EXPECTED.items()
                    if verdict in ("crashed", "killed")]
BACKENDS = (*(name for name in EXPECTED if name not in HANGS), "no_room", "no_probe")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Of a device whose every backend misbehaves, and why each trial left something."""
    folder = tmp_path_factory.mktemp("zoo")
    folder.chmod(0o700)
    verdicts, of_each = Verdicts(folder / "verdicts.jsonl"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = []
        for name in HANGS:  # each beside the others, for it takes all the time that a kernel has
            of_each.append(Verdicts(folder / f"{name}.jsonl"))
            threads.append(threading.Thread(
                target=run_planted, args=(CPU, [name], of_each[-1], [Q4_0, Q8_0])))
            threads[-1].start()
        reasons = []
        while reasons[-1:] != [""]:
            assert len(reasons) < len(BACKENDS)
            reasons.append(run_planted(CPU, BACKENDS, verdicts, [Q4_0, Q8_0]))
        for thread in threads:
            thread.join()
    with open(verdicts.path, "a") as file:
        file.writelines(one.path.read_text() for one in of_each)
    return verdicts, reasons


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kernel_gets_its_verdict_and_takes_no_other_with_it(name, zoo):
    results = zoo[0].results()
    assert verdict(results, Q4_0, name) == EXPECTED[name]
    assert verdict(results, Q8_0, name) == "right"


def test_a_trial_is_started_again_three_times_at_most(zoo):
    trials, rest = divmod(len(ENDS_ITS_PROCESS), MAX_RESTARTS + 1)
    assert rest and zoo[1] == [f"{MAX_RESTARTS + 1} kernels ended their process"] * trials + [""]


def test_a_backend_that_does_not_work_has_its_reason_and_no_kernel_of_it_is_tried(zoo):
    results = zoo[0].results()
    probe = results.verdicts["probe by no_probe"]
    assert probe["verdict"] == "refused" and "no driver" in probe["why"]
    assert results.working("fine") and not results.working("no_probe")
    assert not [name for name in results.verdicts if name.endswith("rows 1 to any by no_probe")]


@pytest.mark.parametrize("days, again", [
    (0, {"no_room"}), (8, {"no_room", "refuses", "loops", "holds_on", "is_killed"})])
def test_what_crashed_is_never_tried_again_and_what_may_mend_itself_is(
        days, again, zoo, verdicts, tmp_path, monkeypatch):
    now = time.time()
    shutil.copy(zoo[0].path, verdicts.path)
    monkeypatch.setattr(time, "time", lambda: now + days * 86400)
    results = verdicts.results()
    assert (str(Q4_0) in results.tried) is False
    unknown = {name for name in (*EXPECTED, "no_room") if verdict(results, Q4_0, name) is None}
    assert unknown == again and verdict(results, Q8_0, "no_room") == "right"


def test_what_is_known_is_not_tried_again(verdicts, tmp_path):
    verdicts.end("probe by fine", "works")
    verdicts.end(name_of(Q4_0, "fine"), "right", seconds=[1, 2])
    verdicts.append(tried=str(Q4_0))
    assert run_planted(CPU, ("fine",), verdicts, [Q4_0, Q8_0]) == ""
    assert verdicts.results().tried == {str(Q4_0), str(Q8_0)}
    tried = (tmp_path / "log").read_text()
    assert "Q8_0" in tried and "Q4_0" not in tried


def test_a_probe_that_loses_the_device_takes_no_other_backend_with_it(verdicts):
    run_planted(CPU, ("loses_the_device_at_once", "fine"), verdicts, [Q8_0])
    results = verdicts.results()
    assert results.verdicts["probe by loses_the_device_at_once"]["verdict"] == "crashed"
    assert verdict(results, Q8_0, "fine") == "right"


def test_where_memory_is_short_nothing_is_begun_and_the_rest_is_left(verdicts, monkeypatch):
    start = planted_backends.START.replace(
        "planted_backends.main()", "from featherweight.ops.kernels import trial;"
        " trial.free_bytes = lambda device: 900; planted_backends.main()")
    command = (*planted_backends.COMMAND[:2], start, *planted_backends.COMMAND[3:])
    reason = run_trial(CPU, ("fine",), verdicts, [Q4_0], command)
    assert reason == "less than 1.0 GB of it were free"
    assert verdicts.results() == ({}, set(), None)


def test_a_kernel_that_an_earlier_process_ended_at_is_gone_past(verdicts, tmp_path):
    """As after a kernel that has stopped the whole computer."""
    verdicts.begin("probe by fine")
    verdicts.end("probe by fine", "works")
    verdicts.begin(name_of(Q4_0, "fine"))
    assert run_planted(CPU, ("fine",), verdicts, [Q4_0, Q8_0]) == ""
    results = verdicts.results()
    assert verdict(results, Q4_0, "fine") == "killed" and verdict(results, Q8_0, "fine") == "right"
    assert "Q4_0" not in (tmp_path / "log").read_text()


def test_a_process_that_does_not_start_blames_no_kernel(verdicts):
    command = sys.executable, "-c", "raise SystemExit(9)"
    reason = run_trial(CPU, ("fine",), verdicts, [Q4_0], command)
    assert reason == "its process ended with 9" and verdicts.results() == ({}, set(), None)


@pytest.mark.parametrize("sent, expected", [("SIGKILL", "killed"), ("SIGTERM", "killed"),
                                            ("SIGHUP", "killed"), ("SIGSEGV", "crashed")])
def test_a_signal_of_another_program_is_no_crash_of_the_kernel(sent, expected, verdicts):
    script = ("import json, os, signal, sys, time; job = json.loads(sys.stdin.readline());"
              " signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # which nohup ignores
              " line = {'begin': 'a kernel', 'at': time.time()};"
              " open(job['file'], 'a').write(json.dumps(line));"
              f" os.chmod(job['file'], 0o600); os.kill(os.getpid(), signal.{sent})")
    run_trial(CPU, ("fine",), verdicts, [Q4_0], (sys.executable, "-c", script))
    assert verdicts.results().verdicts["a kernel"]["verdict"] == expected


def test_a_kernel_is_found_again_by_the_name_of_its_format():
    made = [FORMATS["NF4"].of_block_length(128), FORMATS["NF4"], format_named("INT8_96"),
            FORMATS["Q4_K"], FORMATS["Q4_0"], format_named("Q4_K_5120_8x2")]
    assert [format_named(packed.__name__) for packed in made] == made and made[-1].outer == 8
    for unknown in ("Q9_9", "Q4_K_128", "Q9_9_5120_8x2"):
        with pytest.raises(KeyError):
            format_named(unknown)


# --- the end of the process that asked for a trial ---


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
from featherweight.ops.kernels.trial import run_trial
from featherweight.ops.kernels.verdicts import Verdicts
log = Path(sys.argv[5])
start_thread(lambda: run_trial(
    torch.device("cpu"), (sys.argv[4],), Verdicts(Path(sys.argv[3])),
    [Case("unpack", "Q4_0", torch.float32, None)], planted_backends.COMMAND, 10))
while not (log.exists() and "Q4_0" in log.read_text()):
    time.sleep(0.05)
"""


def start(name: str, verdicts: Verdicts, log: Path, more: str = "") -> subprocess.Popen:
    arguments = [str(PACK), str(PACK / "tests" / "support"), str(verdicts.path), name, str(log)]
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


@pytest.mark.parametrize("name", HANGS)
def test_no_trial_outlives_the_process_that_asked_for_it(name, verdicts, tmp_path):
    """One whose kernel lets no Python run ends when the kernel's time is over."""
    log = tmp_path / "log"
    parent = start(name, verdicts, log, "print('tried', flush=True); time.sleep(600)")
    assert parent.stdout.readline() == "tried\n"
    parent.kill()
    parent.communicate()
    wait_for_end(int(log.read_text().split()[0]))
    assert verdict(verdicts.results(), Q4_0, name) is None  # it is no fault of the kernel


def test_a_process_that_ends_ends_its_trial_without_error(verdicts, tmp_path):
    log = tmp_path / "log"
    parent = start("loops", verdicts, log)
    _, errors = parent.communicate(timeout=300)
    assert parent.returncode == 0 and not errors
    wait_for_end(int(log.read_text().split()[0]))
    results = verdicts.results()
    assert verdict(results, Q4_0, "loops") is None and results.unfinished is None


def test_a_copy_of_the_process_that_ends_takes_no_trial_and_no_compiler_with_it():
    script = ("import os, sys, time, types\n"
              "pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]]\n"
              "sys.modules['featherweight'] = pack\n"
              "from featherweight import child_process\n"
              "from featherweight.ops.kernels import background\n"
              "started = child_process.start_process('sleep', '3600')\n"
              "if os.fork() == 0:\n    sys.exit(0)\n"
              "os.wait(); time.sleep(0.3)\n"
              "print('runs' if started.poll() is None else 'killed', started.pid)")
    state, pid = subprocess.run([sys.executable, "-c", script, str(PACK)], capture_output=True,
                                text=True, timeout=300, check=True).stdout.split()
    assert state == "runs"
    wait_for_end(int(pid))
    assert not child_process.is_forked()


def test_a_process_whose_main_thread_has_ended_says_nothing_of_trials_it_cannot_start(tmp_path):
    """From Python 3.12 on no thread and no process is started then, though others go on."""
    script = ("import sys, threading, time, types\n"
              "pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]]\n"
              "sys.modules['featherweight'] = pack\n"
              "import torch\n"
              "from featherweight.ops import formats, kernels\n"
              "from featherweight.ops.kernels import selector\n"
              "def run(*arguments):\n"
              "    while threading.main_thread().is_alive(): time.sleep(0.01)\n"
              "    raise RuntimeError('no new thread at interpreter shutdown')\n"
              "selector.run_trial = run\n"
              "kernels.TRIALED = {'cpu'}\n"
              "kernels.start_trials([torch.device('cpu')])\n"
              "threading.Thread(target=time.sleep, args=[2]).start()\n")
    ended = subprocess.run([sys.executable, "-c", script, str(PACK)], capture_output=True, text=True,
                           timeout=300, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path),
                                                          "FEATHERWEIGHT_KERNELS": ""})
    assert ended.returncode == 0 and not ended.stderr


# --- the real command, with real backends on this CPU ---


def in_a_trial(verdicts: Verdicts, backend: str, cases: list[Case], before: str = "") -> dict:
    """Name -> verdict."""
    start = trial.START.replace("trial.main()",
                                f"trial.ROWS, trial.COLUMNS = 16, 512;{before} trial.main()")
    assert run_trial(CPU, (backend,), verdicts, cases,
                     (sys.executable, "-c", start, str(PACK)), 240) == ""
    results = verdicts.results()
    assert results.tried == {str(case) for case in cases}
    return {name: line["verdict"] for name, line in results.verdicts.items()}


def test_a_trial_needs_neither_the_host_nor_its_packages(verdicts):
    script = ("import builtins; real = builtins.__import__\n"
              "HOST = ('comfy', 'comfy_kitchen', 'comfy_aimdo', 'folder_paths', 'nodes')\n"
              "def refused(name, *rest, **more):\n"
              "    assert name.split('.')[0] not in HOST, name\n"
              "    return real(name, *rest, **more)\n"
              "builtins.__import__ = refused\n")
    command = (sys.executable, "-c", script + trial.START, str(PACK))
    assert run_trial(CPU, ("absent",), verdicts, [Q4_0], command) == ""
    probe = verdicts.results().verdicts["probe by absent"]
    assert probe["verdict"] == "refused" and "KeyError('absent')" in probe["why"]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_the_kernels_of_a_cpu_are_right_in_a_trial(verdicts):
    cases = [Case("linear", "Q4_K", torch.bfloat16, torch.float16),
             Case("unpack", "Q4_K", torch.bfloat16, torch.float16),
             Case("unpack", "NF4_128", torch.float32, None),
             Case("int8_rows", "Q8_0", torch.int8, None),
             Case("int8_tokens", None, torch.bfloat16, None)]
    found = in_a_trial(verdicts, "cpp", cases)
    probe, *names = found
    assert probe == "probe by cpp" and found[probe] == "works" and len(names) == 6
    assert {found[name] for name in names} <= {"right", "slower"}
    assert names[0].startswith("unpack")
    assert "linear of Q4_K to bfloat16 by way of float16, rows 2 to 4 by cpp" in names
    assert found["unpack of NF4_128 to float32, rows 1 to any by cpp"] == "right"


def test_tritons_kernels_are_right_in_a_trial_in_its_interpreter(verdicts, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # A value takes ten thousand times as long.
    found = in_a_trial(verdicts, "triton", [Case("unpack", "Q8_0", torch.float32, None)],
                       " sys.modules['featherweight.ops.kernels.check'].MANY = 6144;")
    assert found == {"probe by triton": "works",
                     "unpack of Q8_0 to float32, rows 1 to any by triton": "slower"}
