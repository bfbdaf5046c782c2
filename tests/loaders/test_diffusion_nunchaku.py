"""Diffusion models that Nunchaku quantised run as the host runs their values, and stay packed."""
import nunchaku_writer as writer
import pytest
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from families import FAMILIES, host_patcher, random_weights, relative_error, shrunken_detection
from families import run as run_family

from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.ops.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")


def table_of(name):
    family = FAMILIES[name]
    if name in DIFFUSERS:
        return DIFFUSERS[name](family.config)
    return {key: key for key in random_weights(family)}


@pytest.mark.parametrize("name", writer.WRITERS)
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_model_runs_as_in_the_host_and_stays_packed(name, precision, tmp_path, monkeypatch):
    family, weights, table = FAMILIES[name], random_weights(FAMILIES[name]), table_of(name)
    shrunken_detection(family, monkeypatch)
    stored = in_diffusers_names(weights, table)
    model = writer.WRITERS[name](stored, precision=precision)
    path = tmp_path / "model.safetensors"
    seen = writer.write(path, model)
    expected = host_patcher(in_the_hosts_names(seen, weights, table), family)
    patcher = load_diffusion_model(str(path))
    assert relative_error(run_family(patcher, family), run_family(expected, family)) < 1e-5
    packed = {key: value for key, value in patcher.model.diffusion_model.named_parameters() if is_packed(value)}
    print({k: v.layout_cls.format.__name__ for k, v in packed.items()})
    held, size = patcher.model_size(), sum(t.nbytes for t in model.tensors.values())
    print(held, size, held/size)
