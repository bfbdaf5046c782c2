"""The LoRA nodes: block weights, what is applied how strongly, and what is said about it."""
import re

import comfy.lora
import folder_paths
import pytest
import torch
from lora_models import empty_clip, empty_model, pairs, weight_shapes
from model_folders import use_folder
from pack_api import load_diffusion_model
from safetensors.torch import load_file, save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.lora.block_weights import parse_block_weights, presets
from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.lora.model_blocks import block_name, describe_blocks, weight_keys
from featherweight.loaders.paths import folders
from featherweight.nodes.apply_lora import ApplyLora
from featherweight.nodes.check_lora import CheckLora

SIZES = {"hidden": 128, "double_blocks": 2, "single_blocks": 3}


@pytest.fixture(scope="module")
def packed_flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "flux.gguf"
    write_gguf(path, tiny_models.flux(**SIZES), lambda name, values: "Q8_0")
    return load_diffusion_model(path)


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """The folder of the host's LoRAs."""
    use_folder(tmp_path, monkeypatch)
    return tmp_path


def kohya(shapes):
    return {
        "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_"): shape
        for name, shape in shapes.items()
    }


@pytest.fixture
def flux_lora(loras, packed_flux):
    lora = pairs(kohya(weight_shapes(packed_flux.model, "blocks.")), rank=2)
    save_file(lora, loras / "lora.safetensors", {"ss_base_model_version": "flux1"})
    return "lora.safetensors"


def strengths(patcher):
    """Block -> strengths of the patches on its weights."""
    found = {}
    for key, patches in patcher.patches.items():
        found.setdefault(block_name(key), set()).update(patch[0] for patch in patches)
    return found


def test_a_lora_is_applied_through_the_hosts_patches_on_a_clone(packed_flux, flux_lora):
    model, clip, text = ApplyLora.execute(packed_flux, flux_lora, 0.7).args
    assert model is not packed_flux and not packed_flux.patches and clip is None
    assert strengths(model) == {
        f"{kind}_blocks.{i}": {0.7} for kind, n in (("double", 2), ("single", 3)) for i in range(n)
    }
    assert model.get_attachment("lora_metadata") == {"ss_base_model_version": "flux1"}
    assert "fits: all 29 layers match" in text.splitlines()[0]
    assert "LoRA, rank 2" in text and "model 0.7" in text and "the file says flux1" in text


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            "double=0.5",
            {"double_blocks.0": {0.5}, "double_blocks.1": {0.5}, "single_blocks.0": {1.0}},
        ),
        ("all=0\nsingle.1=1 # this one", {"single_blocks.1": {1.0}}),
        (
            "single.0-1=0, single.1=2",
            {"double_blocks.0": {1.0}, "single_blocks.1": {2.0}, "single_blocks.2": {1.0}},
        ),
        ("img_attn=0.25", {"double_blocks.0": {0.25, 1.0}, "single_blocks.0": {1.0}}),
        ("all=0; img_attn.qkv=-1", {"double_blocks.0": {-1.0}, "double_blocks.1": {-1.0}}),
        (
            "preset:single-only",
            {"single_blocks.0": {1.0}, "single_blocks.1": {1.0}, "single_blocks.2": {1.0}},
        ),
        ("preset:last-third, double.1=0", {"single_blocks.2": {1.0}}),
    ],
)
def test_block_weights_change_the_strength_of_each_block(packed_flux, flux_lora, rules, expected):
    model = ApplyLora.execute(packed_flux, flux_lora, 1.0, 1.0, rules)[0]
    found = strengths(model)
    assert {block: found.get(block) for block in expected} == expected
    if rules.startswith(("all=0", "preset")):
        assert found == expected


@pytest.mark.parametrize(("rules", "message"), [
    ("tripple=1", "'tripple=1' names nothing .* double_blocks.0-1, single_blocks.0-2.*"),
    ("single.7=0", "'single.7=0' names nothing"), ("IN04=1", "names nothing"),
    ("double", "'double' is not a rule such as"), ("double=much", "'double=much' is not a rule"),
    ("double=nan", "is not a rule"),
    ("preset:OUTALL", "no preset 'OUTALL'; it has no-text, .*double-only"),
])
def test_a_rule_that_means_nothing_is_named_with_what_there_is(
    packed_flux, flux_lora, rules, message
):
    with pytest.raises(ValueError, match=message) as error:
        ApplyLora.execute(packed_flux, flux_lora, 1.0, 1.0, rules)
    assert "\n" not in str(error.value)


def test_the_rules_in_the_tooltip_work_on_flux(packed_flux, flux_lora):
    tooltip = next(input.tooltip for input in ApplyLora.GET_SCHEMA().inputs
                   if input.id == "block_weights")
    rules = re.findall(r"[\w.-]+=[\d.]*\d|preset:[\w-]+", tooltip)
    assert len(rules) == 4
    for rule in rules:
        ApplyLora.execute(packed_flux, flux_lora, 1.0, 1.0, rule)


UNET_PRESETS = {  # as in the LoRA Block Weight extension
    "SD1.5": {
        "INS": "IN01 IN02", "IND": "IN05 IN07 IN08", "OUTD": "OUT03 OUT04 OUT05 OUT06",
        "OUTS": "OUT07 OUT08 OUT09 OUT10 OUT11",
        "MIDD": "IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06",
        "INALL": "IN01 IN02 IN04 IN05 IN07 IN08", "MIDALL": "M00"
    }, "SDXL": {
        "INALL": "IN04 IN05 IN07 IN08", "OUTALL": "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
        "style": "OUT01", "subject": "OUT00", "layout": "IN08"
    }
}


@pytest.mark.parametrize("name", UNET_PRESETS)
def test_presets_of_unets_name_the_blocks_the_extension_does(name):
    keys = weight_keys(empty_model(name), empty_clip(name))
    for preset, expected in UNET_PRESETS[name].items():
        factor = parse_block_weights(f"preset:{preset}", keys)
        blocks = {block_name(key) for key in keys if factor(key) and ".attn2." in key}
        short = {"input_blocks": "IN", "output_blocks": "OUT"}
        named = {
            f"{short[block.split('.')[0]]}{int(block.split('.')[1]):02d}" if "." in block else "M00"
            for block in blocks
        }
        assert named == set(expected.split()), preset
        text = {factor(key) for key in keys if key.startswith("clip_l")}
        assert text == ({0.0} if preset in ("style", "subject", "layout") else {1.0})
    assert (
        parse_block_weights("preset:no-text", keys)(
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
        )
        == 0
    )
    assert (
        parse_block_weights("mid=0.5", keys)("diffusion_model.middle_block.1.proj_in.weight") == 0.5
    )
    assert {"style", "layout"} <= presets(keys).keys() or name == "SD1.5"
    assert "clip_l" in describe_blocks(keys) and "input_blocks.0-" in describe_blocks(keys)


def test_settings_that_the_host_takes_from_a_lora_are_handed_to_it(packed_flux, loras, monkeypatch):
    """Newer hosts read the settings of an attention in files of LoRAs."""
    name = "diffusion_model.double_blocks.0.img_attn.config"
    lora = pairs(kohya(weight_shapes(packed_flux.model, "blocks.")), rank=2)
    settings = torch.tensor(list(b"{}"), dtype=torch.uint8)
    save_file(lora | {name: settings}, loras / "lora.safetensors")
    read, given = comfy.lora.load_lora, []
    text = ApplyLora.execute(packed_flux, "lora.safetensors", 0.7).args[2]
    assert name in text  # of a kind that this host does not know

    def load_lora(lora, to_load, log_missing=True):
        return read(lora, to_load, log_missing) | {name: lora[name]}

    def add_patches(self, patches, *strengths):
        given.append((patches, *strengths))

    monkeypatch.setattr(comfy.lora, "load_lora", load_lora)
    monkeypatch.setattr(type(packed_flux), "add_patches", add_patches)
    text = ApplyLora.execute(packed_flux, "lora.safetensors", 0.7).args[2]
    (patches, strength), = given
    assert torch.equal(patches[name], settings) and strength == 0.7
    assert len(patches) == 1 + len(lora) // 2 and "fits: all" in text and name not in text


def test_text_encoder_layers_take_their_own_strength(loras):
    model, clip = empty_model("SD1.5"), empty_clip("SD1.5")
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)}
    unet = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768)}
    save_file(pairs(text | unet), loras / "lora.safetensors")
    model, clip, report = ApplyLora.execute(model, "lora.safetensors", 0.5, 0.25, clip=clip).args
    assert strengths(model) == {"input_blocks.1": {0.5}} and strengths(clip.patcher) == {
        "clip_l": {0.25}
    }
    assert "model 0.5, text encoder 0.25" in report
    only_text = ApplyLora.execute(model, "lora.safetensors", 0.0, 1.0, clip=clip).args
    assert (
        only_text[0].patches == model.patches
        and only_text[1].patcher.patches != clip.patcher.patches
    )


CLIP = object()  # any, which is not looked at


def test_no_strength_passes_everything_through(packed_flux):
    model, clip, text = ApplyLora.execute(packed_flux, "not even there.safetensors", 0.0, 0.0,
                                          clip=CLIP).args
    assert model is packed_flux and clip is CLIP and "both strengths are 0" in text


def test_none_passes_everything_through(packed_flux):
    assert ApplyLora.validate_inputs("none") is True
    model, clip, text = ApplyLora.execute(packed_flux, "none", clip=CLIP).args
    assert model is packed_flux and clip is CLIP and "none is applied" in text


def test_misfits_are_left_out_or_refused_as_asked(loras, packed_flux):
    lora = pairs(
        kohya(weight_shapes(packed_flux.model, "double_blocks.")) | {"lora_unet_nowhere": (4, 4)})
    save_file(lora, loras / "part.safetensors")
    model, _, text = ApplyLora.execute(packed_flux, "part.safetensors").args
    assert "lora_unet_nowhere: missing in the model" in text and len(model.patches) == 20
    with pytest.raises(
            ValueError,
            match="do not match' is error.*1 do not fit: lora_unet_nowhere: missing") as error:
        ApplyLora.execute(packed_flux, "part.safetensors", misfits="error")
    assert "\n" not in str(error.value) and not packed_flux.patches


def test_misfits_set_to_fail_stops_at_a_tensor_that_nobody_reads(loras, packed_flux):
    layer = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file(pairs({layer: (128, 128)}) | {f"{layer}.lora_E": torch.ones(4)},
              loras / "part.safetensors")
    with pytest.raises(ValueError, match=f"1 do not fit: {layer}.lora_E: of an unknown kind"):
        ApplyLora.execute(packed_flux, "part.safetensors", misfits="fail")
    model, _, text = ApplyLora.execute(packed_flux, "part.safetensors").args
    assert len(model.patches) == 1 and "fits in part" in text and f"{layer}.lora_E" in text


def test_a_lora_of_which_nothing_fits_is_always_an_error(loras, packed_flux):
    save_file(pairs({"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}),
              loras / "big.safetensors")
    with pytest.raises(
            ValueError, match=
            r"big.safetensors is not applied. .*\(3072 wide\); the model is Flux.1 \(128 wide\)"):
        ApplyLora.execute(packed_flux, "big.safetensors")


def test_the_check_node_gives_text_and_a_picture(packed_flux, flux_lora, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    output = CheckLora.execute(packed_flux, flux_lora)
    text, picture = output.args
    assert text.startswith("This LoRA for Flux.1 fits") and "strongest" in text
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.05
    assert output.ui["text"] == (text,) and len(output.ui["images"]) == 1
    assert not packed_flux.patches


def test_shares_of_a_packed_model_are_those_of_its_weights(packed_flux, flux_lora):
    path = folders.find_file(flux_lora, "loras")
    report = check_lora(packed_flux, None, *load_lora_file(path))
    lora, weights = load_file(path), tiny_models.flux(**SIZES)
    change = size = 0
    for name in ("single_blocks.1.linear1", "single_blocks.1.linear2",
                 "single_blocks.1.modulation.lin"):
        stem = "lora_unet_" + name.replace(".", "_")
        change += (lora[f"{stem}.lora_up.weight"]
                   @ lora[f"{stem}.lora_down.weight"]).square().sum().item()
        size += float((weights[f"{name}.weight"] ** 2).sum())
    found = report.blocks["single_blocks.1"]
    assert found[0] == pytest.approx(change**0.5, rel=1e-4) and found[1] == pytest.approx(
        size**0.5, rel=0.02
    )


def test_gguf_adapters_are_listed_beside_other_loras(loras):
    for name in ("a.safetensors", "b.gguf"):
        (loras / name).touch()
    assert ApplyLora.define_schema().inputs[1].options == [
        "b.gguf", "a.safetensors", "none"
    ]
