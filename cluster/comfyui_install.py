"""Where a machine's ComfyUI lies and how it is started there: what `ray start` had around it says
so."""
import argparse
import collections
import importlib.metadata
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence

# What is the server's own, or what a worker has of its own. Name -> the number of its values, as
# argparse says it.
NOT_FOR_WORKERS = {
    "--listen": "?",
    "--port": 1,
    "--tls-keyfile": 1,
    "--tls-certfile": 1,
    "--enable-cors-header": "?",
    "--max-upload-size": 1,
    "--output-directory": 1,
    "--temp-directory": 1,
    "--database-url": 1,
    "--cuda-device": 1,
    "--default-device": 1,
    "--front-end-version": 1,
    "--front-end-root": 1,
    "--verbose": "*",
    "--preview-method": 1,
    **dict.fromkeys(
        (
            "--auto-launch",
            "--disable-auto-launch",
            "--windows-standalone-build",
            "--enable-manager",
            "--disable-manager-ui",
            "--enable-manager-legacy-ui",
            "--enable-compress-response-body",
            "--log-stdout",
            "--dont-print-server",
            "--quick-test-for-ci",
            "--multi-user",
            "--enable-assets",
            "--disable-api-nodes",
        ),
        0,
    ),
}
FOLDERS = ("--base-directory", "--input-directory", "--user-directory", "--models-directory")
PATHS = "--extra-model-paths-config"


class MachineError(RuntimeError):
    """What a machine lacks for a workflow, in one sentence that does not yet name the machine:
    another may have it."""


def find_comfyui(elsewhere: str = "", environment: Mapping[str, str] | None = None) -> str:
    """The folder of this machine's ComfyUI: COMFYUI_PATH in the environment of `ray start`, else
    the folder it was called in.

    elsewhere: one to take where neither has it, such as the driver's own. Raises MachineError.
    """
    # a default would be the driver's, sent along by value
    environment = os.environ if environment is None else environment
    folder = first_comfyui((os.getcwd(), environment.get("PWD", ""), elsewhere), environment)
    if not folder:
        raise MachineError(
            "no ComfyUI was found: set COMFYUI_PATH to its folder before `ray start`, or call that"
            " in its folder.")
    return folder


def own_comfyui(pack: str, environment: Mapping[str, str] | None = None) -> str:
    """The folder of the ComfyUI that a command of this pack uses, or "": COMFYUI_PATH, else the one
    that the pack is in.

    pack: the pack's folder. Raises MachineError.
    """
    return first_comfyui(
        (os.path.dirname(os.path.dirname(pack)), os.path.join(pack, ".dev", "host")),
        os.environ if environment is None else environment)


def first_comfyui(folders: Iterable[str], environment: Mapping[str, str]) -> str:
    """COMFYUI_PATH, else the first of these folders that is a ComfyUI's, or "". Raises
    MachineError."""
    if named := environment.get("COMFYUI_PATH"):
        if not is_comfyui(named):
            raise MachineError(
                f"COMFYUI_PATH is {named}, which has no main.py and comfy: set it to ComfyUI's"
                " folder (for a worker of Ray, before `ray start`).")
        return os.path.abspath(named)
    return next((os.path.abspath(folder) for folder in folders if folder and is_comfyui(folder)),
                "")


def is_comfyui(folder: str) -> bool:
    return all(os.path.exists(os.path.join(folder, part)) for part in ("main.py", "comfy"))


def launch_arguments(has_gpu: bool, environment: Mapping[str, str] | None = None) -> list[str]:
    """What stands behind main.py there: COMFYUI_ARGUMENTS, and --cpu where Ray gave the worker no
    GPU (a Mac's aside).

    Raises MachineError.
    """
    text = (os.environ if environment is None else environment).get("COMFYUI_ARGUMENTS", "")
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise MachineError(
            f"COMFYUI_ARGUMENTS is {text}, which cannot be taken apart ({error}): set it to what"
            " stands behind main.py before `ray start`.") from error
    return given if has_gpu or sys.platform == "darwin" or "--cpu" in given else ["--cpu", *given]


def installed_versions(comfyui: str, given: list[str] = ()) -> dict[str, str]:
    """{"ComfyUI", "torch", "Featherweight"} -> version, "" for one that is not there. Read from
    files: nothing is started.

    given: `launch_arguments`, which may say where the node packs lie.
    """
    base = (
        given[given.index("--base-directory") + 1] if "--base-directory" in given[:-1] else comfyui
    )
    return {
        "ComfyUI": _quoted(os.path.join(comfyui, "comfyui_version.py"),
                           "__version__"), "torch": _installed("torch"),
        "Featherweight": _pack_version(os.path.join(base, "custom_nodes"))
    }


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _quoted(path: str, name: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # other packs' too
            found = re.search(rf'^{name}\s*=\s*"([^"]+)"', file.read(), re.M)
            return found[1] if found else ""
    except OSError:
        return ""


def is_pack(folder: str) -> bool:
    """Whether a folder is a copy of this pack, of any version."""
    return _quoted(os.path.join(folder, "pyproject.toml"), "name") == "featherweight"


def _pack_version(custom_nodes: str) -> str:
    try:
        folders = [os.path.join(custom_nodes, name) for name in sorted(os.listdir(custom_nodes))
                   if not name.endswith(".disabled")]  # as ComfyUI does
    except OSError:
        return ""
    projects = (os.path.join(folder, "pyproject.toml") for folder in folders if is_pack(folder))
    return next((version for path in projects if (version := _quoted(path, "version"))), "")


def version_difference(own_comfyui: dict[str, str], others: dict[str, str]) -> str:
    """Say which `installed_versions` differ: "has ComfyUI 0.24.0 where the others have 0.30.0", or
    "".

    Builds of one version (+cu130) do not differ, nor does what is not known.
    """
    texts = []
    for name, version in own_comfyui.items():
        pair = [each.partition("+")[0] for each in (version, others.get(name, ""))]
        if all(pair) and pair[0] != pair[1]:
            texts.append(f"has {name} {pair[0]} where the others have {pair[1]}")
    return ", ".join(texts)


def majority_versions(machines: Iterable[dict[str, str]],
                      own_comfyui: dict[str, str] | None = None) -> dict[str, str]:
    """The `installed_versions` that most machines have, without builds; of two that as many have,
    one's own."""
    def plain(each):
        return tuple((name, version.partition("+")[0]) for name, version in sorted(each.items()))

    counts = collections.Counter(map(plain, machines))
    return dict(
        max(counts, key=lambda each: (counts[each], each == plain(own_comfyui or {})), default=()))


def worker_environment(comfyui: str, given: Sequence[str]) -> dict[str, str]:
    """Variables for workers of this machine that shall be as its running ComfyUI.

    Args:
        comfyui: the folder of the ComfyUI that runs.
        given: what stands behind its main.py.
    """
    return {
        "COMFYUI_PATH": os.path.abspath(comfyui),
        "COMFYUI_ARGUMENTS": shlex.join(worker_arguments(given))
    }


def worker_arguments(given: Sequence[str]) -> list[str]:
    """Arguments of a ComfyUI without those of its server, and with folders that mean the same from
    elsewhere."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, values in NOT_FOR_WORKERS.items():
        parser.add_argument(name,
                            **({"action": "store_true"} if values == 0 else {"nargs": values}))
    for name in FOLDERS:
        parser.add_argument(name, dest=name)
    parser.add_argument(PATHS, dest=PATHS, nargs="+", action="append", default=[])
    found, rest = parser.parse_known_args(given)
    folders = [[name, os.path.abspath(vars(found)[name])] for name in FOLDERS if vars(found)[name]]
    files = [os.path.abspath(path) for path in itertools.chain(*vars(found)[PATHS])]
    return [*itertools.chain(*folders), *([PATHS, *files] if files else []), *rest]
