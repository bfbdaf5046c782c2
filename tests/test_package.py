"""What the registry gets: `comfy node pack` takes the files that git tracks, but for those that
.comfyignore names."""
import re
import shutil
import subprocess
import zlib

import pytest
from PIL import Image

from devtools import ROOT
from devtools.host.package import packed_files
from featherweight.ops import host_versions

tomllib = pytest.importorskip("tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"),
                                   reason="needs git and its checkout")


FOLDERS = {"nodes", "cluster", "loaders", "ops", "locales", "example_workflows", "subgraphs"}
FILES = {
    "__init__.py", "child_process.py", "batch.py", "pack.py", "pyproject.toml", "requirements.txt",
    "LICENSE", "README.md", "CHANGELOG.md", "node_list.json",
    "llms.txt"
}


def tracked(*paths: str) -> set[str]:
    return set(
        subprocess.run(
            ["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
    ) - {""}


@in_a_checkout
def test_the_package_holds_all_that_the_pack_is_made_of():
    needed = tracked(*FOLDERS) | FILES
    assert needed <= set(packed_files())
    assert {
        "ops/kernels/source/weight.h",
        "nodes/web/docs/FeatherweightLoadDiffusionModel/ja.md",
    } <= needed


@in_a_checkout
def test_the_package_holds_nothing_of_the_developers():
    assert {path.partition("/")[0] for path in packed_files()} == FOLDERS | {"docs"} | FILES
    suffixes = (".gguf", ".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz")
    assert not [path for path in packed_files() if path.endswith(suffixes)]
    # which a host with a list of allowed packs refuses
    assert not [path for path in packed_files()
                if path.endswith((".pyc", ".pyo")) or (ROOT / path).is_symlink()]
    assert sum((ROOT / path).stat().st_size for path in packed_files()) < 4_800_000
    assert "takes less than 5 MB" in README


@in_a_checkout
def test_a_clone_of_the_last_commit_takes_what_readme_says():
    """The files, and each as Git keeps it."""
    files = [(ROOT / path).read_bytes() for path in tracked() if (ROOT / path).is_file()]
    megabytes = sum(len(data) + len(zlib.compress(data)) for data in files) / 1e6
    assert abs(int(re.search(r"by Git with its tests (\d+) MB", README)[1]) - megabytes) < 5
    assert README.count("git clone --depth 1 --filter=blob:none ") == 2  # for those who use it
    large = {path for path in tracked() if (ROOT / path).stat().st_size > 300_000}
    assert {path.partition("/")[0] for path in large} == {"demo_model"}


def test_the_version_is_semantic_and_heads_the_changelog():
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", version)
    assert (
        re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
        == version
        == host_versions.VERSION
    )


def test_readme_project_file_and_pack_name_the_same_oldest_comfyui():
    oldest = PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert re.findall(r"ComfyUI (\d+\.\d+\.\d+)\s+or\s+newer", README) == [oldest]
    assert oldest == host_versions.OLDEST_HOST


def test_icon_and_banner_have_the_shapes_that_the_registry_shows():
    with Image.open(ROOT / "media" / "icon.png") as icon:
        assert icon.format == "PNG" and icon.width == icon.height <= 400
    with Image.open(ROOT / "media" / "banner.png") as banner:
        assert banner.format == "PNG" and banner.width * 9 == banner.height * 21


def test_addresses_are_those_of_one_repository():
    repository = PROJECT["project"]["urls"]["Repository"]
    assert f"git clone --depth 1 --filter=blob:none {repository}\n" in README
    assert all(address.startswith(repository) for address in PROJECT["project"]["urls"].values())
    raw = repository.replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"
    for key in ("Icon", "Banner"):
        address = PROJECT["tool"]["comfy"][key]
        assert address.startswith(raw) and (ROOT / address.removeprefix(raw)).is_file()
