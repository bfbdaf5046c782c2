"""Loaders around ours, as ComfyUI-MultiGPU builds them."""
from nodes import NODE_CLASS_MAPPINGS as ALL


class WrappedUnet:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_unet"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"unet_name": ("STRING",)}}

    def load_unet(self, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None):
        return ALL["UnetLoaderGGUF"]().load_unet(unet_name, dequant_dtype, patch_dtype,
                                                 patch_on_device)


class WrappedClip:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"clip_name": ("STRING",), "type": ("STRING",)}}

    def load_clip(self, clip_name, type="stable_diffusion", device=None):
        return ALL["CLIPLoaderGGUF"]().load_clip(clip_name, type)


NODE_CLASS_MAPPINGS = {"WrappedUnet": WrappedUnet, "WrappedClip": WrappedClip}
