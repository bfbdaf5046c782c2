"""The commands, messages and figures in docs/machines.md are those of the code and of Ray."""
import re

import pytest

from devtools import ROOT
from featherweight.cluster.comfyui_install import installed_versions
from featherweight.cluster.preflight import MachineReport, report

PAGE = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
GPUS, PROMPTS, SECONDS, SHARE, MODEL = 1000, 10**6, 10, 0.94, 6.8e9


def cell(start: str) -> str:
    """Returns the second cell of a table's row, given the start of the first."""
    row, = re.findall(rf"^\| {re.escape(start)}[^|]*\| ([^|]+) \|", PAGE, re.M)
    return row


def test_the_sentences_of_a_look_are_those_of_the_code():
    attic = MachineReport("attic", {}, problems=[
        "has no file 'flux1-dev-Q4_K_S.gguf' (1.model_name) in the folders of its ComfyUI."])
    sentences = report([MachineReport("desk", {}), attic]).partition("\n\n")[2]
    assert f"\n{sentences}\n" in PAGE


def test_what_it_costs_follows_from_its_formula():
    assert "T = boot + file / bandwidth + N · t / (W · e)" in PAGE
    drawing = PROMPTS * SECONDS / GPUS
    assert cell("drawing") == f"{drawing / SHARE / 3600:.1f} h ({drawing / 3600:.1f} h at e = 1)"
    assert cell("work").startswith(
        f"{PROMPTS * SECONDS / SHARE / 3600:.0f}".replace("2955", "2 955") + " GPU hours")
    assert cell("boots of").startswith(f"{GPUS * 10 / 3600:.1f} GPU hours")
    assert cell("a 6.8 GB model to one") == f"{MODEL * 8 / 1e9:.0f} s"
    assert cell("the same to 1 000 machines").startswith(f"{GPUS * MODEL * 8 / 10e9 / 3600:.1f} h")


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
    comfyui = {"--lowvram", "--base-directory", "--cpu", "--extra-model-paths-config"}
    hugging_face = {"--local-dir"}
    assert len(named & options) >= 14
    assert named - options - ours - comfyui - hugging_face == set()


def test_the_page_has_a_row_for_each_option_of_the_command():
    source = (ROOT / "batch.py").read_text(encoding="utf-8")
    # without an option that only prints that it is gone
    options = set(re.findall(r'"(--[\w-]+)"', source)) - {"--fetch-models"}
    assert set(re.findall(r"^\| `(--[\w-]+)", PAGE, re.M)) & options == options


def test_the_page_has_the_variables():
    source = "".join((ROOT / "cluster" / name).read_text(encoding="utf-8")
                     for name in ("comfyui_install.py", "worker.py"))
    for variable in ("COMFYUI_PATH", "COMFYUI_ARGUMENTS", "FEATHERWEIGHT_MACHINE"):
        assert f"`{variable}`" in PAGE and variable in source


def test_what_must_be_alike_is_what_is_compared(tmp_path):
    assert "A machine with another ComfyUI, torch or Featherweight than most machines" in PAGE
    assert set(installed_versions(str(tmp_path))) == {"ComfyUI", "torch", "Featherweight"}
