"""The sources compile as HIP for AMD's GPUs without one: by Clang, and by hiprtc where ROCm's
libraries are. What they compute is in test_backends.py."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_cases import BLOCK_FORMATS, ONE_OF_EACH_BLOCK, USUAL_ROWS
from pack_api import FORMATS

from featherweight.ops.kernels.cuda_backend import Program, alignment
from featherweight.ops.kernels.kernel import SourceError
from featherweight.ops.kernels.runtime_compiler import (
    HIP,
    Architecture,
    Compiler,
    compiler_libraries,
)

BUILTINS = Path(__file__).with_name("hip_by_clang") / "builtins.h"
CLANG = os.environ.get("CLANG") or next(
    filter(None, map(shutil.which, ("clang", "clang-21", "clang-20", "clang-19"))), None)
RDNA2, RDNA3, RDNA4 = map(Architecture, ("gfx1030", "gfx1100", "gfx1201"))
CDNA2 = Architecture("gfx90a:sramecc+:xnack-", 64)
ARCHITECTURES = (RDNA2, RDNA3, RDNA4, CDNA2)
# Debian's first library of ROCm 5 has hiprtc in it, which knows neither RDNA3 nor RDNA4.
HIPRTC = (*compiler_libraries(HIP), *(f"libhiprtc.so.{major}" for major in (7, 6)),
          "libamdhip64.so.5")
FUSED = re.compile(r"v_(pk_|dual_)?(fma|fmac|mad|mac)_f32")


@pytest.fixture(scope="module")
def assembly():
    """assembly(program, architecture): what Clang makes of it."""
    if CLANG is None:
        pytest.skip("needs clang 19 or later, or its name in CLANG")

    def compiled(source: str, architecture: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [CLANG, "-x", "hip", "--cuda-device-only", f"--offload-arch={architecture}",
             "-nogpuinc", "-nogpulib", "-w", "-O3", *HIP.options, "-include", str(BUILTINS), "-S",
             "-o", "-", "-"], input=source, capture_output=True, text=True)

    if compiled("", RDNA4.name).returncode:
        pytest.skip(f"{CLANG} does not compile for {RDNA4.name}")

    def assembly_of(program: Program, architecture: Architecture) -> str:
        process = compiled(program.source(architecture), architecture.name)
        assert not process.returncode, process.stderr
        return process.stdout

    return assembly_of


def each_architecture(values, some):
    """Each of `some` for the first GPU, and one of them in turn for each other; the rest is
    heavy."""
    return pytest.mark.parametrize(("fmt", "architecture"), [
        pytest.param(fmt, architecture, id=f"{fmt}-{architecture.name}",
                     marks=() if fmt == some[turn % len(some)] or (not turn and fmt in some)
                     else pytest.mark.heavy)
        for turn, architecture in enumerate(ARCHITECTURES) for fmt in values])


@each_architecture(BLOCK_FORMATS, ONE_OF_EACH_BLOCK)
def test_every_source_compiles_for_every_gpu(assembly, fmt, architecture):
    for kernel, tokens, rows in (("dequantize", 1, 1), ("linear", 1, 1), ("linear", 16, 2),
                                 ("int8_rows", 1, 1)):
        text = assembly(Program(kernel, fmt, torch.bfloat16, alignment(fmt), tokens, rows),
                        architecture)
        assert f"wavefront_size: {architecture.warp}" in re.sub(" +", " ", text)


@each_architecture(USUAL_ROWS, USUAL_ROWS[::4])
def test_rows_compile_for_every_gpu(assembly, fmt, architecture):
    assembly(Program("dequantize_rows", fmt, torch.float16, alignment(fmt)), architecture)
    if not fmt.layout.rotation:
        for kernel in ("linear", "int8_rows"):
            assembly(Program(kernel, fmt, torch.float16, alignment(fmt), 4, 2), architecture)


@each_architecture([torch.float16, torch.bfloat16], [torch.float16, torch.bfloat16])
def test_the_sum_of_small_changes_compiles_for_every_gpu(assembly, fmt, architecture):
    assembly(Program("add_rounded", None, fmt), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_values_are_not_fused_and_sums_are(assembly, architecture):
    """A fused multiply-add rounds once instead of twice, which changes bits."""
    fmt = FORMATS["Q4_K"]
    for dtype in (torch.float32, torch.float16):
        assert not FUSED.search(assembly(Program("dequantize", fmt, dtype, 4), architecture))
    assert FUSED.search(assembly(Program("linear", fmt, torch.float32, 4), architecture))


@pytest.fixture(scope="module")
def hiprtc():
    for library in HIPRTC:
        try:
            return Compiler(library, HIP)
        except OSError:
            pass
    pytest.skip("no hiprtc here")


@pytest.mark.parametrize("architecture", [RDNA2, pytest.param(CDNA2, marks=pytest.mark.heavy)],
                         ids=lambda architecture: architecture.name)
def test_hiprtc_compiles_every_source(hiprtc, architecture):
    for fmt in ONE_OF_EACH_BLOCK:
        for kernel in ("dequantize", "linear", "int8_rows"):
            program = Program(kernel, fmt, torch.float16, alignment(fmt), 4, 2)
            code = hiprtc.compile(program.source(architecture), architecture.name)
            assert code.startswith(b"\x7fELF")
    for fmt in USUAL_ROWS:
        if architecture is CDNA2 and fmt.layout.rotation:
            continue  # ROCm 5.2 makes invalid code of some: "PHI nodes not grouped at top"
        program = Program("dequantize_rows", fmt, torch.bfloat16, alignment(fmt))
        assert hiprtc.compile(program.source(architecture), architecture.name)


def test_hiprtcs_error_is_in_the_message(hiprtc):
    with pytest.raises(SourceError, match="(?s)hiprtcCompileProgram.*nonsense"):
        hiprtc.compile("int x = nonsense;", RDNA2.name)
