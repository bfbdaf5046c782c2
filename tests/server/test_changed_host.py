"""A ComfyUI that has lost something the pack relies on: one sentence, no traceback, and only what
needs it is left out."""
import pytest
from pack_nodes import node_list

from devtools import ROOT, demo
from devtools.files import demo_files
from devtools.host.server import PACK, Server, link_or_copy

OWN_LOADER = "FeatherweightLoadDiffusionModel"
NODES = {node.GET_SCHEMA().node_id for node in node_list()}
LORA_NODES = {"FeatherweightApplyLora", "FeatherweightCheckLora",
              *(name for name in NODES if name.startswith("Nunchaku"))}
# What another pack, loaded before this one, does to the host; what is said of it; the nodes that
# go; whether texts on nodes do.
CHANGES = {
    "some": ("""
import sys, comfy_execution.utils
sys.modules['comfy.lora_convert'] = None
del comfy_execution.utils.get_executing_context""", [
        "relies on (import of comfy.lora_convert halted; None in sys.modules). So these nodes are"
        " left out: apply lora, check lora, legacy nunchaku. Update both, with the packages in"
        " their requirements.txt.",
        "relies on (cannot import name 'get_executing_context' from 'comfy_execution.utils'"
    ], LORA_NODES), "everything": ("""
import comfy_kitchen.tensor
del comfy_kitchen.tensor.register_layout_class""", [
        "lacks what all nodes of Featherweight need (cannot import name 'register_layout_class'"
        " from 'comfy_kitchen.tensor'"
    ], NODES)
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_is_missing_turns_off_only_what_needs_it(part, server, tmp_path):
    change, said, gone = CHANGES[part]
    demo_files.write_model(tmp_path / "base" / "models" / "diffusion_models" / demo.MODEL_NAME,
                           "Q8_0")
    late = tmp_path / "late"  # folders of a yaml come after those of the base
    late.mkdir()
    link_or_copy(ROOT, late / PACK)
    (tmp_path / "paths.yaml").write_text(f"late:\n  custom_nodes: {late.as_posix()}\n")
    arguments = ["--extra-model-paths-config", str(tmp_path / "paths.yaml")]
    planted = {"changes_the_host": f"{change}\nNODE_CLASS_MAPPINGS = {{}}\n"}
    with Server(tmp_path / "base", with_pack=False, extra_custom_nodes=planted,
                arguments=arguments) as changed:
        ours, all_ours = ({
            name for name, node in each.object_info().items() if PACK in node["python_module"]
        } for each in (changed, server))
        if OWN_LOADER in ours:
            for compute in ("exact", "int8"):  # what a node asks for each time is told once
                inputs = {"model_name": demo.MODEL_NAME, "compute": compute}
                run = changed.queue({
                    "1": {"class_type": OWN_LOADER, "inputs": inputs},
                    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
                })
                assert not run.texts.get("1")
        log = changed.log()
    assert all_ours == NODES and ours == NODES - gone
    lines = [line for line in log.splitlines() if " lacks what " in line]
    assert len(lines) == len(said) and all(line.endswith("requirements.txt.") for line in lines)
    assert all(sum(words in line for line in lines) == 1 for words in said)
    assert "Traceback" not in log and "could not be loaded" not in log
    assert ("IMPORT FAILED" in log) == (gone == NODES)


def test_an_unchanged_host_is_told_nothing(server):
    server.object_info()
    assert " lacks what " not in server.log()
