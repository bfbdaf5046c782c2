"""The quantiser the figures are held against is llama.cpp's own."""
import gguf
import numpy as np
import pytest

from devtools.files import ggml_quantiser

pytestmark = pytest.mark.skipif(not ggml_quantiser.available(),
                                reason="llama.cpp's source or a C compiler is missing")


@pytest.mark.parametrize("type_name", ["Q8_0", "Q5_0"])
def test_it_packs_as_the_reference_in_python_does(type_name):
    values = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(ggml_quantiser.pack(values, type_name), expected)


def test_an_importance_matrix_moves_the_error_to_other_columns():
    values = np.random.default_rng(0).standard_normal((8, 512), dtype=np.float32)
    importance = np.where(np.arange(512) % 2, 1, 100).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_K
    plain, weighted = (gguf.quants.dequantize(ggml_quantiser.pack(values, "Q4_K", given), kind)
                       for given in (None, importance))
    assert (
        np.square(weighted - values)[:, ::2].mean() < 0.9 * np.square(plain - values)[:, ::2].mean()
    )
