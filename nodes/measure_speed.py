"""The node Measure Speed (Featherweight), which is kept for workflows that have it."""
import json

import torch
from comfy_api.latest import io

from .node_text import show_text

TEXT = ("Measure Speed measures nothing any more: to compare exact with fast, generate with each"
        " and read the seconds of a step (s/it) in ComfyUI's log.")
UNUSED = "Not used any more."


class MeasureSpeed(io.ComfyNode):
    """Says what to use instead of what it did."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightMeasureSpeed",
            display_name="Measure Speed (Featherweight)",
            category="Featherweight/legacy",
            description=TEXT,
            is_deprecated=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=UNUSED),
                io.Conditioning.Input("positive", optional=True, tooltip=UNUSED),
                io.Latent.Input("latent", optional=True, tooltip=UNUSED),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What to use instead."),
                io.Image.Output(display_name="image", tooltip="A black image."),
                io.String.Output(display_name="json", tooltip="What to use instead, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model, positive=None, latent=None) -> io.NodeOutput:
        show_text(TEXT)
        return io.NodeOutput(TEXT, torch.zeros(1, 64, 64, 3), json.dumps(TEXT))
