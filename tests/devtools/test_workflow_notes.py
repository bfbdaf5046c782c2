"""The gigabytes in the notes of workflows are those of the tables in docs/choosing.md."""
import re

from devtools.measure import model_sizes

import pytest

from devtools import ROOT
from devtools.workflows import blueprint_paths, example_paths
from devtools.workflows.workflow import Workflow
from featherweight.loaders.models.fit_device import FIT
from featherweight.loaders.packing.planning.for_device import (
    FAST_TYPE,
    Memory,
    Sizes,
    Weights,
    choose,
    step_memory,
    workspace_bytes,
)

WORKFLOWS = {path.stem: Workflow(path) for path in (*example_paths(), *blueprint_paths())}
each = pytest.mark.parametrize("name", WORKFLOWS)
# The rows of the tables, by the beginnings of files' names in lower case.
ROWS = {
    "flux1-": "Flux.1 dev, schnell, Kontext", "flux2-dev": "Flux.2 dev",
    "flux-2-klein-4b-q": "Flux.2 Klein 4B",
    "flux-2-klein-9b-q": "Flux.2 Klein 9B", "krea-2": "Krea 2",
    "minimax_h3_fl2va_pruned": "MiniMax-H3 pruned", "qwen3-8b": "Qwen3 8B",
    "sd3.5_large": "SD3.5 Large", "sd3.5_medium": "SD3.5 Medium",
    "stable-diffusion-xl": "SDXL", "qwen-image": "Qwen-Image, Qwen-Image-Edit",
    "z-image": "Z-Image", "z_image": "Z-Image", "wan2.2-ti2v-5b": "Wan 2.2 5B",
    "wan2.1-t2v-14b": "Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)",
    "wan2.2-t2v-a14b": "Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)",
    "wan2.2-i2v-a14b": "Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)", "ltx-2-19b": "LTX-2",
    "t5-v1_1-xxl": "T5-XXL", "umt5-xxl": "UMT5-XXL", "qwen3-4b": "Qwen3 4B",
    "qwen_3_4b": "Qwen3 4B", "qwen2.5-vl-7b": "Qwen2.5-VL 7B", "gemma-3-12b": "Gemma 3 12B",
}
# The table of cards has rows of their own for models that read an image: word in a file -> row.
OF_CARDS = {
    "Flux.1 dev, schnell, Kontext": {"kontext": "Flux.1 Kontext", "": "Flux.1 dev, schnell"},
    "Qwen-Image, Qwen-Image-Edit": {"edit": "Qwen-Image-Edit", "": "Qwen-Image"},
}
# Types that the tables have no column for, and one that takes as many bits.
ALIKE = {"Q4_0": "NF4", "Q5_0": "Q4_K"}  # the latter in SD3.5 Large, in the place of Q4_K
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
GIB = 2**30 / 1e9
MODELS = {model.name: model for model in model_sizes.MODELS}
ON_A_CARD = r"([\d.]+) GB on an? (\d+) GB card"
BEST = r"((Q\d_\w) on (\d+) GB(?: \(([\d.]+) GB copied)?)"
FITS = r"^Fits an? (\d+) GB card"  # with the whole model on it


def table(start: str) -> dict[str, dict[str, str]]:
    """Returns the cells of a table of the page by row and column."""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    lines = page[page.index(start):].partition("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {row[0]: dict(zip(head, row)) for row in rows}


SIZES, CARDS = table("| GB | "), table("| model | for | ")


def row_of(file: str) -> str | None:
    name = file.rpartition("/")[2].lower()
    return next((row for start, row in ROWS.items() if name.startswith(start)), None)


def model_of(workflow: Workflow) -> tuple[str | None, str]:
    """Returns the row of its model, and the path of the file; of two files: of the first."""
    files = [file for file in workflow.files
             if file.startswith(("diffusion_models/", "checkpoints/"))]
    return (row_of(files[0]), files[0]) if files else (None, "")


def card_row_of(row: str | None, file: str) -> str | None:
    rows = OF_CARDS.get(row, {"": row})
    return next(found for word, found in rows.items() if word in file.lower())


def size_of(row: str, type_name: str) -> float:
    return float(SIZES[row][ALIKE.get(type_name, type_name)])


def wrong_sizes(workflow: Workflow) -> list[str]:
    """Returns sizes of types, and sizes of files by the types in their names, that differ."""
    row, _ = model_of(workflow)
    wrong = [text for text, size, type_name in
             re.findall(r"(([\d.]+) GB as (Q\d_\w))", workflow.memory)
             if row and abs(float(size) - size_of(row, type_name)) > 0.01]
    for file, size in workflow.files.items():
        type_name = re.search(r"-(Q\d_[K0])(_[SM])?\.gguf$", file)
        if not (row := row_of(file)) or not type_name or not size:
            continue
        least = most = size_of(row, type_name[1])
        if type_name[2] == "_M":  # some of its matrices have the next type
            most = size_of(row, TYPES[TYPES.index(type_name[1]) + 1])
        if file.startswith("diffusion_models/") or "text_encoders" in file:
            wrong += [f"{file} {size}"] * (not least - 0.1 < float(size.split()[0]) < most + 0.1)
    return wrong


def wrong_cards(workflow: Workflow) -> list[str]:
    """Returns statements about cards that differ: the type for a card, and on which card the model
    stays whole."""
    row, file = model_of(workflow)
    cards = CARDS.get(card_row_of(row, file))
    if cards is None:
        return []
    images = "image that it reads" in workflow.memory

    def best_on(card: str) -> str:
        return model_sizes.card_text(MODELS[row], int(card), images)

    wrong = [text for text, type_name, card, copied in re.findall(BEST, workflow.memory)
             if "+".join(filter(None, (type_name, copied))) != best_on(card)]
    card, size = workflow.figure(FITS), workflow.files[file]
    if card and size and not file.startswith("checkpoints/"):
        smallest = next(gib for gib in model_sizes.CARDS
                        if room_on(gib, row, images) > float(size.split()[0]) - 0.05)
        if int(card) != smallest:
            wrong.append(f"whole on {card} GB, not {smallest} GB")
        own = re.search(r"-(Q\d_[K0])", file)
        best = best_on(card)
        is_alone = "and module take" not in workflow.memory
        if is_alone and own and own[1] != best and f"{best} on {card} GB" not in workflow.memory:
            wrong.append(f"nothing about {best} on {card} GB")
    return wrong


def room_on(gib: int, row: str, images: int = 0, is_packed: bool = True) -> float:
    """Returns the GB that a card has for the weights of a model that gets so many images."""
    model = MODELS[row]
    workspace = workspace_bytes(model.shapes()) if is_packed else 0
    if model.is_encoder:
        return Memory(gib).for_encoder(workspace) / 1e9
    return Memory(gib).for_model(step_memory(model.config(), images)[0], workspace) / 1e9


def chosen(gib: int, row: str) -> tuple[float, float]:
    """Returns the GB that the weights of a file in bf16 take with *fit this GPU*, where ComfyUI
    multiplies int8, and those that are copied."""
    model = MODELS[row]
    shapes = model.shapes()
    sizes = Sizes([Weights(shapes, model_sizes.bytes_of(shapes, "BF16"), {})])
    choice = choose(sizes, lambda nbytes: int(room_on(gib, row, is_packed=bool(nbytes)) * 1e9),
                    multiplies_int8=not model.is_encoder, main=1 << 40)
    size = {"": sizes.nbytes, FAST_TYPE: sizes.fast}.get(choice.target, choice.target)
    return size / 1e9, choice.copied / 1e9


def wrong_fits(workflow: Workflow) -> list[str]:
    """Returns what is chosen on which card, for the model and the text encoder, that differs."""
    row, _ = model_of(workflow)
    encoder, = (file for file in workflow.files if file.startswith("text_encoders/"))
    said = {int(gib): size for size, gib in re.findall(ON_A_CARD, workflow.memory)}
    of_encoder = re.findall(r"([\d.]+) GB", workflow.figure(r"The text encoder takes (.*? GB)\. "))
    wrong = [f"{size} GB on {gib} GB" for sizes, name in
             ((said.values(), row), (of_encoder, row_of(encoder)))
             for gib, size in zip(said, sizes, strict=True)
             if f"{chosen(gib, name)[0]:.1f}" != size]
    copied = workflow.figure(r"with ([\d.]+) GB of it copied in each step")
    wrong += [f"{copied} copied"] * (f"{chosen(min(said), row)[1]:.1f}" != copied)
    whole = int(workflow.figure(r"From (\d+) GB on it stays in bf16"))
    smallest = next(gib for gib in model_sizes.CARDS
                    if room_on(gib, row, is_packed=False) >= float(SIZES[row]["BF16"]))
    return wrong + [f"from {whole} GB on, not {smallest} GB"] * (whole != smallest)


def wrong_work(workflow: Workflow) -> list[str]:
    """Returns what ComfyUI sets aside, where it is not that of the table for the same size."""
    cards = CARDS.get(card_row_of(*model_of(workflow)))
    wrong = []
    for text, gigabytes, width, height, frames, more in re.findall(
            r"(sets ([\d.]+)(?: to [\d.]+)? GB aside for the computation at (\d+) × (\d+)"
            r"(?: and (\d+) frames)?)(?! and| frames| with)(?:, and ([\d.]+) GB more for)?",
            workflow.memory):
        size = f"{width} × {height}" + (f", {frames} frames" if frames else "")
        if cards is not None and cards["for"].partition(", with an image")[0] == size:
            expected = float(cards["work, GiB"]) * GIB
            wrong += [text] * (
                abs(float(gigabytes) + float(more or 0) * ("image" in cards["for"])
                    - expected) > 0.1)
    return wrong


@each
def test_a_note_says_of_types_and_files_what_the_tables_say(name):
    assert wrong_sizes(WORKFLOWS[name]) == []


@each
def test_a_note_says_of_cards_what_the_tables_say(name):
    assert wrong_cards(WORKFLOWS[name]) == []


@each
def test_a_note_says_what_comfyui_sets_aside_as_the_tables_do(name):
    assert wrong_work(WORKFLOWS[name]) == []


FITTING = [name for name, workflow in WORKFLOWS.items()
           if any(FIT in node["widgets_values"] for node in workflow.nodes)]


def test_fit_this_gpu_has_an_example():
    assert [path for path in example_paths() if path.stem in FITTING]


@pytest.mark.parametrize("name", FITTING)
def test_a_note_says_what_is_chosen_for_which_card(name):
    assert wrong_fits(WORKFLOWS[name]) == []


def test_most_notes_speak_of_models_that_the_tables_have():
    known = [name for name, workflow in WORKFLOWS.items() if model_of(workflow)[0]]
    assert len(known) > 0.8 * len(WORKFLOWS)
