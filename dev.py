"""Runs what a developer of this pack needs: tests, measurements, the demo.

    python3 dev.py COMMAND [arguments]
"""
import sys

if sys.version_info < (3, 10):
    sys.exit("Failed: dev.py needs Python 3.10 or newer, this is %d.%d." % sys.version_info[:2])

from devtools.commands import COMMANDS
from devtools.host.environment import SetupError

USAGE = """usage: python3 dev.py COMMAND [arguments]

  demo [--prompt TEXT] [--gpu]   render a prompt with a small model in every packing, on the real
                                 ComfyUI server
  serve [--gpu]                  open ComfyUI with that model and its workflows on 127.0.0.1, until
                                 Ctrl-C
  test [pytest ...]              run the linters and every test; with names of files only these,
                                 in seconds
  test --changed [pytest ...]    run the files of tests that are nearest, by imports, to what has
                                 changed since the last commit
  test --heavy [FOLDER ...]      run the tests that take minutes or gigabytes each, a folder on
                                 each core; those that have passed as they are now are left out
  test --windows [pytest ...]    run the tests of files, nodes, formats and the server with Python
                                 and torch for Windows, on Linux in Wine
  lint                           check style (ruff) and types (pyright), and print the change of
                                 lines since the last tag
  bench [arguments]              measure speed and memory side by side
  quality [--packing [--host-types]]
                                 measure what each packing does to the demo's pictures;
                                 --packing: with files packed here; --host-types: in ComfyUI's
                                 own types
  sizes                          count the bytes of popular models in each format, for
                                 docs/choosing.md
  inspect FILE [--reference FILE] [--picture OUT.png]
                                 say what a model file is, what it needs and which memory it fits
  matrix [--host V] [--newest] [pytest ...]
                                 run the server tests on every ComfyUI the pack supports; --host:
                                 on one version, or on the ComfyUI in a folder; --newest: with the
                                 newest versions of ComfyUI's own packages
  gpu [--part 2] [--device cpu]  measure what only a GPU can show, in nine minutes; --part 2: the
                                 rest of it, in nine more; --pack FOLDER: prepare it for a machine
                                 without a package index
  fuzz [--seed N] [--inputs N] [pytest ...]
                                 read bad files and hostile workflows, 500 for each target, by a
                                 seed that is drawn and printed
  soak [--minutes N] [--prompts N]
                                 run the real server for hours with two clients; leaves JSON
  setup                          only make the environment that the others use

Each command first makes what is missing under .dev: a virtual environment and ComfyUI itself,
about 4.5 GB (more where pip chooses a GPU build of torch). To use an existing ComfyUI, set
COMFYUI_PATH to its folder and run dev.py with its Python; if that Python has no torch, the
environment under .dev is used."""


def main(arguments: list[str]) -> int:
    """Runs a command with its arguments. Returns its exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        print(USAGE)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except SetupError as error:
        print(f"Failed: {error}")
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to go on.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
