"""Node ids of ComfyUI-nunchaku, and of ComfyUI-QwenImageLoraLoader, which adds LoRA nodes to it.

Inputs that place or speed up the original's own model are accepted and have no effect: ComfyUI
places these models, and LoRAs are patches of the host.
"""
import os
from collections.abc import Iterator, Sequence

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...cluster.workflow_graph import is_link
from ...loaders.lora.apply import apply_lora
from ...loaders.lora.compatibility import check_lora
from ...loaders.lora.lora_file import load_lora_file
from ...loaders.paths.folders import (
    ENCODER,
    find_file,
    list_files,
    list_model_folders,
    validate_files,
)
from ..apply_lora import FOLDERS as LORA_FOLDERS
from ..file_inputs import (
    Options,
    file_options,
    is_name,
    nullable_options,
    validate_main,
    validated_inputs,
)
from ..node_text import loader_output, show_text
from ..number_checks import reject_infinite
from . import LegacyNode, make_nodes
from .gguf import CLIP_FOLDERS, FOLDERS, load_clip, load_model, model_input

NONE = "None"  # a slot without a LoRA
NO_MODEL = "none"
SWITCH = ("enable", "disable")
OFFLOAD = ("auto", *SWITCH)
MIN_STRENGTH = 1e-5  # a LoRA with less is left out, as in the original
MAX_GPUS = 64
FLUX_SLOTS, SLOTS = 15, 10


def ignored_combo(name: str, options: Sequence[str], default: str, tooltip: str):
    """Returns an input with options that old workflows have and that has no effect."""
    return io.Combo.Input(
        name,
        options=options if isinstance(options, list) else list(options),
        default=default,
        optional=True,
        advanced=True,
        tooltip=f"Kept for old workflows. {tooltip}",
    )


def cpu_offload_input(default: str = "auto"):
    """Returns an input that old workflows have and that has no effect."""
    return ignored_combo(
        "cpu_offload",
        nullable_options(OFFLOAD),
        default,
        "ComfyUI moves weights to main memory by itself.",
    )


def flux_loader_inputs() -> list:
    """Returns the inputs of the loader for Flux."""
    return [
        model_input("model_path", list_model_folders(*FOLDERS)),
        io.Float.Input(
            "cache_threshold",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            advanced=True,
            tooltip="Kept for old workflows. No step is skipped; ComfyUI's EasyCache does that.",
        ),
        ignored_combo(
            "attention",
            ("nunchaku-fp16", "flash-attention2"),
            "nunchaku-fp16",
            "ComfyUI chooses how attention is computed.",
        ),
        cpu_offload_input(),
        io.Int.Input(
            "device_id",
            default=0,
            min=0,
            max=MAX_GPUS - 1,
            optional=True,
            advanced=True,
            tooltip="Kept for old workflows. ComfyUI chooses the GPU.",
        ),
        ignored_combo(
            "data_type",
            ("bfloat16", "float16"),
            "bfloat16",
            "ComfyUI chooses the dtype that the model computes in.",
        ),
        ignored_combo(
            "i2f_mode",
            ("enabled", "always"),
            "enabled",
            "It chooses a kernel of the original pack, which is not used.",
        ),
    ]


def qwen_image_loader_inputs() -> list:
    """Returns the inputs of the loader for Qwen-Image."""
    return [
        model_input("model_name", list_model_folders(*FOLDERS)),
        cpu_offload_input(),
        io.Int.Input(
            "num_blocks_on_gpu",
            default=1,
            min=1,
            max=60,
            optional=True,
            advanced=True,
            tooltip="Kept for old workflows. ComfyUI decides how much of the model stays on the"
            " GPU; Place Model (Featherweight) can set it.",
        ),
        ignored_combo(
            "use_pin_memory", SWITCH, "disable", "ComfyUI decides which memory it pins."
        ),
    ]


class Loader(LegacyNode):
    """Base of the loaders for diffusion models."""

    FUNCTION = "load_model"
    folders = FOLDERS

    @classmethod
    def validate_inputs(cls, model_path=None, model_name=None):
        return validate_files(model_path if model_name is None else model_name, keys=cls.folders)


class FluxLoader(Loader):
    """Loads a Flux."""

    @classmethod
    def load_model(
        cls,
        model_path,
        attention=None,
        cache_threshold=None,
        cpu_offload=None,
        device_id=None,
        data_type=None,
        i2f_mode=None,
    ) -> tuple:
        return loader_output(model=load_model(model_path))


class NamedModelLoader(Loader):
    """Loads a Qwen-Image or a Z-Image."""

    @classmethod
    def load_model(
        cls, model_name, cpu_offload=None, num_blocks_on_gpu=None, use_pin_memory=None
    ) -> tuple:
        return loader_output(model=load_model(model_name))


def encoder_inputs(model_type: str) -> list:
    """Returns the inputs that both loaders for text encoders have.

    All that come before a file are required, because the editor shows required inputs first.

    model_type: the only option of the input of that name.
    """
    files = [*list_files(*CLIP_FOLDERS), *list_model_folders(*CLIP_FOLDERS, model_class=ENCODER)]
    further = file_options(files, CLIP_FOLDERS, "text_encoder1")
    return [
        io.Combo.Input(
            "model_type",
            options=[model_type],
            tooltip="The kind of model the text is encoded for: Flux.1.",
        ),
        *(
            io.Combo.Input(
                name,
                options=options,
                tooltip="CLIP-L or T5, in any order: a file in models/text_encoders or"
                " models/clip, GGUF, NF4 or any other.",
            )
            for name, options in (("text_encoder1", files), ("text_encoder2", further))
        ),
        io.Int.Input(
            "t5_min_length",
            default=512,
            min=256,
            max=1024,
            step=128,
            optional=True,
            tooltip="The prompt is filled up to this number of tokens for the T5.",
        ),
    ]


def quantized_t5_inputs() -> list:
    """Returns the inputs of the older loader for text encoders that have no effect."""
    folders = list_model_folders(*CLIP_FOLDERS, model_class=ENCODER)
    return [
        ignored_combo(
            "use_4bit_t5", ("disable", "enable"), "disable", "The T5 is the file picked above."
        ),
        ignored_combo(
            "int4_model",
            Options([NO_MODEL, *folders], is_name),  # it need not exist, because it is not read
            NO_MODEL,
            "Pick a 4-bit T5 as one of the two text encoders.",
        ),
    ]


class TextEncoderLoader(LegacyNode):
    """Loads the two text encoders of Flux."""

    FUNCTION = "load_text_encoder"
    folders = CLIP_FOLDERS
    outputs = (io.Clip.Output,)

    @classmethod
    def validate_inputs(cls, text_encoder1=None):
        return validate_main(text_encoder1, ["text_encoder2"], cls.folders)

    @classmethod
    def load_text_encoder(
        cls,
        model_type=None,
        text_encoder1="",
        text_encoder2="",
        t5_min_length=512,
        use_4bit_t5=None,
        int4_model=None,
    ) -> tuple:
        clip = load_clip("flux", text_encoder1, text_encoder2)
        clip.set_tokenizer_option("t5xxl_min_length", t5_min_length)
        return loader_output(clip=clip)


def lora_inputs() -> list:
    """Returns the inputs of a node that applies one LoRA."""
    return [
        io.Model.Input("model", tooltip="The diffusion model the LoRA is applied to."),
        io.Combo.Input(
            "lora_name",
            options=list_files(*LORA_FOLDERS),
            tooltip="A file in models/loras; GGUF adapters work too.",
        ),
        strength_input("lora_strength"),
    ]


def strength_input(name: str):
    """Returns the input for the strength of a LoRA."""
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        optional=True,
        tooltip="How strongly the diffusion model is changed; may be negative.",
    )


def stack_model_input():
    """Returns the input for the model of a stack."""
    return io.Model.Input("model", tooltip="The diffusion model the LoRAs are applied to.")


def slot_inputs(count: int, with_switches: bool = False) -> list:
    """Returns the inputs for the LoRAs of a stack.

    Args:
        count: number of slots.
        with_switches: whether each slot has a switch.
    """
    files = Options([NONE, *list_files(*LORA_FOLDERS)], is_name)  # a slot may not be used
    inputs: list = []
    for slot in range(1, count + 1):
        if with_switches:
            inputs.append(
                io.Boolean.Input(
                    f"enabled_{slot}",
                    default=True,
                    optional=True,
                    tooltip="Whether this LoRA is applied.",
                )
            )
        inputs += [
            io.Combo.Input(
                f"lora_name_{slot}",
                options=files,
                default=NONE,
                optional=True,
                tooltip=f"A file in models/loras. {NONE}: this slot is empty.",
            ),
            strength_input(f"lora_strength_{slot}"),
        ]
    return inputs


def stack_inputs(
    with_clip: bool = False, with_offload: bool = True, with_switches: bool = False
) -> list:
    """Returns the inputs of a stack of ComfyUI-QwenImageLoraLoader."""
    inputs: list = [stack_model_input()]
    if with_clip:
        inputs.append(io.Clip.Input("clip", tooltip="A text encoder, which is not changed."))
    inputs.append(
        io.Int.Input(
            "lora_count",
            default=3,
            min=1,
            max=SLOTS,
            optional=True,
            tooltip="How many slots are applied, from the first on.",
        )
    )
    if with_offload:
        inputs.append(cpu_offload_input("disable"))
    if with_switches:
        inputs.append(
            io.Boolean.Input(
                "toggle_all",
                default=True,
                optional=True,
                tooltip="Kept for old workflows. The switch of each LoRA decides.",
            )
        )
    return [*inputs, *slot_inputs(SLOTS, with_switches)]


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
        report = check_lora(model, None, *load_lora_file(path), measure=False)
        if report.fits == "no":
            raise ValueError(f"{name} is not applied. {report.verdict}")
        model, _ = apply_lora(model, None, report, strength, 0.0)
        verdicts.append(f"{os.path.basename(path)}: {report.verdict}")
    if verdicts:
        show_text("\n".join(verdicts))
    return model


def chosen_loras(slots: dict, lora_count: int | None = None) -> Iterator[tuple[str, float]]:
    """Yields (file, strength) of each slot of a stack that is used.

    Args:
        slots: values of the inputs of `slot_inputs`.
        lora_count: number of slots that are used; None: all.
    """
    last = FLUX_SLOTS if lora_count is None else min(lora_count, FLUX_SLOTS)
    for slot in range(1, last + 1):
        name, strength = slots.get(f"lora_name_{slot}"), slots.get(f"lora_strength_{slot}", 1.0)
        if name not in (None, "", NONE) and slots.get(f"enabled_{slot}", True):
            yield name, strength


class LoraLoader(LegacyNode):
    """Applies a LoRA to a model."""

    FUNCTION = "load_lora"
    folders = LORA_FOLDERS

    @classmethod
    def validate_inputs(cls, lora_name=None):
        inputs = validated_inputs()
        if inputs is None or inputs.get("lora_strength", 1.0) == 0:
            return True
        return validate_files(lora_name, keys=cls.folders)

    @classmethod
    def load_lora(cls, model, lora_name, lora_strength=1.0) -> tuple:
        return (apply_loras(model, iter([(lora_name, lora_strength)])),)


class LoraStack(LegacyNode):
    """Applies the LoRAs of several slots to a model."""

    FUNCTION = "load_lora_stack"
    folders = LORA_FOLDERS

    @classmethod
    def validate_inputs(cls, lora_name_1=None):
        """Checks the files of the slots that are used."""
        inputs = validated_inputs() or {}
        count = inputs.get("lora_count")
        loras = chosen_loras(inputs, count if isinstance(count, int) else None)
        names = [name for name, strength in loras if strength != 0 and not is_link(name)]
        return validate_files(*names, keys=cls.folders)

    @classmethod
    def load_lora_stack(
        cls, model, lora_count=None, cpu_offload=None, toggle_all=None, **slots
    ) -> tuple:
        return (apply_loras(model, chosen_loras(slots, lora_count)),)


class LoraStackWithClip(LoraStack):
    """Applies the LoRAs of several slots to a model, and gives the text encoder as it is."""

    outputs = (io.Model.Output, io.Clip.Output)

    @classmethod
    def load_lora_stack(cls, model, clip, lora_count=None, toggle_all=None, **slots) -> tuple:
        return apply_loras(model, chosen_loras(slots, lora_count)), clip


# id: (base class, title, inputs, description)
NODE_CONFIG = {
    "NunchakuFluxDiTLoader": (
        FluxLoader,
        "Nunchaku FLUX DiT Loader",
        flux_loader_inputs,
        "The Flux loader of ComfyUI-nunchaku workflows. Same as Load Diffusion Model"
        " (Featherweight).",
    ),
    "NunchakuQwenImageDiTLoader": (
        NamedModelLoader,
        "Nunchaku Qwen-Image DiT Loader",
        qwen_image_loader_inputs,
        "The Qwen-Image loader of ComfyUI-nunchaku workflows. Same as Load Diffusion Model"
        " (Featherweight).",
    ),
    "NunchakuZImageDiTLoader": (
        NamedModelLoader,
        "Nunchaku Z-Image DiT Loader",
        lambda: [model_input("model_name", list_model_folders(*FOLDERS))],
        "The Z-Image loader of ComfyUI-nunchaku workflows. Same as Load Diffusion Model"
        " (Featherweight).",
    ),
    "NunchakuTextEncoderLoaderV2": (
        TextEncoderLoader,
        "Nunchaku Text Encoder Loader V2",
        lambda: encoder_inputs("flux.1"),
        "The loader for Flux's text encoders of ComfyUI-nunchaku workflows. Same as Load Text"
        " Encoder (Featherweight).",
    ),
    "NunchakuTextEncoderLoader": (
        TextEncoderLoader,
        "Nunchaku Text Encoder Loader (Deprecated)",
        lambda: [*encoder_inputs("flux"), *quantized_t5_inputs()],
        "The loader for Flux's text encoders of older ComfyUI-nunchaku workflows. Same as Load Text"
        " Encoder (Featherweight).",
    ),
    "NunchakuFluxLoraLoader": (
        LoraLoader,
        "Nunchaku FLUX LoRA Loader",
        lora_inputs,
        "The LoRA node of ComfyUI-nunchaku workflows. Applies a LoRA to any model.",
    ),
    "NunchakuFluxLoraStack": (
        LoraStack,
        "Nunchaku FLUX LoRA Stack",
        lambda: [stack_model_input(), *slot_inputs(FLUX_SLOTS)],
        "The node for several LoRAs of ComfyUI-nunchaku workflows. Applies them to any model.",
    ),
    "NunchakuQwenImageLoraLoader": (
        LoraLoader,
        "Nunchaku Qwen Image LoRA Loader",
        lora_inputs,
        "The LoRA node of ComfyUI-QwenImageLoraLoader workflows. Applies a LoRA to any model.",
    ),
    "NunchakuQwenImageLoraStack": (
        LoraStack,
        "Nunchaku Qwen Image LoRA Stack",
        stack_inputs,
        "The node for several LoRAs of ComfyUI-QwenImageLoraLoader workflows. Applies them to any"
        " model.",
    ),
    "NunchakuQwenImageLoraStackV2": (
        LoraStack,
        "Nunchaku Qwen Image LoRA Stack V2",
        stack_inputs,
        "The second node for several LoRAs of ComfyUI-QwenImageLoraLoader workflows. Applies them"
        " to any model.",
    ),
    "NunchakuQwenImageLoraStackV3": (
        LoraStack,
        "Nunchaku Qwen Image LoRA Stack V3",
        lambda: stack_inputs(with_switches=True),
        "The third node for several LoRAs of ComfyUI-QwenImageLoraLoader workflows, with a switch"
        " for each. Applies them to any model.",
    ),
    "NunchakuZImageTurboLoraStackV4": (
        LoraStackWithClip,
        "Nunchaku Z-Image-Turbo LoRA Stack V4",
        lambda: stack_inputs(with_clip=True, with_offload=False, with_switches=True),
        "The node for several LoRAs on Z-Image of ComfyUI-QwenImageLoraLoader workflows. Applies"
        " them to any model.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG, HELP_PAGE="LegacyNunchaku")
