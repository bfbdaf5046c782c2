"""The GGUF loader of ComfyUI-KJNodes."""
import comfy.cli_args
import comfy.ldm.modules.attention
import torch
from comfy_api.latest import io

from ...loaders.paths.folders import find_file, list_files
from ..file_inputs import Options, file_options
from ..load_diffusion_model import NO_MODULE as NONE
from ..load_diffusion_model import picked_module
from ..node_text import loader_output
from .inputs import CLIP_FOLDERS, FOLDERS, LegacyInput, make_inputs
from .loaders import load_model

ALL_FOLDERS = (*FOLDERS, *CLIP_FOLDERS)
# option: the host's name of the attention function
ATTENTION = {"sdpa": "pytorch", "sageattn": "sage", "xformers": "xformers", "flashattn": "flash"}


def _extra_files() -> Options:
    """Returns what may have further layers: models, and connectors among text encoders."""
    connectors = [name for name in list_files(*CLIP_FOLDERS) if "connector" in name.lower()]
    return file_options([*list_files(*FOLDERS), *connectors, NONE], ALL_FOLDERS)


# next to those of `inputs.INPUTS`
INPUTS = {
    "extra_model_name": LegacyInput(
        io.Combo, "A file with further layers of the model, such as VACE's, or LTX-2's connector.",
        {"default": NONE}, _extra_files),
    "enable_fp16_accumulation": LegacyInput(
        io.Boolean,
        "Lets CUDA accumulate fp16 products in fp16, in everything that runs after this node:"
        " faster and less exact.", {"default": False}),
    "attention_override": LegacyInput(
        io.Combo, "Computes the model's attention with this library, if it is installed.",
        {"default": NONE}, lambda: [NONE, *ATTENTION]),
}


class GGUFLoader(io.ComfyNode):
    """Loads a diffusion model, with further layers and an attention function if asked for."""

    HELP_PAGE = "LegacyLoaders"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="GGUFLoaderKJ",
            display_name="GGUF Loader KJ",
            category="Featherweight/legacy",
            description="The GGUF loader of KJNodes workflows, which needs no ComfyUI-GGUF here.",
            is_deprecated=True,
            inputs=make_inputs(
                "model_name extra_model_name dequant_dtype patch_dtype patch_on_device"
                " enable_fp16_accumulation attention_override", INPUTS),
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model_name,
        extra_model_name=NONE,
        dequant_dtype="default",
        patch_dtype="default",
        patch_on_device=False,
        enable_fp16_accumulation=False,
        attention_override=NONE,
    ) -> io.NodeOutput:
        extra = picked_module(extra_model_name)
        extra = extra and find_file(extra, *ALL_FOLDERS)
        model = load_model(model_name, extra=extra)
        notes = [
            accumulate_in_fp16(enable_fp16_accumulation),
            override_attention(model, attention_override),
        ]
        return io.NodeOutput(*loader_output(*notes, model=model))


def accumulate_in_fp16(enable: bool) -> str | None:
    """Sets torch's switch for everything that runs after this.

    Returns why the switch has no effect, if it is to be enabled, else None.
    """
    switches = torch.backends.cuda.matmul
    if hasattr(switches, "allow_fp16_accumulation"):
        at_start = comfy.cli_args.PerformanceFeature.Fp16Accumulation in comfy.cli_args.args.fast
        switches.allow_fp16_accumulation = enable or at_start
        return None
    if enable:
        return "enable_fp16_accumulation needs PyTorch 2.7.1 or newer; it has no effect."
    return None


def override_attention(model, name: str) -> str | None:
    """Sets the attention function of a model.

    Args:
        model: a patcher of the host's.
        name: a key of `ATTENTION`; any other name changes nothing.

    Returns:
        Why the function cannot be used, else None.
    """
    if name not in ATTENTION:
        return None
    attention = comfy.ldm.modules.attention.get_attention_function(ATTENTION[name], None)
    if attention is None:
        return f"This ComfyUI has no {name} installed, so attention_override has no effect."
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda original, *args, **kwargs: (
        attention(*args, **kwargs)
    )
    return None
