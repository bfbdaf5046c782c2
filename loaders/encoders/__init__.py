"""Text encoders: families, tokenizers, vision towers, and the sets that go together."""
