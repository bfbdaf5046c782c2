"""Hypothesis strategies: a well-formed input with a few changes, which `changed` makes by what the
input is."""
import copy
import functools
import json
import math
import operator
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from hypothesis import strategies as st

NUMBERS = st.sampled_from([
    0, 1, 2, 3, 7, 8, 9, 31, 32, 64, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1, 2**64,
    -1, -2**63]) | st.integers(-300, 70000)
TEXTS = st.sampled_from([
    "", " ", "\0", "\n", "=", ",", ";", ":", "*", "%", "#", "-", ".", "..", "../", "..\\", "/",
    "\\\\", "/etc/passwd", "C:\\", "c:x", "\\\\?\\C:\\x", "\\\\server\\share\\", "~", "$HOME",
    "%year%", "%date:yyyy%", "nan", "inf", "-inf", "1e309", "0", "-1", "0.5", "٣", "²", "9" * 30,
    "9" * 5000, "a" * 300, "x" * 5000, "é", "\ud800", "\u202e", "<img src=x onerror=alert(1)>",
    "{}", "{0}", "%s", "'", '"', "__class__", "(a+)+$", "NUL", "CON", "F32", "U8", "nf4", "preset:",
    "all=", "text=0", "double.0-9=0.5", "single", "gpu:0", "cuda:1", "cpu", "gb", "25%",
    "general.alignment", "general.architecture", "split.count", "split.no", "adapter.lora.alpha",
    "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"]) | st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5)
# that take more memory or a deeper stack than their bytes suggest
JSON_BOMBS = st.sampled_from([b"[" * 30000, b'{"a":' * 30000, b"[" + b"[]," * 9000 + b"1]",
                              b"9" * 400, b"[" + b"9" * 5000 + b"]"])
ITEM_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8,
    "F4": 1, "F6_E2M3": 1}
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
            "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}  # in numpy's words
VALUES = st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\1", b"\0\0\x80\x7f", b"\0\0\xc0\x7f",
                          b"\0\x7c", b"\0\x80", b"\1\0\0\0"]) | st.binary(min_size=1, max_size=8)
LARGEST_TENSOR = 1 << 15  # bytes
FILE = b"=== "  # before the name of each file where an input holds several
LINK = b"-> "  # a content that begins so is a link to what follows
TARGETS_OF_LINKS = [b"/etc/passwd", b"../outside", b"/dev/zero", b".", b"/"]
FEW = st.integers(1, 3)
SOMETIMES = st.integers(0, 9).map(lambda kind: kind == 9)
WORDS = st.builds(lambda value, width: (value % 256**width).to_bytes(width, "little"),
                  NUMBERS, st.sampled_from([1, 2, 4, 8])) | st.binary(max_size=16)
NUMBERS_OR_FLOATS = NUMBERS | st.floats()
STEPS = st.integers(-2, 48)


def changed(data: bytes) -> st.SearchStrategy[bytes]:
    """Returns a strategy of an input with changes that suit what it is, and some of its bytes."""
    if data.startswith(FILE):
        return changed_files(data)
    if data.startswith(b"GGUF") and _gguf_fields(data) is not None:
        suited = changed_gguf(data)
    elif _safetensors(data) is not None:
        suited = changed_safetensors(data)
    elif data[:1] in (b"{", b"[") and _json(data) is not None:
        suited = SOMETIMES.flatmap(lambda is_bomb: JSON_BOMBS if is_bomb else changed_json(data))
    elif b"\0" not in data and data.isascii():
        suited = changed_text(data)
    else:
        return changed_bytes(data)
    return SOMETIMES.flatmap(lambda is_bytes: changed_bytes(data) if is_bytes else suited)


@st.composite
def changed_bytes(draw, data: bytes) -> bytes:
    """Numbers, bytes or slices over others, between others, or in place of all that follow."""
    out = bytearray(data)
    for _ in range(draw(FEW)):
        at = draw(st.integers(0, len(out)))
        if draw(st.integers(0, 3)) < 3:
            new = draw(WORDS)
        else:
            start = draw(st.integers(0, len(data)))
            new = data[start:start + draw(st.integers(1, 64))]
        out[at:draw(st.sampled_from([at + len(new), at, at + 1, len(out)]))] = new
    return bytes(out)


@st.composite
def changed_text(draw, data: bytes) -> bytes:
    """Words left out, repeated, or replaced by those that a reader may stumble over."""
    words = re.split(r"(\W)", data.decode("utf-8", "surrogateescape"))
    for _ in range(draw(FEW)):
        at = draw(st.integers(0, len(words)))
        end = at + draw(st.integers(0, 3))
        new = [draw(TEXTS)] if draw(st.booleans()) else words[at:end]
        words[at:end] = new * draw(st.sampled_from([1, 0, 2, 20]))
    return "".join(words).encode("utf-8", "surrogatepass")


@st.composite
def changed_json(draw, data: bytes) -> bytes:
    """Values, keys or items replaced, left out, renamed or repeated, deep ones too."""
    root = [json.loads(data)]
    for _ in range(draw(FEW)):
        places = list(_places(root))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "number", "delete", "rename", "repeat", "copy"]))
        if kind == "number":
            holder[key] = draw(NUMBERS_OR_FLOATS)
        elif kind == "delete" and holder is not root:
            del holder[key]
        elif kind in ("rename", "repeat") and isinstance(holder, dict):
            value = holder[key] if kind == "repeat" else holder.pop(key)
            holder[(key if draw(st.booleans()) else "") + draw(TEXTS)] = value
        elif kind == "repeat":
            holder[key:key] = [holder[key]] * draw(st.sampled_from([1, 8, 1000]))
        elif kind == "copy":
            source, other = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(source[other])
        else:
            holder[key] = draw(JSON)
    return json.dumps(root[0]).encode()


def _places(tree) -> Iterator[tuple]:
    """Yields (object or list, key) of each value."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def _json(data: bytes):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


@functools.lru_cache(256)
def _safetensors(data: bytes) -> tuple[dict, dict] | None:
    """Returns the metadata and name -> (dtype, shape, bytes); None for another or a damaged
    file."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:8 + length])
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {name: (each["dtype"], [abs(operator.index(size)) for size in each["shape"]],
                          data[8 + length:][slice(*each["data_offsets"])])
                   for name, each in header.items() if each["dtype"] in ITEM_BYTES}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return metadata, tensors


@st.composite
def changed_safetensors(draw, data: bytes) -> bytes:
    """Other tensors or metadata in a file that is whole, or another header before the same data."""
    found = _safetensors(data)
    assert found is not None
    metadata, tensors = found
    length = int.from_bytes(data[:8], "little")
    kind = draw(st.sampled_from(["tensors"] * 5 + ["metadata", "header", "resize"]))
    if kind == "header":
        header = draw(JSON_BOMBS if draw(SOMETIMES) else changed_json(data[8:8 + length]))
        return len(header).to_bytes(8, "little") + header + data[8 + length:]
    if kind == "metadata" and metadata:
        key = draw(st.sampled_from(list(metadata)))
        text = draw(changed(str(metadata[key]).encode()))
        metadata = metadata | {key: text.decode("utf-8", "replace")}
    elif kind == "resize":  # fewer rows or columns of every tensor alike
        axis, divisor = draw(st.sampled_from([-1, 0])), draw(st.sampled_from([2, 4, 8, 16, 32]))
        tensors = {name: (dtype, _divided(shape, axis, divisor), values)
                   for name, (dtype, shape, values) in tensors.items()}
    else:
        tensors = dict(tensors)
        for _ in range(draw(FEW) if tensors else 0):
            name = draw(st.sampled_from(list(tensors)))
            tensors |= draw(_changed_tensor(name, *tensors.pop(name), list(tensors)))
            if not tensors:
                break
    header, content = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, values) in tensors.items():
        size = min(math.prod(shape) * ITEM_BYTES[dtype], LARGEST_TENSOR)
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(content), len(content) + size]}
        content += (values * (size // max(1, len(values)) + 1))[:size].ljust(size, b"\0")
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content


def _divided(shape: list, axis: int, divisor: int) -> list:
    """Returns a shape whose axis is shorter, where that divides it."""
    shape = list(shape)
    if shape and shape[axis] % divisor == 0:
        shape[axis] //= divisor
    return shape


@st.composite
def _changed_tensor(draw, name: str, dtype: str, shape: list, values: bytes,
                    others: list) -> dict:
    """Name -> (dtype, shape, bytes) of what becomes of one tensor."""
    kind = draw(st.sampled_from(["values", "dtype", "integers", "integers", "shape", "size", "drop",
                                 "twin", "rename", "bytes"]))
    if kind == "drop":
        return {}
    if kind == "integers" and dtype in INTEGERS:  # the same ones, as another writer stores them
        other = draw(st.sampled_from(["U16", "U32", "U64", *INTEGERS]))  # first: torch has few ops
        size = np.dtype(INTEGERS[dtype]).itemsize  # values may have been cut
        whole = np.frombuffer(values[:len(values) // size * size], INTEGERS[dtype])
        return {name: (other, shape, whole.astype(INTEGERS[other]).tobytes())}
    if kind == "dtype":
        dtype = draw(st.sampled_from(list(ITEM_BYTES)))
    elif kind == "shape":
        shape = draw(st.sampled_from([
            [], [0], [1], [2], [1, 1], [*shape, 1], [1, *shape], shape[::-1], shape[1:], [4] * 5,
            [0, 2**40], [2**20, 0, 2**20], [1] * 40, [math.prod(shape)]]))
    elif kind == "size" and shape:
        at = draw(st.integers(0, len(shape) - 1))
        size = draw(st.sampled_from([0, 1, 2, 3, 16, 64, shape[at] * 2, shape[at] // 2]))
        shape = [*shape[:at], size, *shape[at + 1:]]
    elif kind == "twin" and others:
        end = draw(st.sampled_from(others)).rpartition(".")[2]
        return {name: (dtype, shape, values),
                f"{name.rpartition('.')[0]}.{end}": (dtype, shape, values)}
    elif kind == "rename":
        name = draw(changed_text(name.encode())).decode("utf-8", "replace")
    elif values[:1] == b"{" and _json(values) is not None:  # a layer's settings
        values = draw(JSON_BOMBS if draw(SOMETIMES) else changed_json(values))
        dtype, shape = "U8", [len(values)]
    elif kind == "bytes":
        values = draw(changed_bytes(values))
    else:
        values = draw(VALUES)
    return {name: (dtype, shape, values)}


@functools.lru_cache(256)
def _gguf_fields(data: bytes) -> list[list[np.ndarray]] | None:
    """Returns the parts of each field of a header, as gguf's reader divides it; None where it
    cannot."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "model.gguf")
        path.write_bytes(data)
        try:
            reader = gguf.GGUFReader(path)
            fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
            return [[part.copy() for part in field.parts] for field in fields]
        except Exception:  # of many kinds, for a damaged file
            return None


@st.composite
def changed_gguf(draw, data: bytes) -> bytes:
    """Numbers and texts of a GGUF header replaced, or the names of two fields exchanged; lengths of
    texts follow."""
    fields = [list(parts) for parts in _gguf_fields(data) or ()]
    length = len(_header(fields))
    named = [parts for parts in fields if len(parts) > 2]
    if len(named) > 1 and draw(st.integers(0, 7)) == 7:
        one, other = (named[draw(st.integers(0, len(named) - 1))] for _ in range(2))
        one[:2], other[:2] = other[:2], one[:2]
    for _ in range(draw(FEW)):
        parts = fields[draw(st.integers(0, len(fields) - 1))]
        at = draw(st.integers(0, len(parts) - 1))
        if at and parts[at].dtype == np.uint8 and parts[at - 1].dtype == np.uint64:
            text = (draw(changed_text(parts[at].tobytes())) if draw(st.booleans())
                    else draw(TEXTS).encode("utf-8", "surrogatepass"))
            parts[at] = np.frombuffer(text, np.uint8)
            if draw(st.integers(0, 7)) < 7:
                parts[at - 1] = np.array([len(parts[at])], np.uint64)
        elif len(parts[at]):
            raw = bytearray(parts[at].tobytes())
            width = parts[at].itemsize
            start = width * draw(st.integers(0, len(parts[at]) - 1))
            value = (draw(NUMBERS) if draw(st.booleans()) else
                     draw(STEPS) + int.from_bytes(raw[start:start + width], "little"))
            raw[start:start + width] = (value % 256**width).to_bytes(width, "little")
            parts[at] = np.frombuffer(bytes(raw), parts[at].dtype)
    header, rest = _header(fields), data[length:]
    padding, grown = len(rest) - len(rest.lstrip(b"\0")), len(header) - length
    if grown <= padding and draw(st.booleans()):  # the tensors stay where they are read
        rest = rest[grown:] if grown > 0 else bytes(-grown) + rest
    return header + rest


def _header(fields: list[list[np.ndarray]]) -> bytes:
    return b"GGUF" + b"".join(part.tobytes() for parts in fields for part in parts)


@st.composite
def changed_files(draw, data: bytes) -> bytes:
    """One of several files changed, renamed, doubled, left out, or replaced by a link."""
    files = split_files(data)
    name = draw(st.sampled_from(list(files)))
    kind = draw(st.sampled_from(["content"] * 12 + ["drop", "twin", "link", "rename"]))
    if kind == "content":
        files[name] = draw(changed(files[name]))
    elif kind == "twin":
        files[draw(st.sampled_from(list(files)))] = files[name]
    elif kind == "link":
        files[name] = LINK + draw(
            st.sampled_from([*TARGETS_OF_LINKS, *(each.encode() for each in files)]))
    else:
        content = files.pop(name)
        if kind == "rename":
            files[draw(changed_text(name.encode())).decode("utf-8", "replace")] = content
    return join_files(files)


def join_files(files: dict[str, bytes]) -> bytes:
    """Returns several files as one input."""
    return b"\n".join(FILE + name.encode("utf-8", "surrogatepass") + b"\n" + content
                      for name, content in files.items())


def split_files(data: bytes) -> dict[str, bytes]:
    """Returns the files that `join_files` has joined; of any bytes something."""
    parts = (b"\n" + data).split(b"\n" + FILE)[1:]
    pairs = [part.partition(b"\n") for part in parts]
    return {name.decode("utf-8", "replace")[:100]: content for name, _, content in pairs}
