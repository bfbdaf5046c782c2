"""Nodes and files that several of the example workflows share."""
from devtools.workflows.editor import File, Node

FEATHER = (
    "a white feather resting on a brass balance scale, soft morning light, shallow depth of field"
)
PICTURE = "example.png"  # comes with ComfyUI

CLIP_L = File("text_encoders", "comfyanonymous/flux_text_encoders", "clip_l.safetensors", "0.2 GB")
T5_GGUF = File(
    "text_encoders", "city96/t5-v1_1-xxl-encoder-gguf", "t5-v1_1-xxl-encoder-Q4_K_M.gguf", "2.9 GB"
)
QWEN3_4B = File("text_encoders", "unsloth/Qwen3-4B-GGUF", "Qwen3-4B-Q5_K_M.gguf", "2.9 GB")
FLUX_VAE = File(
    "vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors", "0.3 GB"
)


def checkpoint(file: File) -> Node:
    return Node("FeatherweightLoadCheckpoint", {"checkpoint_name": file.name}, files=(file,))


def diffusion_model(file: File, title: str = "", module: File | None = None) -> Node:
    inputs, files = {"model_name": file.name}, (file,)
    if module:
        inputs, files = inputs | {"module_name": module.name}, (file, module)
    return Node("FeatherweightLoadDiffusionModel", inputs, title, files=files)


def text_encoder(kind: str, *files: File, mmproj: File | None = None) -> Node:
    inputs = {f"text_encoder_{number}": file.name for number, file in enumerate(files, start=1)} | {
        "type": kind
    }
    if mmproj:
        return Node(
            "FeatherweightLoadTextEncoder", inputs | {"mmproj": mmproj.name}, files=(*files, mmproj)
        )
    return Node("FeatherweightLoadTextEncoder", inputs, files=files)


def vae(file: File) -> Node:
    return Node("VAELoader", {"vae_name": file.name}, files=(file,))


def lora(model, file: File, strength: float = 1.0, title: str = "") -> Node:
    """ComfyUI's own loader, for the model alone."""
    inputs = {"model": model, "lora_name": file.name, "strength_model": strength}
    return Node("LoraLoaderModelOnly", inputs, title, files=(file,))


def picture(title: str = "") -> Node:
    return Node("LoadImage", {"image": PICTURE}, title)


def prompt(clip, text: str = FEATHER, title: str = "Prompt") -> Node:
    return Node("CLIPTextEncode", {"text": text, "clip": clip}, title)


def no_negative(positive: Node) -> Node:
    return Node("ConditioningZeroOut", {"conditioning": positive}, "No negative prompt (cfg is 1)")


def size(side: int = 1024, node: str = "EmptySD3LatentImage") -> Node:
    return Node(node, {"width": side, "height": side}, "Size of the picture")


def sampled(model, positive, negative, latent, decoder, **settings) -> list[Node]:
    """The nodes from the latent to a saved picture. settings: steps, cfg, sampler_name and
    scheduler of the KSampler."""
    sampler = Node(
        "KSampler",
        {
            "model": model,
            "positive": positive,
            "negative": negative,
            "latent_image": latent,
            **settings,
        },
    )
    return [sampler, *saved(sampler, decoder)]


def saved(samples, decoder) -> list[Node]:
    decode = Node("VAEDecode", {"samples": samples, "vae": decoder})
    return [decode, Node("SaveImage", {"images": decode, "filename_prefix": "featherweight"})]


def sampled_step_by_step(
    model, positive, negative, latent, sigmas, sampler_name: str = "euler"
) -> list[Node]:
    """A sampler of parts, which comes last."""
    guider = Node(
        "CFGGuider", {"model": model, "positive": positive, "negative": negative, "cfg": 1.0}
    )
    noise, method = Node("RandomNoise"), Node("KSamplerSelect", {"sampler_name": sampler_name})
    return [
        guider,
        noise,
        method,
        sigmas,
        Node(
            "SamplerCustomAdvanced",
            {
                "noise": noise,
                "guider": guider,
                "sampler": method,
                "sigmas": sigmas,
                "latent_image": latent,
            },
        ),
    ]
