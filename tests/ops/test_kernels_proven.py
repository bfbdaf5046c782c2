"""What a device uses of the kernels that trials have proven, and when. The device is a CPU, at first one whose kernels need a
trial as a GPU's do; its backends are made for the tests, of plain torch, and so is what a trial says of them."""
import functools
import logging
import os
import sys
import tempfile
import time
from types import SimpleNamespace

import planted_backends
import pytest
import torch
from featherweight.ops import formats, kernels, product  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight.ops.kernels import Backend, Case, Kernel, choices, proving, room, trial_process
from featherweight.ops.kernels.check import random_tensors
from featherweight.ops.kernels.trial_process import Outcome
from featherweight.ops.tensor import packed_tensor

CPU = torch.device("cpu")
Q4_0 = FORMATS["Q4_0"]
FLOAT32 = frozenset([torch.float32])
RUN_TRIAL = trial_process.run_trial
UNPACK, LINEAR = (Case(op, "Q4_0", torch.float32, None) for op in ("unpack", "linear"))


class Made:
    """A backend whose calls are counted: unpacks, and multiplies 1 and 2 to 16 rows."""

    def __init__(self, name: str, off: float = 0):
        self.name, self.calls = name, {"unpack": 0, "linear": 0}

        def unpack(packed_format, tensors, out, value_dtype, first):
            self.calls["unpack"] += 1
            packed_format.unpack_into(tensors, out, value_dtype, first)
            if off:
                out += off

        def linear(packed_format, tensors, input, addend, out, value_dtype):
            self.calls["linear"] += 1
            weight = packed_format.unpack_into(tensors, input.new_empty(out.shape[1], input.shape[1]), value_dtype)
            out.copy_((input.double() @ weight.double().t()) + (0 if addend is None else addend))

        self.backend = Backend(name, lambda device: None, (
            Kernel("unpack", frozenset(["Q4_0"]), FLOAT32, unpack),
            Kernel("linear", frozenset(["Q4_0"]), FLOAT32, linear, max_tokens=1),
            Kernel("linear", frozenset(["Q4_0"]), FLOAT32, linear, 2, 16)))


class Trials:
    """In the place of `run_trial`: says what `said` has once `go` is set. jobs: those it was given."""

    def __init__(self):
        self.go, self.said, self.jobs = True, [], []

    def __call__(self, job, hear, seconds, is_busy):
        self.jobs.append(job)
        while not self.go:
            time.sleep(0.005)
        for name in job["backends"]:
            hear(name, "probe", {"verdict": "right"})
        for line in self.said:
            hear(*line)
        for case in map(Case.of_json, job["cases"]):
            for name in job["backends"]:
                hear(name, str(case), {"verdict": "tried"})
        return Outcome("ended")

    def says(self, made: Made, case: Case, rows=(1, None), **times):
        """That a kernel is right; times: "rows_4": its share of torch's time with 4 rows."""
        times = {key.partition("_")[2]: [share, 1.0] for key, share in times.items()} or {"": [0.5, 1.0]}
        self.said.append((made.name, f"{case}, rows {rows[0]} to {rows[1] or 'any'}", {
            "verdict": "right", "case": str(case), "rows": list(rows), "times": times}))


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """The trials of the processes that `restarted` begins."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the lock is that trials take
    monkeypatch.setattr(kernels, "CheckedUntilProven", choices.ProvenInTrials)
    found = Trials()
    monkeypatch.setattr(trial_process, "run_trial", found)
    return found


@pytest.fixture
def restarted(monkeypatch, trials):
    """restarted(backend, ...): the kernel layer as a new process has it, with these backends."""
    def restarted(*made):
        monkeypatch.setattr(kernels, "_choices", {})
        monkeypatch.setitem(kernels.BACKENDS, "cpu", tuple(one.name for one in made))
        for one in made:
            module = f"{kernels.__name__}.{one.name}_backend"
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(BACKEND=one.backend))
    return restarted


def weight(rows=16, columns=512):
    return packed_tensor(Q4_0, random_tensors(Q4_0, rows * columns // 32, CPU, calm=True)[0], (rows, columns))


def multiplied(tokens=3):
    return product.linear(torch.randn((tokens, 512), generator=torch.Generator().manual_seed(0)), weight())


def taken_up(op="unpack", tokens=None) -> bool:
    """Whether a kernel is found, in the end."""
    choice = finished()
    kernels.find(op, CPU, Q4_0, torch.float32, None, tokens)  # has what is proven checked here
    assert all(proof.wait(60) for proof in choice._proofs.values())
    return kernels.find(op, CPU, Q4_0, torch.float32, None, tokens) is not None


def finished():
    """What the device uses, once no trial is under way."""
    choice, end = kernels._choice(CPU), time.monotonic() + 60
    kernels.find("unpack", CPU, Q4_0, torch.float32)
    while choice.prover.at_work:
        assert time.monotonic() < end
        time.sleep(0.005)
    return choice


def test_torch_works_until_a_kernel_is_proven_and_the_kernel_from_then_on(trials, restarted):
    made, trials.go = Made("fine"), False
    trials.says(made, UNPACK)
    restarted(made)
    expected = weight().dequantize()
    for _ in range(3):
        assert torch.equal(product.unpack(weight(), torch.float32), expected)
    assert made.calls["unpack"] == 0 and kernels.used(CPU) == "torch until kernels are proven"
    trials.go = True
    assert taken_up()
    checked = made.calls["unpack"]
    assert torch.equal(product.unpack(weight(), torch.float32), expected)
    assert made.calls["unpack"] == checked + 1 and kernels.used(CPU) == kernels.backend_of(CPU) == "fine"


def test_a_product_has_the_same_bits_in_a_process_whenever_its_kernel_is_proven(trials, restarted, caplog):
    made, trials.go = Made("fine"), False
    for rows in ((1, 1), (2, 16)):
        trials.says(made, LINEAR, rows, **{f"rows_{number}": 0.5 for number in rows})
    trials.says(made, UNPACK)
    restarted(made)
    first = multiplied()
    trials.go = True
    assert taken_up()
    assert torch.equal(multiplied(), first) and made.calls["linear"] == 0
    assert not taken_up("linear", 3)
    tried = len(trials.jobs)
    restarted(made)
    caplog.set_level(logging.INFO, kernels.__name__)
    second = multiplied()
    finished()
    assert [record.message for record in caplog.records] == ["[Featherweight] Packed weights on cpu use fine."]
    assert made.calls["linear"] and len(trials.jobs) == tried  # proven by the process before
    assert torch.equal(multiplied(), second) and torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def test_a_product_that_is_first_needed_after_the_trial_is_the_kernels(trials, restarted):
    made = Made("fine")
    for rows in ((1, 1), (2, 16)):
        trials.says(made, LINEAR, rows, **{f"rows_{number}": 0.5 for number in rows})
    restarted(made)
    kernels.prepare(CPU, [UNPACK, LINEAR], {"Q4_0": {(16, 512)}})
    finished()
    multiplied()
    assert made.calls["linear"]
    assert trials.jobs[0]["shapes"] == {"Q4_0": [(16, 512)]} and len(trials.jobs) == 1


def test_the_fastest_is_used_for_each_format_and_number_of_rows_and_torch_where_it_is(trials, restarted):
    slow, fast = Made("slow"), Made("fast")
    trials.says(slow, UNPACK, rows_=0.7)
    trials.says(fast, UNPACK, rows_=0.4)
    trials.says(slow, LINEAR, (1, 1), rows_1=0.5)
    trials.says(fast, LINEAR, (1, 1), rows_1=0.6)
    trials.says(fast, LINEAR, (2, 16), rows_2=0.3, rows_16=1.5)
    restarted(slow, fast)
    kernels.prepare(CPU, [UNPACK, LINEAR], {})
    finished()
    run = {(one.name, kernel.op, kernel.min_tokens): kernel.run for one in (slow, fast) for kernel in one.backend.kernels}
    assert taken_up() and kernels.find("unpack", CPU, Q4_0, torch.float32) is run["fast", "unpack", 1]
    found = [kernels.find("linear", CPU, Q4_0, torch.float32, None, tokens) for tokens in (1, 2, 5, 16, 17)]
    assert found == [run["slow", "linear", 1], run["fast", "linear", 2], None, None, None]


def test_what_is_proven_and_wrong_in_this_process_is_torchs_and_reported(trials, restarted, caplog):
    made = Made("wrong", off=1)
    trials.says(made, UNPACK)
    restarted(made)
    assert not taken_up()
    assert torch.equal(product.unpack(weight(), torch.float32), weight().dequantize())
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "unpack of Q4_0 to float32 by wrong" in warning and kernels.ISSUES in warning


@pytest.mark.parametrize("asked, backend", [("torch", "torch"), ("fine", "fine"), ("auto", None), (None, None)])
def test_what_is_asked_for_by_name_needs_no_trial(asked, backend, trials, restarted, monkeypatch):
    restarted(Made("fine"))
    if asked:
        monkeypatch.setenv(kernels.VARIABLE, asked)
    product.unpack(weight(), torch.float32)
    if backend:
        assert kernels.backend_of(CPU) == kernels.used(CPU) == backend and not trials.jobs
    else:
        assert not taken_up() and trials.jobs


def test_the_first_call_waits_for_no_trial(trials, restarted):
    made, trials.go = Made("fine"), False
    restarted(made)
    started = time.monotonic()
    multiplied()
    assert time.monotonic() - started < 5 and kernels._choice(CPU).prover.at_work
    trials.go = True
    assert not taken_up()


# --- a CPU as it is ---


@pytest.fixture
def own_work(trials, monkeypatch):
    """The CPU uses what is right until that is proven, and ComfyUI is at work there while this says so."""
    work = SimpleNamespace(is_busy=False)
    monkeypatch.setattr(kernels, "CheckedUntilProven", choices.CheckedUntilProven)
    monkeypatch.setattr(room.OwnWork, "is_busy", lambda self: work.is_busy)
    monkeypatch.setattr(choices, "PATIENCE", dict.fromkeys(choices.PATIENCE, 60))
    monkeypatch.setattr(proving, "ASK_EVERY", 0.02)
    return work


def says_that_torch_is_faster(trials, made):
    trials.says(made, UNPACK, rows_=1.5)
    for rows in ((1, 1), (2, 16)):
        trials.says(made, LINEAR, rows, **{f"rows_{number}": 1.5 for number in rows})


def test_a_cpu_uses_what_is_right_until_a_trial_has_timed_it(trials, restarted, own_work):
    made, trials.go = Made("fine"), False
    says_that_torch_is_faster(trials, made)
    restarted(made)
    first = multiplied()
    product.unpack(weight(), torch.float32)
    assert made.calls["linear"] and made.calls["unpack"] and kernels.used(CPU) == "fine"
    trials.go = True
    assert not taken_up()
    assert torch.equal(multiplied(), first) and taken_up("linear", 3)  # in this process a picture stays what it is
    restarted(made)
    made.calls.update(linear=0)
    assert torch.allclose(multiplied(), first, rtol=1e-4, atol=1e-4)
    assert made.calls["linear"] == 0 and not taken_up("linear", 3) and kernels.used(CPU) == "torch"


def test_a_cpu_keeps_what_is_right_where_a_trial_finds_nothing_out(trials, restarted, own_work, monkeypatch):
    made = Made("fine")
    monkeypatch.setattr(trial_process, "run_trial", lambda *arguments: Outcome("late"))
    restarted(made)
    multiplied()
    assert taken_up() and taken_up("linear", 3) and kernels.used(CPU) == "fine"


def test_a_cpu_that_comfyui_works_on_is_not_disturbed(trials, restarted, own_work):
    own_work.is_busy = True
    restarted(Made("fine"))
    multiplied()
    time.sleep(0.2)
    assert kernels._choice(CPU).prover.at_work and not trials.jobs
    own_work.is_busy = False
    finished()
    assert trials.jobs


def test_what_packs_is_not_tried_on_a_cpu_for_it_is_not_timed(trials, restarted, own_work):
    restarted(Made("fine"))
    kernels.find("pack_blocks", CPU, Q4_0, torch.float32)
    assert not kernels._choice(CPU).prover.at_work and not trials.jobs


def test_a_cpu_asks_nothing_of_a_backend_about_which_all_is_known(trials, restarted, own_work, caplog):
    made = Made("fine")
    says_that_torch_is_faster(trials, made)
    restarted(made)
    multiplied()
    finished()
    restarted(made)
    caplog.set_level(logging.INFO, kernels.__name__)
    kernels.prepare(CPU, [LINEAR], {})
    multiplied()
    finished()
    assert [record.message for record in caplog.records] == ["[Featherweight] Packed weights on cpu use torch."]


@pytest.mark.skipif(os.name != "posix", reason="processes end otherwise on Windows")
def test_a_kernel_that_is_slower_than_torch_is_not_used_on_a_cpu(restarted, own_work, monkeypatch):
    """What a real trial says of a backend that is right and slow with one format."""
    monkeypatch.setattr(trial_process, "run_trial", functools.partial(RUN_TRIAL, command=planted_backends.COMMAND))
    slow = SimpleNamespace(name="slow", backend=planted_backends.backend("slow"))
    restarted(slow)
    q8_0 = Case("unpack", "Q8_0", torch.float32, None)
    kernels.prepare(CPU, [UNPACK, q8_0], {"Q4_0": {(16, 256)}, "Q8_0": {(16, 256)}})
    assert kernels.find("unpack", CPU, Q4_0, torch.float32) is not None  # at first, for it is right
    finished()
    assert not taken_up()
    kernels.find("unpack", CPU, FORMATS["Q8_0"], torch.float32)
    assert all(proof.wait(60) for proof in kernels._choice(CPU)._proofs.values())
    assert kernels.find("unpack", CPU, FORMATS["Q8_0"], torch.float32) is not None


def test_own_work_is_what_this_process_takes_of_the_processor(monkeypatch):
    clock = SimpleNamespace(now=0.0, used=0.0)
    monkeypatch.setattr(room.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(room.time, "process_time", lambda: clock.used)
    work = room.OwnWork()
    assert work.is_busy()  # nobody knows yet
    clock.now = room.LOOK_SECONDS / 2
    assert work.is_busy()
    clock.now, clock.used = 10.0, 1.0
    assert not work.is_busy()
    clock.now, clock.used = 10.1, 1.1
    assert not work.is_busy()
    clock.now, clock.used = 11.5, 2.5
    assert work.is_busy()
