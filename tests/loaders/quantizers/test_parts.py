"""The parts of a weight are checked by data, which gives the sizes and words what is wrong."""
import re

import pytest
import torch

from featherweight.loaders.quantizers.parts import FLOATS, WHOLE, Part, PartError, bind_sizes


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(("shape", "found", "sizes"), [
    ("(N, K)", (3, 4), {"N": 3, "K": 4}), ("(N, K / 2)", (3, 4), {"N": 3, "K": 8}),
    ("(N * 2, K / 8)", (6, 4), {"N": 3, "K": 32}), ("(N, 12 / K)", (3, 4), {"N": 3, "K": 3}),
    ("N", (3, 4), {"N": 12}), ("N", (), {"N": 1}), ("1 or (N,)", (3,), {"N": 3}),
    ("1 or (N,)", (1, 1), {}), ("(N, K...)", (3, 4, 5), {"N": 3, "K": 20}),
    ("(N, K...)", (3,), {"N": 3, "K": 1}), ("(N, 1...)", (3, 1, 1), {"N": 3}),
    ("(N, N)", (3, 3), {"N": 3}), ("", (3, 0), {}), ("(N,) or (N, 4)", (3, 4), {"N": 3}),
])
def test_a_shape_gives_the_sizes_that_it_names(shape, found, sizes):
    assert bind_sizes({"a": zeros(*found)}, {"a": Part(shape)}) == sizes


@pytest.mark.parametrize(("shape", "found"), [
    ("(N, K)", (3,)), ("(N, K)", (3, 4, 1)), ("(N,)", ()), ("(N, N)", (3, 4)), ("N", (3, 0)),
    ("(N * 2,)", (5,)), ("(N, 12 / K)", (3, 5)), ("(N, 12 / K)", (3, 0)), ("1", (2,)),
    ("1 or (N,)", (3, 4)), ("(N, 1...)", (3, 2)), ("(N, K...)", (3, 4, 0)), ("(16,)", (4, 4)),
])
def test_a_shape_that_does_not_match_is_refused(shape, found):
    with pytest.raises(PartError, match="it has a of float32 .*, expected "):
        bind_sizes({"a": zeros(*found)}, {"a": Part(shape)})


PARTS = {
    "weight": Part("(N, K / 2)", (torch.uint8,), advice="Pack it again."),
    "scale": Part("1 or (N, K / G)", (torch.float16, torch.bfloat16)),
    "index": Part("K", WHOLE, "index"), "up": Part("(N, R)", FLOATS, "low rank"),
    "down": Part("(R, K)", FLOATS, "low rank"), "whole": Part("(L, M...)", optional="whole"),
}
GOOD = {"weight": zeros(6, 8, dtype=torch.uint8), "scale": zeros(6, 4).half(),
        "up": zeros(6, 2), "down": zeros(2, 16)}


def test_sizes_mean_the_same_in_all_parts():
    assert bind_sizes(GOOD, PARTS) == {"N": 6, "K": 16, "G": 4, "R": 2}


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight": None}, "it has no weight, expected (N, K / 2) of uint8"),
    ({"weight": zeros(6, 8)}, "it has weight of float32 (6, 8), expected (N, K / 2) of uint8"),
    ({"scale": zeros(3, 4).half()}, "it has scale of float16 (3, 4), expected one number or"
                                    " (N, K / G) of float16 or bfloat16 with N = 6, K = 16"),
    ({"scale": zeros(6, 4)}, "it has scale of float32 (6, 4), expected one number or (N, K / G) of"
                             " float16 or bfloat16 with N = 6, K = 16"),
    ({"index": zeros(16)}, "it has index of float32 (16,), expected K numbers of any integer type"
                           " with K = 16"),
    ({"up": None}, "it has no up, expected (N, R) of any float type"),
    ({"down": zeros(3, 16)}, "it has down of float32 (3, 16), expected (R, K) of any float type"
                             " with K = 16, R = 2"),
    ({"whole": zeros()}, "it has whole of float32 (), expected (L, M, ...)"),
    ({"other": zeros(1)}, "it has other, expected only weight, scale, index, up, down, whole"),
])
def test_what_is_wrong_and_what_was_expected_is_said(changes, message):
    parts = {name: part for name, part in (GOOD | changes).items() if part is not None}
    with pytest.raises(PartError, match=f"^{re.escape(message)}$") as error:
        bind_sizes(parts, PARTS)
    assert (error.value.advice == "Pack it again.") == ("weight of" in message)


def test_a_message_has_the_name_that_the_file_has():
    with pytest.raises(PartError, match="it has weight_low of float32"):
        bind_sizes(GOOD | {"weight": zeros(6, 8)}, PARTS, {"weight": "weight_low"})


def test_hostile_sizes_are_numbers_like_others():
    many = torch.zeros(()).expand(1 << 40, 1 << 20)
    assert bind_sizes({"a": many}, {"a": Part("(N / 128, K / 128)")}) == {
        "N": 1 << 47, "K": 1 << 27}
    with pytest.raises(PartError):
        bind_sizes({"a": torch.zeros(()).expand((1,) * 60)}, {"a": Part("(N, K)")})
