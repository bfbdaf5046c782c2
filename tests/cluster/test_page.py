"""The commands, messages and figures in docs/machines.md are those of the code and of Ray."""
import re

import pytest

from devtools import ROOT
from featherweight.cluster.comfyui_install import installed_versions
from featherweight.cluster.preflight import MachineReport, report

PAGE = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")


def test_the_sentences_of_a_look_are_those_of_the_code():
    attic = MachineReport("attic", {}, problems=[
        "has no file 'flux1-dev-Q4_K_S.gguf' (1.model_name) in the folders of its ComfyUI."])
    sentences = report([MachineReport("desk", {}), attic]).partition("\n\n")[2]
    assert f"\n{sentences}\n" in PAGE


def test_ray_has_the_commands_and_options_that_the_page_gives():
    pytest.importorskip("ray")
    from ray.scripts import scripts

    options = {
        name for command in (scripts.start, scripts.get_auth_token) for option in command.params
        for name in option.opts
    }
    ours = set(re.findall(r"^\| `(--[\w-]+)", PAGE, re.M)) | {"--check", "--shard"}
    named = set(re.findall(r"`(?:[^`]* )?(--[a-z][\w-]+)", PAGE)) | set(
        re.findall(r"ray start.*?(--[\w-]+)", PAGE)
    )
    assert len(named & options) >= 10
    assert named - options - ours == set()


def test_the_page_has_a_row_for_each_option_of_the_command():
    source = (ROOT / "batch.py").read_text(encoding="utf-8")
    # without an option that only prints that it is gone
    options = set(re.findall(r'"(--[\w-]+)"', source)) - {"--fetch-models"}
    assert set(re.findall(r"^\| `(--[\w-]+)", PAGE, re.M)) & options == options


def test_what_must_be_alike_is_what_is_compared(tmp_path):
    assert "A machine with another ComfyUI, torch or Featherweight than most machines" in PAGE
    assert set(installed_versions(str(tmp_path))) == {"ComfyUI", "torch", "Featherweight"}
