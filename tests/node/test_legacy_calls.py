"""Legacy ids called as Python, as scripts, servers and packs do that were written for the nodes of
ComfyUI-GGUF and NF4 packs.

What they do is written anew here in its few lines: exported workflows
(ComfyUI-to-Python-Extension), ComfyUI-MultiGPU's wrappers, packs that look a loader up by its id.
"""
import contextlib
import inspect

import comfy.sd
import folder_paths
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.validation import validate_node_input
from encoders import ENCODERS
from encoders.encoder import hidden_states, random_weights, write_encoder
from legacy_ids import CLIP, INPUTS, KJ, METHODS, MULTIGPU, NAME, NUNCHAKU, OUTPUTS, VAE
from model_folders import use_empty_folders
from pack_api import is_packed
from pack_nodes import node_list

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.nodes.legacy import loaders

pytestmark = pytest.mark.usefixtures("small_models")

NODE_CLASS_MAPPINGS = {node.GET_SCHEMA().node_id: node for node in node_list()}
LEGACY = [node_id for node_id in NODE_CLASS_MAPPINGS if not node_id.startswith("Featherweight")
          and "model" not in INPUTS[node_id]]  # those: test_legacy_nunchaku.py

# Small encoders of the kinds that the host takes together; file name -> its key in ENCODERS.
FILES = {
    "clip_l.gguf": "clip-l", "clip_g.gguf": "clip-g", "t5.gguf": "t5-xxl",
    "llama.gguf": "llama-3-8b"
}
VALUES = {
    **{
        f"clip_name{number}": name for number, name in enumerate(FILES, 1)
    }, "clip_name": "clip_l.gguf", "vae_name": "vae.gguf", "text_encoder1": "t5.gguf",
    "text_encoder2": "clip_l.gguf"
}
# Called by exported scripts only, with names.
BY_NAME = {**MULTIGPU, **KJ, **NUNCHAKU}


def inputs_of(node_id: str) -> dict:
    """Files for a node, and nothing but what it needs."""
    inputs = {
        name: VALUES.get(name, "flux.gguf") if default is NAME else default
        for name, default in INPUTS[node_id].items()
        if default is NAME or node_id.startswith("CheckpointLoaderAdvanced")
    }
    if "type" in inputs:
        inputs |= (
            {"type": "flux", "clip_name2": "t5.gguf"}
            if "clip_name2" in inputs
            else {"type": "stable_diffusion"}
        )
    return inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model under each name that `inputs_of` has, and small sizes for the host's
    encoders."""
    base = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        use_empty_folders(base, patch, "vae_approx")
        flux = tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1)
        for key in ("diffusion_models", "checkpoints"):
            write_gguf(base / key / "flux.gguf", flux, lambda name, values: "Q8_0")
        write_gguf(base / "vae" / "vae.gguf", tiny_models.autoencoder(), lambda name, values: "F16")
        sizes = {}
        for file, name in FILES.items():
            write_encoder(base / "text_encoders" / file, ENCODERS[name],
                          random_weights(ENCODERS[name]))
            sizes |= ENCODERS[name].model_options
        # the host takes it for the first CLIP
        sizes["model_config"] = ENCODERS["clip-l"].model_options["model_config"]
        load = loaders.load_text_encoder
        patch.setattr(
            loaders, "load_text_encoder", lambda *args, model_options=None: load(
                *args, model_options={**sizes, **(model_options or {})}))
        yield base


def get_value_at_index(values, index):
    """What each exported workflow has at its top."""
    try:
        return values[index]
    except KeyError:
        return values["result"][index]


def exported(node_id, node, inputs):
    """An exported workflow that was made with the other pack."""
    return get_value_at_index(getattr(node(), METHODS[node_id])(**inputs), 0)


def exported_from_here(node_id, node, inputs):
    """What an exporter makes of a workflow in a ComfyUI with this pack: it asks the class, and
    passes hidden inputs as well."""
    loader = node()
    names = [name for section in node.INPUT_TYPES().values() for name in section]
    values = {
        name: inputs.get(name, 7) for name in names
        if name in inputs or name in node.INPUT_TYPES().get("hidden", {})
    }
    return get_value_at_index(getattr(loader, loader.FUNCTION)(**values), 0)


def by_position(node_id, node, inputs):
    first, *_ = getattr(node(), METHODS[node_id])(*inputs.values())
    return first


def as_a_new_node(node_id, node, inputs):
    """A caller that knows the host's newer nodes."""
    return node.EXECUTE_NORMALIZED(**inputs).result[0]


def wrapped(node_id, node, inputs):
    """ComfyUI-MultiGPU: every input by position, those of the advanced loader on the plain one,
    types of its own."""
    loader = node()
    if METHODS[node_id] == "load_unet" and "GGUF" in node_id:
        return loader.load_unet(inputs["unet_name"], None, None, None)[0]
    if node_id.startswith(("Triple", "Quadruple")):
        return loader.load_clip(*inputs.values(), "stable_diffusion")[0]
    clip = getattr(loader, METHODS[node_id])(*inputs.values())
    if node_id == "DualCLIPLoaderGGUF":
        clip[0].patcher.load(force_patch_weights=True)
    return clip[0]


CALLS = [(call, node_id, inference) for node_id in LEGACY for call, inference in (
    (exported, True), (exported_from_here, True), (by_position, False), (as_a_new_node, False),
    (wrapped, True)) if node_id not in BY_NAME or call is exported]


@pytest.mark.parametrize(("call", "node_id", "inference"), [
    pytest.param(*case, id=f"{case[1]}-{case[0].__name__}-{'inference' if case[2] else 'no'}"
                           " mode") for case in CALLS])
def test_a_legacy_id_is_called_as_python(call, node_id, inference, models):
    with torch.inference_mode() if inference else contextlib.nullcontext():
        loaded = call(node_id, NODE_CLASS_MAPPINGS[node_id], inputs_of(node_id))
    if OUTPUTS[node_id] == CLIP:
        assert isinstance(loaded, comfy.sd.CLIP)
        assert any(map(is_packed, loaded.patcher.model.parameters()))
    elif OUTPUTS[node_id] == VAE:
        assert isinstance(loaded, comfy.sd.VAE) and loaded.first_stage_model is not None
    else:
        assert type(loaded.model).__module__ == "comfy.model_base"
        assert is_packed(loaded.model.diffusion_model.img_in.weight)


@pytest.mark.parametrize("node_id", LEGACY)
def test_the_method_of_a_legacy_id_gives_a_tuple_and_its_class_says_what_it_is(node_id, models):
    node = NODE_CLASS_MAPPINGS[node_id]
    assert node.FUNCTION == node().FUNCTION == METHODS[node_id]
    values = getattr(node, node.FUNCTION)(**inputs_of(node_id))
    values = values.result if node_id in KJ else values
    assert type(values) is tuple and len(values) == len(node.RETURN_TYPES)
    types = node.INPUT_TYPES()
    known = inspect.signature(getattr(node(), node.FUNCTION)).parameters
    assert {name for section in types.values() for name in section} <= known.keys() or node_id in {
        **MULTIGPU,
        **KJ,
    }
    assert "hidden" not in types  # what exporters would pass


def test_an_output_with_options_can_be_connected_to_an_input_with_options():
    """Also where /object_info describes them in the older way."""
    kind, _ = NODE_CLASS_MAPPINGS["UnetLoaderGGUF"].INPUT_TYPES()["required"]["unet_name"]
    assert validate_node_input(io.Combo.Output().io_type, kind)


@pytest.mark.parametrize("node_id", ["UnetLoaderGGUF", "UnetLoaderGGUFAdvanced"])
@pytest.mark.parametrize(("dequant", "patch"), [
    ("target", "target"), ("float16", "bfloat16"), ("bfloat16", "float32"), ("float16", "target")])
def test_dtypes_are_taken_by_either_loader_and_change_nothing(node_id, dequant, patch, models):
    def weight(dequant, patch):
        model, = NODE_CLASS_MAPPINGS[node_id]().load_unet(
            "flux.gguf", dequant_dtype=dequant, patch_dtype=patch, patch_on_device=True)
        layer = model.model.diffusion_model.img_in
        assert is_packed(layer.weight)
        return layer.convert_weight(layer.weight)

    assert torch.equal(weight(dequant, patch), weight("default", "default"))


@pytest.mark.parametrize(
    "node_id", [node_id for node_id in LEGACY if METHODS[node_id] == "load_clip"]
)
def test_a_text_encoder_loads_in_two_steps(node_id, models):
    loader, inputs = NODE_CLASS_MAPPINGS[node_id](), inputs_of(node_id)
    clip_type = comfy.sd.CLIPType[inputs.pop("type",
                                             "sd3" if "Triple" in node_id else "hidream").upper()]
    paths = [folder_paths.get_full_path("clip_gguf", name) for name in inputs.values()]
    data = loader.load_data(paths)
    assert len(data) == len(paths) and any(map(is_packed, data[0].values()))
    clip = loader.load_patcher(paths, clip_type, data)
    whole, = loader.load_clip(*inputs_of(node_id).values())
    assert torch.equal(hidden_states(clip), hidden_states(whole))
