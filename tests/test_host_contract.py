"""The list of what the pack relies on of ComfyUI: it is whole, the installed host satisfies it, and a hole turns off little."""
import ast
import importlib
import inspect
import sys

import comfy.lora
import comfy.model_patcher
import comfy.sd
import pytest
from featherweight import host_contract
from featherweight.host_contract import MARKS, MEMBERS, NAMES, ROOT, WITHOUT
from featherweight.ops.patcher import PackedPatcher
from pack_nodes import hosts_server, node_list

SOURCES = [path for layer in ("nodes", "machines", "loaders", "ops") for path in sorted((ROOT / layer).rglob("*.py"))]
EVERY_NODE = {path.stem for path in host_contract.node_files()}
PATCHER_PARTS = [part for part in PackedPatcher.__mro__ if part.__module__.startswith(PackedPatcher.__module__)]
PATCHER_MEMBERS = {name: None for where, members in MEMBERS.items() if where.startswith("ops/patcher/") for name in members}
LORA_NODES = {"apply_lora", "check_lora"}
MULTIGPU = {"legacy_multigpu", "legacy_multigpu_checkpoint", "legacy_multigpu_distorch", "legacy_multigpu_distorch2"}
CHECKPOINT_NODES = {"load_checkpoint", "legacy_nf4", "legacy_sp", *MULTIGPU}
ENCODER_NODES = {"load_text_encoder", "legacy_calcuis", "legacy_gguf_clip", *CHECKPOINT_NODES}


def each_source():
    return pytest.mark.parametrize("path", [ROOT / "__init__.py", *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module", autouse=True)
def modules_of_the_list():
    """So that none is passed over for not being imported."""
    with hosts_server():
        for name in {*NAMES, *(name for members in MEMBERS.values() for name in members)}:
            parts = name.split(".")
            for end in range(1, len(parts)):
                try:
                    importlib.import_module(".".join(parts[:end]))
                except ModuleNotFoundError:
                    break
        yield


@each_source()
def test_the_list_has_every_name_of_the_host_that_a_source_uses(path):
    used = host_contract.used_names(path)
    assert used.keys() <= NAMES.keys()
    for name, calls in used.items():
        if NAMES[name] is None:
            continue
        by_position, _, by_name = (words.split() for words in NAMES[name].partition("*"))
        for call in calls:
            if name != "comfy_api.latest.io.NodeOutput":  # takes any number
                given = [value for value in call.args if not isinstance(value, ast.Starred)]
                assert len(given) <= len(by_position), f"{name} gets more by position than the list says"
            given = {keyword.arg for keyword in call.keywords} - {None}
            assert given <= {*by_position, *by_name}, f"{name} gets {given} by name"


def test_the_list_has_nothing_that_no_source_uses():
    used = set().union(*(host_contract.used_names(path) for path in [ROOT / "__init__.py", *SOURCES]))
    assert NAMES.keys() == used
    assert WITHOUT.keys() <= NAMES.keys()
    words = {where: {name.rpartition(".")[2] for name in members} for where, members in MEMBERS.items()}
    for where, marks in MARKS.items():
        words.setdefault(where, set()).update(*(text.split() for text in marks.values()))
    unused = {where: {word for word in found if word not in (ROOT / where).read_text(encoding="utf-8")}
              for where, found in words.items()}
    assert not any(unused.values()), unused


def test_the_list_has_what_the_patcher_takes_from_the_hosts():
    """Methods it calls with super(), and attributes of itself that it does not define."""
    listed = {name.rpartition(".")[2] for name in PATCHER_MEMBERS}
    own = set().union(*map(vars, PATCHER_PARTS))
    nodes = [node for part in PATCHER_PARTS for node in ast.walk(ast.parse(inspect.getsource(part)))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and (
        isinstance(node.value, ast.Name) and node.value.id == "self"
        or isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()")}
    overridden = {name for name in own if hasattr(comfy.model_patcher.ModelPatcherDynamic, name) and not name.startswith("__")}
    assert (used - own) | overridden <= listed


@pytest.mark.parametrize("host", [comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic])
def test_what_the_patcher_overrides_takes_all_that_the_hosts_takes(host):
    for name, method in {name: method for part in PATCHER_PARTS for name, method in vars(part).items()}.items():
        theirs = getattr(host, name, None)
        if name.startswith("__") or not inspect.isfunction(method) or theirs is None:
            continue
        parameters = inspect.signature(theirs).parameters.values()
        by_name = {parameter.name for parameter in parameters if parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)} - {"self"}
        inspect.signature(method).bind("self", **dict.fromkeys(by_name))
        ours = [parameter for parameter in inspect.signature(method).parameters]
        if "args" not in ours:
            shared = [parameter.name for parameter in parameters][:len(ours)]
            assert ours[:len(shared)] == shared or ours[-1] in ("dynamic", "kwargs") and ours[:-1] == shared[:len(ours) - 1]


def test_what_goes_without_a_name_is_said_in_words():
    assert all(name in NAMES and words[0].isalnum() and " " in words for name, words in WITHOUT.items())


def test_the_installed_host_satisfies_the_list():
    assert host_contract.changes(strict=True) == {}


def test_the_look_which_every_start_waits_for_imports_nothing():
    before = set(sys.modules)
    host_contract.changes()
    assert set(sys.modules) == before


def test_a_module_that_is_not_imported_is_looked_for_as_a_file(monkeypatch):
    monkeypatch.delitem(sys.modules, "comfy.lora_convert")
    monkeypatch.delattr(sys.modules["comfy"], "lora_convert")
    assert host_contract.changes() == {}
    assert "comfy.lora_convert" not in sys.modules
    monkeypatch.setitem(host_contract.NAMES, "comfy.no_such_module.name", None)
    assert host_contract.changes() == {"comfy.no_such_module.name": "is gone"}


def without(monkeypatch, name: str):
    module, attributes = host_contract._module_of(name)
    for attribute in attributes[:-1]:
        module = getattr(module, attribute)
    monkeypatch.delattr(module, attributes[-1])


@pytest.mark.parametrize("name, gone", [
    ("comfy.lora_convert.convert_lora", LORA_NODES),
    ("comfy.text_encoders.lt.sd_detect", ENCODER_NODES),
    ("comfy.sd.load_checkpoint_guess_config", CHECKPOINT_NODES),
    ("comfy_kitchen.tensor.register_layout_class", EVERY_NODE),
    ("folder_paths.get_filename_list", EVERY_NODE),
    ("comfy_execution.utils.get_executing_context", set()),
    ("comfy.ops.pick_operations", set()),
])
def test_a_name_that_is_gone_turns_off_what_needs_it(name, gone, monkeypatch):
    without(monkeypatch, name)
    changed = host_contract.changes()
    assert changed == {name: "is gone"}
    assert host_contract.left_out(changed).keys() == gone
    sentence, = host_contract.sentences(changed, "9.9.9")
    assert sentence.startswith("ComfyUI 9.9.9 has not all") and f"{name} is gone" in sentence
    assert WITHOUT.get(name, "nodes are left out") in sentence
    for path in host_contract.node_files():
        assert all((f" {title}" in sentence) == (path.stem in gone) for title in host_contract.titles(path))


@pytest.mark.parametrize("name", [
    *(name for name in PATCHER_MEMBERS if "ModelPatcher" in name), "comfy.sd.CLIP.patcher", "comfy.sd.CLIP.clone"])
def test_a_method_or_attribute_that_is_gone_is_noticed(name, monkeypatch):
    """A host in whose sources and classes the word does not occur."""
    word = name.rpartition(".")[2]
    source = host_contract._source
    monkeypatch.setattr(host_contract, "_source", lambda module: source(module).replace(word, "renamed"))
    monkeypatch.setattr(host_contract._source, "cache_clear", source.cache_clear, raising=False)
    for cls in {comfy.model_patcher.ModelPatcher, comfy.model_patcher.ModelPatcherDynamic, comfy.sd.CLIP}:
        if word in vars(cls):
            monkeypatch.delattr(cls, word)
    assert host_contract.changes()[name] == "is gone"


def load_clip_without_the_last(ckpt_paths, embedding_directory=None, clip_type=None, model_options={}):
    raise NotImplementedError


def load_lora_with_one_more(lora, to_load, device, log_missing=True):
    raise NotImplementedError


@pytest.mark.parametrize("module, name, other", [
    (comfy.sd, "load_clip", load_clip_without_the_last), (comfy.lora, "load_lora", load_lora_with_one_more)])
def test_other_parameters_are_noticed(module, name, other, monkeypatch):
    monkeypatch.setattr(module, name, other)
    (found, problem), = host_contract.changes().items()
    assert found == f"{module.__name__}.{name}" and problem.startswith("takes other parameters (")


def test_functions_that_other_packs_put_there_are_taken(monkeypatch):
    """They call their parameters what they like, or take any."""
    monkeypatch.setattr(comfy.lora, "load_lora", lambda state_dict, keys, log_missing=True: {})
    monkeypatch.setattr(comfy.sd, "load_clip", lambda *args, **kwargs: None)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load",
                        lambda self, device_to, extra_memory=0, full_load=False, force_patch_weights=False: 0)
    assert host_contract.changes() == {}


def test_nodes_that_need_what_is_gone_are_left_out_and_the_others_are_there(monkeypatch, caplog):
    everything = {node.GET_SCHEMA().node_id for node in node_list()}
    without(monkeypatch, "comfy.lora_convert.convert_lora")
    found = {node.GET_SCHEMA().node_id for node in node_list()}
    assert everything - found == {"FeatherweightApplyLora", "FeatherweightCheckLora"}
    assert not caplog.records


def test_to_tell_who_needs_what_is_gone_each_source_is_read_at_most_three_times(monkeypatch):
    host_contract.needs.cache_clear()
    host_contract._imported.cache_clear()
    parse, read = ast.parse, []
    monkeypatch.setattr(ast, "parse", lambda *given, **options: read.append(1) or parse(*given, **options))
    assert host_contract.left_out({"comfy.lora_convert.convert_lora": "is gone"}).keys() == LORA_NODES
    assert len(read) <= 3 * len(list(ROOT.glob("[!.]*/**/*.py")))
    read.clear()
    host_contract.left_out({"comfy.lora_convert.convert_lora": "is gone"})
    assert len(read) <= len(list((ROOT / "nodes").glob("*.py")))
