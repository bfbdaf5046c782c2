"""Files to packed tensors to host models. Importing this package registers every container of weight files."""
from . import gguf, safetensors  # noqa: F401
