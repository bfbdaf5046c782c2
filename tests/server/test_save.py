"""Save Packed Model on the real server: the plan while it works, a file the loaders list, and
nothing left by a cancel."""
import datetime
from pathlib import Path

import numpy as np
import pytest

from devtools import demo
from devtools.files import demo_files, tiny_models
from devtools.files.gguf_files import write_random_gguf
from devtools.host.server import ServerError

LORA = next(iter(demo_files.LORAS.values()))


def save(server, model_name, on_progress=None, others=(), **inputs):
    """others: further nodes, by their ids."""
    return server.queue(
        {
            "1": {"class_type": demo.LOADER, "inputs": {"model_name": model_name}}, "2": {
                "class_type": "LoraLoaderModelOnly",
                "inputs": {"model": ["1", 0], "lora_name": LORA, "strength_model": 0.5}
            }, "3": {
                "class_type": "FeatherweightSavePackedModel", "inputs": {
                    "model": ["2", 0], "type": "Q4_K", "size_gb": 1.0,
                    "filename_prefix": "diffusion_models/made/%year%", "folder": "output",
                    "loras": "keep LoRA quality (larger)", "overwrite": False, **inputs
                }
            }, **dict(others)
        }, on_progress)


def files_in(server) -> list[str]:
    return sorted(path.name
                  for path in (server.base / "output" / "diffusion_models" / "made").glob("*"))


def test_a_model_with_a_lora_is_saved_listed_and_loaded_again(server):
    seen = []
    run = save(server, demo.MODEL_NAME, lambda node, value, maximum: seen.append(
        (node, value, maximum)))
    [name] = files_in(server)
    assert name.endswith("_Q4_K_00001_.gguf") and name[:4].isdigit()
    _, plan, *_, shown = run.texts["3"]
    assert plan.splitlines()[0] == name and "Q4_K " in plan and "  " not in plan
    assert plan.endswith("\npacking")
    assert shown.startswith(f"{name}\n") and "LoRA 1 (strength 0.5): " in shown
    report = run.outputs["3"]["text"][0].splitlines()
    assert not set(shown.splitlines()) - {*report, plan.splitlines()[2]}
    assert [line for line in report if line.startswith("Q4_K: ")]
    bar = [(value, maximum) for node, value, maximum in seen if node == "3" and maximum]
    assert bar[0][0] == 0 and bar[-1][0] == bar[-1][1] > 0
    listed = server.object_info()[demo.LOADER]["input"]["required"]["model_name"]
    options = listed[1]["options"] if listed[0] == "COMBO" else listed[0]
    assert f"made/{name}" in [option.replace("\\", "/") for option in options]
    loaded = server.queue({
        "1": {"class_type": demo.LOADER, "inputs": {"model_name": f"made/{name}"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    })
    assert "Q4_K" in loaded.texts["1"][-1]


def test_a_prompt_that_no_editor_queued_has_the_tokens_of_its_file_name_filled_in(server):
    before = files_in(server)
    save(server, demo.MODEL_NAME, filename_prefix="diffusion_models/made/"
         "%model% %date:yyyy%x %LoraLoaderModelOnly.strength_model%")
    [name] = set(files_in(server)) - set(before)
    year = datetime.date.today().year
    assert name.startswith(f"{Path(demo.MODEL_NAME).stem} {year}x 0.5_Q4_K_")


@pytest.mark.parametrize("given", [
    {"measurement": ["4", 0]}, {"sensitivity": ["4", 0], "measurement": "none"}])
def test_a_prompt_names_a_measurement_by_todays_input_or_that_of_0_2_2(server, given):
    name = {"class_type": "PrimitiveString", "inputs": {"value": "gone.sensitivity"}}
    with pytest.raises(ServerError, match="gone.sensitivity is in none of the folders of measure"):
        save(server, demo.MODEL_NAME, others={"4": name}, **given)


def test_a_cancel_leaves_nothing(server):
    path = server.base / "models" / "diffusion_models" / "many layers to save.gguf"
    write_random_gguf(path, tiny_models.flux_shapes(256, 10, 20), "Q8_0")
    before = files_in(server)

    def cancel(node, value, maximum):
        if node == "3" and maximum and 0 < value < maximum:
            server.post("/interrupt", {})

    with pytest.raises(ServerError, match="FeatherweightSavePackedModel was interrupted"):
        save(server, path.name, cancel)
    assert files_in(server) == before


def test_a_measurement_of_the_samplers_own_images_leaves_them_equal_and_is_used(server):
    _, prompt = demo.run_workflow(server)
    server.forget()
    expected = server.pixels(server.queue(prompt))
    sampler = next(node for node, spec in prompt.items() if spec["class_type"] == "KSampler")
    prompt["measure"] = {"class_type": "FeatherweightMeasureSensitivity", "inputs": {
        "model": prompt[sampler]["inputs"]["model"], "samples": 8, "steps": 12, "cfg": 1.0,
        "seed": 0, "thoroughness": "while you generate", "name": "own"}}
    prompt[sampler]["inputs"]["model"] = ["measure", 2]
    server.forget()
    assert np.array_equal(server.pixels(server.queue(prompt)), expected)
    [file] = (server.base / "output" / "sensitivity").glob("own_*")
    save(server, demo.MODEL_NAME, measurement=file.name)
    assert len(files_in(server)) > 0
