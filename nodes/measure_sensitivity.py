"""The node Measure Sensitivity (Featherweight)."""
import os

from comfy_api.latest import io, ui

from ..loaders.byte_sizes import size_text
from ..loaders.packing.calibration.imatrix import write_imatrix
from ..loaders.packing.calibration.measure import (
    CHOICES,
    EACH_TYPE,
    NORMAL,
    measure,
)
from ..loaders.packing.calibration.sampling import SamplingRun
from ..loaders.packing.calibration.sensitivity import FAST, Sensitivity, report, summary
from ..loaders.packing.calibration.while_generating import WhileGenerating
from ..loaders.paths.folders import IMATRIX_SUFFIXES, SENSITIVITY, new_sensitivity_path
from ..loaders.paths.name_tokens import fill_in
from ..loaders.recipe import source_name
from .node_text import show_text
from .number_checks import reject_infinite
from .renamed_options import current, renamed_combo

WHILE_GENERATING = "while you generate"
RENAMED_EFFORTS = {"one run per layer": NORMAL, "no runs": FAST, EACH_TYPE: EACH_TYPE}


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
                "imatrix gguf",
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
                    min=1,
                    max=1024,
                    tooltip="How many images are generated, 8 by default; the prompts take turns."
                    " More than 64 gain little.",
                ),
                io.Int.Input("steps", default=SamplingRun.steps, min=1, max=200,
                             tooltip="Steps of each image."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The cfg that you use with this model.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
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
                    display_name="effort",
                    tooltip="How the cost of packing a layer is measured. normal: by its effect on"
                    " the model's output. fast: by the layer's own error, which takes less time and"
                    " is a little less exact. while you generate: as fast, from the images of the"
                    " sampler that gets the output model; none are generated here.",
                ),
                io.String.Input(
                    "name",
                    default="%model%",
                    tooltip="The file's name in output/sensitivity. %model% stands for the name of"
                    " the model.",
                ),
                io.Boolean.Input(
                    "imatrix",
                    default=False,
                    optional=True,
                    tooltip="Also writes an imatrix next to the file, with the names of the GGUF"
                    " files that Save Packed Model (Featherweight) writes: .imatrix.gguf for"
                    " llama.cpp's quantizers, .imatrix.dat for stable-diffusion.cpp.",
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
    def execute(cls, model, samples, steps, cfg, seed, thoroughness, name, positive=(), negative=(),
                latent=(), imatrix=()) -> io.NodeOutput:
        reject_infinite(cfg=cfg[0])
        model = model[0]
        name = fill_in(name[0].strip() or "%model%", source_name(model))
        path = new_sensitivity_path(name)
        prompts = [
            [entry] for conditioning in positive or () if conditioning for entry in conditioning
        ]
        latent, negative = (next(iter(given or ()), None) for given in (latent, negative))

        def save(sensitivity: Sensitivity) -> str:
            """Saves a measurement. Returns the names and sizes of its files."""
            sensitivity.save(path)
            heading = f"{os.path.basename(path)}\n{size_text(os.path.getsize(path))}, "
            if next(iter(imatrix or ()), False):
                imatrices = [f"{path.removesuffix(SENSITIVITY)}{suffix}"
                             for suffix in IMATRIX_SUFFIXES]
                write_imatrix(sensitivity, *imatrices)
                for imatrix_path in imatrices:
                    heading = f"{os.path.basename(imatrix_path)}\n{heading}"
            return heading

        effort = current(thoroughness[0], RENAMED_EFFORTS)
        if effort == WHILE_GENERATING:
            text = (f"{os.path.basename(path)}\nwill be written after 1, 2, 4, 8 ... images that"
                    " are generated with the output model.")
            show_text(text)
            return io.NodeOutput(path, text, WhileGenerating(save).attach(model),
                                 ui=ui.PreviewText(text))
        run = SamplingRun(prompts, latent, negative, cfg[0], samples[0], steps[0], seed[0])
        sensitivity = measure(model, run, effort)
        heading = save(sensitivity)
        show_text(heading + summary(sensitivity))
        text = heading + report(sensitivity)
        return io.NodeOutput(path, text, model, ui=ui.PreviewText(text))
