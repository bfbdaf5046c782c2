"""The node Measure Sensitivity (Featherweight)."""
import os
from collections.abc import Callable

from comfy_api.latest import io, ui

from ..loaders.byte_sizes import size_text
from ..loaders.files.atomic_file import WriteError
from ..loaders.packing.calibration.measure import (
    CHOICES,
    EACH_TYPE,
    NORMAL,
    measure,
)
from ..loaders.packing.calibration.sampling import SamplingRun
from ..loaders.packing.calibration.sensitivity import FAST, Sensitivity, report, summary
from ..loaders.packing.calibration.while_generating import WhileGenerating
from ..loaders.paths.folders import new_sensitivity_path
from ..loaders.paths.name_tokens import fill_in
from ..loaders.recipe import source_name
from .node_text import show_text, text_sender
from .number_checks import reject_infinite
from .renamed_options import current, renamed_combo

WHILE_GENERATING = "while you generate"
RENAMED_EFFORTS = {"one run per layer": NORMAL, "no runs": FAST, EACH_TYPE: EACH_TYPE}
NO_IMATRIX = ("No imatrix is written any more. Use the measurement itself, which holds more:"
              " Save Packed Model (Featherweight) and the loaders take it.")


def latent_input():
    """Returns the input for the size that a model is measured with."""
    return io.Latent.Input(
        "latent",
        optional=True,
        tooltip="An empty latent of the size you use, or of a video's length. If nothing is"
        " connected: an image of 512 x 512, or one frame.",
    )


class MeasureSensitivity(io.ComfyNode):
    """Measures what the layers of a model see and what packing each of them costs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightMeasureSensitivity",
            display_name="Measure Sensitivity (Featherweight)",
            category="Featherweight",
            description="Generates a few images with a model and records the inputs of its layers"
            " and the error that packing each of them causes. Files packed with this measurement"
            " are much closer to the model at the same size.",
            search_aliases=[
                "imatrix",
                "importance matrix",
                "calibrate",
                "calibration",
                "sensitivity",
                "quantize",
                "quantise",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to measure, unquantized if you have it. It is not changed.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Prompts like those you use. Each entry of a combined conditioning and"
                    " of a list gets images of its own. If nothing is connected, random numbers are"
                    " used instead, which most models accept; the result is a little worse.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Used if cfg is above 1."
                ),
                latent_input(),
                io.Int.Input(
                    "samples",
                    default=SamplingRun.samples,
                    optional=True,
                    min=1,
                    max=1024,
                    tooltip="How many images are generated, 8 by default; the prompts take turns."
                    " More than 64 gain little.",
                ),
                io.Int.Input("steps", default=SamplingRun.steps, min=1, max=200, optional=True,
                             tooltip="Steps of each image."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    optional=True,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The cfg that you use with this model.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    optional=True,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="The seed of the noise.",
                ),
                renamed_combo(
                    "thoroughness",
                    (*CHOICES, WHILE_GENERATING),
                    RENAMED_EFFORTS,
                    default=NORMAL,
                    optional=True,
                    display_name="effort",
                    tooltip="How the cost of packing a layer is measured. normal: by its effect on"
                    " the model's output. fast: by the layer's own error, which takes less time and"
                    " is a little less exact. while you generate: as fast, from the images of the"
                    " sampler that gets the output model; none are generated here.",
                ),
                io.String.Input(
                    "name",
                    default="%model%",
                    optional=True,
                    tooltip="The file's name in output/sensitivity. %model% stands for the name of"
                    " the model.",
                ),
                io.Boolean.Input(
                    "imatrix",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Of earlier workflows. No imatrix is written any more.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="measurement",
                    tooltip="The file, for Save Packed Model (Featherweight).",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The layers that matter most, each with the cost of packing it.",
                ),
                io.Model.Output(
                    display_name="model",
                    tooltip="The model. With effort while you generate, connect it to your sampler:"
                    " the file is written after 1, 2, 4, 8 ... images.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, samples=(SamplingRun.samples,), steps=(SamplingRun.steps,), cfg=(1.0,),
                seed=(0,), thoroughness=(NORMAL,), name=("%model%",), positive=(), negative=(),
                latent=(), imatrix=()) -> io.NodeOutput:
        reject_infinite(cfg=cfg[0])
        model = model[0]
        name = fill_in(name[0].strip() or "%model%", source_name(model))
        path = new_sensitivity_path(name)  # raises before the work
        notes = [NO_IMATRIX] if next(iter(imatrix or ()), False) else []
        prompts = [
            [entry] for conditioning in positive or () if conditioning for entry in conditioning
        ]
        latent, negative = (next(iter(given or ()), None) for given in (latent, negative))
        effort = current(thoroughness[0], RENAMED_EFFORTS)
        if effort == WHILE_GENERATING:
            text = "\n".join([
                os.path.basename(path), "or the next free number will be written after 1, 2, 4, 8"
                " ... images that are generated with the output model.", *notes])
            show_text(text)
            return io.NodeOutput(path, text, WhileGenerating(_writer(name)).attach(model),
                                 ui=ui.PreviewText(text))
        run = SamplingRun(prompts, latent, negative, cfg[0], samples[0], steps[0], seed[0])
        sensitivity = measure(model, run, effort)
        path = _save(sensitivity, name)
        show_text("\n".join([_heading(path) + summary(sensitivity), *notes]))
        text = "\n".join([_heading(path) + report(sensitivity), *notes])
        return io.NodeOutput(path, text, model, ui=ui.PreviewText(text))


def _save(sensitivity: Sensitivity, name: str) -> str:
    """Saves a measurement under the next free number of its name, and returns the path.

    A number that another node or ComfyUI takes meanwhile is left to it.
    """
    while True:
        path = new_sensitivity_path(name)
        try:
            sensitivity.save(path, overwrite=False)
            return path
        except WriteError:
            if not os.path.exists(path):
                raise


def _writer(name: str) -> Callable[[Sensitivity], None]:
    """Returns a function that saves one measurement as it grows, and shows it on this node."""
    show, path = text_sender(), None

    def write(sensitivity: Sensitivity):
        nonlocal path
        if path is None:
            path = _save(sensitivity, name)
        else:
            sensitivity.save(path)
        show(f"{_heading(path)}{summary(sensitivity)}\nimages: {sensitivity.about['samples']}")

    return write


def _heading(path: str) -> str:
    return f"{os.path.basename(path)}\n{size_text(os.path.getsize(path))}, "
