"""Inspect Model File through the real server: a file and a loaded model."""
import io

from PIL import Image

from devtools import demo


def report(server, **inputs):
    """(text, picture, what the editor shows on the node) of the node."""
    run = server.queue({
        "1": {"class_type": demo.LOADER, "inputs": {"model_name": demo.MODEL_NAME}}, "2": {
            "class_type": "FeatherweightInspectModelFile",
            "inputs": {"file_name": "none", **inputs}
        }
    })
    picture = Image.open(io.BytesIO(server.image(run.outputs["2"]["images"][0])))
    return run.outputs["2"]["text"][0], picture, run.texts["2"][-1]


def test_a_file_and_the_model_made_of_it_get_a_report_and_a_picture(server):
    text, picture, shown = report(server, file_name=demo.MODEL_NAME, reference_name=demo.MODEL_NAME)
    assert "is a diffusion model: Flux.1." in text and "exact" in text
    lines = shown.splitlines()
    # those that the picture does not show
    assert lines == [line for line in text.splitlines() if line in lines]
    assert "needs VAE: " in shown and "tensors, " not in shown
    assert picture.size[0] > 600
    of_model = report(server, model=["1", 0])[0]
    assert of_model.split("\n")[0] == text.split("\n")[0]
