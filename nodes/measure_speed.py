"""The node Measure Speed (Featherweight)."""
import math

from comfy_api.latest import io, ui

from ..loaders.speed.measurement import measure_speed
from ..loaders.speed.report import figures, json_text, report_text, speed_chart
from .measure_sensitivity import latent_input
from .node_text import show_text


class MeasureSpeed(io.ComfyNode):
    """Times the steps of a model: exact, fast and dense, without and with its LoRAs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightMeasureSpeed",
            display_name="Measure Speed (Featherweight)",
            category="Featherweight",
            description="Measures in less than two minutes how long a step of this model takes on"
            " this machine: exact, fast and with dense weights, without and with its LoRAs, and how"
            " far fast is from exact.",
            search_aliases=["benchmark", "speed", "it/s", "seconds per step", "performance",
                            "measure"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to measure, with the LoRAs you use. It is not changed.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="A prompt. If nothing is connected, random numbers are used instead,"
                    " which most models accept.",
                ),
                latent_input(),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A line for each way to compute."),
                io.Image.Output(display_name="image", tooltip="Seconds of a step, as a chart."),
                io.String.Output(
                    display_name="json",
                    tooltip="Figures and versions without names, paths or prompts, to paste into an"
                    " issue.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        """Returns NaN, which is another value each time: every run measures again."""
        return math.nan

    @classmethod
    def execute(cls, model, positive=None, latent=None) -> io.NodeOutput:
        measurement = measure_speed(model, positive, latent)
        values = figures(model, measurement)
        text, json = report_text(measurement, values), json_text(values)
        title = f"{values['model']['class']} on {values['device']['name']}"
        picture = speed_chart(measurement, title)
        show_text(text)
        shown = ui.PreviewText(f"{text}\n\n{json}").as_dict()
        return io.NodeOutput(text, picture, json,
                             ui=ui.PreviewImage(picture, cls=cls).as_dict() | shown)
