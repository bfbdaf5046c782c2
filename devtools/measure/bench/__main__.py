"""python3 dev.py bench: speed and memory, side by side in one run.

Each case runs its variants in turn, round after round, so that a noisy machine disturbs all of them
alike: read the ratios, not the milliseconds. Leaves bench.json, bench.md and bench.png.
"""
import argparse
import json
import sys
from pathlib import Path

from devtools.measure.bench import (
    attention,
    comfy_lora,
    cpu,
    files,
    host_types,
    lcm,
    memory_passes,
    models,
    packing,
    products,
    repacking,
    svdquant,
    ways,
)
from devtools.measure.bench.picture import draw
from devtools.measure.bench.table import gathered, markdown
from devtools.measure.bench.timing import ON_A_GPU, QUICK, Sizes, as_in_use, device, machine
from devtools.measure.weights import FORMAT_NAMES, RANKED_NAMES

import torch

from devtools import ROOT

CASES = {
    "shapes": products.bench_shapes, "compilers": products.bench_compilers,
    "dequantize": products.bench_dequantize,
    "nf4": products.bench_nf4, "lora": products.bench_lora, "model": models.bench_model,
    "step": models.bench_step, "peer": models.bench_peer, "lora_error": models.bench_lora_error,
    "int8_error": models.bench_int8_error, "svdquant_error": svdquant.bench_svdquant_error,
    "pack": packing.bench_pack,
    "passes": memory_passes.bench_passes, "layer_passes": memory_passes.bench_layer_passes,
    "header": files.bench_header, "load": files.bench_load,
    "repack": repacking.bench_repack, "memory": files.bench_memory, "train": files.bench_train,
    "scale": files.bench_scale, "cpu": cpu.bench_cpu, "lcm": lcm.bench_lcm,
    "attention": attention.bench_attention,
    "comfy": host_types.bench_host_types, "comfy_load": host_types.bench_packing_while_loading,
    "comfy_lora": comfy_lora.bench_comfy_lora, "ways": ways.bench_ways
}
# take minutes, up to 7 GB of disk and 8 GB of memory: only where asked for
LARGE = {"scale", "comfy_load"}
if sys.platform != "linux":
    del CASES["memory"], CASES["train"]


def main():
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES,
                        help=f"cases to run; by default all but {', '.join(LARGE)}, peer")
    parser.add_argument("--formats", nargs="+", choices=[*FORMAT_NAMES, *RANKED_NAMES],
                        default=["Q8_0", "Q4_K", "NF4"], metavar="FORMAT")
    parser.add_argument("--blocks", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"),
                        help="size of the model in `model`, `train` and `comfy_load`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", type=Path,
                        help="folder of another pack with the node UnetLoaderGGUF")
    parser.add_argument("--quick", action="store_true",
                        help="every case at a tiny size, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "bench",
                        help="folder for the results")
    options = parser.parse_args()
    options.sizes = QUICK if options.quick else Sizes() if device().type == "cpu" else ON_A_GPU
    if options.quick:
        torch.set_num_threads(1)  # so small an operation only waits for other threads
    left_out = set() if options.quick else LARGE
    cases = options.only or [
        name for name in CASES if name not in left_out and (options.peer or name != "peer")
    ]

    with as_in_use() as scratch:
        figures = {"machine": machine()}
        print(figures["machine"])
        figures |= gathered(CASES, cases, options)
        figures["scratch_bytes"] = scratch.nbytes
    write(figures, options.out)


def write(figures: dict, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(figures, indent=1))
    (folder / "bench.md").write_text(markdown(figures))
    draw(figures).save(folder / "bench.png")
    print(f"Done: bench.json, bench.md and bench.png in {folder}")


if __name__ == "__main__":
    main()
