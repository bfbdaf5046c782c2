"""Which files are read here, and which by the host's own loaders."""
import os

from safetensors import SafetensorError, safe_open

from .comfy_quant import find_unread_layer
from .files.bitsandbytes import has_packed_weights
from .files.safetensors import is_shard


def needs_own_reader(path: str, pack_to: str | None = None) -> bool:
    """Return whether `open_weights` reads a file here; the host's own loaders read all others.

    GGUF, folders, safetensors split over several files and those with weights that bitsandbytes
    packed. The host's loaders take one file for a whole model. A damaged safetensors file, and one
    in a quantised format that the host does not read, are read here for the error that names it.

    Args:
        path: of a file or folder.
        pack_to: the type that weights are to be packed to as they are read, or None.
    """
    name = str(path).lower()
    if pack_to or name.endswith(".gguf") or os.path.isdir(path):
        return True
    if not name.endswith((".safetensors", ".sft")):
        return False
    if is_shard(path):
        return True
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = file.keys(), file.metadata() or {}
            return (has_packed_weights(keys)
                    or find_unread_layer(keys, file.get_tensor, metadata) is not None)
    except (SafetensorError, OSError, RuntimeError):  # the last from torch, which maps the file
        return True
