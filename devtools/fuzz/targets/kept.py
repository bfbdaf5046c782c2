"""What we keep ourselves, and others may have written: verdicts about kernels, packed weights, measurements."""
import os
import stat

import numpy as np

from ..mutations import json_damaged, safetensors_damaged
from . import Target


class VerdictFile(Target):
    name, reads = "verdicts", "the file of verdicts about kernels"
    damaged = staticmethod(json_damaged)

    def prepare(self):
        from featherweight.ops.kernels.verdicts import Proven, Verdicts
        self.proven = Proven
        cache = self.folder / "cache" / "verdicts"
        cache.mkdir(parents=True, mode=0o700)
        os.chmod(cache, stat.S_IRWXU)
        self.make = lambda: Verdicts(cache, {"device": "any"})
        first = self.make()
        first.add("linear", {"verdict": "right", "case": "linear", "rows": [1, None],
                             "times": {"1": [0.5, 1.0], "16": [2.0, 1.5]}})
        first.add("unpack", {"verdict": "slower", "case": "unpack", "rows": [1, 8], "times": {"": [0.5, 1.0]}})
        first.add("crashed", {"verdict": "crashed", "why": "it crashed"})
        self.path = next(cache.glob("*.json"))
        return [self.path.read_bytes()]

    def read(self, data):
        self.path.write_bytes(data)
        verdicts = self.make()
        verdicts.read()
        for verdict in verdicts.known.values():
            if verdict["verdict"] in ("right", "slower"):
                proven = self.proven("triton", tuple(verdict.get("rows", (1, None))), verdict.get("times", {}))
                for tokens in (None, 1, 7, 4096):
                    proven.is_faster(tokens)


class PackedCache(Target):
    name, reads = "packed_cache", "weights packed while loading, as they are kept"
    damaged = staticmethod(safetensors_damaged)
    wanted = {"a.weight": ("Q4_K", (2, 256)), "b.weight": ("NF4", (4, 64))}

    def prepare(self):
        import torch
        from featherweight.loaders.packing import cache
        from safetensors.torch import save
        self.cache, self.entry = cache, self.folder / "featherweight-0.safetensors"
        parts = {part: torch.ones(shape, dtype={"U8": torch.uint8, "F32": torch.float32}[kind]) for part,
                 (shape, kind) in cache._all_parts(self.wanted).items()}
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
        from featherweight.loaders.packing.sensitivity import Sensitivity, SensitivityError, report, summary
        from featherweight.ops.packing.moments import Moments
        self.load, self.texts, self.own = Sensitivity.load, (report, summary), (SensitivityError,)
        inputs = torch.from_numpy(np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32))
        moments = Moments.of(64)
        moments.add(inputs)
        path = self.folder / "m.sensitivity"
        Sensitivity({"a.weight": {"Q4_K": 0.01, "Q8_0": 0.001}}, {"a.weight": (8, 64)}, {"model": "any"},
                    _moments=lambda name: moments).save(path)
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
        found.check_is_for(found.shapes)


