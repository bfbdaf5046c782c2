"""What ComfyUI-MultiGPU's inputs ask for, as bytes for each device."""
import pytest
import torch

from featherweight.nodes.legacy.distorch import (
    GIB,
    UnreadableError,
    allocate_virtual_vram,
    parse_allocation_string,
)

pytestmark = pytest.mark.fake_gpus

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
SIZE = 6 * GIB


def gib(plan) -> dict:
    return {device: pytest.approx(amount / GIB) for device, amount in plan.items() if amount}


@pytest.mark.parametrize(
    ("virtual", "donors", "expected"),
    [
        (2.0, [CPU], {FIRST: 4, CPU: 2}),
        (0.0, [CPU], {FIRST: 6}),
        (24.0, [CPU], {CPU: 6}),
        (-1.0, [CPU], {FIRST: 6}),
        (2.0, [FIRST], {FIRST: 6}),
        (1.5, [SECOND], {FIRST: 4.5, SECOND: 1.5}),
        (5.0, [SECOND, CPU], {FIRST: 1, SECOND: 4, CPU: 1}),
    ],
)
def test_virtual_vram_lies_with_the_donors_and_the_rest_stays(virtual, donors, expected):
    assert gib(allocate_virtual_vram(SIZE, virtual, FIRST, donors)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda:0,2.5gb;cuda:1,3gb;cpu,*", {FIRST: 2.5, SECOND: 3, CPU: 0.5}),
        ("cuda:0,2560MB", {FIRST: 2.5, CPU: 3.5}),  # the rest to the CPU
        ("cuda:1,*;cuda:0,1g", {FIRST: 1, SECOND: 5}),
        ("cpu,5g;cuda:0,9g;", {CPU: 5, FIRST: 1}),  # in the order of the string
        ("cuda:0,25%;cpu,75%", {FIRST: 1.5, CPU: 4.5}),
        ("cuda:0,1%;cuda:1,1%;cpu,1", {FIRST: 2, SECOND: 2, CPU: 2}),
        (
            "cuda:0,0.25;cuda:1,0.5;cpu,0.00001",
            {FIRST: pytest.approx(4, abs=0.1), SECOND: 2, CPU: pytest.approx(0, abs=0.1)},
        ),
        ("cpu , .9 ; cuda:1, 1.0", {SECOND: 4, CPU: 2}),  # the CPU is asked last
    ],
)
def test_a_string_of_the_expert_mode_says_who_keeps_how_much(text, expected):
    plan, notes = parse_allocation_string(text, SIZE, FIRST)
    assert not notes and sum(plan.values()) == SIZE
    assert {device: amount / GIB for device, amount in plan.items() if amount} == {
        device: pytest.approx(amount) if isinstance(amount, (int, float)) else amount
        for device, amount in expected.items()
    }


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cuda:0,2gb;cpu;cuda:1,*", "'cpu'"),
        ("cuda:0,lots", "'cuda:0,lots'"),
        ("cuda:0,2gb;cpu,50%", "'cpu,50%'"),
        (";", "';'"),
        ("cuda:0,2tb;cpu,*", "'cuda:0,2tb'"),
        ("cuda:0,-1gb;cpu,*", "'cuda:0,-1gb'"),
        ("cuda:0,50%;cpu,*", "'cuda:0,50%'"),
    ],
)
def test_a_string_that_cannot_be_read_is_told_by_its_part_and_what_was_expected(text, part):
    with pytest.raises(UnreadableError, match="expected") as error:
        parse_allocation_string(text, SIZE, FIRST)
    assert str(error.value).startswith(f"{part}: expected")


def test_what_a_device_that_is_not_here_would_keep_lies_with_the_cpu():
    plan, (note,) = parse_allocation_string("cuda:0,2gb;cuda:7,3gb;cuda:1,*", SIZE, FIRST)
    assert gib(plan) == {FIRST: 2, CPU: 3, SECOND: 1}
    assert (
        note
        == "There is no device cuda:7 here (found: gpu:0, gpu:1, gpu:2, cpu), so the cpu is used."
    )


@pytest.mark.parametrize(
    "text",
    [
        "cuda:0,0.1%;cuda:1,33.3%;cpu,66.6%",
        "cuda:1,1%;cpu,1%",
        "cuda:1,7.000000001gb;cpu,0b",
        "cuda:0,0.333;cuda:1,0.0001",
    ],
)
def test_whole_bytes_are_shared_and_none_is_lost(text):
    plan, _ = parse_allocation_string(text, SIZE + 1, FIRST)
    assert sum(plan.values()) == SIZE + 1 and all(type(amount) is int for amount in plan.values())


def test_halves_of_a_model_leave_nothing_on_the_device_that_computes():
    assert parse_allocation_string("cuda:1,50%;cpu,50%", 5, FIRST)[0] == {
        FIRST: 0,
        SECOND: 3,
        CPU: 2,
    }
