"""The nodes of this pack, as the host gets them."""
import ast
import asyncio
import importlib
import pkgutil
from pathlib import Path

import featherweight.nodes
from featherweight.loaders.folders import register_folders
from featherweight.nodes import FeatherweightExtension, find_nodes


async def _load_extension():
    extension = FeatherweightExtension()
    await extension.on_load()
    return await extension.get_node_list()


def node_list():
    return asyncio.run(_load_extension())


def files_of_nodes() -> dict[str, str]:
    """Each node's id -> its file, of all files, whatever the host lacks."""
    register_folders()
    modules = [importlib.import_module(f"featherweight.nodes.{found.name}")
               for found in pkgutil.iter_modules(featherweight.nodes.__path__)]
    return {node.GET_SCHEMA().node_id: module.__name__.rpartition(".")[2] for module in modules for node in find_nodes(module)}


def ids_in_source() -> list[str]:
    """What ComfyUI Manager finds: each literal `node_id` in a class that derives directly from `io.ComfyNode`."""
    found = []
    for path in sorted(Path(featherweight.nodes.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "io.ComfyNode" in map(ast.unparse, node.bases):
                found += [word.value.value for word in ast.walk(node)
                          if isinstance(word, ast.keyword) and word.arg == "node_id" and isinstance(word.value, ast.Constant)]
    return found
