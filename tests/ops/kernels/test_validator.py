"""Kernels are validated in another process, where a bad one harms nothing else, and used in the
same run."""
import asyncio
import contextlib
import functools
import itertools
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import planted_backends
import psutil
import pytest
import torch

from featherweight.nodes import FeatherweightExtension
from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import Case, background, registry, selector, validator
from featherweight.ops.kernels.selector import Selector
from featherweight.ops.kernels.validation import ISSUES, random_tensors
from featherweight.ops.kernels.validator import MAX_RESTARTS, ProcessValidator
from featherweight.ops.layers import product
from featherweight.ops.tensor.packed_layout import packed_tensor

CPU = torch.device("cpu")
PACK = Path(__file__).parents[3]
Q4_0 = FORMATS["Q4_0"]
KERNEL_SECONDS = 9  # on a machine that others use too
HANG_SECONDS = 4  # of a kernel that takes all the time it has
LONG = 300  # seconds: more than anything takes on any machine
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")


def wait_until(is_true):
    end = time.monotonic() + LONG
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def case_of(name: str, capability: str = "dequantize") -> Case:
    return Case(capability, name, torch.float32)


def verdict_of(planted: Selector, name: str) -> tuple[str, str]:
    return planted.verdict("dequantize", FORMATS[name], torch.float32)


@pytest.fixture(scope="module", autouse=True)
def backends():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "IMPORTS", dict(registry.IMPORTS))
        patch.setenv("OMP_NUM_THREADS", "1")
        planted_backends.plant()
        yield


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(backend, ...): returns a new ComfyUI's selector of a device with this backend, and what
    validates its kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    validators = []

    def start(name="fine", command=planted_backends.COMMAND, seconds=KERNEL_SECONDS):
        validators.append(ProcessValidator(command, seconds))
        return Selector(CPU, name, validators[-1], True), validators[-1]
    yield start
    for each in validators:
        each.end()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The selector of a device whose kernels misbehave, after they were validated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("planted")))
        process = ProcessValidator(planted_backends.COMMAND, KERNEL_SECONDS)
        found = Selector(CPU, "planted", process, True)
        assert found.wait_until_read()
        cases = [case_of(name) for name in planted_backends.KERNELS["planted"]]
        process.request(found, cases)
        process.request(found, cases)  # what the first request's restarts left over
        wait_until(lambda: all(verdict_of(found, name)[0] != "pending" for name in EXPECTED))
        yield found
        process.end()


EXPECTED = {"Q8_0": "right", "Q4_0": "crashed", "Q4_1": "crashed", "Q5_0": "crashed",
            "Q2_K": "wrong", "Q3_K": "wrong", "Q4_K": "slow", "Q5_K": "refused", "Q6_K": "right"}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kernel_gets_its_verdict_and_harms_no_other(name, planted):
    assert verdict_of(planted, name)[0] == EXPECTED[name]


@pytest.mark.parametrize("name", ["Q5_1", "NF4"])
def test_a_kernel_that_lacked_memory_or_was_killed_by_another_program_has_no_verdict(name, planted):
    wait_until(lambda: planted.missing([case_of(name)]))
    assert verdict_of(planted, name)[0] in ("pending", "stopped")


@pytest.mark.parametrize("name", ["loops", "holds_on"])
def test_a_kernel_that_hangs_ends_its_process_and_no_other(name, start):
    found, process = start(name, seconds=HANG_SECONDS)
    found.wait_until_read()
    process.request(found, [case_of("Q4_0"), case_of("Q8_0")])
    wait_until(lambda: verdict_of(found, "Q8_0")[0] == "right")
    assert verdict_of(found, "Q4_0")[0] == "hung"


def test_a_backend_that_does_not_work_has_its_reason_and_no_kernel_of_it_is_run(start, caplog):
    caplog.set_level(logging.INFO, "featherweight")
    found, process = start("no_probe")
    found.request(case_of("Q4_0"), Q4_0) if found.wait_until_read() else None
    wait_until(lambda: "0 kernels proven, 1 refused" in caplog.text)
    verdict, why = verdict_of(found, "Q4_0")
    assert verdict == "refused" and "no driver" in why


def test_what_is_proven_is_used_in_the_same_run_a_product_from_the_next_load_on(start, monkeypatch):
    found, _ = start()
    monkeypatch.setattr(kernels, "_selectors", {CPU: found})
    load = kernels.request(CPU, [("dequantize", Q4_0, torch.float32),
                                 ("linear", Q4_0, torch.float32)])
    tensors = random_tensors(Q4_0, 16 * 16, CPU, bounded=True)
    weight = packed_tensor(Q4_0, tensors[0], (16, 512))
    input = torch.randn((3, 512), generator=torch.Generator().manual_seed(0))
    first = product.linear(input, weight, load=load)
    wait_until(lambda: kernels.find("dequantize", CPU, Q4_0, torch.float32))
    wait_until(lambda: kernels.find("linear", CPU, Q4_0, torch.float32, 3))
    assert kernels.find("linear", CPU, Q4_0, torch.float32, 3, load) is None
    assert torch.equal(product.linear(input, weight, load=load), first)
    again = kernels.request(CPU, [])
    assert kernels.find("linear", CPU, Q4_0, torch.float32, 3, again) is not None
    torch.testing.assert_close(product.linear(input, weight, load=again), first, rtol=1e-4,
                               atol=1e-3)


def test_all_layouts_are_validated_at_the_start_and_what_models_multiplied_with_after_an_update(
        start, monkeypatch):
    monkeypatch.setattr(selector, "all_kernel_keys", lambda: ["Q8_0"])
    found, process = start()
    assert found.wait_until_read()
    found.add("linear of Q4_0 to float32, rows 1 to 4 by fine", "right")
    monkeypatch.setattr(torch, "__version__", "9.9")
    found, process = start()
    found.start(torch.float32)
    wait_until(lambda: len(found.summary().get("right", ())) == 2)
    assert not found.missing([case_of("Q8_0"), case_of("Q4_0", "linear")])


def test_nothing_is_validated_twice_by_two_comfyuis(start, monkeypatch):
    (one, first), (other, second) = start(), start()
    for found, process in ((one, first), (other, second)):
        found.wait_until_read()
        process.request(found, [case_of("Q4_0"), case_of("Q8_0")])
    wait_until(lambda: all(len(found.summary().get("right", ())) == 2 for found in (one, other)))
    lines = one.path.read_text().splitlines()
    assert sum('"begun"' in line for line in lines) == 2


def test_where_memory_is_short_nothing_is_validated(start, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "featherweight")
    monkeypatch.setattr(validator, "free_bytes", lambda device: validator.FREE_TO_BEGIN - 1)
    found, process = start()
    found.wait_until_read()
    process.request(found, [case_of("Q4_0")])
    wait_until(lambda: "0 kernels proven, less than 1.5 GB of its memory was free, so the rest is"
                       " validated when ComfyUI starts next" in caplog.text)
    assert found.missing([case_of("Q4_0")])


SAYS_BEGUN = ("import json, os, signal, sys, time; job = json.loads(sys.stdin.readline());"
              " signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # which nohup ignores
              " print(json.dumps({'name': 'a kernel', 'verdict': 'begun', 'at': time.time()}),"
              " flush=True);")


@pytest.mark.parametrize(("script", "words"), [
    (f"{SAYS_BEGUN} os.kill(os.getpid(), signal.SIGSEGV)", "1 crashed"),
    (f"raise SystemExit({validator.WITHOUT_MEMORY})", "1.5 GB of its memory was free"),
    ("raise SystemExit(9)", "its process ended with 9"),
    (f"{SAYS_BEGUN} os.kill(os.getpid(), signal.SIGTERM)", "kernels ended their process")], ids=str)
def test_how_a_process_ended_is_said(script, words, start, caplog):
    caplog.set_level(logging.INFO, "featherweight")
    found, process = start(command=(sys.executable, "-c", script))
    found.wait_until_read()
    process.request(found, [case_of("Q4_0")])
    wait_until(lambda: words in caplog.text)
    crashed = "SIGSEGV" in script
    assert (f"please report this line at {ISSUES}: a kernel" in caplog.text) == crashed
    assert ("a kernel" in found.summary().get("crashed", ())) == crashed
    assert MAX_RESTARTS == 3


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
from featherweight.ops.kernels.kernel import Case
from featherweight.ops.kernels.selector import Selector
from featherweight.ops.kernels.validator import ProcessValidator
folder, names = Path(sys.argv[3]), sys.argv[4:]
for name in names:
    process = ProcessValidator(planted_backends.COMMAND, SECONDS)
    found = Selector(torch.device("cpu"), name, process, True)
    found.wait_until_read()
    process.request(found, [Case("dequantize", "Q4_0", torch.float32)])
    end = time.monotonic() + 300
    while not (folder / name).exists():
        assert time.monotonic() < end
        time.sleep(0.05)
print("validating", flush=True)
""".replace("SECONDS", str(HANG_SECONDS))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "ends"])
@pytest.mark.parametrize("name", ["loops", "holds_on"])
def test_no_process_outlives_the_one_that_started_it(name, is_killed, tmp_path, monkeypatch):
    """Whose kernel keeps Python from running, that ends when the kernel's time is up."""
    monkeypatch.setenv(planted_backends.LOG, str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = "time.sleep(600)" if is_killed else ""
    parent = subprocess.Popen(
        [sys.executable, "-c", PROCESS + more, str(PACK), str(PACK / "tests" / "support"),
         str(tmp_path), name], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "validating\n"
    if is_killed:
        parent.kill()
    _, errors = parent.communicate(timeout=LONG)
    assert is_killed or (parent.returncode == 0 and not errors)
    wait_until(lambda: not is_alive(int((tmp_path / name).read_text())))


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_waits_for_jobs_has_no_torch_and_little_memory(start):
    _, process = start()
    time.sleep(1)
    pages = int(Path(f"/proc/{process._process.pid}/statm").read_text().split()[1])
    assert pages * os.sysconf("SC_PAGE_SIZE") < 30e6
    assert "torch" not in Path(f"/proc/{process._process.pid}/maps").read_text()


REFUSES_THE_HOST = """
import builtins; real = builtins.__import__
HOST = ('comfy', 'comfy_kitchen', 'comfy_aimdo', 'folder_paths', 'nodes')
def refused(name, globals=None, locals=None, fromlist=(), level=0):
    assert level or name.split('.')[0] not in HOST, name
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = refused
"""


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_the_kernels_of_a_cpu_are_right_there_without_the_host_and_its_packages(start):
    command = [*validator.COMMAND]
    command[2] = REFUSES_THE_HOST + command[2]
    found, process = start("cpp", tuple(command), 240)
    assert found.wait_until_read()
    cases = [Case("linear", "Q4_K", torch.float16), Case("dequantize", "Q4_K", torch.float16),
             Case("dequantize", "INT8_CONVROT", torch.float32),
             Case("int8_tokens", None, torch.bfloat16)]
    process.request(found, cases)
    wait_until(lambda: len([*itertools.chain(*found.summary().values())]) == 5)
    assert set(found.summary()) <= {"right", "slow"}
    assert "linear of Q4_K to float16, rows 2 to 4 by cpp" in found.summary()["right"]


# --- with ComfyUI ---


@pytest.mark.fake_gpus(devices=1, late=False)
def test_comfyui_validates_kernels_as_it_starts_and_torch_works_where_none_does(
        monkeypatch, tmp_path, caplog):
    """The kernels for real GPUs, which cannot run here."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_selectors", {})
    monkeypatch.setattr(kernels, "_validator", None)
    monkeypatch.setattr(selector, "all_kernel_keys", lambda: ["Q4_K"])
    monkeypatch.setattr(background, "raise_if_cancelled", background.raise_if_cancelled)  # put back
    caplog.set_level(logging.INFO, "featherweight")
    gpu = torch.device("cuda", 0)
    asyncio.run(FeatherweightExtension().on_load())  # which does not wait for it
    try:
        wait_until(lambda: "cuda:0 (Fake GPU 0): 0 kernels proven" in caplog.text)
        weight = functools.partial(random_tensors, FORMATS["Q4_K"], 32, bounded=True)
        values = product.dequantize(
            packed_tensor(FORMATS["Q4_K"], weight(device=gpu)[0], (16, 512)), torch.float32)
        on_cpu = packed_tensor(FORMATS["Q4_K"], weight(device=CPU)[0], (16, 512))
        assert torch.equal(values.cpu(), on_cpu.dequantize())
        assert kernels.used(gpu, [FORMATS["Q4_K"]], torch.float32).startswith("torch: ")
    finally:
        kernels._validator.end()
