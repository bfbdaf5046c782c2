"""Layers that patches keep from ComfyUI's own product: they run in float, and the log says so."""
import pytest
from host_formats import is_nf4
from patched_models import flux_file, flux_pair, lora_for, packed_flux, patched, run

from featherweight.ops.patcher.float_products import float_layers, float_layers_text

SLOWER = ("dora", "loha", "lokr", "oft", "glora", "diff")

pytestmark = pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests")


def host_layers(format_name: str) -> set[str]:
    """The weights in a format of the host's."""
    return {f"diffusion_model.{name}" for name, values in flux_file(format_name)[1].items()
            if values.ndim == 2 and not is_nf4(name)}


@pytest.mark.parametrize("kind", SLOWER)
def test_the_log_says_once_which_layers_run_in_float(kind, caplog):
    packed = packed_flux("int8_tensorwise")
    values = flux_file("int8_tensorwise")[1]
    slow = patched(packed, (lora_for(values), 1.0), (lora_for(values, kind, seed=1), 0.5))
    layers = host_layers("int8_tensorwise")
    assert set(float_layers(slow)) == layers
    for _ in range(2):  # loaded, and run again
        run(slow)
    run(slow.clone())
    told = [record.message for record in caplog.records if "run in float" in record.message]
    assert len(told) == 1 and f"{len(layers)} of the {len(layers)} layers" in told[0]
    run(packed)
    run(slow)
    assert caplog.text.count("run in float") == 2  # again after a run without


def test_only_the_layers_that_are_changed_so_are_counted():
    packed, values = flux_pair("int8_tensorwise")[0], flux_file("int8_tensorwise")[1]
    key = "single_blocks.0.linear2.weight"
    slow = patched(packed, (lora_for({key: values[key]}, "dora"), 1.0), (lora_for(values), 1.0))
    assert float_layers(slow) == [f"diffusion_model.{key}"]
    assert f"1 of the {len(host_layers('int8_tensorwise'))} layers" in float_layers_text(slow)


@pytest.mark.parametrize(("format_name", "kind"), [
    ("int8_tensorwise", "lora"),  # a branch
    ("float8_e4m3fn", "dora"),  # which ComfyUI has no product for on a CPU
    ("Q8_0", "dora"), ("asym_w4a8_int8 exact", "dora")])
def test_nothing_is_said_where_no_layer_is_slower(format_name, kind, caplog):
    packed = patched(flux_pair(format_name)[0], (lora_for(flux_file(format_name)[1], kind), 1.0))
    run(packed)
    assert float_layers_text(packed) is None and "run in float" not in caplog.text
