"""Nodes of other packs that somebody has cloned into .dev/packs do to a packed model what they do
to a dense one."""
import json
import re
import subprocess
import sys
from pathlib import Path

import other_packs
import pytest
from cloned_packs import cloned

from devtools import ROOT

SCRIPT = Path(other_packs.__file__)
# Packs that ComfyUI 0.30 cannot load, and what it says.
TOO_OLD = {"ComfyUI-TeaCache": "precompute_freqs_cis", "ComfyUI-NAG": "NoneType"}


def results(name: str) -> list[dict]:
    """What `other_packs.py` prints of a pack."""
    run = subprocess.run([sys.executable, str(SCRIPT), str(cloned(name))],
                         capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if missing := re.search(r"No module named '(\w+)'", lines[0].get("log", "")):
        pytest.skip(f"{name} needs the package {missing[1]}")
    return lines


@pytest.mark.heavy
@pytest.mark.parametrize("name", other_packs.CASES)
def test_a_node_of_another_pack_does_to_a_packed_model_what_it_does_to_a_dense_one(name):
    found = results(name)
    assert len(found) >= max(1, len(other_packs.CASES[name]))
    for each in found:
        assert each["error"] < each.get("limit", 1e-5), each
        assert each["effect"] is None or (each["effect"] > 1e-5) == each["has_effect"], each


@pytest.mark.heavy
@pytest.mark.parametrize("name", TOO_OLD)
def test_packs_that_are_too_old_for_this_comfyui_are_not_loaded_by_it(name):
    found, = results(name)
    assert TOO_OLD[name] in found["log"]


def test_packs_that_the_compatibility_page_names_are_run():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    section = page.split("\n## Other packs\n")[1].split("\n## ")[0]
    named = re.sub(r"\(.*?\)|\.", "", section.split("\n\n")[1], flags=re.DOTALL).replace("\n", " ")
    on_the_server = (ROOT / "tests/server/test_coexistence.py").read_text(encoding="utf-8")
    others = {name.strip() for name in named.split(",")} - other_packs.CASES.keys()
    assert others == {"rgthree-comfy"} and "ComfyUI-GGUF" in section and not [
        name for name in {*others, "ComfyUI-MultiGPU"} if f'"{name}"' not in on_the_server]
    assert not [name for name in other_packs.CASES if name not in section]
    assert f"{len(other_packs.CASES['ComfyUI-KJNodes'])} nodes" in section
    assert not [name for name in TOO_OLD if name not in section]
