"""Beside another pack that owns the same ids: whichever loads first, that pack's class stays and ours stands back."""
import pytest

from devtools.server import PACK, ROOT, Server

# What matters of ComfyUI-GGUF: it owns the id, and makes two folder keys share one list.
OTHER_PACK = '''
import folder_paths

for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
    folder_paths.folder_names_and_paths[key] = (folder_paths.folder_names_and_paths[host_key][0], {".gguf"})


class UnetLoaderGGUF:
    CATEGORY = "other"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(s):
        return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}


NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": UnetLoaderGGUF}
'''


@pytest.mark.parametrize("first", ["other", "ours"])
def test_another_packs_loader_stays_and_both_list_files(tmp_path, first):
    # Folders of the base come before those of the yaml; within one folder the order is the file system's.
    late = tmp_path / "late"
    late.mkdir()
    (tmp_path / "paths.yaml").write_text(f"late:\n  custom_nodes: {late.as_posix()}\n")
    other = {"other_pack": OTHER_PACK}
    if first == "ours":
        (late / "other_pack.py").write_text(OTHER_PACK)
    else:
        (late / PACK).symlink_to(ROOT, target_is_directory=True)
    base = tmp_path / "base"
    model = base / "models" / "diffusion_models" / "listed.gguf"
    model.parent.mkdir(parents=True)
    model.touch()
    with Server(base, with_pack=first == "ours", extra_custom_nodes=other if first == "other" else None,
                arguments=["--extra-model-paths-config", str(tmp_path / "paths.yaml")]) as server:
        info = server.object_info()
        log = server.log()
    assert "IMPORT FAILED" not in log
    assert info["UnetLoaderGGUF"]["category"] == "other"
    assert info["UnetLoaderGGUFAdvanced"]["category"].startswith("Featherweight")
    assert ("UnetLoaderGGUF is provided by another node pack" in log) == (first == "other")
    assert "listed.gguf" in info["UnetLoaderGGUF"]["input"]["required"]["unet_name"][0]
    assert "listed.gguf" in info["FeatherweightLoadDiffusionModel"]["input"]["required"]["model_name"][1]["options"]
