"""Models joined with a module, a file of further layers: VACE's for Wan."""
import pytest
import torch
from families import (
    FAMILIES,
    comfyui_gguf_style,
    host_patcher,
    random_weights,
    relative_error,
    run,
)
from marked_flux import old_scaled
from pack_api import AUTOMATIC, COMFYUI, WeightFileError, is_packed, load_diffusion_model
from safetensors.torch import save_file

from devtools.files.bnb_files import write_bnb
from devtools.files.gguf_files import write_gguf

VACE = FAMILIES["wan2.1-vace"]


def is_of_module(name: str) -> bool:
    return name.startswith("vace_")


def parts() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a Wan, and of the VACE module for it."""
    weights = dict(random_weights(VACE))
    module = {name: weights.pop(name) for name in list(weights) if is_of_module(name)}
    return weights, module


def write_gguf_file(path, weights):
    return write_gguf(path.with_suffix(".gguf"), weights, **comfyui_gguf_style("Q5_K"))


def write_nf4(path, weights):
    pytest.importorskip("bitsandbytes", reason="it writes the file")
    return write_bnb(path.with_suffix(".safetensors"), weights)


def write_fp8(path, weights):
    """Matrices in plain fp8."""
    stored = {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
              for name, value in weights.items()}
    save_file(stored, path.with_suffix(".safetensors"))
    return {name: value.float() for name, value in stored.items()}


def write_scaled_fp8(path, weights):
    """Matrices in fp8 with a scale, as ComfyUI marked them first."""
    stored, values = old_scaled(torch.float8_e4m3fn, weights=weights, inside="")
    save_file(stored, path.with_suffix(".safetensors"))
    return values


def write_16_bits(path, weights):
    stored = {name: value.bfloat16() for name, value in weights.items()}
    save_file(stored, path.with_suffix(".safetensors"))
    return {name: value.float() for name, value in stored.items()}


@pytest.fixture
def files(tmp_path):
    """Writes a Wan and its module; returns their paths and the values that they hold."""
    def write(write_base, write_module, **changes):
        values, paths = {}, []
        for name, writer, weights in zip(("base", "module"), (write_base, write_module), parts()):
            values |= writer(tmp_path / name, weights | changes.get(name, {}))
            paths += map(str, tmp_path.glob(f"{name}.*"))
        return *paths, {name: torch.as_tensor(value) for name, value in values.items()}

    return write


@pytest.mark.parametrize("host_formats", [AUTOMATIC, COMFYUI])
@pytest.mark.parametrize(("write_base", "write_module"), [
    (write_gguf_file, write_gguf_file), (write_gguf_file, write_scaled_fp8),
    (write_scaled_fp8, write_gguf_file), (write_fp8, write_nf4), (write_16_bits, write_fp8)])
def test_a_wan_with_a_vace_module_computes_as_the_merged_dense_model(
        write_base, write_module, host_formats, files):
    base, module, values = files(write_base, write_module)
    model = load_diffusion_model(base, extra=module, host_formats=host_formats)
    expected = host_patcher(values, VACE)
    assert type(model.model) is type(expected.model)
    for patcher in (model, model.cached_patcher_init[0]()):
        assert relative_error(run(patcher, VACE), run(expected, VACE)) < 1e-5
    stored = [weight.nbytes for weight in model.model.diffusion_model.parameters()
              if weight.ndim == 2]
    dense = [weight.nbytes for weight in expected.model.diffusion_model.parameters()
             if weight.ndim == 2]
    assert sum(stored) < 0.51 * sum(dense)


def test_a_module_is_packed_while_it_is_read_as_the_model_is(files):
    base, module, _ = files(write_16_bits, write_16_bits)
    model = load_diffusion_model(base, extra=module, pack_to="Q8_0")
    formats = {name: weight.params.format.name
               for name, weight in model.model.diffusion_model.named_parameters()
               if is_packed(weight)}
    for block in ("blocks.0", "vace_blocks.0"):
        assert formats[f"{block}.ffn.0.weight"] == "Q8_0"


LORA = {"blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 256)}


@pytest.mark.parametrize(("module", "text"), [
    (lambda: random_weights(FAMILIES["wan2.1-t2v"]),
     "^module.safetensors is a complete diffusion model, expected a module: a file with further"
     " layers for a model, such as VACE's for Wan.$"),
    (lambda: LORA, "^module.safetensors is a LoRA .it has .*, expected a module: .* for Wan.$"),
    (lambda: {"control_blocks.0.weight": torch.ones(8, 8)},
     "^module.safetensors is not a module for base.gguf: .*The model has no layer of the module's"
     " .1 tensors, first 'control_blocks.0.weight'..$"),
    (lambda: {name: value.repeat_interleave(2, 0) for name, value in parts()[1].items()},
     "^module.safetensors is not a module for base.gguf: pick one that was made for a model of this"
     " kind and size. base.gguf: the names of the weights are those of VaceWanModel, their sizes"
     " are not: "),
])
def test_a_file_that_is_no_module_for_the_model_is_refused(module, text, tmp_path):
    write_gguf_file(tmp_path / "base", parts()[0])
    save_file(module(), tmp_path / "module.safetensors")
    with pytest.raises(WeightFileError, match=text):
        load_diffusion_model(str(tmp_path / "base.gguf"),
                             extra=str(tmp_path / "module.safetensors"))
