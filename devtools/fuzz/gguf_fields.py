"""GGUF headers as fields that can be damaged one by one; the layout is in
`loaders/files/gguf_header.py`."""
import random
import struct
from dataclasses import dataclass, replace

from .mutations import INTERESTING, TEXT_VALUES, bytes_damaged

# of metadata values by type
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
OTHER_NAMES = [
    b"general.alignment", b"general.architecture", b"general.type", b"split.count", b"split.no",
    b"adapter.lora.alpha", b"tokenizer.ggml.model", b"tokenizer.ggml.tokens",
    b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges",
    b"tokenizer.ggml.unknown_token_id", b"tokenizer.ggml.precompiled_charsmap"
]


@dataclass
class Field:
    """part: what it is. The length of a string and the number of items are fields before it; they
    follow it, until damaged."""

    part: str
    content: bytes


def fields_of(data: bytes) -> tuple[list[Field], bytes] | None:
    """(fields of the header, all bytes behind it); None where it cannot be walked through."""
    fields, at = [], 0

    def take(part: str, length: int) -> bytes:
        nonlocal at
        content = data[at:at + length]
        if len(content) < length or len(fields) > 3000:
            raise ValueError(part)
        fields.append(Field(part, content))
        at += length
        return content

    def number(part: str, length: int) -> int:
        return int.from_bytes(take(part, length), "little")

    def text(part: str):
        take(part, number("length", 8))

    try:
        take("magic", 8)
        tensors, entries = number("count", 8), number("count", 8)
        for _ in range(entries):
            text("name")
            kind, count = number("type", 4), 1
            if kind == ARRAY:
                kind, count = number("type", 4), number("items", 8)
            if kind == STRING:
                for _ in range(count):
                    text("text")
            else:
                take("value", count * WIDTHS[kind])
        for _ in range(tensors):
            text("name")
            take("shape", 8 * number("rank", 4))
            take("type", 4)
            take("offset", 8)
    except (ValueError, KeyError):
        return None
    return fields, data[at:]


def gguf_damaged(data: bytes, chance: random.Random) -> bytes:
    """One to three fields changed, doubled or left out; what cannot be walked through, and
    sometimes anything, as bytes."""
    found = fields_of(data) if chance.random() < 0.85 else None
    if found is None:
        return bytes_damaged(data, chance)
    fields, rest = found
    header = sum(len(field.content) for field in fields)
    if chance.random() < 0.15:  # what one key says under the name of another
        names = [index for index, field in enumerate(fields) if field.part == "name"]
        first, second = (chance.choice(names) for _ in range(2)) if names else (0, 0)
        fields[first - 1 : first + 1], fields[second - 1 : second + 1] = (
            fields[second - 1 : second + 1],
            fields[first - 1 : first + 1],
        )
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(fields))
        fields[at] = _changed(fields[at], chance)
        if fields[at].part in ("text", "name") and chance.random() < 0.8:
            fields[at - 1] = Field("length", len(fields[at].content).to_bytes(8, "little"))
    out = b"".join(field.content for field in fields)
    if chance.random() < 0.5:  # what is aligned stays where it is read, where the padding has room
        padding = len(rest) - len(rest.lstrip(b"\0"))
        grown = len(out) - header
        rest = rest[grown:] if 0 < grown <= padding else b"\0" * -grown + rest
    return out + rest


def _changed(field: Field, chance: random.Random) -> Field:
    content, part = field.content, field.part
    if part in ("text", "name"):
        choices = [
            chance.choice(TEXT_VALUES).encode("utf-8", "surrogatepass"),
            chance.choice(OTHER_NAMES), content[1:], content * 2,
            bytes_damaged(content, chance)
        ]
        return replace(field, content=chance.choice(choices))
    if part == "shape" and len(content) >= 8:
        sizes = list(struct.unpack(f"<{len(content) // 8}Q", content))
        at = chance.randrange(len(sizes))
        if chance.random() < 0.5:  # as many elements
            sizes[at - 1], sizes[at] = chance.choice([(sizes[at], sizes[at - 1]),
                                                      (1, sizes[at - 1] * sizes[at]),
                                                      (sizes[at - 1] * sizes[at], 1)])
        else:
            sizes[at] = chance.choice([*INTERESTING, sizes[0] * 2, sizes[0] + 1])
        return replace(field, content=struct.pack(f"<{len(sizes)}Q",
                                                  *(size % 2**64 for size in sizes)))
    if part == "type":
        return replace(field, content=chance.randrange(45).to_bytes(4, "little"))
    if part in ("value", "magic") and chance.random() < 0.6:
        return replace(
            field, content=(bytes_damaged(content, chance) + bytes(len(content)))[:len(content)])
    width = max(1, min(len(content), 8))
    value = chance.choice(
        [*INTERESTING,
         int.from_bytes(content[:8], "little") + chance.choice([-1, 1, 32])])
    return replace(field,
                   content=(value % (1 << 8 * width)).to_bytes(width, "little") + content[width:])
