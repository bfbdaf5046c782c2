"""What the tensors of a LoRA do to a model: exactly what its trainer meant, or a sentence."""
import itertools

import comfy.lora
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from patched_models import LIMIT, adapter, error_by_effect, flux_file, flux_pair, run
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.lora.apply import apply_lora
from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.lora.report import report_text
from featherweight.ops.patches.adapters import adapter_tensors
from featherweight.ops.patches.as_trained import row_dora

pytestmark = pytest.mark.usefixtures("no_model_outlives_its_tests")

PREFIX = "diffusion_model."
LAYER = "double_blocks.0.img_attn.proj"
QKV = "double_blocks.0.txt_attn.qkv"
SLICE = "transformer.transformer_blocks.0.attn.add_v_proj"  # of the last third of QKV


def rand(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer(kind, stem=PREFIX + LAYER, seed=1, **options):
    """The tensors of a layer for a square weight, under its name."""
    values = flux_file("Q8_0")[1][f"{LAYER}.weight"]
    tensors = adapter(kind, values, seed, **options)
    return {f"{stem}.{end}": value for end, value in tensors.items()}


def peft_pair(stem, rank=4, size=0.3):
    return {f"{stem}.lora_A.weight": rand(rank, 256, seed=2, scale=size),
            f"{stem}.lora_B.weight": rand(256, rank, seed=3, scale=size)}


def applied(patcher, lora, strength=1.0):
    report = check_lora(patcher, None, lora, measure=False)
    assert report.fits == "yes", report.verdict
    return apply_lora(patcher, None, report, strength, 0.0)[0]


def with_changes(patcher, changes):
    """The model with these tensors added to its weights."""
    patcher = patcher.clone()
    patcher.add_patches({PREFIX + key: ("diff", (value,)) for key, value in changes.items()})
    return patcher


def assert_effect(lora, changes, strength=1.0):
    """A LoRA changes the weights as said, in the packed model and in the host's own."""
    packed, dense = flux_pair("Q8_0")
    without, expected = run(dense), run(with_changes(dense, changes))
    for patcher in (packed, dense):
        assert error_by_effect(run(applied(patcher, lora, strength)), expected, without) < LIMIT


# --- GGUF ---


def gguf_loras():
    kohya = "lora_unet_" + LAYER.replace(".", "_")
    bare = peft_pair(LAYER, rank=32)
    return {
        "an alpha of its own": bare | {f"{LAYER}.alpha": torch.tensor([8.0])},
        "DoRA": layer("dora", LAYER),
        "a bias": bare | {f"{LAYER}.diff_b": rand(256)},
        "kohya's names": layer("lora", kohya, rank=32),
        "LoKr": layer("lokr", kohya, rank=32),
        "a norm": {f"{PREFIX}{LAYER}.diff": rand(256, 256), f"{PREFIX}{LAYER}.diff_b": rand(256)},
        "stable-diffusion.cpp's names": {
            f"lora.model.diffusion_model.{LAYER}.lora_down": bare[f"{LAYER}.lora_A.weight"],
            f"lora.model.diffusion_model.{LAYER}.lora_up": bare[f"{LAYER}.lora_B.weight"]},
        "llama.cpp's names": {f"{LAYER}.weight.lora_a": bare[f"{LAYER}.lora_A.weight"],
                              f"{LAYER}.weight.lora_b": bare[f"{LAYER}.lora_B.weight"]}
    }


@pytest.mark.parametrize(("kind", "packing"), [*zip(
    gguf_loras(), itertools.cycle(["F32", "F16", "Q8_0"]))])
def test_a_lora_in_gguf_is_the_same_as_in_safetensors(kind, packing, tmp_path):
    tensors = {name: value.reshape(1) if not value.ndim else value
               for name, value in gguf_loras()[kind].items()}

    def packed_as(name, values):
        return packing if values.ndim > 1 and values.shape[-1] % 32 == 0 else "F32"

    seen = write_gguf(tmp_path / "lora.gguf", {key: value.numpy() for key, value in
                                               tensors.items()}, packed_as)
    names = {".weight.lora_a": ".lora_A.weight", ".weight.lora_b": ".lora_B.weight",
             ".lora_down": ".lora_down.weight", ".lora_up": ".lora_up.weight"}

    def in_safetensors(name):
        end = next((end for end in names if name.endswith(end)), None)
        return name if end is None else name.removesuffix(end) + names[end]

    save_file({in_safetensors(name): torch.tensor(value) for name, value in seen.items()},
              tmp_path / "lora.safetensors")
    reports = [check_lora(flux_pair("Q8_0")[0], None, *load_lora_file(tmp_path / f"lora.{end}"))
               for end in ("safetensors", "gguf")]
    expected, found = (report.patches for report in reports)
    assert [report.fits for report in reports] == ["yes", "yes"] and found.keys() == expected.keys()
    for target, value in expected.items():
        if isinstance(value, tuple):
            assert torch.equal(found[target][1][0], value[1][0])
            continue
        for one, other in zip(adapter_tensors(found[target]), adapter_tensors(value), strict=True):
            assert torch.equal(one, other)
        assert found[target].weights[2] == value.weights[2]  # alpha


def test_the_alpha_for_all_layers_of_a_gguf_gives_way_to_a_layers_own(tmp_path):
    other = "double_blocks.0.txt_attn.proj"
    tensors = peft_pair(LAYER) | peft_pair(other) | {f"{LAYER}.alpha": torch.tensor([1.0])}
    write_gguf(tmp_path / "lora.gguf", {key: value.numpy() for key, value in tensors.items()},
               lambda name, values: "F32", "flux",
               {"general.type": "adapter", "adapter.lora.alpha": 8})
    patches = check_lora(flux_pair("Q8_0")[0], None,
                         *load_lora_file(tmp_path / "lora.gguf")).patches
    alphas = {name: patches[f"{PREFIX}{name}.weight"].weights[2] for name in (LAYER, other)}
    assert alphas == {LAYER: 1.0, other: 8.0}


# --- biases, and tensors that nobody reads ---


@pytest.mark.parametrize(("up", "down", "alpha"), [
    ("lora_B", "lora_A", None), ("lora_up", "lora_down", 2.0),
    ("lora_B.default", "lora_A.default", 2.0)])
def test_the_bias_of_a_second_factor_changes_the_layers_bias(up, down, alpha):
    lora = {f"{PREFIX}{LAYER}.{down}.weight": rand(4, 256, seed=2, scale=0.1),
            f"{PREFIX}{LAYER}.{up}.weight": rand(256, 4, seed=3, scale=0.1),
            f"{PREFIX}{LAYER}.{up}.bias": rand(256)}
    if alpha is not None:
        lora[f"{PREFIX}{LAYER}.alpha"] = torch.tensor(alpha)
    first, second, bias = list(lora.values())[:3]
    scale = 0.7 if alpha is None else 0.7 * alpha / 4
    assert_effect(lora, {f"{LAYER}.weight": scale * second @ first, f"{LAYER}.bias": scale * bias},
                  0.7)


def test_the_bias_of_a_slice_changes_that_part_of_the_bias():
    lora = peft_pair(SLICE) | {f"{SLICE}.lora_B.bias": rand(256)}
    first, second, bias = lora.values()
    weight_change, bias_change = torch.zeros(768, 256), torch.zeros(768)
    weight_change[512:], bias_change[512:] = second @ first, bias
    assert_effect(lora, {f"{QKV}.weight": weight_change, f"{QKV}.bias": bias_change})


def test_a_bias_of_a_factor_adds_nothing_where_the_layer_has_its_own_or_the_factor_is_absent():
    model, pair, own = flux_pair("Q8_0")[0], peft_pair(LAYER), rand(256)
    unread = f"{LAYER}.lora_B.bias"
    report = check_lora(model, None, pair | {f"{LAYER}.diff_b": own, unread: rand(256)})
    bias, = [value for target, value in report.patches.items() if target.endswith("bias")]
    assert torch.equal(bias[1][0], own) and report.unread == [unread]
    unread = "double_blocks.0.txt_attn.proj.lora_B.bias"
    assert check_lora(model, None, pair | {unread: rand(256)}).unread == [unread]


def test_a_bias_for_a_layer_without_one_is_named():
    layer = "double_blocks.0.img_attn.norm.query_norm"
    report = check_lora(flux_pair("Q8_0")[0], None, {f"{PREFIX}{layer}.diff_b": rand(128)})
    assert report.fits == "no" and report.mismatches == {
        PREFIX + layer: "it changes a bias, which this layer of the model does not have"
    }


@pytest.mark.parametrize("end", ["scale", "mystery", "bias", "weight", "lora_mid.weight"])
def test_a_tensor_that_nobody_reads_weakens_the_verdict(end):
    name = f"{PREFIX}{LAYER}.{end}"
    report = check_lora(flux_pair("Q8_0")[0], None,
                        peft_pair(PREFIX + LAYER) | {name: torch.ones(4)})
    assert report.fits == "partly" and report.unread == [name]
    assert report.misfits == [f"{name}: of an unknown kind"]
    assert report.verdict == (
        "This LoRA for Flux.1 fits in part: all 1 layers match the model, and tensors of an"
        " unknown kind (1) are left out.")
    assert name in report_text(report)


def test_unread_tensors_for_a_text_encoder_do_not_count_without_one():
    lora = peft_pair(PREFIX + LAYER) | {"lora_te1_text_model_x.lora_E": torch.ones(4)}
    assert check_lora(flux_pair("Q8_0")[0], None, lora).fits == "yes"


# --- how strong it is said to be ---


UNKNOWN = {
    "GLoRA": lambda: layer("glora"),
    "BOFT": lambda: layer("boft"),
    "full weight": lambda: layer("set"),
    "DoRA of a zero product": lambda: {
        name: value * (0 if "lora_up" in name else 1) for name, value in layer("dora").items()
    }
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_change_of_unknown_size_is_not_said_to_be_none(kind):
    text = report_text(check_lora(flux_pair("Q8_0")[0], None, UNKNOWN[kind]()))
    assert "strongest: not known" in text and "no effect" not in text


def test_a_lora_of_zeros_is_said_to_have_no_effect():
    lora = {name: value * 0 for name, value in peft_pair(PREFIX + LAYER).items()}
    assert "nothing: all its values are zero, it has no effect" in report_text(
        check_lora(flux_pair("Q8_0")[0], None, lora))


# --- DoRA as PEFT computes it ---


def peft_weight(weight, up, down, magnitude):
    """As PEFT merges it, in float64: `merge` and `get_weight_norm` of its tuners/lora/dora.py."""
    changed = weight.double() + (up.double().flatten(1) @ down.double().flatten(1)).reshape(
        weight.shape)
    norms = changed.flatten(1).norm(dim=1)
    return changed * (magnitude.double().flatten() / norms).reshape(-1, *[1] * (weight.ndim - 1))


def magnitude_for(weight):
    return weight.flatten(1).norm(dim=1) * (3 + rand(weight.shape[0], seed=9))


@pytest.mark.parametrize(("end", "strength"), [
    ("", 1.0), (".weight", 0.6), (".default.weight", 0.6)])
def test_pefts_dora_has_its_exact_effect(end, strength):
    lora = peft_pair(PREFIX + LAYER)
    down, up = lora.values()
    weight = flux_file("Q8_0")[1][f"{LAYER}.weight"]
    magnitude = magnitude_for(weight)
    lora[f"{PREFIX}{LAYER}.lora_magnitude_vector{end}"] = magnitude
    change = (peft_weight(weight, up, down, magnitude) - weight).float()
    assert_effect(lora, {f"{LAYER}.weight": strength * change}, strength)


def test_pefts_dora_of_a_slice_scales_its_rows_alone():
    lora = peft_pair(SLICE)
    down, up = lora.values()
    weight = flux_file("Q8_0")[1][f"{QKV}.weight"]
    magnitude = magnitude_for(weight[512:])
    lora[f"{SLICE}.lora_magnitude_vector"] = magnitude
    change = torch.zeros_like(weight)
    change[512:] = peft_weight(weight[512:], up, down, magnitude) - weight[512:]
    assert_effect(lora, {f"{QKV}.weight": change})


def test_pefts_dora_of_a_convolution_scales_output_channels():
    weight, up, down = rand(6, 4, 3, 3), rand(6, 2, 1, 1, seed=1), rand(2, 4, 3, 3, seed=2)
    magnitude = magnitude_for(weight).reshape(1, 6, 1, 1)
    value = row_dora(LoRAAdapter(set(), (up, down, None, None, None, None)), magnitude)
    found = comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], weight.clone(), "weight")
    torch.testing.assert_close(found.double(), peft_weight(weight, up, down, magnitude), rtol=1e-5,
                               atol=1e-6)


def test_factors_that_are_not_of_the_ranks_of_an_adalora_are_told():
    stem = f"base_model.model.{LAYER}"
    lora = {f"{stem}.lora_A": rand(4, 256), f"{stem}.lora_B": rand(256, 4),
            f"{stem}.lora_E": rand(3, 1)}
    assert check_lora(flux_pair("Q8_0")[0], None, lora).unread == [f"{stem}.lora_E"]


def test_a_magnitude_vector_of_another_length_is_named():
    lora = peft_pair(PREFIX + LAYER)
    lora[f"{PREFIX}{LAYER}.lora_magnitude_vector"] = torch.ones(255)
    (reason,) = check_lora(flux_pair("Q8_0")[0], None, lora).mismatches.values()
    assert reason.startswith("this ComfyUI cannot compute it")


def test_the_host_computes_another_dora_than_peft():
    """The day it fails, `lora_magnitude_vector` can be read as `dora_scale`."""
    weight, up, down = rand(6, 8), rand(6, 2, seed=1), rand(2, 8, seed=2)
    magnitude = magnitude_for(weight)
    expected = peft_weight(weight, up, down, magnitude)
    value = LoRAAdapter(set(), (up, down, None, None, magnitude[:, None], None))
    hosts = comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], weight.clone(), "weight")
    assert (hosts.double() - expected).norm() > 0.1 * (expected - weight.double()).norm()


def test_embeddings_in_a_lora_are_called_so_and_weaken_no_verdict():
    """OneTrainer's, which ComfyUI reads where they lie in the folder of embeddings."""
    names = [f"bundle_emb.{word}.{end}" for word in ("my cat", "hat") for end in ("clip_l", "t5")]
    lora = peft_pair(PREFIX + LAYER) | {name: rand(2, 8) for name in names}
    report = check_lora(flux_pair("Q8_0")[0], None, lora)
    assert report.fits == "yes" and report.misfits == [] and report.embeddings == sorted(names)
    text = report_text(report)
    assert "embeddings: 'hat', 'my cat'. No LoRA loader applies them" in text
    assert "unknown kind" not in text and "embedding:its-name" in text


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
def test_an_effect_far_above_the_weights_is_told_and_applied(kind, measure):
    """`measure`: by the node that checks, or by the one that applies."""
    model, weights = flux_pair("Q8_0")[0], flux_file("Q8_0")[1]
    shape = weights[f"{LAYER}.weight"].shape

    def checked(factor):
        lora = {"diff": {"diff": rand(*shape)}}.get(kind) or adapter(
            kind, weights[f"{LAYER}.weight"], 1)
        scaled = next(iter(lora))
        lora = {f"{PREFIX}{LAYER}.{end}": value * (factor if end == scaled else 1)
                for end, value in lora.items()}
        return check_lora(model, None, lora, measure=measure)

    weak = checked(1e-3)
    share, block = checked(1e6).shares[0]
    strong = checked(1e6)
    assert weak.strength_note == "" and "as large as" not in report_text(weak)
    assert strong.fits == "yes" and len(strong.patches) == 1 and share > 100
    assert strong.strength_note.startswith(
        f"At strength 1 its change of {block} is {share:,.0f} times as large as the weights there")
    assert strong.strength_note in report_text(strong)
    found = comfy.lora.calculate_weight(
        [(1.0, strong.patches[f"{PREFIX}{LAYER}.weight"], 1.0, None, None)],
        weights[f"{LAYER}.weight"].clone(), LAYER)
    ratio = (found - weights[f"{LAYER}.weight"]).norm() / weights[f"{LAYER}.weight"].norm()
    assert ratio > 100
