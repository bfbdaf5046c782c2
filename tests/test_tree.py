"""Rules about the files themselves: who imports whom, and what must stand beside what."""
import ast
import functools
import re
import sys
from pathlib import Path

import comfy.options
import known_skips
import pytest

from devtools.changed import users_by_file
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS

PACK = Path(__file__).resolve().parent.parent
HOST = Path(comfy.options.__file__).resolve().parent.parent
# each may import itself and those after it
LAYERS = ("nodes", "cluster", "loaders", "ops", "child_process")
MOST_BROKEN = 10  # files of tests that name the path of a module
WITHOUT_FORMATS = ("base", "bits", "rotation", "row_layout")  # of ops/formats
HOST_MODULES = {path.stem for path in HOST.iterdir() if path.suffix == ".py" or path.is_dir()}
# Formats, kernels, packing and readers of files know torch alone.
WITHOUT_HOST = (
    "loaders/container/",
    "loaders/encoders/",
    "loaders/files/",
    "loaders/quantizers/",
    "ops/formats/",
    "ops/kernels/",
    "ops/packing/",
    "ops/quantize/",
)
SOURCES = [
    *sorted(PACK.glob("*_*.py")),
    *(path for layer in LAYERS for path in sorted((PACK / layer).rglob("*.py")))
]


@functools.cache
def tree_of(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """(absolute module names, modules of this pack as dotted paths from its root) that a source
    file imports."""
    absolute, own = set(), set()
    package = path.relative_to(PACK).parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            absolute |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package) + 1, f"{path}: an import leaves the pack"
            base = [*package[:len(package) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            own |= (
                {".".join(base)}
                if node.module
                else {".".join([*base, alias.name]) for alias in node.names}
            )
    return absolute, own


def test_imports_point_down():
    for path in SOURCES:
        where = path.relative_to(PACK).as_posix()
        absolute, own = imports(path)
        layer = where.split("/")[0].removesuffix(".py")
        allowed = LAYERS[LAYERS.index(layer):] if layer in LAYERS else LAYERS
        assert {name.split(".")[0] for name in own} <= set(allowed), path
        if where.startswith("ops/formats/"):
            assert all(folder_of(name) in ("ops", "ops/formats") for name in own), path
            assert {name.split(".")[0] for name in absolute} <= {
                "torch",
                "gguf",
            } | sys.stdlib_module_names, path
        if where in ("ops/formats/bits.py", "ops/formats/base.py"):
            assert own <= {"ops.formats.bits", "ops.lasting_memory", "ops.stable_names"}, path
            assert {name.split(".")[0] for name in absolute} <= {
                "torch"
            } | sys.stdlib_module_names, path


def test_arithmetic_and_readers_of_files_do_not_use_the_host():
    without = [
        path for path in SOURCES if path.relative_to(PACK).as_posix().startswith(WITHOUT_HOST)
    ]
    assert len(without) > 50
    for path in without:
        absolute, _ = imports(path)
        assert not {name for name in absolute if name.split(".")[0] in HOST_MODULES}, path


def module_of(path) -> str:
    return ".".join(path.relative_to(PACK).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path) -> set[str]:
    """Modules of this pack that a file imports, except for type checkers alone.

    `from . import name` is the module of that name where there is one. A module's packages are
    imported with it, unless the file is in them itself.
    """
    package, found = path.relative_to(PACK).parent.parts, set()
    typing_only = {
        imported for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for imported in node.body
    }
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            base = ".".join(
                [*package[:len(package) + 1 - node.level], *filter(None, [node.module])])
            modules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules | (
                {base} & MODULES.keys() if len(modules) < len(node.names) else set()
            )
    found |= {
        ".".join(parts[:end]) for parts in (name.split(".") for name in found)
        for end in range(1, len(parts)) if parts[:end] != list(package[:end])
    } & MODULES.keys()
    return found - {module_of(path)}


MODULES = {module_of(path): path for path in SOURCES}


def folder_of(module: str) -> str:
    """The folder of a module of the pack, at most two levels deep; a file outside of all folders
    is a place of its own."""
    return "/".join(MODULES[module].relative_to(PACK).parent.parts[:2]) or module


def circle(imported: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none where there is no such
    circle."""
    done = set()

    def walk(module, way):
        if module in way:
            return way[way.index(module):]
        if module not in done:
            found = next(
                filter(None,
                       (walk(other, [*way, module]) for other in sorted(imported.get(module, ())))),
                [])
            done.add(module)
            return found
        return []

    return next(filter(None, (walk(module, []) for module in sorted(imported))), [])


def test_reading_a_file_imports_neither_products_nor_kernels():
    imported, found = {module: imported_modules(path) for module, path in MODULES.items()}, set()
    waiting = ["loaders.files.open_weights", "loaders.quantizers.registry"]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imported[module]
    assert len(found) > 40
    assert not {module for module in found
                if module.startswith("ops.kernels") or module == "ops.layers.product"}


def test_no_files_import_each_other_in_a_circle():
    imported = {module: imported_modules(path) for module, path in MODULES.items()}
    assert len(imported) > 80 and sum(map(len, imported.values())) > 150
    assert circle(imported) == []
    imported["ops.formats.base"] = {"ops.layers.packed_layers"}
    assert "ops.formats.base" in circle(imported)


def imported_folders() -> dict[str, dict[str, str]]:
    """For each folder those that it imports, with an import that shows it.

    The file of a package lists its own folders, and is not imported itself where one of these is.
    """
    found: dict[str, dict[str, str]] = {}
    for module, path in MODULES.items():
        folder, imported = folder_of(module), imported_modules(path)
        others = found.setdefault(folder, {})
        for name in imported:
            goes_through = any(other.startswith(f"{name}.") for other in imported)
            lists = path.name == "__init__.py" and name.startswith(f"{module}.")
            if folder_of(name) != folder and not goes_through and not lists:
                others[folder_of(name)] = f"{module} imports {name}"
    return found


def test_folders_import_only_those_below_them_in_the_table_of_architecture():
    page = (PACK / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = ["__init__", *re.findall(r"^\| `([\w/]+)/` \|", page, re.MULTILINE), "child_process"]
    imported = imported_folders()
    assert len(imported) > 20 and sum(map(len, imported.values())) > 100
    assert not [reason for folder, others in imported.items() for other, reason in others.items()
                if floors.index(other) <= floors.index(folder)]


def test_only_their_records_name_more_than_half_of_comfyuis_formats():
    named = {}
    for path in SOURCES:
        names = COMFYUI_FORMATS.keys() & set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        if 2 * len(names) > len(COMFYUI_FORMATS):
            named[module_of(path)] = names
    assert named == {"loaders.quantizers.comfy_quant_formats": COMFYUI_FORMATS.keys()}


def test_ray_is_optional_and_starts_with_no_import():
    for path in SOURCES:
        tree = tree_of(path)
        inside = {
            id(node) for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        at_import = [node for node in ast.walk(tree)
                     if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside]
        names = {
            alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {
            node.module for node in at_import
            if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        assert not {name.split(".")[0] for name in names} & {"ray", "pyarrow"}, path


@pytest.mark.parametrize("package", ["ops/formats", "loaders/encoders/archs"])
def test_every_file_of_a_package_that_registers_its_files_has_a_line_that_imports_it(package):
    files = {
        module_of(path) for path in (PACK / package).glob("*.py") if not path.name.startswith("_")
    }
    files -= {f"ops.formats.{name}" for name in WITHOUT_FORMATS}
    assert len(files) > 10 and files == imported_modules(PACK / package / "__init__.py")


def test_own_modules_are_imported_relatively():
    for path in SOURCES:
        absolute, _ = imports(path)
        assert not {name.split(".")[0] for name in absolute} & {
            "featherweight",
            "loaders",
            "ops",
            "devtools",
            "tests",
        }, path


def test_a_module_that_moves_breaks_few_files_of_tests():
    """What many of them use has a name in tests/support/pack_api.py."""
    users = users_by_file(PACK)
    broken = {name: sum(user.startswith("tests/") for user in users[name]) for name in users
              if name.startswith(LAYERS) and not name.endswith("__init__.py")}
    assert len(broken) > 250
    assert not {name: count for name, count in broken.items() if count > MOST_BROKEN}


def test_requirements_are_those_of_the_project_file():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (PACK / "requirements.txt").read_text(encoding="utf-8").split("\n")[:-1] == project[
        "dependencies"
    ]


def test_every_skip_that_the_table_names_is_a_reason_of_a_test():
    texts = "".join(path.read_text(encoding="utf-8")
                    for path in (PACK / "tests").rglob("*.py")
                    if path != Path(known_skips.__file__))
    assert not [reason for reason in known_skips.LIFTED_BY
                if reason not in texts and not reason.startswith("could not import '")]
