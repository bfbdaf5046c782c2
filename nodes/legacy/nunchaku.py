"""Node ids of ComfyUI-nunchaku, and of ComfyUI-QwenImageLoraLoader, which adds LoRA nodes to it.

Inputs that place or speed up the original's own model are accepted and have no effect: ComfyUI
places these models, and LoRAs are patches of the host.
"""
import os
from collections.abc import Iterator

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import is_link

from ...loaders.lora.apply import apply_lora
from ...loaders.lora.compatibility import check_lora
from ...loaders.lora.lora_file import load_lora_file
from ...loaders.paths.folders import find_file, validate_files
from ..file_inputs import validated_inputs
from ..node_text import show_text
from ..number_checks import reject_infinite
from . import LegacyNode, make_nodes
from .inputs import FLUX_SLOTS, LORA_FOLDERS, NONE, SLOTS
from .loaders import Loader, ModelLoader, load_clip

MIN_STRENGTH = 1e-5  # a LoRA with less is left out, as in the original


class TextEncoderLoader(Loader):
    """Loads the two text encoders of Flux."""

    outputs = (io.Clip.Output,)
    also = "use_4bit_t5 int4_model"

    @classmethod
    def load(cls, *names, device, model_type=None, t5_min_length=512) -> dict:
        clip = load_clip("flux", *names, device=device)
        clip.set_tokenizer_option("t5xxl_min_length", t5_min_length)
        return {"clip": clip}


def apply_loras(model: ModelPatcher, loras: Iterator[tuple[str, float]]) -> ModelPatcher:
    """Returns the model with LoRAs applied, and shows on the node whether each one fits.

    Args:
        model: stays as it is.
        loras: (file in `LORA_FOLDERS`, strength) of each.

    Raises:
        ValueError: a strength is NaN or infinite, or no layer of a LoRA fits.
    """
    verdicts = []
    for name, strength in loras:
        reject_infinite(lora_strength=strength)
        if abs(strength) < MIN_STRENGTH:
            continue
        path = find_file(name, *LORA_FOLDERS)
        report = check_lora(model, None, *load_lora_file(path), measure=False,
                            use_header_alpha=False)
        if report.fits == "no":
            raise ValueError(f"{name} is not applied. {report.verdict}")
        model, _ = apply_lora(model, None, report, strength, 0.0)
        verdicts.append(f"{os.path.basename(path)}: {report.verdict}"
                        + (report.alpha_note and f" {report.alpha_note}"))
    if verdicts:
        show_text("\n".join(verdicts))
    return model


def chosen_loras(slots: dict, lora_count: int | None = None) -> Iterator[tuple[str, float]]:
    """Yields (file, strength) of each slot of a stack that is used.

    Args:
        slots: values of the inputs of `slots`.
        lora_count: number of slots that are used; None: all.
    """
    last = FLUX_SLOTS if lora_count is None else min(lora_count, FLUX_SLOTS)
    for slot in range(1, last + 1):
        name, strength = slots.get(f"lora_name_{slot}"), slots.get(f"lora_strength_{slot}", 1.0)
        if name not in (None, "", NONE) and slots.get(f"enabled_{slot}", True):
            yield name, strength


class LoraLoader(LegacyNode):
    """Applies a LoRA to a model."""

    @classmethod
    def validate_inputs(cls, lora_name=None):
        inputs = validated_inputs()
        if inputs is None or inputs.get("lora_strength", 1.0) == 0:
            return True
        return validate_files(lora_name, keys=LORA_FOLDERS)

    @classmethod
    def run(cls, lora_name, model, lora_strength=1.0) -> tuple:
        return (apply_loras(model, iter([(lora_name, lora_strength)])),)


class LoraStack(LegacyNode):
    """Applies the LoRAs of several slots to a model."""

    folders = LORA_FOLDERS
    also = "lora_count cpu_offload toggle_all"

    @classmethod
    def validate_inputs(cls, lora_name_1=None):
        """Checks the files of the slots that are used."""
        inputs = validated_inputs() or {}
        count = inputs.get("lora_count")
        loras = chosen_loras(inputs, count if isinstance(count, int) else None)
        names = [name for name, strength in loras if strength != 0 and not is_link(name)]
        return validate_files(*names, keys=LORA_FOLDERS)

    @classmethod
    def run(cls, model, lora_count=None, **slots) -> tuple:
        return (apply_loras(model, chosen_loras(slots, lora_count)),)


class LoraStackWithClip(LoraStack):
    """Applies the LoRAs of several slots to a model, and gives the text encoder as it is."""

    outputs = (io.Model.Output, io.Clip.Output)

    @classmethod
    def run(cls, model, clip, lora_count=None, **slots) -> tuple:
        return *super().run(model, lora_count, **slots), clip


def slots(count: int, switches: bool = False) -> str:
    """Returns the keys of the inputs for the LoRAs of a stack. switches: one for each slot."""
    return " ".join(f"{f'enabled_{slot} ' * switches}lora_name_{slot} lora_strength_{slot}"
                    for slot in range(1, count + 1))


STACK = f"model:stack lora_count cpu_offload:off {slots(SLOTS)}"
FLUX_ENCODERS = "text_encoder1 text_encoder2 t5_min_length"

# id: (base class, method, title, inputs, description)
NODE_CONFIG = {
    "NunchakuFluxDiTLoader": (
        ModelLoader, "load_model", "Nunchaku FLUX DiT Loader",
        "model_path cache_threshold attention cpu_offload device_id data_type i2f_mode",
        "The Flux loader of ComfyUI-nunchaku workflows. Same as Load Diffusion Model"
        " (GGUF, Featherweight).",
    ),
    "NunchakuQwenImageDiTLoader": (
        ModelLoader, "load_model", "Nunchaku Qwen-Image DiT Loader",
        "model_name:folders cpu_offload num_blocks_on_gpu use_pin_memory",
        "The Qwen-Image loader of ComfyUI-nunchaku workflows. Same as Load Diffusion Model"
        " (GGUF, Featherweight).",
    ),
    "NunchakuZImageDiTLoader": (
        ModelLoader, "load_model", "Nunchaku Z-Image DiT Loader", "model_name:folders",
        "The Z-Image loader of ComfyUI-nunchaku workflows. Same as Load Diffusion Model"
        " (GGUF, Featherweight).",
    ),
    "NunchakuTextEncoderLoaderV2": (
        TextEncoderLoader, "load_text_encoder", "Nunchaku Text Encoder Loader V2",
        f"model_type {FLUX_ENCODERS}",
        "The loader for Flux's text encoders of ComfyUI-nunchaku workflows. Same as Load Text"
        " Encoder (GGUF, Featherweight).",
    ),
    "NunchakuTextEncoderLoader": (
        TextEncoderLoader, "load_text_encoder", "Nunchaku Text Encoder Loader (Deprecated)",
        f"model_type:old {FLUX_ENCODERS} use_4bit_t5 int4_model",
        "The loader for Flux's text encoders of older ComfyUI-nunchaku workflows. Same as Load Text"
        " Encoder (GGUF, Featherweight).",
    ),
    "NunchakuFluxLoraLoader": (
        LoraLoader, "load_lora", "Nunchaku FLUX LoRA Loader", "model lora_name lora_strength",
        "The LoRA node of ComfyUI-nunchaku workflows. Applies a LoRA to any model.",
    ),
    "NunchakuFluxLoraStack": (
        LoraStack, "load_lora_stack", "Nunchaku FLUX LoRA Stack",
        f"model:stack {slots(FLUX_SLOTS)}",
        "The node for several LoRAs of ComfyUI-nunchaku workflows. Applies them to any model.",
    ),
    "NunchakuQwenImageLoraLoader": (
        LoraLoader, "load_lora", "Nunchaku Qwen Image LoRA Loader",
        "model lora_name lora_strength",
        "The LoRA node of ComfyUI-QwenImageLoraLoader workflows. Applies a LoRA to any model.",
    ),
    "NunchakuQwenImageLoraStack": (
        LoraStack, "load_lora_stack", "Nunchaku Qwen Image LoRA Stack", STACK,
        "The node for several LoRAs of ComfyUI-QwenImageLoraLoader workflows. Applies them to any"
        " model.",
    ),
    "NunchakuQwenImageLoraStackV2": (
        LoraStack, "load_lora_stack", "Nunchaku Qwen Image LoRA Stack V2", STACK,
        "The second node for several LoRAs of ComfyUI-QwenImageLoraLoader workflows. Applies them"
        " to any model.",
    ),
    "NunchakuQwenImageLoraStackV3": (
        LoraStack, "load_lora_stack", "Nunchaku Qwen Image LoRA Stack V3",
        f"model:stack lora_count cpu_offload:off toggle_all {slots(SLOTS, switches=True)}",
        "The third node for several LoRAs of ComfyUI-QwenImageLoraLoader workflows, with a switch"
        " for each. Applies them to any model.",
    ),
    "NunchakuZImageTurboLoraStackV4": (
        LoraStackWithClip, "load_lora_stack", "Nunchaku Z-Image-Turbo LoRA Stack V4",
        f"model:stack clip lora_count toggle_all {slots(SLOTS, switches=True)}",
        "The node for several LoRAs on Z-Image of ComfyUI-QwenImageLoraLoader workflows. Applies"
        " them to any model.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG, HELP_PAGE="LegacyNunchaku")
