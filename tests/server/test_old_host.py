"""A ComfyUI too old for the pack, or newer than it knows: one sentence, no traceback."""
import subprocess
import sys

import pytest
from aged_host import host_of_version

from devtools import ROOT
from devtools.host.server import PACK, Server, link_or_copy
from featherweight.ops.host_versions import NEWEST_HOST, OLDEST_HOST, UPDATES, VERSION


def test_an_older_host_is_told_what_the_pack_needs(tmp_path):
    with Server(tmp_path / "base", host_of_version(tmp_path / "host", "0.9.12")) as server:
        ours = [
            name for name, node in server.object_info().items() if PACK in node["python_module"]
        ]
        log = server.log()
    assert not ours
    lines = [line for line in log.splitlines() if "[Featherweight]" in line]
    assert (
        len(lines) == 1
        and f"This is ComfyUI 0.9.12 and Featherweight needs {OLDEST_HOST} or newer:"
        " update ComfyUI." in lines[0]
    )
    assert "Traceback" not in log and "IMPORT FAILED" not in log


def test_a_host_so_old_that_it_does_not_say_its_version_is_told_so_too(tmp_path):
    link_or_copy(ROOT, tmp_path / "pack")
    hidden = (f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
              " sys.modules['comfyui_version'] = None; import pack; ")
    found = subprocess.run([sys.executable, "-c", hidden + "print(pack.NODE_CLASS_MAPPINGS)"],
                           capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "{}"
    assert ("This is ComfyUI of an unknown version and Featherweight needs"
            f" {OLDEST_HOST} or newer: update ComfyUI.") in found.stderr


@pytest.mark.parametrize("version", [f"{NEWEST_HOST}.1", "1.0"])
def test_a_host_newer_than_all_tested_ones_is_named_once_in_the_log(version):
    planted = f"import sys, types; sys.path.insert(0, {str(ROOT.parent)!r});" \
              " sys.modules['comfyui_version'] = types.SimpleNamespace(" \
              f"__version__={version!r}); import logging; logging.basicConfig(level=logging.INFO);"
    found = subprocess.run(
        [sys.executable, "-c",
         f"{planted} import importlib; importlib.import_module({ROOT.name!r})"],
        capture_output=True, text=True, check=True)
    lines = [line for line in found.stderr.splitlines() if "[Featherweight]" in line]
    if version.startswith(NEWEST_HOST):
        assert not lines
    else:
        words = (f"ComfyUI {version}.", f"Featherweight {VERSION} was tested on",
                 f"{OLDEST_HOST} to {NEWEST_HOST}.", UPDATES)
        assert len(lines) == 1 and all(word in lines[0] for word in words)
