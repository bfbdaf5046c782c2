"""Save Packed Model: where its files come to lie, what they are called, and what it says."""
import json
import random
import re
from pathlib import Path

import comfy.cli_args
import comfy.sd
import folder_paths
import pytest
import torch
from checkpoint_parts import stable_diffusion
from pack_api import (
    HOST_TYPES,
    ROW_TYPES,
    SaveError,
    WeightFileError,
    load_diffusion_model,
    open_weights,
)
from patched_models import lora_for, packed_flux, patched, run, tiny_flux
from prompt_errors import prompt_errors
from safetensors.torch import save_file

from featherweight.loaders.container import network_drives
from featherweight.loaders.files.atomic_file import WriteError
from featherweight.loaders.packing.planning import file_plan
from featherweight.loaders.packing.planning.file_plan import MIXES
from featherweight.loaders.packing.planning.plan import PlanError
from featherweight.nodes import save_packed_model
from featherweight.nodes.measure_sensitivity import MeasureSensitivity
from featherweight.nodes.save_packed_model import (
    KEEP_SIZE,
    MIX,
    RENAMED_LORAS,
    SavePackedModel,
)
from featherweight.ops.packing.pack_types import TYPES

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models",
                        ([str(tmp_path / "models")], {".gguf"}))
    return tmp_path / "output"


def saved(model, *arguments, **options) -> tuple[Path, str]:
    path, report = SavePackedModel.execute(model, *arguments, **options).args
    return Path(path), report


def test_files_are_counted_and_nothing_is_overwritten_unless_asked(output):
    model = packed_flux("Q4_K")
    first, report = saved(model)
    assert (
        first == output / "diffusion_models" / "ComfyUI_Q4_K_00001_.gguf" and first.name in report
    )
    assert (
        saved(model)[0].name == "ComfyUI_Q4_K_00002_.gguf"
        and saved(model, "Q8_0")[0].name == "ComfyUI_Q8_0_00001_.gguf"
    )
    plain = [saved(model, overwrite=True)[0] for _ in range(2)]
    assert plain == [first.with_name("ComfyUI_Q4_K.gguf")] * 2
    assert run(load_diffusion_model(str(first))).isfinite().all()


@pytest.mark.parametrize("how", ["map", "copy"])
def test_a_model_is_not_saved_over_the_file_it_was_loaded_of(output, monkeypatch, how):
    monkeypatch.setenv(network_drives.FILES_ENV, how)
    path, _ = saved(packed_flux("Q4_K"), overwrite=True)
    before = path.read_bytes()
    with pytest.raises(WriteError, match=f"^{re.escape(str(path))} is a file of the model that is"
                       " to be saved"):
        saved(load_diffusion_model(str(path)), overwrite=True)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ROW_TYPES)
def test_a_type_is_offered_where_comfyui_reads_it_and_else_refused_in_a_sentence(kind, output):
    node_id = SavePackedModel.GET_SCHEMA().node_id
    offered = next(one.options for one in SavePackedModel.GET_SCHEMA().inputs if one.id == "type")
    of_kind = [option for option in save_packed_model.SIZES if kind in option] + [kind]
    for option in of_kind:
        errors = prompt_errors(node_id, {"type": option})
        assert "type" not in [error["extra_info"].get("input_name") for error in errors]
    assert [option for option in offered if option.startswith("mix for a size")] == [
        "mix for a size", "mix for a size: ComfyUI's types"]
    if kind in list(offered):
        path, _ = saved(packed_flux("Q8_0"), kind)
        comfy.sd.load_diffusion_model(str(path))
        return
    assert not set(of_kind) & set(offered)
    for option in of_kind:
        with pytest.raises(PlanError, match=f"^This ComfyUI does not read {kind}. Update it, or"):
            saved(packed_flux("Q8_0"), option, size_gb=1.0)


def test_one_choice_is_the_best_two_of_comfyuis_types_and_two_by_name_are_those_two(output):
    model = packed_flux("Q8_0")
    pairs = [pair for pair in MIXES if {*pair} <= {*HOST_TYPES}]
    coarse = {pair: saved(model, pair[1])[0].stat().st_size / 1e9 for pair in pairs}
    errors = {pair: [TYPES[name].relative_error for name in reversed(pair)] for pair in pairs}
    fits_one, fits_all = min(coarse.values()) * 1.02, max(coarse.values()) * 1.2
    for size in (fits_one, fits_all):
        fitting = [pair for pair in pairs if coarse[pair] < size]
        best = min(fitting, key=errors.get)
        path, _ = saved(model, "mix for a size: ComfyUI's types", size_gb=size)
        assert path.name.startswith(f"ComfyUI_{size:g}GB_{'_'.join(best)}_")
        assert path.stat().st_size <= size * 1e9
    pair = random.choice(pairs)
    for words in ("mix for a size", "size in GB"):  # of earlier versions
        path, _ = saved(model, f"{words}: {' + '.join(pair)}", size_gb=fits_all)
        assert f"GB_{'_'.join(pair)}_" in path.name


@pytest.mark.parametrize(("source", "target"), [
    ("int8_convrot", "Q4_K"), ("Q4_K", "nvfp4"), ("NF4", "Q8_0"), ("nvfp4", "nvfp4"),
    ("Q4_K", "keep types")])
def test_a_plan_says_that_packed_weights_lose_a_second_time(source, target, output, tmp_path):
    save_file(tiny_flux(), tmp_path / "dense.safetensors")
    dense = comfy.sd.load_diffusion_model(str(tmp_path / "dense.safetensors"))
    path, report = saved(dense, source)
    assert "second time" not in report
    _, report = saved(load_diffusion_model(str(path)), target)
    notes = re.findall(r"(\S+) becomes (\S+): the weights lose a second time", report)
    assert notes == ([] if target in (source, "keep types") else [(source, target)])


def test_a_name_may_lie_in_a_model_folder_and_nowhere_else(output, tmp_path):
    model = packed_flux("Q4_K")
    path, _ = saved(model, filename_prefix="diffusion_models/mine/new", folder="models")
    assert path == tmp_path / "models" / "mine" / "new_Q4_K_00001_.gguf"
    for name, folder in (("../out", "output"), ("/etc/out", "output"), ("a/../../out", "output"),
                         ("diffusion_models/../../out", "models")):
        with pytest.raises(WeightFileError, match="outside"):
            saved(model, filename_prefix=name, folder=folder)
    with pytest.raises(WeightFileError, match="begins with one of them"):
        saved(model, filename_prefix="mine/new", folder="models")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "new_Q4_K_00001_.gguf"
    ]


def test_a_name_in_a_model_folder_lies_in_the_one_of_that_name(output, tmp_path, monkeypatch):
    """The host puts the older models/unet before it."""
    folders = (
        [str(tmp_path / "models" / name) for name in ("unet", "diffusion_models")],
        {".gguf"},
    )
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", folders)
    path, _ = saved(packed_flux("Q4_K"), filename_prefix="diffusion_models/new", folder="models")
    assert path == tmp_path / "models" / "diffusion_models" / "new_Q4_K_00001_.gguf"


def test_a_name_that_is_too_long_for_a_file_is_refused_before_anything_is_packed(output):
    with pytest.raises(WeightFileError,
                       match="is too long for the name of a file. Give a shorter one."):
        saved(packed_flux("Q4_K"), filename_prefix="diffusion_models/" + "n" * 300)


def test_types_sizes_and_files_of_both_kinds(output):
    model = packed_flux("Q8_0")
    path, report = saved(model, MIX, 0.0025)
    assert (
        path.name == "ComfyUI_0.0025GB_00001_.gguf" and 2_400_000 < path.stat().st_size <= 2_500_000
    )
    assert saved(model, "NF4")[0].name == "ComfyUI_NF4_00001_.safetensors"
    assert saved(model, "mxfp8")[0].name == "ComfyUI_mxfp8_00001_.safetensors"
    assert saved(model, "keep types")[0].name == "ComfyUI_keep_types_00001_.gguf"
    path, report = saved(model, f"{MIX}: int8_convrot + nvfp4", 0.0032)
    assert path.name == "ComfyUI_0.0032GB_int8_convrot_nvfp4_00001_.safetensors"
    assert "int8_convrot: " in report and "nvfp4: " in report


def test_with_a_vae_the_file_is_a_whole_checkpoint(output, tmp_path):
    save_file(stable_diffusion(), tmp_path / "first.safetensors")
    parts = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "first.safetensors"))[:3]
    model, clip, vae = parts
    path, report = saved(model, "nvfp4", clip=clip, vae=vae)
    assert path == output / "checkpoints" / "ComfyUI_nvfp4_00001_.safetensors"
    assert list(output.rglob("*.safetensors")) == [path] and "nvfp4: " in report
    assert all(comfy.sd.load_checkpoint_guess_config(str(path))[:3])
    without, _ = saved(model, "nvfp4", filename_prefix="checkpoints/small", vae=vae)
    assert comfy.sd.load_checkpoint_guess_config(str(without), output_clip=False)[2] is not None
    with pytest.raises(PlanError, match="A checkpoint cannot have weights in GGUF types"):
        saved(model, "Q4_K", clip=clip, vae=vae)
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        saved(model, "nvfp4", clip=clip, vae=comfy.sd.VAE(sd={}))


def test_who_saves_without_a_measurement_reads_what_one_gives_where_much_is_lost(output):
    model = packed_flux("Q8_0")
    advised = [type_name for type_name, size in (
        ("Q8_0", 1), ("Q6_K", 1), ("Q5_K", 1), ("Q3_K", 1), ("keep types", 1), (MIX, 0.0025))
        if "Measure Sensitivity" in saved(model, type_name, size)[1]]
    assert advised == ["Q5_K", "Q3_K", MIX]


def test_types_are_appended_so_that_saved_workflows_keep_theirs():
    kind = next(widget for widget in SavePackedModel.define_schema().inputs if widget.id == "type")
    assert kind.options[:10] == ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K", "NF4",
                                 "keep types", MIX]
    assert kind.options[10:14] == ["int8_convrot", "float8_e4m3fn", "mxfp8", "nvfp4"]


def test_a_measurement_comes_from_the_socket_else_from_the_list(output, monkeypatch):
    named = []
    monkeypatch.setattr(save_packed_model, "find_sensitivity", named.append)
    monkeypatch.setattr(save_packed_model, "load_measurement", lambda path: None)
    model = packed_flux("Q4_K")
    for given in ({}, {"measurement": "none"}, {"sensitivity": "", "measurement": ""}):
        saved(model, **given)
    assert not named
    saved(model, measurement="listed")
    saved(model, sensitivity="connected", measurement="listed")
    saved(model, sensitivity="typed")  # as prompts of earlier versions have it
    assert named == ["listed", "connected", "typed"]


@pytest.mark.parametrize("is_measured", [False, True])
def test_prompts_of_earlier_workflows_change_no_byte_and_it_is_said(output, is_measured):
    model, given = packed_flux("Q8_0"), {}
    if is_measured:
        given["sensitivity"] = MeasureSensitivity.execute(
            [model], [2], [4], [1.0], [0], ["fast"], ["m"]).result[0]
    prompts = [[torch.zeros(1, 4, 256), {}]]
    (plain, before), (prompted, after) = (
        saved(model, "Q3_K", overwrite=True, filename_prefix=f"{name}/a", **given, **more)
        for name, more in (("x", {}), ("y", {"positive": prompts, "latent": {}})))
    assert plain.read_bytes() == prompted.read_bytes()
    said = "The prompts at positive are not used any more: the model is packed "
    assert said not in before and said + (
        "by the measurement alone." if is_measured else "unmeasured; connect them to Measure"
        " Sensitivity (Featherweight), and that to measurement.") in after



def test_the_words_of_earlier_versions_mean_what_they_meant(output, monkeypatch):
    assert saved(packed_flux("Q4_K"), "as it is")[0].name == "ComfyUI_keep_types_00001_.gguf"
    assert saved(packed_flux("Q8_0"), "size in GB", 0.0025)[0].name == (
        "ComfyUI_0.0025GB_00001_.gguf")
    kept = []
    monkeypatch.setattr(save_packed_model, "plan_file", lambda *arguments: kept.append(
        arguments[-1].keep_loras) or file_plan.plan_file(*arguments))
    for loras in ("arrive whole", "in the type asked for", *RENAMED_LORAS.values()):
        saved(packed_flux("Q4_K"), loras=loras)
    assert kept == [True, False, True, False]


def test_an_nf4_model_is_nf4_as_it_is(output):
    first, _ = saved(packed_flux("Q4_K"), "NF4")
    again, _ = saved(load_diffusion_model(str(first)), "keep types")
    assert again.suffix == ".safetensors" and again.stat().st_size < 1.02 * first.stat().st_size
    layer = "single_blocks.0.linear1.weight"
    assert open_weights(again).entries[layer].format == open_weights(first).entries[layer].format


def test_the_node_shows_a_few_lines_and_the_report_has_the_layers_too(output, monkeypatch):
    shown = []
    monkeypatch.setattr(save_packed_model, "show_text", shown.append)
    model = patched(packed_flux("Q8_0"), (lora_for(tiny_flux()), 1.0))
    path, report = saved(model, MIX, size_gb=0.004, loras=KEEP_SIZE)
    text, lines = shown[-1], report.splitlines()
    types = {entry.format for entry in open_weights(path).entries.values()}
    assert types == set(re.findall(r"(\S+) [\d.]+%(?:, |$)", text.splitlines()[2]))
    assert path.name in text and "LoRA 1 (strength 1)" in text
    assert re.search(r"^Loss: [a-z ]+ \([\d.]+ % of the weights\)\.$", text, re.MULTILINE)
    assert "The layers that lose the most" in report and "The layers" not in text
    assert types == {line.split(":")[0] for line in lines if re.search(r"\d tensors?, ", line)}


@pytest.mark.parametrize(("target", "needs"), [
    ("Q4_K", "ComfyUI with Featherweight or ComfyUI-GGUF"), ("NF4", "ComfyUI with Featherweight"),
    ("int8_convrot", "ComfyUI")])
def test_the_report_ends_in_a_text_for_a_model_card(output, target, needs):
    strength = random.choice([0.5, 0.75, 1.0])
    path, report = saved(patched(packed_flux("Q8_0"), (lora_for(tiny_flux()), strength)), target)
    card = report.partition("For the model card, below the name of the base model and its license:"
                            "\n\n")[2].splitlines()
    assert all(line.startswith("- ") for line in card)
    size = f"{path.stat().st_size / 1e6:.2f}"
    assert re.match(rf"- File: {path.name}, {size} MB \((\S+ [\d.]+%(, )?)+\)\.", card[0]), card
    assert "with Featherweight for ComfyUI" in card[1]
    assert any(re.match(r"- Loss: .* of the weights\)\.", line) for line in card)
    assert any(f"LoRA 1 (strength {strength:g}): " in line for line in card)
    assert card[-1] == f"- It needs {needs}, and the other files of the base model."
    assert card[-1].removeprefix("- ") in report.splitlines()[-1]


def test_the_workflow_is_in_the_file_unless_the_user_turned_that_off(output, monkeypatch):
    class Node(SavePackedModel):
        class hidden:  # noqa: N801  the host's name
            prompt, extra_pnginfo = {"1": "a"}, {"workflow": {"nodes": []}}

    metadata = open_weights(Node.execute(packed_flux("Q4_K")).args[0]).metadata
    assert json.loads(metadata["prompt"]) == {"1": "a"} and json.loads(metadata["workflow"]) == {
        "nodes": []
    }
    monkeypatch.setattr(comfy.cli_args.args, "disable_metadata", True)
    metadata = open_weights(Node.execute(packed_flux("Q4_K")).args[0]).metadata
    assert (
        "prompt" not in metadata and "workflow" not in metadata and "featherweight.plan" in metadata
    )


def test_what_is_not_saved_is_named_and_what_cannot_be_saved_is_refused(output):
    model = packed_flux("Q4_K").clone()
    model.add_object_patch("model_sampling", model.get_model_object("model_sampling"))
    assert "not a weight: model_sampling." in saved(model)[1]
    model.set_injections("bypass_lora", [])
    with pytest.raises(SaveError, match="bypass_lora"):
        saved(model)
    assert len(list(output.rglob("*.gguf"))) == 1
