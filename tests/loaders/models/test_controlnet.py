"""ControlNets with packed weights guide a model as the host's dense ones of the same values do."""
import gc
import logging
import os
import weakref

import comfy.cldm.cldm
import comfy.controlnet
import comfy.t2i_adapter.adapter
import comfy.utils
import pytest
import torch
from comfy.ops import CastWeightBiasOp, manual_cast
from controlnets import (
    KINDS,
    OTHER_WRITERS,
    WRITERS,
    flux_bfl,
    ldm,
    ldm_with_prefix,
    packed_layers,
    random_values,
    sample,
    shrunken_controlnet,
    unguided,
)
from families import FAMILIES, relative_error
from host_nodes import models, seeded
from packed_files import (
    load_values_of,
    write_host_format,
    write_q8_0,
    write_with_dense,
)
from safetensors.torch import save_file
from user_kernels import kernels_of_this_machine

from devtools.files.gguf_files import write_zeros_gguf
from featherweight.loaders.comfyui import compute as compute_module
from featherweight.loaders.comfyui.compute import follows_model
from featherweight.loaders.comfyui.model_summary import memory_summary
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.ops.layers.packed_layers import PackedLayer, PackedLinear
from featherweight.ops.patcher import PackedPatcher
from featherweight.ops.tensor.packed_layout import QuantizedTensor, is_packed

pytestmark = pytest.mark.usefixtures("small_models")


def some(*names: str):
    """Only these of KINDS."""
    return pytest.mark.parametrize("kind", [KINDS[name] for name in names], ids=names)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_packed_controlnet_guides_as_its_dense_self_does(kind, tmp_path, monkeypatch):
    check_guides_as_dense(kind, "Q8_0", tmp_path, monkeypatch)


@some("sd3 of diffusers", "flux", "qwen-image fun")
def test_controlnet_of_bitsandbytes_guides_as_its_dense_self_does(kind, tmp_path, monkeypatch):
    check_guides_as_dense(kind, "NF4", tmp_path, monkeypatch)


def check_guides_as_dense(kind, format_name, tmp_path, monkeypatch):
    shrunken_controlnet(kind, monkeypatch)
    writer, name = WRITERS[format_name]
    path, dense = str(tmp_path / name), write_with_dense(writer, tmp_path / name, kind.weights())
    packed, of_the_host = load_controlnet(path), comfy.controlnet.load_controlnet(dense)
    expected = sample(kind, of_the_host)
    assert relative_error(unguided(kind.base), expected) > 1e-3
    assert relative_error(sample(kind, packed), expected) < 1e-5
    assert isinstance(packed.control_model_wrapped, PackedPatcher)
    layers = {name: layer for name, layer in of_the_host.control_model.named_modules()
              if getattr(layer, "weight", None) is not None and layer.weight.ndim == 2}
    # HunyuanDiT's layers of torch, what the host takes of the model, small tables, and rows that
    # blocks of 32 do not divide
    dense = {
        name: layer.weight.nbytes for name, layer in layers.items()
        if not isinstance(layer, CastWeightBiasOp) or name.startswith("orig_y_embedder.")
    }
    dense |= {
        name: layer.weight.nbytes for name, layer in packed.control_model.named_modules()
        if isinstance(layer, PackedLayer) and layer.stays_plain(layer.weight)
    }
    unpacked = layers.keys() - dense.keys() - set(packed_layers(packed.control_model))
    assert all(layers[name].weight.shape[1] % 32 for name in unpacked)
    size = packed.control_model_wrapped.model_size() - sum(dense.values())
    assert size <= 1.05 * os.path.getsize(path)


@pytest.mark.parametrize("written", OTHER_WRITERS)
def test_controlnet_of_any_packed_format_guides_as_its_dense_self_does(written, tmp_path):
    kind, (write_format, name) = KINDS["flux of diffusers"], OTHER_WRITERS[written]
    dense_path = write_with_dense(write_format, tmp_path / name, kind.weights())
    packed = load_controlnet(str(tmp_path / name))
    dense = comfy.controlnet.load_controlnet(dense_path)
    assert len(packed_layers(packed.control_model)) >= 13
    expected = sample(kind, dense)
    assert relative_error(unguided(kind.base), expected) > 1e-3
    assert relative_error(sample(kind, packed), expected) < 1e-5


@pytest.mark.parametrize(("compute", "has_kernel", "by_comfyui"), [
    ("automatic", False, False), ("exact", True, False), ("fast", True, True),
    ("fast", False, False)])
def test_comfyuis_formats_are_left_to_its_kernels_unless_exact_is_chosen(
        compute, has_kernel, by_comfyui, tmp_path, monkeypatch):
    monkeypatch.setattr(compute_module, "host_multiplies", lambda name, device: has_kernel)
    kind, path = KINDS["flux of diffusers"], tmp_path / "net.safetensors"
    write_host_format("float8_e4m3fn", path, kind.weights())
    control = load_controlnet(str(path), compute=compute)
    weights = [one for one in control.control_model.parameters()
               if isinstance(one, QuantizedTensor)]
    # what is joined of several with scales of their own stays packed
    assert any(not is_packed(one) for one in weights) == by_comfyui
    layers = [layer for layer in control.control_model.modules() if isinstance(layer, PackedLinear)]
    assert {layer.compute == "fast" for layer in layers} == {compute == "fast"}


def dense_self(packed, path: str):
    """The host's ControlNet of a file, with the values that a packed one holds."""
    dense = comfy.controlnet.load_controlnet(path)
    load_values_of(dense.control_model, packed.control_model)
    return dense


@some(*(name for name in KINDS if not name.startswith("sd1.5")))
def test_controlnet_that_is_packed_as_it_is_read_guides_as_its_dense_self_does(
        kind, tmp_path, monkeypatch):
    shrunken_controlnet(kind, monkeypatch)
    path = str(tmp_path / "net.safetensors")
    save_file({name: value.bfloat16().contiguous() for name, value in kind.weights().items()},
              path)
    packed = load_controlnet(path, pack_to="Q8_0")
    save_file(dict(kind.weights()), tmp_path / "dense.safetensors")
    expected = sample(kind, dense_self(packed, str(tmp_path / "dense.safetensors")))
    assert relative_error(unguided(kind.base), expected) > 1e-3
    assert relative_error(sample(kind, packed), expected) < 1e-5
    layers = dict(packed.control_model.named_modules())
    names = packed_layers(packed.control_model)
    formats = {layers[name].weight.params.format.name for name in names}
    assert formats == {"Q8_0"} and len(names) >= 8
    assert "in memory, packed from BF16 in" in memory_summary(packed.control_model_wrapped)


def test_a_prefix_of_names_changes_no_type(tmp_path):
    sizes = []
    for number, weights in enumerate((ldm(), ldm_with_prefix())):
        path = tmp_path / f"net{number}.safetensors"
        save_file(dict(weights), path)
        with kernels_of_this_machine():  # which pack three times as fast
            packed = load_controlnet(str(path), pack_to="Q4_K")
        sizes.append((packed_layers(packed.control_model),
                      packed.control_model_wrapped.model_size()))
    assert sizes[0] == sizes[1]


@some("sd1.5", "sd3.5 large of Stability", "flux", "qwen-image fun", "hunyuan-dit")
def test_on_a_cpu_it_computes_in_what_the_guided_model_computes_in(kind, tmp_path, monkeypatch):
    """In bfloat16 it loses no more than ComfyUI's own ControlNet with the same values does."""
    shrunken_controlnet(kind, monkeypatch)
    values = write_q8_0(tmp_path / "net.gguf", kind.weights())
    save_file(values, tmp_path / "dense.safetensors")
    control_net = load_controlnet(str(tmp_path / "net.gguf"))
    layers, dtypes = dict(control_net.control_model.named_modules()), set()
    for name in packed_layers(control_net.control_model):
        if not isinstance(layers[name], torch.nn.Embedding):
            layers[name].register_forward_pre_hook(lambda _, inputs: dtypes.add(inputs[0].dtype))
    exact = sample(kind, control_net, packed_base=True)
    assert dtypes == {torch.float32}
    base = models(kind.base)[0].model
    monkeypatch.setattr(base, "manual_cast_dtype", torch.bfloat16)
    dtypes.clear()
    error = relative_error(sample(kind, control_net, packed_base=True), exact)
    if not follows_model(control_net):  # HunyuanDiT's, which has layers that cannot cast
        assert dtypes == {torch.float32} and error < 0.1
        return
    assert torch.bfloat16 in dtypes
    as_on_a_gpu = comfy.controlnet.load_controlnet(
        str(tmp_path / "dense.safetensors"), model_options={"custom_operations": manual_cast})
    as_on_a_gpu.manual_cast_dtype = torch.bfloat16
    lost = relative_error(sample(kind, as_on_a_gpu, packed_base=True), exact)
    assert error < 1.5 * lost + 1e-3
    monkeypatch.setattr(base, "manual_cast_dtype", None)
    assert torch.equal(sample(kind, control_net, packed_base=True), exact)


FULL_SIZES = {
    "sd1.5": {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4],
              "transformer_depth": [1] * 6 + [0] * 2,
              "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
    "sdxl": {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4],  # MistoLine is one of these
             "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3,
             "transformer_depth_middle": 10},
}


def full_size(name: str) -> dict[str, torch.Size]:
    """Names of diffusers' ControlNetModel for a family -> shapes."""
    config = {**FAMILIES[name].config, **FULL_SIZES[name]}
    names = {target: name for name, target in comfy.utils.unet_to_diffusers(config).items()}
    hint = ["conv_in", *(f"blocks.{index}" for index in range(6)), "conv_out"]
    config.pop("out_channels")
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, num_head_channels=64, device="meta",
                                     **config)
    shapes = {}
    for name, value in net.state_dict().items():
        part, number, *rest = name.split(".")
        if part == "input_hint_block":
            name = f"controlnet_cond_embedding.{hint[int(number) // 2]}.{rest[-1]}"
        elif part == "zero_convs":
            name = f"controlnet_down_blocks.{number}.{rest[-1]}"
        elif part == "middle_block_out":
            name = f"controlnet_mid_block.{rest[-1]}"
        else:
            name = names[name]
        shapes[name] = value.shape
    return shapes


@pytest.mark.parametrize("name", FULL_SIZES)
def test_every_name_of_diffusers_finds_its_place(name, tmp_path, caplog):
    shapes = full_size(name)
    write_zeros_gguf(tmp_path / "net.gguf", shapes, "Q4_0", "F16")
    with caplog.at_level(logging.DEBUG):
        control_net = load_controlnet(str(tmp_path / "net.gguf"))
    assert not [record.getMessage() for record in caplog.records
                if record.getMessage().startswith(("missing", "unexpected", "leftover"))]
    assert len(packed_layers(control_net.control_model)) == sum(
        len(shape) == 2 for shape in shapes.values())


def test_clone_for_another_gpu_stays_packed_and_gives_the_same(tmp_path):
    write_q8_0(tmp_path / "net.gguf", flux_bfl())
    control_net = load_controlnet(str(tmp_path / "net.gguf"))
    if not hasattr(comfy.controlnet.ControlBase, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no ControlNets for several GPUs")
    clone = control_net.deepclone_multigpu(torch.device("cpu"))
    assert packed_layers(clone.control_model) == packed_layers(control_net.control_model)
    assert isinstance(clone.control_model_wrapped, PackedPatcher)
    assert clone.control_model.packed_patches is not control_net.control_model.packed_patches
    kind = KINDS["flux"]
    assert torch.equal(sample(kind, clone), sample(kind, control_net))


class OfAnotherPack(comfy.controlnet.ControlNet):
    """As Advanced-ControlNet makes one of a ControlNet that is exactly of the host's class."""

    def __init__(self, control: comfy.controlnet.ControlNet):
        assert type(control) is comfy.controlnet.ControlNet
        super().__init__(control.control_model, load_device=control.load_device,
                         manual_cast_dtype=control.manual_cast_dtype)
        self.pre_run, self.runs = self.pre_run_counted, 0
        control.copy_to(self)
        self.control_model_wrapped = control.control_model_wrapped.clone()

    def pre_run_counted(self, *args):
        self.runs += 1
        return super().pre_run(*args)


def test_another_pack_knows_a_controlnet_by_its_class_and_copies_it_into_its_own(
        tmp_path, monkeypatch):
    kind = KINDS["flux"]
    write_q8_0(tmp_path / "net.gguf", kind.weights())
    control_net = load_controlnet(str(tmp_path / "net.gguf"))
    copied = OfAnotherPack(control_net.copy())
    assert isinstance(copied.control_model_wrapped, PackedPatcher)
    assert torch.equal(sample(kind, copied), sample(kind, control_net))
    monkeypatch.setattr(models(kind.base)[True].model, "manual_cast_dtype", torch.bfloat16)
    for control in (control_net, control_net.copy(), copied):
        assert follows_model(control) and control.manual_cast_dtype is None
        control.pre_run(models(kind.base)[True].model, float)
        assert control.manual_cast_dtype == torch.bfloat16
    assert copied.runs == 1


def test_a_controlnet_is_gone_with_its_last_user(tmp_path):
    write_q8_0(tmp_path / "net.gguf", KINDS["flux"].weights())
    control_net = load_controlnet(str(tmp_path / "net.gguf"))
    left = [weakref.ref(control) for control in (control_net, control_net.copy())]
    gc.collect()
    gc.disable()
    try:
        del control_net
        assert not [reference for reference in left if reference()]
    finally:
        gc.enable()


def control_lora() -> dict[str, torch.Tensor]:
    return {"lora_controlnet": torch.ones(1), "input_hint_block.0.weight": seeded(16, 3, 3, 3),
            "zero_convs.0.0.weight": seeded(320, 320, 1, 1, seed=3),
            "time_embed.0.up": seeded(64, 32), "time_embed.0.down": seeded(32, 320, seed=2)}


def t2i_adapter() -> dict[str, torch.Tensor]:
    return random_values(comfy.t2i_adapter.adapter.Adapter(
        cin=64, channels=[32, 64, 128, 128], nums_rb=2, ksize=1, sk=True, use_conv=False))


def test_t2i_adapter_is_dequantised(tmp_path):
    weights = {name: value.flatten(1) if name.endswith(".in_conv.weight") else value
               for name, value in t2i_adapter().items()}  # 1x1: as matrices
    seen = write_q8_0(tmp_path / "net.gguf", weights)
    assert any(not torch.equal(seen[name], value) for name, value in weights.items())
    loaded = load_controlnet(str(tmp_path / "net.gguf"))
    for name, value in loaded.t2i_model.state_dict().items():
        assert not is_packed(value)
        assert torch.equal(value, seen[name].reshape(value.shape))


def test_control_lora_is_dequantised(tmp_path):
    seen = write_q8_0(tmp_path / "net.gguf", control_lora())
    loaded = load_controlnet(str(tmp_path / "net.gguf"))
    assert type(loaded) is comfy.controlnet.ControlLora
    assert loaded.control_weights.keys() == seen.keys()
    for name, value in loaded.control_weights.items():
        assert not is_packed(value) and torch.equal(value, seen[name])


@pytest.mark.parametrize("weights", [control_lora, t2i_adapter])
def test_what_is_never_packed_stays_as_in_the_file(weights, tmp_path):
    save_file(weights(), tmp_path / "net.safetensors")
    loaded = load_controlnet(str(tmp_path / "net.safetensors"), pack_to="Q4_K")
    held = (loaded.t2i_model.state_dict() if hasattr(loaded, "t2i_model")
            else loaded.control_weights)
    for name, value in weights().items():
        assert torch.equal(held[name], value)


@pytest.mark.parametrize(("name", "averages"), [
    ("control_v11e_sd15_shuffle-Q8_0.gguf", True), ("net_shuffle_fp16.gguf", True),
    ("control_shuffled.gguf", False), ("net.gguf", False)
])
def test_name_says_whether_hints_are_averaged_over_the_picture(name, averages, tmp_path):
    write_q8_0(tmp_path / name, ldm())
    assert load_controlnet(str(tmp_path / name)).global_average_pooling == averages
