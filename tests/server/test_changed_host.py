"""A ComfyUI that has lost something the pack relies on: one sentence, no traceback, and only what needs it is left out."""
import pytest

from devtools import ROOT, demo
from devtools.files import demo_files
from devtools.host.server import PACK, Server

OWN_LOADER = "FeatherweightLoadDiffusionModel"
LORA_NODES = {"FeatherweightApplyLora", "FeatherweightCheckLora"}
ENCODER_NODES = {"FeatherweightLoadTextEncoder", "FeatherweightLoadCheckpoint", "CheckpointLoaderNF4", "UNETLoaderNF4",
                 "CLIPLoaderGGUF", "DualCLIPLoaderGGUF", "TripleCLIPLoaderGGUF", "QuadrupleCLIPLoaderGGUF"}
CHANGES = {  # what another pack, loaded before this one, does to the host; what the sentence says; the nodes that go
    "LoRA": ("import comfy.lora_convert\ndel comfy.lora_convert.convert_lora",
             "comfy.lora_convert.convert_lora is gone. So 3 nodes are left out: Apply LoRA (Featherweight),",
             {*LORA_NODES, "FeatherweightInspectModelFile"}),
    "text encoders": ("import comfy.sd\nload = comfy.sd.load_clip\n"
                      "comfy.sd.load_clip = lambda ckpt_paths, embedding_directory=None: load(ckpt_paths, embedding_directory)",
                      "comfy.sd.load_clip takes other parameters (too many positional arguments). So 8 nodes are left out:",
                      ENCODER_NODES),
    "texts": ("import comfy_execution.utils\ndel comfy_execution.utils.get_executing_context",
              "comfy_execution.utils.get_executing_context is gone. So nodes show no text on themselves.", set()),
    "everything": ("import comfy_kitchen.tensor\ndel comfy_kitchen.tensor.register_layout_op",
                   "comfy_kitchen.tensor.register_layout_op is gone. So 16 nodes are left out:", None),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    demo_files.write_model(base / "models" / "diffusion_models" / demo.MODEL_NAME, "Q8_0")
    return base / "models"


@pytest.mark.parametrize("part", CHANGES)
def test_what_is_missing_turns_off_only_what_needs_it(part, models, server, tmp_path):
    change, said, gone = CHANGES[part]
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
    assert ours == (set() if gone is None else all_ours - gone)
    lines = [line for line in log.splitlines() if "[Featherweight] ComfyUI" in line]
    assert len(lines) == 1 and said in lines[0] and lines[0].endswith("Update Featherweight.")
    assert "Traceback" not in log and "IMPORT FAILED" not in log and "could not be loaded" not in log


def test_an_unchanged_host_is_told_nothing(server):
    server.object_info()
    assert "relies on" not in server.log()
