"""The nodes of this pack, as the host gets them."""
import asyncio

from featherweight.nodes import FeatherweightExtension


async def _load_extension():
    extension = FeatherweightExtension()
    await extension.on_load()
    return await extension.get_node_list()


def node_list():
    return asyncio.run(_load_extension())
