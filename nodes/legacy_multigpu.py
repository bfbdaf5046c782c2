"""Node ids of ComfyUI-MultiGPU: loaders with a device. The same inputs in the same order, so that workflows open and run.

A class for each, for ComfyUI Manager reads the ids from the source; all else is in `multigpu`. Some of the pack's loaders are
no business of this one: for ControlNets, CLIP vision, other packs' models.
"""
from comfy_api.latest import io

from . import multigpu


class UnetLoaderGGUFMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET_GGUF, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFMultiGPU", display_name="Unet Loader (GGUF, MultiGPU)",
            **cls.schema())


class UnetLoaderGGUFAdvancedMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET_GGUF_ADVANCED, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UnetLoaderGGUFAdvancedMultiGPU", display_name="Unet Loader (GGUF/Advanced, MultiGPU)",
            **cls.schema())


class CLIPLoaderGGUFMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderGGUFMultiGPU", display_name="CLIPLoader (GGUF, MultiGPU)",
            **cls.schema())


class DualCLIPLoaderGGUFMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.DUAL_CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderGGUFMultiGPU", display_name="DualCLIPLoader (GGUF, MultiGPU)",
            **cls.schema())


class TripleCLIPLoaderGGUFMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.TRIPLE_CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderGGUFMultiGPU", display_name="TripleCLIPLoader (GGUF, MultiGPU)",
            **cls.schema())


class QuadrupleCLIPLoaderGGUFMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.QUADRUPLE_CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderGGUFMultiGPU", display_name="QuadrupleCLIPLoader (GGUF, MultiGPU)",
            **cls.schema())


class UNETLoaderMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.UNET, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UNETLoaderMultiGPU", display_name="Load Diffusion Model (MultiGPU)",
            **cls.schema())


class CLIPLoaderMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderMultiGPU", display_name="Load CLIP (MultiGPU)",
            **cls.schema())


class DualCLIPLoaderMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.DUAL_CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderMultiGPU", display_name="DualCLIPLoader (MultiGPU)",
            **cls.schema())


class TripleCLIPLoaderMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.TRIPLE_CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderMultiGPU", display_name="TripleCLIPLoader (MultiGPU)",
            **cls.schema())


class QuadrupleCLIPLoaderMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.QUADRUPLE_CLIP, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderMultiGPU", display_name="QuadrupleCLIPLoader (MultiGPU)",
            **cls.schema())


class VAELoaderMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.VAE, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VAELoaderMultiGPU", display_name="Load VAE (MultiGPU)",
            **cls.schema())


class CheckpointLoaderSimpleMultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CHECKPOINT, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CheckpointLoaderSimpleMultiGPU", display_name="Load Checkpoint (MultiGPU)",
            **cls.schema())


class CheckpointLoaderNF4MultiGPU(multigpu.Loader, io.ComfyNode):
    kind, family = multigpu.CHECKPOINT, multigpu.DEVICE

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CheckpointLoaderNF4MultiGPU", display_name="Load NF4 Checkpoint (MultiGPU)",
            **cls.schema())
