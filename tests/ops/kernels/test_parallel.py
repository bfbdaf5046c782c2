"""The threads of source/cpu/parallel.h, by OpenMP and without it."""
import ctypes
import re

import pytest
import torch
from kernel_backends import COMPILER, backend_on_cpu
from pack_api import FORMATS, check, cpp_backend

from featherweight.ops.kernels.cpp_backend import CppCompiler
from featherweight.ops.kernels.kernel_source import SOURCES

CPU = torch.device("cpu")
COUNTS = (0, 1, 2, 7, 8, 9, 1021)
# Count how often each number comes, by each way of handing them out.
COUNTING = """
extern "C" void evenly(int threads, Index count, int* times) {
    parallel_for(threads, count, [=](Index number) { times[number]++; });
}
extern "C" void in_ranges(int threads, Index count, int* times) {
    parallel_ranges(threads, count, [=](Index first, Index end) {
        Buffer<int> buffer(end - first);
        if ((size_t)buffer.items % 64) return;
        for (Index i = first; i < end; i++) buffer.items[i - first] = 1;
        for (Index i = first; i < end; i++) times[i] += buffer.items[i - first];
    });
}
extern "C" void in_turn(int threads, Index count, int* times) {
    Index taken = 0, *turns = &taken;
    parallel(threads, [=](int) {
        for (Index turn; (turn = take_turn(turns)) < count;) times[turn]++;
    });
}
// Returns whether all threads run at the same time; waits for ever otherwise.
extern "C" int together(int threads) {
    int arrived = 0, *all = &arrived;
    parallel(threads, [=](int) {
        __atomic_fetch_add(all, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(all, __ATOMIC_SEQ_CST) < threads) {}
    });
    return arrived == threads;
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def source() -> str:
    texts = [(SOURCES / "cpu" / name).read_text(encoding="utf-8")
             for name in ("lanes.h", "parallel.h")]
    return "\n".join(["#define LANES 8", *texts, COUNTING])


@pytest.fixture(params=["OpenMP", "no OpenMP"])
def compiler(request, tmp_path, monkeypatch):
    if request.param == "no OpenMP":
        monkeypatch.setattr(cpp_backend, "OPENMP", "-fno-such-option")
    return CppCompiler((COMPILER,), tmp_path)


@pytest.mark.parametrize("way", ["evenly", "in_ranges", "in_turn"])
def test_each_number_comes_once_on_any_number_of_threads(compiler, way):
    run = getattr(compiler.library(source()), way)
    for threads in range(1, 9):
        for count in COUNTS:
            times = (ctypes.c_int * (count + 1))()
            run(threads, ctypes.c_longlong(count), times)
            assert list(times) == [1] * count + [0], (threads, count)


def test_threads_run_at_the_same_time(compiler):
    assert all(compiler.library(source()).together(threads) for threads in range(1, 9))


def test_a_thread_that_does_not_start_has_its_work_done_by_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_backend, "OPENMP", "-fno-such-option")
    text, count = re.subn(r"!pthread_create\([^)]*\)", "false", source())
    assert count == 1
    run = CppCompiler((COMPILER,), tmp_path).library(text).evenly
    times = (ctypes.c_int * 9)()
    run(4, ctypes.c_longlong(9), times)
    assert list(times) == [1] * 9


def test_a_compiler_without_openmp_is_asked_for_it_once(tmp_path, monkeypatch):
    command, calls = tmp_path / "compiler", tmp_path / "calls"
    command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n'
                       'case "$*" in *-fopenmp*) echo unsupported option >&2; exit 1;; esac\n'
                       f'exec {COMPILER} "$@"\n')
    command.chmod(0o755)
    compiler = CppCompiler((str(command),), tmp_path / "kernels")
    for number in range(2):
        library = compiler.library(f'extern "C" int number() {{ return {number}; }}')
        assert library.number() == number
    assert [cpp_backend.OPENMP in line for line in calls.read_text().splitlines()
            if "--version" not in line] == [True, False, False, False]  # once more without it


@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [("dequantize", "Q6_K", torch.float32), ("attention", None, torch.float32)], ids=str)
def test_kernels_are_right_without_openmp(capability, name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_backend, "OPENMP", "-fno-such-option")
    fmt = name and FORMATS[name]
    with backend_on_cpu("cpp", tmp_path) as backend:
        kernel = next(kernel for kernel in backend.kernels
                      if kernel.capability == capability and kernel.accepts(fmt, dtype))
        for threads in (1, 3, 8):
            monkeypatch.setattr(cpp_backend, "_threads", lambda values, count=threads: count)
            check(kernel, fmt, dtype, CPU)
