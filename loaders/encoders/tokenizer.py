"""Tokenizers from the metadata of GGUF files (`tokenizer.ggml.*`), in the forms the host reads.

Every function takes metadata by key and returns the bytes of a file as a uint8 tensor, and raises
KeyError with the key that the metadata lack, and TokenizerError for what is in them.
"""
import base64
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch

from ..files.container import safe_repr

MODEL, TOKENS, SCORES, TYPES, MERGES = (
    f"tokenizer.ggml.{key}" for key in ("model", "tokens", "scores", "token_type", "merges"))

CHARSMAP_KEY = "tokenizer.ggml.precompiled_charsmap"

# Values of `tokenizer.ggml.token_type`, the same as of SentencePiece.Type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Fields of ModelProto, TrainerSpec and NormalizerSpec in sentencepiece_model.proto (sentencepiece
# 0.2).
PIECES, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK = 3, 4, 35
CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 2, 3, 4
UNIGRAM, BPE = 1, 2

# Role -> key of its token's id, SentencePiece's default piece, field of the piece in TrainerSpec.
ROLES = {
    "unk": ("tokenizer.ggml.unknown_token_id", "<unk>", 45),
    "bos": ("tokenizer.ggml.bos_token_id", "<s>", 46),
    "eos": ("tokenizer.ggml.eos_token_id", "</s>", 47),
    "pad": ("tokenizer.ggml.padding_token_id", "<pad>", 48),
}

# How a text is cut into words before their bytes are merged: Mistral's tekken.json and OpenAI's
# o200k (tiktoken 0.11).
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(ending)s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(ending)s|"
    r"%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_WORDS = _WORDS % {"ending": "", "digits": r"\p{N}"}
O200K_WORDS = _WORDS % {"ending": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": r"\p{N}{1,3}"}

# In a vocabulary of bytes a character stands for a byte: GPT-2 gave those that cannot be seen
# characters from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {
    256 + place: byte
    for place, byte in enumerate(byte for byte in range(256) if byte not in _VISIBLE)
}

# What stands around the merges in a tokenizer.json.
BYTE_LEVEL = {
    "normalizer": None, "pre_tokenizer": {
        "type": "Sequence", "pretokenizers": [{
            "type": "Split", "pattern": {"Regex": O200K_WORDS}, "behavior": "Isolated",
            "invert": False
        }, {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
        }]
    }, "decoder": {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }
}
CHARACTER_LEVEL = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": None, "decoder": {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                     {"type": "ByteFallback"}, {"type": "Fuse"}]
    }
}


class TokenizerError(ValueError):
    """Metadata of which no tokenizer can be made: which, what was found, what was expected."""


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{key} is {safe_repr(values)}, expected a list of texts")
    return values


def _check_numbers(tokens: list[str], lists: Mapping[str, Any]):
    """Raises TokenizerError where a list has not a number for each token. lists: by their keys."""
    for key, values in lists.items():
        if not isinstance(values, list) or len(values) != len(tokens) or not all(
                isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise TokenizerError(
                f"{key} is {safe_repr(values)}, expected a number for each of the {len(tokens)}"
                " tokens"
            )


def sentencepiece_model(metadata: Mapping[str, Any]) -> torch.Tensor:
    """A SentencePiece model: T5's and XLM-R's (unigram), Gemma's and Llama 2's (byte-pair
    encoding)."""
    kind = UNIGRAM if metadata[MODEL] == "t5" else BPE
    tokens, scores, types = _texts(metadata, TOKENS), metadata[SCORES], metadata[TYPES]
    _check_numbers(tokens, {SCORES: scores, TYPES: types})
    if not all(type_ in range(NORMAL, BYTE + 1) for type_ in types):
        raise TokenizerError(
            f"{TYPES} is {safe_repr(types)}, expected numbers from {NORMAL} to {BYTE}")
    roles = _roles(metadata, tokens)
    types = _piece_types([int(type_) for type_ in types], roles, kind)
    pieces = _pieces(tokens, scores, types)
    trainer = (
        _field(MODEL_TYPE, kind)
        + _field(VOCAB_SIZE, len(pieces))
        + _field(BYTE_FALLBACK, BYTE in types)
    )
    for role, (_, default, field) in ROLES.items():
        trainer += _field(field, (tokens[roles[role]] if role in roles else default).encode())
    charsmap = metadata.get(CHARSMAP_KEY, [])
    if not isinstance(charsmap, list) or not all(isinstance(value, int) for value in charsmap):
        raise TokenizerError(f"{CHARSMAP_KEY} is {safe_repr(charsmap)}, expected a list of bytes")
    charsmap = bytes(value & 255 for value in charsmap)
    normalizer = (
        _field(CHARSMAP, charsmap)
        + _field(ADD_DUMMY_PREFIX, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
        + _field(
            REMOVE_EXTRA_WHITESPACES,
            bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        )
    )
    return _as_tensor(b"".join(pieces) + _field(TRAINER, trainer) + _field(NORMALIZER, normalizer))


def _roles(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Role -> id of its token: what the metadata say, or the token with SentencePiece's default
    text."""
    roles = {}
    for role, (key, default, _) in ROLES.items():
        index = metadata.get(key)
        if index is None and default in tokens:
            index = tokens.index(default)
        if index is not None and not isinstance(index, int):
            raise TokenizerError(f"{key} is {safe_repr(index)}, expected the number of a token")
        if index is not None and 0 <= index < len(tokens):
            roles[role] = index
    if "unk" not in roles:
        raise KeyError(ROLES["unk"][0])
    for role in ("bos", "eos"):
        index = roles.get(role)
        if index is not None and (index == roles["unk"] or tokens.index(tokens[index]) != index):
            raise TokenizerError(
                f"{ROLES[role][0]} is {index}, which is {safe_repr(tokens[index])} as token"
                f" {tokens.index(tokens[index])} is, expected a token of its own")
    return roles


def _piece_types(types: list[int], roles: Mapping[str, int], kind: int) -> list[int]:
    """The types as SentencePiece had them.

    Converters make control tokens of `<unk>` and of the user-defined marks of a chat template,
    which SentencePiece then would not find in a text. Fillers up to the rows of the embedding are
    unused, or unknown in older files.
    """
    changed = {UNKNOWN: UNUSED} | ({CONTROL: USER_DEFINED} if kind == BPE else {})
    types = [changed.get(type_, type_) for type_ in types]
    for role in ("pad", "eos", "bos", "unk"):
        if role in roles:
            types[roles[role]] = UNKNOWN if role == "unk" else CONTROL
    return types


def _pieces(tokens: list[str], scores: list[float], types: list[int]) -> list[bytes]:
    """The field of each piece; its place is its id. SentencePiece wants them distinct and not
    empty."""
    fields, seen = [], set()
    for index, (text, score, type_) in enumerate(zip(tokens, scores, types)):
        if type_ == USER_DEFINED:
            text = text.replace(" ", "▁")  # as it was before the converter
        if not text or text in seen:
            text, type_ = f"<unused piece {index}>", UNUSED
        seen.add(text)
        fields.append(
            _field(PIECES,
                   _field(1, text.encode()) + _field(2, float(score)) + _field(3, type_)))
    return fields


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message: varint, 32-bit float, or length and bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(int(value))


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the highest bit says that another byte follows."""
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def tekken_model(metadata: Mapping[str, Any]) -> torch.Tensor:
    """Mistral's tekken.json, from a vocabulary of bytes whose first tokens are the special ones
    (Small 3, Ministral 3)."""
    tokens, types = _texts(metadata, TOKENS), metadata[TYPES]
    _check_numbers(tokens, {TYPES: types})
    if MERGES not in metadata:  # no vocabulary of bytes
        raise KeyError(MERGES)
    special = next((index for index, type_ in enumerate(types) if type_ == NORMAL), len(types))
    vocabulary = (text.translate(BYTES).encode("latin-1", "backslashreplace")
                  for text in tokens[special:])
    return _as_json({
        "config": {
            "pattern": TEKKEN_WORDS, "default_vocab_size": len(tokens),
            "default_num_special_tokens": special
        }, "special_tokens": [{"rank": rank, "token_str": text}
                              for rank, text in enumerate(tokens[:special])],
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()}
                  for rank, token in enumerate(vocabulary)]
    })


def metadata_of_json(content: Any) -> dict[str, Any]:
    """The metadata that a tokenizer.json of bytes would have in a GGUF file; a token is special or
    normal."""
    try:
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        ids, merges = content["model"]["vocab"] | added, content["model"]["merges"]
        tokens = sorted(ids, key=ids.get)
        complete = [ids[token] for token in tokens] == list(range(len(tokens)))
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError("it has not the added_tokens, vocab and merges of one") from error
    if not complete:
        raise TokenizerError("the ids of its tokens are not the numbers from 0 on")
    return {
        MODEL: "gpt2", TOKENS: tokens,
        TYPES: [CONTROL if token in added else NORMAL for token in tokens], MERGES: merges
    }


def tokenizer_json(metadata: Mapping[str, Any]) -> torch.Tensor:
    """A tokenizer.json of Hugging Face `tokenizers`: GPT-OSS (merges of bytes) and Gemma 4 (merges
    of characters)."""
    tokens, types, merges = _texts(metadata, TOKENS), metadata[TYPES], _texts(metadata, MERGES)
    _check_numbers(tokens, {TYPES: types})
    of_bytes = metadata[MODEL] == "gpt2"
    return _as_json({
        "version": "1.0", "added_tokens": [{
            "id": index, "content": tokens[index], "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": type_ == CONTROL
        } for index, type_ in enumerate(types) if type_ in (CONTROL, USER_DEFINED)],
        **(BYTE_LEVEL if of_bytes else CHARACTER_LEVEL), "model": {
            "type": "BPE", "byte_fallback": not of_bytes, "ignore_merges": of_bytes,
            "vocab": {text: index for index, text in enumerate(tokens)}, "merges": merges
        }
    })


def _as_json(content: dict[str, Any]) -> torch.Tensor:
    return _as_tensor(json.dumps(content, ensure_ascii=False).encode())


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
