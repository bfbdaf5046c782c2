"""Small packed models beside the host's own dense ones of the same values, and LoRAs of every kind
under their real names.

The dense model is the reference: the host patches it by itself, in float32.
"""
import contextlib
import functools
import tempfile

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import gguf
import pytest
import torch
from fake_gpus import ON_FAKE_GPUS
from host_formats import write_mixed
from pack_api import (
    FORMATS,
    PackedLayer,
    QuantizedTensor,
    compute,
    load_diffusion_model,
    open_weights,
    packed_tensor,
)
from user_kernels import without_kernels

from devtools.files import tiny_models
from devtools.files.gguf_files import dequantize, pack, write_gguf
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.patcher import adopt

FORMAT_NAMES = ("Q8_0", "Q4_K", "Q2_K", "IQ4_XS", "INT8")  # the last is bitsandbytes'
LIMIT = 1e-5  # of the effect that the patches have, in float32
RANK = 4
EXACT = " exact"
# the same where the host's product quantises the inputs of layers, also on a CPU
LIMITS = {"int8_tensorwise": 0.03}


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    # Windows removes no file that models still map
    return tempfile.TemporaryDirectory(prefix="featherweight", ignore_cleanup_errors=True)


def tiny_flux(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a Flux of one double and one single block; 19 matrices."""
    values = tiny_models.flux(seed, hidden=256, double_blocks=1, single_blocks=1, context=256)
    return {name: torch.from_numpy(value) for name, value in values.items()}


def flux_file(format_name: str, seed: int = 0) -> tuple[str, dict[str, torch.Tensor]]:
    """A small Flux: path of the packed file, and its values as the file's writer knows them.

    format_name: of GGUF, INT8 of bitsandbytes, or one of the host's, which is then beside NF4 and
    computed by the host, or with EXACT behind its name by this pack.
    """
    return _flux_file(format_name, seed)


# which takes a seed that is left out for another one: the file would be written while it is mapped
@functools.cache
@without_kernels()
def _flux_file(format_name: str, seed: int) -> tuple[str, dict[str, torch.Tensor]]:
    path = f"{folder().name}/flux-{format_name}-{seed}.gguf"
    tensors = tiny_flux(seed)
    if format_name not in FORMATS:
        pytest.importorskip("bitsandbytes", reason="it writes the file")
        from devtools.files.bnb_files import write_bnb_int8

        path = path.replace(".gguf", ".safetensors")
        if format_name == "INT8":
            return path, write_bnb_int8(path, tensors)
        return path, write_mixed(path, tensors, format_name.removesuffix(EXACT),
                                 exact=format_name.endswith(EXACT))[0]
    tensors = {name: values.numpy() for name, values in tensors.items()}
    seen = write_gguf(path, tensors, lambda name, values: format_name if values.ndim > 1 else "F32")
    return path, {name: torch.tensor(values) for name, values in seen.items()}


def dense_of(values: dict[str, torch.Tensor]):
    """The host's dense model of these values, which it may change."""
    return comfy.sd.load_diffusion_model_state_dict(
        {name: value.clone() for name, value in values.items()})


def dense_flux(format_name: str, seed: int = 0, dtype: torch.dtype | None = None):
    """The host's own dense model of the same values, on the CPU, where it applies patches in
    float32."""
    cpu = torch.device("cpu")
    options = {"load_device": cpu, "offload_device": cpu} if ON_FAKE_GPUS else {}
    options |= {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_diffusion_model_state_dict(dict(flux_file(format_name, seed)[1]),
                                                    model_options=options)


def packed_flux(format_name: str, seed: int = 0, dtype: torch.dtype | None = None):
    path, _ = flux_file(format_name, seed)
    if dtype is None:
        by = compute.EXACT if format_name.endswith(EXACT) else compute.COMFYUI
        return load_diffusion_model(path, host_formats=by)
    state_dict = open_weights(path).state_dict()
    options = {"custom_operations": operations_for(state_dict), "dtype": dtype}
    return adopt(comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options))


@functools.cache
def flux_pair(format_name: str, seed: int = 0) -> tuple:
    """(packed patcher, dense patcher), shared by tests: patch clones only."""
    return packed_flux(format_name, seed), dense_flux(format_name, seed)


def forget_models():
    """Free the shared models; some tests look at what is left when all packed layers are gone."""
    comfy.model_management.unload_all_models()
    flux_pair.cache_clear()


def packed_anyhow(values: torch.Tensor, format_name: str, seed: int = 0):
    """(packed tensor, its dense float32 values) of any shape; blocks may cross rows, as in a packed
    convolution."""
    stored = values.reshape(-1, FORMATS[format_name].block_length).numpy()
    data = pack(stored, format_name, seed)
    dense = dequantize(data, gguf.GGMLQuantizationType[format_name]).reshape(values.shape)
    return packed_tensor(
        FORMATS[format_name], torch.from_numpy(data), values.shape
    ), torch.from_numpy(dense)


# --- running and comparing ---


def flux_inputs(concat: bool = False) -> dict:
    generator = torch.Generator().manual_seed(5)
    inputs = {"x": torch.randn(1, 16, 8, 8, generator=generator), "t": torch.tensor([0.5]),
              "c_crossattn": torch.randn(1, 5, 256, generator=generator)}
    if concat:
        inputs["c_concat"] = torch.randn(1, 16, 8, 8, generator=generator)
    return inputs


def forward(patcher, inputs: dict | None = None) -> torch.Tensor:
    """One step of a model as it is loaded now."""
    inputs = inputs or flux_inputs()
    if ON_FAKE_GPUS:
        inputs = {name: value.to(patcher.load_device) for name, value in inputs.items()}
    with torch.no_grad():
        return patcher.model.apply_model(**inputs).float().cpu()


def step(patcher, arguments: dict | None = None) -> torch.Tensor:
    """Returns what a step predicts, with the attention that sampling would use."""
    arguments = dict(arguments or flux_inputs())
    options = (patcher.model_options["transformer_options"]
               | arguments.pop("transformer_options", {}))
    with torch.inference_mode():
        return patcher.model.apply_model(**arguments, transformer_options=options).float()


def run(patcher, inputs: dict | None = None) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher])
    return forward(patcher, inputs)


def hooks_in(patcher) -> int:
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks)
               for layer in patcher.model.modules())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def limit(format_name: str) -> float:
    """The largest `error_by_effect` of a model whose matrices are in a format."""
    return LIMITS.get(format_name, LIMIT)


def error_by_effect(actual: torch.Tensor, expected: torch.Tensor, without: torch.Tensor,
                    plain: torch.Tensor | None = None) -> float:
    """The error of a patched output divided by what the patches change; all in float32 and of a
    usual size.

    without: the output without patches, of the model that gave `expected`.
    plain: the same of the model that gave `actual`, where that is another one.
    """
    assert 0.02 < relative(expected, without) < 3, relative(expected, without)
    own = 0 if plain is None else plain - without
    return ((actual - expected - own).norm() / (expected - without).norm()).item()


def plain_outputs(packed, dense, format_name: str, run=run) -> tuple[torch.Tensor, torch.Tensor]:
    """What two models of the same values give without patches: the same, but for what the limit of
    the format allows."""
    own, without = run(packed), run(dense)
    assert relative(own, without) < limit(format_name)
    return own, without


def packed_layers(patcher) -> list[PackedLayer]:
    return [module for module in patcher.model.modules()
            if isinstance(module, PackedLayer) and isinstance(module.weight, QuantizedTensor)]


def parts(weight):
    """The plain tensors of a weight."""
    if not isinstance(weight, QuantizedTensor):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


class Ledger:
    """What the host does to base weights while a block runs: moves of layers, copies of packed
    tensors, storage kept."""

    def __init__(self, patcher):
        self.patcher = patcher
        self.layers = packed_layers(patcher)
        self.moves = self.copies = 0

    def __enter__(self):
        self.pointers = [layer.weight._qdata.data_ptr() for layer in self.layers]
        self.stack = contextlib.ExitStack()
        patch = pytest.MonkeyPatch()
        self.stack.callback(patch.undo)
        apply, dispatch = PackedLayer._apply, QuantizedTensor.__torch_dispatch__

        def counted_apply(layer, fn, recurse=True):
            self.moves += 1
            return apply(layer, fn, recurse)

        def counted_dispatch(func, kinds, args=(), kwargs=None):
            self.copies += any(name in str(func) for name in ("copy", "clone", "dequantize"))
            return dispatch(func, kinds, args, kwargs)

        patch.setattr(PackedLayer, "_apply", counted_apply)
        patch.setattr(QuantizedTensor, "__torch_dispatch__", staticmethod(counted_dispatch))
        return self

    def __exit__(self, *args):
        self.stack.close()
        self.kept = self.pointers == [layer.weight._qdata.data_ptr() for layer in self.layers]


# --- LoRAs ---

KINDS = (
    "lora",
    "locon",
    "dora",
    "dora-in",
    "loha",
    "loha-dora",
    "lokr",
    "lokr-dora",
    "oft",
    "boft",
    "glora",
    "diff",
    "set",
)


def adapter(kind: str, weight: torch.Tensor, seed: int, rank: int = RANK,
            size: float = 0.3) -> dict[str, torch.Tensor]:
    """Tensors of one adapter for a dense weight, under the names that follow the layer's own.

    size: about the norm of what it adds, divided by the norm of the weight.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale: float = 1.0):
        return torch.randn(shape, generator=generator) * scale

    kind, _, dora = kind.partition("-")
    rows, columns, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    spread = weight.std().item() * size
    ones = (1,) * len(kernel)
    if kind in ("lora", "dora"):
        dora = dora or kind.removeprefix("lora")
        tensors = {
            "lora_up.weight": normal(rows, rank, *ones, scale=spread),
            "lora_down.weight": normal(rank, columns,
                                       *kernel), "alpha": torch.tensor(float(rank) / 2)
        }
    elif kind == "locon":
        if not kernel:
            return adapter("lora", weight, seed, rank, size)
        tensors = {
            "lora_up.weight": normal(rows, rank, *ones,
                                     scale=spread), "lora_mid.weight": normal(rank, rank, *kernel),
            "lora_down.weight": normal(rank, columns, *ones,
                                       scale=0.5), "alpha": torch.tensor(float(rank) / 2)
        }
    elif kind == "loha":
        tensors = {
            "hada_w1_a": normal(rows, rank,
                                scale=spread), "hada_w1_b": normal(rank, weight[0].numel()),
            "hada_w2_a": normal(rows, rank, scale=0.5),
            "hada_w2_b": normal(rank, weight[0].numel()), "alpha": torch.tensor(float(rank) / 2)
        }
    elif kind == "lokr":
        tensors = {
            "lokr_w1": normal(4, 4, scale=spread), "lokr_w2_a": normal(rows // 4, rank, scale=0.5),
            "lokr_w2_b": normal(rank, weight[0].numel() // 4), "alpha": torch.tensor(float(rank))
        }
    elif kind == "oft":
        tensors = {
            "oft_blocks": normal(rows // 8, 8, 8, scale=size / 8), "alpha": torch.tensor(0.0)
        }
    elif kind == "boft":
        tensors = {
            "oft_blocks": normal(2, rows // 8, 8, 8, scale=size / 8), "alpha": torch.tensor(0.0)
        }
    elif kind == "glora":
        tensors = {
            "a1.weight": normal(columns, rank, scale=size / columns**0.5),
            "a2.weight": normal(rank, columns,
                                scale=1 / rank), "b1.weight": normal(rows, rank, scale=spread),
            "b2.weight": normal(rank, weight[0].numel())
        }
    elif kind == "diff":
        tensors = {
            "diff": normal(*weight.shape, scale=spread), "diff_b": normal(rows, scale=size / 4)
        }
    elif kind == "set":
        tensors = {"set_weight": weight + normal(*weight.shape, scale=spread)}
    if dora:
        by_column = weight.transpose(0, 1).flatten(1).norm(dim=1)[None]
        norms = by_column if dora == "in" else weight.flatten(1).norm(dim=1)[:, None]
        tensors["dora_scale"] = (norms * (1 + normal(*norms.shape, scale=size / 2))).reshape(
            *norms.shape, *ones)
    return tensors


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def lora_for(values: dict[str, torch.Tensor], kind: str = "lora", seed: int = 0, layer_name=kohya,
             **options) -> dict:
    """A LoRA file for every matrix of a model of these dense values; layer_name: what its author
    calls a layer."""
    lora = {}
    for index, (name, weight) in enumerate(values.items()):
        if weight.ndim < 2:
            continue
        for suffix, tensor in adapter(kind, weight, 1000 * seed + index, **options).items():
            lora[f"{layer_name(name.removesuffix('.weight'))}.{suffix}"] = tensor
    return lora


def patched(patcher, *loras):
    """A clone with LoRAs stacked by the host's own loader: (LoRA, strength) each."""
    for lora, strength in loras:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)
    return patcher


def broken(lora: dict, kind: str) -> dict:
    """`lora` with every adapter spoilt in one way."""
    for name in list(lora):
        tensor = lora[name]
        if kind == "wrong rows" and name.endswith(("up.weight", "w1_a", "w2_a", "diff")):
            lora[name] = torch.cat([tensor, tensor])
        elif kind == "wrong columns" and name.endswith(
            ("down.weight", "w1_b", "w2_b", "diff", "lokr_w1")
        ):
            lora[name] = torch.cat([tensor, tensor], 1)
        elif kind == "ranks that differ" and name.endswith(("down.weight", "w1_b", "w2_b")):
            lora[name] = torch.cat([tensor, tensor])
        elif kind == "rank 0" and name.endswith(("up.weight", "w1_a", "w2_a")):
            lora[name] = tensor[:, :0]
        elif kind == "rank 0" and name.endswith(("down.weight", "w1_b", "w2_b")):
            lora[name] = tensor[:0]
        elif kind in ("nan", "inf") and name.endswith(
            ("up.weight", "w1_a", "lokr_w1", "diff", "oft_blocks")
        ):
            tensor.view(-1)[7] = float(kind)
        elif kind == "wrong blocks" and name.endswith("oft_blocks"):
            lora[name] = torch.cat([tensor, tensor], -3)
    return lora
