"""Stable Diffusion 1.5, XL and 3.5."""
from devtools.workflows.editor import File, Node, Workflow
from devtools.workflows.parts import (
    CLIP_L,
    T5_GGUF,
    checkpoint,
    diffusion_model,
    lora,
    no_negative,
    prompt,
    sampled,
    size,
    text_encoder,
    vae,
)

PIXELS = "pixel art, a white feather on a brass balance scale, simple, flat colors"
NEGATIVE = "blurry, low quality, text, watermark"
SD35 = "stabilityai/stable-diffusion-3.5-large"
SD35_LICENCE = (
    "Stable Diffusion 3.5 is under Stability AI's community licence: accept it on the page of the"
    " model before you download the VAE."
)

SD15_GGUF = File("checkpoints", "second-state/stable-diffusion-v1-5-GGUF",
                 "stable-diffusion-v1-5-pruned-emaonly-Q8_0.gguf", "1.8 GB")
SDXL_GGUF = File("checkpoints", "gpustack/stable-diffusion-xl-base-1.0-GGUF",
                 "stable-diffusion-xl-base-1.0-Q8_0.gguf", "4.3 GB")
SD15_LCM = File(
    "loras",
    "latent-consistency/lcm-lora-sdv1-5",
    "pytorch_lora_weights.safetensors",
    "0.1 GB",
    saved_as="lcm-lora-sdv1-5.safetensors",
)
SDXL_LCM = File(
    "loras",
    "latent-consistency/lcm-lora-sdxl",
    "pytorch_lora_weights.safetensors",
    "0.4 GB",
    saved_as="lcm-lora-sdxl.safetensors",
)
PIXEL_ART = File("loras", "nerijs/pixel-art-xl", "pixel-art-xl.safetensors", "0.2 GB")
CLIP_G = File(
    "text_encoders",
    "Comfy-Org/stable-diffusion-3.5-fp8",
    "text_encoders/clip_g.safetensors",
    "1.4 GB",
)
SD35_VAE = File(
    "vae",
    SD35,
    "vae/diffusion_pytorch_model.safetensors",
    "0.2 GB",
    saved_as="sd3.5_vae.safetensors",
)
LARGE = File(
    "diffusion_models", "city96/stable-diffusion-3.5-large-gguf", "sd3.5_large-Q4_0.gguf", "4.8 GB"
)
TURBO = File(
    "diffusion_models",
    "city96/stable-diffusion-3.5-large-turbo-gguf",
    "sd3.5_large_turbo-Q4_0.gguf",
    "4.8 GB",
)
MEDIUM = File(
    "diffusion_models",
    "city96/stable-diffusion-3.5-medium-gguf",
    "sd3.5_medium-Q4_K_M.gguf",
    "1.8 GB",
)


def text_to_picture(model, clip, decoder, side: int) -> list[dict[str, list[Node]]]:
    """The columns of a workflow after its loaders. model, clip, decoder: a Node or (Node,
    output)."""
    positive, negative = prompt(clip), prompt(clip, NEGATIVE, "Negative prompt")
    latent = size(side, "EmptyLatentImage")
    return [
        {"Prompt and size": [positive, negative, latent]},
        {
            "Picture": sampled(
                model,
                positive,
                negative,
                latent,
                decoder,
                steps=25,
                cfg=7.0,
                sampler_name="dpmpp_2m",
                scheduler="karras",
            )
        },
    ]


def sd15_gguf() -> Workflow:
    load = checkpoint(SD15_GGUF)
    return Workflow(
        "Stable Diffusion GGUF all-in-one",
        [{"Load": [load]}, *text_to_picture((load, 0), (load, 1), (load, 2), 512)],
        about="A whole checkpoint (model, text encoder, VAE) as one GGUF, as stable-diffusion.cpp"
        " writes it.",
        memory="The model takes 1.5 GB, the text encoder 0.1 GB, the VAE 0.2 GB: it runs on a card"
        " of 4 GB. Only matrices are packed in such a file, the convolutions are 16 bits wide, so"
        " that Q4_0 is little smaller: 1.6 GB.",
        change="""
Another checkpoint of SD1.5 as GGUF. To make one from a checkpoint you have, with the program of \
stable-diffusion.cpp:

```
sd -M convert -m model.safetensors -o model-Q8_0.gguf --type q8_0
```

A GGUF that holds only the UNet belongs into **Load Diffusion Model (Featherweight)**.
""",
    )


def lcm(model) -> Node:
    return Node(
        "ModelSamplingDiscrete", {"model": model, "sampling": "lcm"}, "Steps as LCM takes them"
    )


def sd15_lcm_on_cpu() -> Workflow:
    load = checkpoint(SD15_GGUF)
    fast = lora((load, 0), SD15_LCM, title="Load LoRA: 4 steps are enough")
    model = lcm(fast)
    positive = prompt((load, 1))
    negative, latent = no_negative(positive), size(512, "EmptyLatentImage")
    return Workflow(
        "Stable Diffusion LCM on a CPU",
        [
            {"Load": [load], "LCM": [fast, model]},
            {"Prompt and size": [positive, negative, latent]},
            {
                "Picture": sampled(
                    model,
                    positive,
                    negative,
                    latent,
                    (load, 2),
                    steps=4,
                    cfg=1.0,
                    sampler_name="lcm",
                    scheduler="sgm_uniform",
                )
            },
        ],
        about="A picture without a graphics card: four steps, each run once, because cfg is 1."
        " Start ComfyUI with `python main.py --cpu`. A CPU that multiplies bfloat16 computes in it,"
        " as the loader says. With a C++ compiler on the machine the packed weights are dequantised"
        " by compiled code; without one it is slower.",
        memory="The model takes 1.5 GB of main memory, the text encoder 0.1 GB, the VAE 0.2 GB,"
        " the LoRA 0.1 GB. 4 GB that are free will do.",
        change="Steps from 4 to 8; cfg up to 2, which takes twice the time, with a real negative"
        " prompt. Smaller pictures are faster: 384 × 384 takes about half the time. Other LoRAs go"
        " behind the first one. Without it, use 25 steps, `dpmpp_2m`, `karras` and cfg 7.",
    )


def sdxl_lcm() -> Workflow:
    load = checkpoint(SDXL_GGUF)
    fast = lora((load, 0), SDXL_LCM, title="Load LoRA: 4 steps are enough")
    style = Node(
        "FeatherweightApplyLora",
        {"model": fast, "clip": (load, 1), "lora_name": PIXEL_ART.name, "strength_model": 1.2},
        "Apply LoRA: the style",
        files=(PIXEL_ART,),
    )
    model = lcm((style, 0))
    positive = prompt((style, 1), PIXELS)
    negative = prompt((style, 1), "3d render, realistic", "Negative prompt")
    latent = size(node="EmptyLatentImage")
    return Workflow(
        "SDXL GGUF with LCM and style LoRAs",
        [
            {"Load": [load], "Two LoRAs": [fast, style, model]},
            {"Prompt and size": [positive, negative, latent]},
            {
                "Picture": sampled(
                    model,
                    positive,
                    negative,
                    latent,
                    (load, 2),
                    steps=4,
                    cfg=1.5,
                    sampler_name="lcm",
                    scheduler="sgm_uniform",
                )
            },
        ],
        about="A whole SDXL checkpoint as one GGUF, with two LoRAs in a row: one makes four steps"
        " enough, one draws pixel art. The packed weights are not changed, so moving a strength"
        " costs no reload.",
        memory="The text encoders (0.9 GB) run first and make room. The model takes 3.2 GB, the"
        " LoRAs 0.6 GB, the VAE 0.2 GB, and ComfyUI sets 0.3 to 0.5 GB aside for the computation"
        " at 1024 × 1024: it runs on a card of 6 GB. Decoding the picture takes more for a moment;"
        " where it does not fit, ComfyUI decodes in tiles, by itself.",
        change="Steps from 4 to 8; cfg from 1 to 2. The makers of the style LoRA name a strength"
        " of 1.2 beside LCM. Pixel art looks best scaled down by 8 with *nearest-exact*. Any LoRA"
        " of SDXL works in its place.",
    )


def sd35(
    name: str,
    file: File,
    about: str,
    memory: str,
    change: str,
    steps: int,
    cfg: float,
    scheduler: str,
) -> Workflow:
    model, encoders, decoder = (
        diffusion_model(file),
        text_encoder("sd3", CLIP_L, CLIP_G, T5_GGUF),
        vae(SD35_VAE),
    )
    positive = prompt(encoders)
    negative = prompt(encoders, NEGATIVE, "Negative prompt") if cfg > 1 else no_negative(positive)
    latent = size()
    return Workflow(
        name,
        [
            {"Load": [model, encoders, decoder]},
            {"Prompt and size": [positive, negative, latent]},
            {
                "Picture": sampled(
                    model,
                    positive,
                    negative,
                    latent,
                    decoder,
                    steps=steps,
                    cfg=cfg,
                    sampler_name="euler",
                    scheduler=scheduler,
                )
            },
        ],
        about=about,
        memory=f"A GGUF takes the size of its file. The text encoders (4.5 GB) run first and make"
               f" room. {memory}",
        change=change,
        licence=SD35_LICENCE,
    )


def sd35_large() -> Workflow:
    return sd35(
        "SD3.5 Large GGUF",
        LARGE,
        "Stable Diffusion 3.5 Large, its model and T5 as GGUF, both kept packed while they run.",
        "The model takes 4.8 GB as Q4_0, 5.8 GB as Q5_0, 8.8 GB as Q8_0, and ComfyUI sets 0.5 to"
        " 1.1 GB aside for the computation at 1024 × 1024: Q4_0 runs on a card of 6 GB, Q5_0 on"
        " one of 8 GB.",
        "Steps from 20 to 40; cfg from 3.5 to 5.5. Without the T5 the encoders take 1.6 GB: set"
        " *text encoder 3* to `none`; long prompts and writing in the picture get worse.",
        steps=28,
        cfg=4.5,
        scheduler="sgm_uniform",
    )


def sd35_turbo() -> Workflow:
    return sd35(
        "SD3.5 Large Turbo GGUF",
        TURBO,
        "Stable Diffusion 3.5 Large Turbo: a picture in four steps, each run once, because cfg is"
        " 1. Model and T5 are GGUF and stay packed while they run.",
        "The model takes 4.8 GB as Q4_0, 5.8 GB as Q5_0, 8.8 GB as Q8_0, and ComfyUI sets 0.5 GB"
        " aside for the computation at 1024 × 1024: Q4_0 runs on a card of 6 GB.",
        "Steps from 4 to 8; cfg stays at 1. LoRAs of SD3.5 Large mostly work on this model too.",
        steps=4,
        cfg=1.0,
        scheduler="sgm_uniform",
    )


def sd35_medium() -> Workflow:
    return sd35(
        "SD3.5 Medium GGUF",
        MEDIUM,
        "Stable Diffusion 3.5 Medium, the small one of the three, its model and T5 as GGUF, both"
        " kept packed while they run.",
        "The model takes 1.8 GB as Q4_K, 2.7 GB as Q8_0, and ComfyUI sets 0.5 to 1.1 GB aside for"
        " the computation at 1024 × 1024: it runs on a card of 4 GB. There the text encoders are"
        " the largest part: `device: cpu` (among their advanced inputs) leaves the card to the"
        " model.",
        "Steps from 20 to 40; cfg from 3.5 to 5.5; sizes up to 1440 × 1440. Without the T5 the"
        " encoders take 1.6 GB: set *text encoder 3* to `none`.",
        steps=28,
        cfg=4.5,
        scheduler="sgm_uniform",
    )


WORKFLOWS = (sd15_gguf, sd15_lcm_on_cpu, sdxl_lcm, sd35_large, sd35_turbo, sd35_medium)
