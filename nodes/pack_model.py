"""The node Pack Model (Featherweight)."""
from comfy_api.latest import io

from ..loaders.models.fit_device import FIT
from ..loaders.models.pack_model import pack_model
from ..loaders.models.pack_on_load import LOAD_TYPES
from .load_diffusion_model import DEFAULT_SIZE, MIX, packed_type, size_input
from .node_text import loader_output

STAY, ROUND_IN = "stay LoRAs (exact)", "round in"


class PackModel(io.ComfyNode):
    """Packs the weights of any MODEL in memory; the MODEL itself stays as it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightPackModel",
            display_name="Pack Model (Featherweight)",
            category="Featherweight",
            description="Makes a packed copy of any model, whatever loaded or merged it: for a"
            " model from another pack's loader, or a merge. The model before it stays as it is.",
            search_aliases=[
                "pack model",
                "pack merge",
                "shrink model",
                "fit model",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any diffusion model, with or without LoRAs. Merged models become one.",
                ),
                io.Combo.Input(
                    "pack_to",
                    options=[FIT, *LOAD_TYPES, MIX],
                    default=FIT,
                    optional=True,
                    display_name="pack to",
                    tooltip="What the large weights become (minutes, once). Start with fit this"
                    " GPU. Weights that are quantized already, as of a GGUF, stay so, unless they"
                    " must shrink or the type is ComfyUI's own.",
                ),
                size_input(),
                io.Combo.Input(
                    "loras",
                    options=[STAY, ROUND_IN],
                    default=STAY,
                    optional=True,
                    advanced=True,
                    display_name="LoRAs",
                    tooltip="Of the LoRAs before this node. stay LoRAs (exact): added at each step,"
                    " exactly. round in: they become part of the packed weights, which costs each"
                    " step nothing, and some of their effect.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, pack_to=FIT, size_gb=DEFAULT_SIZE, loras=STAY) -> io.NodeOutput:
        target = packed_type(pack_to, size_gb)
        packed = model if target is None else pack_model(model, target, loras == ROUND_IN)
        return io.NodeOutput(*loader_output(model=packed))
