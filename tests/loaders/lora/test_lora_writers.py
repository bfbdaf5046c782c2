"""LoRAs as PEFT, LyCORIS, diffusers, kohya and musubi write them have the effect they were trained
for: the expected weights are those of PEFT's and LyCORIS' own forward."""
import json
import math
import random

import comfy.lora
import pytest
import torch
from host_patches import patched_by_host
from patched_models import adapter, flux_file, flux_pair
from safetensors.torch import save_file

from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.header_alpha import CONFIG, DIFFUSERS
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.lora.report import report_text

pytestmark = pytest.mark.usefixtures("no_model_outlives_its_tests")

LIMIT = 1e-4
LAYERS = {"double_blocks.0.img_attn.proj": (256, 256), "double_blocks.0.txt_mlp.0": (1024, 256),
          "single_blocks.0.linear2": (256, 1280)}
PREFIX = "diffusion_model."


@pytest.fixture
def seed():
    """A random one, which a failure shows."""
    number = random.randrange(1 << 30)
    print("seed", number)
    torch.manual_seed(number)
    random.seed(number)
    return number


def weights():
    return {name: flux_file("Q8_0")[1][f"{name}.weight"] for name in LAYERS}


def linear(weight, bias=False):
    layer = torch.nn.Linear(*reversed(weight.shape), bias=bias)
    layer.weight.data = weight.clone()
    return layer


def changed(report, name, strength=1.0):
    """The weight with the patches of a report, as the host and this pack compute it."""
    weight = weights()[name]
    value = report.patches[f"{PREFIX}{name}.weight"]
    return patched_by_host([(strength, value, 1.0, None, None)], weight, name)


def error(found, expected, weight):
    return ((found - expected).norm() / (expected - weight).norm()).item()


def saved(folder, tensors, metadata=None, name="lora.safetensors"):
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()},
              folder / name, metadata)
    return str(folder / name)


def checked(path, **options):
    report = check_lora(flux_pair("Q8_0")[0], None, *load_lora_file(path), measure=False, **options)
    assert report.fits == "yes", report.verdict
    return report


def blocks():
    """A module whose layers have the names of LAYERS."""
    root = torch.nn.Module()
    for name, weight in weights().items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.add_module(last, linear(weight, bias=True))
    return root


def random_(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)


# --- PEFT ---

FACTORS = (1, 1 / 8, 8)  # alpha for a rank
PEFT = {
    "LoRA": ("LoraConfig", {"r": 8}, "lora_alpha"),
    "rsLoRA": ("LoraConfig", {"r": 8, "use_rslora": True}, "lora_alpha"),
    "DoRA": ("LoraConfig", {"r": 8, "use_dora": True}, "lora_alpha"),
    "bias": ("LoraConfig", {"r": 8, "lora_bias": True}, "lora_alpha"),
    "patterns": ("LoraConfig", {"r": 8, "rank_pattern": {"img_attn.proj": 4}, "alpha_pattern": {
        "double_blocks.0.img_attn.proj": 1, r"^single_blocks\.0\.linear2$": 3}}, "lora_alpha"),
    "LoHa": ("LoHaConfig", {"r": 8}, "alpha"),
    "LoKr": ("LoKrConfig", {"r": 8}, "alpha"),
    "LoKr of whole factors": ("LoKrConfig", {"r": 256}, "alpha"),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 8, "total_step": 10}, "lora_alpha"),
}


@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_saves_has_the_effect_of_its_forward(kind, tmp_path, seed):
    peft, factor = pytest.importorskip("peft", reason="it is the oracle"), random.choice(FACTORS)
    config, options, alpha = PEFT[kind]
    r = options.get("r", options.get("init_r"))
    config = getattr(peft, config)(target_modules=list(LAYERS), **options, **{alpha: r * factor})
    base = blocks()
    biases = {name: base.get_submodule(name).bias.detach().clone() for name in LAYERS}
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            random_([parameter])
    model.save_pretrained(tmp_path)
    report = checked(str(tmp_path / "adapter_model.safetensors"))
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in weights().items():
        expected = merged[f"{name}.weight"]
        assert error(changed(report, name), expected, weight) < LIMIT, name
        if kind == "bias":
            bias = report.patches[f"{PREFIX}{name}.bias"][1][0]
            torch.testing.assert_close(biases[name] + bias, merged[f"{name}.bias"])


def peft_file(folder, changes=()):
    """A LoRA under PEFT's names, and a config that belongs to it but for the changes."""
    tensors, r = {}, 8
    for name, (rows, columns) in LAYERS.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, r)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2, "target_modules": [*LAYERS],
              **dict(changes)}
    (folder / CONFIG).write_text(json.dumps(config))
    return saved(folder, tensors)


def scales(report):
    values = (report.patches[f"{PREFIX}{name}.weight"] for name in LAYERS)
    return {round(1.0 if alpha is None else alpha / down.shape[0], 6)
            for _, down, alpha, *_ in (value.weights for value in values)}


@pytest.mark.parametrize("changes", [
    {"r": 16}, {"target_modules": ["img_attn.proj"]}, {"peft_type": "OFT"}, {"use_dora": True},
    {"rank_pattern": {"linear2": 4}}, {"rank_pattern": {"(a+)+": 8}}, {"lora_alpha": "many"},
    {"lora_alpha": 1e300}, {"lora_alpha": True}, {"lora_alpha": -4}],
    ids=str)
def test_a_config_that_is_not_of_the_tensors_is_not_applied(changes, tmp_path, seed):
    assert scales(checked(peft_file(tmp_path))) == {0.25}
    assert scales(checked(peft_file(tmp_path, changes))) == {1.0}


@pytest.mark.parametrize("text", ["", "[1", "[" * 100_000, "null", '{"r": 1' + "0" * 5000 + "}"])
def test_a_damaged_config_is_none(text, tmp_path, seed):
    path = peft_file(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    assert scales(checked(path)) == {1.0}


@pytest.mark.parametrize("beside", ["adapter_model.safetensors", "other.safetensors", "b.gguf"])
def test_a_config_next_to_several_loras_is_of_pefts_own_file_alone(beside, tmp_path, seed):
    path = peft_file(tmp_path)
    (tmp_path / beside).touch()
    report = checked(path)
    assert scales(report) == {1.0}
    assert f"{CONFIG}: not applied, its folder has other LoRAs." in report_text(report)
    own = tmp_path / "adapter_model.safetensors"
    own.write_bytes((tmp_path / "lora.safetensors").read_bytes())
    assert scales(checked(str(own))) == {0.25}


def test_a_config_of_other_layers_than_its_neighbors_is_not_told(tmp_path, seed):
    path = peft_file(tmp_path, {"target_modules": ["nowhere"]})
    (tmp_path / "other.safetensors").touch()
    assert CONFIG not in report_text(checked(path))


# --- headers ---

def header_file(folder, metadata, stem="transformer.{}", rank=8, tensors=()):
    """A LoRA without alpha in its tensors, and its metadata."""
    lora = dict(tensors)
    for name, (rows, columns) in LAYERS.items():
        lora[f"{stem.format(name)}.lora_A.weight"] = torch.randn(rank, columns)
        lora[f"{stem.format(name)}.lora_B.weight"] = torch.randn(rows, rank)
    return saved(folder, lora, metadata)


OF_A_PART = {"transformer.lora_alpha": "4", "transformer.r": "8"}
HEADERS = {
    "diffusers": ({DIFFUSERS: json.dumps(
        {"transformer.r": 8, "transformer.lora_alpha": 4.0})}, 0.5),
    "diffusers, one model": ({DIFFUSERS: json.dumps({"r": 8, "lora_alpha": 64})}, 8),
    "diffusers, rsLoRA": ({DIFFUSERS: json.dumps(
        {"transformer.r": 8, "transformer.lora_alpha": 4, "transformer.use_rslora": True})},
        4 / math.sqrt(8)),
    "a part": (OF_A_PART, 0.5),
    "another part": ({"text_encoder.lora_alpha": "4", "text_encoder.r": "8"}, 1),
    "a part, and a text encoder": (
        {**OF_A_PART, "text_encoder.lora_alpha": "32", "text_encoder.r": "8"}, 0.5),
    "a part of another rank": ({"transformer.lora_alpha": "4", "transformer.r": "16"}, 1),
    "lightx2v": ({"alpha": "0.5", "rank": "8"}, 1 / 16),
    "lora_alpha": ({"lora_alpha": "64"}, 8),
    "network_alpha": ({"network_alpha": "2.0"}, 0.25),
    "the same twice": ({"lora_alpha": "2", "alpha": "2.0"}, 0.25),
    "two that differ": ({"lora_alpha": "2", "alpha": "4"}, 1),
    "the more exact one": ({**OF_A_PART, "alpha": "1"}, 0.5),
    "kohya's": ({"ss_network_alpha": "4", "ss_network_dim": "8"}, 1),
    "by kohya's trainer": ({"ss_base_model_version": "flux1", "lora_alpha": "4"}, 1),
    "no number": ({"lora_alpha": "four"}, 1), "zero": ({"alpha": "0"}, 1),
    "NaN": ({"alpha": "nan"}, 1), "negative": ({"network_alpha": "-1"}, 1),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_an_alpha_in_the_header_counts_as_its_writer_means_it(kind, tmp_path, seed):
    metadata, scale = HEADERS[kind]
    path = header_file(tmp_path, metadata, random.choice(["transformer.{}", PREFIX + "{}"]))
    report = checked(path)
    assert scales(report) == {round(scale, 6)}
    ignoring = checked(path, use_header_alpha=False)
    assert scales(ignoring) == {1.0}
    assert (f"Its writer means {scale:.4g} times this strength" in report_text(ignoring)) == (
        scale != 1)
    assert "Its writer means" not in report_text(report)


def test_the_alpha_of_a_tensor_counts_before_all_others(tmp_path, seed):
    alphas = {f"transformer.{name}.alpha": torch.tensor(2.0) for name in LAYERS}
    path = header_file(tmp_path, {**OF_A_PART, "alpha": "1"}, tensors=alphas)
    assert scales(checked(path)) == {0.25} == scales(checked(path, use_header_alpha=False))


def test_values_that_contradict_each_other_are_told(tmp_path, seed):
    text = report_text(checked(header_file(tmp_path, {"lora_alpha": "2", "alpha": "4"})))
    assert ("the header's lora_alpha and the header's alpha: not applied, the values differ."
            in text)


@pytest.mark.parametrize(("header", "scale", "told"), [
    ({"lora_alpha": "2"}, 0.25, "2 from the header's lora_alpha and adapter_config.json (0.25"),
    ({"lora_alpha": "8"}, 1, "the header's lora_alpha and adapter_config.json: not applied, the"
                             " values differ."),
    ({DIFFUSERS: json.dumps({"r": 8, "lora_alpha": 8})}, 1, "adapter_config.json: not applied"),
    ({"ss_network_alpha": "8"}, 1, "")], ids=str)
def test_a_config_that_says_otherwise_than_the_header_is_not_applied(header, scale, told, tmp_path,
                                                                     seed):
    path = peft_file(tmp_path)
    tensors = {name: value.clone() for name, value in load_lora_file(path)[0].items()}
    saved(tmp_path, tensors, header)  # over the file, which is mapped no longer
    report = checked(path)
    assert scales(report) == {scale} and told in report_text(report)


def folded_by_kohya(down, up, alpha):
    """kohya's and musubi's converters to diffusers' names: half of the powers of two of the scale
    on each factor, and no alpha."""
    scale = alpha / down.shape[0]
    on_down, on_up = scale, 1.0
    while on_down * 2 < on_up:
        on_down, on_up = on_down * 2, on_up / 2
    return down * on_down, up * on_up


def folded_by_musubi(down, up, alpha):
    """musubi's, where both factors get the root."""
    root = math.sqrt(alpha / down.shape[0])
    return down * root, up * root


@pytest.mark.parametrize("fold", [folded_by_kohya, folded_by_musubi])
def test_a_converted_file_whose_header_kept_its_alpha_counts_once(fold, tmp_path, seed):
    alpha, rank = random.choice([1, 4, 8, 16, 64]), 16
    tensors, meant = {}, {}
    for name, (rows, columns) in LAYERS.items():
        down, up = torch.randn(rank, columns), torch.randn(rows, rank)
        meant[name] = up @ down * alpha / rank
        first, second = fold(down, up, alpha)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = first
        tensors[f"{PREFIX}{name}.lora_B.weight"] = second
    metadata = {"ss_network_alpha": str(alpha), "ss_network_dim": str(rank),
                "ss_network_module": "networks.lora_flux", "alpha": str(alpha)}
    report = checked(saved(tmp_path, tensors, metadata))
    for name, weight in weights().items():
        gain = ((changed(report, name) - weight) * meant[name]).sum() / meant[name].square().sum()
        assert gain == pytest.approx(1, abs=1e-3)


# --- a host that reads the header ---

def host_with_alpha_in_load_lora(monkeypatch, metadata):
    """ComfyUI's open change 15830: `load_lora` takes alpha / r of the metadata where a layer has no
    `.alpha`."""
    load = comfy.lora.load_lora

    def load_lora(lora, to_load, log_missing=True, metadata=metadata):
        for key, value in metadata.items():
            part, _, last = key.rpartition(".")
            r = metadata.get(f"{part}.r" if part else "r")
            if last == "lora_alpha" and r is not None:
                for name in [name for name in lora if name.endswith(".lora_A.weight")]:
                    lora.setdefault(f"{name.removesuffix('.lora_A.weight')}.alpha", torch.tensor(
                        float(value) / float(r) * len(lora[name])))
        return load(lora, to_load, log_missing)

    monkeypatch.setattr(comfy.lora, "load_lora", load_lora)


def test_an_alpha_that_the_host_applies_too_counts_once(tmp_path, seed, monkeypatch):
    path = header_file(tmp_path, OF_A_PART, PREFIX + "{}")
    text = report_text(check_lora(flux_pair("Q8_0")[0], None, *load_lora_file(path)))
    assert "Load LoRA: 3 of 3 layers count 2 times as meant" in text
    host_with_alpha_in_load_lora(monkeypatch, OF_A_PART)
    assert scales(checked(path)) == {0.5}
    text = report_text(check_lora(flux_pair("Q8_0")[0], None, *load_lora_file(path)))
    assert "Load LoRA: the same" in text


def test_the_report_names_rank_alpha_and_where_it_stands(tmp_path, seed):
    path = header_file(tmp_path, {"alpha": "0.5"}, PREFIX + "{}")
    text = report_text(check_lora(flux_pair("Q8_0")[0], None, *load_lora_file(path)))
    assert ("kind: LoRA, rank 8\nalpha: 0.5 from the header's alpha (0.0625 times the product)\n"
            in text)
    assert "Load LoRA: 3 of 3 layers count 16 times as meant" in text


@pytest.mark.parametrize(("kind", "words"), [
    *((kind, "the same") for kind in ("lora", "dora-in", "loha", "lokr", "glora")),
    *((kind, "1 of 1 layers are changed in another way")
      for kind in ("dora", "loha-dora", "lokr-dora", "oft", "boft"))])
def test_the_report_says_what_load_lora_does_otherwise(kind, words, seed):
    """At half of the strength, by the host's own arithmetic."""
    name = "double_blocks.0.img_attn.proj"
    weight = weights()[name]
    lora = {f"{PREFIX}{name}.{end}": value for end, value in adapter(kind, weight, seed).items()}
    report = check_lora(flux_pair("Q8_0")[0], None, lora)
    assert f"\nLoad LoRA: {words}\n" in report_text(report)
    hosts = comfy.lora.load_lora(lora, {PREFIX + name: name})[name]
    found = comfy.lora.calculate_weight([(0.5, hosts, 1.0, None, None)], weight.clone(), name)
    assert (error(found, changed(report, name, 0.5), weight) < LIMIT) == (words == "the same")


# --- LyCORIS ---

ROTATIONS = [{}, {"constraint": 1e-3}, {"rescaled": True},
             {"constraint": 1e-3, "rescaled": True}, {"constraint": 1.0}]
PRODUCTS = [{}, {"weight_decompose": True, "wd_on_out": True},
            {"weight_decompose": True, "wd_on_out": False}]
# module of LyCORIS, its class, and the options of each case
LYCORIS = [
    *(("diag_oft", "DiagOFTModule", options) for options in ROTATIONS),
    *(("boft", "ButterflyOFTModule", options) for options in ROTATIONS),
    *((module, name, options) for module, name in (
        ("locon", "LoConModule"), ("loha", "LohaModule"), ("lokr", "LokrModule"))
      for options in PRODUCTS)]


@pytest.mark.parametrize(("module", "name", "options"), LYCORIS, ids=str)
def test_what_lycoris_saves_has_the_effect_of_its_forward(module, name, options, tmp_path, seed):
    modules, tensors, is_product = {}, {}, name.startswith("Lo")
    make = getattr(pytest.importorskip(f"lycoris.modules.{module}", reason="it is the oracle"),
                   name)
    if is_product:
        options = {"alpha": 8 * random.choice(FACTORS), **options}
    for name, weight in weights().items():
        module = make("layer", linear(weight), lora_dim=8, **options)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key == "rescale" or key == "dora_scale":
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                else:
                    parameter.normal_(std=0.3 if is_product else 0.05)
        modules[name] = module
        stem = "lycoris_" + name.replace(".", "_")
        parts = module.custom_state_dict() or module.state_dict()
        tensors |= {f"{stem}.{key}": value for key, value in parts.items()
                    if not key.startswith("org_")}
    report = checked(saved(tmp_path, tensors))
    for name, weight in weights().items():
        inputs = torch.randn(4, weight.shape[1])
        with torch.no_grad():
            expected, plain = modules[name](inputs), inputs @ weight.T
        found = inputs @ changed(report, name).T
        assert error(found, expected, plain) < LIMIT, name
    if not is_product and "rescaled" not in options:
        strength = random.uniform(0.2, 1.5)
        for name, weight in weights().items():
            modules[name].multiplier = strength
            with torch.no_grad():
                expected = modules[name].make_weight(strength)
            assert error(changed(report, name, strength), expected, weight) < LIMIT, name
