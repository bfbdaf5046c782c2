"""What we keep ourselves, and others may have written: verdicts about kernels, packed weights,
measurements."""
import os
import stat

import numpy as np

from ..mutations import json_damaged, safetensors_damaged
from . import Target


class VerdictFile(Target):
    name, reads = "verdicts", "the file of verdicts about kernels"
    damaged = staticmethod(json_damaged)

    def prepare(self):
        from featherweight.ops.kernels import Case
        from featherweight.ops.kernels.verdicts import Verdicts
        cache = self.folder / "cache" / "verdicts"
        cache.mkdir(parents=True, mode=0o700)
        os.chmod(cache, stat.S_IRWXU)
        self.verdicts = Verdicts(cache / "verdicts.jsonl")
        self.case = Case
        right, slow = (f"dequantize of {name} to float16, rows 1 to any by nvrtc"
                       for name in ("Q4_K", "Q5_K"))
        self.verdicts.add(right, "begun")
        self.verdicts.add(right, "right", seconds=[0.5, 1.0])
        self.verdicts.add(slow, "slow", seconds=[2.0, 1.5])
        self.verdicts.add("linear of NF4 to float16, rows 1 to 1 by metal", "crashed", why="so")
        self.verdicts.add("another", "begun")
        return [self.verdicts.path.read_bytes()]

    def read(self, data):
        self.verdicts.path.write_bytes(data)
        for name in (*self.verdicts.read(), *self.verdicts.of_earlier_versions()):
            self.case.of_text(name)


class PackedCache(Target):
    name, reads = "packed_cache", "weights packed while loading, as they are kept"
    damaged = staticmethod(safetensors_damaged)
    types = ("NF4", "int8_convrot", "nvfp4")

    def prepare(self):
        import torch
        from safetensors.torch import save_file

        from featherweight.loaders.files import packed_cache
        from featherweight.loaders.files.open_weights import open_weights
        from featherweight.loaders.models.packed_entry import read_entry, write_entry
        from featherweight.ops.formats.base import FORMATS
        from featherweight.ops.quantize.pack_tensor import pack_tensor
        from featherweight.ops.quantize.row_types import ROW_TYPES, pack_to_type
        self.wanted = {f"{name}.weight": (name, (16, 64)) for name in self.types}
        self.wanted["plain.bias"] = "F32", (4,)
        packed = {name: pack_to_type(torch.ones(shape), ROW_TYPES[kind]) if kind in ROW_TYPES
                  else pack_tensor(torch.ones(shape), FORMATS[kind]) if kind in FORMATS
                  else torch.ones(shape) for name, (kind, shape) in self.wanted.items()}
        path = self.folder / "source.safetensors"
        save_file({"a": torch.ones(1)}, path)
        self.entry = self.folder / "featherweight-0.safetensors"
        write_entry(self.entry, open_weights(path), packed, 0.0)
        self.read_entry = lambda: packed_cache.read(
            self.entry, lambda entry: read_entry(entry, self.wanted))
        assert self.read_entry() is not None
        return [self.entry.read_bytes()]

    def read(self, data):
        self.entry.write_bytes(data)
        found = self.read_entry()
        for name, tensor in (found.weights if found else {}).items():
            assert tuple(tensor.shape) == self.wanted[name][1]
            tensor.dequantize() if hasattr(tensor, "params") else tensor.sum()


class SensitivityFile(Target):
    name, reads = "sensitivity", "measurements of a model"
    damaged = staticmethod(safetensors_damaged)

    def prepare(self):
        import torch

        from featherweight.loaders.packing.calibration.sensitivity import (
            Sensitivity,
            SensitivityError,
            report,
            summary,
        )
        from featherweight.ops.quantize.second_moments import SecondMoments
        self.load, self.texts, self.own = Sensitivity.load, (report, summary), (SensitivityError,)
        inputs = torch.from_numpy(
            np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32))
        moments = SecondMoments.zeros(64)
        moments.add(inputs)
        path = self.folder / "m.sensitivity"
        Sensitivity({"a.weight": {"Q4_K": 0.01, "Q8_0": 0.001}}, {"a.weight": (8, 64)},
                    {"model": "any"}, _moments=lambda name: moments).save(path)
        return [path.read_bytes()]

    def read(self, data):
        path = self.folder / "m.sensitivity"
        path.write_bytes(data)
        found = self.load(path)
        assert len(found.digest) == 16
        for text in self.texts:
            text(found)
        for name in found.shapes:
            found.moments(name)
        found.match(found.shapes)
