"""The nodes of this pack, as the host gets them."""
import ast
import asyncio
import contextlib
import re
import sys
from pathlib import Path

import pytest

import featherweight.nodes
from featherweight.nodes import FeatherweightExtension


async def _load_extension():
    extension = FeatherweightExtension()
    await extension.on_load()
    return await extension.get_node_list()


@contextlib.contextmanager
def hosts_server():
    """The host's module `server` is found: pytest puts a stand-in of that name in its place, for
    the folder tests/server."""
    with pytest.MonkeyPatch.context() as patch:
        if getattr(sys.modules.get("server"), "__file__", None) is None:
            patch.delitem(sys.modules, "server", raising=False)
        yield


def node_list():
    with hosts_server():
        return asyncio.run(_load_extension())


def current_nodes():
    """Without those of ours that are there for workflows of earlier versions alone."""
    schemas = ((node, node.GET_SCHEMA()) for node in node_list())
    return [node for node, schema in schemas
            if not (schema.is_deprecated and schema.node_id.startswith("Featherweight"))]


def ids_in_source() -> list[str]:
    """What ComfyUI Manager finds: of each class that derives directly from `io.ComfyNode` the
    literal `node_id`, or its name where it has none; and the literal keys of `NODE_CONFIG`, in a
    source from which it takes backslashes first.
    """
    found = []
    for path in sorted(Path(featherweight.nodes.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and "io.ComfyNode" in map(ast.unparse, node.bases):
                ids = [
                    word.value.value for word in ast.walk(node) if isinstance(word, ast.keyword)
                    and word.arg == "node_id" and isinstance(word.value, ast.Constant)
                ]
                found += ids or [node.name]
        if "NODE_CONFIG = {" in source:
            table, = (
                node.value for node in ast.parse(re.sub(r"""\\[^"']""", "", source)).body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NODE_CONFIG")
            found += [key.value for key in table.keys]
    return found
