"""README, CONTRIBUTING and docs: what they list is what there is."""
import ast
import re

from devtools.measure import model_sizes

import pytest
from comfy.quant_ops import QUANT_ALGOS
from languages import HELP_LANGUAGES, LOCALES, help_page
from pack_nodes import node_list

from devtools import ROOT
from devtools.host import environment
from devtools.workflows import BLUEPRINT_FOLDER, FOLDER
from devtools.workflows.__main__ import blueprint_index, index
from featherweight.loaders.encoders.encoder_sets import ENCODER_SETS, SINGLE_ENCODERS
from featherweight.loaders.quantizers.comfyui import READERS
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.formats.base import GGML_FORMATS

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES, ARCHITECTURE = (re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"),
                                flags=re.S) for name in ("CONTRIBUTING.md", "docs/architecture.md"))
ROOMS = ("nodes", "cluster", "loaders", "ops")
HOST_NAMES = ("add_patches",)
LANGUAGES = {
    "en": "English",
    "ja": "Japanese",
    "ko": "Korean",
    "zh": "Simplified Chinese",
}


def test_the_readme_names_every_ggml_type():
    listed = set(re.split(r"[\s,·]+", README.split("Every GGUF type:")[1].split("beside")[0]))
    assert {packed.name for packed in GGML_FORMATS.values()} <= listed


def test_readme_and_compatibility_name_every_format_of_comfyui_that_is_read():
    listed = README.split("Of ComfyUI's own formats:")[1].split(".")[0]
    of_comfyui = set(re.split(r"[\s·]+", listed.strip()))
    assert set(QUANT_ALGOS) <= of_comfyui <= set(READERS)
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    table = page.split("| format | written by |")[1].split("\n\n")[0]
    assert [name for name in READERS
            if name not in table and name.removeprefix("float8_e4m3fn") not in table] == []


def test_the_readme_has_a_row_for_every_node_of_ours():
    rows = README.split("## Nodes")[1].split("\n\n")[1]
    schemas = [node.GET_SCHEMA() for node in node_list()]
    assert [
        schema.display_name
        for schema in schemas
        if schema.node_id.startswith("Featherweight") and f"\n| {schema.display_name} |" not in rows
    ] == []


@pytest.mark.parametrize(("page", "start"), [("README.md", "its help page, in "),
                                             ("docs/compatibility.md", "Help pages are in ")])
def test_the_languages_of_the_help_pages_are_named(page, start):
    sentence = " ".join((ROOT / page).read_text(encoding="utf-8").split(start)[1].split())
    named = {code for code, name in LANGUAGES.items() if name in sentence.partition(".")[0]}
    assert named == set(HELP_LANGUAGES)


def test_the_languages_of_the_tooltips_are_those_of_the_help_pages_as_compatibility_says():
    assert "So are the tooltips" in (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert {"en", *LOCALES} == set(HELP_LANGUAGES)


def test_architecture_names_every_folder_and_nothing_that_is_gone():
    paths = set(re.findall(r"`([\w/]+(?:/|\.py))`", ARCHITECTURE))
    assert [path for path in paths if "/" in path and not (ROOT / path).exists()] == []
    folders = {
        f"{path.parent.relative_to(ROOT).as_posix()}/" for room in ROOMS
        for path in (ROOT / room).glob("*/__init__.py")
    }
    assert folders | {f"{room}/" for room in ROOMS} <= paths


@pytest.mark.parametrize("way", re.findall(r"^## (The way of .*)$", ARCHITECTURE, re.M))
def test_each_way_names_what_is_there(way):
    steps = re.split(r"^\d\. ",
                     ARCHITECTURE.split(f"## {way}")[1].split("\n## ")[0], flags=re.M)[1:]
    assert len(steps) > 3
    for step in steps:
        quoted = re.findall(r"`([^`]+)`", step)
        sources = "".join(
            (ROOT / word).read_text(encoding="utf-8") for word in quoted if word.endswith(".py"))
        for name in quoted:
            assert name.endswith(".py") or "." in name or name in HOST_NAMES or re.search(
                rf"^(def|class) {name}\b", sources, re.M), name


def test_files_and_tests_that_the_recipes_name_are_there():
    quoted = " ".join(re.findall(r"`([^`]+)`", RECIPES)).split()
    paths = [word for word in quoted if re.fullmatch(r"[a-z]\w*/[\w/.]+", word)]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    defined = {
        node.name for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {word for word in quoted if word.startswith("test_")} <= defined | files


def test_what_the_environment_takes_is_said_alike():
    size = environment.SIZE.removeprefix("about ")
    for name in ("README.md", "CONTRIBUTING.md", "dev.py"):
        assert size in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("language", HELP_LANGUAGES)
def test_the_list_of_text_encoders_has_types_that_there_are(language):
    page = help_page("FeatherweightLoadTextEncoder", language).read_text(encoding="utf-8")
    types = re.findall(r"^- \*\*[^*]+\*\* ?[(（](\w+)[)）][:：]", page, re.M)
    assert len(types) > 10
    assert set(types) <= SINGLE_ENCODERS.keys() | ENCODER_SETS[2].keys()


@pytest.mark.parametrize("make", model_sizes.TABLES, ids=lambda make: make.__name__)
def test_the_choosing_page_has_the_tables_that_dev_py_sizes_prints(make):
    if make is model_sizes.accuracy_table:
        pytest.importorskip("bitsandbytes")
    assert make() in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "example_workflows" / "README.md",
        ROOT / "subgraphs" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_within_the_repository_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        headings = (
            re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if heading else []
        )
        assert not heading or heading in [
            re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings
        ], link


def test_the_page_of_the_example_workflows_is_the_one_that_is_written():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == index(), "run `python -m devtools.workflows`"


def test_the_page_of_the_blueprints_is_the_one_that_is_written():
    page = (BLUEPRINT_FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == blueprint_index(), "run `python -m devtools.workflows`"
