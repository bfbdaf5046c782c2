"""What the linear layers of a step of Flux.1 start on a GPU, and the bytes that they move: a budget
that a change may lower, and must not raise."""
from devtools.measure.step_traffic import count_step

import comfy.model_management
import pytest
import torch

from devtools import ROOT

# (format, fast, LoRAs) -> launches, GB
BUDGET = {
    ("dense", False, 0): (304, 47.3),
    ("Q8_0", False, 0): (532, 70.7), ("Q8_0", False, 2): (1444, 93.4),
    ("Q8_0", False, 8): (1444, 95.2),
    ("Q8_0", True, 0): (988, 98.1), ("Q8_0", True, 2): (1900, 162.5),
    ("Q8_0", True, 8): (1900, 163.7),
    ("Q4_K", False, 0): (532, 64.8), ("Q4_K", False, 2): (1444, 87.4),
    ("Q4_K", False, 8): (1444, 89.3),
    ("Q4_K", True, 0): (988, 92.2), ("Q4_K", True, 2): (1900, 156.6),
    ("Q4_K", True, 8): (1900, 157.8),
    ("NF4", False, 0): (532, 64.8), ("NF4", False, 2): (1444, 87.4),
    ("NF4", False, 8): (1444, 89.3),
    ("NF4", True, 0): (988, 92.2), ("NF4", True, 2): (1900, 156.6), ("NF4", True, 8): (1900, 157.8),
    ("INT8_CONVROT", False, 0): (608, 82.9), ("INT8_CONVROT", False, 2): (1520, 105.5),
    ("INT8_CONVROT", False, 8): (1520, 107.4),
    ("INT8_CONVROT", True, 0): (1064, 110.3), ("INT8_CONVROT", True, 2): (1976, 174.7),
    ("INT8_CONVROT", True, 8): (1976, 175.9),
    ("NVFP4_ROWS", False, 0): (532, 64.8), ("NVFP4_ROWS", False, 2): (1444, 87.5),
    ("NVFP4_ROWS", False, 8): (1444, 89.3),
    ("NVFP4_ROWS", True, 0): (988, 92.2), ("NVFP4_ROWS", True, 2): (1900, 156.6),
    ("NVFP4_ROWS", True, 8): (1900, 157.8),
    # layers that ComfyUI multiplies, to whose product the LoRAs are added
    ("int8_tensorwise", False, 0): (608, 45.7), ("int8_tensorwise", False, 2): (1520, 110.1),
    ("int8_tensorwise", False, 8): (1520, 111.3),
    ("nvfp4", False, 0): (608, 36.1), ("nvfp4", False, 2): (1520, 100.5),
    ("nvfp4", False, 8): (1520, 101.7),
}
# with kernels that no GPU has run, and where comfy_kitchen's product adds LoRAs
UNTRIED, EPILOGUE = (True, False), (False, True)
BUDGET |= {
    ("Q8_0", True, 0, *UNTRIED): (760, 63.7), ("Q8_0", True, 2, *UNTRIED): (1672, 128.1),
    ("Q4_K", True, 0, *UNTRIED): (760, 57.8), ("Q4_K", True, 2, *UNTRIED): (1672, 122.2),
    ("Q4_K", True, 2, *EPILOGUE): (1900, 129.7), ("Q4_K", True, 8, *EPILOGUE): (1900, 130.9),
    ("Q4_K", True, 2, True, True): (1672, 95.3),
    ("NF4", True, 0, *UNTRIED): (760, 57.8), ("NVFP4_ROWS", True, 0, *UNTRIED): (760, 57.8),
    ("INT8_CONVROT", True, 0, *UNTRIED): (1064, 110.3),  # rotated: no kernel multiplies it
    ("INT8_CONVROT", True, 2, *EPILOGUE): (1976, 147.8),
}


@pytest.mark.parametrize("step", BUDGET, ids=str)
def test_a_step_starts_and_moves_what_its_budget_says(step):
    traffic = count_step(*step)
    assert (traffic.launches, round(traffic.nbytes / 1e9, 1)) == BUDGET[step]


@pytest.mark.parametrize("gigabytes", [8, 24])
def test_a_small_card_moves_no_more_than_a_large_one(gigabytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gigabytes << 28, gigabytes << 30))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: gigabytes << 28)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: gigabytes << 30)
    for step in ("Q4_K", True, 0), ("Q4_K", True, 2):
        traffic = count_step(*step)
        assert (traffic.launches, round(traffic.nbytes / 1e9, 1)) == BUDGET[step]


def test_what_is_said_of_fast_is_what_is_counted():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    fast, untried, loras, epilogue = (BUDGET[("Q4_K", True, *step)][1] for step in (
        (0,), (0, *UNTRIED), (2,), (2, *EPILOGUE)))
    assert f"in Q4_K moves {fast:.0f} GB, and {untried:.0f} with" in text
    assert f"Two LoRAs add {loras - fast:.0f} GB, and {epilogue - fast:.0f} where" in text
