"""Node ids of ComfyUI-MultiGPU: loaders with virtual VRAM in its first form. The same inputs in the same order.

A class for each, for ComfyUI Manager reads the ids from the source; all else is in `multigpu`.
"""
from comfy_api.latest import io

from . import multigpu


class UnetLoaderGGUFDisTorchMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET_GGUF, multigpu.DISTORCH

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFDisTorchMultiGPU", display_name="Unet Loader (GGUF, DisTorch)",
            **cls.schema())


class UnetLoaderGGUFAdvancedDisTorchMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET_GGUF_ADVANCED, multigpu.DISTORCH

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFAdvancedDisTorchMultiGPU", display_name="Unet Loader (GGUF/Advanced, DisTorch)",
            **cls.schema())


class CLIPLoaderGGUFDisTorchMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CLIP, multigpu.DISTORCH

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderGGUFDisTorchMultiGPU", display_name="CLIPLoader (GGUF, DisTorch)",
            **cls.schema())


class DualCLIPLoaderGGUFDisTorchMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.DUAL_CLIP, multigpu.DISTORCH

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderGGUFDisTorchMultiGPU", display_name="DualCLIPLoader (GGUF, DisTorch)",
            **cls.schema())


class TripleCLIPLoaderGGUFDisTorchMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.TRIPLE_CLIP, multigpu.DISTORCH

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderGGUFDisTorchMultiGPU", display_name="TripleCLIPLoader (GGUF, DisTorch)",
            **cls.schema())


class QuadrupleCLIPLoaderGGUFDisTorchMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.QUADRUPLE_CLIP, multigpu.DISTORCH

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderGGUFDisTorchMultiGPU", display_name="QuadrupleCLIPLoader (GGUF, DisTorch)",
            **cls.schema())
