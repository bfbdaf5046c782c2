"""python3 dev.py quality: what each packing does to the demo's model, measured on its pictures.

The trained Flux is packed in every format that can be written here and draws the captions that its
training never saw, through ComfyUI's own sampler. Leaves quality.json, quality.md and quality.png.
"""
import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

from devtools.measure import packing_quality
from devtools.measure.chart import Value, bar_chart
from devtools.measure.painter import Painter, psnr, with_lora
from devtools.measure.weights import snr

import torch
from PIL import Image

from demo_model import scenes
from devtools import ROOT, markdown_table
from devtools.demo import STEPS
from devtools.files import demo_files
from featherweight.loaders.models.diffusion import load_diffusion_model

FORMATS = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "NF4", "FP4", "int8")
BITSANDBYTES = {"NF4", "FP4", "int8"}
LORAS = ("ink", "pumpkins")


def along(change: torch.Tensor, dense: torch.Tensor) -> float:
    """How much of the dense model's change another model makes: the length of its projection, in
    those lengths."""
    return float((change * dense).sum() / dense.square().sum())


def measure(formats, count: int, show=functools.partial(print, flush=True)) -> dict[str, dict]:
    """Format -> its figures. count: of prompts, at most 256."""
    captions = [scene.caption() for scene in scenes.all_scenes()[1][:count]]
    results, dense = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        painter = Painter(captions, Path(folder))
        for name in formats:
            started = time.process_time()
            path = (
                Path(folder)
                / f"{name}.{'safetensors' if name in BITSANDBYTES | {'F16'} else 'gguf'}"
            )
            demo_files.write_model(path, name)
            model = load_diffusion_model(str(path))
            latents = painter.latents(model, count)
            row, plain = {"bytes": model.model_size()}, painter.predictions(model)
            changes = {lora: painter.predictions(with_lora(model, lora)) - plain for lora in LORAS}
            dense = dense or {"latents": latents, "changes": changes}
            if name != "F16":
                row |= {
                    "snr": snr(latents, dense["latents"]), "psnr": psnr(latents, dense["latents"])
                }
            for lora in LORAS:
                row[f"kept_{lora}"] = along(changes[lora], dense["changes"][lora])
            results[name] = row
            show(f"{line(name, row)}   ({time.process_time() - started:.0f} s of processor time)")
            del model
    return results


def line(name: str, row: dict) -> str:
    return " | ".join(cells(name, row))


def cells(name: str, row: dict) -> list[str]:
    against = [f"{row['snr']:.1f} dB", f"{row['psnr']:.1f} dB"] if "snr" in row else ["", ""]
    return [
        "dense (F16)" if name == "F16" else name, f"{row['bytes'] / 1e6:.2f} MB", *against,
        *(f"{100 * row[f'kept_{lora}']:.1f} %" for lora in LORAS)
    ]


def markdown(results: dict, about: str) -> str:
    titles = [
        "", "held", "latent SNR", "latent PSNR", *(f"LoRA {name} kept" for name in LORAS)
    ]
    rows = [cells(name, row) for name, row in results.items()]
    return f"{about}\n\n{markdown_table(titles, rows)}"


def draw(results: dict[str, dict]) -> Image.Image:
    """The figures as a picture: a bar for each format, below the name of each figure."""
    figures = {
        "held, MB": lambda row: row["bytes"] / 1e6,
        "latent SNR, dB": lambda row: row.get("snr"),
        **{f"LoRA {name} kept, %": lambda row, name=name: 100 * row[f"kept_{name}"]
           for name in LORAS}
    }
    values = {title: {name: value_of(row) for name, row in results.items()}
              for title, value_of in figures.items()}
    return bar_chart("The demo's model in each format", {
        title: [Value("dense" if name == "F16" else name, value, f"{value:.1f}")
                for name, value in found.items() if value is not None]
        for title, found in values.items()}).image


def write(folder: Path, found: dict):
    """quality.json and quality.md. found: `about` and `formats`, and the same of each of
    `packing_quality.TABLES` under its name."""
    text = markdown(found["formats"], found["about"])
    for name in packing_quality.TABLES:
        if name in found:
            text += f"\n{packing_quality.markdown(found[name])}"
    (folder / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "quality.md").write_text(text)


def main():
    parser = argparse.ArgumentParser(prog="python3 dev.py quality",
                                     description=str(__doc__).splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT")
    parser.add_argument("--prompts", type=int, default=scenes.HELD_OUT,
                        help="how many of the 256 captions never trained on")
    parser.add_argument(
        "--packing", action="store_true",
        help="only the second table: files made here beside the recipes in use, at equal bytes")
    parser.add_argument("--host-types", action="store_true",
                        help="with --packing, only the third table: in ComfyUI's own types")
    parser.add_argument("--equal-bytes", action="store_true",
                        help="with --packing, only the fourth table: beside what people share")
    parser.add_argument("--out", type=Path, default=ROOT / "demo_model",
                        help="folder for the results")
    options = parser.parse_args()
    recorded = options.out / "quality.json"
    found = json.loads(recorded.read_text()) if recorded.is_file() else {"about": "", "formats": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    if options.packing:
        name = ("host_types" if options.host_types else
                "equal_bytes" if options.equal_bytes else "packing")
        found[name] = packing_quality.measured(options.prompts, name)
        write(options.out, found)
        return
    formats = ["F16", *(name for name in options.formats if name != "F16")]
    if not demo_files.has_bitsandbytes():
        formats = [name for name in formats if name not in BITSANDBYTES]
    results = measure(formats, options.prompts)
    about = (
        f"`python3 dev.py quality`: {options.prompts} captions that training never saw, {STEPS}"
        " steps. What is kept of a LoRA: of the change of the predictions for the same noise, along"
        " the dense model's change."
    )
    write(options.out, found | {"about": about, "formats": results})
    draw(results).save(options.out / "quality.png", optimize=True)


if __name__ == "__main__":
    main()
