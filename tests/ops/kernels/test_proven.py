"""Which of the kernels that trials have proven a device uses, and when.

The device is a CPU whose kernels need a trial as a GPU's do. Its backends are fakes that run plain
torch, and so are their trials.
"""
import logging
import threading

import pytest
import torch
from filelock import FileLock

from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import Backend, Case, Kernel, registry, trial_startup
from featherweight.ops.kernels.validation import ISSUES, random_tensors
from featherweight.ops.kernels.verdicts import Notes, Verdicts
from featherweight.ops.layers import product
from featherweight.ops.tensor.packed_layout import packed_tensor

CPU = torch.device("cpu")
Q4_0 = FORMATS["Q4_0"]
FLOAT32 = frozenset([torch.float32])
DEQUANTIZE = Case("dequantize", "Q4_0", torch.float32)
LINEAR = DEQUANTIZE._replace(capability="linear")


class FakeBackend:
    """Counts its calls. It dequantises, and multiplies 1 row and 2 to 16 rows."""

    def __init__(self, name: str):
        self.name, self.calls = name, {"dequantize": 0, "linear": 0}

        def dequantize(packed_format, tensors, out, first):
            self.calls["dequantize"] += 1
            packed_format.dequantize_into(tensors, out, first)

        def linear(packed_format, tensors, input, addend, out):
            self.calls["linear"] += 1
            weight = input.new_empty(out.shape[1], input.shape[1])
            packed_format.dequantize_into(tensors, weight)
            added = 0 if addend is None else addend
            out.copy_(input.double() @ weight.double().t() + added)

        self.kernels = {
            DEQUANTIZE: {None: Kernel("dequantize", frozenset(["Q4_0"]), FLOAT32, dequantize)},
            LINEAR: {
                rows: Kernel("linear", frozenset(["Q4_0"]), FLOAT32, linear, *rows)
                for rows in ((1, 1), (2, 16))
            }
        }
        self.backend = Backend(name, lambda device: None, tuple(
            kernel for kernels in self.kernels.values() for kernel in kernels.values()))


class Trials:
    """Replaces `run_trial`: writes the verdicts once `go` is set."""

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        self.proven = {}
        self.cases = []

    def __call__(self, device, backends, verdicts: Verdicts, cases) -> str:
        self.cases.append(cases)
        assert self.go.wait(60)
        for name in backends:
            verdicts.add(f"probe by {name}", "works")
        for name, relative_time in self.proven.items():
            verdict = "right" if relative_time < 1 else "slower"
            verdicts.add(name, verdict, seconds=[relative_time, 1.0])
        for case in cases:
            verdicts.add(str(case), "tried")
        return ""

    def prove(self, backend: FakeBackend, case: Case, relative_time: float = 0.5,
              rows=None):
        """Makes a kernel right. relative_time: torch's is 1."""
        self.proven[case.kernel_name(backend.name, backend.kernels[case][rows])] = relative_time

    def prove_all(self, backend: FakeBackend):
        self.prove(backend, DEQUANTIZE)
        for rows in backend.kernels[LINEAR]:
            self.prove(backend, LINEAR, 0.5, rows)


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """The trials of the processes that `restart` starts."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "TRIALED", {"cpu"})
    trials = Trials()
    monkeypatch.setattr(trial_startup, "run_trial", trials)
    return trials


@pytest.fixture
def restart(monkeypatch, trials):
    """restart(backend, ...): sets the kernel layer up as in a new process, with these backends."""
    def restart(*backends):
        monkeypatch.setattr(kernels, "_selectors", {})
        monkeypatch.setitem(kernels.PRIORITY, "cpu", tuple(backend.name for backend in backends))
        for backend in backends:
            monkeypatch.setitem(registry.IMPORTS, backend.name,
                                lambda backend=backend: backend.backend)
    return restart


@pytest.fixture
def log(caplog):
    """log(words): returns the pack's log lines that contain these words."""
    caplog.set_level(logging.INFO, kernels.__name__)
    return lambda words: [record.message for record in caplog.records if words in record.message]


def start_comfyui(*cases):
    """Starts ComfyUI where models have needed these cases, and waits for the trial."""
    Notes().add(cases)
    kernels.start_trials([CPU])
    wait_for_trial()


def wait_for_trial():
    for thread in threading.enumerate():
        if thread.name == "featherweight-trials":
            thread.join(60)


def check_dequantize(dtype=torch.float32):
    values = product.dequantize(weight(), dtype)
    assert torch.equal(values, weight().dequantize().to(dtype))


def weight(rows=16, columns=512):
    blocks = random_tensors(Q4_0, rows * columns // 32, CPU, bounded=True)[0]
    return packed_tensor(Q4_0, blocks, (rows, columns))


def multiply(tokens=3):
    generator = torch.Generator().manual_seed(0)
    return product.linear(torch.randn((tokens, 512), generator=generator), weight())


def test_what_a_trial_has_proven_is_used_without_another_check(trials, restart):
    backend = FakeBackend("fine")
    trials.prove_all(backend)
    restart(backend)
    start_comfyui(DEQUANTIZE, LINEAR)
    check_dequantize()
    multiply()
    assert backend.calls == {"dequantize": 1, "linear": 1}
    assert kernels.used(CPU) == "fine"


def test_what_is_proven_after_the_first_call_is_for_the_next_start(trials, restart, log):
    """So the same picture has the same bits in one process, whenever kernels come."""
    backend = FakeBackend("fine")
    trials.prove_all(backend)
    trials.go.clear()
    restart(backend)
    Notes().add([DEQUANTIZE, LINEAR])
    kernels.start_trials([CPU])
    first = multiply()
    check_dequantize()
    assert kernels.used(CPU) == "torch until kernels are proven"
    trials.go.set()
    wait_for_trial()
    check_dequantize()
    assert torch.equal(multiply(), first) and backend.calls == {"dequantize": 0, "linear": 0}
    assert kernels.used(CPU) == "torch" and len(log("used when ComfyUI starts next")) == 1
    restart(backend)
    start_comfyui()
    second = multiply()
    assert backend.calls["linear"] == 1 and len(trials.cases) == 1
    assert torch.equal(multiply(), second)
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def test_the_fastest_is_used_for_each_range_of_rows_and_torch_where_it_is(trials, restart):
    slow, fast = FakeBackend("slow"), FakeBackend("fast")
    trials.prove(slow, DEQUANTIZE, 0.7)
    trials.prove(fast, DEQUANTIZE, 0.4)
    trials.prove(slow, LINEAR, 0.5, (1, 1))
    trials.prove(fast, LINEAR, 0.6, (1, 1))
    trials.prove(fast, LINEAR, 1.5, (2, 16))
    restart(slow, fast)
    start_comfyui(DEQUANTIZE, LINEAR)
    run = kernels.find("dequantize", CPU, Q4_0, torch.float32)
    assert run is fast.kernels[DEQUANTIZE][None].run
    runs = [kernels.find("linear", CPU, Q4_0, torch.float32, tokens=tokens)
            for tokens in (1, 2, 17)]
    assert runs == [slow.kernels[LINEAR][1, 1].run, None, None]
    kernels.prepare(CPU, [DEQUANTIZE])
    assert kernels.used(CPU) == "fast"


@pytest.mark.parametrize("broken", ["backend", "driver"])
def test_what_does_not_work_any_more_leaves_the_work_to_torch(
        broken, trials, restart, monkeypatch, log):
    def no_driver(*_):
        raise RuntimeError("no driver")

    backend = FakeBackend("fine")
    trials.prove_all(backend)
    restart(backend)
    start_comfyui(DEQUANTIZE)
    if broken == "backend":
        monkeypatch.setitem(registry.IMPORTS, "fine", no_driver)
    else:
        monkeypatch.setattr(Verdicts, "of_device", no_driver)
    start_comfyui(LINEAR)
    check_dequantize()
    assert kernels.used(CPU) == "torch" and log("torch does their work")


@pytest.mark.parametrize(("setting", "trialed", "backend"), [
    ("torch", "cpu", "torch"), ("fine", "cpu", "fine"), ("auto", "cpu", None), (None, "cpu", None),
    (None, "cuda", "fine")], ids=str)
def test_a_cpu_and_what_is_asked_for_by_name_need_no_trial(
        setting, trialed, backend, trials, restart, monkeypatch):
    """backend: what is used, None where trials say so."""
    monkeypatch.setattr(kernels, "TRIALED", {trialed})
    restart(FakeBackend("fine"))
    if setting:
        monkeypatch.setenv(kernels.VARIABLE, setting)
    start_comfyui()
    kernels.prepare(CPU, [DEQUANTIZE])
    check_dequantize()
    assert bool(trials.cases) == bool(Notes().cases()) == (backend is None)
    assert kernels.used(CPU) == (backend or "torch")


# --- what a load does, and the next start ---


def test_a_load_and_a_layer_start_no_trial_and_say_once_what_is_not_proven(trials, restart, log):
    restart(FakeBackend("fine"))
    for _ in range(2):
        kernels.prepare(CPU, [DEQUANTIZE, LINEAR])
    multiply()
    check_dequantize(torch.float16)
    assert not trials.cases
    assert set(Notes().cases()) == {
        DEQUANTIZE,
        LINEAR,
        Case("dequantize", "Q4_0", torch.float16),
    }
    (line,) = log("Kernels for")
    assert "Q4_0" in line and "until ComfyUI starts again" in line


@pytest.mark.parametrize("case", [
    Case("pack_blocks", "Q4_0", torch.float32),
    Case("dequantize", "JOINED_ROWS_1x32xQ4_0+1x32xQ8_0", torch.float32),
    Case("dequantize", f"SDNQ_{'9' * 40}", torch.float32),
    Case("dequantize", "Q4_0", torch.float64)], ids=str)
def test_a_case_that_no_trial_can_try_is_neither_noted_nor_said_to_be_proven_later(
        case, trials, restart, log):
    restart(FakeBackend("fine"))
    kernels.prepare(CPU, [case])
    assert not log("not proven") and not Notes().path.exists()


def test_what_models_asked_for_is_tried_at_the_next_start_and_used_by_the_first_model(
        trials, restart, log):
    backend = FakeBackend("fine")
    trials.prove_all(backend)
    restart(backend)
    kernels.prepare(CPU, [DEQUANTIZE, LINEAR])
    restart(backend)
    start_comfyui()
    assert trials.cases == [[DEQUANTIZE, LINEAR]]
    kernels.prepare(CPU, [DEQUANTIZE, LINEAR])
    multiply()
    assert backend.calls["linear"] and kernels.used(CPU) == "fine"
    assert len(trials.cases) == len(log("are not proven")) == 1


def test_a_model_of_a_new_format_is_not_said_to_be_dequantized_by_what_was_proven_for_others(
        trials, restart):
    backend = FakeBackend("fine")
    trials.prove(backend, DEQUANTIZE)
    restart(backend)
    start_comfyui(DEQUANTIZE)
    kernels.prepare(CPU, [Case("dequantize", "Q8_0", torch.float32)])
    assert kernels.used(CPU) == "torch"
    kernels.prepare(CPU, [DEQUANTIZE])
    assert kernels.used(CPU) == "fine"


def test_the_formats_most_used_are_tried_where_no_model_was_loaded_yet(trials, restart):
    restart(FakeBackend("fine"))
    start_comfyui()
    (cases,) = trials.cases
    assert {case.format for case in cases} == set(trial_startup.MOST_USED) <= set(FORMATS)
    assert {(case.capability, case.dtype) for case in cases} == {
        (capability, dtype) for capability in ("dequantize", "linear")
        for dtype in (torch.bfloat16, torch.float16)}
    assert len(cases) == 28


def test_who_meets_another_trial_begins_none_and_waits_for_nothing(
        trials, restart, tmp_path, log):
    """The lock is in the user's own folder: nobody else can hold it."""
    restart(FakeBackend("fine"))
    Notes().add([DEQUANTIZE])
    with FileLock(tmp_path / "featherweight" / "trials" / "lock"):
        start_comfyui()
    assert not trials.cases and log("Another trial of kernels is under way")
    assert (tmp_path / "featherweight" / "trials").stat().st_mode & 0o777 == 0o700
    restart(FakeBackend("fine"))
    start_comfyui()
    assert trials.cases == [[DEQUANTIZE]]


def test_the_log_says_what_a_trial_found_and_warns_of_wrong_values(
        trials, restart, monkeypatch, log, caplog):
    backend = FakeBackend("fine")

    def run(device, backends, verdicts, cases):
        right = DEQUANTIZE.kernel_name("fine", backend.kernels[DEQUANTIZE][None])
        verdicts.add(right, "right", seconds=[1, 3])
        verdicts.add("a kernel", "crashed", why="its process ended")
        verdicts.add("another kernel", "wrong", why="2 of 3 values differ")
        return "4 kernels ended their process"

    monkeypatch.setattr(trial_startup, "run_trial", run)
    restart(backend)
    start_comfyui(DEQUANTIZE)
    (line,) = log("1 kernels proven")
    for words in ("dequantize 3.0 times as fast as torch", "1 wrong", "1 crashed",
                  "(a kernel: please", ISSUES,
                  "4 kernels ended their process, so the rest is tried"):
        assert words in line
    (warning,) = [record.message for record in caplog.records if record.levelno > logging.INFO]
    assert "gives wrong values" in warning and "another kernel" in warning
    assert "2 of 3 values differ" in warning and ISSUES in warning
