"""ComfyUI's portable version for Windows: laid out from the lane's Python, and drawn in.

Its own Python runs this file in the folder `ComfyUI_windows_portable`. The pack is in custom_nodes;
what README says to install there is installed, run_cpu.bat starts ComfyUI, a GGUF file and a LoRA
are loaded, and the picture is in portable.png.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # behind ComfyUI's: a Python with a ._pth file leaves out what it runs
    sys.path.append(str(ROOT))

from devtools import heavy  # noqa: E402
from devtools.host import server  # noqa: E402

BATS = "windows_nvidia_base_files"  # of ComfyUI's repository, in .ci
# as ComfyUI's release has it
PATHS = "../ComfyUI\npython3{minor}.zip\n.\nimport site\n"
PORT = 8188
START = (r"\.\\python_embeded\\python\.exe -s ComfyUI\\main\.py (--cpu )?"
         "--windows-standalone-build")


def lay_out(folder: Path, python: Path, host: Path):
    """Lays out the folder as ComfyUI's release is, with the pack."""
    shutil.rmtree(folder, ignore_errors=True)
    embedded, minor = folder / "python_embeded", sys.version_info.minor
    shutil.copytree(python, embedded, copy_function=os.link,
                    ignore=shutil.ignore_patterns("DLLs", "Lib"))
    shutil.copytree(python / "DLLs", embedded, copy_function=os.link, dirs_exist_ok=True)
    packages = Path("Lib") / "site-packages"
    shutil.copytree(python / packages, embedded / packages, copy_function=os.link)
    library = shutil.copytree(python / "Lib", folder / "library", copy_function=os.link,
                              ignore=shutil.ignore_patterns("site-packages", "__pycache__"))
    shutil.make_archive(str(embedded / f"python3{minor}"), "zip", library)
    shutil.rmtree(library)
    (embedded / f"python3{minor}._pth").write_text(PATHS.format(minor=minor))
    shutil.copytree(host, folder / "ComfyUI",
                    ignore=shutil.ignore_patterns(".git", "__pycache__"))
    for bat in (host / ".ci" / BATS).glob("*.bat"):
        shutil.copy(bat, folder)
    shutil.copytree(ROOT, folder / "ComfyUI" / "custom_nodes" / server.PACK,
                    ignore=server.NOT_COPIED)


class Portable(server.Server):
    """The ComfyUI that run_cpu.bat starts."""

    def _plant_custom_nodes(self):
        """The pack is there."""

    def _start(self) -> server.Server:
        self.port, self.url = PORT, f"http://127.0.0.1:{PORT}"
        # a console takes all letters, a file in its place only with this encoding
        return self._run(["cmd", "/c", "run_cpu.bat"], cwd=self.base.parent,
                         env={**os.environ, "PYTHONIOENCODING": "utf-8"})

    def __exit__(self, *_):
        assert self.process is not None
        heavy.end(self.process.pid)  # cmd and what it runs
        self.process.wait()


def commands_of_readme() -> list[str]:
    """Returns README's commands for the portable version: one that clones, one that installs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("**Portable Windows**")[2]
    return readme.split("```")[1].strip().splitlines()


def other_starts(folder: Path) -> list[str]:
    """Returns the names of the files in a folder that start ComfyUI in another way."""
    return [bat.name for bat in folder.glob("run_*.bat")
            if not re.search(START, bat.read_text(encoding="utf-8"))]


def main() -> int:
    """Returns 0 if the pack was installed, started, and has drawn."""
    from devtools import demo
    from devtools.files import demo_files

    folder = Path.cwd()
    subprocess.run(commands_of_readme()[1], shell=True, check=True)
    if names := other_starts(folder):
        raise SystemExit(f"{', '.join(names)}: ComfyUI is not started as it was.")
    demo_files.make_models(folder / "ComfyUI", ["Q8_0"])
    with Portable(folder / "ComfyUI") as running:
        run, _ = demo.run_workflow(running, workflow=demo.LORA_WORKFLOW)
        picture = running.image(run.pictures[0])
        deviation = running.pixels(run).std()
        lines = [line for line in running.log().splitlines() if "Packed weights on" in line]
    (folder / "portable.png").write_bytes(picture)
    print("\n".join([*lines, f"{len(picture)} bytes of a picture, deviation {deviation:.1f}"]))
    return 0 if deviation > 10 else 1


if __name__ == "__main__":
    sys.exit(main())
