"""What the pack relies on of ComfyUI is there in the installed one, and a hole in it would be
noticed.

The first test is the one to run on a new ComfyUI: it names what that has changed.
`host_contract.py` beside this says how.
"""
import ast
import inspect
import operator

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import host_contract
import pytest
from host_contract import (
    MARKS,
    MEMBERS,
    PATCHER,
    POSITIONS,
    SOURCES,
    TAKES_ANY,
    changes,
    used_names,
)
from pack_nodes import hosts_server

from featherweight.ops.patcher import PackedPatcher

USED = used_names()


@pytest.fixture(scope="module", autouse=True)
def server_of_the_host():
    with hosts_server():
        yield


def test_the_installed_host_has_all_that_the_pack_uses():
    assert changes() == {}


def test_what_is_given_by_position_is_listed_with_its_names():
    """So that a host that puts another parameter between them is noticed."""
    for name, calls in USED.items():
        given = [
            sum(not isinstance(value, ast.Starred) for value in call.args) for _, call in calls
            if call
        ]
        # what the patcher overrides has the host's names, see below
        if name.startswith(f"{PATCHER}.") or name in TAKES_ANY:
            continue
        by_position, _, by_name = (words.split()
                                   for words in POSITIONS.get(name, "any").partition("*"))
        assert max(given, default=0) <= len(by_position), (
            f"{name} gets more by position than POSITIONS says"
        )
        keywords = {keyword.arg for _, call in calls if call for keyword in call.keywords} - {None}
        assert name not in POSITIONS or keywords <= {*by_position, *by_name}, (
            f"{name} gets {keywords} by name"
        )


def test_the_lists_have_nothing_that_no_source_uses():
    assert POSITIONS.keys() <= USED.keys() and USED.keys() >= TAKES_ANY
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    words = [
        *(word for members in MEMBERS.values() for word in members),
        *" ".join(MARKS.values()).split()
    ]
    assert not [word for word in words if word not in text]


@pytest.mark.parametrize(
    "host", [comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic]
)
def test_what_the_patcher_overrides_takes_all_that_the_hosts_takes(host):
    for name, method in vars(PackedPatcher).items():
        theirs = getattr(host, name, None)
        if name.startswith("__") or not inspect.isfunction(method) or theirs is None:
            continue
        parameters = inspect.signature(theirs).parameters.values()
        by_name = {parameter.name for parameter in parameters if parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)} - {"self"}
        inspect.signature(method).bind("self", **dict.fromkeys(by_name))
        ours = list(inspect.signature(method).parameters)
        if "args" not in ours:
            shared = [parameter.name for parameter in parameters][:len(ours)]
            assert (
                ours[: len(shared)] == shared
                or (ours[-1] in ("dynamic", "kwargs")
                and ours[:-1] == shared[: len(ours) - 1])
            )


def linear_with_one_more(self, input, output_gate=None):
    raise NotImplementedError


def linear_in_another_order(self, input, residual=None, residual_scale=None, input_act=None):
    raise NotImplementedError


def cast_with_one_more(s, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False,
                       compute_dtype=None, want_requant=False, stream=None):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (comfy.ops.disable_weight_init.Linear, "forward", linear_with_one_more),
        (comfy.ops.disable_weight_init.Linear, "forward", linear_in_another_order),
        (comfy.ops, "cast_bias_weight", cast_with_one_more),
    ],
)
def test_a_call_of_layers_that_has_more_than_is_known_is_noticed(owner, name, other, monkeypatch):
    monkeypatch.setattr(owner, name, other, raising=False)
    prefix = owner.__name__ if inspect.ismodule(owner) else f"comfy.ops.{owner.__qualname__}"
    assert f"{prefix}.{name}" in changes()


def test_the_lists_of_known_parameters_name_what_this_host_has():
    older = {name for name in host_contract.KNOWN if "MoEExperts" in name or "input_act" in name}
    for name in host_contract.KNOWN.keys() - older:
        path = name.removeprefix(host_contract.MIXED)
        owner = comfy.ops.mixed_precision_ops() if path != name else comfy
        path = path.removeprefix("comfy.").removeprefix(".")
        assert operator.attrgetter(path)(owner)


@pytest.mark.parametrize(
    ("module", "name"),
    [(comfy.lora, "load_lora"), (comfy.sd, "VAE"), (comfy.model_patcher, "LowVramPatch")],
)
def test_a_name_that_is_gone_is_noticed_with_the_files_that_use_it(module, name, monkeypatch):
    monkeypatch.delattr(module, name)
    found = changes()
    using = {path.name for path, _ in USED[f"{module.__name__}.{name}"]}
    assert found[f"{module.__name__}.{name}"].startswith("is gone, which ")
    assert using and all(path in found[f"{module.__name__}.{name}"] for path in using)


@pytest.mark.parametrize("name", [f"{PATCHER}.add_patches", "comfy.sd.CLIP.patcher"])
def test_a_method_or_attribute_that_is_gone_is_noticed(name, monkeypatch):
    """A host in whose sources and classes the word does not occur."""
    word, source = name.rpartition(".")[2], host_contract.source
    monkeypatch.setattr(host_contract, "source",
                        lambda module: source(module).replace(word, "renamed"))
    for cls in {
            comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic, comfy.sd.CLIP
    }:
        if word in vars(cls):
            monkeypatch.delattr(cls, word)
    assert changes()[name].startswith("is gone")


def load_clip_without_the_last(ckpt_paths, embedding_directory=None, clip_type=None,
                               model_options={}):  # noqa: B006  as the host has it
    raise NotImplementedError


def load_lora_with_one_between(lora, device=None, to_load=None, log_missing=True):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (comfy.sd, "load_clip", load_clip_without_the_last),
        (comfy.lora, "load_lora", load_lora_with_one_between),
    ],
)
def test_other_parameters_are_noticed(module, name, other, monkeypatch):
    monkeypatch.setattr(module, name, other)
    (found, problem), = changes().items()
    assert found == f"{module.__name__}.{name}" and problem.startswith("takes other parameters (")
