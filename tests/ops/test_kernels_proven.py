"""What a device uses of the kernels that trials have proven, and when. The device is a CPU whose kernels need a trial as a
GPU's do; its backends are made for the tests, of plain torch, and so is what a trial says of them."""
import logging
import tempfile
import threading
import time

import pytest
import torch
from featherweight.ops import formats, kernels, product  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight.ops.kernels import Backend, Case, Kernel, backends, proving, trial_process
from featherweight.ops.kernels.case_notes import add_notes, read_notes
from featherweight.ops.kernels.check import random_tensors
from featherweight.ops.kernels.trial_process import Outcome
from featherweight.ops.tensor import packed_tensor

CPU = torch.device("cpu")
Q4_0 = FORMATS["Q4_0"]
FLOAT32 = frozenset([torch.float32])
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

    def __call__(self, job, hear, seconds):
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
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernels, "TRIED", {"cpu"})
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
            monkeypatch.setitem(backends.IMPORTS, one.name, lambda one=one: one.backend)
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


def started(*cases):
    """ComfyUI starts where models have asked for these cases, and the trial comes to its end."""
    add_notes(list(cases), {})
    kernels.start_trials([CPU])
    for thread in threading.enumerate():
        if thread.name == "featherweight-trials":
            thread.join(60)
    return finished()


def finished():
    """What the device uses, once no trial is under way and nothing is noted."""
    choice, end = kernels._choice(CPU), time.monotonic() + 60
    while choice.prover.at_work:
        assert time.monotonic() < end
        time.sleep(0.005)
    return choice


def test_torch_works_until_a_kernel_is_proven_and_the_kernel_from_then_on(trials, restarted):
    made, trials.go = Made("fine"), False
    trials.says(made, UNPACK)
    restarted(made)
    kernels._choice(CPU).prover.want([UNPACK])
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
    kernels._choice(CPU).prover.want([UNPACK, LINEAR])
    first = multiplied()
    trials.go = True
    assert taken_up()
    assert torch.equal(multiplied(), first) and made.calls["linear"] == 0
    assert not taken_up("linear", 3)
    tried = len(trials.jobs)
    restarted(made)
    caplog.set_level(logging.INFO, kernels.__name__)
    started(UNPACK, LINEAR)
    second = multiplied()
    assert [record.message for record in caplog.records] == ["[Featherweight] Packed weights on cpu use fine."]
    assert made.calls["linear"] and len(trials.jobs) == tried  # proven by the process before
    assert torch.equal(multiplied(), second) and torch.allclose(first, second, rtol=1e-4, atol=1e-4)


def test_the_fastest_is_used_for_each_format_and_number_of_rows_and_torch_where_it_is(trials, restarted):
    slow, fast = Made("slow"), Made("fast")
    trials.says(slow, UNPACK, rows_=0.7)
    trials.says(fast, UNPACK, rows_=0.4)
    trials.says(slow, LINEAR, (1, 1), rows_1=0.5)
    trials.says(fast, LINEAR, (1, 1), rows_1=0.6)
    trials.says(fast, LINEAR, (2, 16), rows_2=0.3, rows_16=1.5)
    restarted(slow, fast)
    started(UNPACK, LINEAR)
    run = {(one.name, kernel.op, kernel.min_tokens): kernel.run for one in (slow, fast) for kernel in one.backend.kernels}
    assert taken_up() and kernels.find("unpack", CPU, Q4_0, torch.float32) is run["fast", "unpack", 1]
    found = [kernels.find("linear", CPU, Q4_0, torch.float32, None, tokens) for tokens in (1, 2, 5, 16, 17)]
    assert found == [run["slow", "linear", 1], run["fast", "linear", 2], None, None, None]


def test_what_is_proven_and_wrong_in_this_process_is_torchs_and_reported(trials, restarted, caplog):
    made = Made("wrong", off=1)
    trials.says(made, UNPACK)
    restarted(made)
    started(UNPACK)
    assert not taken_up()
    assert torch.equal(product.unpack(weight(), torch.float32), weight().dequantize())
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "unpack of Q4_0 to float32 by wrong" in warning and kernels.ISSUES in warning


@pytest.mark.parametrize("asked, backend", [("torch", "torch"), ("fine", "fine"), ("auto", None), (None, None)])
def test_what_is_asked_for_by_name_needs_no_trial(asked, backend, trials, restarted, monkeypatch):
    restarted(Made("fine"))
    if asked:
        monkeypatch.setenv(kernels.VARIABLE, asked)
    if not backend:
        started(UNPACK)
    product.unpack(weight(), torch.float32)
    if backend:
        assert kernels.backend_of(CPU) == kernels.used(CPU) == backend and not trials.jobs
    else:
        assert not taken_up() and trials.jobs


def test_the_first_call_waits_for_no_trial(trials, restarted):
    made, trials.go = Made("fine"), False
    restarted(made)
    kernels._choice(CPU).prover.want([LINEAR])
    begun = time.monotonic()
    multiplied()
    assert time.monotonic() - begun < 5 and kernels._choice(CPU).prover.at_work
    trials.go = True
    assert not taken_up()


# --- what a load does, and the next start ---


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, kernels.__name__)
    return lambda: [record.message for record in caplog.records]


def noted():
    """What is noted, once no thread notes anything."""
    for thread in threading.enumerate():
        if thread.name == "featherweight-notes":
            thread.join(60)
    return read_notes()


def test_a_load_and_a_layer_start_no_trial_and_say_once_what_is_tried_at_the_next_start(trials, restarted, log):
    restarted(Made("fine"))
    for _ in range(2):
        kernels.prepare(CPU, [UNPACK, LINEAR], {"Q4_0": {(16, 512)}})
        noted()
    multiplied()
    product.unpack(weight(), torch.float16)
    cases, shapes = noted()
    assert not trials.jobs and not kernels._choice(CPU).prover.at_work
    assert set(cases) == {UNPACK, LINEAR, Case("unpack", "Q4_0", torch.float16, None)} and shapes == {"Q4_0": {(16, 512)}}
    assert log() == ["[Featherweight] Kernels for Q4_0 are tried on cpu when ComfyUI starts next; until then torch does their"
                     " work."]


def test_what_models_asked_for_is_tried_at_the_next_start_and_used_by_the_first_model(trials, restarted, log):
    made = Made("fine")
    for rows in ((1, 1), (2, 16)):
        trials.says(made, LINEAR, rows, **{f"rows_{number}": 0.5 for number in rows})
    trials.says(made, UNPACK)
    restarted(made)
    kernels.prepare(CPU, [UNPACK, LINEAR], {"Q4_0": {(16, 512)}})
    noted()
    restarted(made)
    started()
    (job,) = trials.jobs
    assert job["cases"] == [UNPACK.as_json(), LINEAR.as_json()] and job["shapes"] == {"Q4_0": [(16, 512)]}
    kernels.prepare(CPU, [UNPACK, LINEAR], {"Q4_0": {(16, 512)}})
    multiplied()
    noted()
    assert made.calls["linear"] and kernels.used(CPU) == "fine" and len(trials.jobs) == 1
    assert not [line for line in log()[1:] if "starts next" in line]


def test_a_model_of_a_new_format_is_not_said_to_be_unpacked_by_what_was_proven_for_others(trials, restarted):
    made = Made("fine")
    trials.says(made, UNPACK)
    restarted(made)
    started(UNPACK)
    kernels.prepare(CPU, [Case("unpack", "Q8_0", torch.float32, None)], {})
    assert kernels.used(CPU) == "torch"
    kernels.prepare(CPU, [UNPACK], {})
    assert kernels.used(CPU) == "fine"
    noted()


def test_the_formats_most_used_are_tried_where_no_model_was_loaded_yet(trials, restarted):
    restarted(Made("fine"))
    started()
    (job,) = trials.jobs
    assert job["cases"] == [[op, name, dtype, None] for name in proving.MOST_USED for dtype in ("bfloat16", "float16")
                            for op in ("unpack", "linear")]
    assert set(proving.MOST_USED) <= set(FORMATS)


@pytest.mark.parametrize("asked", ["torch", "fine"])
def test_nothing_is_tried_or_noted_where_kernels_are_asked_for_by_name(asked, trials, restarted, monkeypatch):
    restarted(Made("fine"))
    monkeypatch.setenv(kernels.VARIABLE, asked)
    kernels.start_trials([CPU])
    kernels.prepare(CPU, [UNPACK], {})
    multiplied()
    assert noted() == ([], {}) and not trials.jobs


def test_a_cpu_is_not_tried(trials, restarted, monkeypatch):
    monkeypatch.setattr(kernels, "TRIED", {"cuda", "mps"})
    restarted(Made("fine"))
    kernels.start_trials([CPU])
    kernels.prepare(CPU, [UNPACK], {})
    multiplied()
    assert noted() == ([], {}) and not trials.jobs


def test_calls_wait_once_in_all_for_verdicts_that_are_not_read(trials, restarted, monkeypatch):
    monkeypatch.setattr(proving, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(proving, "key_of", lambda *_: time.sleep(3))
    restarted(Made("fine"))
    begun = time.monotonic()
    for name in ("Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q5_1"):
        kernels.find("linear", CPU, FORMATS[name], torch.float32)
    kernels.used(CPU)
    assert 0.4 < time.monotonic() - begun < 1.2
    noted()
