"""The node Load Checkpoint (GGUF, Featherweight)."""
from comfy_api.latest import io

from ..loaders.comfyui.compute import AUTOMATIC, EXACT
from ..loaders.models.checkpoint import load_checkpoint
from ..loaders.models.fit_device import faster_type_text
from ..loaders.paths.folders import (
    embedding_folders,
    find_file,
    list_files,
    list_pipeline_folders,
)
from .file_inputs import file_input, file_options
from .load_diffusion_model import (
    DEFAULT_SIZE,
    NO_CHANGE,
    compute_input,
    disable_dynamic_vram_input,
    host_formats_input,
    pack_to_input,
    packed_type,
    size_input,
)
from .node_text import loader_output
from .search_words import CHECKPOINT_WORDS, family_aliases

FOLDERS = ("checkpoints_gguf", "checkpoints", "diffusers")


class LoadCheckpoint(io.ComfyNode):
    """Loads a diffusion model, a text encoder and a VAE from one file or diffusers package."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadCheckpoint",
            display_name="Load Checkpoint (GGUF, Featherweight)",
            category="Featherweight",
            description="Loads a model, its text encoder and its VAE from one quantized file (GGUF,"
            " NF4, FP4, int8, fp8, SDNQ, SVDQuant …) and keeps packed weights packed in memory."
            " Other checkpoints load as with ComfyUI's own loader.",
            search_aliases=[
                "checkpoint",
                "load checkpoint",
                "checkpoint loader",
                "ckpt",
                *family_aliases("checkpoint"),
                *CHECKPOINT_WORDS,
            ],
            inputs=[
                file_input(
                    "checkpoint_name",
                    file_options(
                        [*list_files(*FOLDERS), *list_pipeline_folders(*FOLDERS)], FOLDERS),
                    display_name="checkpoint",
                    tooltip="A file in models/checkpoints, or a diffusers package (a folder with"
                    " transformer, text_encoder, vae …) there or in models/diffusers.",
                ),
                compute_input(),
                disable_dynamic_vram_input(),
                pack_to_input("the diffusion model", fits=True),
                host_formats_input(),
                size_input(),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(
                    tooltip="The text encoder. If the file has none, the node that uses this"
                    " output says so."
                ),
                io.Vae.Output(
                    tooltip="The autoencoder. If the file has none, the node that uses this output"
                    " says so."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        checkpoint_name,
        compute=EXACT,  # of prompts from before 0.2.2; new nodes send their default
        disable_dynamic_vram=False,
        pack_to=NO_CHANGE,
        host_formats=AUTOMATIC,
        size_gb=DEFAULT_SIZE,
    ) -> io.NodeOutput:
        path = find_file(checkpoint_name, *FOLDERS)
        model, clip, vae = load_checkpoint(
            path,
            embedding_folders(),
            compute=compute,
            disable_dynamic=disable_dynamic_vram,
            pack_to=packed_type(pack_to, size_gb),
            host_formats=host_formats,
        )
        note = None if model is None else faster_type_text(model, compute)
        return io.NodeOutput(*loader_output(note, model=model, clip=clip, vae=vae))
