"""Reads weights in the host's own quantised formats (fp8 with scales, mxfp8, nvfp4, int8 ...).

A layer `L` has several tensors in the file and becomes one tensor, `L.weight`:

| format | tensors in the file |
|---|---|
| `comfy_quant` | `L.weight` (codes), `L.weight_scale` and other scales, `L.comfy_quant`, |
| | optional `L.input_scale` |
| `scaled_fp8` | `scaled_fp8` (marker), `L.weight` (fp8), `L.scale_weight`, |
| | optional `L.scale_input` |

`quantizers.comfy_quant` makes packed tensors of those that it knows. The host's own code reads
others: the layers of its `mixed_precision_ops`. So a newer host adds its formats here too, and a
format that neither reads is reported before the host fails on it.
"""
import contextlib
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import comfy.ops
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS
from comfy_kitchen.tensor import get_layout_class

from ...ops.tensor.packed_layout import QuantizedTensor, is_packed
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import (
    DOWNLOAD_AGAIN,
    ProgressIter,
    WeightFile,
    WeightFileError,
    describe,
    first_line,
    safe_repr,
)
from ..files.scale_map import add_scales
from ..name_lists import join_some
from ..out_of_memory import is_out_of_memory
from ..quantizers.comfy_quant import (
    is_kernel,
    layer_parts,
    pack_parts,
    row_type_of,
    shifted_bias,
)
from ..quantizers.comfy_quant_banks import is_bank, pack_bank
from ..quantizers.comfy_quant_formats import (
    COMFYUI_FORMATS,
    FP8,
    GROUP_SCALE,
    OTHER_MARK,
    PART_NAMES,
    SCALE,
    Settings,
    format_of,
    is_rotated,
    known_format,
    setting,
)
from ..quantizers.comfy_quant_marks import (
    BOOLEAN_TEXT,
    MARK,
    OLD_MARKER,
    OLD_SCALE,
    SETTINGS,
    MarkError,
    bytes_of,
    listed_layers,
    mark_of,
    old_markers,
    read_mark,
)
from ..quantizers.comfy_quant_settings import check_settings, unknown_settings
from ..quantizers.integers import pack_rows
from ..quantizers.parts import GET_OTHER_CONVERSION, PartError

OLD_INPUT_SCALE = ".scale_input"
UPDATE = "Update ComfyUI, or get another conversion."


def as_tensors(file: WeightFile, state_dict: dict[str, torch.Tensor], prefix: str = "",
               formats: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Joins the parts of each quantised weight into one tensor, without copying the codes.

    Kernels of convolutions, which the host has no layers for, banks of experts, whose rotation
    some of its versions overlook, and what `host_misreads` always become packed tensors. The parts
    of a bank in a format that is not read here stay apart: only the host's layer for experts reads
    them.

    Args:
        file: the file of the state dict.
        state_dict: of `read_marked`; it is not changed.
        prefix: of the names of the model; of other weights only kernels and banks are joined.
        formats: names of those whose layers become packed tensors; others stay in parts for the
            host. None: all become packed tensors or the host's own.

    Returns:
        A state dict whose quantised weights are `QuantizedTensor`s of dtype float32.

    Raises:
        WeightFileError: if a layer is damaged or in a format that is not read.
    """
    out = dict(state_dict)
    for layer, names in _parts_of_layers(state_dict).items():
        is_inside = layer.startswith(prefix)
        if f"{layer}.weight" not in state_dict:
            continue
        parts = {part: state_dict[name] for part, name in names.items()}
        bias = state_dict.get(f"{layer}.bias")
        try:
            weight, bias = _read_layer(layer, parts, bias, formats if is_inside else ())
        except PartError as error:
            if not is_inside:
                continue  # what loads that part of a checkpoint, if anything does, says so
            raise _unread_layer_error(file, layer, error) from error
        if weight is not None:
            for name in names.values():
                del out[name]
            out[f"{layer}.weight"] = weight
            if bias is not None:
                out[f"{layer}.bias"] = bias
    return out


def _read_layer(layer: str, parts: dict[str, torch.Tensor], bias: torch.Tensor | None,
                formats: Container[str] | None) -> tuple[QuantizedTensor | None,
                                                         torch.Tensor | None]:
    """Returns the weight of one layer and its bias; None for a weight that the host reads in parts.

    Args:
        layer: its name.
        parts: the tensors of its weight, by the last parts of their names.
        bias: of the layer, or None.
        formats: as for `as_tensors`.

    Raises:
        PartError: neither this pack nor the host reads it.
    """
    codes = parts["weight"]
    if codes.ndim < 2 or not codes.numel():
        raise PartError(f"it is {describe(codes)}, expected rows of codes")
    settings = _read_settings(parts[MARK[1:]])
    check_settings(settings, parts)
    name, in_bank = format_of(settings), is_bank(settings, codes)
    of_kernel = not in_bank and is_kernel(settings, codes)
    is_ours = formats is None or in_bank or of_kernel or name in formats or host_misreads(
        settings, parts.get(SCALE))
    weight = None
    if is_ours and (in_bank or of_kernel or codes.ndim in (2, 4)):  # 4: in tiles
        try:
            weight = (pack_bank if in_bank else pack_parts)(settings, parts)
            bias = bias if weight is None else shifted_bias(weight, bias)
        except PartError as error:
            raise PartError(f"{name}: {error}", error.advice) from error
    if weight is None and of_kernel:
        raise PartError(f"it is the kernel of a convolution in {safe_repr(name)}, which ComfyUI"
                        " does not read", GET_OTHER_CONVERSION)
    if weight is None and codes.ndim == 2 and not in_bank:
        of_host = _host_weight(layer, settings, parts)
        weight = of_host if formats is None else None
    elif weight is None:
        if codes.ndim == 2 and not host_reads_flat_banks():
            raise PartError(f"a flat bank of experts in {safe_repr(name)}", UPDATE)
        _host_format(settings)
    return weight, bias


def host_misreads(settings: Settings, scale: torch.Tensor | None) -> bool:
    """Returns whether the host reads other values than a weight has, or none.

    It knows of rotation in int8 alone, takes the scales of rows, (N,), for those of columns, and
    has none of blocks.

    Args:
        settings: of the layer's `comfy_quant`.
        scale: its `weight_scale`, None where it has none.
    """
    known = known_format(settings)
    if is_rotated(settings) and not (known and known.host_rotates):
        return True
    return bool(known and known.of_blocks) and scale is not None and scale.numel() > 1 and (
        scale.ndim == 1 or scale.shape[1:].numel() > 1)


@functools.cache
def host_reads_flat_banks() -> bool:
    """Returns whether the host's layer for experts reads codes of all experts in one matrix."""
    experts, rows, columns = 2, 16, 32
    codes = torch.arange(experts * rows * columns).view(-1, columns).char()
    ones = torch.ones(experts * rows, 1, dtype=torch.float32)
    mark = mark_of({"format": "int8_tensorwise", "num_experts": experts})
    try:
        bank = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).MoEExperts(
            experts, columns, rows, bias=False)
        bank.load_state_dict({"weight": codes, "weight_scale": ones, "comfy_quant": mark})
        return torch.equal(bank.expert_weight(1).dequantize(), codes[rows:].float())
    except Exception:  # what it raises is its own affair
        return False


def in_parts(state_dict: Mapping[str, torch.Tensor],
             formats: Container[str]) -> dict[str, torch.Tensor]:
    """Returns a state dict with the parts of weights that the host computes, for its own layers.

    Args:
        state_dict: with packed weights.
        formats: names of those whose layers stay packed tensors, as do those that this host does
            not know.
    """
    out = {}
    for name, weight in state_dict.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and is_packed(weight) and row_type_of(weight):
            settings, parts = layer_parts(weight)
            if settings["format"] in QUANT_ALGOS and settings["format"] not in formats:
                out |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
                out[f"{layer}{MARK}"] = mark_of(settings)
                continue
        out[name] = weight
    return out


def pack_plain_fp8(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Packs the fp8 weights of layers that have no scales.

    The host keeps them in float32 on a CPU.

    Args:
        state_dict: with the host's names; it is not changed.
    """
    one = torch.ones(1, dtype=torch.float32)
    return {
        name: pack_rows(tensor, one)
        if name.endswith(".weight") and tensor.dtype in FP8 and tensor.ndim > 1
        and f"{name.removesuffix('.weight')}{MARK}" not in state_dict else tensor
        for name, tensor in state_dict.items()
    }


def packed_of_host(weight: QuantizedTensor) -> PackedTensor | None:
    """Returns a weight that the host has read as a packed tensor of the same bytes, if one can.

    Args:
        weight: of one of the host's own layers, whose input has no factors.

    Returns:
        The packed tensor, which may share the weight's memory; None for a format that is not read
        here, and for a weight that is filled up to whole blocks.
    """
    params = weight._params
    options = ("convrot", "convrot_groupsize", "group_size")
    settings = {name: getattr(params, name) for name in options if hasattr(params, name)}
    for name, algorithm in QUANT_ALGOS.items():
        if algorithm["comfy_tensor_layout"] == weight._layout_cls and name in COMFYUI_FORMATS:
            parts = weight.state_dict("weight")
            try:
                packed = pack_parts(settings | {"format": name}, parts)
            except PartError:
                return None
            return packed if packed is not None and packed.shape == weight.shape else None
    return None


def read_marked(file: WeightFile, track: ProgressIter = iter) -> dict[str, torch.Tensor]:
    """Returns `with_marks` of `WeightFile.state_dict`, and raises as both do."""
    return with_marks(file, file.state_dict(track))


def with_marks(file: WeightFile,
               state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives each layer in a format of the host its `comfy_quant` tensor, as newer files have them.

    The host adds them to files with `scaled_fp8` or settings in the metadata, where these name the
    layers as the tensors do. Marks that say nothing (`null`, or beside weights that are packed in
    other ways) are dropped, and one that names the other of two kinds of fp8 than its codes are of
    is mended.

    Args:
        file: the file of the state dict.
        state_dict: as stored; it is not changed.

    Raises:
        WeightFileError: the marks are damaged, or contradict each other.
    """
    state_dict, metadata = dict(state_dict), file.metadata
    try:
        listed = listed_layers(metadata, state_dict)
    except MarkError as error:
        raise WeightFileError(f"{file.path.name}: {error}. {DOWNLOAD_AGAIN}") from error
    add_scales(file, state_dict)
    file.judgement.reject(file.error_at)
    for sentence in file.judgement.told:
        file.note(f"{file.path.name}: {sentence}")
    _tell_of_absent_layers(file)
    for layer, settings in listed.items():
        if f"{layer}.weight" in state_dict:
            state_dict[f"{layer}{MARK}"] = mark_of(settings)
    for marker in [] if SETTINGS in metadata else old_markers(state_dict):
        _reject_scales_of_inputs(file, state_dict)
        state_dict, _ = comfy.utils.convert_old_quants(
            state_dict, model_prefix=marker.removesuffix(OLD_MARKER))
    unknown: dict[str, str] = {}
    for name in [name for name in state_dict if name.endswith(MARK)]:
        layer = name.removesuffix(MARK)
        weight = state_dict.get(f"{layer}.weight")
        mark = state_dict.pop(name)
        mended = None if weight is None else _mended_mark(mark, weight)
        if mended is not None:
            state_dict[name] = mended
            with contextlib.suppress(PartError):
                settings = _read_settings(mended)
                unknown |= dict.fromkeys(unknown_settings(settings), layer)
    if unknown:
        file.note(f"{file.path.name}: the comfy_quant of {safe_repr(next(iter(unknown.values())))}"
                  f" has {join_some(map(safe_repr, unknown))}, which this pack does not know."
                  " Images may be wrong if it changes weights.")
    for names in _parts_of_layers(state_dict).values():
        for name in names.values():  # ComfyUI's products take no float64
            if state_dict[name].dtype == torch.float64:
                state_dict[name] = state_dict[name].float()
    return state_dict


def _tell_of_absent_layers(file: WeightFile):
    absent = [layer for layer in listed_layers(file.metadata, file.entries)
              if f"{layer}.weight" not in file.entries]
    if absent:
        file.note(f"{file.path.name}: its metadata {SETTINGS} names layers that it does not have:"
                  f" {join_some(map(safe_repr, absent))}.")


def host_metadata(file: WeightFile) -> dict[str, str]:
    """Returns a file's metadata for the host, without the settings that `read_marked` has put
    into the state dict."""
    return {key: text for key, text in file.text_metadata.items() if key != SETTINGS}


def _reject_scales_of_inputs(file: WeightFile, state_dict: Mapping[str, torch.Tensor]):
    """Raises WeightFileError for a scale of an input that is not one number, as the host reads."""
    for name, tensor in state_dict.items():
        if name.endswith(OLD_INPUT_SCALE) and tensor.numel() != 1:
            raise file.error_at(name, f"{safe_repr(name)} is {describe(tensor)}, expected one"
                                " number", DOWNLOAD_AGAIN)


def _mended_mark(mark: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Returns a layer's `comfy_quant` as its codes need it, None where it has no meaning."""
    if is_packed(weight):
        return None
    is_byte = mark.itemsize == 1 and not mark.is_floating_point()
    if is_byte and weight.itemsize > 1 and bytes_of(mark).rstrip(b"\0") == b"null":
        return None
    try:
        settings = _read_settings(mark)
    except PartError:
        return mark
    kind, *kinds = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, *FP8))
    if weight.dtype in FP8 and format_of(settings) in {*kinds} - {kind}:
        return mark_of(settings | {"format": kind})
    data = bytes_of(mark)
    return mark_of(settings) if data.endswith(b"\0") or BOOLEAN_TEXT.search(data) else mark


def host_reads(names: Iterable[str], read: Callable[[str], torch.Tensor],
               metadata: Mapping[str, Any],
               formats_of: Callable[[str], Container[str]]) -> bool:
    """Returns whether the host's own loader reads all quantised layers of a file, none of which
    this pack computes, and gives them the values that they have.

    Args:
        names: of the tensors of the file.
        read: returns a tensor by its name.
        metadata: of the file.
        formats_of: returns the names of those that this pack computes in a layer.

    Raises:
        MarkError: the settings in the metadata are damaged.
    """
    names = dict.fromkeys(names)
    listed = listed_layers(metadata, names)
    marks = {f"{layer}{MARK}": mark_of(settings) for layer, settings in listed.items()}
    marks |= {f"{name.removesuffix(OLD_SCALE)}{MARK}": mark_of({"format": "float8_e4m3fn"})
              for name in (names if old_markers(names) else ()) if name.endswith(OLD_SCALE)}
    for layer, names_of_parts in _parts_of_layers([*names, *marks]).items():
        if f"{layer}.weight" not in names:
            continue
        parts = {part: marks[name] if name in marks else read(name)
                 for part, name in names_of_parts.items()}
        weight, mark = parts["weight"], parts[MARK[1:]]
        is_old = f"{layer}{OLD_SCALE}" in names and f"{layer}.{SCALE}" not in names
        scale = read(f"{layer}{OLD_SCALE}") if is_old else parts.get(SCALE)
        try:
            settings = _read_settings(mark)
            if (format_of(settings) in formats_of(layer) or host_misreads(settings, scale)
                    or any(unknown_settings(settings))
                    or _mended_mark(mark, weight) is not mark
                    or any(part.dtype == torch.float64 for part in parts.values())
                    or (not is_old and _read_layer(layer, parts, None, ())[0] is not None)):
                return False
        except PartError:
            return False
    return all(read(name).numel() == 1 for name in names if name.endswith(OLD_INPUT_SCALE))


def _parts_of_layers(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns layer -> parts of its quantised weight, in the order of `names` -> their names."""
    names = dict.fromkeys(names)
    layers = {name.removesuffix(MARK): {} for name in names if name.endswith(MARK)}
    for name in names:
        layer, _, part = name.rpartition(".")
        if layer in layers and (part.startswith("weight") or part in PART_NAMES):
            layers[layer][part] = name
    return layers


def _unread_layer_error(file: WeightFile, layer: str, error: PartError) -> WeightFileError:
    name = f"{layer}.weight"
    problem = f"{safe_repr(name)}: {error}"
    if error.advice == UPDATE:
        problem = (f"{safe_repr(name)} is in a quantized format that this ComfyUI does not read"
                   f" ({error})")
    return file.error_at(name, problem, error.advice)


def _host_format(settings: Settings) -> str:
    """Returns the name of a layer's format; raises PartError if the host does not know it."""
    name = settings.get("format")
    if not isinstance(name, str):
        raise PartError("its comfy_quant names no format")
    if name not in QUANT_ALGOS:
        known, by = COMFYUI_FORMATS.get(name), ""
        if known is not None:
            of_host = f"ComfyUI {known.since} or " if known.since else ""
            by = f", which needs {of_host}`compute` at automatic or exact"
        raise PartError(f"{safe_repr(name)}{by}", UPDATE)
    return name


def _read_settings(mark: torch.Tensor) -> dict[str, Any]:
    """Returns the JSON of a layer's `comfy_quant`."""
    if mark.itemsize != 1 or mark.is_floating_point():
        raise PartError(f"its comfy_quant is {describe(mark)}, expected uint8")
    try:
        return read_mark(bytes_of(mark))
    except MarkError as error:
        raise PartError(str(error)) from error


@functools.cache
def _layer_class(make_operations: Callable[..., Any]) -> type:
    return make_operations(compute_dtype=torch.float32).Linear


def _host_weight(layer: str, settings: Settings,
                 parts: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """Builds the host's tensor of one weight.

    Raises:
        PartError: if the host does not read the format or a part is wrong.
    """
    name = _host_format(settings)
    codes, expected = parts["weight"], QUANT_ALGOS[name]["storage_t"]
    allowed = {expected, torch.uint8} | ({torch.int8} if expected == torch.uint8 else set())
    if codes.dtype not in allowed:
        raise PartError(
            f"{name}: it has weight of {describe(codes)}, expected"
            f" {str(expected).removeprefix('torch.')}", OTHER_MARK)
    left = {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    try:
        rows, columns = _shape(name, settings, parts)
        module = _layer_class(comfy.ops.mixed_precision_ops)(columns, rows, bias=False)
        # which takes out what it uses
        module._load_from_state_dict(left, f"{layer}.", {}, False, [], [], [])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError,
            OverflowError) as error:
        if is_out_of_memory(error):
            raise
        raise PartError(f"{name}: {first_line(error)}") from error
    ignored = next((part for part in left if part.startswith(f"{layer}.weight")), None)
    if ignored is not None:  # without it the host would compute with wrong values
        raise PartError(f"{name} with {safe_repr(ignored.removeprefix(f'{layer}.'))}", UPDATE)
    weight: Any = module.weight.detach()
    return weight


def _shape(name: str, settings: Settings, parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Returns a weight's shape, including the padding to whole blocks that some formats have."""
    rows, stored = parts["weight"].shape
    layout = get_layout_class(QUANT_ALGOS[name]["comfy_tensor_layout"])
    if hasattr(layout, "get_logical_shape_from_storage"):
        return layout.get_logical_shape_from_storage((rows, stored))
    if GROUP_SCALE not in parts:
        bits = COMFYUI_FORMATS[name].family.example.codes.bits if name in COMFYUI_FORMATS else 8
        return rows, stored * 8 // bits
    columns = parts[GROUP_SCALE].shape[1] * int(setting(settings, "group_size", 16))
    if stored * 2 != columns and not (hasattr(layout, "bits") and stored * 4 == columns * 3):
        # The host would take it for 4 bits.
        raise ValueError(f"it has {stored * 8 / columns:g} bits a value")
    return rows, columns
