"""Sizes as people read them: in GB, MB or KB, never as nothing where there is something."""
import pytest

from featherweight.loaders.byte_sizes import part_text, size_text, type_lines, type_shares


@pytest.mark.parametrize(
    ("size", "text", "longer"),
    [
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1000, "1.0 KB", "1.00 KB"),
        (2_048, "2.0 KB", "2.05 KB"),
        (4_300_000, "4.3 MB", "4.30 MB"),
        (6_812_000_000, "6.8 GB", "6.81 GB"),
    ],
)
def test_a_size_is_given_in_the_unit_that_it_reaches(size, text, longer):
    assert size_text(size) == text and size_text(size, 2) == longer


def test_a_part_has_the_unit_of_the_whole():
    assert part_text(4e9, 6.8e9) == "4.0 of 6.8 GB" and part_text(0, 4e3) == "0.0 of 4.0 KB"
    assert part_text(3, 96) == "3 of 96 bytes"


def test_lines_of_types_begin_with_the_most_bytes_and_have_no_columns():
    types = {"F32": (1, 2_000), "Q4_K": (12, 18_000)}
    assert type_lines(types) == [
        "Q4_K: 12 tensors, 18.0 KB (90.0%)", "F32: 1 tensor, 2.0 KB (10.0%)"]
    assert type_shares(types) == "Q4_K 90.0%, F32 10.0%"
    assert type_lines({}) == [] and type_shares({}) == ""
