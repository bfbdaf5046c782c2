"""Beside other packs: one that owns the same ids keeps them, whichever loads first; loaders of many LoRAs work on ours."""
import json
import shutil

import numpy as np
import pytest

from devtools import ROOT, demo
from devtools.files import demo_files
from devtools.host.server import PACK, Server
from devtools.workflows.api_format import to_api

# What matters of ComfyUI-GGUF: it owns the ids, and makes two folder keys share one list.
GGUF_IDS = ("UnetLoaderGGUF", "UnetLoaderGGUFAdvanced", "CLIPLoaderGGUF", "DualCLIPLoaderGGUF", "TripleCLIPLoaderGGUF",
            "QuadrupleCLIPLoaderGGUF")
OTHER_PACK = f'''
IDS = {GGUF_IDS}
''' + '''
import folder_paths

for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
    folder_paths.folder_names_and_paths[key] = (folder_paths.folder_names_and_paths[host_key][0], {".gguf"})


class UnetLoaderGGUF:
    CATEGORY = "other"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}


NODE_CLASS_MAPPINGS = {name: type(name, (UnetLoaderGGUF,), {}) for name in IDS}
'''

# A node that takes any number of LoRAs as inputs of its own naming, and applies each as the host's node does.
MANY_LORAS = '''
import comfy.sd
import comfy.utils
import folder_paths
from nodes import LoraLoader


class Flexible(dict):
    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return super().get(name, ("*",))


class ManyLoras:
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "other"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"directly": ("BOOLEAN",)}, "optional": Flexible(model=("MODEL",), clip=("CLIP",)), "hidden": {}}

    def load(self, directly, model=None, clip=None, **loras):
        for name, entry in loras.items():
            if not (name.startswith("lora_") and entry["on"]):
                continue
            if directly:
                lora = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", entry["lora"]), safe_load=True)
                model, clip = comfy.sd.load_lora_for_models(model, clip, lora, entry["strength"], entry["strength"])
            else:
                model, clip = LoraLoader().load_lora(model, clip, entry["lora"], entry["strength"], entry["strength"])
        return model, clip


NODE_CLASS_MAPPINGS = {"ManyLoras": ManyLoras}
'''


@pytest.mark.parametrize("first", ["other", "ours"])
def test_another_packs_loader_stays_and_both_list_files(tmp_path, first):
    # Folders of the base come before those of the yaml; within one folder the order is the file system's.
    late = tmp_path / "late"
    late.mkdir()
    (tmp_path / "paths.yaml").write_text(f"late:\n  custom_nodes: {late.as_posix()}\n")
    other = {"other_pack": OTHER_PACK}
    if first == "ours":
        (late / "other_pack.py").write_text(OTHER_PACK)
    else:
        (late / PACK).symlink_to(ROOT, target_is_directory=True)
    base = tmp_path / "base"
    model = base / "models" / "diffusion_models" / "listed.gguf"
    model.parent.mkdir(parents=True)
    model.touch()
    with Server(base, with_pack=first == "ours", extra_custom_nodes=other if first == "other" else None,
                arguments=["--extra-model-paths-config", str(tmp_path / "paths.yaml")]) as server:
        info = server.object_info()
        log = server.log()
    assert "IMPORT FAILED" not in log
    for name in GGUF_IDS:
        assert info[name]["category"] == "other"
        assert (f"{name} is provided by another node pack" in log) == (first == "other")
    assert info["CheckpointLoaderNF4"]["category"].startswith("Featherweight")
    assert "listed.gguf" in info["UnetLoaderGGUF"]["input"]["required"]["unet_name"][0]
    assert "listed.gguf" in info["FeatherweightLoadDiffusionModel"]["input"]["required"]["model_name"][1]["options"]


@pytest.mark.parametrize("first, second", [(PACK, "comfyui-featherweight"), ("a copy", PACK), ("zz.old", "Featherweight")])
def test_of_two_copies_the_first_is_used_and_the_second_says_which_to_remove(tmp_path, first, second):
    # Folders of the base come before those of the yaml.
    base, late = tmp_path / "base", tmp_path / "late"
    (tmp_path / "paths.yaml").write_text(f"late:\n  custom_nodes: {late.as_posix()}\n")
    used, unused = base / "custom_nodes" / first, late / second
    left_out = shutil.ignore_patterns(".*", "__pycache__", "demo_*", "devtools", "tests", "media")
    for folder in (used, unused)[first == PACK:]:  # the server plants the one of that name
        shutil.copytree(ROOT, folder, ignore=left_out)
    arguments = ["--extra-model-paths-config", str(tmp_path / "paths.yaml")]
    with Server(base, with_pack=first == PACK, arguments=arguments) as server:
        ours = {name: node["python_module"] for name, node in server.object_info().items() if "eatherweight" in name}
        log = server.log()
    assert "Traceback" not in log and "IMPORT FAILED" not in log
    lines = [line for line in log.splitlines() if "installed twice" in line]
    assert len(lines) == 1 and "[Featherweight]" in lines[0]
    assert f"the nodes of {used} are in use, so remove the other folder, {unused}." in lines[0]
    assert "FeatherweightLoadDiffusionModel" in ours and set(ours.values()) == {f"custom_nodes.{first}"}


def test_a_node_of_many_loras_does_what_the_hosts_loaders_do_in_a_row(tmp_path):
    demo_files.make_models(tmp_path)
    strengths = dict(zip(demo_files.LORAS.values(), (0.8, 0.5)))
    pictures = {}
    with Server(tmp_path, extra_custom_nodes={"many_loras": MANY_LORAS}) as server:
        plain = to_api(json.loads(demo.WORKFLOW.read_text(encoding="utf-8")), server.object_info())
        sampler = next(node for node in plain.values() if node["class_type"] == "KSampler")
        model = sampler["inputs"]["model"]
        many = {f"lora_{index}": {"on": True, "lora": name, "strength": strength}
                for index, (name, strength) in enumerate(strengths.items(), 1)}
        chain = {f"chain{index}": {"class_type": "LoraLoaderModelOnly", "inputs": {
            "model": model if index == 0 else [f"chain{index - 1}", 0], "lora_name": name, "strength_model": strength}}
            for index, (name, strength) in enumerate(strengths.items())}
        added = {"none": ({}, model), "chain": (chain, [list(chain)[-1], 0])}
        for directly in (False, True):
            inputs = {"directly": directly, "model": model, **many}
            added[f"many, {directly}"] = {"many": {"class_type": "ManyLoras", "inputs": inputs}}, ["many", 0]
        for name, (nodes, source) in added.items():
            sampler["inputs"] |= {"model": source, "steps": 2}
            pictures[name] = server.pixels(server.queue(plain | nodes))
    assert np.abs(pictures["chain"] - pictures["none"]).mean() > 0.1
    for directly in (False, True):
        assert np.array_equal(pictures[f"many, {directly}"], pictures["chain"])
