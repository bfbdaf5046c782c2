"""llms.txt, which programs read that write workflows: made from the code, and up to date."""
import inspect
import re

import pytest
from pack_nodes import current_nodes

from devtools import ROOT, llms_text

NODES = {node.GET_SCHEMA().node_id: node for node in current_nodes()}
TEXT = llms_text.text(NODES)


def test_the_file_is_the_one_that_is_written():
    assert llms_text.PATH.read_text(encoding="utf-8") == TEXT, "run `python -m devtools.llms_text`"


def test_it_has_the_shape_that_llmstxt_org_asks_for():
    title, summary, *_ = (line for line in TEXT.splitlines() if line)
    assert title.startswith("# ") and summary.startswith("> ")
    head, *sections = re.split(r"^## .*\n", TEXT, flags=re.M)
    assert len(re.findall("^#", head, re.M)) == 1 and len(sections) == 2
    for section in sections:
        lines = [line for line in section.splitlines() if line]
        assert lines and all(re.fullmatch(r"- \[[^]]+\]\(https://\S+\)(: .+)?", line)
                             for line in lines)


def test_its_links_lead_to_files():
    start = llms_text.address("")
    links = re.findall(r"\]\((.*?)\)", TEXT)
    assert len(links) > 25
    assert [link for link in links
            if not (link.startswith(start) and (ROOT / link.removeprefix(start)).is_file())] == []


OWN = [name for name in NODES if name.startswith("Featherweight")]
# Inputs that prompts of earlier versions lack, and what these meant.
EARLIER = {("compute", "exact"), ("host_formats", "automatic"), ("header_alpha", "ignore"),
           ("imatrix", ())}


@pytest.mark.parametrize("node_id", OWN)
def test_it_has_every_input_that_a_prompt_may_set(node_id):
    entry = re.search(rf"^- `{node_id}`.*\n(?:    - .*\n)+", TEXT, re.M)[0]
    inputs = NODES[node_id].GET_NODE_INFO_V1()["input"]
    for group in ("required", "optional"):
        said = re.findall(rf"^    - `(\w+)`.*?; {group}[.;]", entry, re.M)
        expected = {name for name, (_, *settings) in inputs.get(group, {}).items()
                    if name == "host_formats" or not (settings and settings[0].get("hidden"))}
        assert set(said) == expected
    assert not [name for name, (_, *settings) in inputs["required"].items()
                if settings and "default" in settings[0]]
    is_output = bool(NODES[node_id].GET_SCHEMA().is_output_node)
    assert ("; an output node: " in entry.splitlines()[0]) == is_output


@pytest.mark.parametrize("node_id", OWN)
def test_an_input_left_out_has_the_value_that_is_shown_or_is_said_to_have_another(node_id):
    parameters = inspect.signature(NODES[node_id].execute).parameters
    for input in NODES[node_id].GET_SCHEMA().inputs:
        if input.optional and getattr(input, "default", None) is not None:
            value = parameters[input.id].default
            value = value[0] if isinstance(value, tuple) and value else value
            assert value == input.default or (input.id, value) in EARLIER
