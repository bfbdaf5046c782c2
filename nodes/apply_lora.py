"""The node Apply LoRA (Featherweight)."""
import os
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import is_link

from ..loaders.lora.apply import apply_lora
from ..loaders.lora.block_weights import parse_block_weights
from ..loaders.lora.compatibility import check_lora
from ..loaders.lora.lora_file import load_lora_file
from ..loaders.lora.model_blocks import weight_keys
from ..loaders.lora.report import report_text
from ..loaders.paths.folders import LORA_FOLDERS, find_file, list_files, validate_files
from .added_inputs import added_combo
from .file_inputs import validated_inputs
from .node_text import show_text
from .number_checks import reject_infinite
from .renamed_options import current, renamed_combo

NONE = "none"  # no LoRA
SKIP, ERROR = "skip", "error"
USE, IGNORE = "use", "ignore"
RENAMED_MISFITS = {"apply the rest": SKIP, "fail": ERROR}


class ApplyLora(io.ComfyNode):
    """Applies a LoRA to a model and a text encoder, and reports how it fits."""

    @classmethod
    def define_schema(cls):
        strength: dict[str, Any] = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01,
                                    "optional": True}
        return io.Schema(
            node_id="FeatherweightApplyLora",
            display_name="Apply LoRA (Featherweight)",
            category="Featherweight",
            description="Applies a LoRA to a model, packed or not, and to its text encoder. Each"
            " block can have a strength of its own, and a report says in one sentence whether the"
            " LoRA fits.",
            search_aliases=[
                "lora",
                "lora loader",
                "load lora",
                "apply lora",
                "lora block weight",
                "lbw",
                "lora gguf",
            ],
            inputs=[  # pyright: ignore[reportArgumentType]  an optional CLIP is one too
                io.Model.Input("model", tooltip="The diffusion model the LoRA is applied to."),
                io.Combo.Input(
                    "lora_name",
                    options=[*list_files(*LORA_FOLDERS), NONE],
                    display_name="lora",
                    tooltip="A file in models/loras; GGUF adapters work too. none: nothing is"
                    " applied.",
                ),
                io.Float.Input(
                    "strength_model",
                    **strength,
                    tooltip="How strongly the diffusion model is changed, from -100 to 100. 1: as"
                    " trained; 0: not at all.",
                ),
                io.Float.Input(
                    "strength_clip",
                    **strength,
                    tooltip="How strongly the text encoder is changed, from -100 to 100. 1: as"
                    " trained; 0: not at all.",
                ),
                io.String.Input(
                    "block_weights",
                    default="",
                    optional=True,
                    multiline=True,
                    tooltip="Rules such as double=0.5, single.0-9=0, img_attn=0.8 or"
                    " preset:no-text. Empty: the same strength for all blocks. The help page of"
                    " this node lists the rules.",
                ),
                renamed_combo(
                    "misfits",
                    [SKIP, ERROR],
                    RENAMED_MISFITS,
                    default=SKIP,
                    optional=True,
                    display_name="if layers do not match",
                    tooltip="What to do if some layers of the LoRA do not match the model. skip:"
                    " apply the others. error: stop and name them. A LoRA without any matching"
                    " layer is always an error.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder the LoRA is applied to, if it has layers for one.",
                ),
                added_combo(
                    "header_alpha",
                    [USE, IGNORE],
                    earlier=IGNORE,
                    default=USE,
                    display_name="alpha in the header",
                    tooltip="Whether an alpha counts that is not a tensor of the file, but in its"
                    " header or in an adapter_config.json in its folder. use: strength 1 is what"
                    " the trainer meant. ignore: as in Load LoRA and in earlier versions.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.String.Output(
                    display_name="report",
                    tooltip="Whether and how the LoRA fits, the verdict first.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        inputs = validated_inputs()
        if inputs is None or lora_name == NONE:
            return True
        strengths = [inputs.get(name, 1.0) for name in ("strength_model", "strength_clip")]
        if strengths == [0, 0] or any(map(is_link, strengths)):
            return True  # not applied, or a link, whose value is not known yet
        return validate_files(lora_name, keys=LORA_FOLDERS)

    @classmethod
    def execute(
        cls,
        model,
        lora_name,
        strength_model=1.0,
        strength_clip=1.0,
        block_weights="",
        misfits=SKIP,
        clip=None,
        header_alpha=IGNORE,
    ) -> io.NodeOutput:
        reject_infinite(strength_model=strength_model, strength_clip=strength_clip)
        if lora_name == NONE:
            return io.NodeOutput(model, clip, "No LoRA is chosen, so none is applied.")
        if strength_model == 0 and strength_clip == 0:
            return io.NodeOutput(model, clip, f"{lora_name} is not applied: both strengths are 0.")
        factor = parse_block_weights(block_weights, weight_keys(model, clip))
        report = check_lora(
            model, clip, *load_lora_file(find_file(lora_name, *LORA_FOLDERS)), measure=False,
            use_header_alpha=header_alpha == USE
        )
        strengths = f"model {strength_model:g}"
        if clip is not None:
            strengths += f", text encoder {strength_clip:g}"
        settings = {"strength": strengths}
        if block_weights.strip():
            settings["blocks"] = " ".join(block_weights.split())
        if report.fits == "no":
            raise ValueError(f"{lora_name} is not applied. {report.verdict}")
        if report.misfits and current(misfits, RENAMED_MISFITS) == ERROR:
            count = len(report.misfits)
            ellipsis = " …" if count > 3 else ""
            raise ValueError(
                f"{lora_name} is not applied, because 'if layers do not match' is error."
                f" {report.verdict} {count} do not fit: {'; '.join(report.misfits[:3])}{ellipsis}"
            )
        notes = [report.strength_note, *report.header_alpha.notes]
        if report.alpha_note:
            notes.append(f"{report.alpha_note} To apply it, set 'alpha in the header' to use, and"
                         " the strength as for any other LoRA.")
        if any(notes):
            show_text("\n\n".join(filter(None, notes)))
        model, clip = apply_lora(model, clip, report, strength_model, strength_clip, factor)
        return io.NodeOutput(
            model, clip, report_text(report, os.path.basename(lora_name), settings)
        )
