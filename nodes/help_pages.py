"""Help pages, served by a route under the title of each node.

The editor asks for a page by the id of its node and its language, and, if it gets none, for the
page without a language. Several nodes share a page, and some ids differ only in capital letters,
which file names on some systems cannot, so pages are not served as files. The route also has the
English page under its language, for which there is no file.
"""
import re
from pathlib import Path

from comfy_api.latest import io

from .comfyui_server import log_lack, running_server

PACK = Path(__file__).parent.parent
DOCS = Path(__file__).parent / "web" / "docs"
ENGLISH = "en"


def page_text(node: type[io.ComfyNode], locale: str = ENGLISH) -> str | None:
    """Returns the page that a node class names in `HELP_PAGE`, else the one with the node's id.

    None without that translation.
    """
    name = getattr(node, "HELP_PAGE", node.GET_SCHEMA().node_id)
    file = DOCS / (f"{name}.md" if locale == ENGLISH else f"{name}/{locale}.md")
    if not re.fullmatch(r"[\w-]*", locale) or not file.is_file():
        return None
    _, _, text = file.read_text(encoding="utf-8").partition("\n")
    return f"# {node.GET_SCHEMA().display_name}\n{text}"


def serve(nodes: list[type[io.ComfyNode]]):
    """Adds routes for the pages of these nodes to the host's server, if it runs."""
    pages = {node.GET_SCHEMA().node_id: node for node in nodes}
    server = running_server()
    if server is None or not pages:
        return
    from aiohttp import web
    try:
        get = server.routes.get
    except AttributeError as error:
        return log_lack(str(error), "nodes under the ids of other packs have no help page")

    async def answer(request):
        node = pages.get(request.match_info["node_id"])
        text = page_text(node, request.match_info.get("locale", ENGLISH)) if node else None
        if text is None:
            return web.Response(status=404)
        return web.Response(text=text, content_type="text/markdown")

    ids = "|".join(pages)
    get(f"/extensions/{PACK.name}/docs/{{node_id:{ids}}}.md")(answer)
    get(f"/extensions/{PACK.name}/docs/{{node_id:{ids}}}/{{locale}}.md")(answer)
