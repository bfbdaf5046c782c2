"""What `dev.py gpu` measures, in order: the most telling first, for a run may be cut off.

`python -m devtools.gpu.stages NAME ...` runs some in one process, which imports torch and ComfyUI
once. A line that begins with ROW is a row, one with END says that a stage has ended and how.
"""
import argparse
import importlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

ROW, END = "ROW ", "END "


@dataclass(frozen=True)
class Stage:
    """A case of the bench, or a function that is called as one.

    Attributes:
        about: a sentence for the report.
        seconds: after which it is ended.
        function: "module:name", of a generator of rows.
        arguments: of the host, on a GPU.
        rounds, blocks: options of the bench.
        needs_host: whether it takes ComfyUI.
    """
    about: str
    seconds: int
    function: str
    arguments: str = ""
    rounds: int = 7
    blocks: tuple[int, int] | None = None
    needs_host: bool = True

    def rows(self, quick: bool) -> Iterator[tuple[str, dict]]:
        module, name = self.function.split(":")
        function = getattr(importlib.import_module(f"devtools.{module}"), name)
        if not self.needs_host:
            yield from function(argparse.Namespace(quick=quick))
            return
        # This takes the host, which the stage's module may have had to prepare.
        from devtools.measure.timing import FORMATS, ON_A_GPU, QUICK, as_in_use

        options = argparse.Namespace(sizes=QUICK if quick else ON_A_GPU, quick=quick,
                                     rounds=1 if quick else self.rounds, formats=FORMATS,
                                     blocks=None if quick else self.blocks, peer=None)
        with as_in_use():
            yield from function(options)


LAYERS, MODELS = "measure.bench.layers", "measure.bench.models"
IMPORTS = Stage("torch, ComfyUI and this pack imported, which takes longest the first time.", 90,
                f"{LAYERS}:bench_import")
# The stages of each of two commands, neither of which takes nine minutes.
PARTS = {1: {
    "first": Stage("Bits, bandwidth, products beside dense ones, LoRAs three ways, a CUDA graph and"
                   " another stream; without ComfyUI.", 180, "gpu.first:rows", needs_host=False),
    "imports": IMPORTS,
    "kernels": Stage(
        "Every kernel of every format, tried in a process of its own as at a user's first run:"
        " what it gives, and its time beside torch's.", 80, "gpu.kernels:try_all"),
    "step": Stage("A step of a Flux in Q4_K with and without LoRAs.", 40,
                  f"{MODELS}:bench_step"),
    "model": Stage("A step of a Flux, the tokens of 1024 squared, beside the same weights dense in"
                   " bfloat16.", 60, f"{MODELS}:bench_model", rounds=5, blocks=(2, 4)),
    "host": Stage("A model in each of ComfyUI's formats by its own kernels and by ours, without"
                  " LoRAs and with them.", 85, f"{MODELS}:bench_comfy_lora", rounds=5),
}, 2: {
    "imports": IMPORTS,
    "LoRA": Stage("LoRAs as columns of the product, beside it, and added to the weight.", 50,
                  f"{LAYERS}:bench_lora", rounds=5),
    "shapes": Stage("A product with a packed weight beside `F.linear` with a dense one, timed by"
                    " the GPU; int8: with `compute` int8.", 80, f"{LAYERS}:bench_shapes", rounds=5),
    "dequantize": Stage("A whole weight dequantised by the kernels and by torch, beside a copy.",
                        25, f"{LAYERS}:bench_dequantize"),
    "device": Stage("What the device is, and how fast it copies and multiplies.", 15,
                    f"{LAYERS}:bench_device"),
    "dynamic VRAM": Stage("A model larger than the memory it is left, with LoRAs, a budget and"
                          " another model: the same bits?", 75, "gpu.memory:walk"),
    "static": Stage("The same without dynamic VRAM.", 75, "gpu.memory:walk",
                    "--disable-dynamic-vram"),
    "tests": Stage("The tests of kernels and formats, the heavy ones too.", 80,
                   "gpu.kernels:run_tests"),
}}
STAGES = {name: stage for stages in PARTS.values() for name, stage in stages.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=STAGES)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for name in options.names:
        how = "done"
        try:
            for title, row in STAGES[name].rows(options.quick):
                print(ROW + json.dumps([title, row]), flush=True)
        except Exception:
            traceback.print_exc()
            how = "ended with an error, see log.txt,"
        print(END + how, flush=True)


if __name__ == "__main__":
    main()
