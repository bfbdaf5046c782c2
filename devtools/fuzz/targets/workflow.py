"""What a workflow that somebody shared may hold: names of files, rules, the strings of the expert
mode, numbers."""
import json
import os
import random

import torch

from ..mutations import json_damaged, text_damaged
from . import Target
from .weights import as_text

SIZE = 7_000_000_000  # bytes of a model that is shared among devices


class TextTarget(Target):
    longest = 1 << 11
    damaged = staticmethod(text_damaged)


class BlockWeights(TextTarget):
    name, reads = "block_weights", "rules for the strength of each block"
    damaged = staticmethod(text_damaged)

    def prepare(self):
        from featherweight.loaders.lora.block_weights import parse_block_weights
        self.parse, self.own = parse_block_weights, (ValueError,)
        self.keys = [
            f"diffusion_model.{block}.{number}.{layer}.weight"
            for block in ("double_blocks", "single_blocks")
            for number in range(4)
            for layer in ("img_attn.proj", "linear1")
        ] + ["clip_l.x.weight", "diffusion_model.img_in.weight"]
        return [
            b"double=0.5, single.0-2=0, img_attn=0.8",
            b"preset:first-third\nall=1 # note\ntext=0; double_blocks=1",
            b"preset:double-only, linear1=0"
        ]

    def read(self, data):
        try:
            factor = self.parse(as_text(data), self.keys)
        except ValueError as error:
            if "lock weight" not in str(error):
                raise AssertionError(f"not our sentence: {error}") from error
            raise
        for key in self.keys:
            assert abs(factor(key)) < float("inf")


def assert_shared(plan):
    """Of a model of SIZE bytes each lies on one device."""
    assert all(amount >= 0 for amount in plan.values()) and sum(plan.values()) == SIZE, plan


class ExpertString(TextTarget):
    name, reads = "expert_string", "where weights lie, as ComfyUI-MultiGPU's workflows write it"

    def prepare(self):
        from featherweight.nodes.legacy.distorch import UnreadableError, parse_allocation_string

        self.plan, self.own, self.compute = (
            parse_allocation_string,
            (UnreadableError,),
            torch.device("cuda", 0),
        )
        return [
            b"cuda:0,2.5gb;cuda:1,8gb;cpu,*", b"cuda:0,25%;cpu,75%", b"cuda:0,0.1;cpu,0.5",
            b"gpu:1,300m;cpu,*"
        ]

    def read(self, data):
        plan, notes = self.plan(as_text(data), SIZE, self.compute)
        assert_shared(plan)
        assert all(isinstance(note, str) and len(note) < 1000 for note in notes)


class Names(TextTarget):
    """Input: which function, and the name."""
    name, reads = "names", "names of files to load and to write"
    made = ""

    def prepare(self):
        import folder_paths

        from featherweight.loaders.files.container import WeightFileError
        from featherweight.loaders.paths import folders

        self.own, models, self.output = (
            (WeightFileError,),
            self.folder / "models",
            self.folder / "output",
        )
        for file in ("diffusion_models/flux/a.gguf", "loras/b.safetensors", "vae/c.sft"):
            (models / file).parent.mkdir(parents=True, exist_ok=True)
            (models / file).write_bytes(b"x")
        (models / "diffusion_models" / "package").mkdir()
        (self.folder / "outside.gguf").write_bytes(b"x")
        (self.folder / "outside.sensitivity").write_bytes(b"x")
        self.output.joinpath("sensitivity").mkdir(parents=True)
        self.output.joinpath("sensitivity", "m.sensitivity").write_bytes(b"x")
        folder_paths.set_output_directory(str(self.output))
        for key in list(folder_paths.folder_names_and_paths):
            folder_paths.folder_names_and_paths[key] = (
                [str(models / key)],
                folder_paths.supported_pt_extensions,
            )
        self.models = models
        self.functions = {
            "find": lambda name: folders.find_file(name, "diffusion_models", "loras", "vae"),
            "saved": folders.resolve_saved_path,
            "sensitivity": folders.find_sensitivity,
            "new": lambda name: folders.new_model_path(name, "Q4_K", ".gguf"),
            "new_in_models": lambda name: folders.new_model_path(
                name, "Q4_K", ".gguf", folders.MODELS, False
            ),
            "new_sensitivity": folders.new_sensitivity_path,
        }
        names = {
            "find": ["flux/a.gguf", "flux\\a.gguf", "package", "../../outside.gguf"],
            "saved": ["FOLDER/models/loras/b.safetensors", "FOLDER/outside.gguf"], "sensitivity": [
                "m.sensitivity", "FOLDER/outside.sensitivity", "../../outside.sensitivity"
            ], "new": ["diffusion_models/ComfyUI", "%year%/x",
                       "../x"], "new_in_models": ["diffusion_models/x", "custom_nodes/x/y"],
            "new_sensitivity": ["x", "%date:yyyy%/x", "../x"]
        }
        return [
            f"{function} {name}".encode() for function, listed in names.items() for name in listed
        ]

    def damaged(self, data, chance: random.Random):
        function, _, name = data.partition(b" ")
        if chance.random() < 0.1:
            function = chance.choice(list(self.functions)).encode()
        return function + b" " + text_damaged(name, chance)

    def read(self, data):
        function, _, name = as_text(data).partition(" ")
        if function not in self.functions:
            return
        path = self.functions[function](name.replace("FOLDER", str(self.folder)))
        real, allowed = os.path.realpath(path), [self.output, self.models]
        assert any(real.startswith(os.path.realpath(folder) + os.sep)
                   for folder in allowed), f"{path} is outside"
        if function.startswith("new"):
            assert not real.startswith(os.path.realpath(self.models / "custom_nodes")), path
            assert real.endswith((".gguf", ".sensitivity")), path
            self.made = os.path.dirname(path)

    def clear(self):
        """The host makes the folders of a new file."""
        if not self.made:
            return
        allowed = {os.path.realpath(self.output), os.path.realpath(self.models)}
        folder, self.made = os.path.realpath(self.made), ""
        while folder not in allowed and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
            folder = os.path.dirname(folder)


class Numbers(TextTarget):
    """Input: JSON, as a prompt brings it."""
    name, reads = "numbers", "budgets, sizes, strengths and devices"
    damaged = staticmethod(json_damaged)

    def prepare(self):
        from featherweight.loaders.byte_sizes import size_text
        from featherweight.loaders.devices import find_device
        from featherweight.nodes.legacy.distorch import allocate_virtual_vram
        self.own, self.device = (), torch.device("cuda", 0)
        self.find_device, self.by_virtual_vram, self.size_text = (
            find_device,
            allocate_virtual_vram,
            size_text,
        )
        return [b'{"gpu_weights": 4.0, "virtual_vram_gb": 2.5, "device": "gpu:0"}',
                b'{"gpu_weights": 0, "virtual_vram_gb": 0, "device": "cuda"}',
                b'{"gpu_weights": 1000, "virtual_vram_gb": -1.5, "device": "cpu"}']

    def read(self, data):
        try:
            values = json.loads(data) if data[:1] == b"{" else {}
        except (ValueError, RecursionError):
            return
        budget, virtual, device = (values.get(key)
                                   for key in ("gpu_weights", "virtual_vram_gb", "device"))
        if isinstance(device, str):
            self.find_device(device)
        if isinstance(virtual, float):
            assert_shared(self.by_virtual_vram(SIZE, virtual, self.device, [torch.device("cpu")]))
        if isinstance(budget, float) and 0 <= budget <= 1000:
            self.size_text(budget * 1e9)
