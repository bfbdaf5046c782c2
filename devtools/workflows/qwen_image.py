"""Pictures by models that a language model reads the prompt for: Qwen-Image, Qwen-Image-Edit,
Z-Image."""
from devtools.workflows.editor import File, Node, Workflow
from devtools.workflows.parts import (
    FLUX_VAE,
    QWEN3_4B,
    diffusion_model,
    no_negative,
    picture,
    prompt,
    sampled,
    size,
    text_encoder,
    vae,
)

QWEN_GGUF = File("diffusion_models", "city96/Qwen-Image-gguf", "qwen-image-Q4_K_M.gguf", "13.1 GB")
SDNQ_REPOSITORY = "Disty0/Qwen-Image-SDNQ-uint4-svd-r32"
SDNQ_FOLDER = SDNQ_REPOSITORY.partition("/")[2]
QWEN_SDNQ = File("diffusion_models", "", "", saved_as=f"{SDNQ_FOLDER}/transformer")
EDIT_GGUF = File(
    "diffusion_models",
    "unsloth/Qwen-Image-Edit-2511-GGUF",
    "qwen-image-edit-2511-Q4_K_M.gguf",
    "13 GB",
)
QWEN_VL = File(
    "text_encoders",
    "unsloth/Qwen2.5-VL-7B-Instruct-GGUF",
    "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf",
    "4.7 GB",
)
AWQ_REPOSITORY = "Qwen/Qwen2.5-VL-7B-Instruct-AWQ"
AWQ_FOLDER = AWQ_REPOSITORY.partition("/")[2]
QWEN_VL_AWQ = File("text_encoders", "", "", saved_as=AWQ_FOLDER)
MMPROJ = File("text_encoders", "unsloth/Qwen2.5-VL-7B-Instruct-GGUF", "mmproj-BF16.gguf", "1.4 GB")
QWEN_VAE = File(
    "vae", "Comfy-Org/Qwen-Image_ComfyUI", "split_files/vae/qwen_image_vae.safetensors", "0.3 GB"
)
Z_GGUF = File(
    "diffusion_models", "unsloth/Z-Image-Turbo-GGUF", "z-image-turbo-Q4_K_M.gguf", "5.0 GB"
)

CHANGE = (
    "Steps up to 50, as the makers use; cfg from 2.5 to 4. A Lightning LoRA of 4 or 8 steps goes"
    " between model and shift, with cfg at 1. Other sizes: 1664 × 928, 1472 × 1104, and the same"
    " upright."
)
LICENCE = "Qwen-Image is under the Apache-2.0 licence."
OFFLOADED = (
    "On smaller cards part of the model stays in main memory, by itself: have 16 GB of it free on"
    " a card of 8 GB. Q2_K (about 7 GB) fits where Q4_K_M does not, and is visibly coarser."
)


def shifted(model, shift: float) -> Node:
    return Node("ModelSamplingAuraFlow", {"model": model, "shift": shift})


def text_to_picture(model: Node, encoder_file: File = QWEN_VL) -> list[dict[str, list[Node]]]:
    """The columns of a workflow. model: its loader."""
    encoder, decoder = text_encoder("qwen_image", encoder_file), vae(QWEN_VAE)
    shift = shifted(model, 3.1)
    positive = prompt(
        encoder,
        'a shop window with the words "light as a feather" painted on it, morning light,'
        ' photograph',
    )
    negative, latent = prompt(encoder, "", "Negative prompt"), size(1328)
    return [
        {"Load": [model, shift, encoder, decoder]},
        {"Prompt and size": [positive, negative, latent]},
        {
            "Picture": sampled(
                shift,
                positive,
                negative,
                latent,
                decoder,
                steps=20,
                cfg=4.0,
                sampler_name="euler",
                scheduler="simple",
            )
        },
    ]


def qwen_image() -> Workflow:
    return Workflow(
        "Qwen-Image GGUF",
        text_to_picture(diffusion_model(QWEN_GGUF)),
        about="Qwen-Image and its text encoder as GGUF, both kept packed while they run. It is"
              " good at writing in pictures.",
        memory="The text encoder (4.7 GB) runs first and makes room. The model takes 13.1 GB, and"
        f" ComfyUI sets 1.0 to 2.1 GB aside for the computation at 1328 × 1328: it fits on a card"
        f" of 16 GB. {OFFLOADED}",
        change=CHANGE,
        licence=LICENCE,
    )


def qwen_image_awq() -> Workflow:
    return Workflow(
        "Qwen-Image GGUF with an AWQ text encoder",
        text_to_picture(diffusion_model(QWEN_GGUF), QWEN_VL_AWQ),
        about=f"""
Qwen-Image as a GGUF, and its text encoder as the folder that transformers saved in AWQ: weights \
of 4 bits that stay packed while they run, with the values that they have in AWQ. A folder has its \
vision part in it and needs no mmproj.

Get the folder, from inside `ComfyUI/models`:

```
hf download {AWQ_REPOSITORY} --local-dir text_encoders/{AWQ_FOLDER}
```
""",
        memory="The text encoder runs first and makes room. It takes 5.8 GB: 3.4 GB are packed,"
        " the token table and the vision part are in 16 bits. The model takes 13.1 GB, and ComfyUI"
        " sets 1.0 to 2.1 GB aside for the computation at 1328 × 1328: it fits on a card of 16 GB."
        f" {OFFLOADED}",
        change=f"The folder: any Qwen2.5-VL 7B in AWQ, GPTQ, AutoRound or compressed-tensors."
        f" {CHANGE}",
        licence=LICENCE,
    )


def qwen_image_sdnq() -> Workflow:
    return Workflow(
        "Qwen-Image SDNQ",
        text_to_picture(diffusion_model(QWEN_SDNQ)),
        about=f"""
Qwen-Image as SDNQ saves it: weights of 4 bits, and a low rank next to them that makes up for most \
of what they lose. It is a folder, not a file, and stays packed while it runs; the text encoder is \
a GGUF.

Get the folder, from inside `ComfyUI/models`:

```
hf download {SDNQ_REPOSITORY} --include "transformer/*" --local-dir diffusion_models/{SDNQ_FOLDER}
```
""",
        memory="The text encoder (4.7 GB) runs first and makes room. The model takes about 12 GB,"
        " and ComfyUI sets 1.0 to 2.1 GB aside for the computation at 1328 × 1328: it fits on a"
        " card of 16 GB. On smaller cards part of the model stays in main memory, by itself: have"
        " 16 GB of it free on a card of 8 GB.",
        change=f"The folder: any model that SDNQ saved and ComfyUI knows, with the text encoder and"
        f" VAE that belong to it. {CHANGE}",
        licence=LICENCE,
    )


def qwen_image_edit() -> Workflow:
    model = diffusion_model(EDIT_GGUF)
    encoder, decoder = text_encoder("qwen_image", QWEN_VL, mmproj=MMPROJ), vae(QWEN_VAE)
    shift = shifted(model, 3.1)
    norm = Node("CFGNorm", {"model": shift})
    source = picture("The picture to change")
    scaled = Node("FluxKontextImageScale", {"image": source})
    latent = Node("VAEEncode", {"pixels": scaled, "vae": decoder})

    def read(text: str, title: str) -> list[Node]:
        """The text encoder sees the picture, and the model has it as a reference."""
        seen = Node(
            "TextEncodeQwenImageEditPlus",
            {"clip": encoder, "prompt": text, "vae": decoder, "image1": scaled},
            title,
        )
        return [seen, Node("FluxKontextMultiReferenceLatentMethod", {
            "conditioning": seen, "reference_latents_method": "index_timestep_zero"})]

    positive, negative = (
        read("make it a pencil drawing, keep the composition", "What to change"),
        read("", "Negative prompt"),
    )
    return Workflow(
        "Qwen-Image-Edit GGUF with mmproj",
        [
            {"Load": [model, shift, norm, encoder, decoder]},
            {"Picture": [source, scaled, latent]},
            {"What to change": [*positive, *negative]},
            {
                "Result": sampled(
                    norm,
                    positive[-1],
                    negative[-1],
                    latent,
                    decoder,
                    steps=40,
                    cfg=4.0,
                    sampler_name="euler",
                    scheduler="simple",
                )
            },
        ],
        about="Changes a picture as a sentence says. The text encoder is a GGUF that sees the"
        " picture through its mmproj file: without one the model follows the sentence, but does"
        " not know what is in the picture. Put the mmproj beside the encoder; `auto` finds it by"
        " itself where it is the only one that fits. `example.png` comes with ComfyUI; take a"
        " picture of your own.",
        memory="The text encoder and its mmproj (6.1 GB) run first and make room. The model takes"
        f" 13 GB, and ComfyUI sets 1.2 to 2.5 GB aside for the computation at about 1024 × 1024:"
        f" it fits on a card of 16 GB. {OFFLOADED}",
        change="The sentence: say what changes and what stays. Up to three pictures (`image2`,"
        " `image3` of both text nodes). A Lightning LoRA of 4 steps goes behind the model, with"
        " cfg at 1.",
        licence="Qwen-Image-Edit is under the Apache-2.0 licence.",
    )


def z_image_turbo() -> Workflow:
    model, encoder, decoder = (
        diffusion_model(Z_GGUF),
        text_encoder("lumina2", QWEN3_4B),
        vae(FLUX_VAE),
    )
    shift = shifted(model, 3.0)
    positive = prompt(encoder)
    negative, latent = no_negative(positive), size()
    return Workflow(
        "Z-Image Turbo GGUF",
        [
            {"Load": [model, shift, encoder, decoder]},
            {"Prompt and size": [positive, negative, latent]},
            {
                "Picture": sampled(
                    shift,
                    positive,
                    negative,
                    latent,
                    decoder,
                    steps=8,
                    cfg=1.0,
                    sampler_name="res_multistep",
                    scheduler="simple",
                )
            },
        ],
        about="Z-Image Turbo and its text encoder as GGUF, both kept packed while they run: a"
              " picture in eight steps.",
        memory="The text encoder (2.9 GB) runs first and makes room. The model takes 5.0 GB, and"
        " ComfyUI sets 1.0 GB aside for the computation at 1024 × 1024: it runs on a card of 8 GB,"
        " and with part of the model in main memory on one of 6 GB.",
        change="The prompt: long descriptions in plain sentences work best. Keep cfg at 1 and the"
               " eight steps.",
        licence="Z-Image Turbo is under the Apache-2.0 licence.",
    )


WORKFLOWS = (qwen_image, qwen_image_awq, qwen_image_sdnq, qwen_image_edit, z_image_turbo)
