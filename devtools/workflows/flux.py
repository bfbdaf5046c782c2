"""Flux.1, from text."""
from devtools.workflows.editor import File, Node, Workflow
from devtools.workflows.parts import (
    CLIP_L,
    FLUX_VAE,
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

PACKAGE = "flux.1-dev-nf4-pkg"
LICENCE = "Flux.1 dev is for non-commercial use; see its licence."
RESERVE = "ComfyUI sets 1.1 GB aside for the computation at 1024 × 1024"
BITS = "12.7 GB as Q8_0, 9.8 GB as Q6_K, 8.3 GB as Q5_K, 6.8 GB as Q4_K, 5.2 GB as Q3_K"

T5_FP8 = File(
    "text_encoders",
    "comfyanonymous/flux_text_encoders",
    "t5xxl_fp8_e4m3fn_scaled.safetensors",
    "4.8 GB",
)
FLUX_NF4 = File(
    "checkpoints", "lllyasviel/flux1-dev-bnb-nf4", "flux1-dev-bnb-nf4-v2.safetensors", "12.0 GB"
)
FLUX_NF4_MODEL = File(
    "diffusion_models",
    "InvokeAI/flux_dev",
    "transformer/bnb_nf4/flux1-dev-bnb_nf4.safetensors",
    "6.7 GB",
)
FLUX_GGUF = File("diffusion_models", "city96/FLUX.1-dev-gguf", "flux1-dev-Q4_K_S.gguf", "6.8 GB")
FLUX_Q8 = File("diffusion_models", "city96/FLUX.1-dev-gguf", "flux1-dev-Q8_0.gguf", "12.7 GB")
FLUX_SVDQUANT = File(
    "diffusion_models",
    "nunchaku-tech/nunchaku-flux.1-dev",
    "svdq-int4_r32-flux.1-dev.safetensors",
    "6.8 GB",
)
SCHNELL_GGUF = File(
    "diffusion_models", "city96/FLUX.1-schnell-gguf", "flux1-schnell-Q4_K_S.gguf", "6.8 GB"
)
HYPER_LORA = File(
    "loras", "ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors", "1.4 GB"
)
DETAIL_LORA = File(
    "loras", "Shakker-Labs/FLUX.1-dev-LoRA-add-details", "FLUX-dev-lora-add_details.safetensors"
)
PACKAGE_T5 = File("text_encoders", "", "", saved_as=f"{PACKAGE}/text_encoder_2")
PACKAGE_MODEL = File("diffusion_models", "", "", saved_as=f"{PACKAGE}/transformer")


def text_to_picture(
    loaders: dict[str, list[Node]],
    model,
    clip,
    decoder,
    steps: int = 20,
    guidance: float | None = 3.5,
):
    """The columns of a workflow. loaders: the first one. model, clip, decoder: a Node or (Node,
    output)."""
    text = prompt(clip)
    positive = (
        Node("FluxGuidance", {"conditioning": text, "guidance": guidance}) if guidance else text
    )
    negative, latent = no_negative(text), size()
    middle = [text, positive, negative, latent] if guidance else [text, negative, latent]
    return [
        loaders,
        {"Prompt and size": middle},
        {
            "Picture": sampled(
                model,
                positive,
                negative,
                latent,
                decoder,
                steps=steps,
                cfg=1.0,
                sampler_name="euler",
                scheduler="simple",
            )
        },
    ]


def nf4_all_in_one() -> Workflow:
    load = checkpoint(FLUX_NF4)
    return Workflow(
        "Flux.1 dev NF4 all-in-one",
        text_to_picture({"Load": [load]}, (load, 0), (load, 1), (load, 2)),
        about="Model, text encoders and VAE in one file. The weights of the model are NF4 and stay"
        " packed while it runs; the T5 is fp8.",
        memory=f"The text encoders (CLIP-L 0.2 GB, T5 4.8 GB) run first and make room. The model"
        f" takes 6.7 GB, and {RESERVE}. On a card of 8 GB it keeps the part that does not fit in"
        " main memory, by itself.",
        change="The prompt; width and height; steps; guidance (2 to 4: lower looks more natural,"
        " higher follows the prompt more closely). Keep cfg at 1. Any other NF4 or FP4 checkpoint"
        " of Flux works in the loader, the older v1 file too.",
        licence=LICENCE,
    )


def nf4_with_two_loras() -> Workflow:
    load = checkpoint(FLUX_NF4)
    first = Node(
        "LoraLoader",
        {
            "model": (load, 0),
            "clip": (load, 1),
            "lora_name": HYPER_LORA.name,
            "strength_model": 0.125,
        },
        "Load LoRA: 8 steps are enough",
        files=(HYPER_LORA,),
    )
    second = Node(
        "FeatherweightApplyLora",
        {"model": (first, 0), "clip": (first, 1), "lora_name": DETAIL_LORA.name},
        files=(DETAIL_LORA,),
    )
    report = Node("PreviewAny", {"source": (second, 2)}, "Whether the second LoRA fits")
    return Workflow(
        "Flux.1 dev NF4 with two LoRAs",
        text_to_picture(
            {"Load": [load], "Two LoRAs": [first, second, report]},
            (second, 0),
            (second, 1),
            (load, 2),
            steps=8,
        ),
        about="Two LoRAs on a packed model, exactly: the packed weights are not changed, so"
        " nothing is rounded and a moved strength costs no reload. ComfyUI's own **Load LoRA** and"
        " **Apply LoRA (Featherweight)** mix freely, in any order and number.",
        memory=f"The text encoders (5.0 GB) run first and make room. The model takes 6.7 GB, the"
        f" LoRAs the size of their files, and {RESERVE}.",
        change="The LoRAs and their strengths. The first one is made for 8 steps at a strength of"
        " 0.125: without it, set steps to 20. `block_weights` of the second gives each block a"
        " strength of its own, such as `single=0.5` or `double.0-9=0`; its help page (press **?**)"
        " has the list. Keep cfg at 1.",
        licence=LICENCE,
    )


def nf4_unet_only() -> Workflow:
    model, encoders, decoder = (
        diffusion_model(FLUX_NF4_MODEL),
        text_encoder("flux", CLIP_L, T5_FP8),
        vae(FLUX_VAE),
    )
    return Workflow(
        "Flux.1 dev NF4 UNet-only",
        text_to_picture({"Load": [model, encoders, decoder]}, model, encoders, decoder),
        about="An NF4 file that holds only the diffusion model, with text encoders and VAE from"
        " files of their own: they are shared with other Flux workflows, and each can be of any"
        " kind.",
        memory=f"The text encoders (5.0 GB) run first and make room. The model takes 6.7 GB, and"
               f" {RESERVE}.",
        change="With little main memory, take a GGUF of the T5 in place of the fp8 file: Q4_K_M"
        " has 2.9 GB. `device: cpu` of the text encoder (among its advanced inputs) leaves the"
        " card to the model. Keep cfg at 1.",
        licence=LICENCE,
    )


def nf4_package() -> Workflow:
    encoders = text_encoder("flux", CLIP_L, PACKAGE_T5)
    encoders.title = "Load Text Encoder: CLIP-L and a 4-bit T5"
    model, decoder = diffusion_model(PACKAGE_MODEL), vae(FLUX_VAE)
    return Workflow(
        "Flux.1 dev 4-bit package on 8 GB",
        text_to_picture({"Load": [encoders, model, decoder]}, model, encoders, decoder),
        about=f"""
Text encoder and model as diffusers saves them, both in 4 bits: folders, not files. The prompt is \
encoded first, then the text encoder makes room for the model.

Get the two folders, from inside `ComfyUI/models`:

```
hf download hf-internal-testing/{PACKAGE} --include "text_encoder_2/*" --local-dir \
text_encoders/{PACKAGE}
hf download hf-internal-testing/{PACKAGE} --include "transformer/*" --local-dir \
diffusion_models/{PACKAGE}
```
""",
        memory=f"A T5 in NF4 takes 2.9 GB; up to 6.3 GB where its feed-forward outputs were left"
        f" in 32 bits, as transformers does by default. The model takes 6.7 GB, and {RESERVE}, 0.6"
        " GB at 768 × 768. What does not fit on the card stays in main memory, by itself.",
        change="Any folder with a `config.json` that diffusers or transformers saved in NF4, FP4"
        " or int8. A whole package goes into `models/diffusers`, for **Load Checkpoint"
        " (Featherweight)**. Keep cfg at 1.",
        licence=LICENCE,
    )


def gguf_with_gguf_t5() -> Workflow:
    model, encoders, decoder = (
        diffusion_model(FLUX_GGUF),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    return Workflow(
        "Flux.1 dev GGUF with GGUF T5",
        text_to_picture({"Load": [model, encoders, decoder]}, model, encoders, decoder),
        about="Model and T5 as GGUF, both kept packed while they run; CLIP-L and the VAE are"
              " ordinary files.",
        memory=f"A GGUF takes the size of its file. The text encoders (3.1 GB) run first and make"
        f" room for the model; {RESERVE}. The 11.9 billion weights of the model take {BITS}:"
        " choose the largest that fits on the card with 1.1 GB to spare.",
        change="Any GGUF of any model that ComfyUI knows, with the text encoder and VAE that"
        " belong to it, and their `type`. Keep cfg at 1 for Flux.",
        licence=LICENCE,
    )


def svdquant_with_a_lora() -> Workflow:
    load, encoders, decoder = (
        diffusion_model(FLUX_SVDQUANT),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    model = lora(load, DETAIL_LORA)
    return Workflow(
        "Flux.1 dev SVDQuant with a LoRA",
        text_to_picture({"Load": [load, model, encoders, decoder]}, model, encoders, decoder),
        about="A model of Nunchaku: weights of 4 bits, and a low rank next to them that makes up"
        " for most of what they lose. It runs on any device, without Nunchaku's kernels, and with"
        " ComfyUI's own nodes, such as its LoRA loader here: the LoRA is added exactly.",
        memory=f"The text encoders (3.1 GB) run first and make room. The model takes 6.8 GB, the"
        f" LoRA the size of its file, and {RESERVE}. What does not fit on the card stays in main"
        " memory, by itself.",
        change="The LoRA and its strength; any LoRA for Flux.1 works. The files with fp4 in their"
        " name and those of rank 128 load too, and so do Nunchaku's other models with the text"
        " encoder and VAE that belong to them. Keep cfg at 1.",
        licence=LICENCE,
    )


def second_gpu() -> Workflow:
    model, decoder = diffusion_model(FLUX_GGUF), vae(FLUX_VAE)
    encoders = text_encoder("flux", CLIP_L, T5_GGUF)
    encoders.inputs["device"], encoders.title = "gpu:1", "Load Text Encoder: on the second GPU"
    return Workflow(
        "Flux.1 dev GGUF with T5 on a second GPU",
        text_to_picture({"Load": [model, encoders, decoder]}, model, encoders, decoder),
        about="The text encoders run on the second GPU and stay there, so another prompt loads"
        " nothing and the first GPU is the model's alone. Where there is one GPU, they run on"
        " that, and the node says so.",
        memory=f"On the second GPU the text encoders take 3.1 GB. On the first the model takes 6.8"
               f" GB, and {RESERVE}.",
        change="`device` of the text encoder (among its advanced inputs): `gpu:1`, `gpu:0`, `cpu`."
        " The model and the VAE go to another GPU by ComfyUI's **Select Model Device** and"
        " **Select VAE Device**. Keep cfg at 1.",
        licence=LICENCE,
    )


def budget_on_8_gb() -> Workflow:
    load, encoders, decoder = (
        diffusion_model(FLUX_Q8),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    model = Node("FeatherweightPlaceModel", {"model": load, "gpu_weights": 5.0})
    clip = Node("FeatherweightPlaceTextEncoder", {"clip": encoders, "gpu_weights": 0.0})
    return Workflow(
        "Flux.1 dev GGUF with a budget on 8 GB",
        text_to_picture(
            {"Load": [load, encoders, decoder], "What stays on the GPU": [model, clip]},
            model,
            clip,
            decoder,
        ),
        about="A model that is larger than the card, with a say in what stays on it. **Place Model"
        " (Featherweight)** keeps 5 GB of its weights there, spread over the model; each other"
        " layer is copied in whenever it runs, while the layers before it compute. The picture is"
        " the same to the bit. Nothing of the text encoders stays: they run once for each prompt.",
        memory=f"On the card: 5.0 GB of the model's 12.7, two buffers of 0.1 GB for copies, and"
        f" {RESERVE}. In main memory: the rest, 16 GB or better 24 GB in all. After a run the node"
        " says what each step copied, and what it would copy with as much as the card has room"
        " for.",
        change="`GPU weights in GB`: more until the card is full, less where a large picture, a"
        " browser or a second model needs the room. 12 GB cards hold 9; on 6 GB take 3. It works"
        " with any model and LoRAs, with and without dynamic VRAM. Keep cfg at 1.",
        licence=LICENCE,
    )


def schnell_gguf() -> Workflow:
    model, encoders, decoder = (
        diffusion_model(SCHNELL_GGUF),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    return Workflow(
        "Flux.1 schnell GGUF with GGUF T5",
        text_to_picture(
            {"Load": [model, encoders, decoder]}, model, encoders, decoder, steps=4, guidance=None
        ),
        about="The fast Flux: a picture in four steps, with no guidance to set. Model and T5 are"
        " GGUF and stay packed while they run.",
        memory=f"A GGUF takes the size of its file. The text encoders (3.1 GB) run first and make"
        f" room for the model; {RESERVE}, 0.6 GB at 768 × 768. The model takes {BITS}. What does"
        " not fit on the card stays in main memory, by itself.",
        change="The prompt; width and height. More than four steps change little. Keep cfg at 1."
        " LoRAs made for Flux.1 dev mostly work on this model too.",
        licence="Flux.1 schnell is under the Apache-2.0 licence.",
    )


WORKFLOWS = (
    nf4_all_in_one,
    nf4_with_two_loras,
    nf4_unet_only,
    nf4_package,
    gguf_with_gguf_t5,
    svdquant_with_a_lora,
    budget_on_8_gb,
    second_gpu,
    schnell_gguf,
)
