"""Choices of the host's nodes, as the nodes of either kind state them."""
import comfy.sd
import pytest
from comfy_api.latest import io
from pack_nodes import node_list

import nodes as host_nodes
from featherweight.nodes.combo_options import combo_options, encoder_types

TYPES = ["stable_diffusion", "flux", "one of tomorrow"]


class Older:
    @classmethod
    def INPUT_TYPES(s):
        return {
            "required": {"clip_name": ("STRING",), "type": (TYPES,)},
            "optional": {"device": (["default", "cpu"], {})}
        }


class OlderWithOptions:
    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"clip_name": ("STRING", {}), "type": ("COMBO", {"options": TYPES})},
                "optional": {"device": ("COMBO", {"options": ["default", "cpu"]})}}


class Newer(io.ComfyNode):
    type_input = io.Combo.Input("type", options=TYPES)

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoader", outputs=[io.Clip.Output()], inputs=[
                io.String.Input("clip_name"), cls.type_input,
                io.Combo.Input("device", options=["default", "cpu"], optional=True)
            ])

    @classmethod
    def execute(cls, clip_name, type, device="default"):
        return io.NodeOutput(None)


class NewerWithInputsForEach(Newer):
    type_input = io.DynamicCombo.Input("type",
                                       options=[io.DynamicCombo.Option(name, []) for name in TYPES])


KINDS = [Older, OlderWithOptions, Newer, NewerWithInputsForEach]


@pytest.mark.parametrize("node", KINDS)
def test_choices_are_read_from_either_kind_of_node(node):
    assert combo_options(node, "type") == TYPES
    assert combo_options(node, "device") == ["default", "cpu"]
    assert combo_options(node, "clip_name") == combo_options(node, "of no node") == []


@pytest.mark.parametrize("node", KINDS)
def test_our_loaders_offer_what_the_hosts_loader_offers(node, monkeypatch):
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "CLIPLoader", node)
    found = {loader.GET_SCHEMA().node_id: combo_options(loader, "type") for loader in node_list()}
    assert found["CLIPLoaderGGUF"] == TYPES
    assert (
        found["FeatherweightLoadTextEncoder"][:4] == ["automatic", *TYPES]
        and "sdxl" in found["FeatherweightLoadTextEncoder"]
    )


@pytest.mark.parametrize("node_id", ["CLIPLoader", "DualCLIPLoader"])
def test_the_installed_hosts_loaders_have_types(node_id):
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    types = combo_options(node, "type")
    assert len(types) > 5 and "flux" in {
        *types,
        *combo_options(host_nodes.NODE_CLASS_MAPPINGS["DualCLIPLoader"], "type"),
    }
    if not hasattr(node, "GET_SCHEMA"):
        assert types == node.INPUT_TYPES()["required"]["type"][0]


def test_a_host_without_the_loader_or_its_input_offers_every_type_it_knows(monkeypatch):
    known = {clip_type.name.lower() for clip_type in comfy.sd.CLIPType}
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "CLIPLoader",
                        type("Nothing", (), {"INPUT_TYPES": dict}))
    assert set(encoder_types("CLIPLoader")) == known
    monkeypatch.delitem(host_nodes.NODE_CLASS_MAPPINGS, "CLIPLoader")
    assert set(encoder_types("CLIPLoader")) == known
