"""Packed models made from Flux.1 dev's bf16 file. The demo's own are in `demo`."""
from devtools.workflows.editor import File, Node, Workflow
from devtools.workflows.flux import DETAIL_LORA, HYPER_LORA, LICENCE, RESERVE, text_to_picture
from devtools.workflows.parts import (
    CLIP_L,
    FLUX_VAE,
    T5_GGUF,
    diffusion_model,
    lora,
    text_encoder,
    vae,
)

FLUX_BF16 = File("diffusion_models", "Comfy-Org/flux1-dev", "flux1-dev.safetensors", "23.8 GB")


def packed_while_loading() -> Workflow:
    model, encoders, decoder = (
        diffusion_model(FLUX_BF16),
        text_encoder("flux", CLIP_L, T5_GGUF),
        vae(FLUX_VAE),
    )
    model.inputs["pack_to"], model.title = "Q4_K", "Load Diffusion Model: packed while it is read"
    details = lora(model, DETAIL_LORA)
    return Workflow(
        "Flux.1 dev packed while it loads",
        text_to_picture(
            {"Load": [model, encoders, decoder], "LoRA": [details]}, details, encoders, decoder
        ),
        about="A model of which there is only a large file, in less than a third of its memory:"
        " *pack to* packs each weight as it is read from the bf16 file, so the model never lies in"
        " memory as a whole. The LoRA is not packed: it lies beside, with its full effect.",
        memory=f"The text encoders (3.1 GB) run first and make room for the model. It takes 6.8 GB"
        f" in place of 23.8, and {RESERVE}. What does not fit on the card stays in main memory, by"
        " itself.",
        change="The type: `Q8_0` is the most exact, `Q3_K` the smallest. Any file or folder of a"
        " model in bf16, fp16, fp32 or fp8 works, and text encoders and checkpoints have the same"
        " input. It is packed at each load: what you use every day, save with **Save Packed Model"
        " (Featherweight)**. Keep cfg at 1.",
        licence=LICENCE,
    )


def two_loras_in_a_gguf() -> Workflow:
    model = diffusion_model(FLUX_BF16)
    fast = lora(model, HYPER_LORA, 0.125, "Load LoRA: 8 steps are enough")
    details = lora(fast, DETAIL_LORA)
    save = Node(
        "FeatherweightSavePackedModel",
        {
            "model": details,
            "type": "Q4_K",
            "filename_prefix": "diffusion_models/flux1-dev-8-steps-details",
        },
    )
    return Workflow(
        "Flux.1 dev two LoRAs into a GGUF",
        [{"Load": [model]}, {"Two LoRAs": [fast, details]}, {"Save": [save]}],
        about="A Flux that needs 8 steps and draws more detail, as one GGUF: both LoRAs are added"
        " to the weights in float32, at the strengths they have here, and the sum is packed once."
        " The file loads here, in ComfyUI-GGUF and in stable-diffusion.cpp, none of which then"
        " needs the LoRAs. The node shows the plan first, and at the end how much of each LoRA is"
        " in the file.\n\nNothing is drawn. The file lies in ComfyUI's output, in"
        " `diffusion_models`, where the loaders find it: press **R**.",
        memory="The file that is made takes 6.8 GB on the disk. Weights are read, changed and"
        " packed one at a time; what ComfyUI itself holds of the bf16 model (up to 23.8 GB) comes"
        " on top. Where that is too much: `python3 pack.py SOURCE OUT --type Q4_K --lora"
        " FILE:0.125 --lora FILE:1`, in this pack's folder, does the same in less.",
        change="The LoRAs and their strengths; none or many, of any kind. `type`, or *size in GB*"
        " with the size below it. A merge of two models in the place of the LoRAs is saved the"
        " same way. Begin with a bf16 or fp16 file: in one that is packed already, weights that a"
        " LoRA changes take Q6_K or more, so that it arrives.",
        licence=LICENCE,
    )


WORKFLOWS = (packed_while_loading, two_loras_in_a_gguf)
