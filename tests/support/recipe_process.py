"""Another process with the pack in another folder: it unpickles recipes, loads by them, and prints
what it got as JSON.

Run as `python recipe_process.py HOST PACK PICKLE BYTES`. The pack is imported as the host does it,
under its folder's name; tables of at most so many bytes stay plain.
"""
import hashlib
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path


def digest(patcher) -> list[str]:
    """What tells one model from another: its class, the names, shapes and bytes of its weights, and
    how its layers compute."""
    import torch

    found = hashlib.sha256()
    for name, weight in sorted(patcher.model.state_dict().items()):
        weight = getattr(weight, "_qdata", weight).detach().contiguous()
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.flatten().view(torch.uint8).numpy().tobytes())
    ways = {
        layer.compute for layer in patcher.model.modules() if hasattr(layer, "compute")
    }
    return [type(patcher).__name__, type(patcher.model).__name__, found.hexdigest(), *sorted(ways)]


def import_pack(host: str, pack: str) -> str:
    """Returns the name that the pack is imported under."""
    sys.path.insert(0, host)
    sys.argv[1:] = os.environ["HOST_ARGUMENTS"].split()
    import comfy.options

    comfy.options.enable_args_parsing()
    name = pack.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name,
                                                  Path(pack) / "__init__.py",
                                                  submodule_search_locations=[pack])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    for loader in ("checkpoint", "diffusion", "text_encoder"):
        importlib.import_module(f"{name}.loaders.models.{loader}")
    return name


def main(host: str, pack: str, recipes: str, plain_table_bytes: str):
    layers = importlib.import_module(f"{import_pack(host, pack)}.ops.layers.packed_layers")
    layers.PLAIN_TABLE_BYTES = int(plain_table_bytes)
    found = []
    for recipe in pickle.loads(Path(recipes).read_bytes()):
        found.append([str(recipe), *digest(recipe())])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
