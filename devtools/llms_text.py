"""Writes llms.txt and node_list.json: `python -m devtools.llms_text`, from the root.

Programs that write workflows read llms.txt, as they read that of ComfyUI's documentation: the nodes
with the ids of their inputs and what these take, which type fits which card, and links to the
pages. All of it comes from the code, pyproject.toml and docs/README.md. Headings stand over lists
of links alone, as llmstxt.org asks. By node_list.json, or by the ids in the pack's sources, ComfyUI
Manager finds the pack for a missing node.
"""
import json
import re

from devtools.measure import model_sizes

from pack_nodes import current_nodes

from devtools import ROOT
from featherweight.loaders.models.compute_choice import BY_COMPUTE
from featherweight.loaders.models.fit_device import FIT
from featherweight.nodes import OWN_PREFIX

PATH, NODE_LIST = ROOT / "llms.txt", ROOT / "node_list.json"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# options that only some machines have: files, and numbered devices
OF_A_MACHINE = re.compile(r".*\.\w+|(gpu|cuda):\d+")
FACTS = ("default", "min", "max")  # of an input, in this order


def setting(name: str) -> str:
    """Returns the text of a setting in pyproject.toml."""
    value, = re.findall(rf'^{name} = "(.*)"$', PROJECT, re.M)
    return value


def address(path: str) -> str:
    """Returns the web address of a file of the repository."""
    return f"{setting('Repository')}/blob/main/{path}"


def value_text(value) -> str:
    """Returns a default or a limit, as JSON has it where that differs from Python."""
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def input_text(name: str, input_type, settings: dict, optional: bool) -> str:
    """Returns the lines about an input of a node.

    Args:
        name: the id of the input.
        input_type: the host's name of what it takes.
        settings: the host's.
        optional: whether a prompt may lack it.
    """
    facts = [input_type]
    if "COMBO" in (types := input_type.split(",")):
        offered = [option for option in settings.get("options", ())
                   if not OF_A_MACHINE.fullmatch(str(option))]
        facts = [f"one of: {', '.join(map(str, offered))}" if len(offered) > 1 else
                 " or ".join(["a name that ComfyUI lists", *map(str, offered)])]
        facts += [f"or a connection of {', '.join(types[1:])}"] * (len(types) > 1)
    facts += [f"{fact} {value_text(settings[fact])}" for fact in FACTS
              if fact in settings and not isinstance(settings[fact], list)]
    facts += ["optional"] * optional
    shown = settings.get("display_name")
    title = f"`{name}`" + (f" (shown as {shown})" if shown and shown != name else "")
    tooltip = settings.get("tooltip", "")
    return f"    - {title}: {'; '.join(facts)}. {tooltip}".rstrip()


def node_text(node: dict) -> str:
    """Returns the lines about a node.

    node: what the host says of it at /object_info.
    """
    inputs = [
        input_text(name, input_type, settings, group == "optional")
        for group in ("required", "optional") for name, spec in node["input"].get(group, {}).items()
        for input_type, settings in [_type_and_settings(spec)] if not settings.get("hidden")
    ]
    outputs = ", ".join(name if name == output_type else f"{name} ({output_type})"
                        for name, output_type in
                        zip(node["output_name"], node["output"], strict=True))
    return "\n".join([f"- `{node['name']}`, {node['display_name']}: {node['description']}",
                      *inputs, f"    - outputs, from 0: {outputs or 'none'}"])


def _type_and_settings(spec: list | tuple) -> tuple:
    input_type, settings = spec[0], dict(*spec[1:])
    if isinstance(input_type, list):  # its options, as older nodes describe them
        return "COMBO", {**settings, "options": input_type}
    return input_type, settings


def pages() -> str:
    """Returns the links of docs/README.md, with addresses that lead there from anywhere."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    links = []
    for line in re.findall(r"^\d+\. (.*)$", index, re.M):
        about = line.partition("): ")[2]
        for title, path in re.findall(r"\[([^]]+)\]\(([^)]+)\)", line):
            if not path.startswith("https:"):
                file = (ROOT / "docs" / path).resolve().relative_to(ROOT).as_posix()
                path = address(file)
            links.append(f"- [{title[0].upper()}{title[1:]}]({path})" + f": {about}" * bool(about))
    return "\n".join(links)


def text(nodes: dict[str, dict]) -> str:
    """Returns llms.txt.

    nodes: what the host says of the pack's nodes, by their ids, as at /object_info.
    """
    own = [node for name, node in sorted(nodes.items()) if name.startswith(OWN_PREFIX)]
    others = sorted(name for name in nodes if not name.startswith(OWN_PREFIX))
    return f"""# {setting("DisplayName")}

> {setting("description")}

Version {setting("version")}, for ComfyUI {setting("requires-comfyui")}. Prompts in API format \
take the ids and options below, letter by letter. Beside `compute` of the loaders write \
`"host_formats": "{BY_COMPUTE}"`: a prompt without it means what it meant before 0.2.2, where \
`exact` left layers in ComfyUI's own formats to ComfyUI's kernels on GPUs that have them.

Which type: `pack_to` at `{FIT}` packs a file to what the GPU holds, while it loads. Of files to \
download: the largest type with which the whole model stays on the card, estimated (partly: none \
of these):

{model_sizes.cards_table()}
Nodes, with their inputs:

{chr(10).join(map(node_text, own))}

Ids of other packs, under which workflows for these open and run; in new ones use the nodes above: \
{", ".join(f"`{name}`" for name in others)}.

## Pages

{pages()}

## Help

{chr(10).join(f"- [{node['display_name']}]({address(help_page(node['name']))})" for node in own)}
"""


def help_page(node_id: str) -> str:
    """Returns the path of the English help page of a node of ours."""
    return f"nodes/web/docs/{node_id}.md"


def main():
    nodes = {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in current_nodes()}
    PATH.write_text(text(nodes), encoding="utf-8")
    names = {node_id: node["display_name"] for node_id, node in sorted(nodes.items())}
    NODE_LIST.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    print(f"{PATH} and {NODE_LIST}: {len(nodes)} nodes")


if __name__ == "__main__":
    main()
