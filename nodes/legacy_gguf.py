"""Node ids of ComfyUI-GGUF, with the same inputs in the same order, so that shared workflows open and run.

Scripts and other packs call these classes as Python: `NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(...)`. So what runs
has that name and those parameters, gives a tuple, and is the `FUNCTION`; it is the node's `execute` as well.
"""
import torch
from comfy_api.latest import io

from ..loaders.diffusion import load_diffusion_model
from ..loaders.folders import all_there, find_file, list_files
from .shown import loaded

FOLDERS = ("unet_gguf", "diffusion_models")
CATEGORY = "Featherweight/legacy"

# "default" and "target" both mean the dtype the model computes in: values are unpacked in float32 and rounded once.
DTYPES = {"default": None, "target": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(unet_name: str, dequant_dtype: str | None, patch_dtype: str | None) -> tuple:
    dequant_dtype, patch_dtype = (DTYPES[name or "default"] for name in (dequant_dtype, patch_dtype))
    return loaded(model=load_diffusion_model(find_file(unet_name, *FOLDERS), dequant_dtype, patch_dtype))


def model_name_input(name: str = "unet_name"):
    return io.Combo.Input(name, options=list_files(*FOLDERS), tooltip="A file in models/diffusion_models or models/unet.")


def dtype_inputs() -> list:
    dtypes = list(DTYPES)
    return [
        io.Combo.Input("dequant_dtype", options=dtypes, default="default", optional=True,
                       tooltip="Round unpacked weights to this dtype before they are used. default and target: straight to the"
                               " dtype the model computes in, which is the most exact."),
        io.Combo.Input("patch_dtype", options=dtypes, default="default", optional=True,
                       tooltip="The dtype in which patches are added to an unpacked weight. default and target: ComfyUI's"
                               " choice."),
        io.Boolean.Input("patch_on_device", default=False, optional=True,
                         tooltip="Kept for old workflows. ComfyUI places patches by itself."),
    ]


class UnetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUF",
            display_name="Unet Loader (GGUF)",
            category=CATEGORY,
            description="The loader of ComfyUI-GGUF workflows. Same as Load Diffusion Model (Featherweight).",
            inputs=[model_name_input()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return all_there(unet_name, keys=FOLDERS)

    @classmethod
    def load_unet(cls, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None) -> tuple:
        return load(unet_name, dequant_dtype, patch_dtype)

    FUNCTION, execute = "load_unet", load_unet


class UnetLoaderAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFAdvanced",
            display_name="Unet Loader (GGUF/Advanced)",
            category=CATEGORY,
            description="The advanced loader of ComfyUI-GGUF workflows, with a choice of dtypes.",
            inputs=[model_name_input(), *dtype_inputs()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return all_there(unet_name, keys=FOLDERS)

    @classmethod
    def load_unet(cls, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None) -> tuple:
        return load(unet_name, dequant_dtype, patch_dtype)

    FUNCTION, execute = "load_unet", load_unet
