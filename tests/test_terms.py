"""One word for one thing in all that people read, by the table of words in CONTRIBUTING.md; and
American spelling."""
import json
import re
from collections.abc import Iterator

import pytest
from languages import DOCS
from pack_nodes import node_list

from devtools import ROOT
from devtools.workflows.api_format import NOTES
from featherweight.nodes.legacy import LegacyNode

PAGES = sorted([
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *DOCS.glob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("example_workflows", "subgraphs")),
])
WORKFLOWS = sorted(path for folder in ("example_workflows", "subgraphs")
                   for path in (ROOT / folder).glob("*.json"))
ENGLISH_TEXTS = sorted((ROOT / "locales").glob("en/*.json"))
NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}

# How British words begin or go on whose American form has other letters.
BRITISH = (
    r"\w*(?:quantis|recognis|optimis|normalis|organis|initialis|minimis|maximis|summaris|serialis)\w*"
    r"|\w*(?:colour|behaviour|favour|neighbour)\w*|artefacts?|centres?|grey(?:ed)?"
)
# What is no word of ours -> why it stays.
EXCEPTIONS = {
    r"compressed-tensors": "a quantizer's name",
    r"(?i)share-?\W?a-?\W?packed-?\W?file": "a file that was made here",
    r"models/\w+": "a folder of ComfyUI",
    r"HOST:\w+": "the form of an address on a network",
    r"`[^`\n]+`": "names in code: ids, inputs, files, options, messages",
    r"(?<=\]\()[^)\s]*": "where a link leads",
    r"https?://\S+": "an address",
    r"<!--.*?-->": "a comment",
    r"(?ms)^```.*?^```": "what is typed or printed",
    "|".join(re.escape(node.display_name) for node in NODES.values()
             if issubclass(node, LegacyNode)): "names of nodes of other packs",
    r"\*\*[\w., ]*_[\w., ]*\*\*": "ids of inputs of other packs",
}


def banned_words() -> dict[str, str]:
    """A pattern of each word that is not used -> what is used, from CONTRIBUTING.md."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.split("\n## Words\n")[1].split("|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in
            table.splitlines()]
    return {
        rf"{re.escape(word)}s?": use for use, *unused in rows
        for word in ", ".join(unused).split(", ") if word
    }


WORDS = {**banned_words(), BRITISH: "American spelling"}


def without_exceptions(text: str) -> str:
    """The text with blanks in place of what is no word of ours; its lines stay its lines."""
    for pattern in EXCEPTIONS:
        text = re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def wrong_words(text: str, where: str) -> list[str]:
    """"file:line: word, use ..." of each word that the table does not have."""
    found = []
    for number, line in enumerate(without_exceptions(text).splitlines(), 1):
        for word, use in WORDS.items():
            found += [f"{where}:{number}: {match[0]!r}, use: {use}"
                      for match in re.finditer(rf"(?i)(?<![\w-])(?:{word})(?![\w-])", line)]
    return found


def texts_of(node) -> Iterator[tuple[str, str]]:
    """(where, text) of what a node shows. Names of other packs' inputs and options are theirs."""
    schema = node.GET_SCHEMA()
    yield "description", schema.description or ""
    is_legacy = issubclass(node, LegacyNode)
    if not is_legacy:
        yield "name", schema.display_name
    for each in (*schema.inputs, *schema.outputs):
        name = each.display_name or each.id
        yield f"tooltip of {name}", each.tooltip or ""
        if not is_legacy:
            yield f"name of {each.id}", each.display_name or each.id.replace("_", " ")
            for option in getattr(each, "options", None) or ():
                yield f"option of {name}", str(option)


def notes_of(graph) -> Iterator[str]:
    """The notes of a workflow, and titles and descriptions of what is in it."""
    if isinstance(graph, dict):
        if graph.get("type") in NOTES:
            yield from (str(value) for value in graph.get("widgets_values", ()))
        yield from (str(graph[key]) for key in ("title", "BlueprintDescription") if key in graph)
        graph = list(graph.values())
    if isinstance(graph, list):
        for part in graph:
            yield from notes_of(part)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_have_the_words_of_the_table(path):
    found = wrong_words(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_nodes_have_the_words_of_the_table(node_id):
    found = [line for where, text in texts_of(NODES[node_id])
             for line in wrong_words(text, f"{node_id}, {where}")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_notes_of_workflows_have_the_words_of_the_table(path):
    found = [line for note in notes_of(json.loads(path.read_text(encoding="utf-8")))
             for line in wrong_words(note, f"{path.name}, note")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [*ENGLISH_TEXTS, *sorted((ROOT / "locales").glob("zh/*.json")),
                                  *sorted(DOCS.glob("*/zh.md"))],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_translations_call_packed_weights_packed(path):
    text, where = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    found = wrong_words(text, where) if path in ENGLISH_TEXTS else [
        f"{where}:{number}: 压缩, use: 量化存储" for number, line in enumerate(text.splitlines(), 1)
        if "压缩" in line]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("text", "word"), [
    ("A model is held.", "held"), ("two\nPictures", "Pictures"), ("its behaviour", "behaviour"),
    ("a graphics card", "graphics card"), ("the host's own", "host"), ("by UNets", "UNets"),
    ("[a picture](picture.png)", "picture"), ("Compressed weights", "Compressed"),
])
def test_a_wrong_word_is_found_with_its_line(text, word):
    line = 1 + text[:text.index(word)].count("\n")
    found, = wrong_words(text, "page")
    assert found.startswith(f"page:{line}: {word!r}, use: ")
