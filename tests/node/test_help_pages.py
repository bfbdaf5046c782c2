"""Help pages: there in each language, about the inputs there are, quoting messages that the code
has."""
import ast
import collections
import functools
import itertools
import re

import pytest
from languages import DOCS, HELP_LANGUAGES, help_page
from pack_nodes import current_nodes

from devtools import ROOT
from featherweight.nodes import help_pages

REPOSITORY = re.search(r'Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(
    encoding="utf-8"))[1]
NODES = {node.GET_SCHEMA().node_id: node for node in current_nodes()}
OWN = [node_id for node_id in NODES if node_id.startswith("Featherweight")]
# Those under ids of other packs share some, in English.
PAGES = {
    f"{node_id}-{language}": (node_id, help_page(getattr(node, "HELP_PAGE", node_id), language))
    for node_id, node in NODES.items()
    for language in (HELP_LANGUAGES if node_id in OWN else ["en"])
}
MESSAGE = ("message", "メッセージ", "메시지", "消息")
each_file = pytest.mark.parametrize(
    "path", sorted({path for _, path in PAGES.values()}),
    ids=lambda path: path.relative_to(DOCS).with_suffix("").as_posix())


# what an entry of a list is about
LEAD = re.compile(r"^- \*\*(.+?)\*\*(?: ?[(（].*?[)）])?[:：]", re.M)


# several inputs, as in clip_name1–4
RANGE = re.compile(r"(.*?)(\d+)–(\d+)")
WEB = f"{REPOSITORY}/blob/main/"


def inputs_named(lead: str) -> set[str]:
    """Returns the inputs that the beginning of an entry names: one, or several with commas."""
    names = {lead}
    for part in lead.split(", "):
        numbered = RANGE.fullmatch(part)
        names |= {f"{numbered[1]}{number}" for number in range(int(numbered[2]),
                  int(numbered[3]) + 1)} if numbered else {part}
    return names


def first_cells(text: str) -> list[str]:
    return [line[2:].split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_node_has_a_page_that_lists_all_inputs_and_ours_have_it_in_each_language(page):
    node_id, path = PAGES[page]
    schema = NODES[node_id].GET_SCHEMA()
    shown = {input.display_name or input.id for input in schema.inputs
             if not input.as_dict().get("hidden")}
    text = path.read_text(encoding="utf-8")
    if hasattr(NODES[node_id], "HELP_PAGE"):
        text = help_pages.page_text(NODES[node_id])
    assert text.startswith(f"# {schema.display_name}\n")
    assert shown <= set().union(*map(inputs_named, LEAD.findall(text)))


@pytest.mark.parametrize("node_id", OWN)
def test_translations_have_the_same_headings_pictures_lists_tables_and_messages(node_id):
    texts = {language: PAGES[f"{node_id}-{language}"][1].read_text(encoding="utf-8")
             for language in HELP_LANGUAGES}
    for language, text in texts.items():
        for pattern in (r"^#+ ", r"\]\(.*\)", r"^\|", r"^- ", r"^```"):
            counts = [len(re.findall(pattern, page, re.M)) for page in (text, texts["en"])]
            assert counts[0] == counts[1], (language, pattern)
        assert quoted_messages(text) == quoted_messages(texts["en"]), language


@each_file
def test_images_and_links_of_a_page_lead_somewhere(path):
    for link in re.findall(r"\]\((.*?)\)", path.read_text(encoding="utf-8")):
        # the frontend looks for images in the folder of the English pages
        target = ROOT / link.removeprefix(WEB) if link.startswith(WEB) else DOCS / link
        assert target.is_file(), link


def test_every_page_belongs_to_a_node():
    assert set(DOCS.rglob("*.md")) == {path for _, path in PAGES.values()}


LONG_SENTENCE = 8  # words: shorter ones may be on several pages


def sentences(text: str) -> list[str]:
    """The sentences of a page in plain words, without code, images and what an entry of a list is
    about."""
    text = re.sub(r"^```.*?^```|!\[.*?\]\(.*?\)", "", text, flags=re.M | re.S)
    parts = re.split(r"\n\n|\n(?=- |\d+\. |\|)", text)
    marks = re.compile(r"\]\([^)]*\)|[*`|\[\]]|^(- |\d+\. )")
    plain = [" ".join(marks.sub("", LEAD.sub("", part)).split()) for part in parts]
    return [sentence for part in plain for sentence in re.split(r"(?<=[.?!:;]) ", part)]


def test_no_long_sentence_is_twice_in_the_english_pages():
    pages = collections.defaultdict(list)
    for path in DOCS.glob("*.md"):
        for sentence in sentences(path.read_text(encoding="utf-8")):
            if len(sentence.split()) > LONG_SENTENCE:
                pages[sentence].append(path.stem)
    assert len(pages) > 100
    assert {sentence: names for sentence, names in pages.items() if len(names) > 1} == {}


@functools.cache  # reading the whole pack takes a second
def messages_in_code() -> list[str]:
    """Every string of the pack, with a mark where a value is put in."""
    texts = []
    folders = [(ROOT / folder).rglob("*.py") for folder in ("nodes", "cluster", "loaders", "ops")]
    for path in (*ROOT.glob("*_*.py"), *itertools.chain(*folders)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def quoted_messages(text: str) -> list[str]:
    """What lists and tables under "message" are about, an ellipsis where a value is put in. Without
    one it is no quotation."""
    words = "|".join(MESSAGE)
    tables = re.findall(rf"^\| (?:{words}) \|.*\n\|---.*\n((?:\|.*(?:\n|$))*)", text, re.M)
    lists = re.findall(rf"^\*(?:{words})\*[:：].*\n\n((?:- .*(?:\n|$))*)", text, re.M)
    leads = [
        *itertools.chain(*map(first_cells, tables)), *itertools.chain(*map(LEAD.findall, lists))
    ]
    return [lead for lead in leads if "…" in lead]


def missing_in_code(text: str) -> list[str]:
    patterns = {message: ".*".join(re.escape(part.strip()) for part in message.split("…"))
                for message in quoted_messages(text)}
    return [message for message, pattern in patterns.items()
            if not any(re.search(pattern, known, re.S) for known in messages_in_code())]


@each_file
def test_messages_a_page_quotes_are_in_the_code(path):
    assert not missing_in_code(path.read_text(encoding="utf-8"))


def test_messages_that_the_troubleshooting_page_calls_ours_are_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(quoted_messages(page)) > 3
    assert not missing_in_code(page)
