"""Kernels are tried in another process: what one of them does there costs nobody else anything."""
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import planted_backends
import pytest
import torch
from featherweight.ops import formats, kernels  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight.ops.kernels import background, proving, trial_process
from featherweight.ops.kernels.proving import Prover
from featherweight.ops.formats._names import format_named
from featherweight.ops.kernels.trial_process import Outcome, run_trial
from featherweight.ops.kernels.verdicts import Case, is_verdict

CPU = torch.device("cpu")
PACK = Path(__file__).parents[2]
SUPPORT = str(PACK / "tests" / "support")
Q4_0, Q8_0 = (Case("unpack", name, torch.float32, None) for name in ("Q4_0", "Q8_0"))
SHAPES = {"Q4_0": {(16, 256)}, "Q8_0": {(16, 256)}}
ATTEMPT = 15  # seconds, for a machine that others use too
run_planted = functools.partial(run_trial, command=planted_backends.COMMAND, attempt_seconds=ATTEMPT)
posix_only = pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the lock is, for the processes that a test starts
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(proving, "ASK_EVERY", 0.05)
    return tmp_path / "cache" / "featherweight" / "verdicts"


def finished(prover: Prover, seconds: float = 300):
    """The same, once it has nothing to do any more."""
    end = time.monotonic() + seconds
    while prover.at_work:
        assert time.monotonic() < end, "the trial goes on for ever"
        time.sleep(0.02)
    return prover


def proven(prover: Prover, case: Case):
    return prover.proven(case.op, FORMATS[case.format], case.dtype, case.value_dtype)


def verdict(prover: Prover, backend: str, case: Case) -> str | None:
    return prover._read.value[backend].known.get(f"{case}, rows 1 to any", {}).get("verdict")


VERDICTS = {"aborts": "crashed", "segfaults": "crashed", "leaves": "crashed", "is_killed": "killed", "loops": "hung",
            "wrong_in_the_tail": "wrong", "wrong_at_odd_addresses": "wrong", "slow": "slower", "no_room": "memory",
            "refuses": "refused", "loses_the_device": "crashed", "garbage": "right", "fine": "right"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A device whose every backend misbehaves in its own way, tried to the end; and the log of that."""
    folder, records = tmp_path_factory.mktemp("zoo"), []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(kernels.__name__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(tempfile, "tempdir", str(folder))
        level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
        prover = Prover(CPU, (*VERDICTS, "no_probe"), run_planted)
        prover.want([Q4_0, Q8_0], SHAPES)
        finished(prover)
        logger.removeHandler(handler)
        logger.setLevel(level)
        yield prover, records


@posix_only
@pytest.mark.parametrize("name, expected", VERDICTS.items())
def test_each_kernel_gets_its_verdict_and_takes_no_other_with_it(name, expected, zoo):
    prover, _ = zoo
    assert verdict(prover, name, Q4_0) == expected
    assert verdict(prover, name, Q8_0) == "right"


@posix_only
def test_only_what_is_right_and_faster_is_used(zoo):
    prover, _ = zoo
    assert {kernel.backend for kernel in proven(prover, Q4_0) if kernel.is_faster(None)} == {"garbage", "fine"}
    assert {kernel.backend for kernel in proven(prover, Q8_0)} == set(VERDICTS)
    shares = [kernel.share for kernel in proven(prover, Q8_0)]
    assert shares == sorted(shares)


@posix_only
def test_the_log_says_what_a_trial_found_and_warns_of_wrong_values_only(zoo):
    _, records = zoo
    lines = [(record.levelno, record.getMessage()) for record in records if record.levelno > logging.DEBUG]
    infos = [text for level, text in lines if level == logging.INFO]
    warnings = [text for level, text in lines if level > logging.INFO]
    assert len(infos) == 2 and "are tried on cpu in the background" in infos[0]
    assert infos[1].startswith("[Featherweight] cpu: 15 kernels proven, unpack ")
    assert "times as fast as torch, 1 slower, 2 wrong, 4 crashed, 1 hung, 1 killed" in infos[1] and kernels.ISSUES in infos[1]
    assert len(warnings) == 2
    assert all("A kernel gives wrong values here" in text and kernels.ISSUES in text for text in warnings)
    assert "unpack of Q4_0 to float32, rows 1 to any by wrong_in_the_tail" in "".join(warnings)


@posix_only
@pytest.mark.parametrize("days, again", [(0, {"no_room"}), (8, {"no_room", "refuses", "loops", "is_killed"})])
def test_what_crashed_is_never_tried_again_and_what_may_mend_itself_is(days, again, zoo, tmp_path, monkeypatch):
    log, cache = tmp_path / "log", tmp_path / "cache"
    shutil.copytree(zoo[0]._read.value["fine"]._path.parents[1], cache / "featherweight")
    for file in (cache / "featherweight" / "verdicts").iterdir():
        content = json.loads(file.read_text())
        for found in content["verdicts"].values():
            found["at"] -= days * 86400
        file.write_text(json.dumps(content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv(planted_backends.LOG, str(log))
    prover = Prover(CPU, tuple(VERDICTS), run_planted)
    prover.want([Q4_0, Q8_0], SHAPES)
    finished(prover)
    assert {tuple(line.split()[1:]) for line in log.read_text().splitlines()} == {(name, "Q4_0") for name in again}
    assert {name: verdict(prover, name, Q4_0) for name in again} == {name: VERDICTS[name] for name in again}


def test_a_kernel_is_found_again_by_the_name_of_its_format():
    made = [FORMATS["NF4"].of_block_length(128), FORMATS["NF4"], format_named("INT8_96"), FORMATS["Q4_K"], FORMATS["Q4_0"],
            format_named("Q4_K_5120_8x2")]
    assert [format_named(packed.__name__) for packed in made] == made and made[-1].outer == 8
    for unknown in ("Q9_9", "Q4_K_128", "Q9_9_5120_8x2"):
        with pytest.raises(KeyError):
            format_named(unknown)


# --- without a process: what is made of what it says ---


class Run:
    """In the place of `run_trial`. turns: for each call the verdicts it says and the outcome it ends with."""

    def __init__(self, *turns):
        self.turns, self.jobs = list(turns), []

    def __call__(self, job, hear, seconds):
        self.jobs.append(json.loads(json.dumps(job)))
        said, outcome = self.turns.pop(0)
        for line in said:
            hear(*line)
        return outcome


def right(case: Case, backend="fine", rows=(1, None), times=None):
    text = f"{case}, rows {rows[0]} to {rows[1] or 'any'}"
    return backend, text, {"verdict": "right", "case": str(case), "rows": list(rows), "times": times or {"": [1.0, 2.0]}}


def tried(case: Case, backend="fine"):
    return backend, str(case), {"verdict": "tried"}


ENDED = Outcome("ended")
PROBED = "fine", "probe", {"verdict": "right"}


def test_what_is_proven_is_used_at_once_and_by_the_next_process(cache):
    run = Run(([PROBED, right(Q4_0), tried(Q4_0)], ENDED))
    first = Prover(CPU, ("fine",), run)
    first.want([Q4_0])
    assert proven(first, Q4_0) is None
    ((kernel),) = proven(finished(first), Q4_0)
    assert (kernel.backend, kernel.rows, kernel.share) == ("fine", (1, None), 0.5)
    second = Prover(CPU, ("fine",), Run())
    assert second.proven("unpack", FORMATS["Q4_0"], torch.float32, None, wait=True) == (kernel,)


def test_a_case_that_comes_later_is_tried_with_what_is_known(cache):
    run = Run(([PROBED, right(Q4_0), tried(Q4_0)], ENDED), ([right(Q8_0), tried(Q8_0)], ENDED))
    prover = Prover(CPU, ("fine",), run)
    prover.want([Q4_0], SHAPES)
    finished(prover)
    assert proven(prover, Q8_0) is None
    prover.want([Q8_0])
    assert proven(finished(prover), Q8_0)
    assert [job["cases"] for job in run.jobs] == [[Q4_0.as_json()], [Q8_0.as_json()]]
    assert run.jobs[0]["shapes"] == {"Q4_0": [[16, 256]], "Q8_0": [[16, 256]]}
    assert run.jobs[1]["known"]["fine"]["probe"]["verdict"] == "right"


def test_after_some_crashes_the_rest_of_a_backend_is_not_tried(cache):
    cases = [Case("unpack", name, torch.float32, None) for name in ("Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q5_1")]
    crashes = [([PROBED], Outcome("crashed", ("fine", f"{case}, rows 1 to any"), "it ended")) for case in cases]
    run = Run(*crashes[:proving.MOST_CRASHES], ([], ENDED))
    prover = Prover(CPU, ("fine",), run)
    prover.want(cases, {})
    finished(prover)
    assert len(run.jobs) == proving.MOST_CRASHES + 1
    assert run.jobs[-1]["known"]["fine"][str(cases[-1])]["verdict"] == "skipped"
    assert [proven(prover, case) for case in cases] == [()] * len(cases)


@pytest.mark.parametrize("outcome", [Outcome("crashed", None, "it did not start"), Outcome("late", ("fine", "x")), ENDED],
                         ids=lambda outcome: outcome.how)
def test_a_trial_that_finds_out_nothing_is_not_repeated(outcome, cache):
    run = Run(([], outcome))
    prover = Prover(CPU, ("fine",), run)
    prover.want([Q4_0], {})
    assert proven(finished(prover), Q4_0) is None and not prover.at_work and len(run.jobs) == 1


def test_no_trial_begins_while_little_of_the_device_is_free(cache, monkeypatch):
    free = [0, proving.LEAST_FREE - 1, proving.LEAST_FREE, 0, proving.LEAST_FREE]
    asked = []
    monkeypatch.setattr(proving, "free_bytes", lambda device: asked.append(free.pop(0)) or asked[-1])
    run = Run(([PROBED], Outcome("stopped", None, "900 bytes are free")), ([right(Q4_0), tried(Q4_0)], ENDED))
    prover = Prover(CPU, ("fine",), run)
    prover.want([Q4_0], {})
    assert proven(finished(prover), Q4_0)
    assert not free and len(run.jobs) == 2


def test_a_driver_that_raises_leaves_the_work_to_torch(cache, monkeypatch, caplog):
    def no_driver(device, name):
        raise RuntimeError("no driver")

    monkeypatch.setattr(proving, "key_of", no_driver)
    prover = Prover(CPU, ("fine",), Run())
    prover.want([Q4_0])
    assert prover.proven("unpack", FORMATS["Q4_0"], torch.float32, None, wait=True) in ((), None)
    assert proven(finished(prover), Q4_0) == ()
    assert "torch does their work" in caplog.text


def test_a_trial_takes_no_cancellation_from_the_prompt_that_runs(cache, monkeypatch):
    asked_in = []
    monkeypatch.setattr(background, "raise_if_cancelled", lambda: asked_in.append(threading.current_thread()))
    monkeypatch.setattr(proving, "key_of", lambda device, name: time.sleep(0.2) or {"device": "slow"})
    prover = Prover(CPU, ("fine",), Run(([PROBED, tried(Q4_0)], ENDED)))
    prover.want([Q4_0], {})
    finished(prover)
    assert not asked_in and proven(prover, Q4_0) == ()


# --- with processes of their own ---


PROCESS = """
import sys, time, types
pack = types.ModuleType("featherweight")
pack.__path__ = [sys.argv[1]]
sys.modules["featherweight"] = pack
sys.path[:0] = [sys.argv[2]]
import planted_backends, torch
from featherweight.ops import formats
from featherweight.ops.kernels.proving import Prover
from featherweight.ops.kernels.trial_process import run_trial
from featherweight.ops.kernels.verdicts import Case
prover = Prover(torch.device("cpu"), tuple(sys.argv[3:]),
                lambda *arguments: run_trial(*arguments, command=planted_backends.COMMAND))
prover.want([Case("unpack", name, torch.float32, None) for name in ("Q4_0", "Q8_0")],
            {name: {(16, 256)} for name in ("Q4_0", "Q8_0")})
while prover.at_work:
    time.sleep(0.05)
print(sum(verdict["verdict"] == "right" for verdict in prover._read.value[sys.argv[3]].known.values()))
"""


def start(*names, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(PACK), SUPPORT, *names], stdout=subprocess.PIPE,
                            text=True, **options)


def test_two_processes_at_once_try_a_kernel_once(cache, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv(planted_backends.LOG, str(log))
    both = [start("fine"), start("fine")]
    outputs = [process.communicate(timeout=300)[0].split() for process in both]
    assert outputs == [["3"], ["3"]]  # the probe and two kernels
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 1


@posix_only
@pytest.mark.parametrize("name", ["loops", "holds_on"])
def test_no_trial_outlives_the_process_that_asked_for_it(name, cache, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv(planted_backends.LOG, str(log))
    parent = start(name)
    try:
        end = time.monotonic() + 120
        while not (log.exists() and "Q4_0" in log.read_text()):
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.communicate()
    child = int(log.read_text().split()[0])
    end = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < end, "the trial runs on"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    except ProcessLookupError:
        return False


@posix_only
def test_a_process_that_ends_ends_its_trial_without_error(cache, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv(planted_backends.LOG, str(log))
    script = PROCESS.replace("while prover.at_work:", f"import pathlib\nwhile not pathlib.Path({str(log)!r}).exists():")
    ended = subprocess.run([sys.executable, "-c", script.rpartition("print")[0], str(PACK), SUPPORT, "loops"],
                           timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr
    child = int(log.read_text().split()[0])
    assert not is_alive(child)


def test_a_trial_needs_neither_the_host_nor_its_packages(tmp_path):
    """On the real command, with the real backend of a CPU; its job is one that it can do nothing with."""
    script = ("import builtins; real = builtins.__import__\n"
              "def refused(name, *rest, **more):\n"
              "    assert name.split('.')[0] not in ('comfy', 'comfy_kitchen', 'comfy_aimdo', 'folder_paths', 'nodes'), name\n"
              "    return real(name, *rest, **more)\n"
              "builtins.__import__ = refused\n")
    said = []
    outcome = run_trial({"device": "cpu", "backends": ["absent"], "cases": [Q4_0.as_json()], "shapes": {}, "known": {},
                         "least_free": 0}, lambda *line: said.append(line), 120,
                        command=(sys.executable, "-c", script + trial_process.START, str(PACK)))
    assert outcome.how == "ended"
    ((backend, text, found),) = said
    assert (backend, text, found["verdict"]) == ("absent", "probe", "refused") and "KeyError('absent')" in found["why"]


def in_a_trial(backend: str, cases: list[Case], before: str = "") -> dict[str, dict]:
    """What the real backend's kernels are found to be on this CPU: text -> verdict."""
    shapes = {case.format: [[16, 512]] for case in cases if case.format}
    said = {}
    start = trial_process.START.replace("trial.main()", f"{before}; trial.main()" if before else "trial.main()")
    outcome = run_trial({"device": "cpu", "backends": [backend], "cases": [case.as_json() for case in cases], "shapes": shapes,
                         "known": {}, "least_free": 0}, lambda name, text, verdict: said.update({text: verdict}), 240,
                        command=(sys.executable, "-c", start, str(PACK)))
    assert outcome.how == "ended", outcome
    assert {str(case) for case in cases} <= said.keys()
    return {text: verdict for text, verdict in said.items() if verdict["verdict"] != "tried"}


@pytest.mark.skipif(os.name != "posix" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_the_kernels_of_a_cpu_are_right_in_a_trial(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = in_a_trial("cpp", [
        Case("linear", "Q4_K", torch.bfloat16, torch.float16), Case("unpack", "Q4_K", torch.bfloat16, torch.float16),
        Case("unpack", "NF4_128", torch.float32, None), Case("int8_rows", "Q8_0", torch.int8, None)])
    assert {verdict["verdict"] for verdict in found.values()} <= {"right", "slower"}
    texts = [text for text in found if text != "probe"]
    assert texts[0].startswith("unpack") and len(texts) == 5
    assert found["linear of Q4_K to bfloat16 by way of float16, rows 2 to 4"]["times"].keys() == {"2", "4"}
    assert found["unpack of NF4_128 to float32, rows 1 to any"]["verdict"] == "right"  # some hundred times as fast
    for text in texts:
        assert is_verdict(found[text] | {"at": 0})


def test_tritons_kernels_are_right_in_a_trial_in_its_interpreter(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = in_a_trial("triton", [Case("unpack", "Q8_0", torch.float32, None)],
                       "sys.modules['featherweight.ops.kernels.check'].MANY = 6144")  # a value takes ten thousand times as long
    assert {text: verdict["verdict"] for text, verdict in found.items()} == {
        "probe": "right", "unpack of Q8_0 to float32, rows 1 to any": "slower"}
