"""Which kernels a device uses. The backends are fakes that run plain torch on the CPU."""
import errno
import inspect
import itertools
import logging
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from kernel_cases import decide_on_demand
from pack_api import FORMATS, packed_tensor, product
from torch_kernels import RIGHT, add_rounded, attention, dequantize, multiply, transpose
from user_kernels import forget_decisions, undecided, verdicts_on

from devtools.files.gguf_files import block_pool
from featherweight.ops import kernels
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.kernels import (
    Backend,
    Kernel,
    decider,
    int8_codes,
    kernel_source,
    registry,
    validation,
    verdicts,
)
from featherweight.ops.kernels.cpp_backend import VALUES_PER_THREAD
from featherweight.ops.kernels.int8_codes import encode_rows, encode_tokens
from featherweight.ops.kernels.validation import ISSUES, probe
from featherweight.ops.kernels.waiting import host
from featherweight.ops.layers import fast_on_cpu
from featherweight.ops.low_rank import LowRank, Slice

CPU = torch.device("cpu")
Q4_0 = FORMATS["Q4_0"]


def dequantize_rounded(packed_format, tensors, out, first):
    rounded = torch.empty_like(out, dtype=torch.bfloat16)
    out.copy_(packed_format.dequantize_into(tensors, rounded, first))


@pytest.fixture
def use(monkeypatch, tmp_path):
    """use(backend): gives the CPU this backend, as in a new ComfyUI without verdicts; use(): none.
    """
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    folders = itertools.count()

    def use(backend=None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(next(folders))))
        decide_on_demand(monkeypatch)
        monkeypatch.setitem(kernels.BACKENDS, "cpu", backend and backend.name)
        if backend:
            monkeypatch.setitem(registry.IMPORTS, backend.name, lambda: backend)
    return use


def backend(*kernels, name="made_up", probe=lambda device: None):
    return Backend(name, probe, kernels)


WITHOUT_FORMAT = {"int8_tokens", "channels_last", "attention", "add_rounded"}


def kernel(capability: str, run, **constraints) -> Kernel:
    names = [] if capability in WITHOUT_FORMAT else ["Q4_0"]
    return Kernel(capability, frozenset(names), frozenset([dtype_of(capability)]), run,
                  **constraints)


def dtype_of(capability: str) -> torch.dtype:
    return {"int8_rows": torch.int8, "add_rounded": torch.bfloat16}.get(capability, torch.float32)


def find(capability: str):
    packed_format = None if capability in WITHOUT_FORMAT else Q4_0
    tokens = 3 if capability == "linear" else None
    return kernels.find(capability, CPU, packed_format, dtype_of(capability), tokens)


def packed(rows=6, columns=64):
    blocks = rows * columns // 32
    return packed_tensor(Q4_0, torch.from_numpy(block_pool("Q4_0")[:blocks]), (rows, columns))


def recording(run):
    """Return a list, and what calls `run` and adds the arguments to the list."""
    calls = []

    def recorded(*args):
        calls.append(args)
        run(*args)

    return calls, recorded


def test_a_kernel_that_is_right_is_used(use):
    calls, recorded = recording(dequantize)
    use(backend(kernel("dequantize", recorded)))
    values = product.dequantize(packed(), torch.float32)
    assert calls[-1][2] is values
    assert torch.equal(values, packed().dequantize())


@pytest.mark.parametrize("setting", ["", "auto", "torch", "cpp", "metal"])
def test_a_macs_gpu_has_no_kernels_until_the_user_names_them_and_another_process_checks_these(
        setting, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, setting)
    found = kernels._new_decider(torch.device("mps", 0))
    assert (found.is_off, found._checker is None) == (setting != "metal", setting != "metal")


def test_a_kernel_with_wrong_values_is_off_with_one_warning_and_the_reference_used(use, caplog):
    caplog.set_level(logging.DEBUG, "featherweight")
    use(backend(kernel("dequantize", dequantize_rounded)))
    assert torch.equal(product.dequantize(packed(), torch.float32), packed().dequantize())
    reasons = [record for record in caplog.records if "values" in record.message]
    assert [record.levelno for record in reasons] == [logging.WARNING]
    for part in ("dequantize of Q4_0 to float32, rows 1 to any by made_up, ", " on cpu",
                 "differ from the reference",
                 f"torch {torch.__version__}", "[Featherweight]", ISSUES):
        assert part in reasons[0].message
    assert "\n" not in reasons[0].message


def attention_of_numbers(query, key, value, mask, scale, out):
    attention(query, key, value.nan_to_num(), mask, scale, out)


def encode_rows_and_clip(packed_format, tensors, codes, scales, first):
    encode_rows(packed_format, tensors, codes, scales, first)
    codes.clamp_(-126, 126)


def encode_tokens_as_they_are(input, codes, scales):
    int8_codes.quantize_into(input.float(), codes, scales)


def encode_tokens_without_nan(input, codes, scales):
    encode_tokens(input, codes, scales)
    scales.nan_to_num_()


def add_to_the_nearest(value, change):
    value.add_(change)


@pytest.mark.parametrize(
    ("capability", "run", "is_right"),
    [
        ("dequantize", dequantize, True),
        ("dequantize", dequantize_rounded, False),
        ("linear", multiply, True),
        ("channels_last", transpose, True),
        ("add_rounded", add_rounded, True),
        ("add_rounded", add_to_the_nearest, False),
        ("attention", attention, True),
        ("attention", attention_of_numbers, False),
        ("int8_rows", encode_rows, True),
        ("int8_rows", encode_rows_and_clip, False),
        ("int8_tokens", encode_tokens, True),
        ("int8_tokens", encode_tokens_as_they_are, False),
        ("int8_tokens", encode_tokens_without_nan, False),
    ],
)
def test_a_kernel_is_used_only_if_it_is_right(capability, run, is_right, use):
    use(backend(kernel(capability, run)))
    assert (find(capability) is run) == is_right


SEVERAL_THREADS = 2 * VALUES_PER_THREAD
SPOIL = {  # changes the arguments of a right kernel after it has run
    "dequantize": lambda args: args.out[-1].add_(1),
    "linear": lambda args: args.out[-1, -1].add_(1),
    "int8_rows": lambda args: args.codes[-1, -1].bitwise_xor_(64),
    "int8_tokens": lambda args: args.scales[-1].mul_(1.01),
    "channels_last": lambda args: args.out[-1, -1, -1].add_(1),
    "add_rounded": lambda args: args.value[-1, -1].mul_(2),
    "attention": lambda args: args.out[-1, -1, -1, -1].add_(0.01)}
WRONG = {
    "dequantize": {
        "in the tail": lambda args: args.out.numel() % Q4_0.block_length,
        "of whole blocks": lambda args: args.out.numel() % Q4_0.block_length == 0,
        "from odd addresses": lambda args: args.tensors[0].data_ptr() % 2,
        "from even addresses": lambda args: args.tensors[0].data_ptr() % 2 == 0,
        "from addresses of four bytes": lambda args: args.tensors[0].data_ptr() % 16 == 4,
        "to odd addresses": lambda args: args.out.data_ptr() % 8,
        "with several threads": lambda args: args.out.numel() >= SEVERAL_THREADS,
        "in the tail of several threads":
            lambda args: args.out.numel() >= SEVERAL_THREADS and args.out.numel() % 32,
        "with one thread": lambda args: args.out.numel() < SEVERAL_THREADS,
        "from the first block": lambda args: args.first == 0,
        "from a later block": lambda args: args.first,
    },
    "linear": {
        "without addend": lambda args: args.addend is None,
        "with a bias": lambda args: args.addend is not None and args.addend.stride(0) == 0,
        "with an addend of odd strides":
            lambda args: args.addend is not None and args.addend.stride(0) == 1,
        "with the most tokens": lambda args: len(args.input) == 4,
        "with the most tokens and no addend":
            lambda args: len(args.input) == 4 and args.addend is None,
        "with the fewest tokens": lambda args: len(args.input) == 2,
        "from odd addresses": lambda args: args.tensors[0].data_ptr() % 2,
        "of input at odd addresses": lambda args: args.input.data_ptr() % 16,
        "with several threads":
            lambda args: args.out.shape[1] * args.input.shape[1] >= SEVERAL_THREADS,
        "with one thread": lambda args: args.out.shape[1] * args.input.shape[1] < SEVERAL_THREADS,
        "with many columns":
            lambda args: args.input.shape[1] > 1024 and args.input.shape[1] % 1024,
        "with an odd number of rows": lambda args: args.out.shape[1] % 2,
    },
    "int8_rows": {
        "with several threads": lambda args: args.codes.numel() >= SEVERAL_THREADS,
        "from a later row": lambda args: args.first,
        "from the first row": lambda args: args.first == 0,
        "from odd addresses": lambda args: args.tensors[0].data_ptr() % 2,
        "with many columns":
            lambda args: args.codes.shape[1] > 1024 and args.codes.shape[1] % 1024,
    },
    "int8_tokens": {
        "with several threads": lambda args: args.input.numel() >= SEVERAL_THREADS,
        "with one row": lambda args: len(args.input) == 1,
        "from odd addresses": lambda args: args.input.data_ptr() % 16,
    },
    "channels_last": {
        "with several threads": lambda args: args.out.numel() >= SEVERAL_THREADS,
        "with one row": lambda args: len(args.values) == 1,
        "with one tap": lambda args: args.values.shape[2] == 1,
        "with many taps": lambda args: args.values.shape[2] > 64,
        "with channels for no whole vector": lambda args: args.values.shape[1] % 16,
        "from odd addresses": lambda args: args.values.data_ptr() % 16,
        "to odd addresses": lambda args: args.out.data_ptr() % 8,
    },
    "add_rounded": {
        "with several threads": lambda args: args.value.numel() >= SEVERAL_THREADS,
        "of one number": lambda args: args.value.numel() == 1,
        "of no whole vector": lambda args: args.value.numel() % 8,
        "at odd addresses": lambda args: args.value.data_ptr() % 16,
    },
    "attention": {
        "with a mask": lambda args: args.mask is not None,
        "with a mask of all queries' own": lambda args: args.mask is not None
                                                        and args.mask.stride(2),
        "without a mask": lambda args: args.mask is None,
        "with fewer heads of keys": lambda args: args.key.shape[1] < args.query.shape[1],
        "with several batches": lambda args: len(args.query) > 1,
        "with many queries": lambda args: args.query.shape[2] > 96,
        "with many keys": lambda args: args.key.shape[2] > 1024,
        "of wide heads": lambda args: args.query.shape[3] > 256,
        "of odd widths": lambda args: args.query.shape[3] % 2,
        "of values of another width": lambda args: args.value.shape[3] != args.query.shape[3],
        "with one key": lambda args: args.key.shape[2] == 1,
        "from odd addresses": lambda args: args.query.data_ptr() % 16,
    },
}


@pytest.mark.parametrize(
    ("capability", "where"),
    [(capability, where) for capability in WRONG for where in WRONG[capability]],
)
def test_a_kernel_that_is_wrong_only_somewhere_is_found_out(capability, where, use, caplog):
    signature = inspect.signature(RIGHT[capability])

    def wrong(*arguments):
        RIGHT[capability](*arguments)
        args = types.SimpleNamespace(**signature.bind(*arguments).arguments)
        if WRONG[capability][where](args):
            SPOIL[capability](args)

    limits = {"min_tokens": 2, "max_tokens": 4} if capability == "linear" else {}
    use(backend(kernel(capability, wrong, **limits)))
    assert find(capability) is None
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "gives wrong values here" in warning.message and " in the case " in warning.message


def test_a_dequantize_kernel_that_writes_outside_its_output_is_found_out(use, caplog):
    def wrong(packed_format, tensors, out, first):
        dequantize(packed_format, tensors, out, first)
        if out.storage_offset() + out.numel() < out.untyped_storage().nbytes() // 4:
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()

    use(backend(kernel("dequantize", wrong)))
    assert find("dequantize") is None and "wrote outside its output" in caplog.text


def test_a_kernel_that_cannot_run_here_is_no_warning(use, caplog):
    def refused(*arguments):
        raise RuntimeError("no such instruction")

    caplog.set_level(logging.DEBUG, "featherweight")
    use(backend(kernel("dequantize", refused)))
    assert kernels.find("dequantize", CPU, Q4_0, torch.float32) is None
    (reason,) = [record for record in caplog.records if "no such instruction" in record.message]
    assert reason.levelno == logging.DEBUG
    assert "is off on cpu: failed, " in reason.message
    assert kernels.used(CPU, [Q4_0], torch.float32) == (
        "torch: failed (RuntimeError('no such instruction'))")


def test_a_probe_with_wrong_values_is_a_warning(use, caplog):
    def fill(packed_format, tensors, out, first):
        out.fill_(1)

    use(backend(probe=lambda device: probe(fill, device)))
    find("dequantize")
    assert kernels.used(CPU, [Q4_0], torch.float32).startswith("torch: no kernel works here")
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the probe by made_up" in warning.message
    assert "please report this line at" in warning.message


def test_the_address_for_reports_is_the_packs_own():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"Bug Tracker" = "{ISSUES}"' in project


def test_the_int8_product_takes_its_codes_from_kernels(use, monkeypatch):
    called = []
    monkeypatch.setattr(fast_on_cpu, "multiplies_integers", lambda device: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    weight, input = packed(rows=8, columns=256), torch.randn((fast_on_cpu.MIN_TOKENS, 256))
    use()
    exact = product.linear(input, weight)
    # too few tokens to do without
    assert torch.equal(product.linear(input, weight, fast=True), exact)
    use(backend(
        kernel("int8_rows", lambda *args: (called.append(1), encode_rows(*args))),
        kernel("int8_tokens", lambda *args: (called.append(2), encode_tokens(*args)))))
    result = product.linear(input, weight, fast=True)
    assert called[-2:] == [2, 1] and 0.001 < (result - exact).norm() / exact.norm() < 0.03


def test_a_product_with_a_low_rank_branch_is_added_to_it(use):
    use(backend(kernel("linear", multiply)))
    generator = torch.Generator().manual_seed(0)
    input, bias, down, up = (torch.randn(shape, generator=generator)
                             for shape in ((2, 64), (6,), (2, 64), (6, 2)))
    expected = torch.nn.functional.linear(input, packed().dequantize() + up @ down, bias)
    result = product.linear(
        input, packed(), bias, low_rank=LowRank(down, (up,), (Slice(0, 6, 0, 2),))
    )
    assert torch.allclose(result, expected, atol=1e-4)


def test_a_kernel_gets_only_what_it_accepts(use):
    use(backend(kernel("dequantize", dequantize),
                kernel("linear", multiply, min_tokens=2, max_tokens=4)))
    assert kernels.find("dequantize", CPU, FORMATS["Q8_0"], torch.float32) is None
    assert kernels.find("dequantize", CPU, Q4_0, torch.float16) is None
    is_used = [kernels.find("linear", CPU, Q4_0, torch.float32, tokens=tokens) is multiply
               for tokens in range(7)]
    assert is_used == [False, False, True, True, True, False, False]


def test_a_kernel_is_checked_when_it_is_needed(use):
    calls, recorded = recording(multiply)
    use(backend(kernel("linear", recorded, max_tokens=16)))
    assert kernels.find("linear", CPU, Q4_0, torch.float32, tokens=17) is None
    checked = len(calls)
    assert {len(input) for _, _, input, *_ in calls} == {*range(1, 7), 16}
    kernels.find("linear", CPU, Q4_0, torch.float32, tokens=5)
    assert len(calls) == checked


def test_a_cpu_never_imports_the_backend_of_a_gpu(use, monkeypatch):
    use()
    module = f"{kernels.__name__}.cuda_backend"
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert kernels.find("dequantize", CPU, Q4_0, torch.float32) is None
    assert module not in sys.modules


def test_a_format_with_another_block_length_is_accepted_too():
    of_nf4 = Kernel("dequantize", frozenset(["NF4"]), frozenset([torch.float32]), dequantize)
    assert of_nf4.accepts(FORMATS["NF4"].of_block_length(128), torch.float32)
    assert not of_nf4.accepts(FORMATS["FP4"], torch.float32)


def test_a_backend_that_does_not_work_is_named_once_with_the_reason(use, caplog):
    def no_driver(device):
        raise RuntimeError("no driver")

    caplog.set_level(logging.INFO, "featherweight")
    use(backend(kernel("dequantize", dequantize), name="broken", probe=no_driver))
    for _ in range(3):
        product.dequantize(packed(), torch.float32)
    (line,) = [record.message for record in caplog.records]
    assert line == ("[Featherweight] Packed weights on cpu use torch, because no kernel works there"
                    " (broken: no driver).")
    found = kernels._deciders[CPU]
    assert (found.backend_name, found.reason, verdicts_on(CPU)) == (None, "broken: no driver", [])


@pytest.mark.parametrize(("setting", "is_used"), [
    (None, True), ("torch", False), ("auto", True), ("made_up", True), ("MADE_UP", True),
    ("nvrtc", True)], ids=str)  # the last is one for other devices
def test_the_environment_variable_chooses(setting, is_used, use, monkeypatch):
    use(backend(kernel("dequantize", dequantize)))
    if setting is None:
        monkeypatch.delenv(kernels.VARIABLE)
    else:
        monkeypatch.setenv(kernels.VARIABLE, setting)
    assert (kernels.find("dequantize", CPU, Q4_0, torch.float32) is dequantize) == is_used
    assert kernels.used(CPU, [Q4_0], torch.float32) == (
        "made_up" if is_used else "torch")


def test_texts_name_kernels_by_devices_and_say_why_torch_works(use, monkeypatch):
    assert kernels.TITLES.keys() == registry.IMPORTS.keys()
    use(backend(kernel("dequantize", dequantize)))
    monkeypatch.setitem(kernels.TITLES, "made_up", "made up kernels")
    kernels.decide(CPU, [("dequantize", Q4_0, torch.float32), ("linear", Q4_0, torch.float32)])
    assert kernels.used(CPU, [Q4_0], torch.float32) == "made up kernels"
    assert kernels.used(CPU, [Q4_0], torch.float32, "linear") == "torch: there is no kernel"


def test_an_unknown_setting_is_named_and_ignored(use, monkeypatch, caplog):
    use(backend(kernel("dequantize", dequantize)))
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    assert kernels.find("dequantize", CPU, Q4_0, torch.float32) is dequantize
    assert "FEATHERWEIGHT_KERNELS is cuda and is ignored; expected one of auto, " in caplog.text


@pytest.mark.parametrize("setting", ["auto", "made_up", kernels.UNTRIED])
def test_what_no_device_has_run_is_used_where_it_is_asked_for(use, setting, monkeypatch):
    use(backend(kernel("dequantize", dequantize, is_untried=True)))
    monkeypatch.setenv(kernels.VARIABLE, setting)
    is_asked_for = setting == kernels.UNTRIED
    assert find("dequantize") is (dequantize if is_asked_for else None)
    assert ("there is no kernel" in kernels.used(CPU, [Q4_0], torch.float32)) != is_asked_for


# --- when a case is decided ---


@pytest.fixture
def in_a_step(use, monkeypatch):
    """in_a_step(capability): what a layer finds that decides nothing."""
    look_up = kernels._look_up

    def use_backend(*all_kernels):
        use(backend(*all_kernels))
        monkeypatch.setattr(kernels, "_look_up", look_up)
    return use_backend


def test_a_step_decides_nothing_and_what_it_needed_stays_torchs_but_for_the_references_bits(
        in_a_step):
    in_a_step(kernel("dequantize", dequantize), kernel("linear", multiply))
    needed = [("dequantize", Q4_0, torch.float32), ("linear", Q4_0, torch.float32)]
    assert find("dequantize") is None and find("linear") is None
    assert undecided == ["dequantize of Q4_0 to float32 on cpu", "linear of Q4_0 to float32 on cpu"]
    kernels.decide(CPU, needed)  # a model that is loaded later
    assert find("dequantize") is dequantize and find("linear") is None
    in_a_step(kernel("dequantize", dequantize), kernel("linear", multiply))
    kernels.decide(CPU, needed)
    assert find("dequantize") is dequantize and find("linear") is multiply
    assert not undecided


def test_what_lacked_memory_is_asked_again_at_the_next_load_and_a_product_in_the_next_process(
        in_a_step):
    room = []

    def needs_memory(run):
        def limited(*args):
            if not room:
                raise torch.OutOfMemoryError("out of memory")
            run(*args)
        return limited

    planned = [kernel("dequantize", needs_memory(dequantize)),
               kernel("linear", needs_memory(multiply))]
    needed = [("dequantize", Q4_0, torch.float32), ("linear", Q4_0, torch.float32)]
    in_a_step(*planned)
    kernels.decide(CPU, needed)
    assert kernels.used(CPU, [Q4_0], torch.float32) == (
        f"torch: {kernels.WORDS['open']} (out of memory)")
    room.append(True)
    kernels.decide(CPU, needed)
    assert find("dequantize") and not find("linear")
    kernels._deciders.clear()  # the next process
    kernels._found.clear()
    kernels.decide(CPU, needed)
    assert find("dequantize") and find("linear")


def test_verdicts_of_an_earlier_process_count_and_only_the_smallest_case_runs_again(use):
    calls, recorded = recording(multiply)
    use(backend(kernel("linear", recorded)))
    assert find("linear") is recorded
    checked, calls[:] = len(calls), []
    kernels._deciders.clear()  # another process
    kernels._found.clear()
    assert find("linear") is recorded and len(calls) == 1 < checked


@pytest.mark.parametrize("changed", ["nothing", "the backend", "the check", "the source"])
def test_a_verdict_is_asked_again_where_what_it_is_about_has_changed(changed, use, monkeypatch,
                                                                     tmp_path):
    calls, recorded = recording(dequantize)

    def made_up():
        return Backend("made_up", lambda device: None, (kernel("dequantize", recorded),),
                       platform="cpu", files=(tmp_path / "backend.py",))

    (tmp_path / "backend.py").write_text("a")
    use(made_up())
    find("dequantize")
    if changed == "the backend":
        (tmp_path / "backend.py").write_text("b")
    elif changed == "the check":
        monkeypatch.setattr(validation, "__file__", str(tmp_path / "backend.py"))
    elif changed == "the source":
        monkeypatch.setitem(kernel_source.DITHER, "MIX", "1u")
    calls.clear()
    forget_decisions(monkeypatch)
    kernels.decide(CPU, [("dequantize", Q4_0, torch.float32)])
    assert (len(calls) > 1) == (changed != "nothing")


def test_a_kernel_that_is_wrong_for_one_dtype_is_used_for_the_others(use):
    def wrong_in_bfloat16(packed_format, tensors, out, first):
        dequantize(packed_format, tensors, out, first)
        if out.dtype == torch.bfloat16:
            out[-1] += 1

    dtypes = frozenset([torch.float32, torch.bfloat16])
    use(backend(Kernel("dequantize", frozenset(["Q4_0"]), dtypes, wrong_in_bfloat16)))
    assert kernels.find("dequantize", CPU, Q4_0, torch.bfloat16) is None
    assert kernels.find("dequantize", CPU, Q4_0, torch.float32) is wrong_in_bfloat16


def test_on_a_full_disk_verdicts_hold_for_this_process(use, monkeypatch):
    calls, recorded = recording(dequantize)

    def full(handle):
        raise OSError(errno.ENOSPC, "no space left on device")

    use(backend(kernel("dequantize", recorded)))
    monkeypatch.setattr(verdicts.os, "fsync", full)
    for _ in range(2):
        assert find("dequantize") is recorded
        checked = len(calls)
        kernels._found.clear()
    assert len(calls) == checked > 1


def test_a_cancel_ends_a_load_and_decides_nothing(in_a_step, monkeypatch):
    begun, ends = threading.Event(), threading.Event()

    def slow(*args):
        begun.set()
        ends.wait(60)
        dequantize(*args)

    class Cancelled(Exception):
        pass

    def cancel():
        if begun.is_set():
            raise Cancelled

    in_a_step(kernel("dequantize", slow))
    monkeypatch.setattr(host, "raise_if_cancelled", cancel)
    needed = [("dequantize", Q4_0, torch.float32)]
    with pytest.raises(Cancelled):
        kernels.decide(CPU, needed)
    ends.set()
    monkeypatch.setattr(host, "raise_if_cancelled", lambda: None)
    kernels.decide(CPU, needed)
    assert find("dequantize") is slow


def test_a_bar_says_what_is_checked_and_moves_with_each_kernel(use, monkeypatch):
    shown, steps = [], []
    monkeypatch.setattr(host, "progress", lambda text, count: (shown.append((text, count)),
                                                               map(steps.append, range(count)))[1])
    use(backend(kernel("dequantize", dequantize), kernel("linear", multiply)))
    for _ in range(2):  # nothing is checked twice
        kernels.decide(CPU, [(name, Q4_0, torch.float32) for name in ("dequantize", "linear")])
    use(backend(kernel("dequantize", dequantize)))
    find("dequantize")  # one is not shown: what needs it has a bar of its own
    assert shown == [("Checking kernels for Q4_0: once for this compiler", 2)] and len(steps) == 2


def test_a_file_of_countless_layouts_has_no_more_than_a_bound_checked(use, monkeypatch):
    monkeypatch.setattr(decider, "MAX_CASES", 3)
    use(backend(Kernel("dequantize", frozenset(["RowFormat"]), frozenset([torch.float32]),
                       dequantize)))
    for group in range(8, 88, 8):
        packed_format = FAMILIES["SDNQ_UINT4"].of_columns(4 * group, group)
        kernels.decide(CPU, [("dequantize", packed_format, torch.float32)])
    assert verdicts_on(CPU).count("right") == 3


def test_a_weight_of_another_length_needs_no_other_verdict(use):
    calls, recorded = recording(dequantize)

    rows = Kernel("dequantize", frozenset(["RowFormat"]), frozenset([torch.float32]), recorded)
    use(backend(rows))
    for columns in (512, 768, 12288):
        packed_format = FAMILIES["INT8_CONVROT"].of_columns(columns)
        assert kernels.find("dequantize", CPU, packed_format, torch.float32) is recorded
        checks, calls[:] = calls[:], []
    assert not checks and verdicts_on(CPU).count("right") == 1


@pytest.mark.parametrize(
    "operation",
    [
        lambda input, weight: product.linear(input, weight),
        lambda input, weight: input @ product.dequantize(weight, torch.float32).t(),
        lambda input, weight: (
            input @ product.dequantize_rows(weight, torch.float32, lambda rows, start: rows * 2).t()
        ),
        lambda input, weight: (
            input + product.embedding(torch.tensor([3, 1]), weight, torch.float32)
        ),
    ],
    ids=["linear", "dequantize", "dequantize_rows", "embedding"],
)
def test_torch_compile_meets_no_choice_of_kernels(operation, use):
    use(backend(kernel("dequantize", dequantize), kernel("linear", multiply)))
    weight, input = packed(), torch.randn((2, 64), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(operation, fullgraph=True, backend="eager")(input, weight)
    assert torch.equal(compiled, operation(input, weight))
