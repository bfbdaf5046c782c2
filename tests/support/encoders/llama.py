"""Llama 3 and its relatives from Mistral. Their widths are real: the host tells them apart by
it."""
import base64
import json

import gguf
import torch
from comfy.text_encoders.flux import load_mistral_tokenizer

from .encoder import Encoder, Weights

PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# as of GPT-2's tokenizer
BYTE_LETTERS = [*map(chr, PRINTABLE), *(chr(256 + i) for i in range(256 - len(PRINTABLE)))]
BYTE_VALUES = [*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE)]
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 11)), "<pad>"]

# A vocabulary of bytes and one merge, as GGUF metadata and as Mistral's tekken.json.
METADATA = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken",
    "tokenizer.ggml.tokens": [*SPECIAL, *BYTE_LETTERS, "ab"],
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * 257, "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 11
}
TEKKEN = {
    "config": {
        "default_vocab_size": len(SPECIAL) + 257, "default_num_special_tokens": len(SPECIAL)
    }, "special_tokens": [{"rank": rank, "token_str": token, "is_control": True}
                          for rank, token in enumerate(SPECIAL)],
    "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
              for rank, token in enumerate([*(bytes([value]) for value in BYTE_VALUES), b"ab"])]
}

SMALL = {
    "vocab_size": len(METADATA["tokenizer.ggml.tokens"]), "num_hidden_layers": 2,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2
}
HEADS = {"q_proj": 4, "k_proj": 2}


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def permuted(weights: Weights) -> Weights:
    """conversion/llama.py of llama.cpp 0.5.0: `LlamaModel.permute`, and what a language model has
    beside an encoder."""
    changed = {}
    for name, values in weights.items():
        projection = name.split(".")[-2]
        if projection in HEADS:
            heads = values.reshape(HEADS[projection], 2, len(values) // HEADS[projection] // 2, -1)
            values = heads.swapaxes(1, 2).reshape(values.shape)
        changed[name] = values
    return changed | {
        "rope_freqs.weight": torch.ones(64),
        "lm_head.weight": weights["model.embed_tokens.weight"],
    }


def marks(width: int, *layers: int) -> dict[str, tuple[int, ...]]:
    return {
        f"model.layers.{layer}.post_attention_layernorm.weight": (width,)
        for layer in layers or (0,)
    }


def tokenizer_problem(tekken: torch.Tensor) -> str:
    """What keeps the host from reading a tekken.json, if anything does."""
    try:
        load_mistral_tokenizer(tekken)
    except TypeError as error:
        return f"this version of transformers has no tokenizer that the host can use: {error}"
    return ""


TEKKEN_BYTES = as_bytes(json.dumps(TEKKEN))
MISTRAL = {"metadata": METADATA, "extra": {"tekken_model": TEKKEN_BYTES}, "changed": permuted,
           "problem": tokenizer_problem(TEKKEN_BYTES)}

ENCODERS = {
    "llama-3-8b": Encoder("LLAMA3_8", "hidream", gguf.MODEL_ARCH.LLAMA, SMALL, "llama", marks(4096),
                          changed=permuted),
    "mistral-3-24b": Encoder("MISTRAL3_24B", "flux2", gguf.MODEL_ARCH.LLAMA, SMALL, "mistral3_24b",
                             marks(5120, 0, 39), **MISTRAL),
    "mistral-3-24b-flux2": Encoder("MISTRAL3_24B_PRUNED_FLUX2", "flux2", gguf.MODEL_ARCH.MISTRAL3,
                                   SMALL, "mistral3_24b", marks(5120), **MISTRAL),
    "ministral-3-3b": Encoder("MINISTRAL_3_3B", "flux2", gguf.MODEL_ARCH.MISTRAL3,
                              {**SMALL, "num_hidden_layers": 3}, "ministral3_3b", marks(3072),
                              **MISTRAL)
}
