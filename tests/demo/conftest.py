"""The demo's model and measurements of it."""
import functools

from devtools.measure import packing_quality

import pytest
from imatrices import write_imatrix
from user_kernels import kernels_of_this_machine

from devtools.files import demo_files
from featherweight.loaders.packing.calibration.imatrix import load_measurement


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    with kernels_of_this_machine():
        yield packing_quality.Maker(demo_files.flux(), tmp_path_factory.mktemp("demo"))


@pytest.fixture
def measured(maker, monkeypatch):
    """Returns the measurement of a kind, made with a number of captions."""
    @functools.cache
    def measurement(kind: str, captions: int):
        if kind == "none":
            return None
        monkeypatch.setattr(packing_quality, "CALIBRATION", captions)
        monkeypatch.setattr(packing_quality, "TOGETHER", min(16, captions))
        found = maker.sensitivity("fast" if kind in ("fast", "imatrix") else kind)
        path = maker.folder / ("made.dat" if kind == "imatrix" else "made.sensitivity")
        if kind == "imatrix":
            write_imatrix(path, {name: found.moments(name).importance for name in found.shapes})
        else:
            found.save(path)
        return load_measurement(str(path))
    return measurement
