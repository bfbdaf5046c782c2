"""python3 dev.py quality --packing: files made here beside files of the recipes in use, at equal
bytes; with --host-types in ComfyUI's own types, with --equal-bytes beside the files people share.

The demo's Flux is measured on captions that it was trained on, packed in every way, written to a
file, loaded from it, and draws the captions that it never saw. What stands before and behind the
blocks is float16 in all of them.
"""
import functools
import tempfile
import time
from pathlib import Path

from devtools.measure import host_type_packing
from devtools.measure.painter import Painter
from devtools.measure.weights import snr

import torch

from demo_model import scenes
from devtools import markdown_table
from devtools.demo import STEPS
from devtools.files import demo_files, ggml_quantiser
from featherweight.loaders.comfyui.compute import EXACT
from featherweight.loaders.families import rules_for
from featherweight.loaders.files.gguf_writer import gguf_writer
from featherweight.loaders.files.safetensors_writer import PACKED_TYPES, safetensors_writer
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.packing.calibration.measure import measure
from featherweight.loaders.packing.calibration.sampling import SamplingRun
from featherweight.loaders.packing.planning.plan import Plan, plan_for_size, plan_for_type
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.packing.pack_types import ROW_TYPES, pack_type
from featherweight.ops.tensor.packed_layout import packed_tensor

SIZES = ("Q5_K", "Q4_K", "Q3_K", "Q2_K")
CALIBRATION, TOGETHER = 256, 16  # captions of the training, and how many of them are drawn at once
METADATA = {"general.architecture": "flux", "general.quantization_version": 2}
NAMES = {  # way of packing -> what the table calls it
    "mix": "made here, mix by measurement", "mix, one run": "made here, mix by one run per layer",
    "mix, no runs": "made here, mix by the layers' own losses",
    "mix, plain": "made here, mix, nothing measured", "uniform": "made here, one type",
    "no prompt": "made here, one type, measured without a prompt",
    "plain": "made here, one type, nothing measured",
    "measured": "made here, one type, measured",
    "llama.cpp, importance": "llama.cpp with an importance matrix", "llama.cpp": "llama.cpp",
    "bitsandbytes": "plain arithmetic of the reference", "kitchen": "ComfyUI's own (comfy_kitchen)",
    "learned": "convert_to_quant, learned rounding"
}

MIXES = {"mix": "one run per layer and type", "mix, one run": "normal", "mix, no runs": "fast"}

# Name of a published file -> its type, and that of `attn.qkv.weight`, which alone is lifted in a
# Flux by ComfyUI-GGUF's patch of llama.cpp.
K_M = {"Q3_K_M": ("Q3_K", "Q4_K"), "Q4_K_M": ("Q4_K", "Q5_K"), "Q5_K_M": ("Q5_K", "Q6_K")}
# Of the table at equal bytes: the files that people share, and the way that makes each.
EQUAL = (("Q3_K_M", "llama.cpp"), ("Q4_K_M", "llama.cpp"), ("asym_w4a8_int8", "kitchen"),
         ("Q5_K_M", "llama.cpp"), ("int8_convrot", "kitchen"))


class Maker:
    """Packs the demo's model in every way. tensors: its weights. Its measurements are made when
    they are first needed."""

    def __init__(self, tensors: dict[str, torch.Tensor], folder: Path,
                 show=functools.partial(print, flush=True)):
        self.tensors, self.folder, self.show = (
            {name: value.float() for name, value in tensors.items()},
            folder,
            show,
        )
        self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        self.family = rules_for(self.shapes)
        self.blocks = [
            name for name, shape in self.shapes.items() if self.family.may_be_packed(name, shape)
        ]

    @functools.cache  # noqa: B019  as long as the one that measures
    def sensitivity(self, thoroughness: str, prompts: bool = True):
        started = time.process_time()
        found = measure(self.dense_model(), self.drawing(prompts), thoroughness)
        self.show(
            f"measured, {thoroughness}: {time.process_time() - started:.0f} s of processor time")
        return found

    def dense_model(self):
        path = self.folder / "dense.safetensors"
        if not path.exists():
            demo_files.write_model(path, "F16")
        return load_diffusion_model(str(path))

    def drawing(self, prompts: bool = True) -> SamplingRun:
        """What the model draws to be measured: captions of the training, or as many pictures
        without any."""
        given = []
        if prompts:
            painter = Painter([scene.caption() for scene in scenes.all_scenes()[0][:CALIBRATION]],
                              self.folder)
            given = [[[torch.cat(painter.words[start:start + TOGETHER]), {}]]
                     for start in range(0, CALIBRATION, TOGETHER)]
        latent = torch.zeros(1 if prompts else TOGETHER, 16, scenes.SIZE // 8, scenes.SIZE // 8)
        return SamplingRun(given, {"samples": latent}, samples=CALIBRATION // TOGETHER, steps=STEPS,
                           seed=5000)

    def plan(self, way: str, size: str) -> Plan:
        """Types of all tensors, as many bytes as with the type `size` everywhere or less."""
        halves = dict.fromkeys(self.shapes, "F16")
        base, lifted = K_M.get(size, (size, size))
        uniform = plan_for_type(self.shapes, base, self.family, halves)
        uniform = Plan({name: lifted if name in self.blocks and "attn.qkv.weight" in name
                        and kind == base else kind for name, kind in uniform.types.items()})
        if not way.startswith("mix"):
            return uniform
        nbytes = uniform.nbytes(self.shapes)
        costs = None if way == "mix, plain" else self.sensitivity(MIXES[way]).costs
        plan = plan_for_size(self.shapes, nbytes, self.family, costs, halves)
        assert 0.995 * nbytes <= plan.nbytes(self.shapes) <= nbytes
        return plan

    def pack(self, way: str, name: str, kind: str):
        """A packed tensor of the weight `name`."""
        weight = self.tensors[name]
        if way.startswith("llama.cpp"):
            moments = self._moments(way, name) if "importance" in way else None
            importance = None if moments is None else moments.importance.numpy()
            data = ggml_quantiser.pack(weight.numpy(), kind, importance)
            return packed_tensor(FORMATS[kind], torch.from_numpy(data), weight.shape)
        if way == "bitsandbytes":
            return pack_type(kind).pack(weight, is_plain=True)
        if way in ("kitchen", "learned"):
            return self._of_other_tools(way, kind)[name]
        return pack_type(kind).pack(weight, self._moments(way, name))

    @functools.lru_cache(1)  # noqa: B019  as long as the one that measures
    def _of_other_tools(self, way: str, type_name: str) -> dict:
        weights = {name: self.tensors[name] for name in self.blocks}
        if way == "kitchen":
            return host_type_packing.by_kitchen(weights, type_name, self.folder)
        return host_type_packing.by_learned_rounding(weights, type_name, self.folder)

    def _moments(self, way: str, name: str):
        if way in ("plain", "mix, plain"):
            return None
        if way in ("no prompt", "measured"):
            return self.sensitivity("fast", way == "measured").moments(name)
        return self.sensitivity(MIXES["mix, one run"]).moments(name)

    def write(self, way: str, size: str) -> tuple[Path, Plan]:
        """A file of the model packed in this way."""
        plan = self.plan(way, size)
        writer, ending, metadata = (
            (safetensors_writer, "safetensors", {})
            if size in PACKED_TYPES and not way.startswith("mix")
            else (gguf_writer, "gguf", METADATA)
        )
        path = self.folder / f"{way}-{size}.{ending}"
        with writer(path, {name: (self.shapes[name], kind) for name, kind in plan.types.items()},
                    metadata) as file:
            for name, kind in plan.types.items():
                plain = {"F16": torch.float16, "F32": torch.float32}.get(kind)
                tensor = (self.pack(way, name, kind) if plain is None
                          else self.tensors[name].to(plain))
                file.write(name, kind, [tensor])
        return path, plan


def host_rows() -> list[tuple[str, str]]:
    """(way, type) of every row of the table of ComfyUI's own types."""
    return [(way, type_name) for type_name in ROW_TYPES
            for way in ("kitchen", "learned", "plain", "measured")
            if way != "learned" or type_name in host_type_packing.LEARNED]


def rows(sizes=SIZES) -> list[tuple[str, str]]:
    """(way, size) of every row of the table."""
    ways = [
        "mix", "uniform",
        *(["llama.cpp, importance", "llama.cpp"] if ggml_quantiser.available() else [])
    ]
    table = [(way, size) for size in sizes for way in ways if way != "mix" or size != "Q2_K"]
    table += [(way, "Q4_K") for way in ("mix, one run", "mix, no runs", "no prompt", "plain")]
    return [*table, ("uniform", "NF4"), ("bitsandbytes", "NF4")]


def measure_packing(
    count: int, wanted: list[tuple[str, str]], show=functools.partial(print, flush=True)
) -> list[dict]:
    """The figures of rows of a table. count: of held-out captions, at most 256."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        painter = Painter([scene.caption() for scene in scenes.all_scenes()[1][:count]], folder)
        maker = Maker(demo_files.flux(), folder, show)
        dense = painter.latents(maker.dense_model(), count)
        for way, size in wanted:
            started = time.process_time()
            path, plan = maker.write(way, size)
            packing = time.process_time() - started
            model = load_diffusion_model(str(path), host_formats=EXACT)
            model.set_model_compute_dtype(torch.float32)  # ComfyUI takes bfloat16 for its own types
            latents = painter.latents(model, count)
            nbytes = sum(pack_type(plan.types[name]).nbytes(maker.shapes[name])
                         for name in maker.blocks)
            values = sum(maker.tensors[name].numel() for name in maker.blocks)
            kinds = [plan.types[name] for name in maker.blocks]
            row = {
                "way": way, "size": size, "bytes": nbytes, "bits": 8 * nbytes / values,
                "snr": snr(latents, dense),
                "types": {kind: kinds.count(kind) for kind in sorted(set(kinds))}
            }
            if size in ROW_TYPES and not way.startswith("mix"):
                with host_type_packing.quantised_inputs(model, size):
                    row["snr_of_kernels"] = snr(painter.latents(model, count), dense)
            found.append(row)
            show(f"{' | '.join(cells(row))}   (packed in {packing:.0f} s of processor time)")
            path.unlink()
    return found


def cells(row: dict) -> list[str]:
    types = (
        ", ".join(f"{count} {kind}" for kind, count in row["types"].items())
        if len(row["types"]) > 1
        else ""
    )
    last = f"{row['snr_of_kernels']:.1f} dB" if "snr_of_kernels" in row else types
    return [
        f"{row['size']}, {row['bits']:.2f} bits", NAMES[row["way"]], f"{row['bytes'] / 1e6:.3f} MB",
        f"{row['snr']:.1f} dB", last
    ]


def equal_rows() -> list[tuple[str, str]]:
    """(way, size) of every row of the table at equal bytes."""
    return [(way, size) for size, published in EQUAL
            for way in (published, "mix, plain", "mix, one run")]


TABLES = {"packing": rows, "host_types": host_rows, "equal_bytes": equal_rows}


def measured(count: int, table: str) -> dict:
    """A table of TABLES: what stands above it, and its rows. count: of held-out captions."""
    return {"about": about(count, table), "rows": measure_packing(count, TABLES[table]())}


def about(count: int, table: str) -> str:
    on_what = (
        f"{count} captions that training never saw, {STEPS} steps, latents against the dense"
        f" model's. Measured on {CALIBRATION} captions of the training. It is a small model of 26"
        " block matrices, whose text stream knows 22 words and whose modulation sees only time:"
        " what large models gain is not known.")
    if table == "equal_bytes":
        return ("`python3 dev.py quality --packing --equal-bytes`: GGUF mixes made here with the"
                f" bytes of files that people share, {on_what}")
    if table == "host_types":
        return (
            f"`python3 dev.py quality --packing --host-types`: ComfyUI's own types, {on_what} The"
            " last column has the inputs of layers quantised as ComfyUI's kernels do.")
    return ("`python3 dev.py quality --packing`: files with the same bytes of the block matrices,"
            f" {on_what}")


def markdown(found: dict) -> str:
    is_of_host = any("snr_of_kernels" in row for row in found["rows"])
    last = "the same, inputs quantised" if is_of_host else "types of the mix"
    titles = ["type" if is_of_host else "bytes of", "", "block matrices", "latent SNR", last]
    return f"{found['about']}\n\n{markdown_table(titles, map(cells, found['rows']))}"


def equal_summary(table: dict) -> str:
    """The fourth table in short, as docs/packing.md has it: a row for each size, dB."""
    found: dict[str, list[dict]] = {}
    for row in table["rows"]:
        found.setdefault(row["size"], []).append(row)
    lines = [[size,
              " / ".join(f"{published[key]:.1f}" for key in ("snr", "snr_of_kernels")
                         if key in published), f"{plain['snr']:.1f}", f"{measured['snr']:.1f}"]
             for size, (published, plain, measured) in found.items()]
    return markdown_table(["file", "as published", "here, nothing measured", "here, measured"],
                          lines)


def host_summary(table: dict) -> str:
    """The third table in short, as docs/packing.md has it: a row for each type, and in a cell the
    error of the latents with exact inputs and with quantised ones, in %."""
    ways = ("kitchen", "learned", "plain", "measured")
    titles = ["", *(NAMES[way] for way in ways)]
    cells_of = {(row["size"], row["way"]): " / ".join(
        f"{100 * 10 ** (-row[key] / 20):.2g}" for key in ("snr", "snr_of_kernels"))
        for row in table["rows"]}
    type_names = dict.fromkeys(row["size"] for row in table["rows"])
    return markdown_table(titles, ([type_name, *(cells_of.get((type_name, way), "")
                                                 for way in ways)] for type_name in type_names))
