"""Under torch.autocast packed layers give what dense layers give: products in autocast's dtype."""
import pytest
import torch
from pack_api import packed_operations
from patched_layers import LAYERS, PATCHES, input_for, layer_and_twin
from patched_models import packed_anyhow

from featherweight.ops.layers import workspace


def under_autocast(layer, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype), torch.no_grad():
        return layer(input)


# the weight in slices, and at once
@pytest.mark.parametrize(("dtype", "scratch_bytes"), [
    (torch.bfloat16, 1 << 12), pytest.param(torch.float16, 1 << 26, marks=pytest.mark.heavy)],
    ids=str)
@pytest.mark.parametrize("kind", [None, *PATCHES])
@pytest.mark.parametrize(("name", "format_name"), LAYERS)
def test_it_is_the_layer_in_autocasts_dtype(name, format_name, kind, dtype, scratch_bytes,
                                            monkeypatch):
    """Bit for bit: so weak LoRAs have the strength that they have in that dtype."""
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", scratch_bytes)
    layer, twin = layer_and_twin(name, format_name, kind, torch.float32)
    input = input_for(name)
    out = under_autocast(layer, input, dtype)
    assert out.dtype == under_autocast(twin, input, dtype).dtype == dtype
    with torch.no_grad():
        assert torch.equal(out, layer(input.to(dtype)))
        assert layer(input).dtype == torch.float32


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_so_are_experts(packed, resident):
    layer = packed_operations().MoEExperts(2, 64, 32, dtype=torch.float32)
    weight, values = packed_anyhow(torch.randn(2, 32, 64), "Q8_0")
    layer.load_state_dict({"weight": weight if packed else values, "bias": torch.randn(2, 32)})
    input = torch.randn(3, 64)

    def run(input):
        if not resident:
            return layer.expert_linear(input, 1)
        with layer.bank_resident(input) as bank:
            return bank.expert_linear(input, 1)

    assert torch.equal(under_autocast(run, input, torch.bfloat16), run(input.bfloat16()))


def test_compiled_it_is_one_graph():
    layer, _ = layer_and_twin("Linear", "Q8_0", "lora", torch.float32)
    input = input_for("Linear")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(under_autocast(compiled, input, torch.bfloat16),
                       under_autocast(layer, input, torch.bfloat16))
    torch._dynamo.reset()
