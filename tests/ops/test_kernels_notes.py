"""What models have asked of kernels is noted for the next start, and a damaged note is none."""
import json
import os

import pytest
import torch
from featherweight.ops.kernels import case_notes
from featherweight.ops.kernels.case_notes import MOST_CASES, MOST_FORMATS, add_notes, read_notes
from featherweight.ops.kernels.timing import MOST_SHAPES
from featherweight.ops.kernels.verdicts import Case

UNPACK = Case("unpack", "Q4_K", torch.bfloat16, None)
TOKENS = Case("int8_tokens", None, torch.float16, None)


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "featherweight" / "trials" / "notes.json"


def test_what_was_asked_for_is_read_again(path):
    linear = Case("linear", "NF4", torch.float16, torch.float32)
    add_notes([UNPACK, linear, TOKENS], {"Q4_K": {(3072, 12288)}, "NF4": {(8, 64)}})
    add_notes([UNPACK], {"Q4_K": {(3072, 3072)}})
    assert read_notes() == ([UNPACK, linear, TOKENS], {"Q4_K": {(3072, 12288), (3072, 3072)}, "NF4": {(8, 64)}})
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_noted_already_is_not_written_again(path):
    add_notes([UNPACK], {"Q4_K": {(3072, 12288)}})
    before = path.stat().st_mtime_ns, path.stat().st_ino
    add_notes([UNPACK], {"Q4_K": {(3072, 12288)}})
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_the_notes_stay_small(path):
    for number in range(MOST_CASES + 20):
        shapes = {f"Q{number}": {(number + 1, 32)}, "Q4_K": {(number + 1, 256)}}
        add_notes([Case("unpack", f"Q{number}", torch.float32, None)], shapes)
    cases, shapes = read_notes()
    assert len(cases) == MOST_CASES and cases[-1].format == f"Q{MOST_CASES + 19}"
    assert len(shapes) == MOST_FORMATS and all(len(sizes) <= MOST_SHAPES for sizes in shapes.values())
    assert path.stat().st_size < 40_000


def test_an_operation_that_no_trial_times_is_not_noted(path):
    add_notes([Case("pack_blocks", "Q4_K", torch.float32, None)], {})
    assert not path.exists()


CASE = ["unpack", "Q4_K", "bfloat16", None]


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "[" * 100_000, json.dumps({"cases": 1, "shapes": {}}), json.dumps({"cases": [CASE]}), b"\xff\xfe{}"],
    ids=["empty", "cut short", "a list", "null", "deep", "no list", "no shapes", "no text"])
def test_a_damaged_file_counts_as_none_and_is_written_again(content, path):
    add_notes([UNPACK], {})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_notes() == ([], {})
    add_notes([TOKENS], {})
    assert read_notes() == ([TOKENS], {})


@pytest.mark.parametrize("case", [
    [], CASE[:3], ["eval", *CASE[1:]], ["unpack", None, "bfloat16", None], ["int8_tokens", "Q4_K", "float16", None],
    ["unpack", "../Q4_K", "bfloat16", None], ["unpack", "Q" * 50, "bfloat16", None], ["unpack", "Q4_K", "load", None],
    ["unpack", "Q4_K", "bfloat16", "hub"], ["unpack", 4, "bfloat16", None], {"unpack": 1}, None, [[], {}, [], {}]])
def test_a_damaged_case_counts_as_none(case, path):
    add_notes([UNPACK], {})
    shapes = {"Q4_K": [[2, 256], case, [0, 1], [1 << 40, 1], ["a", 2]], "../x": [[1, 1]], "NF4": case}
    path.write_text(json.dumps({"cases": [case, CASE], "shapes": shapes}))
    cases, shapes = read_notes()
    assert cases == [UNPACK] and shapes["Q4_K"] == {(2, 256)} and "../x" not in shapes


@pytest.mark.skipif(os.name != "posix", reason="rights are others on Windows")
def test_notes_that_others_may_have_written_count_as_none(path):
    add_notes([UNPACK], {})
    path.chmod(0o666)
    assert case_notes.read_notes() == ([], {})
