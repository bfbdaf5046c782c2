"""What ComfyUI shows of the nodes in its other languages: tooltips and descriptions. Names stay as
help and forums say them."""
import json
import re

import pytest
from pack_nodes import current_nodes

from devtools import ROOT

# Ids of other packs are left out: the text would be shown on their nodes too.
SCHEMAS = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in current_nodes())
           if schema.node_id.startswith("Featherweight")}
LOCALES = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
           for path in (ROOT / "locales").glob("*/nodeDefs.json")}
each_locale = pytest.mark.parametrize("locale", LOCALES)


def english(schema) -> dict:
    """The texts of a node in the form that the host's `locales` have."""
    texts = {
        "description": schema.description,
        "inputs": {each.id: {"tooltip": each.tooltip} for each in schema.inputs}
    }
    outputs = {
        str(index): {"tooltip": each.tooltip} for index, each in enumerate(schema.outputs)
        if each.tooltip
    }
    return texts | ({"outputs": outputs} if outputs else {})


def flat(texts: dict, path: str = "") -> dict[str, str]:
    out = {}
    for key, value in texts.items():
        out |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return out


ENGLISH = flat({node_id: english(schema) for node_id, schema in SCHEMAS.items()})
SHARED = re.compile(r"\.inputs\.(compute|pack_to|gpu_weights|store|store_gb)\.tooltip$")
WITHOUT_LORAS = re.compile("FeatherweightLoad(ControlNet|ModelPatch|CLIPVision)")


@pytest.mark.parametrize("locale", ["en", *LOCALES])
def test_tooltips_that_nodes_share_are_short_and_speak_of_loras_only_where_there_are_some(locale):
    texts = ENGLISH if locale == "en" else flat(LOCALES[locale])
    assert {key: len(text) for key, text in texts.items()
            if SHARED.search(key) and len(text) > 200} == {}
    assert [key for key, text in texts.items()
            if WITHOUT_LORAS.match(key) and "LoRA" in text] == []


@each_locale
def test_every_tooltip_and_description_is_translated_and_nothing_else(locale):
    assert flat(LOCALES[locale]).keys() == ENGLISH.keys()
    for key, text in flat(LOCALES[locale]).items():
        assert text.strip() and text != ENGLISH[key], key
        assert not re.search(r"[{}@|]", text), (
            f"{key}: the editor takes these characters for its own"
        )


@each_locale
def test_translations_name_the_folders_options_and_examples_of_the_original(locale):
    for key, text in flat(LOCALES[locale]).items():
        node_id, _, rest = key.partition(".")
        input = next(
            (each for each in SCHEMAS[node_id].inputs if rest == f"inputs.{each.id}.tooltip"), None)
        named = set(
            re.findall(r"models/\w+|[\w.-]+=[\d.]+|preset:\w+|[A-Z]+[A-Z\d]{2,}|\d+\.\d+",
                       ENGLISH[key]))
        named |= {
            str(option) for option in getattr(input, "options", None) or ()
            if f"{option}:" in ENGLISH[key]
        }
        assert not {word for word in named if word not in text}, key
