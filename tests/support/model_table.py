"""The list of diffusion models in docs/compatibility.md, and the files in which each is tried."""



# model, as people call it -> its family here
MODELS = {
    "FLUX.2 dev": "flux2", "FLUX.2 klein 4B and 9B": "flux2-klein",
    "Qwen-Image, Qwen-Image-Edit to 2511": "qwen-image", "Z-Image": "z-image", "Krea 2": "krea2",
    "MiniMax-H3": "minimax-h3", "MiniMax-H3 pruned": "minimax-h3-pruned",
    "LTX-2, LTX-2.3": "ltx-2", "Ideogram 4": "ideogram4", "Anima": "anima",
    "ACE-Step 1.5": "ace-step-1.5", "HiDream-O1": "hidream-o1", "Wan 2.2 5B": "wan2.2-ti2v",
    "FLUX.1 dev, Kontext, Fill": "flux-dev", "FLUX.1 schnell": "flux-schnell",
    "Wan 2.1, Wan 2.2 14B, text": "wan2.1-t2v", "Wan 2.1 14B, image": "wan2.1-i2v",
    "Wan VACE": "wan2.1-vace", "Wan camera": "wan2.1-camera",
    "HunyuanVideo": "hunyuan-video", "HunyuanVideo 1.5": "hunyuan-video-1.5",
    "HunyuanImage 2.1": "hunyuan-image", "LTX-Video": "ltxv", "Chroma": "chroma",
    "Chroma Radiance": "chroma-radiance", "HiDream-I1": "hidream", "SD 3.5": "sd3.5",
    "SDXL": "sdxl", "SD 1.5": "sd1.5", "LongCat-Image": "longcat-image",
    "Ovis-Image": "ovis-image", "Mage-Flow": "mage-flow", "JoyAI-Image": "joyimage",
    "ERNIE-Image": "ernie-image", "Boogu": "boogu", "Lens": "lens", "OmniGen2": "omnigen2",
    "Lumina 2": "lumina2", "Cosmos": "cosmos", "Cosmos Predict2": "cosmos-predict2",
    "Kandinsky 5": "kandinsky5", "AuraFlow": "aura-flow", "PixArt Sigma": "pixart-sigma",
    "HunyuanDiT": "hunyuan-dit", "Mochi": "mochi", "CogVideoX": "cogvideox",
    "ACE-Step 1.0": "ace-step", "SeedVR2 3B": "seedvr2-3b", "Hunyuan3D 2": "hunyuan3d-2",
}
NEWEST = tuple(MODELS)[:13]  # of summer and autumn 2026, or the most downloaded then

def list_of(models=MODELS) -> str:
    """The list as docs/compatibility.md has it, in one line."""
    return "; ".join(models) + "."
