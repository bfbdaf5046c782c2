"""Cases that are counted and not timed: what a device has to do where torch does the work of the
kernels."""
from devtools.measure.bench.products import LORA_CASES
from devtools.measure.memory_passes import META, of_dequantizing, of_linear
from devtools.measure.weights import FORMAT_NAMES, format_for

import torch

from featherweight.ops.formats.base import DEVICE_CHUNK_VALUES, FORMATS
from featherweight.ops.formats.column_groups import ColumnGroups
from featherweight.ops.formats.row_layout import FAMILIES, RowFormat
from featherweight.ops.layers.low_rank import LowRank, Slice


def bench_passes(options):
    """Counts kernel launches for a chunk and bytes moved for a value, of every format.

    By torch's dequantising on devices other than a CPU. Rows that are a block are 4096 wide.
    """
    for packed_format in every_format():
        row = {}
        for dtype in (torch.bfloat16, torch.float32):
            passes, name = of_dequantizing(packed_format, dtype), str(dtype).removeprefix("torch.")
            row |= {
                f"launches, {name}": passes.launches,
                f"bytes a value, {name}": passes.moved / DEVICE_CHUNK_VALUES
            }
        yield packed_format.name, row


def every_format() -> list:
    """All formats, and one of each kind that is made for a weight's shape."""
    return [
        *(packed_format for packed_format in FORMATS.values()
          if not isinstance(packed_format, (RowFormat, ColumnGroups))),
        ColumnGroups.of(FORMATS["Q4_K"], 4096, 16, 2),
        *(format_for(name, 4096) for name in FORMAT_NAMES if name in FAMILIES)
    ]


def bench_layer_passes(options):
    """Counts kernel launches for a call of a linear layer with a bias in bfloat16.

    By torch on devices other than a CPU; without LoRAs and with LoRAs, on the whole weight and on
    the three thirds of its rows, as on a Flux's q, k and v in one weight.
    """
    rows, columns = options.sizes.weight
    for name in ("BF16", *options.formats):
        packed_format = format_for(name, columns)
        launches = {"no LoRA": of_linear(packed_format, rows, columns).launches}
        for title, (count, rank) in LORA_CASES.items():
            launches[title] = of_linear(packed_format, rows, columns,
                                        low_rank(rows, columns, count * rank, 1)).launches
        launches["on thirds"] = of_linear(packed_format, rows, columns,
                                          low_rank(rows, columns, 16, 3)).launches
        yield f"{name}, {rows} x {columns}", {
            f"launches, {title}": number for title, number in launches.items()
        }


def low_rank(rows: int, columns: int, ranks: int, parts: int) -> LowRank:
    """A branch without memory: LoRAs of `ranks` on each of `parts` equal parts of the rows."""
    height = rows // parts
    down = torch.empty((parts * ranks, columns), dtype=torch.bfloat16, device=META)
    ups = tuple(
        torch.empty((height, ranks), dtype=torch.bfloat16, device=META) for _ in range(parts))
    return LowRank(
        down, ups,
        tuple(
            Slice(part * height, (part + 1) * height, part * ranks, (part + 1) * ranks)
            for part in range(parts)))
