"""Packs a model file without ComfyUI's editor.

    python custom_nodes/ComfyUI-Featherweight/pack.py SOURCE OUT [--type Q4_K] [--size 5.9GB]
                                                      [--lora FILE:0.8 ...]
"""
import os
import signal
import sys

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 130
STOPPED_TEXT = "\nStopped. Nothing was written."


def stop_imports(*_):
    """Ends the command at once while it imports, where Ctrl-C would raise in any module."""
    os.write(1, f"{STOPPED_TEXT}\n".encode())
    os._exit(STOPPED)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop_imports)

import argparse  # noqa: E402
import io  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import types  # noqa: E402
from pathlib import Path  # noqa: E402

if sys.version_info < (3, 10):
    sys.exit("Failed: pack.py needs Python 3.10 or newer, this is %d.%d." % sys.version_info[:2])

ROOT = Path(__file__).resolve().parent
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"


def parse_size(text: str) -> int:
    """Returns the bytes of a size as people write it: 5.9GB (10^9 bytes each), 5.9GiB, 620MB."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*([KMG]?I?B?)\s*", text.upper())
    unit = match and UNITS.get(
        match[2] if match[2].endswith("B") or not match[2] else f"{match[2]}B"
    )
    size = float(match[1]) * unit if match and unit else 0
    if not 1 <= size < float("inf"):
        raise argparse.ArgumentTypeError(f"invalid size {text!r}, for example 5.9GB")
    return round(size)


def parse_lora(text: str) -> tuple[str, float]:
    """Returns (path, strength) of FILE:STRENGTH, or of FILE, whose strength is 1."""
    path, colon, strength = text.rpartition(":")
    if not (colon and path):
        return text, 1.0
    if re.fullmatch(rf"[+-]?{NUMBER}", strength) and math.isfinite(float(strength)):
        return path, float(strength)
    if re.fullmatch(r"[A-Za-z]", path) or os.path.exists(text):  # a drive, or a colon in the name
        return text, 1.0
    raise argparse.ArgumentTypeError(
        f"invalid strength {strength!r} in {text!r}, for example FILE:0.8"
    )


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="pack.py",
        description="Packs a diffusion model into a GGUF file, or into NF4 or one of ComfyUI's own"
                    " types where OUT ends in .safetensors.",
    )
    parser.add_argument(
        "source",
        help="a model file (safetensors, GGUF), or a diffusers folder (.../transformer)",
    )
    parser.add_argument("out", help="the file to write; it must not exist")
    parser.add_argument(
        "--type",
        help="Q8_0, Q6_K, Q5_K, Q4_K, IQ4_XS, Q3_K, Q2_K, NF4, 'keep types', or one of ComfyUI's"
             " own: int8_convrot, float8_e4m3fn, mxfp8, nvfp4, asym_w4a8_int8,"
             " convrot_w4a4, or 'convrot_w4a4 int4' whose inputs ComfyUI is to round to 4 bits too;"
             " with --size several of these, such as int8_convrot+nvfp4",
    )
    parser.add_argument(
        "--size", type=parse_size,
        help="the size of the file, such as 5.9GB; never exceeded. Met with GGUF types, or with"
             " those that --type names",
    )
    parser.add_argument(
        "--checkpoint",
        action="store_true",
        help="write a checkpoint in ComfyUI's own types, with SOURCE's VAE and text encoders",
    )
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA to merge into the model; may be given several times",
    )
    parser.add_argument(
        "--sensitivity",
        metavar="FILE",
        help="a file that Measure Sensitivity (Featherweight) saved for this model, or an imatrix"
             " (.gguf, .dat)",
    )
    parser.add_argument(
        "--loras-as-asked",
        action="store_true",
        help="keep weights that are quantized already and get a LoRA in the given type, not a"
        " finer one",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def find_host() -> Path:
    """Returns ComfyUI's folder: COMFYUI_PATH, else the one whose custom_nodes hold this file."""
    pack = types.ModuleType("featherweight")
    pack.__path__ = [str(ROOT)]
    sys.modules.setdefault("featherweight", pack)
    from featherweight.cluster.comfyui_install import MachineError, own_comfyui

    try:
        folder = own_comfyui(str(ROOT))
    except MachineError as error:
        raise SystemExit(f"Failed: {error}") from error
    if not folder:
        raise SystemExit(
            f"Failed: no ComfyUI at {ROOT.parent.parent}. Set COMFYUI_PATH to its folder."
        )
    return Path(folder)


def start_host(host: Path):
    """Makes ComfyUI's modules and this pack importable, on the CPU and without a server."""
    sys.path[:] = [str(host), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    except ImportError as error:
        raise SystemExit(f"Failed: {error}. Run this with the Python that ComfyUI uses.") from error
    finally:
        sys.argv = arguments


def run(arguments: argparse.Namespace) -> int:
    """Packs the file. Returns the exit code of the command."""
    start_host(find_host())
    import torch

    from featherweight.loaders.files.safetensors_writer import FILE_TYPES, INT4_PRODUCT
    from featherweight.loaders.packing.checkpoint_source import source_of_checkpoint_file
    from featherweight.loaders.packing.planning.file_plan import (
        HOST_TYPES,
        KEEP_TYPES,
        MIXES,
        RENAMED_TYPES,
        SAVE_TYPES,
        SaveOptions,
        plan_file,
    )
    from featherweight.loaders.packing.save import save
    from featherweight.loaders.packing.source import source_of_file
    from featherweight.loaders.progress import Progress
    from featherweight.ops.packing.pack_types import ROW_TYPES

    if signal.getsignal(signal.SIGINT) is stop_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    asked: list[str] = arguments.type.split("+") if arguments.type else []
    renamed = {**RENAMED_TYPES, INT4_PRODUCT: FILE_TYPES[INT4_PRODUCT]}
    chosen: list[str] = [renamed.get(name, name) for name in asked]
    names = (*SAVE_TYPES, *ROW_TYPES, KEEP_TYPES)
    unknown = next((name for name in chosen if name not in names), None)
    if unknown is not None:
        print(
            f"Failed: unknown type {unknown!r}, expected {', '.join((*SAVE_TYPES, *HOST_TYPES))}"
            f" or '{KEEP_TYPES}'."
        )
        return USAGE
    row_types = tuple(name for name in chosen if name in ROW_TYPES)
    if not (len(row_types) == len(chosen) if arguments.size else len(chosen) == 1):
        print(
            "Failed: --type with one type is required, or --size, which may have a --type of"
            f" ComfyUI's own types, such as {'+'.join(MIXES[0])}."
        )
        return USAGE
    suffixes = {name: [".safetensors"] for name in ("NF4", *ROW_TYPES)}
    suffixes[KEEP_TYPES] = [".gguf", ".safetensors"]
    expected = suffixes.get(chosen[0] if chosen else "", [".gguf"])
    if Path(arguments.out).suffix.lower() not in expected:
        print(
            f"Failed: {arguments.out} has the wrong suffix: NF4 and ComfyUI's own types go into a"
            " file that ends in .safetensors, every other type into one that ends in .gguf."
        )
        return USAGE
    sensitivity = None
    if arguments.sensitivity:
        from featherweight.loaders.packing.calibration.imatrix import load_measurement

        sensitivity = load_measurement(arguments.sensitivity)
    with torch.inference_mode():
        read = source_of_checkpoint_file if arguments.checkpoint else source_of_file
        source = read(arguments.source, arguments.lora)
        options = SaveOptions(
            sensitivity,
            not arguments.loras_as_asked,
            overwrite=arguments.overwrite,
            is_int4_product=INT4_PRODUCT in asked,
            row_types=row_types if arguments.size else (),
        )
        plan = plan_file(source, arguments.out, arguments.size or chosen[0], options)
        print(plan.text, flush=True)
        saved = save(plan, Progress("packing").track)
    print("\n".join([*saved.notes, *saved.layers, "", saved.card, "", f"Done: {saved}"]))
    return DONE


def main(arguments: list[str]) -> int:
    """Runs the command with its arguments. Returns its exit code."""
    try:
        return run(make_parser().parse_args(arguments))
    except ValueError as error:  # such as WeightFileError, whose text is written for people
        print(f"Failed: {error}")
        return FAILED
    except KeyboardInterrupt:
        print(STOPPED_TEXT)
        return STOPPED


if __name__ == "__main__":
    # a name may hold characters that this terminal, or a file on Windows, cannot
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
