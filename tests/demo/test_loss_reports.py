"""What Save Packed Model says of losses, against images of the demo's model: within each kind of
figure, the file with the larger figure is the one further from the dense model."""
import itertools
import re

from devtools.measure.painter import Painter
from devtools.measure.weights import snr

import pytest
import torch
from pack_api import EXACT, load_diffusion_model, plan_file, source_of_model

from demo_model import scenes
from featherweight.loaders.inspect import inspect
from featherweight.loaders.inspect.inspection_text import inspection_text
from featherweight.loaders.packing.layer_losses import LOSS_IN_LAYERS
from featherweight.loaders.packing.planning.file_plan import SaveOptions, suffix_for
from featherweight.loaders.packing.save import save

MIX = 5_000_000  # bytes, with types of GGUF
FEW = ("Q4_K", "Q3_K", MIX)
MANY = (*FEW, "Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "Q2_K", 6_500_000, 5_500_000, 4_500_000, 4_000_000)
OTHERS = ("NF4", "int8_convrot", "float8_e4m3fn", "mxfp8", "nvfp4", (6_000_000, (
    "int8_convrot", "nvfp4")))
SENTENCES = {
    "none": r"^Loss: [a-z ]+ \(([\d.]+) % of the weights\)\.$",
    "imatrix": r"^Loss by the imatrix: [a-z ]+ \(([\d.]+) % of the weights by their importance\)",
    "normal": r"^Expected error of the result: [a-z ]+ \(([\d.]+) % of its latents\)\.$"
}
CASES = {  # (kind, effort) -> targets, captions to measure, images to compare
    **{(kind, "few"): (FEW, 4, 4) for kind in ("none", "normal")},
    **{(kind, "many"): (MANY + OTHERS, 64, 24) for kind in ("none", "normal")},
    # an imatrix does not tell ComfyUI's own types apart: mxfp8 and Q5_K are 1.1 dB apart, its
    # figures 0.3 dB, the other way
    ("imatrix", "many"): (MANY, 64, 24)
}

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(maker, target, measurement, name: str = "saved"):
    nbytes, row_types = target if isinstance(target, tuple) else (target, ())
    source = source_of_model(maker.dense_model())
    path = maker.folder / f"{name}{suffix_for(source, nbytes, row_types)}"
    return save(plan_file(source, path, nbytes, SaveOptions(
        measurement, overwrite=True, row_types=row_types)))


def told(file, kind: str) -> float:
    """The per cent in what the report says of all weights."""
    for other, sentence in SENTENCES.items():
        assert len(re.findall(sentence, file.text, re.MULTILINE)) == (other == kind), file.text
    return float(re.search(SENTENCES[kind], file.text, re.MULTILINE)[1])


@pytest.mark.parametrize(("kind", "effort"), [
    pytest.param(*case, marks=[pytest.mark.heavy] * (case[1] == "many")) for case in CASES])
def test_the_order_of_the_figures_is_that_of_the_images(kind, effort, maker, measured):
    targets, captions, images = CASES[kind, effort]
    painter = Painter([scene.caption() for scene in scenes.all_scenes()[1][:images]], maker.folder)
    dense = painter.latents(maker.dense_model(), images)
    files = []
    for target in targets:
        file = saved(maker, target, measured(kind, captions))
        model = load_diffusion_model(str(file.path), host_formats=EXACT)
        model.set_model_compute_dtype(torch.float32)
        files.append((snr(painter.latents(model, images), dense), told(file, kind), target))
    for (near, less, first), (far, more, second) in itertools.permutations(files, 2):
        if near > far + 1:
            assert less <= more, (first, second, files)
    if kind == "normal" and effort == "many":  # which is the error of the image itself
        for reached, error, target in files:
            assert 10 ** (-reached / 20) == pytest.approx(error / 100, rel=0.4), target


def test_a_file_says_what_is_expected_of_its_images_and_inspect_does_not_sum_up_weights(
        maker, measured):
    dense = maker.dense_model() and maker.folder / "dense.safetensors"
    plain, mix = (saved(maker, MIX, measured(kind, 4), kind) for kind in ("none", "normal"))
    error = f"({told(mix, 'normal'):.2g} % of its latents)"
    text = inspection_text(*inspect(mix.path, dense))
    assert f"made here, loss: very small {error}\n" in text
    assert f"loss against {dense.name}, in " in text and f": {LOSS_IN_LAYERS}\n" in text
    text = inspection_text(*inspect(plain.path, dense))
    assert "made here, loss" not in text
    assert re.search(r"tensors: small \([\d.]+ % of the weights\)$", text, re.MULTILINE)


def test_a_fast_measurement_names_the_worst_layers_and_nothing_in_total(maker, measured):
    file = saved(maker, "Q4_K", measured("fast", 4))
    assert not any(re.search(each, file.text, re.MULTILINE) for each in SENTENCES.values())
    assert "The layers that lose the most, in % of what the layer computes: " in file.text
    assert f"made here, loss: {LOSS_IN_LAYERS}" in inspection_text(*inspect(file.path))
