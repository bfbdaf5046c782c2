"""What other code may do to a packed tensor, tried one after another: `python tensor_attempts.py
START`.

Prints a line of JSON before and after each attempt from number START on, so that the reader knows
which one ended the process.
"""
import contextlib
import copy
import functools
import io
import json
import pickle
import sys
import tempfile
import types
import warnings

import comfyui_and_pack  # noqa: F401  puts the host on the path

import numpy as np
import safetensors.torch
import torch
from pack_api import FORMATS, QuantizedTensor, packed_operations, packed_tensor

from devtools.files.gguf_files import pack
from featherweight.ops.formats.bnb_int8 import INT8

SHAPE = (16, 16)
VALUES = np.random.default_rng(0).standard_normal(256, dtype=np.float32)


@functools.cache
def stored(format_name: str) -> tuple:
    """(format, codes, scales or None) of one weight."""
    generator = torch.Generator().manual_seed(0)
    if format_name == "NF4":
        codes = torch.randint(0, 256, (128,), dtype=torch.uint8, generator=generator)
        return FORMATS["NF4"], codes, torch.rand(4, generator=generator)
    if format_name == "INT8":
        codes = torch.randint(0, 256, (256,), dtype=torch.uint8, generator=generator)
        return INT8.of_columns(16), codes, torch.rand(16, generator=generator)
    return FORMATS[format_name], torch.from_numpy(pack(VALUES, format_name)).flatten(), None


def packed(format_name: str):
    packed_format, codes, scale = stored(format_name)
    return packed_tensor(packed_format, codes.clone(), SHAPE,
                         scale=None if scale is None else scale.clone())


# --- every attribute ---

# what speaks of the object and not of its values, makes another, or leaves memory as it was
NOT_COMPARED = {
    "__class__", "__dict__", "__dir__", "__doc__", "__format__", "__getattribute__", "__getstate__",
    "__hash__", "__init__", "__module__", "__new__", "__reduce__", "__reduce_ex__", "__repr__",
    "__sizeof__", "__str__", "_cdata", "_use_count", "nbytes", "new", "new_empty",
    "new_empty_strided", "untyped_storage", "_version", "_python_dispatch", "__torch_dispatch__",
    "__torch_function__", "__dlpack_c_exchange_api__"
}
OTHER, INDEX = torch.linspace(0.5, 2, 256).view(SHAPE), torch.zeros(SHAPE, dtype=torch.long)
ROWS, MASK, VECTOR = (
    torch.tensor([3, 1]),
    torch.eye(16, dtype=torch.bool),
    torch.linspace(-1, 1, 16),
)
ARGUMENTS = [  # of these most methods take one list
    (), (2,), (0,), (0.5,), (0, 1), (0, 1, 2), (OTHER,), (ROWS,), (MASK,), (VECTOR,), ((16, 16),),
    (4, 64), (torch.float16,), (torch.int32,), (torch.uint8,), ("cpu",), (None,), (OTHER, OTHER),
    (VECTOR, VECTOR), (MASK, 1.0), (MASK, OTHER), (0, ROWS), (0, INDEX), (0, ROWS, 1.0),
    (0, ROWS, OTHER[:2]), (0, INDEX, OTHER), (0, INDEX, 1.0), (0, INDEX, OTHER, "sum"),
    (0, ROWS, OTHER[:2], "mean"), ((ROWS,), OTHER[:2]), (INDEX, OTHER), (lambda value: value + 1,),
    (OTHER, lambda a, b: a + b), (OTHER, OTHER, lambda a, b, c: a), (torch.Tensor,), ([3, 13],),
    ((16, 16), (16, 1)), (5, 0, 1), (2, 1, 0), (OTHER, 1.0), (0, 0, 1.0), (slice(0, 2),),
    (slice(0, 2), 1.0), ("data", OTHER), ({},), (1, [3])
]


@functools.cache
def attribute_attempts(name: str) -> list:
    """The attribute read and set, or called with what a dense tensor takes, first and last of the
    lists, and as a function."""
    value = getattr(torch.Tensor, name)
    if not callable(value) or isinstance(value, type):
        return [lambda tensor: getattr(tensor, name)] + [
            lambda tensor, new=new: setattr(tensor, name, new)
            for new in (torch.ones(SHAPE), None, True, lambda grad: grad)
        ]

    def call(tensor, arguments):
        return getattr(tensor, name)(*copy.deepcopy(arguments))

    calls = [functools.partial(call, arguments=arguments) for arguments in ARGUMENTS]
    taken = [attempt for attempt in calls if outcome(attempt, torch.rand(SHAPE))[1] is None]
    chosen = dict.fromkeys(taken[:1] + taken[-1:] or calls[:1])
    return [*chosen, functools.partial(as_a_function, value)]


def as_a_function(function, tensor):
    """`torch.Tensor.<name>(tensor)` passes a subclass by: only that it ends nothing is asked of
    it."""
    with contextlib.suppress(Exception):
        function(tensor)


# --- what else there is to do with a tensor ---

def through_a_file(tensor, save, load):
    with tempfile.TemporaryDirectory() as folder:
        save(tensor, f"{folder}/file")
        return load(f"{folder}/file")


def in_a_layer(tensor, use):
    layer = packed_operations().Linear(16, 16, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": tensor})
    return use(layer)


def into_a_plain_layer(tensor, **options):
    layer = torch.nn.Linear(16, 16, bias=False)
    layer.load_state_dict({"weight": tensor}, **options)
    return layer(torch.ones(2, 16)).detach()


def through_a_pipe(tensor):
    from torch.multiprocessing.reductions import ForkingPickler

    return pickle.loads(ForkingPickler.dumps(tensor))


def written(tensor, write):
    """The tensor after a write that is not a method of it."""
    write(tensor)
    return tensor


def kept(tensor, name, *args):
    getattr(tensor, name)(*args)
    return tensor


def swapped(tensor):
    tensor = torch.nn.Parameter(tensor, requires_grad=False)
    module = types.SimpleNamespace(weight=tensor)
    torch.utils.swap_tensors(module.weight, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return module.weight


def moved_in_a_plain_module(tensor):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return module.to(torch.float16).to("cpu").weight


def data_moved(tensor):
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    parameter.data = parameter.data.to(dtype=torch.float16)
    return parameter * 1


ELSEWHERE = {
    "torch.save": lambda tensor: through_a_file(
        tensor, torch.save, functools.partial(torch.load, weights_only=True)
    ),
    "torch.save of a parameter": lambda tensor: through_a_file(
        torch.nn.Parameter(tensor, requires_grad=False),
        torch.save,
        functools.partial(torch.load, weights_only=True),
    ),
    **{
        f"pickle {protocol}": lambda tensor, protocol=protocol: pickle.loads(
            pickle.dumps(tensor, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "copy.deepcopy of a parameter": lambda tensor: copy.deepcopy(
        torch.nn.Parameter(tensor, requires_grad=False)
    ),
    "safetensors.torch.save": lambda tensor: safetensors.torch.load(
        safetensors.torch.save({"a": tensor})
    )["a"],
    "safetensors.torch.save_file": lambda tensor: through_a_file(
        {"a": tensor, "b": torch.ones(3)}, safetensors.torch.save_file, safetensors.torch.load_file
    )["a"],
    "safetensors.torch.save_model": lambda tensor: in_a_layer(
        tensor,
        lambda layer: through_a_file(
            layer, safetensors.torch.save_model, safetensors.torch.load_file
        ),
    )["weight"],
    "state dict to torch.save": lambda tensor: in_a_layer(
        tensor,
        lambda layer: through_a_file(
            layer.state_dict(), torch.save, functools.partial(torch.load, weights_only=True)
        ),
    )["weight"],
    "state dict to safetensors": lambda tensor: in_a_layer(
        tensor,
        lambda layer: through_a_file(
            layer.state_dict(), safetensors.torch.save_file, safetensors.torch.load_file
        ),
    )["weight"],
    "share_memory of a layer": lambda tensor: in_a_layer(
        tensor, lambda layer: layer.share_memory().weight
    ),
    "multiprocessing": through_a_pipe,
    "np.asarray": np.asarray,
    "np.array": np.array,
    "np.from_dlpack": np.from_dlpack,
    "torch.from_numpy": lambda tensor: torch.from_numpy(tensor.numpy()),
    "memoryview": memoryview,
    "torch.frombuffer": lambda tensor: torch.frombuffer(tensor, dtype=torch.uint8),
    "torch.tensor": torch.tensor,
    "torch.as_tensor": torch.as_tensor,
    "torch.asarray": torch.asarray,
    "torch.from_dlpack": torch.from_dlpack,
    "to_dlpack": lambda tensor: torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor)).sum(),
    "a write into numpy()": lambda tensor: written(tensor, lambda tensor: tensor.numpy().fill(1)),
    "+=": lambda tensor: written(tensor, lambda tensor: tensor.__iadd__(1)),
    "w[0] = 1": lambda tensor: written(tensor, lambda tensor: tensor.__setitem__(0, 1)),
    "out=": lambda tensor: written(
        tensor, lambda tensor: torch.add(torch.ones(SHAPE), 1, out=tensor)
    ),
    "w.data.mul_": lambda tensor: written(tensor, lambda tensor: tensor.data.mul_(2)),
    "w.data += 1": lambda tensor: written(
        tensor, lambda tensor: setattr(tensor, "data", tensor.data + 1)
    ),
    "w.data[:] = 1": lambda tensor: written(
        tensor, lambda tensor: tensor.data.__setitem__(slice(None), 1)
    ),
    "w.detach().zero_()": lambda tensor: written(tensor, lambda tensor: tensor.detach().zero_()),
    "w.data.copy_": lambda tensor: written(
        tensor, lambda tensor: tensor.data.copy_(torch.ones(SHAPE))
    ),
    "a foreach function": lambda tensor: written(
        tensor, lambda tensor: torch._foreach_mul_([tensor], 2)
    ),
    "relu, in place": lambda tensor: written(
        tensor, lambda tensor: torch.nn.functional.relu(tensor, inplace=True)
    ),
    "torch.nn.init": lambda tensor: written(tensor, torch.nn.init.zeros_),
    "torch.nn.init.normal_": lambda tensor: written(tensor, torch.nn.init.normal_),
    "an optimiser": lambda tensor: kept(
        torch.optim.SGD([torch.nn.Parameter(tensor)], 0.1), "zero_grad"
    ),
    "copied into a plain tensor": lambda tensor: torch.zeros(SHAPE).copy_(tensor),
    "copied into a plain tensor in half": lambda tensor: torch.zeros(
        SHAPE, dtype=torch.float16
    ).copy_(tensor),
    "set into a plain tensor": lambda tensor: kept(
        torch.zeros(SHAPE), "__setitem__", slice(None), tensor
    ),
    "a plain tensor's data": lambda tensor: written(
        torch.zeros(SHAPE), lambda plain: setattr(plain, "data", tensor)
    ),
    "a plain tensor's set_": lambda tensor: kept(torch.zeros(SHAPE), "set_", tensor),
    "loaded into a plain layer": into_a_plain_layer,
    "assigned to a plain layer": functools.partial(into_a_plain_layer, assign=True),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "a parameter of a view": lambda tensor: torch.nn.Parameter(tensor[2:4], requires_grad=False),
    "swap_tensors": swapped,
    "moved in a plain module": moved_in_a_plain_module,
    "w.data = w.data.to()": data_moved,
    "joined": lambda tensor: torch.cat([tensor, tensor.t(), torch.ones(SHAPE)]),
    "stacked": lambda tensor: torch.stack([tensor] * 2),
    "a product": lambda tensor: torch.nn.functional.linear(torch.ones(2, 16), tensor),
    "a hash": lambda tensor: {tensor: 1}[tensor],
    "equal to itself": lambda tensor: torch.equal(tensor, tensor),
    "the first of an iteration": lambda tensor: next(iter(tensor)),
    "printed": lambda tensor: (f"{tensor}", None)[1],
    "the storage's memory": lambda tensor: bytes(tensor.untyped_storage())[:0],
    "a tensor over the storage": lambda tensor: (
        torch.empty(0).set_(tensor.untyped_storage(), 0, SHAPE).sum()
    ),
    **{
        f"untyped_storage().{name}": lambda tensor, name=name: (
            getattr(tensor.untyped_storage(), name)(),
            None,
        )[1]
        for name in (*dir(torch.UntypedStorage), "_share_fd_cpu_", "_share_filename_cpu_")
        if name.startswith("_share_f")
        or (not name.startswith("_")
        and callable(getattr(torch.UntypedStorage, name)))
    },
}

MODES = {"normal": contextlib.nullcontext, "inference": torch.inference_mode}
TRIED = [("Q8_0", "normal"), ("NF4", "inference"), ("Q4_K", "inference"), ("INT8", "normal")]
ATTEMPTS = [(*tried, name) for tried in TRIED for name in (*dir(torch.Tensor), *ELSEWHERE)]


# --- comparing ---

SAID = (  # ours; numpy's about an array; torch's, where it asks us nothing
    "stays packed",
    "read-only",
    "Cannot access data pointer",
    "tensor with unallocated storage",
    "incompatible tensor type",
    "a storage on different device",
)


def plain(value):
    """A result with the values that packed tensors stand for, as numpy arrays and lists."""
    if isinstance(value, QuantizedTensor):
        value = value.dequantize()
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            value = value.to_dense() if not value.is_quantized else value.dequantize()
        value = value.detach()
        return str(value.dtype), np.array(
            value.float().tolist() if value.dtype == torch.bfloat16 else value.tolist()
        )
    if isinstance(value, (list, tuple, types.GeneratorType)) or hasattr(value, "__next__"):
        return [plain(item) for item in value]
    return value


def same(a, b) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[0] == b[0] and same(a[1], b[1])
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.dtype.kind not in "biufc":
            return np.array_equal(a, b)
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(a, (bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)):
        return a == b or (a != a and b != b)
    return type(a) is type(b) or callable(a)


def outcome(attempt, tensor):
    """(result, error) of one attempt."""
    # the CPU's alone; asking for all is a thousand times slower
    torch.default_generator.manual_seed(0)
    try:
        return plain(attempt(tensor)), None
    except Exception as error:
        return None, error


def fault(format_name: str, name: str, attempt) -> str | None:
    """What is wrong with one attempt, None where a packed tensor does as a dense one or says why
    not."""
    tensor = packed(format_name)
    before = tensor.dequantize()
    dense = before.clone()
    expected, dense_error = outcome(attempt, dense)
    result, error = outcome(attempt, tensor)
    if name in NOT_COMPARED:
        return None
    if error is not None:
        if dense_error is None and not any(said in str(error) for said in SAID):
            return f"{type(error).__name__}: {error}"
        return None if torch.equal(tensor.dequantize(), before) else "raised, and wrote"
    if dense_error is not None:
        return None
    if not same(expected, result):
        return f"gave {str(result)[:200]}, a dense one {str(expected)[:200]}"
    return (
        None
        if same(plain(dense), plain(tensor)) or getattr(attempt, "func", None) is as_a_function
        else "a write was lost"
    )


def main(start: int, stop: int):
    """Makes these of the `ATTEMPTS` and prints what is wrong, as JSON lines."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout, lines = io.StringIO(), sys.stdout
    for number, (format_name, mode, name) in enumerate(ATTEMPTS[start:stop], start):
        print(json.dumps({"begun": number}), file=lines, flush=True)
        with MODES[mode]():
            attempts = [ELSEWHERE[name]] if name in ELSEWHERE else attribute_attempts(name)
            faults = {fault(format_name, name, attempt) for attempt in attempts} - {None}
        print(json.dumps({"done": number, "faults": sorted(faults)}), file=lines, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
