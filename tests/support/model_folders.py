"""The host's folders of models, empty ones for a test."""
import folder_paths

from featherweight.loaders import folders


def use_empty_folders(root, monkeypatch):
    """Gives the host one folder below `root` for each kind of model, by the kind's name, and has
    the pack register its own."""
    keys = {*folders.GGUF_FOLDERS.values(), "diffusers", "embeddings"}
    for key in keys:
        (root / key).mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths",
                        {key: ([str(root / key)], {".safetensors"}) for key in keys})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register_folders()
