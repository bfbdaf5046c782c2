"""Finds this node's ComfyUI and its arguments from the environment `ray start` was run in."""
import argparse
import collections
import importlib.metadata
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence

# arguments of the server alone, and those a worker sets itself: argparse's `nargs` -> names
NOT_FOR_WORKERS = {
    0: (
        "--auto-launch", "--disable-auto-launch", "--windows-standalone-build", "--enable-manager",
        "--disable-manager-ui", "--enable-manager-legacy-ui", "--enable-compress-response-body",
        "--log-stdout", "--dont-print-server", "--quick-test-for-ci", "--multi-user",
        "--enable-assets", "--disable-api-nodes",
    ),
    1: (
        "--port", "--tls-keyfile", "--tls-certfile", "--max-upload-size", "--output-directory",
        "--temp-directory", "--database-url", "--cuda-device", "--default-device",
        "--front-end-version", "--front-end-root", "--preview-method",
    ),
    "?": ("--listen", "--enable-cors-header"),
    "*": ("--verbose",),
}
FOLDERS = ("--base-directory", "--input-directory", "--user-directory", "--models-directory")
PATHS = "--extra-model-paths-config"


class MachineError(RuntimeError):
    """A machine cannot run a workflow, though another may. The message does not name it."""


def find_comfyui(fallback_comfyui: str = "") -> str:
    """Returns the folder of this machine's ComfyUI.

    That is COMFYUI_PATH in the environment of `ray start`, else the folder `ray start` was run in.

    Args:
        fallback_comfyui: a folder to try last, such as the driver's own ComfyUI.

    Raises:
        MachineError
    """
    folder = first_comfyui((os.getcwd(), os.environ.get("PWD", ""), fallback_comfyui))
    if not folder:
        raise MachineError(
            "no ComfyUI was found: set COMFYUI_PATH to its folder before `ray start`, or run `ray"
            " start` in its folder.")
    return folder


def own_comfyui(pack: str) -> str:
    """Returns the folder of the ComfyUI that a command of this pack uses, or "".

    That is COMFYUI_PATH, else the ComfyUI that the pack is in.

    Args:
        pack: the pack's folder.

    Raises:
        MachineError
    """
    return first_comfyui((os.path.dirname(os.path.dirname(pack)),
                          os.path.join(pack, ".dev", "host")))


def first_comfyui(folders: Iterable[str]) -> str:
    """Returns COMFYUI_PATH, else the first of the folders that is a ComfyUI's, or "".

    Raises:
        MachineError: COMFYUI_PATH is not a ComfyUI's folder.
    """
    if named := os.environ.get("COMFYUI_PATH"):
        if not is_comfyui(named):
            raise MachineError(
                f"COMFYUI_PATH is {named}, which has no main.py and comfy: set it to ComfyUI's"
                " folder (for a worker of Ray, before `ray start`).")
        return os.path.abspath(named)
    return next((os.path.abspath(folder) for folder in folders if folder and is_comfyui(folder)),
                "")


def is_comfyui(folder: str) -> bool:
    """Returns whether a folder is a ComfyUI's."""
    return all(os.path.exists(os.path.join(folder, part)) for part in ("main.py", "comfy"))


def launch_arguments(has_gpu: bool) -> list[str]:
    """Returns the arguments of main.py: COMFYUI_ARGUMENTS, with --cpu for a worker without a GPU.

    Args:
        has_gpu: whether Ray gave the worker a GPU. On a Mac, where Ray knows none, it does not
            matter.

    Raises:
        MachineError
    """
    text = os.environ.get("COMFYUI_ARGUMENTS", "")
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise MachineError(
            f"COMFYUI_ARGUMENTS is {text}, which cannot be taken apart ({error}): set it to the"
            " arguments of main.py before `ray start`.") from error
    needs_cpu = not has_gpu and sys.platform != "darwin" and "--cpu" not in arguments
    return ["--cpu", *arguments] if needs_cpu else arguments


def installed_versions(comfyui: str, arguments: Sequence[str] = ()) -> dict[str, str]:
    """Returns {"ComfyUI", "torch", "Featherweight"} -> version, "" for what is not installed.

    Reads files and starts nothing.

    Args:
        comfyui: its folder.
        arguments: `launch_arguments`, which may name the folder of the node packs.
    """
    base = comfyui
    if "--base-directory" in arguments[:-1]:
        base = arguments[arguments.index("--base-directory") + 1]
    return {
        "ComfyUI": _read_string(os.path.join(comfyui, "comfyui_version.py"), "__version__"),
        "torch": _package_version("torch"),
        "Featherweight": _pack_version(os.path.join(base, "custom_nodes")),
    }


def _package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read_string(path: str, name: str) -> str:
    """Returns "x" of the line `name = "x"` in a file, or ""."""
    try:
        # errors: the files of other packs may have any encoding
        with open(path, encoding="utf-8", errors="replace") as file:
            match = re.search(rf'^{name}\s*=\s*"([^"]+)"', file.read(), re.M)
            return match[1] if match else ""
    except OSError:
        return ""


def is_pack(folder: str) -> bool:
    """Returns whether a folder is a copy of this pack, of any version."""
    return _read_string(os.path.join(folder, "pyproject.toml"), "name") == "featherweight"


def _pack_version(custom_nodes: str) -> str:
    try:
        folders = [os.path.join(custom_nodes, name) for name in sorted(os.listdir(custom_nodes))
                   if not name.endswith(".disabled")]  # as ComfyUI does
    except OSError:
        return ""
    projects = (os.path.join(folder, "pyproject.toml") for folder in folders if is_pack(folder))
    return next((version for path in projects if (version := _read_string(path, "version"))), "")


def version_difference(versions: dict[str, str], expected: dict[str, str]) -> str:
    """Returns "has ComfyUI 0.24.0 where the others have 0.30.0" where versions differ, else "".

    Builds of one version (+cu130) do not differ, nor does a version that is not known.

    Args:
        versions: `installed_versions` of a machine.
        expected: those of the others.
    """
    texts = []
    for name, version in versions.items():
        own, other = _without_build(version), _without_build(expected.get(name, ""))
        if own and other and own != other:
            texts.append(f"has {name} {own} where the others have {other}")
    return ", ".join(texts)


def majority_versions(machines: Iterable[dict[str, str]],
                      own_versions: dict[str, str] | None = None) -> dict[str, str]:
    """Returns the versions that most machines have, without builds; {} for no machines.

    Args:
        machines: `installed_versions` of each.
        own_versions: those that win a tie.
    """
    def as_key(versions: dict[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, _without_build(version)) for name, version in sorted(versions.items()))

    counts = collections.Counter(map(as_key, machines))
    own = as_key(own_versions or {})
    return dict(max(counts, key=lambda key: (counts[key], key == own), default=()))


def _without_build(version: str) -> str:
    return version.partition("+")[0]


def worker_environment(comfyui: str, arguments: Sequence[str]) -> dict[str, str]:
    """Returns variables that make this machine's workers run as its running ComfyUI does.

    Args:
        comfyui: the folder of the ComfyUI that runs.
        arguments: those of its main.py.
    """
    return {
        "COMFYUI_PATH": os.path.abspath(comfyui),
        "COMFYUI_ARGUMENTS": shlex.join(worker_arguments(arguments))
    }


def worker_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns ComfyUI's arguments without those of its server, and with absolute paths."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for nargs, names in NOT_FOR_WORKERS.items():
        for name in names:
            if nargs:
                parser.add_argument(name, nargs=nargs)
            else:
                parser.add_argument(name, action="store_true")
    for name in FOLDERS:
        parser.add_argument(name, dest=name)
    parser.add_argument(PATHS, dest=PATHS, nargs="+", action="append", default=[])
    namespace, others = parser.parse_known_args(arguments)
    options = vars(namespace)
    folders = [[name, os.path.abspath(options[name])] for name in FOLDERS if options[name]]
    files = [os.path.abspath(path) for path in itertools.chain(*options[PATHS])]
    return [*itertools.chain(*folders), *([PATHS, *files] if files else []), *others]
