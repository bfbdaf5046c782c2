"""Every case of the bench runs and gives figures, at a tiny size."""
import json
import re
import sys

from devtools.measure.bench import __main__ as bench

import comfy.model_management
import pytest
import torch

from devtools import ROOT, limited_cpu
from featherweight.ops.layers import fast_on_cpu

# Named here, so that a case that gets lost is missed. "compilers" compiles for half a minute.
HEAVY = ["compilers"]
CASES = [
    "device", "shapes", "int8_error", "dequantize", "lora", "model", "step", "repack", "cpu",
    "lcm", "attention", "comfy", "comfy_load", "comfy_lora", "roofline",
    *(pytest.param(case, marks=pytest.mark.heavy) for case in HEAVY)
]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    left_out = {"peer"} if request.config.getoption("--heavy") else {"peer", *HEAVY}
    arguments = [
        "--quick", "--rounds", "1", "--out",
        str(folder), "--only", *(bench.CASES.keys() - left_out)
    ]
    with pytest.MonkeyPatch.context() as patch:
        # threads that wait for each other slow a busy machine down
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HOST_ARGUMENTS", "--cpu")  # of processes that it starts
        patch.setattr(sys, "argv", ["bench", *arguments])
        bench.main()
    torch.set_num_threads(threads)
    comfy.model_management.unload_all_models()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_case_gives_figures_and_a_table(results, case):
    if case == "compilers":
        pytest.importorskip("ziglang")
    if case == "int8_error" and not fast_on_cpu.multiplies_integers(torch.device("cpu")):
        pytest.skip("the CPU has no units for int8")
    rows = json.loads((results / "bench.json").read_text())[case]["rows"]
    # these have one figure without OpenVINO, or without kernels
    has_one = case in ("device", "lcm", "attention")
    assert rows and all(len(row) > (not has_one) for row in rows.values())
    table = (results / "bench.md").read_text().split(f"## {case}\n")[1].split("\n## ")[0]
    assert all(f"\n| {title} | " in table for title in rows)


@pytest.mark.parametrize(("limit", "dtype"), [("avx2", "float32"), ("avx512_bf16", "bfloat16")])
def test_a_step_is_timed_on_limited_cpus_in_what_each_computes_in(results, limit, dtype):
    if reason := limited_cpu.why_not(limit):
        pytest.skip(reason)
    rows = json.loads((results / "bench.json").read_text())["cpu"]["rows"]
    assert {f"exact, computes in {dtype}", "dense in ComfyUI, float32"} <= set(
        rows[f"Q8_0, CPU limited to {limit}"])


def test_every_case_that_a_page_names_exists():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    named = {name for option in re.findall(r"dev\.py bench --only ([a-z0-9_ ]+)", pages)
             for name in option.split()}
    assert len(named) > 10 and named <= bench.CASES.keys()
