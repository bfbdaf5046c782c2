"""Featherweight: quantised diffusion models in ComfyUI, weights kept packed in memory."""
WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import FeatherweightExtension
    return FeatherweightExtension()
