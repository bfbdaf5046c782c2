"""ControlNets with packed weights guide a model as the host's dense ones of the same values do."""
import logging

import comfy.cldm.cldm
import comfy.controlnet
import comfy.t2i_adapter.adapter
import comfy.utils
import pytest
import torch
from comfy.ops import CastWeightBiasOp, manual_cast
from controlnets import (
    FORMATS,
    KINDS,
    ldm,
    ldm_with_prefix,
    random_values,
    sample,
    shrunken_controlnet,
    unguided,
)
from families import FAMILIES, relative_error
from host_nodes import models, seeded
from model_tester import ModelTester, quantized_layers
from pack_api import QuantizedTensor, is_packed
from pack_api import compute as compute_module
from packed_files import (
    write_host_format,
    write_q8_0,
)
from safetensors.torch import save_file
from user_kernels import kernels_of_this_machine

from devtools.files.gguf_files import write_zeros_gguf
from featherweight.loaders.comfyui.compute import follows_model
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.ops.layers.packed_layers import PackedLinear
from featherweight.ops.patcher import PackedPatcher

pytestmark = pytest.mark.usefixtures("small_models")


class TestControlNets(ModelTester):
    kinds = KINDS
    main = "flux of diffusers"
    formats = FORMATS
    stored = torch.bfloat16
    not_the_hosts = ("hunyuan-dit",)

    def cases(self, with_loras):
        """Nunchaku's writer takes a Flux in diffusers' names."""
        return [case for case in super().cases(with_loras)
                if case.values[0] == self.main or case.values[1] != "SVDQuant"]

    def shrink(self, kind, monkeypatch):
        shrunken_controlnet(kind, monkeypatch)

    def load(self, path, pack_to=None):
        return load_controlnet(path, pack_to)

    def load_dense(self, path):
        return comfy.controlnet.load_controlnet(path)

    def run(self, kind, loaded):
        return sample(kind, loaded)

    def without(self, kind):
        return unguided(kind.base)

    def patcher(self, loaded):
        return loaded.control_model_wrapped

    def with_patcher(self, loaded, patcher):
        loaded = loaded.copy()
        loaded.control_model_wrapped = patcher
        return loaded

    def deep_clone(self, loaded):
        if not hasattr(comfy.controlnet.ControlBase, "deepclone_multigpu"):
            pytest.skip("this ComfyUI has no ControlNets for several GPUs")
        return loaded.deepclone_multigpu(torch.device("cpu"))

    def stays_dense(self, packed, dense):
        """HunyuanDiT's layers of torch, and what the host takes of the guided model."""
        return super().stays_dense(packed, dense) | {
            name for name, layer in dense.named_modules()
            if not isinstance(layer, CastWeightBiasOp) or name.startswith("orig_y_embedder.")}

    def packs(self, format_name, name, matrix):
        return super().packs(format_name, name, matrix) and (
            format_name != "SVDQuant" or name.startswith(("double_blocks.", "single_blocks.")))


def some(*names: str):
    """Only these of KINDS."""
    return pytest.mark.parametrize("kind", [KINDS[name] for name in names], ids=names)


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


def test_a_prefix_of_names_changes_no_type(tmp_path):
    sizes = []
    for number, weights in enumerate((ldm(), ldm_with_prefix())):
        path = tmp_path / f"net{number}.safetensors"
        save_file(dict(weights), path)
        with kernels_of_this_machine():  # which pack three times as fast
            packed = load_controlnet(str(path), pack_to="Q4_K")
        sizes.append((list(quantized_layers(packed.control_model)),
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
    for name in quantized_layers(control_net.control_model):
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
    assert len(quantized_layers(control_net.control_model)) == sum(
        len(shape) == 2 for shape in shapes.values())


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
