"""Node ids of ComfyUI-MultiGPU: loaders with virtual VRAM. The same inputs in the same order, so that workflows open and run.

A class for each, for ComfyUI Manager reads the ids from the source; all else is in `multigpu`.
"""
from comfy_api.latest import io

from . import multigpu


class UnetLoaderGGUFDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET_GGUF, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFDisTorch2MultiGPU", display_name="Unet Loader (GGUF, DisTorch2)",
            **cls.schema())


class UnetLoaderGGUFAdvancedDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET_GGUF_ADVANCED, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFAdvancedDisTorch2MultiGPU", display_name="Unet Loader (GGUF/Advanced, DisTorch2)",
            **cls.schema())


class CLIPLoaderGGUFDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderGGUFDisTorch2MultiGPU", display_name="CLIPLoader (GGUF, DisTorch2)",
            **cls.schema())


class DualCLIPLoaderGGUFDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.DUAL_CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderGGUFDisTorch2MultiGPU", display_name="DualCLIPLoader (GGUF, DisTorch2)",
            **cls.schema())


class TripleCLIPLoaderGGUFDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.TRIPLE_CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderGGUFDisTorch2MultiGPU", display_name="TripleCLIPLoader (GGUF, DisTorch2)",
            **cls.schema())


class QuadrupleCLIPLoaderGGUFDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.QUADRUPLE_CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderGGUFDisTorch2MultiGPU", display_name="QuadrupleCLIPLoader (GGUF, DisTorch2)",
            **cls.schema())


class UNETLoaderDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UNETLoaderDisTorch2MultiGPU", display_name="Load Diffusion Model (DisTorch2)",
            **cls.schema())


class CLIPLoaderDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderDisTorch2MultiGPU", display_name="Load CLIP (DisTorch2)",
            **cls.schema())


class DualCLIPLoaderDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.DUAL_CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderDisTorch2MultiGPU", display_name="DualCLIPLoader (DisTorch2)",
            **cls.schema())


class TripleCLIPLoaderDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.TRIPLE_CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderDisTorch2MultiGPU", display_name="TripleCLIPLoader (DisTorch2)",
            **cls.schema())


class QuadrupleCLIPLoaderDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.QUADRUPLE_CLIP, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderDisTorch2MultiGPU", display_name="QuadrupleCLIPLoader (DisTorch2)",
            **cls.schema())


class VAELoaderDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.VAE, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VAELoaderDisTorch2MultiGPU", display_name="Load VAE (DisTorch2)",
            **cls.schema())


class CheckpointLoaderSimpleDisTorch2MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CHECKPOINT, multigpu.DISTORCH2

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CheckpointLoaderSimpleDisTorch2MultiGPU", display_name="Load Checkpoint (DisTorch2)",
            **cls.schema())
