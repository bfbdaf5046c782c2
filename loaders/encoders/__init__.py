"""Text encoders: their families, tokenizers and vision towers, and which of them belong
together."""
