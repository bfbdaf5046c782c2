"""A ComfyUI that has lost something the pack relies on: one sentence, no traceback, and only what needs it is left out."""
import pytest
from pack_nodes import node_list

from devtools import ROOT, demo
from devtools.files import demo_files
from devtools.host.server import PACK, Server

OWN_LOADER = "FeatherweightLoadDiffusionModel"
LORA_FILES = {"apply_lora", "check_lora"}
ENCODER_FILES = {"load_text_encoder", "load_checkpoint", "legacy_calcuis", "legacy_gguf_clip", "legacy_multigpu",
                 "legacy_multigpu_checkpoint", "legacy_multigpu_distorch", "legacy_multigpu_distorch2", "legacy_nf4",
                 "legacy_sp"}
NODES = {node.GET_SCHEMA().node_id: node.__module__.rpartition(".")[2] for node in node_list()}
# What another pack, loaded before this one, does to the host; what the sentence says; the files of nodes that go.
CHANGES = {
    "LoRA": ("import comfy.lora_convert\ndel comfy.lora_convert.convert_lora",
             "comfy.lora_convert.convert_lora is gone. So 2 nodes are left out: Apply LoRA (Featherweight),", LORA_FILES),
    "text encoders": ("import comfy.sd\nload = comfy.sd.load_clip\n"
                      "comfy.sd.load_clip = lambda ckpt_paths, embedding_directory=None: load(ckpt_paths, embedding_directory)",
                      "comfy.sd.load_clip takes other parameters (too many positional arguments). So {count} nodes are left"
                      " out:", ENCODER_FILES),
    "texts": ("import comfy_execution.utils\ndel comfy_execution.utils.get_executing_context",
              "comfy_execution.utils.get_executing_context is gone. So nodes show no text on themselves.", set()),
    "everything": ("import comfy_kitchen.tensor\ndel comfy_kitchen.tensor.register_layout_op",
                   "comfy_kitchen.tensor.register_layout_op is gone. So {count} nodes are left out:", set(NODES.values())),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    demo_files.write_model(base / "models" / "diffusion_models" / demo.MODEL_NAME, "Q8_0")
    return base / "models"


@pytest.mark.parametrize("part", ["LoRA", "texts", "everything", pytest.param("text encoders", marks=pytest.mark.heavy)])
def test_what_is_missing_turns_off_only_what_needs_it(part, models, server, tmp_path):
    change, said, files = CHANGES[part]
    gone = {name for name, file in NODES.items() if file in files}
    late = tmp_path / "late"  # folders of a yaml come after those of the base
    late.mkdir()
    (late / PACK).symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "paths.yaml").write_text(
        f"late:\n  custom_nodes: {late.as_posix()}\nmodels:\n  base_path: {models.as_posix()}\n"
        "  diffusion_models: diffusion_models\n")
    arguments = ["--extra-model-paths-config", str(tmp_path / "paths.yaml")]
    planted = {"changes_the_host": f"{change}\nNODE_CLASS_MAPPINGS = {{}}\n"}
    with Server(tmp_path / "base", with_pack=False, extra_custom_nodes=planted, arguments=arguments) as changed:
        ours, all_ours = ({name for name, node in each.object_info().items() if PACK in node["python_module"]}
                          for each in (changed, server))
        if OWN_LOADER in ours:
            run = changed.queue({"1": {"class_type": OWN_LOADER, "inputs": {"model_name": demo.MODEL_NAME}},
                                 "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}})
            assert bool(run.texts.get("1")) == (part != "texts")
        log = changed.log()
    assert all_ours == NODES.keys() and ours == all_ours - gone
    lines = [line for line in log.splitlines() if "[Featherweight] ComfyUI" in line]
    assert len(lines) == 1 and said.format(count=len(gone)) in lines[0] and lines[0].endswith("Update Featherweight.")
    assert "Traceback" not in log and "IMPORT FAILED" not in log and "could not be loaded" not in log


def test_an_unchanged_host_is_told_nothing(server):
    server.object_info()
    assert "relies on" not in server.log()
