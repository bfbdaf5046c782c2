"""The node Place Text Encoder (Featherweight)."""
from comfy_api.latest import io

from ..loaders.devices import CPU
from ..loaders.models.placement import place_clip
from .place_model import ALL, AUTOMATIC, place_and_report, placing_inputs, validate_sizes


class PlaceTextEncoder(io.ComfyNode):
    """Sets how much of a text encoder stays on the GPU, and where the rest is kept."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightPlaceTextEncoder",
            display_name="Place Text Encoder (Featherweight)",
            category="Featherweight",
            description="Sets how much of a text encoder stays on the GPU, and where the rest is"
            " kept. A text encoder runs once for each prompt, so leaving the GPU to the diffusion"
            " model costs little time.",
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
                *placing_inputs(
                    "the text encoder", "0 leaves the GPU to the diffusion model."
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, gpu_weights=None, store=None, store_gb=None):
        return validate_sizes(gpu_weights, store_gb)

    @classmethod
    def execute(cls, clip, gpu_weights=AUTOMATIC, store=str(CPU), store_gb=ALL) -> io.NodeOutput:
        return io.NodeOutput(place_and_report(place_clip, clip, gpu_weights, store, store_gb))
