"""The packers of K-quants: what they write is read by gguf's reference as nearly the same weights."""
import gguf
import numpy as np
import pytest
from devtools import k_quants
from gguf import GGMLQuantizationType

# Relative error that normal weights may have: a little more than what is measured, less than a worse search would leave
ERRORS = {"Q2_K": 0.28, "Q3_K": 0.15, "Q4_K": 0.074, "Q5_K": 0.037, "Q6_K": 0.018}
each = pytest.mark.parametrize("type_name", k_quants.PACKERS)


def there_and_back(values, type_name):
    return gguf.quants.dequantize(k_quants.pack(values, type_name), GGMLQuantizationType[type_name])


@each
def test_normal_weights_keep_their_values(type_name):
    values = np.random.default_rng(0).standard_normal((64, 512), dtype=np.float32) * 0.05
    found = there_and_back(values, type_name)
    assert found.shape == values.shape
    assert np.sqrt(np.square(found - values).mean() / np.square(values).mean()) < ERRORS[type_name]


@each
def test_each_group_has_its_own_size(type_name):
    """A block whose groups differ up to tenfold: the small ones are not lost in the large ones' steps."""
    sizes = np.repeat(np.linspace(0.01, 0.1, 8, dtype=np.float32), 32)
    values = np.random.default_rng(1).standard_normal((64, 256), dtype=np.float32) * sizes
    found = there_and_back(values, type_name)
    off = [np.square(found[:, part] - values[:, part]).mean() / np.square(values[:, part]).mean()
           for part in (slice(0, 32), slice(224, 256))]
    assert np.sqrt(off[0]) < 2.5 * ERRORS[type_name] and np.sqrt(off[1]) < 1.2 * ERRORS[type_name]


@each
@pytest.mark.parametrize("value", [0.0, 0.3, -0.2])
def test_equal_weights_stay_equal(type_name, value):
    found = there_and_back(np.full((2, 256), value, np.float32), type_name)
    assert np.ptp(found) == 0 and found[0, 0] == pytest.approx(value, rel=1e-2, abs=1e-9)
