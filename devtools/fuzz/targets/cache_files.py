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
    wanted = {"a.weight": ("Q4_K", (2, 256)), "b.weight": ("NF4", (4, 64))}

    def prepare(self):
        import torch
        from safetensors.torch import save

        from featherweight.loaders.files import packed_cache
        self.cache, self.entry = packed_cache, self.folder / "featherweight-0.safetensors"
        parts = {
            part: torch.ones(shape, dtype={"U8": torch.uint8, "F32": torch.float32}[kind])
            for part, (shape, kind) in packed_cache._all_parts(self.wanted).items()
        }
        return [save(parts)]

    def read(self, data):
        self.entry.write_bytes(data)
        found = self.cache.read(self.entry, self.wanted)
        for name, tensor in (found or {}).items():
            assert tuple(tensor.shape) == self.wanted[name][1]
            tensor.dequantize()


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
