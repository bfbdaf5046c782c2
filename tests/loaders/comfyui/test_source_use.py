"""What other nodes have set on a MODEL: Pack Model refuses what would go on computing with that
model's own blocks, says what only holds it, and takes the rest. The patchers have the forms of
public packs'."""
import functools
import os
import types
import unittest.mock
import weakref

import comfy.patcher_extension
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from families import FAMILIES, host_patcher, random_weights, shrunken_detection
from host_nodes import seeded, two_steps
from pack_api import WeightFileError, load_notes
from patched_models import relative, run, tiny_flux
from safetensors.torch import save_file

from featherweight.loaders.comfyui import source_use
from featherweight.loaders.models.pack_model import pack_model

pytestmark = pytest.mark.usefixtures("small_models")
ADVICE = "before the node that adds it, or choose `pack to` in a loader"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    save_file({name: value.bfloat16() for name, value in tiny_flux().items()}, path)
    return str(path)


@pytest.fixture
def patcher(path):
    return comfy.sd.load_diffusion_model(path).clone()


def sampled(patcher, family: str = "flux-schnell") -> torch.Tensor:
    """Two steps of the host's sampler, with all that is set on a MODEL."""
    latent, context = FAMILIES[family].latent, FAMILIES[family].context
    torch.manual_seed(0)
    with torch.inference_mode():
        return two_steps(patcher, 3.0, seeded(*latent), seeded(*latent, seed=4) / 2,
                         [[seeded(*context, seed=2), {}]], [[seeded(*context, seed=3), {}]])


class Holder:
    def __init__(self, value):
        self.value = value

    def __call__(self, *args, **kwargs):
        return self.value(*args, **kwargs)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def around(value):
    """A function that has a value in its closure."""
    return lambda *args, **kwargs: value(*args, **kwargs)


def of_default(value):
    return lambda *args, _value=value, **kwargs: _value(*args, **kwargs)


WAYS = {  # how a function reaches what it computes with
    "closure": around, "closure of a closure": lambda value: around(around(value)),
    "default": of_default, "partial": lambda value: functools.partial(around(value)),
    "callable instance": Holder, "instance in a closure": lambda value: around(Holder(value)),
    "list": lambda value: around([value]), "dict": lambda value: around({"a": (value,)}),
    "slots": lambda value: around(Slotted(value)),
    "weak reference": lambda value: around(weakref.ref(value)),
    "method of a helper": lambda value: Holder(value).__call__,
    "mock.patch": lambda value: around(unittest.mock.patch.multiple(Holder(value), value=1)),
}
BLOCKS = {"block": lambda network: network.double_blocks[0],
          "method of a block": lambda network: network.double_blocks[0].img_attn.qkv.forward}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("way", WAYS)
def test_what_reaches_a_block_is_refused_by_name(way, block, patcher):
    value = BLOCKS[block](patcher.model.diffusion_model)
    if (way, block) == ("weak reference", "method of a block"):
        pytest.skip("a bound method is gone at once")
    function = WAYS[way](value)
    by_name = {
        "diffusion_model.double_blocks.1.forward": lambda clone, name: (
            clone.add_object_patch(name, function)),
        "patches_replace dit ('double_block', 0)": lambda clone, _: (
            clone.set_model_patch_replace(function, "dit", "double_block", 0)),
        "model_function_wrapper": lambda clone, _: (
            clone.set_model_unet_function_wrapper(function)),
        "wrappers diffusion_model mine": lambda clone, _: clone.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "mine", function)}
    for name, add in by_name.items():
        clone = patcher.clone()
        add(clone, name)
        with pytest.raises(WeightFileError) as error:
            pack_model(clone, "Q8_0")
        assert f"wrapped {name} of the model" in str(error.value) and ADVICE in str(error.value)


def test_a_hook_in_the_model_that_calls_a_block_is_refused_and_one_that_is_copied_is_not(patcher):
    network = patcher.model.diffusion_model
    network.helper = Holder({"blocks": [network.double_blocks[0]], "by": network.img_in.forward})
    network.helper.value["part"] = functools.partial(network.img_in.forward)
    packed = pack_model(patcher, "Q8_0").model.diffusion_model
    assert packed.helper.value["blocks"][0] is packed.double_blocks[0]
    assert packed.helper.value["by"].__self__ is packed.img_in
    assert packed.helper.value["part"].func.__self__ is packed.img_in
    handle = network.single_blocks[0].register_forward_hook(around(network.double_blocks[0]))
    with pytest.raises(WeightFileError, match=r"single_blocks\.0\._forward_hooks of the model"):
        pack_model(patcher, "Q8_0")
    handle.remove()
    network.helper.value["function"] = around(network.double_blocks[0])
    with pytest.raises(WeightFileError, match=r"diffusion_model\.helper of the model"):
        pack_model(patcher, "Q8_0")


# --- patchers with the forms of public packs ---


def free_u(patcher):
    def output_block_patch(h, hsp, transformer_options):
        return h * scale, hsp

    scale = patcher.model.model_config.unet_config["hidden_size"] / 256
    patcher.set_model_output_block_patch(output_block_patch)


def guidance(patcher):
    """PAG, SAG, RescaleCFG and PerpNeg compute with the model that they are given."""
    sampling = patcher.get_model_object("model_sampling")
    patcher.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] * (args["sigma"] <= sampling.sigma_max))
    patcher.set_model_sampler_cfg_function(lambda args: args["cond"])


def hyper_tile(patcher):
    sizes = {}

    def hypertile_in(q, k, v, extra_options, **more):
        sizes[q.shape] = extra_options
        return {"q": q, "k": k, "v": v}

    patcher.set_model_attn1_patch(hypertile_in)
    patcher.set_model_attn1_output_patch(lambda out, options: out)


def deep_shrink(patcher):
    sigma_start = patcher.get_model_object("model_sampling").percent_to_sigma(0.1)
    patcher.set_model_input_block_patch(
        lambda h, options: h if options["sigmas"] > sigma_start else h * 1)


def ip_adapter(patcher):
    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleDict({"to_k": torch.nn.Linear(8, 8)})

        def forward(self, x):
            return x

    adapter = Adapter()
    patcher.set_model_patch_replace(Holder(adapter), "attn2", "input", 1)
    patcher.model_options["transformer_options"]["ip_adapter"] = {"adapter": adapter}


def skip_layers(patcher):
    patcher.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit",
                                    "double_block", 0)


class Attention:
    """Binds itself to a layer, as the NAG patches of ComfyUI-KJNodes do."""

    def __init__(self, scale):
        self.scale = scale

    def __get__(self, layer, kind=None):
        def forward(self_layer, *args, **kwargs):
            return type(self_layer).forward(self_layer, *args, **kwargs) * self.scale
        return types.MethodType(forward, layer)


def bound_layers(patcher):
    for index, block in enumerate(patcher.model.diffusion_model.double_blocks):
        patcher.add_object_patch(f"diffusion_model.double_blocks.{index}.img_attn.proj.forward",
                                 Attention(1.5).__get__(block.img_attn.proj, type(block)))


def other_positions(patcher):
    """DyPE: another embedder in the place of the model's, which a wrapper tells the step."""
    class Embedder(torch.nn.Module):
        def __init__(self, old):
            super().__init__()
            self.theta, self.axes, self.step = old.theta, old.axes_dim, 0

        def forward(self, ids):
            return type(old).forward(types.SimpleNamespace(
                theta=self.theta, axes_dim=self.axes), ids)

    old = patcher.model.diffusion_model.pe_embedder
    embedder = Embedder(old)

    def wrapper(apply_model, arguments):
        embedder.step += 1
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patcher.add_object_patch("diffusion_model.pe_embedder", embedder)
    patcher.set_model_unet_function_wrapper(wrapper)


def other_attention(patcher):
    patcher.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda original, *args, **kwargs: optimized_attention(*args, **kwargs))


def by_executor(patcher):
    def wrapper(executor, *args, **kwargs):
        assert executor.class_obj.double_blocks is not None
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "steps",
                                 wrapper)


WORK_ON_A_COPY = [free_u, guidance, hyper_tile, deep_shrink, ip_adapter, skip_layers, bound_layers,
                  other_positions, other_attention, by_executor]


@pytest.mark.parametrize("add", WORK_ON_A_COPY)
def test_none_that_works_on_a_copy_is_refused_or_told(add, patcher):
    add(patcher)
    packed = pack_model(patcher, "Q8_0")
    assert not load_notes(packed)
    assert relative(sampled(packed), sampled(patcher)) < 0.05


NODES = {  # ComfyUI's own, with which packs' are of one form
    "sd1.5": ["FreeU_V2", "PerturbedAttentionGuidance", "HyperTile",
              "PatchModelAddDownscale", "RescaleCFG", "TomePatchModel", "DifferentialDiffusion"],
    "flux-dev": ["ModelSamplingFlux", "EasyCache", "CFGZeroStar", "SkipLayerGuidanceDiT"],
}


@pytest.mark.parametrize("family", NODES)
def test_the_hosts_own_patchers_are_not_refused(family, monkeypatch):
    import asyncio

    import nodes

    shrunken_detection(FAMILIES[family], monkeypatch)
    patcher = host_patcher(random_weights(FAMILIES[family]), FAMILIES[family])
    for module in ("freelunch", "pag", "hypertile", "model_downscale", "tomesd",
                   "model_advanced", "differential_diffusion", "easycache", "cfg", "slg"):
        asyncio.run(nodes.load_custom_node(
            os.path.join(os.path.dirname(nodes.__file__), "comfy_extras", f"nodes_{module}.py"),
            module_parent="comfy_extras"))
    for name in NODES[family]:
        node = nodes.NODE_CLASS_MAPPINGS[name]
        inputs = node.INPUT_TYPES()["required"]
        defaults = {key: spec[1]["default"] if "default" in spec[-1] else spec[0][0]
                    for key, spec in inputs.items() if key != "model"}
        made = getattr(node, "execute", None) if hasattr(node, "define_schema") else None
        result = made(patcher, **defaults) if made else getattr(node(), node.FUNCTION)(
            model=patcher, **defaults)
        patched = (result.args if hasattr(result, "args") else result)[0]
        packed = pack_model(patched, "Q8_0")
        assert not load_notes(packed), name
        assert relative(sampled(packed, family), sampled(patched, family)) < 0.1, name


def compiled_blocks(patcher):
    """ComfyUI-KJNodes' node for Flux, and what wraps blocks to cache their outputs."""
    block = patcher.model.diffusion_model.double_blocks[0]
    patcher.add_object_patch("diffusion_model.double_blocks.0", torch.nn.Sequential(block))


def step_cache(patcher):
    """TeaCache's form: the forward of the model is another one while the wrapper runs."""
    network = patcher.get_model_object("diffusion_model")
    context = unittest.mock.patch.multiple(
        network, forward_orig=(lambda self, *args, **kwargs: None).__get__(network))

    def wrapper(apply_model, arguments):
        with context:
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patcher.set_model_unet_function_wrapper(wrapper)


def first_block_cache(patcher):
    """WaveSpeed's form: other lists of blocks, in which are the model's."""
    network = patcher.get_model_object("diffusion_model")
    blocks = torch.nn.ModuleList([torch.nn.ModuleList(network.double_blocks)])

    def wrapper(apply_model, arguments):
        with unittest.mock.patch.object(network, "double_blocks", blocks):
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patcher.set_model_unet_function_wrapper(wrapper)


def deep_cache(patcher):
    """DeepCache's form: the wrapper runs the blocks itself."""
    network = patcher.model.diffusion_model
    patcher.set_model_unet_function_wrapper(
        lambda apply_model, arguments: network.double_blocks[0](arguments["input"]))


def biased_attention(patcher):
    """A method of the copy that calls the source's, which it was made with."""
    layer = patcher.model.diffusion_model.double_blocks[0].img_attn.proj
    patcher.add_object_patch("diffusion_model.double_blocks.0.img_attn.proj.forward",
                             types.MethodType(lambda self, x, _original=layer.forward:
                                              _original(x) * 1.5, layer))


def joint_blocks(patcher):
    """An adapter whose replacement of a block is made with that block."""
    patcher.set_model_patch_replace(Holder(patcher.model.diffusion_model.double_blocks[0]), "dit",
                                    "double_block", 0)


@pytest.mark.parametrize("add", [compiled_blocks, step_cache, first_block_cache, deep_cache,
                                 biased_attention, joint_blocks])
def test_what_does_not_work_on_a_copy_is_refused(add, patcher):
    add(patcher)
    with pytest.raises(WeightFileError, match=f"of the model, as torch.compile does.*{ADVICE}"):
        pack_model(patcher, "Q8_0")


# --- what is told ---


def test_a_wrapper_that_holds_the_model_to_read_its_config_is_told_and_gets_the_copy(patcher):
    model, seen = patcher.model, []

    def wrapper(executor, *args, **kwargs):
        seen.append(executor.class_obj)
        assert model.model_config.unet_config["hidden_size"]
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "mine",
                                 wrapper)
    patcher.model_options["clone"] = Holder(patcher)
    packed = pack_model(patcher, "Q8_0")
    (note,) = load_notes(packed)
    assert note.startswith("clone, wrappers diffusion_model mine of another node holds the model")
    assert "put Pack Model (Featherweight) before that node" in note
    sampled(packed)
    assert seen and all(each is packed.model.diffusion_model for each in seen)


@pytest.mark.parametrize("bound", ["MAX_DEPTH", "MAX_OBJECTS"])
def test_what_holds_too_much_to_be_looked_through_is_told(bound, patcher, monkeypatch):
    value = patcher.model.diffusion_model.double_blocks[0]
    for _ in range(7):
        value = [value]
    if bound == "MAX_OBJECTS":
        monkeypatch.setattr(source_use, "MAX_DEPTH", 99)
        value = [[[index] for index in range(source_use.MAX_OBJECTS)], value]
    patcher.set_model_patch_replace(around(value), "dit", "double_block", 0)
    (note,) = load_notes(pack_model(patcher, "Q8_0"))
    assert note.startswith("patches_replace dit ('double_block', 0) of another node holds too much")


# --- a source that is changed ---


@pytest.mark.parametrize("change", [
    "a weight in place", "a weight is another", "a buffer", "nothing"])
def test_a_source_whose_weights_have_changed_is_packed_again(change, patcher):
    with torch.inference_mode():
        first = pack_model(patcher, "Q8_0")
        layer = patcher.model.diffusion_model.img_in
        if change == "a weight in place":
            layer.weight.data.mul_(1.5)
        elif change == "a weight is another":
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)
        elif change == "a buffer":
            sampling = patcher.model.model_sampling
            next(iter(sampling.buffers())).mul_(1.5)
        again = pack_model(patcher, "Q8_0")
        assert (again.model is first.model) == (change == "nothing")
    if change != "a buffer":
        assert relative(run(again), run(patcher)) < 0.05
