"""The node Load Text Encoder (GGUF, Featherweight)."""
from comfy_api.latest import io

from ..loaders.comfyui.compute import AUTOMATIC, CHOICES_OF_SIDE_MODELS
from ..loaders.devices import DEFAULT, device_choices, device_options, find_device
from ..loaders.models.text_encoder import AUTO, AUTOMATIC_TYPE, load_text_encoder
from ..loaders.paths.folders import (
    ENCODER,
    embedding_folders,
    find_file,
    list_files,
    list_model_folders,
)
from .combo_options import encoder_types
from .file_inputs import file_input, file_options, open_options
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
from .search_words import ENCODER_WORDS, family_aliases

FOLDERS = ("clip_gguf", "text_encoders")
NONE = "none"
ORDINALS = {2: "second", 3: "third", 4: "fourth"}


class LoadTextEncoder(io.ComfyNode):
    """Loads one to four text encoders as one CLIP and keeps their packed weights packed."""

    @classmethod
    def define_schema(cls):
        files = list_files(*FOLDERS)
        encoders = [
            *(name for name in files if "mmproj" not in name.lower()),
            *list_model_folders(*FOLDERS, model_class=ENCODER),
        ]

        vision = [AUTO, NONE, *[name for name in files if "mmproj" in name.lower()]]

        def further_input(number: int):
            return io.Combo.Input(
                f"text_encoder_{number}",
                options=file_options([NONE, *encoders], FOLDERS),
                default=NONE,
                optional=True,
                display_name=f"text encoder {number}",
                advanced=number > 2,
                tooltip=f"The {ORDINALS[number]} text encoder of models that have several, such as"
                " CLIP-L next to T5.",
            )

        return io.Schema(
            node_id="FeatherweightLoadTextEncoder",
            display_name="Load Text Encoder (GGUF, Featherweight)",
            category="Featherweight",
            description="Loads one to four text encoders from quantized files (GGUF, NF4, FP4,"
            " int8, fp8, SDNQ, SVDQuant, GPTQ, AWQ …) and plain ones in any mix, and keeps packed"
            " weights packed in memory.",
            search_aliases=[
                "clip",
                "clip loader",
                "load clip",
                "dual clip loader",
                "t5",
                "text encoder",
                "mmproj",
                *family_aliases("clip"),
                *ENCODER_WORDS,
            ],
            inputs=[
                file_input(
                    "text_encoder_1",
                    file_options(encoders, FOLDERS),
                    display_name="text encoder",
                    tooltip="A file in models/text_encoders or models/clip, or a folder that"
                    " transformers saved there (…/text_encoder_2).",
                ),
                io.Combo.Input(
                    "type",
                    options=[AUTOMATIC_TYPE, *encoder_types("CLIPLoader", "DualCLIPLoader")],
                    default=AUTOMATIC_TYPE,
                    optional=True,
                    tooltip="The model the text is encoded for. automatic: the one that these text"
                    " encoders belong to; if several use the same, an error lists the types to"
                    " choose from.",
                ),
                further_input(2),
                further_input(3),
                further_input(4),
                io.Combo.Input(
                    "mmproj",
                    optional=True,
                    advanced=True,
                    default=AUTO,
                    options=file_options(vision, FOLDERS),
                    tooltip="The vision part of an encoder that sees images (Qwen-VL, Gemma 3 …)."
                    " auto: the matching file in the encoder's folder.",
                ),
                io.Combo.Input(
                    "device",
                    options=open_options(device_choices()),
                    default=DEFAULT,
                    optional=True,
                    advanced=True,
                    tooltip="cpu: encode on the CPU and leave the GPU's memory to the diffusion"
                    " model. gpu:N: encode on that GPU, if there are several.",
                ),
                disable_dynamic_vram_input(),
                pack_to_input("the text encoder", fits=True),
                host_formats_input(),
                compute_input("the text encoder", CHOICES_OF_SIDE_MODELS),
                size_input(),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(
        cls,
        text_encoder_1,
        type=AUTOMATIC_TYPE,
        text_encoder_2=NONE,
        text_encoder_3=NONE,
        text_encoder_4=NONE,
        mmproj=AUTO,
        device=DEFAULT,
        disable_dynamic_vram=False,
        pack_to=NO_CHANGE,
        host_formats=AUTOMATIC,
        compute=AUTOMATIC,
        size_gb=DEFAULT_SIZE,
    ) -> io.NodeOutput:
        further = (name or NONE for name in (text_encoder_2, text_encoder_3, text_encoder_4))
        paths = [find_file(name, *FOLDERS) for name in (text_encoder_1, *further) if name != NONE]
        if mmproj == NONE:
            vision = None
        elif mmproj in (AUTO, "", None):
            vision = AUTO
        else:
            vision = find_file(mmproj, *FOLDERS)
        device, note = find_device(device)
        clip = load_text_encoder(
            paths, type, embedding_folders(), vision,
            compute=compute,
            host_formats=host_formats,
            pack_to=packed_type(pack_to, size_gb),
            disable_dynamic=disable_dynamic_vram,
            model_options=device_options(device),
        )
        return io.NodeOutput(*loader_output(note, clip=clip))
