"""What `dev.py gpu` measures, in order: the most telling first, for a run may be cut off."""
import argparse
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FORMATS = ["Q8_0", "Q4_K", "NF4"]
Rows = Iterator[tuple[str, dict]]


@dataclass(frozen=True)
class Stage:
    """about: a sentence for the report. seconds: after which it is ended. function: "module:name"
    of a generator of rows, which is called as the bench's cases are. arguments: of the host, on a
    GPU.
    """
    about: str
    seconds: int
    function: str
    arguments: str = ""
    rounds: int = 7
    blocks: tuple[int, int] | None = None

    def rows(self, quick: bool, peer: str | None) -> Rows:
        module, name = self.function.split(":")
        function = getattr(importlib.import_module(module), name)
        # This takes the host, which the stage's module may have had to prepare.
        from devtools.measure.bench.timing import ON_A_GPU, QUICK, as_in_use

        options = argparse.Namespace(sizes=QUICK if quick else ON_A_GPU, quick=quick,
                                     rounds=1 if quick else self.rounds, formats=FORMATS,
                                     blocks=None if quick else self.blocks,
                                     peer=Path(peer) if peer else None)
        with as_in_use():
            yield from function(options)


BENCH = "devtools.measure.bench"
STAGES = {
    "device": Stage("What the device is, and how fast it copies and multiplies.", 30,
                    "devtools.gpu.device:describe"),
    "kernels": Stage(
        "Every kernel of every format, tried in a process of its own as at a user's first run:"
        " what it gives, and its time beside torch's.", 120, "devtools.gpu.kernels:try_all"),
    "tests": Stage("The tests of kernels and formats, the heavy ones too.", 90,
                   "devtools.gpu.kernels:run_tests"),
    "shapes": Stage(
        "A product with a packed weight beside `F.linear` with a dense one; int8: with `compute`"
        " int8.",
        60, f"{BENCH}.products:bench_shapes"),
    "dequantize": Stage("A whole weight dequantised: by the kernels, and by torch.", 20,
                        f"{BENCH}.products:bench_dequantize"),
    "model": Stage(
        "A step of a Flux, the tokens of 1024 squared, beside the same weights dense in bfloat16.",
        60, f"{BENCH}.models:bench_model", rounds=5, blocks=(2, 4)),
    "step": Stage("A step of a Flux in Q4_K with and without LoRAs, and another pack's.", 40,
                  f"{BENCH}.models:bench_step"),
    "ways": Stage("A model in Q4_K and in ComfyUI's formats: dense, exact and fast, without LoRAs"
                  " and with two.", 60, f"{BENCH}.ways:bench_ways", blocks=(1, 2)),
    "host": Stage("ComfyUI's own int8, fp8 and nvfp4 layers by its kernels, with and without LoRAs,"
                  " beside dense ones and ours.", 40,
                  "devtools.gpu.host_kernels:bench_host_layers"),
    "peer": Stage("One layer in each pack.", 30, f"{BENCH}.models:bench_peer"), "LoRA": Stage(
        "LoRAs beside the product, and added to the dequantised weight: where one overtakes the"
        " other.",
        25, "devtools.gpu.breakeven:bench_lora_ways"), "int8": Stage(
            "`compute` int8 beside the exact product: from how many rows on it is faster.", 25,
            "devtools.gpu.breakeven:bench_int8_rows"),
    "dynamic VRAM": Stage(
        "A model larger than the memory it is left, with LoRAs, a budget and another model: the"
        " same bits?",
        45, "devtools.gpu.memory:walk"), "static": Stage("The same without dynamic VRAM.", 45,
                                                         "devtools.gpu.memory:walk",
                                                         "--disable-dynamic-vram")
}
