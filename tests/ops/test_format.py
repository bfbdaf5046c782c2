"""The base of packed formats: registration and shape algebra."""
import pytest

from featherweight.ops.format import FORMATS, Format, FormatError


def test_second_claim_on_a_ggml_type_is_refused():
    import featherweight.ops.formats  # noqa: F401
    with pytest.raises(TypeError, match="ggml type 8 is claimed by Q8_0 and Impostor"):
        class Impostor(Format, ggml_type=8):
            block_length, block_bytes = 32, 34
    assert "Impostor" not in FORMATS


def test_rows_that_do_not_divide_into_blocks_are_refused():
    import featherweight.ops.formats  # noqa: F401
    with pytest.raises(FormatError, match="blocks of 32"):
        FORMATS["Q8_0"].packed_shape((4, 33))
