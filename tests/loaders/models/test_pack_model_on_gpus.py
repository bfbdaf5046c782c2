"""Pack Model on a GPU, with and without dynamic VRAM: the copy lies there as any packed model, and
the MODEL before it comes back as it was."""
import comfy.model_management
import comfy.sd
import pytest
import torch
from gpu_memory import BOTH, empty_gpus, lies_on, sample
from patched_models import lora_for, packed_layers, patched, relative, tiny_flux
from safetensors.torch import save_file

from featherweight.loaders.models.pack_model import pack_model
from featherweight.loaders.models.placement import place

GPU, SECOND_GPU = torch.device("cuda:0"), torch.device("cuda:1")
HELD = 1.02  # times the copy's bytes
STEP_BYTES = 4 << 20  # that two steps of such a model take there

pytestmark = [pytest.mark.usefixtures("small_models"),
              pytest.mark.parametrize("dynamic", BOTH)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({name: value.bfloat16() for name, value in tiny_flux().items()}, path)
    return str(path)


def test_a_used_model_is_packed_and_both_are_used_in_turn(dynamic, path):
    lora = lora_for(tiny_flux())
    with empty_gpus() as counters:
        before_all = counters.used()  # of other tests
        patcher = patched(comfy.sd.load_diffusion_model(path), (lora, 0.8))
        assert patcher.is_dynamic() == dynamic
        before = sample(patcher)
        packed = pack_model(patcher, "Q8_0")
        assert packed.is_dynamic() == dynamic and lies_on(packed.model) == 0
        output = sample(packed)
        assert relative(output, before) < 0.05
        assert torch.equal(sample(patcher), before) and torch.equal(sample(packed), output)
        comfy.model_management.unload_all_models()
        if not dynamic:  # whose pages are larger than such a model
            assert counters.used() <= before_all
            comfy.model_management.load_models_gpu([packed])
            assert counters.used() - before_all <= HELD * (packed.model_size() + STEP_BYTES)
            assert lies_on(packed.model) == packed.loaded_size()
        del patcher, packed


def test_a_copy_is_placed_shared_and_kept_out_of_dynamic_vram(dynamic, path):
    with empty_gpus():
        packed = pack_model(comfy.sd.load_diffusion_model(path), "Q4_K")
        output = sample(packed)
        placed = place(packed, 0.3 * packed.model_size(), [(torch.device("cpu"), 1e12)],
                       lambda remark: None)
        assert torch.equal(sample(placed), output)
        other = packed.deepclone_multigpu(SECOND_GPU)
        assert other.load_device == SECOND_GPU and len(packed_layers(other)) == len(
            packed_layers(packed))
        assert torch.equal(sample(other), output)
        static = packed.clone(disable_dynamic=True)
        assert not static.is_dynamic() and torch.equal(sample(static), output)
        del packed, placed, other, static
