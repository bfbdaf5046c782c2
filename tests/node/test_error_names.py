"""The exceptions that a node may raise: ComfyUI shows their full name before the message."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import execution
import pytest
from pack_api import WeightFileError
from pack_nodes import node_list

import featherweight
from featherweight.nodes.run_on_ray import GraphError, RayRunError, RunOnRay

node_list()  # imports every module with nodes
PACK = featherweight.__name__


def errors_of_pack() -> list[type[Exception]]:
    """Returns the exceptions that modules of the pack define, but those that they keep to
    themselves, and those of cluster/, which Ray sends by the names of their modules."""
    return sorted({
        value for name, module in list(sys.modules.items())
        if name.startswith(f"{PACK}.") and not name.startswith(f"{PACK}.cluster")
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception)
        and value.__module__.startswith(("featherweight_errors", PACK))
        and not value.__module__.startswith(f"{PACK}.cluster")
        and not value.__name__.startswith("_")
    }, key=lambda error: error.__name__)


@pytest.mark.parametrize("error", errors_of_pack())
def test_an_exception_has_a_short_name_and_pickles_find_it(error):
    assert execution.full_type_name(error) == f"featherweight_errors.{error.__name__}"
    assert pickle.loads(pickle.dumps(error)) is error


def test_all_exceptions_that_name_files_are_among_them():
    names = {error.__name__ for error in errors_of_pack()}
    assert {"WeightFileError", "SaveError", "WriteError", "SensitivityError", "FormatError",
            "TokenizerError", "PlanError", "RayRunError"} <= names


RAISING = """
import comfyui_and_pack, pickle, sys
from pack_api import open_weights
try:
    open_weights(sys.argv[1])
except ValueError as error:
    with open(sys.argv[2], "wb") as file:
        pickle.dump(error, file)
"""


def test_an_exception_of_another_process_is_the_same_here(tmp_path):
    (tmp_path / "empty.gguf").touch()
    subprocess.run(
        [sys.executable, "-c", RAISING, tmp_path / "empty.gguf", tmp_path / "error"], check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")})
    error = pickle.loads((tmp_path / "error").read_bytes())
    assert type(error) is WeightFileError
    assert str(error).startswith("empty.gguf is empty (0 bytes)")


def test_what_run_on_ray_cannot_do_has_a_short_name_too(monkeypatch):
    link = ["1", 0]
    graph = {"1": {"class_type": "FeatherweightRunOnRay", "inputs": {"images": link}}}

    class Prompt:
        def all_node_ids(self):
            return graph.keys()

        def get_node(self, node):
            return graph[node]

    with pytest.raises(RayRunError, match="One Run on Ray is before another") as error:
        monkeypatch.setattr(RunOnRay, "hidden", type("Hidden", (), {"dynprompt": Prompt()}))
        RunOnRay.execute(link, 2)
    assert isinstance(error.value.__cause__, GraphError)
