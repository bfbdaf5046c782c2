"""The node Load Diffusion Model (GGUF, Featherweight)."""
import math
from collections.abc import Sequence

from comfy_api.latest import io

from ..loaders.byte_sizes import GB
from ..loaders.comfyui.compute import (
    AUTOMATIC,
    COMPUTE_CHOICES,
    EXACT,
    FOLLOW_COMPUTE,
    HOST_FORMATS_CHOICES,
)
from ..loaders.container.weight_file import WeightFileError
from ..loaders.models.diffusion import load_diffusion_model
from ..loaders.models.fit_device import FIT, faster_type_text
from ..loaders.models.pack_on_load import LOAD_TYPES, PackTo
from ..loaders.paths.folders import DIFFUSION_MODEL, find_file, list_files
from .added_inputs import added_combo
from .file_inputs import file_input, file_options, list_options
from .node_text import loader_output
from .renamed_options import current, renamed_combo
from .search_words import MODEL_WORDS, family_aliases

FOLDERS = ("unet_gguf", "diffusion_models")
NO_CHANGE = "no change"
MIX = "mix for a size"  # in place of a type
RENAMED_PACK_TO = {"as the file": NO_CHANGE, "size in GB": MIX}
DEFAULT_SIZE = 6.0  # in GB
NO_MODULE = "none"


def compute_input(what: str = "the model", options: Sequence[str] = COMPUTE_CHOICES):
    """Returns the input that chooses between exact and fast.

    Args:
        what: what is loaded, for the text.
        options: of `COMPUTE_CHOICES`.
    """
    return io.Combo.Input(
        "compute",
        options=list(options),
        default=AUTOMATIC,
        optional=True,
        advanced=True,
        tooltip=f"How {what} is computed. automatic: right for most. exact: by the values in the"
        " file. fast: may be faster, but each layer is about 1.2 % off. The help page says more.",
    )


def pack_to_input(what: str, fits: bool = False):
    """Returns the input for packing while loading.

    Args:
        what: the part that is packed, for the text.
        fits: whether it can be packed to fit the GPU, or to a size.
    """
    return renamed_combo(
        "pack_to",
        [NO_CHANGE, FIT, *LOAD_TYPES, MIX] if fits else [NO_CHANGE, *LOAD_TYPES],
        RENAMED_PACK_TO if fits else {"as the file": NO_CHANGE},
        default=NO_CHANGE,
        optional=True,
        display_name="pack to",
        tooltip=f"Makes {what} smaller in memory while it loads (minutes, once)."
        f"{' Start with fit this GPU.' if fits else ''} A quantized file (a GGUF) stays as"
        f" it is, unless {'it must shrink or ' if fits else ''}the type is ComfyUI's own.",
    )


def size_input(tooltip: str = "With mix for a size at pack to: how large the weights may be in"
               " memory, in GB of 10^9 bytes; 6 by default."):
    """Returns the input for the size that is met with MIX, which `web/input_visibility.js` shows
    only where that is chosen. tooltip: the text."""
    return io.Float.Input(
        "size_gb",
        default=DEFAULT_SIZE,
        min=0.001,
        max=1000.0,
        step=0.001,
        optional=True,
        display_name="size in GB",
        tooltip=tooltip,
    )


def size_in_bytes(size_gb: float, expected: str = "how large the weights may be") -> int:
    """Returns a size in GB as bytes.

    Args:
        size_gb: of `size_input`.
        expected: what the size is, for the message.

    Raises:
        WeightFileError: if it is not a size.
    """
    if not 0 < size_gb * GB < math.inf:
        raise WeightFileError(f"size in GB is {size_gb}; expected {expected}, such as 6.")
    return max(1, round(size_gb * GB))


def host_formats_input():
    """Returns the hidden input in which older workflows chose who computes ComfyUI's formats."""
    return added_combo(
        "host_formats",
        HOST_FORMATS_CHOICES,
        earlier=AUTOMATIC,
        default=FOLLOW_COMPUTE,
        advanced=True,
        display_name="fp8, nvfp4, int8 computed by",
        extra_dict={"hidden": True},
        tooltip="Who computes layers in ComfyUI's own quantized formats, in workflows of earlier"
        " versions. by compute: what the input compute says.",
    )


def packed_type(pack_to: str, size_gb: float = DEFAULT_SIZE) -> PackTo | None:
    """Returns the loaders' `pack_to` for an option of that input, and a size in GB."""
    pack_to = current(pack_to, RENAMED_PACK_TO)
    if pack_to == MIX:
        return size_in_bytes(size_gb)
    return None if pack_to == NO_CHANGE else pack_to


def picked_module(name: str | None) -> str | None:
    """Returns the file for an option of the input for modules, None for none."""
    return None if name == NO_MODULE else name


def disable_dynamic_vram_input():
    """Returns the input that keeps one model out of dynamic VRAM."""
    return io.Boolean.Input(
        "disable_dynamic_vram",
        default=False,
        optional=True,
        advanced=True,
        display_name="disable dynamic VRAM",
        tooltip="Keeps what is loaded here out of ComfyUI's dynamic VRAM. ComfyUI then estimates"
        " before each run how much of it fits on the GPU. Try it if a model is slow or runs out of"
        " memory. Has no effect if ComfyUI runs without dynamic VRAM.",
    )


class LoadDiffusionModel(io.ComfyNode):
    """Loads a diffusion model and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        files = list_files(*FOLDERS)
        return io.Schema(
            node_id="FeatherweightLoadDiffusionModel",
            display_name="Load Diffusion Model (GGUF, Featherweight)",
            category="Featherweight",
            description="Loads any diffusion model that ComfyUI knows from a quantized file"
            " (GGUF, NF4, FP4, int8, fp8, SDNQ, SVDQuant, GPTQ, AWQ …) and keeps its weights packed"
            " in memory. Other files load as with ComfyUI's own loader.",
            search_aliases=[
                "unet",
                "unet loader",
                "load nf4",
                *family_aliases(),
                *MODEL_WORDS,
            ],
            inputs=[
                file_input(
                    "model_name",
                    list_options(*FOLDERS, model_class=DIFFUSION_MODEL),
                    display_name="model",
                    tooltip="A file in models/diffusion_models or models/unet, or a folder that"
                    " diffusers saved there (…/transformer).",
                ),
                compute_input(),
                disable_dynamic_vram_input(),
                pack_to_input("the model", fits=True),
                host_formats_input(),
                io.Combo.Input(
                    "module_name",
                    options=file_options([NO_MODULE, *files], FOLDERS),
                    default=NO_MODULE,
                    optional=True,
                    advanced=True,
                    display_name="module",
                    tooltip="A file in models/diffusion_models or models/unet with further layers"
                    " for the model, such as the VACE module for Wan. Both are loaded as one model,"
                    " and each may be in a format of its own.",
                ),
                size_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model_name,
        compute=EXACT,  # of prompts from before 0.2.2; new nodes send their default
        disable_dynamic_vram=False,
        pack_to=NO_CHANGE,
        host_formats=AUTOMATIC,
        module_name=NO_MODULE,
        size_gb=DEFAULT_SIZE,
    ) -> io.NodeOutput:
        extra = picked_module(module_name)
        model = load_diffusion_model(
            find_file(model_name, *FOLDERS),
            compute=compute,
            disable_dynamic=disable_dynamic_vram,
            pack_to=packed_type(pack_to, size_gb),
            host_formats=host_formats,
            extra=extra and find_file(extra, *FOLDERS),
        )
        return io.NodeOutput(*loader_output(faster_type_text(model, compute), model=model))
