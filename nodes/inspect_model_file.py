"""The node Inspect Model File (Featherweight)."""
from comfy_api.latest import io, ui

from ..loaders.inspect import inspect
from ..loaders.inspect.inspection_chart import inspection_picture
from ..loaders.inspect.inspection_text import inspection_text, summary
from ..loaders.paths.folders import (
    ENCODER,
    GGUF_FOLDERS,
    find_file,
    list_files,
    list_model_folders,
    list_pipeline_folders,
    resolve_saved_path,
)
from .node_text import show_text

FOLDERS = tuple(key for pair in GGUF_FOLDERS.items() for key in pair)
PACKAGES = ("diffusion_models", "checkpoints", "diffusers")
NONE = "none"


def list_all_files() -> list[str]:
    """Returns the names of all files, model folders and packages that can be inspected."""
    folders = [
        *list_model_folders(*FOLDERS),
        *list_model_folders("text_encoders", model_class=ENCODER),
        *list_pipeline_folders(*PACKAGES),
    ]
    return list(dict.fromkeys([*list_files(*FOLDERS), *folders]))


class InspectModelFile(io.ComfyNode):
    """Describes a model file or a loaded model, as text and as a chart."""

    @classmethod
    def define_schema(cls):
        files = list_all_files()
        return io.Schema(
            node_id="FeatherweightInspectModelFile",
            display_name="Inspect Model File (Featherweight)",
            category="Featherweight",
            description="Says what a model file or a loaded model is: its family, its tensors by"
            " type, the GPUs it fits, the other files it needs, and how far each part is from a"
            " reference. The report is a text and an image.",
            search_aliases=[
                "inspect",
                "model info",
                "file info",
                "inspect gguf",
                "inspect nf4",
                "what is this file",
                "compare",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=[NONE, *files],
                    display_name="file",
                    tooltip="Any file in the folders of diffusion models, checkpoints, text"
                    " encoders, LoRAs, VAEs, ControlNets, model patches and CLIP vision, or a"
                    " folder that diffusers saved. A connected model is inspected instead, and if"
                    " there is none, a connected path.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A loaded model, inspected instead of the file. It is not changed.",
                ),
                io.Combo.Input(
                    "reference_name",
                    options=[NONE, *files],
                    display_name="reference",
                    default=NONE,
                    optional=True,
                    tooltip="The same model in a more exact file, such as bf16. The error of each"
                    " tensor against it is measured, for which both files are read completely.",
                ),
                io.String.Input(
                    "path",
                    optional=True,
                    force_input=True,
                    tooltip="The path output of Save Packed Model (Featherweight), inspected"
                    " instead of the file.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="The report. Its first line says what the file is.",
                ),
                io.Image.Output(
                    display_name="image", tooltip="The bytes of each block, colored by type."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file_name=None, reference_name=NONE):
        return True  # the names are not used while a model is connected

    @classmethod
    def execute(cls, file_name, model=None, reference_name=NONE, path=None) -> io.NodeOutput:
        folders = dict.fromkeys([*FOLDERS, *PACKAGES])
        if model is None and path is None and file_name == NONE:
            raise ValueError(
                "Inspect Model File has nothing to inspect: pick a file, or connect a model or a"
                " path."
            )
        if model is not None:
            source = model
        else:
            source = find_file(file_name, *folders) if path is None else resolve_saved_path(path)
        reference = find_file(reference_name, *folders) if reference_name != NONE else None
        inspections = inspect(source, reference)
        text = "\n\n".join(map(inspection_text, inspections))
        picture = inspection_picture(max(inspections, key=lambda part: part.memory_bytes))
        show_text("\n\n".join(map(summary, inspections)))
        previews = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(text, picture, ui=previews)
