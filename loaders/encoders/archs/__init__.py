"""Families of text encoders, one file each. Importing this package registers all of them."""
from . import (  # noqa: F401  importing a module registers its families
    clip,
    gemma,
    gemma4,
    gpt_oss,
    jina,
    llama,
    mistral,
    qwen,
    qwen35,
    qwen_vl,
    t5,
    t5gemma,
)
