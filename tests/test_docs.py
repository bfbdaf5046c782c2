"""README, CONTRIBUTING and docs: what they list is what there is."""
import ast
import re

import pytest
from featherweight.loaders.encoders.encoder_sets import ENCODER_SETS, SINGLE_ENCODERS
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.format import GGML_FORMATS
from pack_nodes import node_list

from devtools import ROOT
from devtools.host import environment
from devtools.measure import model_sizes

README, RECIPES = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
# Words of a text that are a file or the first folder of a path.
FILE_OR_FOLDER = re.compile(r"(?<![\w/*])\w+(?:\.py\b|(?=/))")


def test_the_readme_names_every_ggml_type():
    listed = set(re.split(r"[\s,·]+", README.split("Every GGUF type:")[1].split("beside")[0]))
    assert {packed.__name__ for packed in GGML_FORMATS.values()} <= listed


def test_the_readme_has_a_row_for_every_node_of_ours():
    rows = README.split("## Nodes")[1].split("\n\n")[1]
    schemas = [node.GET_SCHEMA() for node in node_list()]
    assert [schema.display_name for schema in schemas
            if schema.node_id.startswith("Featherweight") and f"\n| {schema.display_name} |" not in rows] == []


def test_the_map_of_the_readme_names_every_folder_and_nothing_that_is_gone():
    mapped = set(FILE_OR_FOLDER.findall(README.split("## Map")[1].split("```")[1]))
    rooms = [ROOT / name for name in ("nodes", "cluster", "loaders", "ops")]
    there = [path for folder in (ROOT, *rooms) for path in folder.iterdir()]
    assert mapped <= {path.name for path in there}
    assert {path.name for path in there if path.parent != ROOT and (path / "__init__.py").exists()} <= mapped


def test_the_way_of_a_weight_names_what_is_there():
    way = README.split("each room once:")[1].split("A new format")[0]
    steps = re.findall(r"^\d\. ", way, re.M)
    files = [word for word in re.findall(r"`([^`]+)`", way) if word.endswith(".py")]
    assert 0 < len(steps) <= 12 and len(files) >= 10
    for step in re.split(r"^\d\. ", way, flags=re.M)[1:]:
        quoted = re.findall(r"`([^`]+)`", step)
        sources = "".join((ROOT / word).read_text(encoding="utf-8") for word in quoted if word.endswith(".py"))
        for name in (word for word in quoted if not word.endswith(".py")):
            assert re.search(rf"^(def|class) {name}\b", sources, re.M), name


def test_files_and_tests_that_the_recipes_name_are_there():
    quoted = " ".join(re.findall(r"`([^`]+)`", RECIPES)).split()
    paths = [word for word in quoted if re.fullmatch(r"[a-z]\w*/[\w/.]+", word)]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    defined = {node.name for path in (ROOT / "tests").rglob("test_*.py")
               for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {word for word in quoted if word.startswith("test_")} <= defined | files


def test_what_the_environment_takes_is_said_alike():
    size = environment.SIZE.removeprefix("about ")
    for name in ("README.md", "CONTRIBUTING.md", "dev.py"):
        assert size in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("language", ["", "/ja", "/ko", "/de"])
def test_the_list_of_text_encoders_has_types_that_there_are(language):
    page = (ROOT / "nodes" / "web" / "docs" / f"FeatherweightLoadTextEncoder{language}.md").read_text(encoding="utf-8")
    types = re.findall(r"^- \*\*[^*]+\*\* ?[(（](\w+)[)）][:：]", page, re.M)
    assert len(types) > 10
    assert set(types) <= SINGLE_ENCODERS.keys() | ENCODER_SETS[2].keys()


@pytest.mark.parametrize("make", model_sizes.TABLES, ids=lambda make: make.__name__)
def test_the_choosing_page_has_the_tables_that_dev_py_sizes_prints(make):
    if make is model_sizes.accuracy_table:
        pytest.importorskip("bitsandbytes")
    assert make() in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")],
                         ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if heading else []
        assert not heading or heading in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings], link
