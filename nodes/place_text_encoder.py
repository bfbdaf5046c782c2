"""Featherweight Place Text Encoder."""
from comfy_api.latest import io

from ..loaders.devices import CPU
from ..loaders.placement import place_clip
from .place_model import ALL, place_and_report, placing_inputs


class PlaceTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightPlaceTextEncoder",
            display_name="Place Text Encoder (Featherweight)",
            category="Featherweight",
            description="Says how much of a text encoder stays on the GPU, and where the rest"
            " lies. It runs once for each prompt, so little is lost where it leaves the GPU to the"
            " diffusion model.",
            search_aliases=[
                "gpu weights",
                "vram",
                "low vram",
                "budget",
                "offload",
                "clip",
                "multigpu",
                "distorch",
                "virtual vram",
                "place text encoder",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, with or without LoRAs."),
                *placing_inputs("the text encoder"),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, gpu_weights=None, store=None, store_gb=None):
        # what this machine has not is said when the node runs, and the picture comes all the same
        return True

    @classmethod
    def execute(cls, clip, gpu_weights, store=str(CPU), store_gb=ALL) -> io.NodeOutput:
        return io.NodeOutput(place_and_report(place_clip, clip, gpu_weights, store, store_gb))
