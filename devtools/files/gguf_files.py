"""Real GGUF files for tests, demo and bench, written with the `gguf` package.

`gguf.quants` can pack some types and dequantise all, `ops/packing` packs the K-quants. For the
other types, weights are drawn from random blocks whose values (by gguf's own reference) are of a
usual size, so no per-format knowledge is needed here.
"""
import collections.abc
import functools
import math

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from devtools import product_module
from devtools.files import gguf_types  # noqa: F401  gguf takes the types that are newer than it

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


# Values of a row: gguf's reference goes by 16 rows, which takes several times as long for short
# ones and twice as long for what no cache holds.
LEAST_ROW, MOST_ROW = 1024, 8192


def _in_rows(blocks: np.ndarray, block_length: int) -> np.ndarray:
    """Blocks (n, m) in rows of a size that suits gguf's reference; in one where they do not divide
    so."""
    count = math.gcd(len(blocks), MOST_ROW // block_length)
    if count * block_length < LEAST_ROW:
        count = len(blocks)
    return blocks.reshape(-1, count * blocks.shape[1])


def quantize(values: np.ndarray, ggml_type: GGMLQuantizationType) -> np.ndarray:
    """Rows packed by gguf's reference, uint8."""
    block_length = GGML_QUANT_SIZES[ggml_type][0]
    if not values.size or values.shape[-1] % block_length:
        return gguf.quants.quantize(values, ggml_type)
    rows = _in_rows(values.reshape(-1, block_length), block_length)
    return gguf.quants.quantize(rows, ggml_type).reshape(*values.shape[:-1], -1)


def dequantize(packed: np.ndarray, ggml_type: GGMLQuantizationType) -> np.ndarray:
    """The values of packed rows by gguf's reference, float32."""
    block_length, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if not packed.size or packed.dtype != np.uint8 or packed.shape[-1] % block_bytes:
        return gguf.quants.dequantize(packed, ggml_type)
    rows = _in_rows(packed.reshape(-1, block_bytes), block_length)
    return gguf.quants.dequantize(rows, ggml_type).reshape(*packed.shape[:-1], -1)


@functools.cache
def block_pool(type_name: str, largest: float = 0.25, smallest: float = 1e-3,
               seed: int = 0) -> np.ndarray:
    """Random valid blocks, uint8 (n, block_bytes), whose largest value lies between the two
    bounds."""
    ggml_type = GGMLQuantizationType[type_name]
    block_bytes = GGML_QUANT_SIZES[ggml_type][1]
    generator = np.random.default_rng([seed, int(ggml_type)])
    accepted, count = [], 0
    while count < 256:
        blocks = generator.integers(0, 256, (16384, block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            peak = np.abs(dequantize(blocks, ggml_type)).max(axis=-1)
        accepted.append(blocks[(peak <= largest) & (peak >= smallest)])  # NaN compares false
        count += len(accepted[-1])
    return np.concatenate(accepted)


def pack(values: np.ndarray, type_name: str, seed: int = 0) -> np.ndarray:
    """Packed rows, uint8, of float32 `values`; random blocks of the same shape where nothing packs
    the type."""
    ggml_type = GGMLQuantizationType[type_name]
    if type_name in K_QUANTS:
        packing, packed_format = (
            product_module("ops.packing.pack_tensor"),
            product_module("ops.formats.base").FORMATS[type_name],
        )
        packed = packing.pack_tensor(torch.from_numpy(np.ascontiguousarray(values, np.float32)),
                                     packed_format)
        return packed._qdata.view(*values.shape[:-1], -1).numpy()
    try:
        return quantize(values, ggml_type)
    except NotImplementedError:
        return random_rows(values, type_name, seed)


def random_rows(values: np.ndarray, type_name: str, seed: int = 0) -> np.ndarray:
    """Random blocks of the shape of `values`, uint8: for those who need values of a type, and not
    these ones."""
    pool = block_pool(type_name)
    block_length, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    picks = np.random.default_rng([seed, values.size]).integers(
        0, len(pool), values.size // block_length
    )
    return pool[picks].reshape(*values.shape[:-1], values.shape[-1] // block_length * block_bytes)


def gguf_writer(path, architecture: str | None) -> gguf.GGUFWriter:
    """A writer for a file of this `general.architecture`, or for one without."""
    writer = gguf.GGUFWriter(str(path), architecture or "none")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    return writer


def write_all(writer: gguf.GGUFWriter):
    """Write the file of a writer that was given every tensor, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Values(collections.abc.Mapping):
    """Name -> float32 array of a file's tensors, dequantised when it is asked for."""

    def __init__(self):
        self.readers = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.readers[name]()

    def __iter__(self):
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def write_gguf(path, tensors: dict, type_of, architecture: str | None = "flux",
               metadata: dict | None = None, pack=pack) -> Values:
    """Write float tensors as a GGUF file and return the values a reader should see.

    tensors: name -> torch tensor or array. type_of(name, array) -> ggml type name; a type whose
    blocks do not divide the rows is replaced by F32. pack: as the function of this name. The
    values are dequantised by gguf's reference.
    """
    writer = gguf_writer(path, architecture)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    seen = Values()
    for seed, (name, tensor) in enumerate(tensors.items()):
        values = np.asarray(tensor, dtype=np.float32)
        type_name = type_of(name, values)
        if (
            values.ndim == 0
            or values.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0]
        ):
            type_name = "F32"
        if values.ndim > 4:  # ggml stores at most four dimensions
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = (
                values.reshape(-1, values.shape[-1]) if type_name != "F32" else values.reshape(-1)
            )
        if type_name == "F32":
            writer.add_tensor(name, values)
            seen.readers[name] = functools.partial(values.reshape, np.shape(tensor))
        else:
            ggml_type = GGMLQuantizationType[type_name]
            packed = (
                values.astype(np.float16) if type_name == "F16" else pack(values, type_name, seed)
            )
            writer.add_tensor(name, packed, raw_dtype=ggml_type)
            seen.readers[name] = functools.lru_cache(functools.partial(
                _values_of, packed, ggml_type, np.shape(tensor)))
    write_all(writer)
    return seen


def _values_of(packed: np.ndarray, ggml_type: GGMLQuantizationType, shape) -> np.ndarray:
    return dequantize(packed, ggml_type).reshape(shape)


def write_random_gguf(path, shapes: dict[str, tuple], type_name: str,
                      architecture: str | None = "flux"):
    """Write a GGUF file of any size with random valid blocks of one type, a tensor at a time.

    shapes: name -> logical shape. What has one dimension, or rows that blocks do not divide, is
    F32: zeros, or ones for the scale of a norm. architecture: None for a file that names none.
    """
    ggml_type = GGMLQuantizationType[type_name]
    block_length = GGML_QUANT_SIZES[ggml_type][0]
    packed = {
        name: len(shape) > 1 and shape[-1] % block_length == 0 for name, shape in shapes.items()
    }
    pool = block_pool(type_name)
    generator = np.random.default_rng(0)

    def data_of(name: str) -> np.ndarray:
        shape = shapes[name]
        if not packed[name]:
            return np.full(shape,
                           name.endswith((".scale", "norm.weight", "norm1.weight", "norm2.weight")),
                           np.float32)
        byte_shape = gguf.quants.quant_shape_to_byte_shape(shape, ggml_type)
        picks = generator.integers(0, len(pool), byte_shape[0] * byte_shape[1] // pool.shape[1])
        return pool[picks].reshape(byte_shape)

    writer = gguf_writer(path, architecture)
    for name, shape in shapes.items():
        if packed[name]:
            byte_shape = gguf.quants.quant_shape_to_byte_shape(shape, ggml_type)
            writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8),
                                   byte_shape[0] * byte_shape[1], raw_dtype=ggml_type)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        writer.write_tensor_data(data_of(name))
    writer.close()


def write_zeros_gguf(path, shapes: dict[str, tuple], type_name: str, rest: str):
    """Write a GGUF file of zeros, of its full size, that takes no room on disk.

    shapes: name -> logical shape. Matrices whose rows blocks of `type_name` divide are of that
    type, the others of type `rest`.
    """
    writer = gguf_writer(path, "none")
    for name, shape in shapes.items():
        if len(shape) > 4:  # ggml stores at most four dimensions
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            shape = (math.prod(shape),)
        fits = (
            len(shape) == 2
            and shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0] == 0
        )
        ggml_type = GGMLQuantizationType[type_name if fits else rest]
        block_length, block_bytes = GGML_QUANT_SIZES[ggml_type]
        writer.add_tensor_info(name, shape, np.dtype(np.float32),
                               math.prod(shape) // block_length * block_bytes, ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sizes = [-(-info.nbytes // 32) * 32 for info in writer.tensors[0].values()]
    assert writer.fout is not None
    start = -(-writer.fout[0].tell() // 32) * 32
    writer.fout[0].truncate(start + sum(sizes))
    writer.close()
