"""This machine's running ComfyUI as workers on it are to be started: the same models, node packs and settings."""
import argparse
import itertools
import os
import shlex
from collections.abc import Sequence

# What is the server's own, or what a worker has of its own. Name -> the number of its values, as argparse says it.
NOT_FOR_WORKERS = {
    "--listen": "?", "--port": 1, "--tls-keyfile": 1, "--tls-certfile": 1, "--enable-cors-header": "?", "--max-upload-size": 1,
    "--output-directory": 1, "--temp-directory": 1, "--database-url": 1, "--cuda-device": 1, "--default-device": 1,
    "--front-end-version": 1, "--front-end-root": 1, "--verbose": "*", "--preview-method": 1,
    **dict.fromkeys((
        "--auto-launch", "--disable-auto-launch", "--windows-standalone-build", "--enable-manager", "--disable-manager-ui",
        "--enable-manager-legacy-ui", "--enable-compress-response-body", "--log-stdout", "--dont-print-server",
        "--quick-test-for-ci", "--multi-user", "--enable-assets", "--disable-api-nodes"), 0),
}
FOLDERS = ("--base-directory", "--input-directory", "--user-directory", "--models-directory")
PATHS = "--extra-model-paths-config"


def environment(comfyui: str, arguments: Sequence[str]) -> dict[str, str]:
    """Variables that workers on this machine read (`machines/place.py`).

    comfyui: the folder of the ComfyUI that runs. arguments: what stands behind its main.py.
    """
    return {"COMFYUI_PATH": os.path.abspath(comfyui), "COMFYUI_ARGUMENTS": shlex.join(for_workers(arguments))}


def for_workers(arguments: Sequence[str]) -> list[str]:
    """Arguments of a ComfyUI without those of its server, and with folders that mean the same from elsewhere."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, values in NOT_FOR_WORKERS.items():
        parser.add_argument(name, **({"action": "store_true"} if values == 0 else {"nargs": values}))
    for name in FOLDERS:
        parser.add_argument(name, dest=name)
    parser.add_argument(PATHS, dest=PATHS, nargs="+", action="append", default=[])
    found, rest = parser.parse_known_args(arguments)
    folders = [[name, os.path.abspath(vars(found)[name])] for name in FOLDERS if vars(found)[name]]
    files = [os.path.abspath(path) for path in itertools.chain(*vars(found)[PATHS])]
    return [*itertools.chain(*folders), *([PATHS, *files] if files else []), *rest]
