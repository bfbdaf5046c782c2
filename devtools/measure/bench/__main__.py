"""python3 dev.py bench: speed and memory, side by side in one run.

Each case runs its variants in turn, round after round, so that a noisy machine disturbs all of them
alike: read the ratios, not the milliseconds. Leaves bench.json, bench.md and bench.png.
"""
import argparse
from pathlib import Path

from devtools.measure.bench import errors, files, layers, models, roofline, sd15
from devtools.measure.figures import Report
from devtools.measure.timing import (
    FORMATS,
    ON_A_GPU,
    QUICK,
    Sizes,
    as_in_use,
    device,
    machine,
)
from devtools.measure.weights import FORMAT_NAMES, RANKED_NAMES

import torch

from devtools import ROOT

CASES = {name.removeprefix("bench_"): case
         for module in (layers, models, sd15, files, errors, roofline)
         for name, case in vars(module).items() if name.startswith("bench_")}
ON_A_CPU = {"attention", "compilers", "cpu", "lcm"}
# takes minutes, up to 7 GB of disk and 8 GB of memory: only where asked for
LARGE = {"comfy_load"}


def main():
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES,
                        help=f"cases to run; by default all but {', '.join(LARGE)}, peer")
    parser.add_argument("--formats", nargs="+", choices=[*FORMAT_NAMES, *RANKED_NAMES],
                        default=FORMATS, metavar="FORMAT")
    parser.add_argument("--blocks", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"),
                        help="size of the models")
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
    left_out = (set() if options.quick else LARGE) | (set() if options.peer else {"peer"})
    names = options.only or [name for name in CASES if name not in left_out]
    if device().type != "cpu" and (skipped := ON_A_CPU.intersection(names)):
        print(f"Only a CPU measures {', '.join(sorted(skipped))}.")
        names = [name for name in names if name not in skipped]
    report = Report(options.out, "bench", machine())
    print(report.figures["machine"])
    with as_in_use() as scratch:
        report.run(CASES, names, options)
        report.figures["scratch_bytes"] = scratch.nbytes
    report.draw()


if __name__ == "__main__":
    main()
