"""Converts the tokenizer in the metadata of GGUF files (`tokenizer.ggml.*`) to what the host reads.

Public functions take metadata by key and return the bytes of a file as a uint8 tensor. They raise
KeyError with a key that the metadata lack, and TokenizerError for values that are wrong.
"""
import base64
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch

from ...ops.stable_names import short_error_name
from ..container.weight_file import safe_repr
from .arch import SENTENCEPIECE, Weights

MODEL, TOKENS, SCORES, TYPES, MERGES = (
    f"tokenizer.ggml.{key}" for key in ("model", "tokens", "scores", "token_type", "merges"))

CHARSMAP_KEY = "tokenizer.ggml.precompiled_charsmap"

# Values of `tokenizer.ggml.token_type`, which are those of SentencePiece.Type.
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

# Patterns that split a text into words before bytes are merged: of Mistral's tekken.json and of
# OpenAI's o200k (tiktoken 0.11).
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(ending)s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(ending)s|"
    r"%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_WORDS = _WORDS % {"ending": "", "digits": r"\p{N}"}
O200K_WORDS = _WORDS % {"ending": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": r"\p{N}{1,3}"}

# A vocabulary of bytes writes a byte as a character. GPT-2 gave bytes without a visible character
# those from 256 on: character -> byte.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_INVISIBLE = [byte for byte in range(256) if byte not in _VISIBLE]
BYTES = {256 + index: byte for index, byte in enumerate(_INVISIBLE)}

# The parts of a tokenizer.json besides the vocabulary and the merges.
_BYTE_LEVEL_STEP = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
BYTE_LEVEL = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": O200K_WORDS},
                "behavior": "Isolated",
                "invert": False,
            },
            _BYTE_LEVEL_STEP,
        ],
    },
    "decoder": _BYTE_LEVEL_STEP,
}
CHARACTER_LEVEL = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
}


@short_error_name
class TokenizerError(ValueError):
    """Raised for wrong metadata. The message names the key, its value and what was expected."""


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{key} is {safe_repr(values)}, expected a list of strings")
    return values


def _check_numbers(tokens: list[str], lists: Mapping[str, Any]):
    """Raises TokenizerError unless every list, by its key, has a finite number for each token."""
    for key, values in lists.items():
        if not isinstance(values, list) or len(values) != len(tokens) or not all(
                isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise TokenizerError(
                f"{key} is {safe_repr(values)}, expected a number for each of the {len(tokens)}"
                " tokens"
            )


def sentencepiece(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Weights:
    """Returns the SentencePiece model among the weights, or one made from llama.cpp's metadata.

    A converter to GGUF may have stored the bytes of that tensor as another dtype.

    Raises:
        KeyError: with the key that the metadata lack.
    """
    stored = weights.get(SENTENCEPIECE)
    model = sentencepiece_model(metadata) if stored is None else stored.to(torch.uint8)
    return {SENTENCEPIECE: model}


def sentencepiece_model(metadata: Mapping[str, Any]) -> torch.Tensor:
    """Returns a SentencePiece model: unigram for T5 and XLM-R, byte-pair encoding for others."""
    model_type = UNIGRAM if metadata[MODEL] == "t5" else BPE
    tokens, scores, types = _texts(metadata, TOKENS), metadata[SCORES], metadata[TYPES]
    _check_numbers(tokens, {SCORES: scores, TYPES: types})
    if not all(type_ in range(NORMAL, BYTE + 1) for type_ in types):
        raise TokenizerError(
            f"{TYPES} is {safe_repr(types)}, expected numbers from {NORMAL} to {BYTE}")
    roles = _roles(metadata, tokens)
    types = _piece_types([int(type_) for type_ in types], roles, model_type)
    pieces = _pieces(tokens, scores, types)
    trainer = (
        _field(MODEL_TYPE, model_type)
        + _field(VOCAB_SIZE, len(pieces))
        + _field(BYTE_FALLBACK, BYTE in types)
    )
    for role, (_, default, field) in ROLES.items():
        piece = tokens[roles[role]] if role in roles else default
        trainer += _field(field, piece.encode())
    charsmap = metadata.get(CHARSMAP_KEY, [])
    if not isinstance(charsmap, list) or not all(isinstance(value, int) for value in charsmap):
        raise TokenizerError(f"{CHARSMAP_KEY} is {safe_repr(charsmap)}, expected a list of bytes")
    charsmap = bytes(value & 255 for value in charsmap)
    adds_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    removes_spaces = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    normalizer = (
        _field(CHARSMAP, charsmap)
        + _field(ADD_DUMMY_PREFIX, adds_space)
        + _field(REMOVE_EXTRA_WHITESPACES, removes_spaces)
    )
    return _as_tensor(b"".join(pieces) + _field(TRAINER, trainer) + _field(NORMALIZER, normalizer))


def _roles(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Returns role -> id of its token, from the metadata or by SentencePiece's default piece."""
    roles = {}
    for role, (key, default, _) in ROLES.items():
        index = metadata.get(key)
        if index is None and default in tokens:
            index = tokens.index(default)
        if index is not None and not isinstance(index, int):
            raise TokenizerError(f"{key} is {safe_repr(index)}, expected the id of a token")
        if index is not None and 0 <= index < len(tokens):
            roles[role] = index
    if "unk" not in roles:
        raise KeyError(ROLES["unk"][0])
    for role in ("bos", "eos"):
        index = roles.get(role)
        if index is not None and (index == roles["unk"] or tokens.index(tokens[index]) != index):
            raise TokenizerError(
                f"{ROLES[role][0]} is {index}, whose text {safe_repr(tokens[index])} is that of"
                f" token {tokens.index(tokens[index])} too, expected a token of its own")
    return roles


def _piece_types(types: list[int], roles: Mapping[str, int], model_type: int) -> list[int]:
    """Restores the types that SentencePiece gave the pieces.

    Converters make `<unk>` and the user-defined markers of a chat template control tokens, which
    SentencePiece would not match in a text. Padding up to the rows of the embedding is unused, in
    older files unknown.
    """
    restored = {UNKNOWN: UNUSED}
    if model_type == BPE:
        restored[CONTROL] = USER_DEFINED
    types = [restored.get(type_, type_) for type_ in types]
    for role in ("pad", "eos", "bos", "unk"):
        if role in roles:
            types[roles[role]] = UNKNOWN if role == "unk" else CONTROL
    return types


def _pieces(tokens: list[str], scores: list[float], types: list[int]) -> list[bytes]:
    """Returns the field of each piece, by id. SentencePiece needs distinct pieces, none empty."""
    fields, seen = [], set()
    for index, (text, score, type_) in enumerate(zip(tokens, scores, types)):
        if type_ == USER_DEFINED:
            text = text.replace(" ", "▁")  # the converter replaced it
        if not text or text in seen:
            text, type_ = f"<unused piece {index}>", UNUSED
        seen.add(text)
        piece = _field(1, text.encode()) + _field(2, float(score)) + _field(3, type_)
        fields.append(_field(PIECES, piece))
    return fields


def _field(number: int, value: int | float | bytes) -> bytes:
    """Returns a field of a protobuf message: varint, 32-bit float, or length and bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(int(value))


def _varint(value: int) -> bytes:
    """Encodes 7 bits a byte, lowest first; the highest bit says that another byte follows."""
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def tekken_model(metadata: Mapping[str, Any]) -> torch.Tensor:
    """Returns a tekken.json (Mistral Small 3, Ministral 3) from a vocabulary of bytes.

    Its first tokens are the special ones.
    """
    tokens, types = _texts(metadata, TOKENS), metadata[TYPES]
    _check_numbers(tokens, {TYPES: types})
    if MERGES not in metadata:  # not a vocabulary of bytes
        raise KeyError(MERGES)
    special = next((index for index, type_ in enumerate(types) if type_ == NORMAL), len(types))
    vocabulary = (text.translate(BYTES).encode("latin-1", "backslashreplace")
                  for text in tokens[special:])
    return _as_json({
        "config": {
            "pattern": TEKKEN_WORDS,
            "default_vocab_size": len(tokens),
            "default_num_special_tokens": special,
        },
        "special_tokens": [
            {"rank": rank, "token_str": text} for rank, text in enumerate(tokens[:special])
        ],
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for rank, token in enumerate(vocabulary)
        ],
    })


def metadata_of_json(content: Any) -> dict[str, Any]:
    """Converts the content of a byte-level tokenizer.json to the metadata of a GGUF file.

    A token is either special or normal.
    """
    try:
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        ids, merges = content["model"]["vocab"] | added, content["model"]["merges"]
        tokens = sorted(ids, key=ids.get)
        complete = [ids[token] for token in tokens] == list(range(len(tokens)))
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError("expected added_tokens, vocab and merges in it") from error
    if not complete:
        raise TokenizerError("expected the ids of its tokens to count from 0 without a gap")
    types = [CONTROL if token in added else NORMAL for token in tokens]
    return {MODEL: "gpt2", TOKENS: tokens, TYPES: types, MERGES: merges}


def tokenizer_json(metadata: Mapping[str, Any]) -> torch.Tensor:
    """Returns a tokenizer.json of Hugging Face `tokenizers`.

    Merges are of bytes (GPT-OSS) or of characters (Gemma 4).
    """
    tokens, types, merges = _texts(metadata, TOKENS), metadata[TYPES], _texts(metadata, MERGES)
    _check_numbers(tokens, {TYPES: types})
    is_byte_level = metadata[MODEL] == "gpt2"
    added_tokens = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type_ == CONTROL,
        }
        for index, type_ in enumerate(types)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    return _as_json({
        "version": "1.0",
        "added_tokens": added_tokens,
        **(BYTE_LEVEL if is_byte_level else CHARACTER_LEVEL),
        "model": {
            "type": "BPE",
            "byte_fallback": not is_byte_level,
            "ignore_merges": is_byte_level,
            "vocab": {text: index for index, text in enumerate(tokens)},
            "merges": merges,
        },
    })


def _as_json(content: dict[str, Any]) -> torch.Tensor:
    return _as_tensor(json.dumps(content, ensure_ascii=False).encode())


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
