"""What ComfyUI-MultiGPU's inputs ask for, in bytes."""
from fractions import Fraction

import hypothesis
import pytest
import torch
from hypothesis import strategies

from featherweight.loaders.devices import total_memory
from featherweight.nodes.legacy.distorch import (
    GIB,
    UnreadableError,
    allocate_virtual_vram,
    read_expert_string,
)

pytestmark = pytest.mark.fake_gpus

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
SIZE = 6 * GIB
ROUNDING = Fraction(1, 10**12)


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
    ("text", "kept", "is_told"),
    [
        ("cuda:0,2.5gb;cuda:1,3gb;cpu,*", 2.5, True),
        ("cuda:0,2560MB", 2.5, False),
        ("cuda:1,*;cuda:0,1g", 1, True),
        ("cpu,5g;cuda:0,9g;", 1, False),  # in the order of the string
        ("cuda:0,2g;cuda:0,1g", 1, False),  # the last one counts
        ("cuda:0,1g;cpu,2g;cuda:0,*", 4, False),
        ("cuda:0,*;cpu,*", 0, False),
        ("cuda:1,50%;cpu,50%", 0, True),
        ("cuda:0,25%;cpu,75%", 1.5, False),
        ("cuda:0,1%;cuda:1,1%;cpu,1", 2, True),
        ("cuda:0,60%;cuda:0,25%;cpu,75%", 1.5, False),
        ("cpu,0.5;cuda:0,0.25", 1, False),
        ("cuda:0,2;cpu,0.5", 6, False),
        ("cuda:7,3gb;cuda:0,2gb", 2, True),  # it is not here
        ("cpu,.9;cuda:1,0", 0, False),
    ],
)
def test_a_string_of_the_expert_mode_says_what_stays_on_the_device_that_computes(
    text, kept, is_told
):
    kept_bytes, others = read_expert_string(text, SIZE, FIRST)
    # the memory of the GPU is a little less than 4 GiB
    assert kept_bytes / GIB == pytest.approx(kept, abs=0.03 if text.startswith("cpu,0.5") else 1e-6)
    assert others == is_told


OWN = ("cuda:0", "cuda", "gpu:0")  # names of the device that computes
BYTES = {"gb": GIB, "M": 1 << 20, "kib": 1 << 10, "b": 1, "": 1, "*": 0}


def parts_of(*units):
    name = strategies.sampled_from([*OWN, "cuda:1", "cuda:7", "cpu"])
    number = strategies.decimals(0, 300, places=3).map(Fraction)
    part = strategies.tuples(name, number, strategies.sampled_from(units))
    return strategies.lists(part, min_size=1, max_size=5)


def given_bytes(parts, size) -> Fraction:
    """The most that a string gives the device that computes."""
    numbers = {OWN[0] if name in OWN else name: number for name, number, _ in parts}
    own, units = numbers.get(OWN[0], Fraction(0)), {unit for *_, unit in parts}
    if units == {"%"}:
        return size * own / (sum(numbers.values()) or 1)
    if units == {""}:
        return own * Fraction(total_memory(FIRST))
    amounts = [(name in OWN, number * BYTES[unit]) for name, number, unit in parts]
    largest = max([amount for is_own, amount in amounts if is_own], default=Fraction(0))
    rest = [name for name, _, unit in parts if unit == "*"]
    if not rest or rest[-1] not in OWN:
        return largest
    return max(largest, size - sum(amount for is_own, amount in amounts if not is_own))


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    strategies.one_of(parts_of(*BYTES), parts_of("%"), parts_of("")),
    strategies.integers(1, 200 * GIB))
def test_never_more_stays_than_a_string_gives_the_device_that_computes(parts, size):
    text = ";".join(f"{name},{'*' if unit == '*' else f'{float(number):.3f}{unit}'}"
                    for name, number, unit in parts)
    kept, _ = read_expert_string(text, size, FIRST)
    given = given_bytes(parts, size)
    assert type(kept) is int and 0 <= kept <= min(size, given * (1 + ROUNDING))
    if len(parts) == 1:  # and no less, where nothing else is named
        assert kept + 1 >= min(size, given) * (1 - ROUNDING)


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
        read_expert_string(text, SIZE, FIRST)
    assert str(error.value).startswith(f"{part}: expected")
