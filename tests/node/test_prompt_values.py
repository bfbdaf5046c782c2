"""What a prompt in API format may hold in place of an input of any node: each answer is a sentence,
none is Python's."""
import math
import random
import re

import pytest
from comfy_api.latest import io
from pack_api import WeightFileError
from prompt_errors import NODES, prompt_errors

from featherweight.loaders.devices import find_device
from featherweight.nodes.apply_lora import ApplyLora
from featherweight.nodes.inspect_model_file import InspectModelFile
from featherweight.nodes.legacy import multigpu
from featherweight.nodes.load_diffusion_model import size_in_bytes
from featherweight.nodes.measure_sensitivity import MeasureSensitivity

MISSING = object()
VALUES = (MISSING, None, 5, ["a", "b", "c"], {"__value__": ["a"]}, {"a": 1})
# What Python says where a signature or a type does not fit.
PYTHONS = re.compile(
    r"positional argument|keyword argument|expected string|object (is not|has no)|unhashable|must"
    r" be str"
    r"|not supported between|argument of type|TypeError|AttributeError|KeyError")
DEVICES = re.compile(r".*device|store")  # those of other machines are answered when the node runs


def inputs_of(node_id: str) -> dict:
    """A value for each input that the host accepts; files are left open, for there are none
    here."""
    def value(input):
        if not isinstance(input, io.WidgetInput) or getattr(input, "force_input", False):
            return ["give", 0]
        options = getattr(input, "options", None)
        return input.default if input.default is not None else options[0] if options else None
    return {input.id: value(input) for input in NODES[node_id].GET_SCHEMA().inputs}


CASES = [(node_id, name) for node_id in NODES for name in inputs_of(node_id)]


@pytest.mark.parametrize(("node_id", "name"), CASES)
def test_any_value_of_an_input_is_taken_or_answered_in_a_sentence(node_id, name):
    input = next(getattr(input, "input_override", input)
                 for input in NODES[node_id].GET_SCHEMA().inputs if input.id == name)
    for value in VALUES:
        inputs = {**inputs_of(node_id), name: value}
        if value is MISSING:
            del inputs[name]
        errors = prompt_errors(node_id, inputs)
        for error in errors:
            text = f"{error['message']}: {error['details']}"
            assert "exception" not in error["type"] and not PYTHONS.search(
                text.partition(name)[2]
            ), text
        types = {error["type"] for error in errors if error["extra_info"].get("input_name") == name}
        if value is MISSING:
            assert ("required_input_missing" in types) is not input.optional
        elif (
            isinstance(input, io.Combo.Input)
            and value is not None
            and not answered_later(node_id, name)
        ):
            assert types, f"{name}: {value}"


def answered_later(node_id: str, name: str) -> bool:
    """Whether a value is looked at only when the node runs: devices of other machines, a file where
    a model is connected."""
    return DEVICES.fullmatch(name) is not None or node_id == "FeatherweightInspectModelFile"


MODEL_WORDS = [(node_id, input.id) for node_id, node in NODES.items()
             for input in node.GET_SCHEMA().inputs
             if isinstance(input, io.Model.Input | io.Clip.Input)]


@pytest.mark.parametrize(("node_id", "name"), MODEL_WORDS)
def test_a_value_in_place_of_a_model_is_answered_in_a_sentence(node_id, name):
    """The host gives it to the node: it checks no value of such an input."""
    value = random.choice(["model", 5, 0.5, True, ["a", "b", "c"], {"a": 1}])
    with pytest.raises(ValueError, match=f": {name} is .*, expected a (MODEL|CLIP). Connect the"):
        NODES[node_id].execute(**{name: value})


@pytest.mark.parametrize("size", [0, -1, math.nan, math.inf, 1e300])
def test_a_size_that_is_none_is_answered_in_a_sentence(size):
    with pytest.raises(WeightFileError, match="size in GB is .*; expected"):
        size_in_bytes(size)


@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}])
def test_what_is_looked_at_when_a_node_runs_is_answered_in_a_sentence_too(value):
    device, note = find_device(value)
    assert device is None and "There is no device" in note
    with pytest.raises(WeightFileError, match="is not the name of a file. Pick one from the list."):
        InspectModelFile.execute(value)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("virtual_vram_gb", lambda: multigpu.place_part(None, math.nan, ["cpu"], "", [])),
        ("strength_model", lambda: ApplyLora.execute(None, "lora.safetensors", math.nan)),
        ("strength_clip", lambda: ApplyLora.execute(None, "lora.safetensors", 1.0, math.nan)),
        (
            "cfg",
            lambda: MeasureSensitivity.execute(
                [None], [1], [1], [math.nan], [0], ["fast"], ["name"]
            ),
        ),
    ],
)
def test_a_number_that_is_none_is_refused_before_any_work(name, run):
    """The host lets NaN through: it is neither below the least nor above the most."""
    with pytest.raises(ValueError, match=f"{name} is not a number; expected one such as 1."):
        run()


@pytest.mark.parametrize(
    ("name", "strengths"),
    [("strength_model", (math.inf, 1.0)), ("strength_clip", (1.0, -math.inf))]
)
def test_an_infinite_strength_is_refused(name, strengths):
    with pytest.raises(ValueError, match=f"{name} is infinite"):
        ApplyLora.execute(None, "lora.safetensors", *strengths)
