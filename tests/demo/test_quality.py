"""The shipped weights draw packed what they draw dense, and LoRAs change packed models as the dense
one.

The bounds leave room for the rounding of other platforms.
"""
import itertools
import json
import random

from devtools.measure import quality

import pytest
from PIL import Image

from demo_model import scenes
from devtools import ROOT, demo_sheet
from devtools.files import demo_files
from devtools.first_picture import FIRST_PICTURE

RECORDED = json.loads((ROOT / "demo_model" / "quality.json").read_text(encoding="utf-8"))["formats"]


def test_the_shipped_weights_are_small():
    files = [path for path in demo_files.WEIGHTS.iterdir() if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) <= 20e6


def test_the_recorded_figures_hold_what_they_should():
    for name, row in RECORDED.items():
        least = {"Q2_K": 0.93, "FP4": 0.96}.get(name, 0.98)
        assert min(row["kept_ink"], row["kept_pumpkins"]) >= least, name


def test_the_recorded_bytes_are_those_of_a_loaded_model(tmp_path):
    for name, row in RECORDED.items():
        if name in quality.BITSANDBYTES and not demo_files.has_bitsandbytes():
            continue
        safetensors = name in quality.BITSANDBYTES | {"F16"}
        path = tmp_path / f"{name}.{'safetensors' if safetensors else 'gguf'}"
        demo_files.write_model(path, name)
        assert quality.load_diffusion_model(str(path)).model_size() == row["bytes"], name


def test_the_page_and_the_sheet_say_the_same_bytes():
    page = (ROOT / "demo_model" / "quality.md").read_text(encoding="utf-8")
    with Image.open(demo_sheet.SHEET) as picture:
        on_the_sheet = json.loads(picture.text[demo_sheet.FACTS])
    assert len(on_the_sheet) > 6
    for name, row in RECORDED.items():
        assert f"| {row['bytes'] / 1e6:.2f} MB |" in page, name
        shown = on_the_sheet.get("dense" if name == "F16" else name, row["bytes"])
        assert f"{shown / 1e6:.1f}" == f"{row['bytes'] / 1e6:.1f}", name


@pytest.mark.usefixtures("small_models")
def test_packed_models_are_near_the_dense_one_and_keep_loras():
    for name, row in quality.measure(["F16", "Q4_K"], 16).items():
        assert min(row["kept_ink"], row["kept_pumpkins"]) > 0.95, name
        if name != "F16":
            assert row["snr"] > RECORDED[name]["snr"] - 2, name


@pytest.mark.heavy
def test_every_format_reaches_its_recorded_quality():
    names = [
        name for name in RECORDED
        if name not in quality.BITSANDBYTES or demo_files.has_bitsandbytes()
    ]
    for name, row in quality.measure(names, scenes.HELD_OUT).items():
        assert row.get("snr", 0) > RECORDED[name].get("snr", 1) - 1.5, name
        for kept in ("kept_ink", "kept_pumpkins"):
            assert row[kept] > RECORDED[name][kept] - 0.02, name


def test_a_picture_of_the_sheet_says_the_share_of_the_size_and_in_words_how_close_it_is():
    half = 2 * sum(value.numel() for value in demo_files.flux().values())
    nbytes = random.randrange(half)
    assert demo_sheet.facts("Q4_K", {"bytes": nbytes, "dense": 45.04}) == [
        "Q4_K", f"{nbytes / half:.0%} of the size", "very close", "45.0 dB"]
    closest = [demo_sheet.facts("a", {"bytes": half, "dense": decibels})[2]
               for decibels in sorted((random.uniform(0, 90) for _ in range(20)), reverse=True)]
    assert [words for words, _ in itertools.groupby(closest)] == [
        words for _, words in demo_sheet.WORDS if words in closest]
    assert demo_sheet.facts("a", {"bytes": half, "dense": None})[2:] == ["the same"]
    assert demo_sheet.facts("dense", {"bytes": 2 * half, "dense": None})[0] == "original"


@pytest.mark.parametrize("path", [demo_sheet.SHEET, FIRST_PICTURE],
                         ids=lambda path: path.stem)
def test_a_picture_of_the_readme_is_small(path):
    assert path.stat().st_size < 300_000


def test_the_sheet_has_the_texts_that_are_written_today():
    with Image.open(demo_sheet.SHEET) as picture:
        sizes, texts = (json.loads(picture.text[key])
                        for key in (demo_sheet.FACTS, demo_sheet.TEXTS))
    assert len(texts) > 8
    for title, lines in texts.items():
        decibels = float(lines[-1].removesuffix(" dB")) if "dB" in lines[-1] else None
        assert lines == demo_sheet.facts(title, {"bytes": sizes[title], "dense": decibels})
