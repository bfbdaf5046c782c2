"""The demo: one prompt drawn side by side on the real server gives nearly the same picture packed
or not, with LoRAs or not."""
import json
from collections.abc import Iterable

import numpy as np
import pytest

from devtools import demo
from devtools.demo_sheet import COLUMNS, sheet
from devtools.files import demo_files
from devtools.workflows.api_format import to_api

PROMPT = "a yellow house right of a pine tree on snow at dusk under a cloud"


of_the_mix = pytest.mark.not_on_fake_gpus(
    reason=
    "error feedback gives other last bits on another device, and the file that it packs another"
    " picture"
)


def write_models(server, types: Iterable[str]):
    """Writes models of the demo that are not there: Windows writes over none that is mapped."""
    for name in types:
        path = server.base / "models" / "diffusion_models" / demo_files.MODELS[name]
        if not path.exists():
            demo_files.write_model(path, name)


@pytest.fixture(scope="module")
def results(server):
    write_models(server, demo_files.recipes())
    demo.make_mix(server, steps=4, thoroughness="fast")
    return demo.draw_all(server, PROMPT, 2)


@of_the_mix
def test_a_packed_model_draws_what_the_dense_one_draws_and_the_larger_type_more_nearly(results):
    assert {"dense", "Q8_0", "Q4_K", "Q2_K", "Q4_K + LoRA"} <= results.keys()
    assert results["Q8_0"]["dense"] > results["Q2_K"]["dense"] and results["Q8_0"]["dense"] > 25
    assert results["dense"]["dense"] is None


@of_the_mix
def test_a_mix_made_here_is_nearer_to_the_dense_model_than_the_recipe_of_its_size(results, server):
    files = [
        server.base / "models" / "diffusion_models" / demo_files.MODELS[name]
        for name in ("Q4_K", demo_files.MIX)
    ]
    recipe, mix = (path.stat().st_size for path in files)
    assert 0.995 * recipe <= mix <= recipe
    assert results["mix"]["dense"] > results["Q4_K"]["dense"] + 1


@of_the_mix
def test_packed_models_hold_fewer_bytes(results):
    held = [results[title]["bytes"] for title in ("Q2_K", "Q4_K", "Q8_0", "dense")]
    assert held == sorted(held) and held[0] * 5 < held[-1] == 4 * sum(
        value.numel() for value in demo_files.flux().values()
    )
    assert all(result["seconds"] > 0 for result in results.values())


@of_the_mix
def test_loras_show_on_packed_models_as_on_the_dense_one(results):
    for title in {"Q4_K + LoRA", "NF4 + two LoRAs"} & results.keys():
        plain, _, loras = title.partition(" + ")
        dense = results[f"dense + {loras}"]["picture"]
        change = demo.difference(results["dense"]["picture"], dense)
        assert results[title]["dense"] > change + 8, title  # dB
        assert demo.difference(results[title]["picture"], results[plain]["picture"]) < change + 3


@of_the_mix
def test_the_sheet_has_room_for_every_picture(results):
    shown = [title for title in results if not title.startswith("dense +")]
    picture = sheet(results, PROMPT)
    assert picture.width > 1000 and picture.height > 256 * -(-len(shown) // COLUMNS)
    assert all(title in demo.as_text(results) for title in shown)


def test_the_demo_goes_without_a_model_that_could_not_be_written(server):
    workflow = json.loads(demo.SIDE_BY_SIDE.read_text(encoding="utf-8"))
    graph = to_api(workflow, server.object_info())
    titles = {
        str(node["id"]): node["title"] for node in workflow["nodes"]
        if node["type"] == "PreviewImage"
    }
    fewer, left = demo.without(graph, titles, demo_files.MODELS["NF4"])
    assert set(titles.values()) - set(left.values()) == {"NF4", "NF4 + two LoRAs"}
    assert demo_files.MODELS["NF4"] not in json.dumps(fewer)
    links = [
        value[0] for node in fewer.values() for value in node["inputs"].values()
        if isinstance(value, list)
    ]
    assert set(links) <= fewer.keys()


def dark_lines(picture: np.ndarray) -> float:
    """Returns how much of a picture is thin dark lines, which the LoRA learns."""
    grey, by = picture.astype(np.float32).mean(-1), 4
    across = np.minimum(grey[by:-by, 2 * by:], grey[by:-by, :-2 * by]) - grey[by:-by, by:-by]
    down = np.minimum(grey[2 * by:, by:-by], grey[:-2 * by, by:-by]) - grey[by:-by, by:-by]
    return float(np.maximum(across, down).clip(0).mean())


@of_the_mix
def test_a_lora_trained_on_a_packed_model_draws_what_it_learned(server):
    write_models(server, ["Q4_K"])
    workflow = json.loads(demo.TRAINING.read_text(encoding="utf-8"))
    prompt = to_api(workflow, server.object_info())
    train = next(node for node in prompt.values() if node["class_type"] == "TrainLoraNode")
    train["inputs"] |= {"steps": 40}
    run = server.queue(prompt)
    nodes = {spec["class_type"]: node for node, spec in prompt.items()}
    without, trained = (dark_lines(server.pixels(run, nodes[shown]))
                        for shown in ("PreviewImage", "SaveImage"))
    assert trained > 1.15 * without
    saved, = (server.base / "output" / "loras").glob("featherweight_demo*.safetensors")
    assert saved.stat().st_size > 1000
