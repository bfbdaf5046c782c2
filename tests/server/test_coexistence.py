"""Beside other packs: one that owns the same ids keeps them, whichever loads first; loaders of many
LoRAs work on ours."""
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from cloned_packs import PACKS, cloned

from devtools import ROOT, demo
from devtools.files import demo_files
from devtools.host.server import PACK, Server
from devtools.workflows.api_format import to_api

# What matters of ComfyUI-GGUF: it owns the ids, and makes two folder keys share one list.
GGUF_IDS = (
    "UnetLoaderGGUF",
    "UnetLoaderGGUFAdvanced",
    "CLIPLoaderGGUF",
    "DualCLIPLoaderGGUF",
    "TripleCLIPLoaderGGUF",
    "QuadrupleCLIPLoaderGGUF",
)
OTHER_PACK = f'''
IDS = {GGUF_IDS}
''' + '''
import folder_paths

for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
    folders = folder_paths.folder_names_and_paths[host_key][0]
    folder_paths.folder_names_and_paths[key] = (folders, {".gguf"})


class UnetLoaderGGUF:
    CATEGORY = "other"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}


NODE_CLASS_MAPPINGS = {name: type(name, (UnetLoaderGGUF,), {}) for name in IDS}
'''

def write_paths(folder: Path, packs: Iterable[Path]) -> list[str]:
    """The host's arguments for further folders of packs, which it reads after the first, in this
    order."""
    text = "".join(f"{path.name}:\n  custom_nodes: {path.as_posix()}\n" for path in packs)
    (folder / "paths.yaml").write_text(text)
    return ["--extra-model-paths-config", str(folder / "paths.yaml")]


@pytest.fixture(
    scope="module",
    params=[(False, "zz.old copy", "Featherweight"), (True, PACK, "comfyui-featherweight")],
    ids=["other pack first", "ours first"],
)
def beside(request, tmp_path_factory):
    """(whether another pack loads after ours, folder of the copy of ours that loads first, folder
    of another copy of ours, what the server says of its nodes, its log). The other pack owns some
    of our ids."""
    is_first, name, another = request.param
    folder = tmp_path_factory.mktemp("beside")
    base, late, last = folder / "base", folder / "late", folder / "last"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "demo_*", "devtools", "tests", "media")
    used = base / "custom_nodes" / name if is_first else late / name
    if not is_first:  # else the server plants it
        shutil.copytree(ROOT, used, ignore=left_out)
    late.mkdir(exist_ok=True)
    shutil.copytree(ROOT, last / another, ignore=left_out)
    if is_first:
        (late / "other_pack.py").write_text(OTHER_PACK)
    model = base / "models" / "diffusion_models" / "listed.gguf"
    model.parent.mkdir(parents=True)
    model.touch()
    with Server(base, with_pack=is_first,
                extra_custom_nodes=None if is_first else {"other_pack": OTHER_PACK},
                arguments=write_paths(folder, [late, last])) as server:
        yield is_first, used, last / another, server.object_info(), server.log()


def test_another_packs_loader_stays_and_both_list_files(beside):
    is_first, _, _, info, log = beside
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    for name in GGUF_IDS:
        assert info[name]["category"] == "other"
        assert (f"{name} is provided by another node pack" in log) == (not is_first)
    assert info["CheckpointLoaderNF4"]["category"].startswith("Featherweight")
    assert "listed.gguf" in info["UnetLoaderGGUF"]["input"]["required"]["unet_name"][0]
    assert (
        "listed.gguf"
        in info["FeatherweightLoadDiffusionModel"]["input"]["required"]["model_name"][1]["options"]
    )


def test_of_two_copies_the_first_is_used_and_the_second_says_which_to_remove(beside):
    _, used, unused, info, log = beside
    ours = {name: node["python_module"] for name, node in info.items() if "eatherweight" in name}
    lines = [line for line in log.splitlines() if "installed twice" in line]
    assert len(lines) == 1 and "[Featherweight]" in lines[0]
    assert f"the nodes of {used} are in use, so remove the other folder, {unused}." in lines[0]
    assert "FeatherweightLoadDiffusionModel" in ours and set(ours.values()) == {
        f"custom_nodes.{used.name}"
    }


STRENGTHS = dict(zip(demo_files.LORAS.values(), (0.8, 0.5)))
# As nodes of many LoRAs take them, ours for tests and rgthree's.
MANY = {f"lora_{index}": {"on": True, "lora": name, "strength": strength}
        for index, (name, strength) in enumerate(STRENGTHS.items(), 1)}


def drawn(server: Server, **added: dict) -> np.ndarray:
    """The demo's picture in two steps, with nodes in a row between its model and its sampler.
    added: id -> class and inputs, without the model."""
    prompt = to_api(json.loads(demo.WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    sampler = next(node for node in prompt.values() if node["class_type"] == "KSampler")["inputs"]
    sampler["steps"] = 2
    for name, (class_type, inputs) in added.items():
        prompt[name] = {"class_type": class_type, "inputs": inputs | {"model": sampler["model"]}}
        sampler["model"] = [name, 0]
    return server.pixels(server.queue(prompt))


def chain() -> dict[str, tuple]:
    """ComfyUI's loaders of these LoRAs."""
    loras = ({"lora_name": name, "strength_model": size} for name, size in STRENGTHS.items())
    return {f"chain{index}": ("LoraLoaderModelOnly", lora) for index, lora in enumerate(loras)}


def test_a_node_of_many_loras_does_what_the_hosts_loaders_do_in_a_row(server):
    expected = drawn(server, **chain())
    assert np.abs(expected - drawn(server)).mean() > 0.1
    for directly in (False, True):
        many = drawn(server, many=("ManyLoras", {"directly": directly, **MANY}))
        assert np.array_equal(many, expected)


@pytest.mark.heavy
def test_with_other_packs_installed_pictures_are_the_same_bit_for_bit(server, tmp_path):
    """With all that are cloned into .dev/packs, and through rgthree's loader of many LoRAs."""
    cloned("rgthree-comfy")
    demo_files.make_models(tmp_path)
    with Server(tmp_path, arguments=write_paths(tmp_path, [PACKS])) as other:
        info = other.object_info()
        assert info["FeatherweightLoadDiffusionModel"]
        assert np.array_equal(drawn(other), drawn(server))
        power = drawn(other, power=("Power Lora Loader (rgthree)", MANY))
        assert np.array_equal(power, drawn(server, **chain()))
        if (PACKS / "ComfyUI-MultiGPU").is_dir():
            assert info["UNETLoaderMultiGPU"]["python_module"].endswith("ComfyUI-MultiGPU")
