"""Writes llms.txt and node_list.json: `python -m devtools.llms_text`, from the root.

Programs that write workflows read llms.txt, as they read that of ComfyUI's documentation: the nodes
with the ids of their inputs and what these take, which type fits which card, and links to the
pages. All of it comes from the code, pyproject.toml and docs/README.md. Headings stand over lists
of links alone, as llmstxt.org asks. By node_list.json, or by the ids in the pack's sources, ComfyUI
Manager finds the pack for a missing node.
"""
import inspect
import json
import re
from typing import Any

from devtools.measure import model_sizes

from comfy_api.latest import io
from pack_nodes import current_nodes

from devtools import ROOT
from featherweight.loaders.comfyui.compute import FOLLOW_COMPUTE
from featherweight.loaders.models.fit_device import FIT
from featherweight.loaders.packing.planning.for_device import FLOOR
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


def input_text(name: str, input_type, settings: dict, optional: bool, left_out) -> str:
    """Returns the line about an input of a node.

    Args:
        name: the id of the input.
        input_type: the host's name of what it takes.
        settings: the host's.
        optional: whether a prompt may lack it.
        left_out: the value that it then has.
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
    facts += ["optional" if optional else "required"]
    if optional and settings.get("default") not in (None, left_out):  # as earlier versions took it
        facts += [f"left out: {value_text(left_out)}"]
    shown = settings.get("display_name")
    title = f"`{name}`" + (f" (shown as {shown})" if shown and shown != name else "")
    tooltip = settings.get("tooltip", "")
    return f"    - {title}: {'; '.join(facts)}. {tooltip}".rstrip()


def node_text(node: type[io.ComfyNode]) -> str:
    """Returns the lines about a node."""
    info = node.GET_NODE_INFO_V1()
    left_out = {name: _left_out(parameter)
                for name, parameter in inspect.signature(node.execute).parameters.items()}
    inputs = [
        input_text(name, input_type, settings, group == "optional", left_out[name])
        for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()
        for input_type, settings in [_type_and_settings(spec)]
        # one of earlier workflows is of use where a prompt without it means what they meant
        if not settings.get("hidden") or left_out[name]
    ]
    outputs = ", ".join(name if name == output_type else f"{name} ({output_type})"
                        for name, output_type in
                        zip(info["output_name"], info["output"], strict=True))
    ends = "; an output node" * info["output_node"]
    return "\n".join([f"- `{info['name']}`, {info['display_name']}{ends}: {info['description']}",
                      *inputs, f"    - outputs, from 0: {outputs or 'none'}"])


def _left_out(parameter: inspect.Parameter):
    """Returns the value that an input has in a prompt without it; of a list, its first one."""
    value = parameter.default
    return next(iter(value), None) if isinstance(value, tuple) else value


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


def prompts() -> dict[str, dict]:
    """Returns prompts in API format, by what they are for."""
    def node(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": inputs}

    sampled: dict[str, Any] = {"seed": 1, "steps": 9, "cfg": 1.0, "sampler_name": "euler",
                               "scheduler": "simple", "denoise": 1.0}
    generate = {
        "1": node("FeatherweightLoadDiffusionModel", model_name="z_image_turbo-Q4_K_M.gguf"),
        "2": node("FeatherweightLoadTextEncoder", text_encoder_1="qwen_3_4b.safetensors"),
        "3": node("VAELoader", vae_name="ae.safetensors"),
        "4": node("CLIPTextEncode", clip=["2", 0], text="a red house"),
        "5": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        "6": node("KSampler", model=["1", 0], positive=["4", 0], negative=["4", 0],
                  latent_image=["5", 0], **sampled),
        "7": node("VAEDecode", samples=["6", 0], vae=["3", 0]),
        "8": node("SaveImage", images=["7", 0], filename_prefix="ComfyUI"),
    }
    dense = "z_image_turbo_bf16.safetensors"
    return {
        "load and generate": generate,
        "pack while loading": generate | {
            "1": node("FeatherweightLoadDiffusionModel", model_name=dense, pack_to="Q8_0")},
        "apply a LoRA": generate | {
            "6": node("KSampler", **{**generate["6"]["inputs"], "model": ["9", 0]}),
            "9": node("FeatherweightApplyLora", model=["1", 0], lora_name="lora.safetensors")},
        "save a packed model": {
            "1": node("FeatherweightLoadDiffusionModel", model_name=dense),
            "2": node("FeatherweightSavePackedModel", model=["1", 0], type="Q4_K")},
    }


def text(nodes: dict[str, type[io.ComfyNode]]) -> str:
    """Returns llms.txt.

    nodes: those of the pack, by their ids.
    """
    own = [node for name, node in sorted(nodes.items()) if name.startswith(OWN_PREFIX)]
    others = sorted(name for name in nodes if not name.startswith(OWN_PREFIX))
    return f"""# {setting("DisplayName")}

> {setting("description")}

Version {setting("version")}, for ComfyUI {setting("requires-comfyui")}. Prompts in API format \
take the ids and options below, letter by letter, and end in an output node, such as ComfyUI's \
`SaveImage`. Names of files: `GET /object_info/FeatherweightLoadDiffusionModel` lists those of an \
input as its options. Beside `compute` of the loaders write `"host_formats": "{FOLLOW_COMPUTE}"`: \
a prompt without it means what it meant before 0.2.2, where `exact` left layers in ComfyUI's own \
formats to ComfyUI's kernels on GPUs that have them.

{chr(10).join(f"To {title}, POST to `/prompt`: `{json.dumps({'prompt': prompt})}`{chr(10)}"
              for title, prompt in prompts().items())}
Which type: `pack_to` at `{FIT}` packs a file to what the GPU holds, while it loads. Of files to \
download, estimated: the largest type with which the whole model stays on the card, at least \
{FLOOR}; `{FLOOR}+0.9`: that type, of which 0.9 GB are copied in each step:

{model_sizes.cards_table()}
Nodes, with their inputs:

{chr(10).join(map(node_text, own))}

Ids of other packs, under which workflows for these open and run; in new ones use the nodes above: \
{", ".join(f"`{name}`" for name in others)}.

## Pages

{pages()}

## Help

{chr(10).join(f"- [{node.display_name}]({address(help_page(node.node_id))})"
              for node in (node.GET_SCHEMA() for node in own))}
"""


def help_page(node_id: str) -> str:
    """Returns the path of the English help page of a node of ours."""
    return f"nodes/web/docs/{node_id}.md"


def main():
    nodes = {node.GET_SCHEMA().node_id: node for node in current_nodes()}
    PATH.write_text(text(nodes), encoding="utf-8")
    names = {node_id: node.GET_SCHEMA().display_name for node_id, node in sorted(nodes.items())}
    NODE_LIST.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    print(f"{PATH} and {NODE_LIST}: {len(nodes)} nodes")


if __name__ == "__main__":
    main()
