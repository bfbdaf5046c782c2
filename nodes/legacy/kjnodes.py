"""The GGUF loader of ComfyUI-KJNodes, with the same inputs in the same order, so that shared
workflows open and run."""
import comfy.cli_args
import comfy.ldm.modules.attention
import torch
from comfy_api.latest import io

from ...loaders.folders import find_file, list_files, validate_files
from ..node_text import loader_output
from .gguf import CLIP_FOLDERS, FOLDERS, dtype_inputs, load_model, model_input

NONE = "none"
# as the host calls them
ATTENTION = {"sdpa": "pytorch", "sageattn": "sage", "xformers": "xformers", "flashattn": "flash"}


class GGUFLoader(io.ComfyNode):
    HELP_PAGE = "LegacyLoaders"

    @classmethod
    def define_schema(cls):
        connectors = [name for name in list_files(*CLIP_FOLDERS) if "connector" in name.lower()]
        return io.Schema(
            node_id="GGUFLoaderKJ",
            display_name="GGUF Loader KJ",
            category="Featherweight/legacy",
            description="The GGUF loader of KJNodes workflows, which needs no ComfyUI-GGUF here.",
            inputs=[
                model_input("model_name"),
                io.Combo.Input(
                    "extra_model_name",
                    default=NONE,
                    optional=True,
                    options=[*list_files(*FOLDERS), *connectors, NONE],
                    tooltip="A file with further layers of the model, such as VACE's, or LTX-2's"
                            " connector.",
                ),
                *dtype_inputs(),
                io.Boolean.Input(
                    "enable_fp16_accumulation",
                    default=False,
                    optional=True,
                    tooltip="Let CUDA sum products of fp16 in fp16, in everything that runs after"
                    " this: faster and rougher.",
                ),
                io.Combo.Input(
                    "attention_override",
                    options=[NONE, *ATTENTION],
                    default=NONE,
                    optional=True,
                    tooltip="Compute the model's attention by this library, where ComfyUI has it.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, extra_model_name=NONE):
        extra = None if extra_model_name == NONE else extra_model_name
        return validate_files(model_name, extra, keys=(*FOLDERS, *CLIP_FOLDERS))

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
        extra = (
            None
            if extra_model_name in (NONE, None)
            else find_file(extra_model_name, *FOLDERS, *CLIP_FOLDERS)
        )
        model = load_model(model_name, dequant_dtype, patch_dtype, extra=extra)
        notes = [
            accumulate_in_fp16(enable_fp16_accumulation),
            override_attention(model, attention_override),
        ]
        return io.NodeOutput(*loader_output(*notes, model=model))


def accumulate_in_fp16(wanted: bool) -> str | None:
    """Set torch's switch for everything that runs after this. Returns why it cannot be set, where
    it is wanted."""
    switches = torch.backends.cuda.matmul
    if not hasattr(switches, "allow_fp16_accumulation"):
        return (
            "enable_fp16_accumulation needs PyTorch 2.7.1 or newer; it has no effect."
            if wanted
            else None
        )
    # as ComfyUI was started
    at_start = comfy.cli_args.PerformanceFeature.Fp16Accumulation in comfy.cli_args.args.fast
    switches.allow_fp16_accumulation = wanted or at_start
    return None


def override_attention(model, name: str) -> str | None:
    """Make a model compute attention by a library. Returns why not, where ComfyUI has not got
    it."""
    if name not in ATTENTION:
        return None
    chosen = comfy.ldm.modules.attention.get_attention_function(ATTENTION[name], None)
    if chosen is None:
        return f"This ComfyUI has no {name} installed, so attention_override has no effect."
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda replaced, *args, **kwargs: chosen(
        *args, **kwargs
    )
    return None
