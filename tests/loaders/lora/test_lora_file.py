"""LoRA files: what they are recognised as, what fits a model, and what is refused in plain
words."""
import dataclasses
import itertools
import math
import re

import comfy.lora
import comfy.utils
import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, full_width_shapes
from host_patches import patched_by_host
from lora_models import MODELS, empty_clip, empty_model, empty_model_of, pairs, weight_shapes
from pack_api import WeightFileError
from safetensors.torch import save_file

from devtools.files.gguf_files import write_all
from featherweight.loaders.families import FAMILIES as KNOWN_FAMILIES
from featherweight.loaders.families import MODELS as KNOWN_MODELS
from featherweight.loaders.lora.apply import apply_lora
from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.family_match import match_family
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.lora.report import report_text
from featherweight.loaders.lora.report_chart import report_picture
from featherweight.loaders.lora.weight_change import change_norm

PREFIX = "diffusion_model."
SMALL_FLUX = {"hidden_size": 128, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
              "context_in_dim": 64, "vec_in_dim": None, "guidance_embed": False}


@pytest.fixture(scope="module")
def models():
    """Real models without values, each built once."""
    built = {}
    return lambda name: built.setdefault(name, empty_model(name)) if name in MODELS else None


@pytest.fixture(scope="module")
def small_flux():
    return empty_model("Flux.1", **SMALL_FLUX)


def block_shapes(model, *parts):
    return {
        name.removeprefix(PREFIX): shape
        for name, shape in weight_shapes(model.model, *parts or ("blocks.",)).items()
    }


def kohya(shapes):
    return {"lora_unet_" + name.replace(".", "_"): shape for name, shape in shapes.items()}


def unet_names(model, *parts):
    """UNet layers under diffusers' names, as LoRA trainers write them."""
    weights = dict(model.model.named_parameters())
    return {
        name.removesuffix(".weight"): weights[PREFIX + key].shape
        for name, key in comfy.utils.unet_to_diffusers(
            model.model.model_config.unet_config).items() if name.endswith(".weight") and PREFIX +
        key in weights and weights[PREFIX + key].ndim > 1 and any(part in name for part in parts)
    }


def xlabs(model):
    shapes = {}
    for name, shape in block_shapes(model, "_attn.qkv", "_attn.proj").items():
        block, layer = name.split("_attn.")[0].rsplit(".", 1)[0], name.rsplit(".", 1)[1]
        shapes[f"{block}.processor.{layer}_lora{1 if '.img_' in name else 2}"] = shape
    return pairs(shapes, ".down.weight", ".up.weight")


def text_names(prefix, module):
    """Layers of one CLIP under the names kohya's trainers give them."""
    return {f"{prefix}_text_model_{name.split('text_model.')[1].replace('.', '_')}": shape
            for name, shape in weight_shapes(module, "encoder.layers").items()}


def test_key_styles_of_xlabs_are_recognised(small_flux):
    """Those of other trainers are in test_lora_names.py."""
    lora = xlabs(small_flux)
    report, layers = check_lora(small_flux, None, lora), len(lora) // 2
    assert (report.matched, report.layers, report.mismatches, report.unread) == (
        layers, layers, {}, [])
    assert report.fits == "yes" and report.change_types == {"LoRA": layers} and report.ranks == [1]


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
@pytest.mark.parametrize(
    "parts",
    [("attentions",), ("attentions", "resnets", "samplers", "time_emb", "conv")],
    ids=["kohya", "LCM"],
)
def test_key_styles_of_unets_are_recognised(models, name, parts):
    model = models(name)
    shapes = unet_names(model, *parts)
    report = check_lora(model, None, pairs(kohya(shapes)))
    assert (report.matched, report.layers, report.fits) == (len(shapes), len(shapes), "yes")
    assert report.family.names == (name,) == report.model_family.names


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("SD1.5", {"lora_te": "clip_l"}),
        ("SD1.5", {"lora_te1": "clip_l"}),
        ("SDXL", {"lora_te1": "clip_l", "lora_te2": "clip_g"}),
    ],
)
def test_text_encoder_layers_are_recognised_and_not_missed_without_one(models, name, prefixes):
    model, clip = models(name), empty_clip(name)
    shapes = {key: shape for prefix, part in prefixes.items()
              for key, shape in text_names(prefix, getattr(clip.cond_stage_model, part)).items()}
    unet = kohya(unet_names(model, "attn2"))
    report = check_lora(model, clip, pairs(shapes | unet))
    assert report.matched == report.layers == len(shapes) + len(unet) and report.fits == "yes"
    alone = check_lora(model, None, pairs(shapes | unet))
    assert (alone.matched, alone.unconnected, alone.fits) == (len(unet), len(shapes), "yes")
    assert f"{len(shapes)} text encoder layers (no CLIP connected)" in report_text(alone)
    assert "none is connected" in check_lora(model, None, pairs(shapes)).verdict


def lora_of(models, name):
    if name.startswith("SD"):
        return pairs(kohya(unet_names(models(name), "attentions")))
    return pairs(
        kohya(
            block_shapes(models(name), "double_blocks.0.", "double_blocks.4.",
                         "single_blocks.19.")))


WRONG = [("Flux.2 Klein 4B", "Flux.2 dev"), ("Flux.2 dev", "Flux.1"), ("SD1.5", "SDXL"),
         ("Flux.1", "SDXL")]


@pytest.mark.parametrize(("made_for", "model"), WRONG, ids=lambda name: name)
def test_a_lora_of_another_family_is_told_in_a_sentence(models, made_for, model):
    report = check_lora(models(model), None, lora_of(models, made_for), measure=False)
    assert (
        made_for in report.family.names
        and model in report.model_family.names
        and not report.related
    )
    assert (
        made_for in report.verdict
        and f"the model is {model}" in report.verdict
        and "\n" not in report.verdict
    )
    assert report.fits == "no" or "not what it was trained for" in report.verdict


def test_the_sentence_names_families_and_widths(models):
    report = check_lora(models("Flux.2 dev"), None, lora_of(models, "Flux.2 Klein 4B"))
    assert report.verdict == (
        "This LoRA is made for Flux.2 Klein 4B (3072 wide); the model is Flux.2 dev (6144 wide):"
        " it cannot be used."
    )
    assert "it is made for a weight of 9216 x 3072, not of 18432 x 6144" in report_text(report)
    assert report_picture(report).std() > 0


def test_a_lora_whose_change_of_a_block_overflows_is_drawn_without_that_block(small_flux):
    shapes = kohya(block_shapes(small_flux, "double_blocks."))
    lora = {
        name: (tensor.bfloat16() * 1e30 if "blocks_1" in name else tensor)
        for name, tensor in pairs(shapes).items()
    }
    report = check_lora(small_flux, None, lora)
    assert not math.isfinite(report.blocks["double_blocks.1"][0])
    finite = dataclasses.replace(
        report, blocks={"double_blocks.0": report.blocks["double_blocks.0"]})
    assert torch.equal(report_picture(report), report_picture(finite))


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_of_every_layer_is_told_apart_from_all_other_families(models, name):
    model = models(name)
    if name.startswith("SD"):
        shapes = unet_names(model, "attentions")
    else:
        shapes = block_shapes(model)
    assert match_family(
        {key: (shape[0], shape[1:].numel()) for key, shape in shapes.items()}
    ).names == (name,)


# Ovis-Image has Flux's names and other sizes; ACE-Step 1.5 is not built without its weights.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"ovis-image", "ace-step-1.5"}))
def test_layers_of_the_hosts_models_show_one_width(name):
    shapes = {layer.replace(".", "_").removesuffix("_weight"): shape
              for layer, shape in full_width_shapes(FAMILIES[name]).items() if len(shape) > 1}

    def widths(family) -> dict[str, set[float]]:
        """Each layer that the family names and what it shows of the model's width."""
        shown = {}
        for layer, shape in shapes.items():
            multiples = next((multiples for pattern, multiples in family.layers.items()
                              if re.fullmatch(pattern, layer)), None)
            if multiples is not None:
                sizes = shape[0], shape[1:].numel()
                shown[layer] = {size / multiple for size, multiple in zip(sizes, multiples)
                                if multiple}
        return shown

    most = max(map(widths, KNOWN_FAMILIES), key=len)
    if len(most) * 4 < len(shapes):
        pytest.skip("no family has its layers")
    assert len(set().union(*most.values())) == 1, most


KREA2_BLOCK = {"q": 6144, "k": 1536, "v": 1536}  # layer -> rows


@pytest.mark.parametrize("layers", [
    {f"blocks.{block}.attn.w{name}": (rows, 6144) for block in range(28)
     for name, rows in KREA2_BLOCK.items()},
    {f"transformer.transformer_blocks.{block}.attn.to_{name}": (rows, 6144) for block in range(28)
     for name, rows in KREA2_BLOCK.items()},
    {f"lora_unet_blocks_{block}_mlp_{name}": shape for block in range(28)
     for name, shape in {"up": (16384, 6144), "down": (6144, 16384)}.items()},
], ids=["own names", "diffusers", "kohya"])
def test_a_lora_for_krea_2_is_known_as_such(layers):
    assert str(match_family(layers)) == "Krea 2 (6144 wide)"


def test_layers_of_minimax_h3_are_recognised():
    shapes = full_width_shapes(dataclasses.replace(
        FAMILIES["minimax-h3-pruned"], config={"image_model": "minimax_h3"}))
    layers = {name.removesuffix(".weight"): tuple(shape) for name, shape in shapes.items()
              if len(shape) == 2}
    assert str(match_family(layers)) == "MiniMax-H3 (5376 wide)"


@pytest.mark.parametrize(("width", "name"), [
    (3840, "Z-Image"), (2304, "Lumina 2"), (480, "Z-Image or Lumina 2")])
def test_a_lora_for_z_image_is_not_called_one_for_lumina(width, name):
    """Their layers have the same names; the width of a small model is of neither."""
    shapes = {f"diffusion_model.layers.{block}.attention.to_{part}": (width, width)
              for block in range(4) for part in "qkv"}
    assert str(match_family(shapes)) == f"{name} ({width} wide)"


def test_names_of_families_are_unique():
    names = [model.name for model in KNOWN_MODELS]
    assert len(names) == len(set(names))


def test_metadata_decides_between_families_that_the_layers_leave_open():
    shapes = {f"transformer_blocks.{block}.attn.to_q": (3072, 3072) for block in range(10)}
    assert {"Flux.1", "Qwen-Image"} <= set(match_family(shapes).names)
    assert match_family(shapes, {"modelspec.architecture": "flux-1-dev/lora"}).names == ("Flux.1",)
    assert match_family({"something": (4, 4)}) is None


def saved(tmp_path, tensors, name="lora.safetensors", **metadata):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata
              or None)
    return tmp_path / name


LAYER = "lora_unet_double_blocks_0_img_attn_proj"
GOOD = pairs({LAYER: (128, 128)}, rank=2)
UP, DOWN = f"{LAYER}.lora_up.weight", f"{LAYER}.lora_down.weight"
REFUSED = {
    "half a pair": ({UP: GOOD[UP]}, "half a pair .*lora_down.weight.* missing"),
    "rank 0": ({UP: torch.zeros(128, 0), DOWN: torch.zeros(0, 128)},
               "rank 0"), "NaN": (GOOD | {UP: GOOD[UP] * torch.nan}, "NaN or infinite"),
    "Inf": (GOOD | {DOWN: GOOD[DOWN] / 0}, "NaN or infinite"),
    "ranks differ": (GOOD | {DOWN: torch.zeros(3, 128)}, "do not belong together"), "checkpoint": ({
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)
    }, "is a checkpoint"), "model": ({
        f"double_blocks.{block}.img_attn.proj.weight": torch.zeros(128, 128) for block in range(3)
    }, r"is a diffusion model \(.*128 wide\)"), "text encoder": ({
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4, 4)
    }, "a text encoder"), "embedding": ({"emb_params": torch.zeros(4, 768)}, "an embedding"),
    "VAE": ({"decoder.conv_in.weight": torch.zeros(4, 4)},
            "a VAE"), "something": ({"something": torch.zeros(4)},
                                    "has no LoRA in it"), "nothing": ({}, "holds no tensors")
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_is_refused_in_one_sentence(case, tmp_path):
    tensors, message = REFUSED[case]
    with pytest.raises(WeightFileError, match=message) as error:
        load_lora_file(saved(tmp_path, tensors))
    assert str(error.value).startswith("lora.safetensors ") and "\n" not in str(error.value)


# What each program calls the tensors of adapters that are no LoRAs: PEFT 0.21
# (`adapter_layer_names` and `prefix` of its tuners), LyCORIS 4.1 (`weight_list`), OneTrainer.
OTHER_ADAPTERS = {
    "IA3": ("ia3_l",),
    "T-LoRA": ("q_layer.weight", "p_layer.weight", "lambda_layer"),
    "OFT2": ("oft_R.default.weight",), "OFT2 (OFT of PEFT)": ("oft_R",),
    "BOFT of PEFT": ("boft_R", "boft_s"),
    "VeRA": ("vera_lambda_b", "vera_lambda_d"), "HRA": ("hra_u",), "MiSS": ("miss_block",),
    "DeLoRA": ("delora_A", "delora_B", "delora_lambda"),
    "GraLoRA": ("gralora_A", "gralora_B"), "RandLora": ("randlora_lambda", "randlora_gamma"),
    "FourierFT": ("fourierft_spectrum",), "SHiRA": ("shira_weight",), "C3A": ("c3a_kernel",),
    "RoAd": ("road_theta", "road_alpha"), "HiRA": ("hira_A", "hira_B"),
    "VB-LoRA": ("vblora_logits_A", "vblora_logits_B"), "WaveFT": ("waveft_spectrum",)
}


@pytest.mark.parametrize(("kind", "stem"), [*zip(OTHER_ADAPTERS, itertools.cycle(
    ["base_model.model.double_blocks.0.img_attn.proj", LAYER]))])
def test_an_adapter_that_is_no_lora_is_named(kind, stem, tmp_path):
    tensors = {f"{stem}.{end}": torch.zeros(4, 4) for end in OTHER_ADAPTERS[kind]}
    words = re.escape(f"is an adapter of the kind {kind} ")
    with pytest.raises(WeightFileError, match=words) as error:
        load_lora_file(saved(tmp_path, tensors))
    assert str(error.value).startswith("lora.safetensors ") and "\n" not in str(error.value)


def test_every_kind_of_adapter_that_peft_writes_is_named_or_read(tmp_path):
    peft = pytest.importorskip("peft", reason="it has the list")
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    read = {"LORA", "ADALORA", "LOHA", "LOKR", "XLORA"}
    for kind, tuner in tuners.items():
        if kind.value not in read and issubclass(tuner, peft.tuners.tuners_utils.BaseTuner):
            path = saved(tmp_path, {f"base_model.model.{LAYER}.{tuner.prefix}weight": GOOD[UP]})
            with pytest.raises(WeightFileError, match="is an adapter of the kind "):
                load_lora_file(path)


@pytest.mark.parametrize(("suffix", "cut", "message"), [
    (".safetensors", 0, "is empty"), (".pt", 7, "damaged or incomplete"),
    (".safetensors", 60, "damaged or incomplete"), (".pt", -50, "damaged or incomplete")])
def test_a_truncated_file_is_refused(tmp_path, cut, message, suffix):
    path = tmp_path / f"lora{suffix}"
    torch.save(GOOD, path) if suffix == ".pt" else save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightFileError, match=message) as error:
        load_lora_file(path)
    assert "\n" not in str(error.value)


def test_a_web_page_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "lora.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(WeightFileError, match="it is a web page"):
        load_lora_file(tmp_path / "lora.safetensors")
    with pytest.raises(WeightFileError, match="does not exist"):
        load_lora_file(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_good_file_is_read_with_its_metadata(tmp_path, suffix):
    path = tmp_path / f"lora{suffix}"
    torch.save(GOOD, path) if suffix == ".pt" else save_file(
        GOOD, path, {"ss_base_model_version": "flux1"}
    )
    tensors, metadata = load_lora_file(path)
    assert tensors.keys() == GOOD.keys() and torch.equal(tensors[UP], GOOD[UP])
    assert metadata == ({} if suffix == ".pt" else {"ss_base_model_version": "flux1"})


def test_layers_that_are_damaged_are_named_and_the_others_apply(small_flux, tmp_path):
    lora = pairs(kohya(block_shapes(small_flux, "double_blocks")), rank=2)
    stems = sorted({key.split(".")[0] for key in lora})
    del lora[f"{stems[0]}.lora_down.weight"]
    lora[f"{stems[1]}.lora_up.weight"] *= torch.inf
    wrong = f"{stems[2]}.lora_up.weight"
    lora[wrong] = torch.zeros(lora[wrong].shape[0] * 2, 2)
    lora |= pairs({"lora_unet_nowhere": (4, 4)}) | {"stray": torch.zeros(1)}
    tensors, metadata = load_lora_file(saved(tmp_path, lora))
    report = check_lora(small_flux, None, tensors, metadata)
    assert (
        report.fits == "partly"
        and report.matched == len(stems) - 3
        and report.layers == len(stems) + 1
    )
    assert "half a pair" in report.mismatches[stems[0]] and "NaN" in report.mismatches[stems[1]]
    assert (
        "made for a weight of" in report.mismatches[stems[2]]
        and report.mismatches["lora_unet_nowhere"] == "missing in the model"
    )
    assert report.unread == ["stray"]
    patched, _ = apply_lora(small_flux, None, report, 1.0, 1.0)
    assert len(patched.patches) == report.matched and not small_flux.patches


@pytest.mark.parametrize(("alpha", "strength"), [(0.0, 1.0), (8.0, 2.0)])
def test_an_alpha_of_zero_in_a_gguf_adapter_is_none(alpha, strength, small_flux, tmp_path):
    name, (rows, columns) = next(iter(block_shapes(small_flux, "single_blocks").items()))
    writer = gguf.GGUFWriter(str(tmp_path / "adapter.gguf"), "flux")
    writer.add_type("adapter")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor(f"{name}.weight.lora_a", np.ones((4, columns), np.float32))
    writer.add_tensor(f"{name}.weight.lora_b", np.ones((rows, 4), np.float32))
    write_all(writer)
    (patch,) = check_lora(small_flux, None,
                          *load_lora_file(tmp_path / "adapter.gguf")).patches.values()
    changed = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)],
                                          torch.zeros(rows, columns), "weight")
    torch.testing.assert_close(changed, torch.full((rows, columns), 4 * strength))


def test_a_gguf_model_picked_as_a_lora_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "flux")
    writer.add_tensor("img_in.weight", np.zeros((4, 4), np.float32))
    write_all(writer)
    with pytest.raises(WeightFileError,
                       match="model.gguf is a GGUF file of type 'flux' without a LoRA"):
        load_lora_file(tmp_path / "model.gguf")


def test_a_gguf_adapter_of_a_text_encoder_gets_its_librarys_names(tmp_path):
    for architecture, name, expected in (
        ("qwen3", "blk.1.attn_q", "text_encoders.transformer.model.layers.1.self_attn.q_proj"),
        ("t5encoder", "enc.blk.0.ffn_down",
         "text_encoders.transformer.encoder.block.0.layer.1.DenseReluDense.wo")):
        writer = gguf.GGUFWriter(str(tmp_path / "adapter.gguf"), architecture)
        for half, shape in (("a", (2, 8)), ("b", (8, 2))):
            writer.add_tensor(f"{name}.weight.lora_{half}", np.ones(shape, np.float32))
        write_all(writer)
        assert load_lora_file(tmp_path / "adapter.gguf")[0].keys() == {
            f"{expected}.lora_A.weight",
            f"{expected}.lora_B.weight",
        }


def other_kinds():
    """Every kind of change the host reads, on the one layer, a square of 128."""
    def rand(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1

    alpha = {".alpha": torch.tensor(2.0)}
    return {
        "LoRA": {".lora_up.weight": rand(128, 4), ".lora_down.weight": rand(4, 128), **alpha},
        "DoRA": {
            ".lora_up.weight": rand(128, 4), ".lora_down.weight": rand(4, 128),
            ".dora_scale": rand(128, 1)
        }, "LoHa": {
            ".hada_w1_a": rand(128, 3), ".hada_w1_b": rand(3, 128), ".hada_w2_a": rand(128, 3),
            ".hada_w2_b": rand(3, 128), **alpha
        }, "LoKr": {
            ".lokr_w1": rand(8, 8), ".lokr_w2_a": rand(16, 2), ".lokr_w2_b": rand(2, 16), **alpha
        }, "OFT": {".oft_blocks": rand(8, 16, 16)},
        "BOFT": {".oft_blocks": rand(2, 8, 16, 16), **alpha}, "GLoRA": {
            ".a1.weight": rand(4, 128), ".a2.weight": rand(128, 4), ".b1.weight": rand(4, 128),
            ".b2.weight": rand(128, 4)
        }, "full difference": {".diff": rand(128, 128)}
    }


@pytest.mark.parametrize("kind", other_kinds())
def test_kinds_are_named_and_their_change_is_what_the_host_does(kind, small_flux):
    report = check_lora(small_flux, None,
                        {LAYER + end: value for end, value in other_kinds()[kind].items()})
    assert (report.fits, report.change_types) == ("yes", {kind: 1})
    value = next(iter(report.patches.values()))
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(5)) * 0.1
    norm = change_norm(value, weight.norm().item())
    if norm is None or kind == "DoRA":
        return  # said to be unknown, and to leave the DoRA scale out
    patch = (1.0, value, 1.0, None, None)
    expected = patched_by_host([patch], weight, "key") - weight
    # LoHa samples half of these rows; OFT is exact for weights without a direction.
    assert norm == pytest.approx(
        expected.norm().item(), rel=0.15 if kind in ("LoHa", "OFT") else 1e-4
    )


MINIMAX = {name: FAMILIES[name].config for name in ("minimax-h3", "minimax-h3-pruned")}


@pytest.mark.parametrize(("made_for", "model", "others"), [
    (lambda: empty_model_of("MiniMaxH3", MINIMAX["minimax-h3"]),
     lambda: empty_model_of("MiniMaxH3", MINIMAX["minimax-h3-pruned"] | {"time_embed_dim": 8}),
     "adaln_proj"),
    (lambda: empty_model("Flux.1", **SMALL_FLUX, in_channels=96),
     lambda: empty_model("Flux.1", **SMALL_FLUX), "img_in")])
def test_a_lora_of_another_variant_is_named_as_one_and_the_rest_fits(made_for, model, others):
    layers = weight_shapes(made_for().model.diffusion_model, "blocks", "img_in")
    lora = pairs({f"diffusion_model.{name}": shape for name, shape in layers.items()})
    report = check_lora(model(), None, lora, measure=False)
    assert report.mismatches and all(others in layer for layer in report.mismatches)
    assert report.matched == len(layers) - len(report.mismatches) > len(report.mismatches)
    assert report.verdict.endswith(
        " The rest are for a variant of it whose layers have another size, such as one for"
        " inpainting, or one that is not pruned.")
    unread = check_lora(model(), None, lora | {
        f"diffusion_model.{name}.lora_down.weight": torch.ones(3, 7)
        for name in list(layers)[-1:]}, measure=False)
    assert "variant" not in unread.verdict
