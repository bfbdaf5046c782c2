"""Single layers with patches, of every kind and in formats of ours and of the host's, beside the
dense ones they stand for."""
import copy
import io
import pickle

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from host_formats import HOST_FORMATS, in_host_format
from host_patches import patched_by_host
from pack_api import packed_operations
from patched_models import adapter, packed_anyhow

from featherweight.ops.patches.layer_patches import build_patches

ROWS, COLUMNS, RANK = 48, 256, 4
KERNELS = {"Linear": (), "Conv1d": (3,), "Conv2d": (3, 3), "Conv3d": (1, 2, 2)}
CONVOLUTIONS = tuple(name for name, kernel in KERNELS.items() if kernel)
LAYERS = (*((name, "Q8_0") for name in KERNELS), *(("Linear", name) for name in HOST_FORMATS))
PATCHES = ("lora", "diff and lora")


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


# ways to copy a layer
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "torch.save": through_torch_save} | {
    f"pickle {protocol}": lambda module, protocol=protocol: pickle.loads(
        pickle.dumps(module, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)}


def value_of(tensors: dict[str, torch.Tensor]):
    """What the host makes of the tensors of an adapter, under the names that follow a layer's."""
    lora = {f"x.{suffix}": tensor for suffix, tensor in tensors.items()}
    return comfy.lora.load_lora(lora, {"x": "weight"}, log_missing=False)["weight"]


def plain_lora(rows: int, *columns: int, rank: int = RANK, spread: float = 1.0) -> LoRAAdapter:
    """spread: of its factors, which are random."""
    factors = torch.randn(rows, rank, *(1 for _ in columns[1:])), torch.randn(rank, *columns)
    return LoRAAdapter(set(), (*(factor * spread for factor in factors), None, None, None, None))


def patches_for(kind: str, values: torch.Tensor) -> list:
    """The host's, large beside a weight of randn / 8. kind: one of PATCHES, or of `KINDS`."""
    if kind not in PATCHES:
        return [(0.9, value_of(adapter(kind, values, 1)), 1.0, None, None)]
    lora = (1.0, plain_lora(*values.shape, spread=1 / 8), 1.0, None, None)
    diff = (1.0, ("diff", (torch.randn(values.shape) / 8,)), 0.5, None, None)
    return [lora] if kind == "lora" else [diff, lora]


def with_patches(layer, patches: list, dtype: torch.dtype = torch.float32):
    """A layer that runs these patches of the host's."""
    layer.lora = build_patches("weight", patches, layer.weight.shape, torch.device("cpu"), dtype,
                               layer.has_branch)
    return layer


def layer_and_twin(name: str, format_name: str, kind: str | None, dtype: torch.dtype,
                   kernel: tuple[int, ...] | None = None, **options):
    """(a layer with patches, or without, torch's function with the weight that they make in
    float32)"""
    kernel = KERNELS[name] if kernel is None else kernel
    values, hosts = torch.randn(ROWS, COLUMNS, *kernel) / 8, format_name in HOST_FORMATS
    if hosts:
        parts, values = in_host_format("weight", values, format_name)
    else:
        packed, values = packed_anyhow(values, format_name)
        parts = {"weight": packed}
    bias = torch.linspace(-1, 1, ROWS)
    operations = packed_operations(mixed=hosts, **options)
    layer = getattr(operations, name)(COLUMNS, ROWS, *([kernel] if kernel else []), dtype=dtype)
    layer.load_state_dict(parts | {"bias": bias.to(dtype)})
    if kind is not None:
        patches = patches_for(kind, values)
        values = patched_by_host(patches, values)
        with_patches(layer, patches, dtype)
    function = getattr(torch.nn.functional, name.lower())
    return layer, lambda input: function(input, values, bias)


def input_for(name: str) -> torch.Tensor:
    return (
        torch.randn(3, COLUMNS)
        if name == "Linear"
        else torch.randn(2, COLUMNS, *(size + 4 for size in KERNELS[name]))
    )
