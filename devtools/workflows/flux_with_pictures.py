"""Flux.1 and Flux 2, with a picture to start from."""
from devtools.workflows.editor import File, Node, Workflow
from devtools.workflows.flux import BITS, FLUX_GGUF, LICENCE
from devtools.workflows.parts import (
    CLIP_L,
    FLUX_VAE,
    QWEN3_4B,
    T5_GGUF,
    diffusion_model,
    no_negative,
    picture,
    prompt,
    sampled,
    sampled_step_by_step,
    saved,
    size,
    text_encoder,
    vae,
)

GREEN = 0x00FF00

KONTEXT_GGUF = File(
    "diffusion_models",
    "QuantStack/FLUX.1-Kontext-dev-GGUF",
    "flux1-kontext-dev-Q4_K_S.gguf",
    "6.8 GB",
)
CONTROLNET = File(
    "controlnet",
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0",
    "diffusion_pytorch_model.safetensors",
    "4.3 GB",
    saved_as="FLUX.1-dev-ControlNet-Union-Pro-2.0.safetensors",
)
KLEIN_GGUF = File(
    "diffusion_models", "unsloth/FLUX.2-klein-4B-GGUF", "flux-2-klein-4b-Q5_K_M.gguf", "3.1 GB"
)
KLEIN_LORA = File("loras", "fal/flux-2-klein-4B-outpaint-lora",
                  "LyNiaZ53Tudg0J6sT8Xbx_pytorch_lora_weights_comfy_converted.safetensors",
                  saved_as="flux-2-klein-4b-outpaint-lora.safetensors")
FLUX2_VAE = File("vae", "Comfy-Org/flux2-dev", "split_files/vae/flux2-vae.safetensors", "0.3 GB")


def kontext() -> Workflow:
    model, encoders, decoder = (
        diffusion_model(KONTEXT_GGUF),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    source = picture("The picture to change")
    scaled = Node("FluxKontextImageScale", {"image": source})
    latent = Node("VAEEncode", {"pixels": scaled, "vae": decoder})
    text = prompt(encoders, "make it a pencil drawing, keep the composition", "What to change")
    reference = Node("ReferenceLatent", {"conditioning": text, "latent": latent})
    guidance = Node("FluxGuidance", {"conditioning": reference, "guidance": 2.5})
    negative = no_negative(text)
    return Workflow(
        "Flux.1 Kontext GGUF",
        [
            {"Load": [model, encoders, decoder]},
            {"Picture": [source, scaled, latent]},
            {"What to change": [text, reference, guidance, negative]},
            {
                "Result": sampled(
                    model,
                    guidance,
                    negative,
                    latent,
                    decoder,
                    steps=20,
                    cfg=1.0,
                    sampler_name="euler",
                    scheduler="simple",
                )
            },
        ],
        about="Changes a picture as a sentence says, and leaves the rest of it alone. Model and T5"
        " are GGUF and stay packed while they run. `example.png` comes with ComfyUI; take a"
        " picture of your own.",
        memory="The text encoders (3.1 GB) run first and make room. The model takes 6.8 GB. It"
        " reads the picture beside the one it makes, so that ComfyUI sets twice as much aside as"
        f" for plain Flux: 2.1 GB at about 1024 × 1024. The model takes {BITS}; what does not fit"
        " on the card stays in main memory, by itself.",
        change="The sentence: say what changes and what stays. Guidance 2.5 is the makers' choice."
        " The picture is brought to one of the sizes that the model was trained on. Keep cfg at 1.",
        licence=LICENCE.replace("dev", "Kontext dev"),
    )


def guided_by_outlines(name: str, control: Node, about: str, memory: str) -> Workflow:
    """A workflow in which the outlines of a picture guide another.

    Args:
        name, about: of the workflow.
        control: the loader of the ControlNet.
        memory: sentences on what model and ControlNet take.
    """
    model, encoders, decoder = (
        diffusion_model(FLUX_GGUF),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    source = picture("The picture whose outlines are kept")
    scaled = Node(
        "ImageScale",
        {
            "image": source,
            "upscale_method": "lanczos",
            "width": 1024,
            "height": 1024,
            "crop": "center",
        },
    )
    edges = Node("Canny", {"image": scaled, "low_threshold": 0.2, "high_threshold": 0.5})
    shown = Node("PreviewImage", {"images": edges}, "Outlines")
    text = prompt(encoders)
    guidance = Node("FluxGuidance", {"conditioning": text, "guidance": 3.5})
    applied = Node(
        "ControlNetApplyAdvanced",
        {
            "positive": guidance,
            "negative": no_negative(text),
            "control_net": control,
            "image": edges,
            "vae": decoder,
            "strength": 0.7,
            "end_percent": 0.8,
        },
    )
    latent = size()
    return Workflow(
        name,
        [
            {"Load": [model, encoders, decoder, control]},
            {"Outlines": [source, scaled, edges, shown]},
            {"Prompt": [text, guidance, applied.inputs["negative"], applied, latent]},
            {
                "Picture": sampled(
                    model,
                    (applied, 0),
                    (applied, 1),
                    latent,
                    decoder,
                    steps=20,
                    cfg=1.0,
                    sampler_name="euler",
                    scheduler="simple",
                )
            },
        ],
        about=f"The outlines of one picture guide another. {about} This ControlNet also takes soft"
        " edges, depth, poses and grey pictures: put such a picture in place of the outlines.",
        memory=f"The text encoders (3.1 GB) run first and make room. {memory}",
        change="Strength and end of the control: the makers name 0.7 and 0.8 for outlines, 0.8 and"
        " 0.8 for depth, 0.9 and 0.65 for poses. The two thresholds say how many outlines are"
        " found. Keep cfg at 1.",
        licence=LICENCE,
    )


def controlnet() -> Workflow:
    return guided_by_outlines(
        "Flux.1 dev GGUF with ControlNet",
        Node("ControlNetLoader", {"control_net_name": CONTROLNET.name}, files=(CONTROLNET,)),
        about="ComfyUI's own ControlNet nodes work on the packed model as on any other.",
        memory="The model takes 6.8 GB and the ControlNet, which is not packed, 4.3 GB beside it;"
        " ComfyUI sets 1.1 GB aside for the computation at 1024 × 1024. On a card of 8 GB much of"
        " the model stays in main memory, by itself: Q3_K (5.2 GB) leaves more of it on the card.",
    )


def packed_controlnet() -> Workflow:
    control = Node(
        "FeatherweightLoadControlNet",
        {"control_net_name": CONTROLNET.name, "pack_to": "Q8_0"},
        "Load ControlNet: packed while it is read",
        files=(CONTROLNET,),
    )
    return guided_by_outlines(
        "Flux.1 dev GGUF with a packed ControlNet",
        control,
        about="The ControlNet is packed too: *pack to* packs each weight as it is read from the"
        " bf16 file. Set it to `as the file` for a ControlNet that is a GGUF, NF4, int8, fp8 or"
        " SDNQ already.",
        memory="The model takes 6.8 GB and the ControlNet 2.3 GB in place of 4.3 beside it (1.3 GB"
        " as `Q4_K`); ComfyUI sets 1.1 GB aside for the computation at 1024 × 1024. What does not"
        " fit on the card stays in main memory, by itself.",
    )


def klein() -> Workflow:
    model, encoders, decoder = (
        diffusion_model(KLEIN_GGUF),
        text_encoder("flux2", QWEN3_4B),
        vae(FLUX2_VAE),
    )
    check = Node(
        "FeatherweightCheckLora",
        {"model": model, "lora_name": KLEIN_LORA.name},
        "Check LoRA: does it fit?",
        files=(KLEIN_LORA,),
    )
    apply = Node(
        "FeatherweightApplyLora",
        {"model": model, "lora_name": KLEIN_LORA.name, "strength_model": 1.1},
        files=(KLEIN_LORA,),
    )
    source = picture("The picture to extend")
    scaled = Node(
        "ImageScale",
        {
            "image": source,
            "upscale_method": "lanczos",
            "width": 768,
            "height": 768,
            "crop": "center",
        },
    )
    green = Node(
        "EmptyImage", {"width": 1024, "height": 1024, "color": GREEN}, "Green is what gets filled"
    )
    placed = Node(
        "ImageCompositeMasked", {"destination": green, "source": scaled, "x": 128, "y": 128}
    )
    encoded = Node("VAEEncode", {"pixels": placed, "vae": decoder})
    text = prompt(encoders, "Fill the green spaces according to the image")
    reference = Node("ReferenceLatent", {"conditioning": text, "latent": encoded})
    negative, latent = no_negative(text), size(node="EmptyFlux2LatentImage")
    sigmas = Node("Flux2Scheduler", {"steps": 4, "width": 1024, "height": 1024})
    steps = sampled_step_by_step((apply, 0), reference, negative, latent, sigmas)
    return Workflow(
        "Flux 2 Klein GGUF with a LoRA check",
        [
            {"Load": [model, encoders, decoder], "LoRA": [check, apply]},
            {"Picture": [source, scaled, green, placed, encoded]},
            {"Prompt": [text, reference, negative, latent]},
            {"Sample": steps},
            {"Result": saved(steps[-1], decoder)},
        ],
        about="Extends a picture past its edges, in four steps. **Check LoRA (Featherweight)**"
        " says before anything is sampled whether a LoRA fits the model, layer by layer: most"
        " LoRAs of Flux.1 and of the larger Flux 2 models do not fit this one.",
        memory="The text encoder (2.9 GB) runs first and makes room. The model takes 3.1 GB, the"
        " LoRA the size of its file, and ComfyUI sets 2.5 GB aside for the computation at 1024 ×"
        " 1024 beside one picture: it runs on a card of 6 GB.",
        change="The LoRA; any that fits, with what it wants as a prompt (this one wants the words"
        " here, and green where there is no picture). Without the picture, link the prompt"
        " straight to the guider: the model also works from text alone. Keep cfg at 1 and the four"
        " steps.",
        licence="Flux 2 Klein 4B is under the Apache-2.0 licence.",
    )


WORKFLOWS = (kontext, controlnet, packed_controlnet, klein)
