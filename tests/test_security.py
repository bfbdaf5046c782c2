"""What tests/security.md promises and no other test holds."""
import ast
import functools
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import folder_paths
import pytest
import torch
from pack_api import WeightFileError, open_weights
from safetensors.torch import save, save_file

from devtools import ROOT
from featherweight.loaders.encoders.saved_tokenizer import saved_tokenizer
from featherweight.loaders.files.diffusers_folder import is_bare
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.models.checkpoint import _clip_type
from featherweight.loaders.paths import folders
from featherweight.nodes.inspect_model_file import InspectModelFile
from featherweight.ops.bounded_json import read_json

PROMISES = ROOT / "tests" / "security.md"
ROOMS = ("nodes", "cluster", "loaders", "ops")
SOURCES = [*(ROOT / name for name in ("__init__.py", "child_process.py", "batch.py", "pack.py")),
           *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
RUNNING = {"eval", "exec", "compile", "__import__"}
UNPICKLING = {"dill", "cloudpickle", "marshal", "shelve", "joblib"}
NETWORK = {
    "socket", "socketserver", "urllib", "http", "requests", "aiohttp", "httpx", "ftplib", "smtplib",
    "ssl", "xmlrpc", "websocket", "websockets", "huggingface_hub"
}
# the last of them asks a compiler
STARTING = {"subprocess", "multiprocessing", "pty", "webbrowser", "ctypes.util"}
CALLS = (r"pickle\.(loads?|Unpickler)|(\w+\.)*(import_module|exec_module)"
         r"|os\.(system|popen|startfile|fork\w*|exec[lv]\w*|spawn\w*|posix_spawn\w*)"
         r"|platform\.(processor|platform|architecture)"  # they start `uname` and `file`
         r"|asyncio\.create_subprocess_\w+|(concurrent\.)?(futures\.)?ProcessPoolExecutor")
# What a source imports all the same, and why.
MAY_IMPORT = {
    ("child_process.py", "subprocess"): "starts all that this pack starts",
    ("ops/kernels/checker.py", "subprocess"): "constants, and the name of an error",
    ("cluster/batch_child.py", "subprocess"): "constants",
    ("nodes/help_pages.py", "aiohttp"): "answers the editor through ComfyUI's server",
    ("cluster/ray_connection.py", "socket"): "asks whether anything listens at the address that"
                                             " the owner named",
    ("cluster/picture_store.py", "urllib"): "makes a path of file:///, and connects to nothing"
}
# The owner's commands, whose processes are no ComfyUI: Ray reads its settings from the environment
# when it is imported.
MAY_SET_VARIABLES = {"batch.py", "cluster/batch_run.py"}

links = pytest.mark.skipif(os.name == "nt", reason="links take rights there")


def breaches(source: ast.Module, where: str = "nodes/x.py") -> list[str]:
    """What a source does that none may: lines of it."""
    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            unwanted = {name.split(".")[0] for name in names} & (UNPICKLING | NETWORK) | {
                *names
            } & STARTING
            unwanted |= {*names} & {"os.environ", "os.putenv", "importlib.import_module"}
            unwanted |= {name for name in names if re.fullmatch(CALLS, name)}
            found += [
                f"imports {name}" for name in sorted(unwanted) if (where, name) not in MAY_IMPORT
            ]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (called in RUNNING or re.fullmatch(CALLS, called)
                    or (called == "torch.load" and given.get("weights_only") != "True")
                    or (called.endswith("load_torch_file") and given.get("safe_load") != "True")):
                found.append(ast.unparse(node))
            if re.fullmatch(
                    r"os\.(putenv|unsetenv)|os\.environb?\.(update|setdefault|pop|popitem|clear|__\w+__)",
                    called):
                found += [ast.unparse(node)] * (where not in MAY_SET_VARIABLES)
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found += [ast.unparse(node)] * (
                ast.unparse(node.value) in ("os.environ", "os.environb")
            )
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target).startswith("os.environ"):
            found.append(ast.unparse(node))
    return found


@functools.cache
def parsed() -> dict[str, ast.Module]:
    """Returns the pack's sources by their paths in it."""
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in SOURCES}


def test_no_source_evaluates_unpickles_or_talks_to_a_network():
    found = {where: breaches(tree, where) for where, tree in parsed().items()}
    assert {where: lines for where, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import socket",
        "from urllib import request",
        "import urllib.request",
        "import subprocess",
        "from subprocess import Popen",
        "import os\nos.system('x')",
        "os.execv('x', [])",
        "os.posix_spawn('x', [], {})",
        "pickle.loads(b'')",
        "from pickle import loads",
        "import cloudpickle",
        "importlib.import_module('x')",
        "from importlib import import_module",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "load_torch_file('x', safe_load=False)",
        "os.environ['X'] = '1'",
        "del os.environ['X']",
        "os.environ.update(X='1')",
        "os.environ.setdefault('X', '1')",
        "os.putenv('X', '1')",
        "os.environ |= {'X': '1'}",
        "from os import environ",
        "from ctypes.util import find_library",
        "platform.processor()",
    ],
)
def test_what_no_source_may_do_is_seen(text):
    assert breaches(ast.parse(text))


def test_each_exception_of_that_is_still_needed():
    imported = {
        (where, name) for where, tree in parsed().items() for node in ast.walk(tree)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
        for name in {name, name.split(".")[0]}
    }
    assert MAY_IMPORT.keys() <= imported


def starters() -> set[str]:
    """`file::function` of each function that has a program started, by `child_process` or by
    Ray."""
    found = set()
    for where, tree in parsed().items():
        for scope in ast.walk(tree):
            if (isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
                    and where != "child_process.py"
                    and any(is_start(node) for node in ast.walk(scope))):
                found.add(f"{where}::{scope.name}")
    return found


def is_start(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("run_process", "start_process", "ray.init")
    return (isinstance(node, ast.Name | ast.Attribute) and getattr(node, "attr", "") == "remote"
            and ast.unparse(node) == "ray.remote")


PROGRAMS = re.compile(r"(?<=\n)## Programs\n.*?(?=\n## )", re.S)


def test_every_program_that_is_started_stands_in_the_table_of_programs():
    section = PROGRAMS.search(PROMISES.read_text(encoding="utf-8"))[0]
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\| .*\|$", section, re.M)]
    head, *rows = [[cell.strip() for cell in row] for row in rows]
    assert head == ["program", "asked for by", "when", "arguments", "where they come from"]
    assert all(all(row) and len(row) == len(head) for row in rows)
    named = [name for row in rows for name in re.findall(r"`([\w/]+\.py::\w+)`", row[1])]
    found = starters()
    assert found and {*named} == found and len(named) == len({*named})


def test_no_script_of_the_editor_writes_html():
    scripts = sorted((ROOT / "nodes" / "web").rglob("*.js"))
    assert scripts
    for path in scripts:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|v-html",
            path.read_text(),
        )


class Program:
    """What makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))]
)
def test_a_program_in_a_torch_file_is_not_run(tmp_path, write):
    write(Program(tmp_path / "ran"), tmp_path / "lora.pt")
    with pytest.raises(
            WeightFileError,
            match="lora.pt .* could be a program and is not run. Get it as safetensors") as error:
        load_lora_file(str(tmp_path / "lora.pt"))
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(error.value)


def test_a_torch_file_that_grows_when_it_is_read_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    with pytest.raises(WeightFileError, match="bomb.pt .* compressed"):
        load_lora_file(str(tmp_path / "bomb.pt"))
    name = "diffusion_model.double_blocks.0.img_attn.proj.lora_{}.weight"
    torch.save(
        {
            name.format("A"): torch.ones(1).expand(1 << 20, 1 << 10),
            name.format("B"): torch.ones(4, 1)
        }, tmp_path / "wide.pt")
    with pytest.raises(WeightFileError, match="wide.pt .* larger than its data in the file"):
        load_lora_file(str(tmp_path / "wide.pt"))


def test_an_empty_lora_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"")
    with pytest.raises(WeightFileError, match="lora.safetensors is empty"):
        load_lora_file(str(tmp_path / "lora.safetensors"))


def test_json_is_read_within_bounds():
    dense = {
        f"t{number}": {"dtype": "U8", "shape": [], "data_offsets": [number, number + 1]}
        for number in range(2000)
    }
    text = str(dense).replace("'", '"').replace(" ", "")
    assert read_json(text) == dense == read_json(text.encode())
    for bomb in ("[" + "[]," * 9000 + "1]", '{"a":' * 9000, "[" * 90000,
                 "9" * 5000 if hasattr(io, "text_encoding") else "["):
        with pytest.raises(ValueError):  # noqa: PT011  Python's own, in each version another
            read_json(bomb)


def test_a_size_beyond_32_bits_is_not_one_of_its_lower_half(tmp_path):
    header = b'{"a":{"dtype":"U8","shape":[65536,65537],"data_offsets":[0,65536]}}'
    (tmp_path /
     "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(65536))
    with pytest.raises(WeightFileError,
                       match="takes 4295032832 bytes, but its data_offsets span 65536"):
        open_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/a.safetensors",
        "x/a.safetensors",
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "C:a.safetensors",
        "\\\\server\\share\\a.safetensors",
        "//server/share/a.safetensors",
    ],
)
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    assert not is_bare(name) and is_bare("a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.safetensors.index.json").write_text(
        str({"weight_map": {"x": name}}).replace("'", '"'))
    with pytest.raises(WeightFileError, match="has no weight_map of tensors to .safetensors files"):
        open_weights(tmp_path)


@links
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "m.safetensors.index.json", "shard.safetensors"]
)
def test_a_link_in_a_models_folder_leads_out_of_it_nowhere(tmp_path, name):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    files = {
        "config.json": b"{}",
        "m.safetensors.index.json": b'{"weight_map": {"x": "shard.safetensors"}}',
        "shard.safetensors": save({"x": torch.ones(1)})
    }
    if name == "model.safetensors":
        files = {"config.json": b"{}", name: files["shard.safetensors"]}
    outside.write_bytes(files.pop(name))
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / name).symlink_to(outside)
    with pytest.raises(WeightFileError,
                       match=f"its '{name}' is a link to .*outside.*Put the file itself there"):
        open_weights(folder)
    assert folders._class_in(str(folder)) == ""


@links
def test_the_cache_of_hugging_face_and_folders_that_are_links_are_read(tmp_path):
    blobs, folder = (
        tmp_path / "models--x" / "blobs",
        tmp_path / "models--x" / "snapshots" / "1" / "transformer",
    )
    blobs.mkdir(parents=True), folder.mkdir(parents=True)
    (blobs / "a").write_text("{}")
    save_file({"x": torch.ones(1)}, blobs / "b")
    for name, blob in (("config.json", "a"), ("model.safetensors", "b")):
        (folder / name).symlink_to(Path("../../../blobs", blob))
    (tmp_path / "mine").symlink_to(folder)
    assert [*open_weights(folder).entries] == [*open_weights(tmp_path / "mine").entries] == ["x"]


@links
def test_a_tokenizer_beside_an_encoder_is_no_link_to_elsewhere(tmp_path):
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "package" / name).mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "package" / "tokenizer" / "spiece.model").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightFileError, match="link to"):
        saved_tokenizer(tmp_path / "package" / "text_encoder")


@links
def test_a_pipe_in_the_place_of_a_config_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert folders._class_in(str(tmp_path)) == ""
    os.mkfifo(tmp_path / "model_index.json")
    assert _clip_type(str(tmp_path), 1) == "flux"


def test_a_package_with_a_list_that_is_nested_too_deep_is_read_as_one_without_it(tmp_path):
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    assert _clip_type(str(tmp_path), 1) == "flux"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Folders with the suffixes that the host registers them for and an output folder, with a file
    next to them that is nobody's."""
    suffixes = {
        "diffusion_models": {".gguf"}, "checkpoints": {".safetensors"}, "diffusers": ["folder"],
        "custom_nodes": set(), "datasets": set(), "configs": [".yaml"], "of_another_pack": set()
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {
        key: ([str(tmp_path / "models" / key)], of_key) for key, of_key in suffixes.items()})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for folder in ("models/diffusion_models", "output/sensitivity"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("outside.gguf", "outside.sensitivity"):
        (tmp_path / file).write_bytes(b"x")
    return tmp_path


OUT = [
    "../../outside", "..\\..\\outside", "{base}/outside", "C:\\Windows\\x", "C:x",
    "\\\\server\\share\\x", "//server/share/x", "\0", "\ud800", "%year%/../../x", "x" * 3000,
    "x\n" * 200
]


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize(
    "find",
    [
        lambda name: folders.find_file(f"{name}.gguf", "diffusion_models"),
        lambda name: folders.resolve_saved_path(f"{name}.gguf"),
        lambda name: folders.find_sensitivity(f"{name}.sensitivity"),
    ],
    ids=["file", "saved", "sensitivity"],
)
def test_a_name_finds_nothing_outside_of_the_model_folders(base, find, name):
    with pytest.raises(WeightFileError) as error:
        find(name.format(base=base))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("name", OUT[:10])
@pytest.mark.parametrize(
    ("where", "write"),
    [
        ("output", lambda name: folders.new_model_path(name, "Q4_K", ".gguf")),
        (
            "models/diffusion_models",
            lambda name: folders.new_model_path(
                f"diffusion_models/{name}", "Q4_K", ".gguf", folders.MODELS
            ),
        ),
        ("output/sensitivity", folders.new_sensitivity_path),
    ],
    ids=["output", "models", "sensitivity"],
)
def test_a_workflow_writes_nowhere_but_into_outputs_and_models(base, where, write, name):
    try:
        path = Path(os.path.realpath(write(name.format(base=base))))
    except WeightFileError as error:
        assert "\n" not in str(error)
    else:  # what begins with a root or has its own separators loses them
        assert path.is_relative_to(base / where.split("/")[0]) and path.suffix in (
            ".gguf",
            ".sensitivity",
        )
    assert {path.name for path in base.iterdir()} == {
        "models",
        "output",
        "outside.gguf",
        "outside.sensitivity",
    }


NOT_OF_MODELS = ["custom_nodes", "datasets", "configs", "of_another_pack"]


@pytest.mark.parametrize("key", NOT_OF_MODELS)
def test_a_workflow_writes_no_file_where_no_models_lie(base, key):
    with pytest.raises(WeightFileError, match=f"'{key}' is not a model folder"):
        folders.new_model_path(f"{key}/x/y", "Q4_K", ".gguf", folders.MODELS)


@pytest.mark.parametrize("key", NOT_OF_MODELS)
@pytest.mark.parametrize("name", [".env", "model.gguf"])
def test_inspect_reads_nothing_where_no_models_lie(base, key, name):
    path = base / "models" / key / name
    path.parent.mkdir()
    path.write_text("HF_TOKEN=secret")
    with pytest.raises(WeightFileError,
                       match="is not a model in ComfyUI's output or model folders"):
        InspectModelFile.execute("none", path=str(path))


@pytest.mark.parametrize("where", ["models/diffusion_models", "output"])
def test_inspect_reads_only_files_that_end_as_models_do(base, where):
    (base / where / ".env").write_text("HF_TOKEN=secret")
    with pytest.raises(WeightFileError,
                       match="is not a model in ComfyUI's output or model folders"):
        InspectModelFile.execute("none", path=str(base / where / ".env"))


@pytest.mark.parametrize(
    "content",
    [
        b"HF_TOKEN=secret",
        "HF_TOKEN=sécret".encode(),
        "HF_TOKEN=sécret".encode("latin-1"),
        b'{"token": "HF_TOKEN=secret"}',
        b"\xff\xfeH\0F\0_\0T\0O\0",
    ],
)
@pytest.mark.parametrize(
    "name",
    ["a.gguf", "a-00001-of-00002.gguf", "a.safetensors", "m.safetensors.index.json", "config.json"],
)
def test_no_message_quotes_the_text_of_a_file(base, name, content):
    folder = base / "models" / "diffusion_models" / "package"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(content)
    for path in (folder / name, folder):
        try:
            text = InspectModelFile.execute("none", path=str(path)).args[0]
        except WeightFileError as error:
            text = str(error)
        assert (
            "HF" not in text and "48 46" not in text and "secret" not in text and "\n" not in text
        )


@links
def test_a_link_that_the_owner_put_into_a_folder_leads_to_another_disk(base):
    disk = base.parent / f"{base.name} disk"
    (disk / "old").mkdir(parents=True)
    (base / "output" / "big").symlink_to(disk)
    (base / "models" / "diffusion_models" / "big").symlink_to(disk)
    for name, where in (
        ("big/new/x", folders.OUTPUT),
        ("diffusion_models/big/old/x", folders.MODELS),
    ):
        path = folders.new_model_path(name, "Q4_K", ".gguf", where)
        Path(path).write_bytes(b"x")
        assert (
            Path(path).resolve().is_relative_to(disk) and folders.resolve_saved_path(path) == path
        )
        assert folders.new_model_path(name, "Q4_K", ".gguf", where).endswith("x_Q4_K_00002_.gguf")
    (base / "output" / "sensitivity" / "big").symlink_to(disk)
    path = folders.new_sensitivity_path("big/m")
    Path(path).write_bytes(b"x")
    assert folders.find_sensitivity(path) == path
    for name in ("big/../x", "big/../../x", "big/old/../../x"):
        with pytest.raises(WeightFileError, match="without '..'"):
            folders.new_model_path(name, "Q4_K", ".gguf")
        with pytest.raises(WeightFileError, match="is not a model"):
            folders.resolve_saved_path(str(base / "output" / name))


NOT_ON_WINDOWS = ("ab:c", "a*?", "con", "CON.q8", "x/aux/y", "a<b", 'a"b', "a|b", "x/lpt1", "a\tb")


@pytest.mark.parametrize("name", NOT_ON_WINDOWS)
def test_a_name_that_windows_does_not_allow_is_refused_on_every_system(name, base):
    for where, start in ((folders.OUTPUT, ""), (folders.MODELS, "diffusion_models/")):
        with pytest.raises(WeightFileError, match="cannot be the name of a file or folder on Wind"):
            folders.new_model_path(start + name, "Q4_K", ".gguf", where)
    with pytest.raises(WeightFileError, match="cannot be the name of a file or folder on Windows"):
        folders.new_sensitivity_path(name)
    for allowed in ("console", "com", "a.con", "%year%"):
        assert folders.new_model_path(allowed, "Q4_K", ".gguf")


@links
def test_no_link_and_no_registered_folder_leads_to_where_programs_lie(base):
    programs = base / "models" / "custom_nodes"
    (programs / "pack" / "models").mkdir(parents=True)
    (programs / "pack" / "x.gguf").write_bytes(b"x")
    (base / "output" / "nodes").symlink_to(programs)
    folder_paths.folder_names_and_paths["of_a_pack"] = (
        [str(programs / "pack" / "models")],
        {".safetensors"},
    )
    for name, where in (("nodes/x", folders.OUTPUT), ("nodes/pack/new/x", folders.OUTPUT),
                        ("of_a_pack/x", folders.MODELS)):
        with pytest.raises(WeightFileError, match="lies in custom_nodes"):
            folders.new_model_path(name, "Q4_K", ".gguf", where)
    with pytest.raises(WeightFileError, match="is not a model"):
        folders.resolve_saved_path(str(base / "output" / "nodes" / "pack" / "x.gguf"))


def test_every_promise_names_tests_that_there_are():
    page = PROGRAMS.sub("", PROMISES.read_text(encoding="utf-8"))
    defined = {(path.name, name) for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}
    rows = [
        row for row in re.findall(r"^\| .*\|$", page, re.M)
        if not re.match(r"\| (promise|---)", row)
    ]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)::(test_\w+)`", row)
        assert named and set(named) <= defined, row
