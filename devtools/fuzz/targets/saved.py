"""What the pack keeps itself, and others may have written: verdicts about kernels, packed weights,
measurements."""
import os
import stat
import struct
from pathlib import Path

import numpy as np

from . import Target, target


@target
def verdicts(folder: Path) -> Target:
    """the file of verdicts about kernels"""
    from featherweight.ops.kernels.verdicts import Verdicts

    os.chmod(folder, stat.S_IRWXU)
    kept = Verdicts(folder / "verdicts.jsonl")
    name = "dequantize of Q4_K to float16, rows 1 to any by nvrtc, 0a1b2c3d"
    kept.add(name, "begun")
    kept.add(name, "right")
    kept.add("linear of NF4 to float16, rows 1 to 1 by metal, 0a1b2c3d", "crashed", "so")
    kept.add("another", "begun")

    lines = kept.path.read_bytes()
    return Target(folder, [lines, *lines.splitlines()], lambda path: kept.read(),
                  file=kept.path.name)


@target
def packed_cache(folder: Path) -> Target:
    """weights packed while loading, as they are kept"""
    import torch
    from safetensors.torch import save_file

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.files.packed_cache import read as read_cache
    from featherweight.loaders.models.cache_entry import read_entry, write_entry
    from featherweight.ops.packing.pack_types import TYPES

    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.weight": (name, (16, 64)) for name in ("NF4", "int8_convrot", "nvfp4")}
    wanted["plain.bias"] = "F32", (4,)
    packed = {name: TYPES[kind].pack(torch.ones(shape)) for name, (kind, shape) in wanted.items()}
    source, entry = folder / "source.safetensors", folder / "featherweight-0.safetensors"
    save_file({"a": torch.ones(1)}, source)
    write_entry(entry, open_weights(source), packed, 0.0)

    def read(path: Path):
        found = read_cache(path, lambda entry: read_entry(entry, wanted))
        for name, tensor in (found.weights if found else {}).items():
            assert tuple(tensor.shape) == wanted[name][1]
            tensor.dequantize() if hasattr(tensor, "params") else tensor.sum()
        return found

    assert read(entry) is not None
    return Target(folder, [entry.read_bytes()], read, file=entry.name)


def measurement(folder: Path, samples: list[bytes], file: str) -> Target:
    """Returns a target of measurements, of this pack or of llama.cpp."""
    from featherweight.loaders.container.weight_file import WeightFileError
    from featherweight.loaders.packing.calibration.imatrix import load_measurement
    from featherweight.loaders.packing.calibration.sensitivity import (
        SensitivityError,
        report,
        summary,
    )

    def read(path: Path):
        found = load_measurement(path)
        assert len(found.digest) == 16
        if found.costs:
            report(found)
            summary(found)
        shapes = dict(found.shapes) or {
            name: (8, len(values)) for name, values in getattr(found, "values", {}).items()}
        found = found.match(shapes)
        for name in found.shapes:
            found.moments(name)
        found.notes(list(shapes), True)

    return Target(folder, samples, read, (SensitivityError, WeightFileError), file)


@target
def sensitivity(folder: Path) -> Target:
    """measurements of a model"""
    import torch

    from featherweight.loaders.packing.calibration.sensitivity import Sensitivity
    from featherweight.ops.quantize.second_moments import SecondMoments

    moments = SecondMoments.zeros(64)
    moments.add(torch.linspace(-1, 1, 32 * 64).view(32, 64))
    path = folder / "m.sensitivity"
    Sensitivity({"a.weight": {"Q4_K": 0.01, "Q8_0": 0.001}}, {"a.weight": (8, 64)},
                {"model": "any"}, _moments=lambda name: moments).save(path)
    return measurement(folder, [path.read_bytes()], path.name)


@target
def imatrix_gguf(folder: Path) -> Target:
    """imatrix files of llama.cpp, GGUF"""
    from .models import written_gguf

    samples = [written_gguf(
        {"a.weight.in_sum2": np.ones((count, 64)), "a.weight.counts": np.full((count, 1), 7)},
        lambda name, values: "F32", metadata={
            "general.type": "imatrix", "imatrix.datasets": ["calibration.txt"],
            "imatrix.chunk_count": 4, "imatrix.chunk_size": 512}) for count in (1, 2)]
    return measurement(folder, samples, "m.imatrix.gguf")


@target
def imatrix_dat(folder: Path) -> Target:
    """imatrix files of llama.cpp before 2025 and of stable-diffusion.cpp"""
    entry = struct.pack("<i", 8) + b"a.weight" + struct.pack("<ii", 3, 64) + bytes(
        np.ones(64, "<f4"))
    samples = [struct.pack("<i", 1) + entry + tail
               for tail in (struct.pack("<i", 4), struct.pack("<ii", 4, 3) + b"set", b"")]
    return measurement(folder, samples, "m.imatrix.dat")
