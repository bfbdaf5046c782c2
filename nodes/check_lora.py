"""The node Check LoRA (Featherweight)."""
import os

from comfy_api.latest import io, ui

from ..loaders.lora.compatibility import check_lora
from ..loaders.lora.lora_file import load_lora_file
from ..loaders.lora.report import report_text
from ..loaders.lora.report_chart import report_picture
from ..loaders.paths.folders import LORA_FOLDERS, find_file
from .file_inputs import file_input, list_options
from .node_text import show_text


class CheckLora(io.ComfyNode):
    """Compares a LoRA with a model and shows what fits, as text and as a chart."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightCheckLora",
            display_name="Check LoRA (Featherweight)",
            category="Featherweight",
            description="Says whether a LoRA fits a model before you run it: which layers match,"
            " which do not and why, which model it was probably made for, its kind and rank, and"
            " how much it changes each block.",
            search_aliases=[
                "lora",
                "lora check",
                "check lora",
                "lora info",
                "lora report",
                "lora compatibility",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to compare the LoRA with. It is not changed."
                ),
                file_input(
                    "lora_name",
                    list_options(*LORA_FOLDERS),
                    display_name="lora",
                    tooltip="A file in models/loras; GGUF adapters work too.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder. The LoRA's layers for it are checked as well.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The report, the verdict first."),
                io.Image.Output(
                    display_name="image",
                    tooltip="How much the LoRA changes each block, as a bar chart.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, lora_name, clip=None) -> io.NodeOutput:
        name = os.path.basename(lora_name)
        report = check_lora(model, clip, *load_lora_file(find_file(lora_name, *LORA_FOLDERS)))
        text, picture = report_text(report, name), report_picture(report, name)
        show_text(text)
        previews = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(text, picture, ui=previews)
