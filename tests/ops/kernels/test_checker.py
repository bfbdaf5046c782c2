"""Kernels of GPUs are checked in another process, where a bad one harms nothing else."""
import asyncio
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import planted_backends
import psutil
import pytest
import torch
from pack_api import FORMATS, packed_tensor, product, random_tensors
from user_kernels import forget_decisions, put_back_host, undecided

from featherweight.nodes import FeatherweightExtension
from featherweight.ops import kernels
from featherweight.ops.kernels import checker, registry, verdicts
from featherweight.ops.kernels.checker import ProcessChecker
from featherweight.ops.kernels.decider import Decider
from featherweight.ops.kernels.kernel import Case
from featherweight.ops.kernels.validation import ISSUES
from featherweight.ops.kernels.waiting import host

CPU = torch.device("cpu")
PACK = Path(__file__).parents[3]
KERNEL_SECONDS = 9  # on a machine that others use too
HANG_SECONDS = 4  # of a kernel that takes all the time it has
LONG = 300  # seconds: more than anything takes on any machine
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")


def wait_until(is_true):
    end = time.monotonic() + LONG
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def backends():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "IMPORTS", dict(registry.IMPORTS))
        patch.setenv("OMP_NUM_THREADS", "1")
        planted_backends.plant()
        yield


@contextlib.contextmanager
def deciding(name="fine", command=planted_backends.COMMAND, seconds=KERNEL_SECONDS):
    """A new ComfyUI's decider of a device with this backend, whose checks run in a process."""
    process = ProcessChecker(command, seconds)
    try:
        yield Decider(CPU, name, process)
    finally:
        process.end()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def decide(decider: Decider, *names: str, capability="dequantize", makes_room=True) -> list[str]:
    """Decides what these formats need. Returns the verdicts."""
    decider.decide([(capability, FORMATS[name], torch.float32) for name in names], makes_room)
    decisions = (decider.find(Case(capability, name, torch.float32)) for name in names)
    return [decision.verdict for decision in decisions if decision is not None]


EXPECTED = {"Q8_0": "right", "Q4_0": "crashed", "Q4_1": "crashed", "Q5_0": "crashed",
            "Q2_K": "wrong", "Q3_K": "wrong", "Q5_K": "failed", "Q6_K": "right", "Q5_1": "open",
            "NF4": "open"}  # the last two lacked memory, and were killed by another program


def test_each_kernel_gets_its_verdict_and_harms_no_other(monkeypatch):
    with deciding("planted") as decider:
        decide(decider, *EXPECTED)
        # what the restarts of the first load left over
        assert dict(zip(EXPECTED, decide(decider, *EXPECTED))) == EXPECTED
    kept = {"right", "wrong", "crashed"}
    with deciding("planted") as decider:  # the next process
        asked = []
        monkeypatch.setattr(decider._checker, "check", lambda device, backend, kernels, take, bar:
                            asked.extend(case.layout for case, _ in kernels.values()) or {})
        decide(decider, *EXPECTED)
        assert set(asked) == {name for name in EXPECTED if EXPECTED[name] not in kept}


@pytest.mark.parametrize("name", ["loops", "holds_on"])
def test_a_kernel_that_hangs_ends_its_process_and_no_other(name):
    with deciding(name, seconds=HANG_SECONDS) as decider:
        assert decide(decider, "Q4_0", "Q8_0") == ["hung", "right"]
        assert decide(decider, "Q4_0") == ["hung"]  # nobody waits for it again


def test_a_backend_that_does_not_work_has_its_reason_and_no_kernel_of_it_is_run():
    with deciding("no_probe") as decider:
        assert decide(decider, "Q4_0") == ["open"]
        decision = decider.find(Case("dequantize", "Q4_0", torch.float32))
        assert "no driver" in decision.why


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is Metal")
def test_a_macs_gpu_is_first_used_by_the_other_process():
    process = ProcessChecker()
    decider = Decider(torch.device("mps", 0), "metal", process)
    try:
        assert decide(decider, "Q4_0") == ["open"]
    finally:
        process.end()
    decision = decider.find(Case("dequantize", "Q4_0", torch.float32))
    assert "MPS" in decision.why.upper() and decider.reason == ""


def test_one_process_serves_several_loads_and_another_starts_where_it_has_ended():
    with deciding() as decider:
        assert decide(decider, "Q4_0") == ["right"]
        first = decider._checker._process
        assert decide(decider, "Q8_0") == ["right"] and decider._checker._process is first
        first.kill()
        first.wait()
        assert decide(decider, "Q4_0", capability="linear") == ["right"]


def test_nothing_is_checked_twice_by_two_comfyuis(monkeypatch):
    """The second waits for the lock, and reads the verdicts first."""
    with deciding() as one, deciding() as other:
        thread = threading.Thread(target=decide, args=(one, "Q4_0"))
        thread.start()
        wait_until(lambda: one._checker._process is not None)
        assert decide(other, "Q4_0") == ["right"] and other._checker._process is None
        thread.join()


def test_where_memory_is_short_room_is_made_and_else_nothing_is_known(monkeypatch):
    made = []
    monkeypatch.setattr(checker, "free_bytes", lambda device: checker.FREE_TO_BEGIN - (not made))
    with deciding() as decider:
        assert decide(decider, "Q4_0", capability="linear") == ["open"]
        decision = decider.find(Case("linear", "Q4_0", torch.float32))
        assert decision.why == checker.TOO_LITTLE_MEMORY
        monkeypatch.setattr(host, "free_memory", lambda nbytes, device: made.append(nbytes))
        assert decide(decider, "Q8_0", makes_room=False) == ["open"] and not made
        assert decide(decider, "Q8_0") == ["right"] and made == [checker.FREE_TO_BEGIN]


def test_a_cancel_ends_the_process_and_is_no_verdict(monkeypatch):
    class Cancelled(Exception):
        pass

    with deciding("loops") as decider:
        def cancel():
            if decider._checker._process is not None:
                raise Cancelled

        monkeypatch.setattr(host, "raise_if_cancelled", cancel)
        with pytest.raises(Cancelled):
            decide(decider, "Q8_0")
        assert decider._checker._process is None
        monkeypatch.setattr(host, "raise_if_cancelled", lambda: None)
        assert decide(decider, "Q8_0") == ["right"]


def after_reboot(name, monkeypatch) -> list[str]:
    """The verdicts of a backend that count when the computer has been started again."""
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "COMPUTER_STARTED", time.time() + 60)
        decider = Decider(CPU, name)
        decider._open_backend()
        return [line["verdict"] for line in decider._lines.values()]


@pytest.mark.parametrize(("name", "layout", "verdict"), [
    ("planted", "Q5_1", "open"),  # there was no memory on the card
    ("planted", "NF4", "open"),  # another program killed the process
    ("planted", "Q5_K", "failed"), ("loops", "Q4_0", "hung")])
def test_a_check_without_a_verdict_is_no_crash_after_a_reboot(name, layout, verdict, monkeypatch):
    with deciding(name, seconds=HANG_SECONDS if verdict == "hung" else KERNEL_SECONDS) as decider:
        assert decide(decider, layout) == [verdict]
        assert "begun" in decider._verdicts.path.read_text()
    assert after_reboot(name, monkeypatch) == []


def test_a_cancelled_check_is_no_crash_after_a_reboot(monkeypatch):
    class Cancelled(Exception):
        pass

    with deciding("loops") as decider:
        def cancel():
            if "begun" in decider._verdicts.path.read_text():
                raise Cancelled

        monkeypatch.setattr(host, "raise_if_cancelled", cancel)
        with pytest.raises(Cancelled):
            decide(decider, "Q4_0")
    assert after_reboot("loops", monkeypatch) == []


BEGINS = ("import json, os, signal, sys; job = json.loads(sys.stdin.readline());"
          " signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # which nohup ignores
          " print(json.dumps({'kernel': [*job['kernels']][0], 'verdict': 'begun'}), flush=True);")


@pytest.mark.parametrize(("script", "verdict", "words"), [
    (f"{BEGINS} os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "its process ended with -11"),
    (f"{BEGINS} os._exit(1)", "crashed", "its process ended with 1"),
    (f"{BEGINS} os.kill(os.getpid(), signal.SIGTERM)", "open", "its process ended with -15"),
    ("raise SystemExit(9)", "open", "the process that checks kernels ended with 9"),
    ("import time; time.sleep(600)", "open", "the process that checks kernels hangs")], ids=str)
def test_how_a_process_ended_is_said(script, verdict, words, caplog, monkeypatch):
    monkeypatch.setattr(checker, "START_SECONDS", 1 if "sleep" in script else LONG)
    started, start = [], checker.start_process
    monkeypatch.setattr(checker, "start_process",
                        lambda *command, **more: started.append(command) or start(*command, **more))
    with deciding(command=(sys.executable, "-c", script)) as decider:
        assert decide(decider, "Q4_0") == [verdict] and len(started) == 1
        decision = decider.find(Case("dequantize", "Q4_0", torch.float32))
        assert decision.why == words
    assert (f"please report this line at {ISSUES}" in caplog.text) == (verdict == "crashed")


def test_where_no_process_may_start_torch_works_and_the_reason_is_said():
    with deciding(command=("/no/such/program",)) as decider:
        assert decide(decider, "Q4_0") == ["open"]
        decision = decider.find(Case("dequantize", "Q4_0", torch.float32))
        assert "No such file or directory" in decision.why


def test_a_product_in_the_step_after_a_load_is_the_kernels(monkeypatch):
    with deciding() as decider:
        forget_decisions(monkeypatch)
        monkeypatch.setitem(kernels._deciders, CPU, decider)
        kernels.decide(CPU, [(name, FORMATS["Q4_0"], torch.float32)
                             for name in ("dequantize", "linear")])
        tensors = random_tensors(FORMATS["Q4_0"], 16 * 16, CPU, bounded=True)
        weight = packed_tensor(FORMATS["Q4_0"], tensors[0], (16, 512))
        input = torch.randn((3, 512), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(product.linear(input, weight), input @ weight.dequantize().t(),
                                   rtol=1e-4, atol=1e-3)
        assert kernels.find("linear", CPU, FORMATS["Q4_0"], torch.float32, 3) is (
            planted_backends.multiply)
        assert not undecided


# --- the processes and their ends ---


PROCESS = """
import sys, time, types
from pathlib import Path
pack = types.ModuleType("featherweight")
pack.__path__ = [sys.argv[1]]
sys.modules["featherweight"] = pack
sys.path[:0] = [sys.argv[2]]
import planted_backends, torch
planted_backends.plant()
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels.checker import ProcessChecker
from featherweight.ops.kernels.decider import Decider
from featherweight.ops.kernels.waiting import start_thread
folder, name = Path(sys.argv[3]), sys.argv[4]
decider = Decider(torch.device("cpu"), name, ProcessChecker(planted_backends.COMMAND, SECONDS))
needed = [("dequantize", FORMATS["Q4_0"], torch.float32)]
start_thread(lambda: decider.decide(needed, False), "decides")
end = time.monotonic() + 300
while not ((folder / name).exists() and any(
        b"begun" in file.read_bytes() for file in folder.rglob("*.jsonl"))):
    assert time.monotonic() < end
    time.sleep(0.05)
print("checking", flush=True)
""".replace("SECONDS", str(HANG_SECONDS))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "ends"])
@pytest.mark.parametrize("name", ["loops", "holds_on"])
def test_no_process_outlives_the_one_that_started_it_and_its_check_is_no_crash_after_a_reboot(
        name, is_killed, tmp_path, monkeypatch):
    """Whose kernel keeps Python from running, that ends when the kernel's time is up, and with a
    parent that was killed it counts: there is nobody to say that the computer was fine."""
    monkeypatch.setenv(planted_backends.LOG, str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = "time.sleep(600)" if is_killed else ""
    parent = subprocess.Popen(
        [sys.executable, "-c", PROCESS + more, str(PACK), str(PACK / "tests" / "support"),
         str(tmp_path), name], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "checking\n"
    pid = int((tmp_path / name).read_text())
    if is_killed:
        if name == "loops":
            os.kill(pid, signal.SIGTERM)  # as all processes get it where the computer shuts down
        parent.kill()
    _, errors = parent.communicate(timeout=LONG)
    assert is_killed or (parent.returncode == 0 and not errors)
    wait_until(lambda: not is_alive(pid))
    assert after_reboot(name, monkeypatch) == (
        ["crashed"] if (name, is_killed) == ("holds_on", True) else [])


def test_the_process_has_the_flags_of_the_one_that_starts_it():
    """Portable ComfyUI starts with -s; without it another torch may be imported."""
    script = ("import json, sys, types; pack = types.ModuleType('featherweight');"
              " pack.__path__ = [sys.argv[1]]; sys.modules['featherweight'] = pack;"
              " from featherweight.ops.kernels.checker import COMMAND; print(json.dumps(COMMAND))")
    command = json.loads(subprocess.run(
        [sys.executable, "-s", "-B", "-c", script, str(PACK)], capture_output=True, text=True,
        timeout=LONG, check=True).stdout)
    command[-2] = "import sys; print(sys.flags.no_user_site, sys.flags.dont_write_bytecode)"
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["1", "1"]


def test_a_forked_process_that_ends_ends_no_program():
    script = ("import os, sys, time\n"
              "sys.path[:0] = [sys.argv[1]]\n"
              "import child_process\n"
              "started = child_process.start_process(sys.executable, '-c',"
              " 'import time; time.sleep(3600)')\n"
              "if os.fork() == 0:\n    sys.exit(0)\n"
              "os.wait(); time.sleep(0.3)\n"
              "print('runs' if started.poll() is None else 'killed', started.pid)")
    state, pid = subprocess.run([sys.executable, "-c", script, str(PACK)], capture_output=True,
                                text=True, timeout=300, check=True).stdout.split()
    assert state == "runs"
    wait_until(lambda: not is_alive(int(pid)))


REFUSES_THE_HOST = """
import builtins; real = builtins.__import__
HOST = ('comfy', 'comfy_kitchen', 'comfy_aimdo', 'folder_paths', 'nodes')
def refused(name, globals=None, locals=None, fromlist=(), level=0):
    assert level or name.split('.')[0] not in HOST, name
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = refused
"""


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_the_kernels_of_a_cpu_are_right_there_without_the_host_and_its_packages():
    command = [*checker.COMMAND]
    command[-2] = REFUSES_THE_HOST + command[-2]
    with deciding("cpp", tuple(command), 240) as decider:
        needed = [("linear", FORMATS["Q4_K"], torch.float16),
                  ("dequantize", FORMATS["Q4_K"], torch.float16),
                  ("int8_tokens", None, torch.bfloat16)]
        decider.decide(needed, False)
        assert [line["verdict"] for line in decider._lines.values()] == ["right"] * 4


# --- with ComfyUI ---


@pytest.mark.fake_gpus(devices=1, late=False)
def test_torch_works_where_no_kernel_does(monkeypatch, caplog):
    """The kernels for real GPUs, which cannot run here."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    forget_decisions(monkeypatch)
    put_back_host(monkeypatch)
    caplog.set_level(logging.INFO, "featherweight")
    gpu, q4_k = torch.device("cuda", 0), FORMATS["Q4_K"]
    asyncio.run(FeatherweightExtension().on_load())
    kernels.decide(gpu, [("dequantize", q4_k, torch.float32)])
    assert "on cuda:0 (Fake GPU 0) use torch, because no kernel works there" in caplog.text
    weight = functools.partial(random_tensors, q4_k, 32, bounded=True)
    values = product.dequantize(packed_tensor(q4_k, weight(device=gpu)[0], (16, 512)),
                                torch.float32)
    assert torch.equal(values.cpu(), packed_tensor(
        q4_k, weight(device=CPU)[0], (16, 512)).dequantize())
    assert kernels.used(gpu, [q4_k], torch.float32).startswith("torch: ")
