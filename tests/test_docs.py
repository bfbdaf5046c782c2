"""README, CONTRIBUTING and docs: what they list is what there is."""
import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

from devtools.measure import model_sizes
from devtools.measure.bench import roofline

import comfy.cli_args
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from folder_paths import folder_names_and_paths
from languages import HELP_LANGUAGES, LOCALES, help_page
from legacy_ids import LEGACY
from pack_api import GGML_FORMATS, ROW_TYPES, host_multiplies
from pack_nodes import current_nodes
from PIL import Image

from devtools import ROOT
from devtools.commands import COMMANDS
from devtools.demo import STEPS
from devtools.first_picture import FIRST_PICTURE
from devtools.host import environment, matrix
from devtools.host.package import packed_files
from devtools.workflows import BLUEPRINT_FOLDER, FIRST, FOLDER, example_paths
from devtools.workflows.__main__ import blueprint_index, index
from devtools.workflows.recommended import RECOMMENDED
from devtools.workflows.recommended import table as recommended_table
from devtools.workflows.workflow import Workflow
from featherweight.loaders.encoders.encoder_sets import TITLES
from featherweight.loaders.families import MODELS
from featherweight.loaders.files.gguf import UNSTORED_TYPES
from featherweight.loaders.models import pack_on_load
from featherweight.loaders.packing.planning import file_plan
from featherweight.loaders.packing.planning.for_device import (
    ENCODER_SHARE,
    GIB,
    HOST_RESERVE_BYTES,
    LORA_SHARE,
    MIN_STEP_BYTES,
    MODEL_SHARE,
    SYSTEM_BYTES,
    step_memory,
)
from featherweight.loaders.paths.folders import SENSITIVITY
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS
from featherweight.loaders.refusals.unsupported_quantizers import UNSUPPORTED_QUANTIZERS
from featherweight.nodes import (
    load_checkpoint,
    load_diffusion_model,
    load_side_models,
    load_text_encoder,
)
from featherweight.nodes.search_words import FAMILIES
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.host_versions import NEWEST_HOST, OLDEST_HOST
from featherweight.ops.kernels.cpp_backend import COMPILERS, NO_COMPILER, install_advice

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
COMPATIBILITY = PAGES["compatibility"]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'Repository = "(.*)"', PROJECT)[1]
SCHEMAS = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in current_nodes())}
CONTRIBUTING = [ROOT / "CONTRIBUTING.md", *(ROOT / ".github" / f"{name}.md"
                                            for name in ("adding", "publishing", "testing"))]
RECIPES, ARCHITECTURE = (re.sub(r"```.*?```", "", text, flags=re.S) for text in (
    "\n".join(path.read_text(encoding="utf-8") for path in CONTRIBUTING), PAGES["architecture"]))
ROOMS = ("nodes", "cluster", "loaders", "ops")
HOST_NAMES = ("add_patches",)
in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"),
                                   reason="needs git and its checkout")
LANGUAGES = {
    "en": "English",
    "ja": "Japanese",
    "ko": "Korean",
    "zh": "Simplified Chinese",
}


def test_compatibility_names_every_ggml_type_that_is_read():
    listed = set(re.split(r"[\s,·]+", COMPATIBILITY.split("GGUF types:")[1].split(";")[0]))
    assert {packed.name for packed in GGML_FORMATS.values()} == listed - {""}


def test_compatibility_names_the_ggml_types_and_quantisers_that_are_refused():
    refused = COMPATIBILITY.split("\nRefused, ")[1].split("\n\n")[0]
    named = set(re.findall(r"\b\w*Q\d\w*", refused))
    assert len(named) > 5 and named <= set(UNSTORED_TYPES.values())
    assert "MXFP4" in refused
    assert any("MXFP4" in text for text in UNSUPPORTED_QUANTIZERS.values())


def test_compatibility_names_every_format_of_comfyui_that_is_read():
    assert set(QUANT_ALGOS) <= set(COMFYUI_FORMATS)
    table = COMPATIBILITY.split("| format | written by |")[1].split("\n\n")[0]
    assert [name for name in COMFYUI_FORMATS
            if name not in table and name.removeprefix("float8_e4m3fn") not in table] == []


def test_compatibility_has_a_row_for_every_node_of_ours():
    rows = COMPATIBILITY.split("| node | what it does |\n|---|---|\n")[1].split("\n\n")[0]
    ours = [schema.display_name.partition(" (")[0] for schema in SCHEMAS.values()
            if schema.node_id.startswith("Featherweight")]
    assert len(ours) > 10
    cells = ", ".join(re.findall(r"^\| ([^|]+) \|", rows, re.M)).split(", ")
    assert sorted(cells) == sorted(ours)


def test_every_loader_of_ours_is_found_by_every_family_of_files():
    loaders = [schema for schema in SCHEMAS.values()
               if re.match("FeatherweightLoad", schema.node_id)]
    assert len(loaders) == 6
    for schema in loaders:
        for family in FAMILIES:
            assert any(alias.split()[-1] == family for alias in schema.search_aliases), (
                schema.node_id, family)


def test_the_versions_that_compatibility_says_were_tested_are_those_of_the_matrix():
    rows = re.findall(r"^\| (0\..*?) \|", COMPATIBILITY.split("## Nodes")[0], re.M)
    named = {number for row in rows for number in re.findall(r"\b0\.\d+\.\d+\b", row.split(",")[0]
             if "commit" in row else row)}
    assert named == set(matrix.VERSIONS) - set(matrix.TOO_OLD)
    assert f"| {OLDEST_HOST} to {NEWEST_HOST}; [newer]" in README
    assert {OLDEST_HOST, NEWEST_HOST} == {min(named, key=_numbers), max(named, key=_numbers)}
    oldest = OLDEST_HOST.removesuffix(".0")
    assert f"| older than {oldest} |" in COMPATIBILITY


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def test_the_languages_of_the_help_pages_are_named():
    sentence = " ".join(COMPATIBILITY.split("Help pages are in ")[1].split())
    named = {code for code, name in LANGUAGES.items() if name in sentence.partition(".")[0]}
    assert named == set(HELP_LANGUAGES)


def test_the_languages_of_the_tooltips_are_those_of_the_help_pages():
    assert {"en", *LOCALES} == set(HELP_LANGUAGES)


def test_architecture_names_every_folder_and_nothing_that_is_gone():
    paths = set(re.findall(r"`([\w/]+(?:/|\.py))`", ARCHITECTURE))
    assert [path for path in paths if "/" in path and not (ROOT / path).exists()] == []
    folders = {
        f"{path.parent.relative_to(ROOT).as_posix()}/" for room in ROOMS
        for path in (ROOT / room).glob("*/__init__.py")
    }
    assert folders | {f"{room}/" for room in ROOMS} <= paths


@pytest.mark.parametrize("way", re.findall(r"^## (The path of .*)$", ARCHITECTURE, re.M))
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
    for name in ("CONTRIBUTING.md", "dev.py"):
        assert size in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("language", HELP_LANGUAGES)
def test_the_list_of_text_encoders_has_every_model_with_its_type_and_encoders(language):
    page = help_page("FeatherweightLoadTextEncoder", language).read_text(encoding="utf-8")
    entries = re.findall(r"^- \*\*([^*]+)\*\* ?[(（](\w+)[)）][:：](.*)$", page, re.M)
    models = [model for model in MODELS if model.encoders]
    assert {clip_type for _, clip_type, _ in entries} == {type_of(model) for model in models}
    for model in models:
        titles = {title_in_files(key) for key in set().union(model.also, *model.encoder_groups)}
        assert any(
            model.name.split()[0] in names and clip_type == type_of(model)
            and all(title in encoders.replace("Llama 3.1", "Llama 3") for title in titles)
            for names, clip_type, encoders in entries), model.name


def type_of(model) -> str:
    """The type of its encoders; of those that ComfyUI tells by their weights, the first one."""
    return model.clip_type or "stable_diffusion"


def title_in_files(encoder: str) -> str:
    """What an encoder is called where its files are: those of Qwen2.5 are all of its VL."""
    return TITLES[encoder].partition(",")[0].removesuffix(" with vision").replace(
        "Qwen2.5 ", "Qwen2.5-VL ")


@pytest.mark.parametrize("make", [*model_sizes.TABLES, roofline.table],
                         ids=lambda make: make.__qualname__)
def test_the_choosing_page_has_the_tables_that_dev_py_prints(make):
    if make is model_sizes.accuracy_table:
        pytest.importorskip("bitsandbytes")
    assert make() in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


LINKED = [
    ROOT / name
    for name in ("README.md", "CHANGELOG.md", "SECURITY.md",
                 "example_workflows/README.md", "subgraphs/README.md", "demo_model/README.md")
] + CONTRIBUTING + sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "tests").rglob("*.md"))


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(path):
    """Also those of a packaged page to the repository on the web."""
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        for start in (f"{REPOSITORY}/blob/main/", f"{raw}/main/"):
            if link.startswith(start):
                target = ROOT / file.removeprefix(start)
                break
        else:
            if re.match("https?:", link):
                continue
        assert target.exists(), link
        headings = (
            re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if heading else []
        )
        assert not heading or heading in [
            re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings
        ], link


@in_a_checkout
def test_links_of_the_package_lead_to_files_of_the_package():
    packed = set(packed_files())
    folders = {parent.as_posix() for name in packed for parent in Path(name).parents}
    pages = [name for name in packed if name.endswith(".md") and not name.startswith("nodes/web")]
    assert len(pages) > 12
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            path = Path(os.path.normpath((ROOT / page).parent / link))
            target = path.relative_to(ROOT).as_posix()
            assert target in packed | folders, f"{page}: {link}"


@in_a_checkout
def test_pages_of_the_package_that_name_dev_py_say_where_it_is():
    for page in packed_files():
        text = (ROOT / page).read_text(encoding="utf-8") if page.endswith(".md") else ""
        if "dev.py" in text and page.count("/") < 2:
            parts = text.partition("\n## ")[0], text.partition("dev.py")[0]
            assert any(f"[repository]({REPOSITORY})" in part for part in parts), page


def test_the_index_of_the_docs_has_a_line_for_every_page():
    lines = re.findall(r"^\d+\. .*$", PAGES["README"], re.M)
    linked = {Path(link).name for line in lines for link in re.findall(r"\(([^)]*\.md)\)", line)}
    assert {f"{name}.md" for name in PAGES if name != "README"} <= linked
    assert [int(line.partition(".")[0]) for line in lines] == list(range(1, len(lines) + 1))


def test_the_readme_has_one_model_for_each_card_with_its_files():
    assert set(RECOMMENDED) == {6, 8, 10, 12, 16, 24}
    assert recommended_table() in README, "run `python -m devtools.workflows.recommended`"


@pytest.mark.parametrize("gib", RECOMMENDED)
def test_the_readme_recommends_what_the_table_of_types_has_for_the_card(gib):
    """That type, or where no file of it is known the next smaller one; whole, unless none is."""
    row = RECOMMENDED[gib]
    model = next(model for model in model_sizes.MODELS if model.name == row.model)
    best, _, copied = model_sizes.card_text(model, gib).partition("+")
    assert model_sizes.TYPES.index(row.type) >= model_sizes.TYPES.index(best)
    assert bool(row.copied(gib)) == bool(copied) and (not copied or row.type == best)
    name, size, _ = row.files["diffusion_models"]
    # about as large as the pack says of the type: _M keeps some matrices in larger types
    nbytes = model_sizes.bytes_of(model.shapes(), row.type)
    assert 0.97 < float(size.split()[0]) * 1e9 / nbytes < 1.14, name
    assert row.type in name
    if not (row.larger or copied):
        assert Workflow(FOLDER / f"{row.example}.json").card == f"{gib} GB card"
    memory = Workflow(FOLDER / f"{row.example}.json").memory
    assert row.type == best or f"{best} on {gib} GB" in memory


FITTED = [model for model in model_sizes.MODELS if model.config and step_memory(model.config())]


@pytest.mark.parametrize("gib", model_sizes.CARDS)
@pytest.mark.parametrize("model", FITTED, ids=lambda model: model.name)
def test_fit_this_gpu_chooses_what_the_table_of_types_has_or_a_better_mix(model, gib):
    best, _, copied = model_sizes.card_text(model, gib).partition("+")
    choice = model_sizes.fit_choice(model, gib)
    grades = model_sizes.TYPES
    assert f"{choice.copied / 1e9:.1f}" == (copied or "0.0")
    assert grades.index(choice.grade or "BF16") <= grades.index(best)


def test_choosing_says_what_less_main_memory_changes():
    """Of models that do not fit a card whole."""
    changed = {main: {model.name for model in FITTED for gib in model_sizes.CARDS
                      if model_sizes.card_text(model, gib, main_gib=main)
                      != model_sizes.card_text(model, gib)} for main in (16, 32)}
    assert changed[32] == {"Flux.2 dev"}
    flux = next(model for model in FITTED if model.name.startswith("Flux.1 dev"))
    assert model_sizes.card_text(flux, 8, main_gib=16).startswith("Q3_K")
    words = " ".join(PAGES["choosing"].split())
    assert ("64 GB of main memory; with 32 GB only Flux.2 dev changes, to Q2_K below 24 GB; with"
            " 16 GB Flux.1 dev is Q3_K below 10 GB") in words
    for gib, main, type_name in ((16, 32, "Q2_K"), (24, 32, "Q4_K")):
        model = next(model for model in FITTED if model.name == "Flux.2 dev")
        assert model_sizes.card_text(model, gib, main_gib=main).startswith(type_name)
    assert not model_sizes.card_text(flux, 10, main_gib=16).startswith("Q3_K")


def test_the_readme_says_what_flux_takes():
    flux = next(model for model in model_sizes.MODELS if model.name.startswith("Flux.1 dev"))
    dense, packed = (f"{model_sizes.bytes_of(flux.shapes(), column) / 1e9:.1f} GB"
                     for column in ("BF16", "Q4_K"))
    words = " ".join(README.split())
    assert f"Flux.1 dev takes {packed} as Q4_K instead of {dense}" in words


def test_every_page_and_text_calls_the_commands_alike():
    """pack.py and batch.py are run from ComfyUI's folder, with its Python; the portable version's
    from its own."""
    paths = [ROOT / name for name in ("pack.py", "batch.py", "README.md", "CONTRIBUTING.md")]
    for folder, suffix in (("docs", "md"), ("nodes/web/docs", "md"), ("example_workflows", "json"),
                           ("subgraphs", "json"), ("locales", "json")):
        paths += (ROOT / folder).rglob(f"*.{suffix}")
    calls = [call for path in paths for call in re.findall(
        r"\S+ \S*\b(?:pack|batch)\.py (?=[A-Za-z])(?=\S*(?:SOURCE|WORKFLOW|workflow))",
        path.read_text(encoding="utf-8"))]
    assert len(calls) > 4
    for call in calls:
        assert re.fullmatch(
            r"`?(python custom_nodes/ComfyUI-Featherweight/"
            r"|\.\\python_embeded\\python\.exe ComfyUI\\custom_nodes\\ComfyUI-Featherweight\\)"
            r"(pack|batch)\.py ", call), call


def test_the_readme_names_what_is_needed_and_which_compilers_are_looked_for():
    assert re.search(r'^dependencies = \["gguf>=[\d.]+"\]$', PROJECT, re.M)
    assert "one package, `gguf`" in README
    assert f"({', '.join(f'`{name}`' for name in COMPILERS)}; not Visual C++)" in README
    for page in ("performance", "environment"):
        assert all(f"`{name}`" in PAGES[page] for name in ("CXX", *COMPILERS, "ziglang")), page


def test_the_pages_say_what_to_install_where_no_compiler_is():
    command = install_advice().removeprefix(f'"{sys.executable}" ')
    assert command == "-m pip install ziglang" and "pip install ziglang" in README
    assert f"python_embeded\\python.exe {command}" in PAGES["troubleshooting"]
    most, = re.findall(r"up to (\d+) times", NO_COMPILER)
    for page in ("performance", "troubleshooting"):
        assert f"to {most} times" in PAGES[page], page


def test_the_readme_and_performance_say_alike_what_a_cpu_loses_without_a_compiler():
    row, = re.findall(r"^\| .* without a C\+\+ compiler \|(.*)\|$", PAGES["performance"], re.M)
    times = [float(number) for number in re.findall(r"[\d.]+", row)]
    assert f"[{min(times):.0f} to {max(times):.0f} times]" in README


@pytest.mark.parametrize(("gpu", "capability"), [
    ("RTX 50", (12, 0)), ("RTX 40", (8, 9)), ("RTX 30", (8, 6)), ("GTX 16, RTX 20", (7, 5)),
    ("GTX 10", (6, 1))])
def test_performance_says_what_comfyuis_kernels_multiply_on_a_gpu(gpu, capability, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    row, = re.findall(rf"^\| (?:[^|]*, )?{gpu}[^|]*\|[^|]*\|(.*)\|$", PAGES["performance"], re.M)
    said = {"exact": set()}.get(row.strip(), set(re.sub("by ComfyUI:|,", " ", row).split()))
    names = {"int8": "int8_tensorwise", "w4a8": "asym_w4a8_int8", "w4a4": "convrot_w4a4",
             "fp8": "float8_e4m3fn", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
    known = {short for short, name in names.items() if name in QUANT_ALGOS}
    device = torch.device("cuda")
    assert said & known == {short for short in known if host_multiplies(names[short], device)}


def test_the_error_of_int8_is_the_one_that_was_measured():
    table = PAGES["performance"]
    losses = re.search(r"^\| what `int8` loses in a layer \|(.*)\|$", table, re.M)[1]
    most = f"{100 * 10 ** (-float(losses.split('|')[0]) / 20):.1f}"
    said = {schema.node_id: input.tooltip for schema in SCHEMAS.values()
            for input in schema.inputs
            if input.id == "compute" and "int8" in input.options
            and schema.node_id.startswith("Featherweight")}
    assert len(said) == 2 and f"about {most} %" in PAGES["performance"]
    for node_id, tooltip in said.items():
        assert f"about {most} %" in tooltip
        for language in HELP_LANGUAGES:
            page = help_page("FeatherweightLoadDiffusionModel", language)
            assert f"{most} %" in page.read_text(encoding="utf-8")
            if language != "en":
                texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(
                    encoding="utf-8"))
                assert f"{most} %" in texts[node_id]["inputs"]["compute"]["tooltip"]
    names = [SCHEMAS[node_id].display_name.partition(" (") for node_id in said]
    words = " ".join(table.split())
    assert any(f"*{one[0]}* and *{''.join(other)}*" in words
               for one, other in (names, names[::-1]))


def test_packing_names_the_types_that_loaders_and_the_saving_node_have():
    row, = re.findall(r"^\| types \| (.*) \| (.*) \|$", PAGES["packing"], re.M)
    loading, saving = row
    assert set(re.findall(r"\w*Q\w+|NF4|\w+_\w+|mxfp8|nvfp4", loading)) == {
        *pack_on_load.LOAD_TYPES}
    added = set(file_plan.SAVE_TYPES) - set(pack_on_load.LOAD_TYPES)
    assert saving.startswith(f"the same and {', '.join(added)}, ")
    assert set(pack_on_load.LOAD_TYPES) <= {*file_plan.SAVE_TYPES, *ROW_TYPES}


def test_compatibility_counts_the_ids_of_other_packs():
    table = PAGES["compatibility"].partition("## Ids of other packs")[2]
    said = 0
    for cell in re.findall(r"^\| (.+?) \|", table, re.M)[1:]:
        counts = re.findall(r"\b(\d+) of", cell)
        said += sum(map(int, counts)) if counts else 1 + re.sub(r"\(.*?\)", "", cell).count(",")
    assert said == len(LEGACY)


RESERVE = [f"{nbytes / GIB:.1f} GiB" for nbytes in (SYSTEM_BYTES, HOST_RESERVE_BYTES,
                                                    MIN_STEP_BYTES)]
RESERVE.append(f"1/{1 / LORA_SHARE:.0f}")


@pytest.mark.parametrize("language", HELP_LANGUAGES)
def test_the_help_says_what_a_gpu_keeps_free(language):
    model, encoders = (
        " ".join(help_page(name, language).read_text(encoding="utf-8").split())
        for name in ("FeatherweightLoadDiffusionModel", "FeatherweightLoadTextEncoder"))
    assert [value for value in RESERVE if value not in model] == []
    assert RESERVE[2] in encoders


def test_choosing_says_what_a_gpu_keeps_free():
    words = " ".join(PAGES["choosing"].split())
    assert f"{RESERVE[0]} for CUDA and the desktop, and {RESERVE[3]} for LoRAs" in words
    halves = {1 / 2: "half", 1 / 4: "quarter"}
    text = " ".join(help_page("FeatherweightLoadDiffusionModel", "en").read_text(
        encoding="utf-8").split())
    assert (f"a diffusion model may take {halves[MODEL_SHARE]} of it, a text encoder"
            f" a {halves[ENCODER_SHARE]}") in text


def test_every_variable_that_the_pack_reads_is_on_the_page_of_variables():
    read = {
        name for room in ROOMS for path in (ROOT / room).rglob("*.py")
        for name in re.findall(r"\b(?:FEATHERWEIGHT_[A-Z_]+|COMFYUI_[A-Z]+|XDG_CACHE_HOME|CXX)\b",
                               path.read_text(encoding="utf-8"))
        if f'"{name}"' in path.read_text(encoding="utf-8")
    }
    assert len(read) > 6
    assert read == set(re.findall(r"^- \*\*`(\w+)`\*\*", PAGES["environment"], re.M))


def test_troubleshooting_names_the_folders_of_the_loaders():
    row = next(line for line in PAGES["troubleshooting"].splitlines()
               if line.startswith("| The file is not in the list |"))
    named = set(re.findall(r"`models/(\w+)`", row))
    keys = ("diffusion_models", "text_encoders", "checkpoints", "diffusers", "controlnet",
            "model_patches", "clip_vision", "vae", "loras")
    known = {Path(path).name for key in keys for path in folder_names_and_paths[key][0]}
    for folders in (load_checkpoint.FOLDERS, load_diffusion_model.FOLDERS,
                    load_side_models.CONTROLNET_FOLDERS, load_side_models.MODEL_PATCH_FOLDERS,
                    load_side_models.CLIP_VISION_FOLDERS, load_text_encoder.FOLDERS):
        assert {key.removesuffix("_gguf") for key in folders} - {"unet", "clip"} <= set(keys)
    assert named <= known and {*keys, "unet", "clip"} <= named


def test_trust_names_every_kind_of_file_that_nodes_write():
    said = PAGES["trust"].split("**It writes** only")[1].split("never into")[0]
    assert set(re.findall(r"`([^`]+)`", said)) == {".gguf", ".safetensors", SENSITIVITY}


def test_sizes_of_vram_flags_are_those_that_comfyui_has():
    flags = set(re.findall(r"`(--[\w-]*vram[\w-]*)", "".join(PAGES.values())))
    assert {"--reserve-vram", "--vram-headroom"} <= flags
    known = {
        option for action in comfy.cli_args.parser._actions for option in action.option_strings
    }
    assert flags <= known


def test_the_readme_names_the_two_commands_that_run_and_test_a_clone():
    section = README.split("## Run and test a clone")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, re.S)
    assert blocks[0].startswith("git clone ") and "&& cd " in blocks[0]
    assert blocks[1:] == ["python3 dev.py demo\n", "python3 dev.py test\n"]
    assert {"demo", "test"} <= COMMANDS.keys()
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith(f"\n{blocks[2]}")


def test_what_the_first_workflow_and_the_one_that_fits_take_is_said_as_their_notes_say_it():
    first, page = Workflow(example_paths()[0]), PAGES["getting-started"]
    name, = re.findall(r"template \*(.*?)\*", page)
    download, = re.findall(r"three files \(([\d.]+ GB)\)", page)
    fit, = re.findall(r"[\d.]+ GB on an? \d+ GB card", page)
    assert first.name.startswith(FIRST) and f"*{FIRST}*" in page and len(first.files) == 3
    assert f"{download} to download" in first.about
    assert fit in Workflow(FOLDER / f"{name}.json").memory


def test_the_example_for_a_cpu_is_as_the_page_for_users_of_fastsd_says():
    section = PAGES["migrate"].split("## FastSD")[1]
    (name, sampler), = re.findall(r"example \*(.*?)\*: sampler `(.*?)`, cfg 1, four", section)
    node, = Workflow(FOLDER / f"{name}.json").types("KSampler")
    assert node["widgets_values"][2:5] == [4, 1.0, sampler]


def test_the_screenshot_of_the_readme_shows_the_inputs_and_steps_that_there_are():
    with Image.open(FIRST_PICTURE) as picture:
        shown = json.loads(picture.text["Featherweight"])
    for node_id in ("FeatherweightLoadDiffusionModel", "FeatherweightLoadTextEncoder"):
        assert [name for name, _ in shown[node_id] if name in {
            input.id for input in SCHEMAS[node_id].inputs
        }] == [input.id for input in SCHEMAS[node_id].inputs]
    assert ["steps", STEPS] in shown["KSampler"]


def test_the_page_of_the_example_workflows_is_the_one_that_is_written():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == index(), "run `python -m devtools.workflows`"


def test_the_page_of_the_blueprints_is_the_one_that_is_written():
    page = (BLUEPRINT_FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == blueprint_index(), "run `python -m devtools.workflows`"
