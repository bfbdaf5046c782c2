"""Shows a measurement: as lines of text, as one JSON of figures and versions, and as a chart."""
import importlib.metadata
import json
import platform
import re
from typing import Any

import comfy_kitchen
import torch
from comfy.model_patcher import ModelPatcher

from ...ops import cpu_features
from ...ops.host_versions import HOST_VERSION, VERSION
from ..byte_sizes import size_text
from ..comfyui.model_summary import format_sizes
from ..devices import total_memory
from ..lora.block_chart import Color
from ..models.compute_choice import EXACTLY, FAST
from ..packing.layer_losses import percent
from .chart import Value, bar_chart
from .measurement import Measurement, Row
from .ways import WAYS

JSON_VERSION = 1
NOISE = 0.05  # of two medians on a machine that does other things too
PATH = re.compile(r"(?<!\w)(?:[A-Za-z]:[/\\]|[~.]{0,2}/|\\\\)[^\s'\"()]*")
COLORS: dict[str, Color] = dict(zip(WAYS, ((92, 160, 255), (120, 200, 180), (160, 170, 185))))


def figures(patcher: ModelPatcher, measurement: Measurement) -> dict[str, Any]:
    """Returns what was measured and on what, without names, paths or prompts.

    Args:
        patcher: the host's, of the model that was measured.
        measurement: of it.
    """
    weights = list(patcher.model.diffusion_model.parameters())
    sizes = format_sizes(weights)
    device = patcher.load_device
    return {
        "featherweight_speed": JSON_VERSION,
        "versions": {
            "Featherweight": VERSION,
            "ComfyUI": HOST_VERSION,
            "comfy-kitchen": importlib.metadata.version("comfy-kitchen"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "device": device_facts(device),
        "kitchen": {name: "on" if backend["available"] else _without_paths(
            backend["unavailable_reason"] or "off")
            for name, backend in comfy_kitchen.list_backends().items()},
        "model": {
            "class": type(patcher.model).__name__,
            "values": sum(weight.numel() for weight in weights),
            "formats": {name: round(size / sizes.total(), 3) for name, size in sizes.most_common()
                        if size >= sizes.total() / 1000},
            "loras": max(map(len, patcher.patches.values()), default=0),
            "changed weights": len(patcher.patches),
        },
        "latent": list(measurement.shape),
        "rows": [{
            "compute": row.way,
            "loras": row.has_loras,
            "seconds": [round(second, 5) for second in row.seconds],
            "weights bytes": row.held,
            "peak bytes": row.peak,
            "kernels": _without_paths(row.kernels),
            "reason": _without_paths(row.reason),
        } for row in measurement.rows],
        "difference": measurement.difference and {
            "decibels": round(measurement.difference[0], 2),
            "largest": round(measurement.difference[1], 6),
        },
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Returns the name and the sizes of a device."""
    name, capability = cpu_features.model_name() or platform.machine(), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"type": device.type, "name": name, "capability": capability,
            "memory GB": round(total_memory(device) / 1e9, 1),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "CUDA": torch.version.cuda, "HIP": torch.version.hip}


def _without_paths(text: str) -> str:
    return PATH.sub("…", text)


def json_text(figures: dict[str, Any]) -> str:
    """Returns the figures as one line to paste."""
    return json.dumps(figures, ensure_ascii=False)


def report_text(measurement: Measurement, values: dict[str, Any]) -> str:
    """Returns the lines that people read.

    Args:
        measurement: of `measure_speed`.
        values: its `figures`.
    """
    exact = _row(measurement, EXACTLY)
    lines = [_verdict(exact, _row(measurement, FAST))]
    lines += dict.fromkeys(_line(row, exact) for row in measurement.rows)
    if measurement.difference:
        decibels, largest = measurement.difference
        lines.append(f"A step of fast differs from exact by {largest:.2%} of the largest value at"
                     f" most, and by {percent(10 ** (-decibels / 10))} on average.")
    elif exact and _row(measurement, FAST):
        lines.append("fast gave the same values as exact: here both compute the same way.")
    lines += _lora_lines(measurement)
    lines += list(dict.fromkeys(f"{row.way}: {row.kernels}" for row in measurement.rows
                                if row.kernels))
    if values["device"]["type"] != "cpu":
        backends = ", ".join(f"{name} {state if state == 'on' else f'off ({state})'}"
                             for name, state in values["kitchen"].items())
        lines.append(f"ComfyUI's kernels: {backends}.")
    lines.append(f"Measured in {measurement.seconds:.0f} s, with latents of"
                 f" {' x '.join(map(str, measurement.shape))}.")
    return "\n".join(lines)


def _row(measurement: Measurement, way: str, has_loras: bool = False) -> Row | None:
    return next((row for row in measurement.rows
                 if row.way == way and row.has_loras == has_loras and row.seconds), None)


def _verdict(exact: Row | None, fast: Row | None) -> str:
    """Returns a sentence on which choice of the loaders' `compute` to take here."""
    if exact is None or fast is None:
        return "exact and fast are one here: leave compute at automatic."
    ratio = exact.step / fast.step
    if ratio > 1 + NOISE:
        return f"fast is {ratio:.2f} times as fast as exact here."
    if ratio < 1 - NOISE:
        return f"Take exact: fast is slower here ({1 / ratio:.2f} times as long)."
    return "Take exact: fast is not faster here."


def _label(row: Row) -> str:
    return f"{row.way}, {'with' if row.has_loras else 'without'} LoRAs"


def _line(row: Row, exact: Row | None) -> str:
    if not row.seconds:
        return f"{row.way}: not measured: {row.reason}"
    ratio = (f", {row.step / exact.step:.2f} times as long as exact" if exact and row is not exact
             else "")
    return (f"{_label(row)}: {row.step:.3g} s a step{ratio}; weights {size_text(row.held)}, peak"
            f" {size_text(row.peak)}")


def _lora_lines(measurement: Measurement) -> list[str]:
    lines = []
    for way in dict.fromkeys(row.way for row in measurement.rows):
        without, with_loras = _row(measurement, way), _row(measurement, way, True)
        if without and with_loras:
            lines.append(f"The LoRAs cost {with_loras.step / without.step - 1:+.0%} of a step in"
                         f" {way}.")
    return lines


def speed_chart(measurement: Measurement, title: str) -> torch.Tensor:
    """Draws a bar for each row, as long as a step takes.

    Returns:
        A ComfyUI IMAGE: (1, H, W, 3), float32, 0 to 1.
    """
    bars = [Value(_label(row), row.step if row.seconds else 0,
                  f"{row.step:.3g} s" if row.seconds else "not measured", COLORS[row.way])
            for row in measurement.rows]
    return bar_chart(title, {"Seconds of a step:": bars}).tensor()
