"""A command runs on a CPU without some of its instruction sets, in every process of it."""
import json
import subprocess
import sys

import pytest

from devtools import ROOT, limited_cpu

PROBE = """
import json, subprocess, torch
native = subprocess.run(["gcc", "-march=native", "-dM", "-E", "-x", "c", "/dev/null"],
                        capture_output=True, text=True, check=True).stdout
capabilities = torch.cpu.get_capabilities()
names = {"avx2": "__AVX2__", "avx512_bf16": "__AVX512BF16__", "amx_bf16": "__AMX_BF16__"}
print(json.dumps({name: [capabilities[name], macro in native] for name, macro in names.items()}))
"""


@pytest.mark.parametrize(("limit", "present"), [
    ("avx2", {"avx2"}), ("avx512_bf16", {"avx2", "avx512_bf16"})])
def test_torch_and_a_compiler_see_what_is_left_of_the_cpu(limit, present):
    if reason := limited_cpu.why_not(limit):
        pytest.skip(reason)
    output = subprocess.run(
        [sys.executable, "-m", "devtools.limited_cpu", limit, sys.executable, "-c", PROBE],
        cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == {name: [name in present] * 2
                                  for name in ("avx2", "avx512_bf16", "amx_bf16")}


def test_a_fault_ends_a_limited_process():
    if reason := limited_cpu.why_not("avx2"):
        pytest.skip(reason)
    command = [sys.executable, "-m", "devtools.limited_cpu", "avx2", sys.executable, "-c",
               "import ctypes; ctypes.string_at(0)"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode
