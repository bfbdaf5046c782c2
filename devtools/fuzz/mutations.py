"""Damage to inputs, by a seeded `random.Random`: bytes, JSON, texts, safetensors files, and several
files in one input."""
import copy
import json
import math
import operator
import random
import re
from collections.abc import Callable

Mutate = Callable[[bytes, random.Random], bytes]

INTERESTING = [
    0, 1, 2, 3, 7, 8, 9, 31, 32, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 64,
    2**64 - 1
]
# What a field of JSON may hold that its reader did not think of. Texts are put in as they are: JSON
# has no such numbers.
HUGE = "9" * 400
JSON_VALUES = [
    None, True, False, 0, 1, -1, 2, 64, 2**31, 2**32, 2**53, 2**63, 2**64, -2**63, 0.0,
    0.5, -1.5, 1e308,
    float("nan"),
    float("inf"),
    float("-inf"), 10**400, "", "a", "F32", "U8", "nf4", "\0", "\ud800", "../../../etc/passwd",
    "/etc/passwd", "C:\\Windows\\win.ini", "\\\\server\\share\\x", "<img src=x onerror=alert(1)>",
    "__class__", "F4", "F8_E8M0", "F6_E2M3", "C64", "BOOL", "I64", [], {}, [[]], [0], [1, 2],
    {"a": 1},
    [1] * 9, ["a"], [2**40, 2**40]
]
TEXT_VALUES = [
    "", " ", "\0", "\n", "=", ",", ";", ":", "*", "%", "#", "-", ".", "..", "../", "..\\", "/",
    "\\", "//", "\\\\", "/etc/passwd", "C:\\", "c:x", "\\\\?\\C:\\x", "\\\\server\\share\\", "~",
    "$HOME", "%year%", "%date:yyyy%", "nan", "inf", "-inf", "1e309", "0", "-1", "1", "0.5", "٣",
    "²", "9" * 30, "9" * 5000, "a" * 300, "é", "\ud800", "\u202e", "<b>", "{}", "{0}", "%s", "'",
    '"', "preset:", "all=", "text=0", "double.0-9=0.5", "single", "gpu:0", "cuda:1", "cpu", "gb",
    "25%", "NUL", "CON", "x" * 5000
]
ITEM_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8
}
FILE = b"=== "  # before the name of each file where an input holds several


def bytes_damaged(data: bytes, chance: random.Random) -> bytes:
    """One to five small changes anywhere."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(8)
        if kind == 0:
            data[at:at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << chance.randrange(8)
                                     ])
        elif kind == 1:
            data[at:at + 8] = chance.choice(INTERESTING).to_bytes(8, "little")
        elif kind == 2:
            data[at:at + 4] = (chance.choice(INTERESTING) % 2**32).to_bytes(4, "little")
        elif kind == 3:
            data[at:at + chance.randrange(40)] = chance.randbytes(chance.randrange(40))
        elif kind == 4:  # a slice twice
            end = at + chance.randrange(200)
            data[end:end] = data[at:end]
        elif kind == 5:  # a slice over another
            source, length = chance.randrange(len(data) + 1), chance.randrange(1, 64)
            data[at:at + length] = data[source:source + length]
        elif kind == 6:
            del data[at:]
        else:
            del data[at:at + chance.randrange(16)]
    return bytes(data)


def text_damaged(data: bytes, chance: random.Random) -> bytes:
    """Words taken out, doubled, and put in from those that a reader may stumble over."""
    words = re.split(r"(\W)", data.decode("utf-8", "surrogateescape"))
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, kind = chance.randrange(len(words) + 1), chance.randrange(4)
        if kind == 0:
            del words[at:at + chance.randrange(1, 4)]
        elif kind == 1:
            words[at:at + 1] = [chance.choice(TEXT_VALUES)]
        elif kind == 2:
            words.insert(at, chance.choice(TEXT_VALUES))
        else:
            words[at:at] = words[at:at + chance.randrange(1, 9)] * chance.choice([1, 1, 2, 20])
    return "".join(words)[:1 << 16].encode("utf-8", "surrogatepass")


def json_damaged(data: bytes, chance: random.Random) -> bytes:
    """Changes a value, a key or an item of a JSON text; data that is not JSON, as bytes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return bytes_damaged(data, chance)
    if chance.random() < 0.03:  # what only text can hold
        depth = chance.choice([200, 3000, 30000])
        return chance.choice([
            b"[" * depth, b'{"a":' * depth, b"[" + b"[]," * depth + b"1]",
            HUGE.encode(), b"[" + b"9" * 5000 + b"]"
        ])
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        tree = copy.deepcopy(_with_a_change(tree, chance))
    return json.dumps(tree).encode()


def _with_a_change(tree, chance: random.Random):
    """The same tree with one node changed, deep ones as often as those above."""
    if not isinstance(tree, (dict, list)) or not tree or chance.random() < 0.15:
        return copy.deepcopy(chance.choice(JSON_VALUES))
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key, kind = chance.choice(keys), chance.randrange(10)
    if kind == 0:
        del tree[key]
    elif kind == 1 and isinstance(tree, dict):
        tree[str(chance.choice(JSON_VALUES))] = tree.pop(key)
    elif kind == 2 and isinstance(tree, dict):
        tree[f"{key}{chance.choice(TEXT_VALUES)}"] = tree[key]
    elif kind == 2:
        tree[key:key] = [tree[key]] * chance.choice([1, 1, 8])
    elif kind == 3 and isinstance(tree[key], int):
        tree[key] = tree[key] + chance.choice([-1, 1, 2**32, 2**64, -tree[key] * 2])
    elif kind == 4:
        tree[key] = copy.deepcopy(tree[chance.choice(keys)])
    else:
        tree[key] = _with_a_change(tree[key], chance)
    return tree


def safetensors_damaged(data: bytes, chance: random.Random) -> bytes:
    """Other tensors in a sound file, the header as JSON with its length put right, the data behind
    it, or all as bytes."""
    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data) or chance.random() < 0.1:
        return bytes_damaged(data, chance)
    header, tensors = data[8:8 + length], data[8 + length:]
    if chance.random() < 0.5 and (sound := _other_tensors(header, tensors, chance)) is not None:
        header, tensors = sound
    elif chance.random() < 0.7:
        header = json_damaged(header, chance)
    else:
        tensors = tensor_bytes_damaged(tensors, chance)
    return len(header).to_bytes(8, "little") + header + tensors


def _other_tensors(header: bytes, data: bytes, chance: random.Random) -> tuple[bytes, bytes] | None:
    """(header, data) of a file that is whole, with a tensor of another shape, type, name or
    content, doubled or left out."""
    try:
        described = json.loads(header)
        metadata = described.pop("__metadata__", {})
        parts = [(name, info["dtype"], list(info["shape"]), data[slice(*info["data_offsets"])])
                 for name, info in described.items()]
        for _ in range(chance.choice([1, 1, 2, 3])):
            at = chance.randrange(len(parts))
            parts[at:at + 1] = _other_tensor(*parts[at], [name for name, *_ in parts], chance)
        out, content = {"__metadata__": metadata}, b""
        for name, dtype, shape, values in parts:
            # texts can be multiplied too
            size = math.prod(map(operator.index, shape)) * ITEM_BYTES[dtype]
            if not 0 <= size <= 4096:
                return None
            out[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(content), len(content) + size],
            }
            content += (values * (size // max(1, len(values)) + 1))[:size].ljust(size, b"\0")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return json.dumps(out).encode(), content


def _other_tensor(name: str, dtype: str, shape: list[int], values: bytes, names: list[str],
                  chance: random.Random) -> list[tuple]:
    kind = chance.randrange(8)
    if kind == 0:
        return []
    if kind == 1:
        end = chance.choice(names).rpartition(".")[2]
        return [(name, dtype, shape, values),
                (f"{name.rpartition('.')[0]}.{end}", dtype, shape, values)]
    if kind == 2:
        return [(name, chance.choice([*ITEM_BYTES]), shape, values)]
    if kind == 3:
        return [(name, dtype,
                 chance.choice([[], [0], [1], [2], [1, 1], [*shape, 1], [1, *shape], shape[::-1],
                                shape[1:], [4] * 5]), values)]
    if kind == 4 and shape:
        at = chance.randrange(len(shape))
        return [(name, dtype, [
            *shape[:at],
            chance.choice([0, 1, 2, 3, 16, 64, 128, shape[at] * 2]), *shape[at + 1:]
        ], values)]
    if kind == 5:
        return [(text_damaged(name.encode("utf-8", "replace"),
                              chance).decode("utf-8", "replace"), dtype, shape, values)]
    if kind == 6:
        return [(name, dtype, shape,
                 chance.choice([
                     b"\xff", b"\0", b"\x7f", b"\0\0\x80\x7f", b"\0\0\xc0\x7f",
                     chance.randbytes(8)
                 ]))]
    return [(name, dtype, shape, bytes_damaged(values, chance))]


def tensor_bytes_damaged(data: bytes, chance: random.Random) -> bytes:
    """The JSON in it, such as a quant_state of bitsandbytes, changed to JSON of the same length
    where it fits; or any bytes."""
    places = [(found.start(), found.end()) for found in re.finditer(rb"\{\"[^{}]{10,}\}", data)]
    if not places or chance.random() < 0.3:
        return bytes_damaged(data, chance)
    start, end = chance.choice(places)
    changed = json_damaged(data[start:end], chance)
    return data[:start] + changed[:end - start].ljust(end - start) + data[end:]


def join_files(files: dict[str, bytes]) -> bytes:
    """Several files as one input. A content that begins with `-> ` is a link to what follows."""
    return b"\n".join(FILE + name.encode("utf-8", "surrogatepass") + b"\n" + content
                      for name, content in files.items())


def split_files(data: bytes) -> dict[str, bytes]:
    """What `join_files` has joined; of any bytes something."""
    parts = (b"\n" + data).split(b"\n" + FILE)[1:]
    pairs = [part.partition(b"\n") for part in parts]
    return {name.decode("utf-8", "replace")[:100]: content for name, _, content in pairs}


def files_damaged(data: bytes, chance: random.Random, mutate: Callable[[str], Mutate]) -> bytes:
    """One of several files changed by what `mutate` gives for its name, renamed, doubled, linked or
    left out."""
    files = split_files(data)
    if not files:
        return bytes_damaged(data, chance)
    name, kind = chance.choice(list(files)), chance.randrange(20)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[chance.choice(list(files))] = files[name]
    elif kind == 2:
        files[name] = b"-> " + chance.choice(
            [b"/etc/passwd", b"../outside", b"/dev/zero", b".", b"/", *(map(str.encode, files))]
        )
    elif kind == 3:
        files[text_damaged(name.encode(), chance).decode("utf-8", "replace")] = files.pop(name)
    else:
        files[name] = mutate(name)(files[name], chance)
    return join_files(files)
