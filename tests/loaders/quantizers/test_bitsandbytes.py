"""Files of bitsandbytes that lack parts of each weight."""
import pytest
import torch
from conformance.bitsandbytes import STATE, of_4bit, state
from pack_api import WeightFileError, open_weights
from safetensors.torch import save_file

from featherweight.loaders.models.loader_choice import needs_own_reader

CODES = torch.zeros(512, 1, dtype=torch.uint8)
OF_BLOCKS = {"absmax": torch.rand(16), "quant_map": torch.rand(16)}
BF16_CODES = torch.zeros(256, 1).bfloat16()


@pytest.mark.parametrize(("codes", "others"), [
    (CODES, {}), (CODES, OF_BLOCKS), (BF16_CODES, OF_BLOCKS), (CODES, {"bias": torch.ones(4)})])
def test_codes_without_a_quant_state_are_refused_by_their_name(codes, others, tmp_path):
    """ComfyUI's own loader would take them for a weight of one column."""
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": codes} | {
        f"a.{name}" if name == "bias" else f"a.weight.{name}": part
        for name, part in others.items()}, path)
    assert needs_own_reader(str(path))
    with pytest.raises(WeightFileError, match=(
            r"^model.safetensors: 'a.weight', packed by bitsandbytes \(4 bits\): it has no"
            r" quant_state.bitsandbytes__nf4, expected .* of uint8\. Get another"
            r" conversion\.$")):
        open_weights(path).state_dict()


@pytest.mark.parametrize("length", [16, 10 ** 13, 10 ** 40])
def test_a_block_of_nested_scales_that_is_longer_than_all_takes_no_memory(length, tmp_path):
    written = of_4bit(nested=True)
    parts = written.parts | {STATE: state(nested_blocksize=length)(written.parts[STATE])}
    save_file({f"L.{name}": part for name, part in parts.items()}, tmp_path / "a.safetensors")
    values = open_weights(tmp_path / "a.safetensors").state_dict()["L.weight"].dequantize()
    assert torch.equal(values, written.values)
