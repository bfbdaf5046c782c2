"""The host's table of model folders, of which a test has its own."""
import folder_paths

from featherweight.loaders.paths import folders

KEYS = {*folders.GGUF_FOLDERS.values(), "diffusers", "embeddings"}


def use_empty_folders(root, patch, *more_keys: str):
    """Gives the host an empty folder below `root` for each key of its table, by the key's name."""
    keys = KEYS.union(more_keys)
    for key in keys:
        (root / key).mkdir()
    _use({key: root / key for key in keys}, patch)


def use_folder(root, patch, *more_keys: str):
    """Gives the host `root` for each key of its table."""
    _use(dict.fromkeys(KEYS.union(more_keys), root), patch)


def _use(table: dict, patch):
    patch.setattr(folder_paths, "folder_names_and_paths", {
        key: ([str(path)], set(folder_paths.supported_pt_extensions))
        for key, path in table.items()})
    patch.setattr(folder_paths, "filename_list_cache", {})
    folders.register_folders()
