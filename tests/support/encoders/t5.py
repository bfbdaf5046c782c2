"""T5 and its relatives. Jina CLIP v2 and ByT5 load beside another encoder only:
tests/loaders/encoders/test_t5.py."""
import functools
import io
from unittest.mock import patch

import comfy.text_encoders.sa3
import gguf
import sentencepiece
import torch

from .encoder import Encoder

T5_LAYER = "encoder.block.{}.layer.1.DenseReluDense.{}.weight"
T5_KEY = "encoder.block.0.layer.0.SelfAttention.k.weight"
T5_SMALL = {
    "num_layers": 2, "vocab_size": 256, "d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4
}
# what tells it from T5 is its many tokens
UMT5_SMALL = {**T5_SMALL, "vocab_size": 100_032, "d_model": 32, "num_heads": 2}


@functools.cache
def spiece_model() -> torch.Tensor:
    """A SentencePiece model of few pieces, as the host keeps it: bytes, uint8."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox jumps over the lazy dog"] * 4), model_writer=model,
        vocab_size=40, hard_vocab_limit=False, minloglevel=2)
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


@functools.cache
def spiece_metadata() -> dict:
    """The same model as llama.cpp 0.5.0, conversion/t5.py keeps it."""
    model = sentencepiece.SentencePieceProcessor(model_proto=spiece_model().numpy().tobytes())
    ids = range(model.get_piece_size())
    kinds = {
        gguf.TokenType.UNKNOWN: model.is_unknown, gguf.TokenType.CONTROL: model.is_control,
        gguf.TokenType.BYTE: model.is_byte
    }
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [model.id_to_piece(number) for number in ids],
        "tokenizer.ggml.scores": [model.get_score(number) for number in ids],
        "tokenizer.ggml.token_type": [
            int(next((kind for kind, has in kinds.items() if has(number)), gguf.TokenType.NORMAL))
            for number in ids
        ], "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(), "tokenizer.ggml.remove_extra_whitespaces": 1
    }


class SmallT5GemmaConfig(comfy.text_encoders.sa3.T5GemmaEncoderConfig):
    def __init__(self):
        super().__init__()
        self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers = (
            256,
            256,
            512,
            2,
        )
        self.num_attention_heads = self.num_key_value_heads = 4


class SmallT5Gemma(comfy.text_encoders.sa3.T5GemmaSDClipModel):
    def __init__(self, **kwargs):
        with patch.object(comfy.text_encoders.sa3, "T5GemmaEncoderConfig", SmallT5GemmaConfig):
            super().__init__(**kwargs)


ENCODERS = {
    "t5-xxl": Encoder("T5_XXL", "sd3", gguf.MODEL_ARCH.T5ENCODER, T5_SMALL, "t5xxl",
                      {T5_LAYER.format(23, "wi_1"): (10240, 32)}),
    "t5-xxl-old": Encoder("T5_XXL_OLD", "cosmos", gguf.MODEL_ARCH.T5, T5_SMALL, "t5xxl",
                          {T5_LAYER.format(23, "wi"): (32, 32)}),
    "t5-xl": Encoder("T5_XL", "stable_diffusion", gguf.MODEL_ARCH.T5ENCODER, T5_SMALL, "pile_t5xl",
                     {T5_LAYER.format(23, "wi_1"): (5120, 32)}),
    "t5-base": Encoder("T5_BASE", "stable_audio", gguf.MODEL_ARCH.T5ENCODER, T5_SMALL, "t5base",
                       {T5_KEY: (256, 256)}), "t5-base-gated": Encoder(
                           "T5_BASE", "stable_audio", gguf.MODEL_ARCH.T5ENCODER,
                           {**T5_SMALL, "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"},
                           "t5base", {T5_KEY: (256, 256)}),
    "t5-xxl of transformers": Encoder("T5_XXL", "sd3", None, T5_SMALL, "t5xxl",
                                      {T5_LAYER.format(23, "wi_1"): (10240, 32)}),
    "umt5-xxl": Encoder("T5_XXL", "wan", gguf.MODEL_ARCH.T5ENCODER, UMT5_SMALL, "umt5xxl",
                        {T5_LAYER.format(23, "wi_1"): (10240, 32)}, metadata=spiece_metadata(),
                        extra={"spiece_model": spiece_model()}),
    "umt5-xxl of transformers": Encoder("T5_XXL", "wan", None, UMT5_SMALL, "umt5xxl",
                                        {T5_LAYER.format(23, "wi_1"): (10240, 32)},
                                        extra={"spiece_model": spiece_model()}),
    "umt5-base": Encoder("T5_BASE", "ace", gguf.MODEL_ARCH.T5, UMT5_SMALL, "", {T5_KEY: (128, 32)},
                         metadata=spiece_metadata(), extra={"spiece_model": spiece_model()}),
    "umt5-base of transformers": Encoder("T5_BASE", "ace", None, UMT5_SMALL, "",
                                         {T5_KEY: (128, 32)},
                                         extra={"spiece_model": spiece_model()}),
    "t5-gemma": Encoder("T5_GEMMA", "stable_audio", None, {}, "t5gemma",
                        {"model.encoder.layers.0.pre_self_attn_layernorm.weight": (256,)},
                        extra={"spiece_model": spiece_model()},
                        options={"t5gemma_class": SmallT5Gemma})
}
