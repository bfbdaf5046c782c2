"""The shipped weights draw packed what they draw dense, and LoRAs change packed models as the dense
one.

The bounds leave room for the rounding of other platforms.
"""
import json

from devtools.measure import quality

import pytest
from PIL import Image

from demo_model import scenes
from devtools import ROOT, demo_sheet
from devtools.files import demo_files

RECORDED = json.loads((ROOT / "demo_model" / "quality.json").read_text(encoding="utf-8"))["formats"]


def test_the_shipped_weights_are_small():
    files = [path for path in demo_files.WEIGHTS.iterdir() if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) <= 20e6


def test_the_recorded_figures_hold_what_they_should():
    for name, row in RECORDED.items():
        assert min(row["kept_ink"], row["kept_pumpkins"]) >= (0.97 if name == "FP4" else 0.98), name


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
    with Image.open(ROOT / "demo_model" / "sheet.png") as picture:
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
