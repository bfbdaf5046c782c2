"""Runs what reads and writes files, with each of its calls failing once: python process.py LIBRARY
FOLDER MOST, as JSON lines.

A line for each kind of work and error: how many calls there are, how many of them were made to fail
(MOST of them, spread over all), and what went wrong.
"""
import ctypes
import gc
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import comfyui_and_pack  # noqa: F401  the host and the pack

import torch
from pack_api import is_packed, load_diffusion_model, packed_tensors, source_of_file
from safetensors.torch import save_file
from saving import save

from devtools.files import tiny_models
from devtools.files.bnb_files import write_bnb
from devtools.files.gguf_files import write_gguf
from faults import ERRORS
from featherweight.loaders.container import network_drives
from featherweight.loaders.files import packed_cache
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity
from featherweight.ops.kernels.verdicts import Verdicts

SIZES = {"hidden": 128, "double_blocks": 1, "single_blocks": 1, "context": 128}
NUMBERS = itertools.count()


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        for part in packed_tensors(tensor) if is_packed(tensor) else [tensor]:
            found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def loaded(name: str, **options):
    return lambda folder: digest(
        load_diffusion_model(str(folder / name), **options).model.diffusion_model.parameters())


def copied(folder: Path) -> str:
    os.environ[network_drives.FILES_ENV] = network_drives.COPY
    try:
        return loaded("model.gguf")(folder)
    finally:
        del os.environ[network_drives.FILES_ENV]


def kept(type_name: str, is_new: bool = False):
    """Packed while it loads, and kept, or found there."""
    def run(folder: Path) -> str:
        name = f"packed {next(NUMBERS)}" if is_new else "packed"
        os.environ[packed_cache.FOLDER] = str(folder / name)
        try:
            return loaded("dense.safetensors", pack_to=type_name)(folder)
        finally:
            del os.environ[packed_cache.FOLDER]
    return run


def saved(name: str, kind: str):
    def run(folder: Path) -> str:
        source = source_of_file(folder / "dense.safetensors")
        save(source, folder / "made" / name, kind, overwrite=True)
        return lambda: hashlib.sha256((folder / "made" / name).read_bytes()).hexdigest()
    return run


def lora(folder: Path) -> str:
    return digest(load_lora_file(str(folder / "lora.safetensors"))[0].values())


def measured(folder: Path) -> str:
    Sensitivity({"a.weight": {"Q4_K": 1.0}},
                {"a.weight": (256, 256)}).save(folder / "made" / "a.sensitivity")
    return json.dumps(Sensitivity.load(folder / "made" / "a.sensitivity").costs)


def judged(folder: Path) -> str:
    """Verdicts are known in the process whether they can be kept or not."""
    verdicts = Verdicts(folder / "made" / "verdicts.jsonl")
    try:
        verdicts.add("kernel", "wrong", why="so")
        return str(sorted(verdicts.read()))
    except OSError:  # logged, and torch does the work
        return "['kernel']"


WORK = {
    "load GGUF": loaded("model.gguf"), "load GGUF, copied": copied,
    "load NF4": loaded("nf4.safetensors"),
    "pack while loading": loaded("dense.safetensors", pack_to="Q8_0"), "packed cache": kept("Q8_0"),
    **{f"write packed cache of {name}": kept(name, is_new=True)
       for name in ("Q8_0", "NF4", "int8_convrot")}, "save GGUF": saved("a.gguf", "Q8_0"),
    "save int8": saved("a.safetensors", "int8_convrot"),
    "save NF4": saved("a.safetensors",
                      "NF4"), "LoRA": lora, "sensitivity": measured, "verdicts": judged
}


def write(folder: Path):
    weights = {name: torch.from_numpy(value) for name, value in tiny_models.flux(**SIZES).items()}
    write_gguf(folder / "model.gguf", weights, lambda name, values: "F32"
               if values.ndim < 2 else "Q8_0")
    write_bnb(folder / "nf4.safetensors", weights)
    save_file({name: value.bfloat16() for name, value in weights.items()},
              folder / "dense.safetensors")
    tensors = tiny_models.flux_lora(5, "blocks", "lora_unet_{flat}", ".lora_down.weight",
                                    ".lora_up.weight", **SIZES)
    save_file({name: torch.from_numpy(value) for name, value in tensors.items()},
              folder / "lora.safetensors")
    (folder / "made").mkdir(mode=0o700)


def outcome(faults, work, folder: Path, nth: int = 0, number: int = 0) -> str:
    """What a work gives with the nth call failing."""
    faults.arm(os.fsencode(folder), ctypes.c_long(nth), number)
    try:
        found = work(folder)
    finally:
        faults.arm(b"", ctypes.c_long(0), 0)
    return found() if callable(found) else found


def wrong_with(expected: str, *arguments) -> str:
    """What is wrong with how a work took a fault: "" where it said one sentence, or did what it
    should all the same."""
    try:
        found = outcome(*arguments)
    except ValueError as error:
        text = str(error)
        return (
            ""
            if "\n" not in text and text.endswith((".", ")")) and len(text) < 500
            else f"no sentence: {text!r}"
        )
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "" if found == expected else "another result"


def main(library: str, folder: str, most: str):
    faults, folder = ctypes.CDLL(library), Path(folder)
    write(folder)
    torch.set_num_threads(1)
    for name, work in WORK.items():
        expected = outcome(faults, work, folder)
        faults.arm(os.fsencode(folder), ctypes.c_long(0), 0)
        work(folder)
        calls = faults.counted()
        for error, number in ERRORS.items():
            wrong, failing = (
                [],
                sorted({1 + calls * part // int(most) for part in range(int(most))})
                if calls
                else [],
            )
            for nth in failing:
                gc.collect()
                problem = wrong_with(expected, faults, work, folder, nth, number)
                left = [path.name for path in folder.rglob("*") if path.suffix in (".part", ".new")]
                problem = (
                    problem
                    or (left and f"left behind: {left}")
                    or wrong_with(expected, faults, work, folder)
                )
                if problem:
                    wrong.append(f"call {nth} of {calls}: {problem}")
            print(
                json.dumps({
                    "work": name, "error": error, "calls": calls, "failed": len(failing),
                    "wrong": wrong
                }), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
