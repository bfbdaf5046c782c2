"""Tokenizers made of the metadata of GGUF files."""
import contextlib

import numpy as np

from ..gguf_fields import gguf_damaged
from .weights import WeightTarget

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "▁a", "b", "▁", "<0x41>"]


class Tokenizer(WeightTarget):
    name, reads = (
        "tokenizer",
        "tokenizer metadata of GGUF text encoders: SentencePiece, tekken, tokenizer.json",
    )
    damaged = staticmethod(gguf_damaged)

    def prepare(self):
        from featherweight.loaders.models.text_encoder import TOKENIZERS, _Encoder
        from featherweight.loaders.progress import Progress
        honest = super().prepare()
        import comfy.text_encoders.spiece_tokenizer
        self.kept, self.pieces = TOKENIZERS, comfy.text_encoders.spiece_tokenizer.SPieceTokenizer
        stages = ("reading", "converting")
        self.encoder = lambda path: _Encoder(str(path), Progress(*stages), None, frozenset())
        return honest

    def honest(self):
        def rows(*names: str, width: int = 32) -> dict[str, np.ndarray]:
            return {f"{name}.weight": np.ones((1, width), np.float32) for name in names}

        from devtools.files.gguf_files import write_gguf
        plain = {
            f"tokenizer.ggml.{key}": value for key, value in {
                "model": "t5", "tokens": WORDS, "scores": [
                    0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5
                ], "token_type": [2, 3, 3, 3, 1, 4, 1, 6], "unknown_token_id": 0, "eos_token_id": 2,
                "padding_token_id": 3, "precompiled_charsmap": [0, 0, 0, 0]
            }.items()
        }
        merges = plain | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b", "b c"],
                          "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 4]}
        del plain["tokenizer.ggml.precompiled_charsmap"], merges[
            "tokenizer.ggml.precompiled_charsmap"]
        umt5 = {"token_embd.weight": np.ones((1 << 17, 0), np.float32)}  # told by its rows
        mistral = {"blk.0.attn_k.weight": np.ones((0, 3072), np.float32)}  # told by its width
        return [
            self.written(
                lambda path, rows=tensors, known=known: write_gguf(
                    path, rows, lambda name, values: kind, "any", known
                )
            )
            for tensors, known, kind in (
                (rows("enc.blk.0.attn_q", "enc.blk.0.ffn_gate") | umt5, plain, "F16"),
                (rows("blk.0.attn_sinks", "token_embd"), merges, "F16"),
                (mistral, merges, "F16"),
            )
        ]

    def read(self, data):
        path = self.folder / "encoder.gguf"
        path.write_bytes(data)
        self.kept.clear()
        weights = self.encoder(path).convert()
        if (model := weights.get("spiece_model")) is not None:
            # SentencePiece's own, as with a model that the host reads from a file
            with contextlib.suppress(RuntimeError):
                self.pieces(model)("a b <pad> ab A")
