"""Blueprints for the editor's node library, most of them example workflows as one node."""
from dataclasses import replace

from devtools.workflows import flux, flux_with_pictures, qwen_image, stable_diffusion, video
from devtools.workflows.editor import Node, Workflow
from devtools.workflows.packing import FLUX_BF16
from devtools.workflows.parts import checkpoint, diffusion_model
from devtools.workflows.subgraphs import Blueprint

PICTURE = ("text to image", "txt2img", "t2i", "text to image gguf")
EDIT = ("image edit", "image to image", "img2img", "instruct", "image edit gguf")


def _from_example(
    workflow: Workflow, name: str, about: str, aliases: tuple[str, ...]
) -> Blueprint:
    return Blueprint(replace(workflow, name=name, about=about), aliases)


def flux_from_text() -> Blueprint:
    return _from_example(
        flux.gguf_with_gguf_t5(),
        "Flux.1 dev Text to Image (Featherweight)",
        "Draws a picture from a prompt with Flux.1 dev. Model and T5 are GGUF files whose"
        " weights stay packed in memory. Connect IMAGE to Save Image.",
        (*PICTURE, "flux"),
    )


def qwen_image_from_text() -> Blueprint:
    return _from_example(
        qwen_image.qwen_image(),
        "Qwen-Image Text to Image (Featherweight)",
        "Draws a picture from a prompt with Qwen-Image, writing in the picture included."
        " Model and text encoder are GGUF files whose weights stay packed in memory. Connect IMAGE"
        " to Save Image.",
        (*PICTURE, "qwen"),
    )


def z_image_from_text() -> Blueprint:
    return _from_example(
        qwen_image.z_image_turbo(),
        "Z-Image Turbo Text to Image (Featherweight)",
        "Draws a picture from a prompt in eight steps with Z-Image Turbo. Model and text"
        " encoder are GGUF files whose weights stay packed in memory. Connect IMAGE to Save Image.",
        (*PICTURE, "z-image"),
    )


def sdxl_from_text() -> Blueprint:
    load = checkpoint(stable_diffusion.SDXL_GGUF)
    columns = stable_diffusion.text_to_picture((load, 0), (load, 1), (load, 2), 1024)
    workflow = Workflow(
        "SDXL Text to Image (Featherweight)",
        [{"Load": [load]}, *columns],
        about="Draws a picture from a prompt with Stable Diffusion XL: model, text encoders and"
        " VAE come from one GGUF file, whose weights stay packed in memory. Connect IMAGE to Save"
        " Image.",
        memory="The text encoders (0.9 GB) run first and make room. The model takes 3.2 GB, the"
        " VAE 0.2 GB, and ComfyUI sets 0.3 to 0.5 GB aside for the computation at 1024 × 1024.",
        change="The checkpoint: any SDXL, also as safetensors. Steps from 20 to 40; cfg from 4 to"
        " 8.",
    )
    return Blueprint(workflow, (*PICTURE, "sdxl", "stable diffusion xl"))


def kontext() -> Blueprint:
    return _from_example(
        flux_with_pictures.kontext(),
        "Flux.1 Kontext Image Edit (Featherweight)",
        "Changes a picture as a sentence says, and leaves the rest of it alone, with Flux.1"
        " Kontext. Model and T5 are GGUF files whose weights stay packed in memory. Connect Load"
        " Image to image, and IMAGE to Save Image.",
        (*EDIT, "kontext", "flux"),
    )


def qwen_image_edit() -> Blueprint:
    return _from_example(
        qwen_image.qwen_image_edit(),
        "Qwen-Image-Edit (Featherweight)",
        "Changes a picture as a sentence says, with Qwen-Image-Edit. The text encoder sees"
        " the picture through its mmproj file, in the same folder. The weights of the GGUF files"
        " stay packed in memory. Connect Load Image to image, and IMAGE to Save Image.",
        (*EDIT, "qwen", "mmproj"),
    )


def wan_from_text() -> Blueprint:
    return _from_example(
        video.wan_14b(),
        "Wan 2.2 14B Text to Video (Featherweight)",
        "Makes a video from a prompt in four steps with the two models of Wan 2.2: one"
        " begins, one finishes, and each has its LoRA. Models and text encoder are GGUF files"
        " whose weights stay packed in memory. Connect VIDEO to Save Video.",
        ("text to video", "txt2vid", "t2v", "video", "text to video gguf", "wan"),
    )


def lora_stack() -> Blueprint:
    load = checkpoint(stable_diffusion.SDXL_GGUF)
    stack, reports, above = [], [], {"model": (load, 0), "clip": (load, 1)}
    for name, file, strength in (
        ("first", stable_diffusion.SDXL_LCM, 1.0),
        ("second", stable_diffusion.PIXEL_ART, 1.2),
        ("third", None, 1.0),
    ):
        apply = Node(
            "FeatherweightApplyLora",
            above | {
                "lora_name": file.name if file else "none",
                "strength_model": strength,
                "strength_clip": strength,
            },
            f"Apply LoRA: {name}",
            files=(file,) if file else (),
        )
        stack.append(apply)
        above = {"model": (apply, 0), "clip": (apply, 1)}
    text = (stack[0], 2)
    for apply in stack[1:]:
        joined = {"string_a": text, "string_b": (apply, 2), "delimiter": "\n\n"}
        text = Node("StringConcatenate", joined)
        reports.append(text)
    workflow = Workflow(
        "Apply LoRA Stack with Check (Featherweight)",
        [
            {"Load": [load]},
            {"LoRAs": stack},
            {"Reports": reports},
            *stable_diffusion.text_to_picture(*above.values(), (load, 2), 1024),
            {"Report": [Node("PreviewAny", {"source": text}, "Whether the LoRAs fit")]},
        ],
        about="Applies up to three LoRAs to a model, packed or not, and to its text encoder, and"
        " says of each whether it fits and how much of it. none leaves a LoRA out; for more than"
        " three, put a second stack behind the first. Connect model, and clip for LoRAs"
        " with layers for the text encoder; report goes to Preview as Text.",
        memory="The model stays packed; a LoRA takes the size of its file.",
        change="The LoRAs and their strengths. A strength holds for the model and the text encoder;"
        " the nodes inside have one for each, and one for each block of the model.",
    )
    outside = [node for node in workflow.nodes if node not in (*stack, *reports)]
    return Blueprint(workflow, ("lora", "lora stack", "lora check", "lora gguf"), tuple(outside))


def packed_and_saved() -> Blueprint:
    model = diffusion_model(FLUX_BF16)
    save = Node(
        "FeatherweightSavePackedModel",
        {
            "model": model,
            "type": "Q4_K",
            "size_gb": 6.0,
            "filename_prefix": "diffusion_models/packed-model",
            "folder": "output",
        },
    )
    workflow = Workflow(
        "Pack and Save Model (Featherweight)",
        [
            {"Load": [model], "Save": [save]},
            {"Result": [
                Node("PreviewAny", {"source": (save, 1)}, "What the file holds"),
                Node("FeatherweightInspectModelFile", {"file_name": "none", "path": (save, 0)}),
            ]},
        ],
        about="Packs a diffusion model into a GGUF or NF4 file: in one type, or in the best types"
        " for a size. The file lies in ComfyUI's output, in diffusion_models, where the loaders"
        " find it. Connect report to Preview as Text, path to Inspect Model File (Featherweight);"
        " both may stay open.",
        memory="The file takes 6.8 GB as Q4_K for a model of 23.8 GB. Weights are read and packed"
        " one at a time.",
        change="The model: any in bf16, fp16, fp32 or fp8. LoRAs and merges between the two nodes"
        " inside are packed with it.",
    )
    return Blueprint(workflow, ("quantize", "convert", "save model", "save gguf", "save nf4"))


BLUEPRINTS = (
    flux_from_text,
    qwen_image_from_text,
    z_image_from_text,
    sdxl_from_text,
    kontext,
    qwen_image_edit,
    wan_from_text,
    lora_stack,
    packed_and_saved,
)
