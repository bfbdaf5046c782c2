"""The package of the registry in the real host, under the folder name that it gets there."""
import shutil

import pytest
from aged_host import host_of_version
from languages import DOCS, HELP_LANGUAGES, LOCALES, help_page

from devtools import ROOT
from devtools.host.package import FOLDER, unpack
from devtools.host.server import Server
from featherweight.ops.host_versions import OLDEST_HOST

if not (ROOT / ".git").exists() or not shutil.which("git"):
    pytest.skip("needs git and its checkout", allow_module_level=True)


def test_the_unpacked_package_gives_nodes_their_help_the_editor_scripts_templates_and_blueprints(
        tmp_path, server):
    """On the oldest ComfyUI that it is for, by the number."""
    unpack(tmp_path / "base")
    with Server(tmp_path / "base", host_of_version(tmp_path / "host", OLDEST_HOST),
                with_pack=False) as packed:
        assert "IMPORT FAILED" not in packed.log()
        info = packed.object_info()
        nodes = {
            name for name, node in info.items() if node["python_module"] == f"custom_nodes.{FOLDER}"
        }
        assert nodes == {
            name
            for name, node in server.object_info().items()
            if node["python_module"].startswith("custom_nodes.")
            and node["category"].startswith("Featherweight")
        }
        own = {node for node in nodes
               if node.startswith("Featherweight") and not info[node].get("deprecated")}
        for node in own:
            for language in HELP_LANGUAGES:
                page = help_page(node, language).relative_to(DOCS).as_posix()
                assert packed.get(f"/extensions/{FOLDER}/docs/{page}").startswith(b"# ")
        assert packed.get(f"/extensions/{FOLDER}/docs/UnetLoaderGGUF.md").startswith(b"# ")
        scripts = ("saved_values", "node_texts", "templates")
        assert {f"/extensions/{FOLDER}/{name}.js" for name in scripts} <= {
            *packed.get_json("/extensions")
        }
        assert "Flux.1 dev GGUF" in packed.get_json("/workflow_templates")[FOLDER]
        blueprints = {
            entry["name"] for entry in packed.get_json("/global_subgraphs").values()
            if entry["info"]["node_pack"] == f"custom_nodes.{FOLDER}"
        }
        assert "Flux.1 dev Text to Image (Featherweight)" in blueprints
        assert {
            language: texts["nodeDefs"].keys()
            for language, texts in packed.get_json("/i18n").items()
        } == dict.fromkeys(LOCALES, own)
