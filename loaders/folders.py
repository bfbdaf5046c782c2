"""Model folders: where files are found. The only user of the host's `folder_paths`."""
import contextlib
import glob
import os
import re
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

import folder_paths

from ..ops.bounded_json import read_json
from .files.container import FileState, WeightFileError, display_name, map_file, safe_repr
from .files.diffusers_folder import file_inside

# Folder keys other packs and shared workflows know, and the host's folder each one extends by GGUF
# files.
GGUF_FOLDERS = {
    "unet_gguf": "diffusion_models", "clip_gguf": "text_encoders", "loras_gguf": "loras",
    "checkpoints_gguf": "checkpoints", "vae_gguf": "vae"
}

# How files end that hold what was measured of a model. Not .safetensors, or the loaders would offer
# them as models.
SENSITIVITY = ".sensitivity"

# of a model in several files
PART = re.compile(r"(.*-)\d{5}(-of-\d{5}\.(?:gguf|safetensors))", re.I)

# Classes of diffusers that are diffusion models: FluxTransformer2DModel, LuminaNextDiT2DModel,
# UNet2DConditionModel ...
DIFFUSION_MODEL = re.compile(r"Transformer|DiT|^UNet")
# Classes of transformers that are text encoders: T5EncoderModel, CLIPTextModelWithProjection,
# Qwen3ForCausalLM ...
ENCODER = re.compile(
    r"Encoder|TextModel|ForCausalLM$|ForConditionalGeneration$|^(Gemma|Qwen|Llama|Mistral)\w*Model$"
)


def register_folders():
    """Make the host list GGUF files, under the keys other packs use for them.

    Directories that a user's yaml or another pack put there stay. The lists of other keys are not
    touched: some packs let two keys share one list.
    """
    registered = folder_paths.folder_names_and_paths
    for key, host_key in GGUF_FOLDERS.items():
        directories, extensions = registered.get(key, ([], set()))
        missing = [
            directory for directory in registered[host_key][0] if directory not in directories
        ]
        registered[key] = ([*directories, *missing], {*extensions, ".gguf"})


def list_files(*keys: str) -> list[str]:
    """Names of the model files in the folders of all `keys`, GGUF files first, without
    duplicates."""
    register_folders()  # another pack may have put directories there since
    names = {name for key in keys for name in folder_paths.get_filename_list(key)}
    return sorted(names, key=lambda name: (not name.lower().endswith(".gguf"), name.lower()))


def list_model_folders(*keys: str, kind: re.Pattern = DIFFUSION_MODEL) -> list[str]:
    """Names of the folders among all `keys` that hold one model as diffusers and transformers save
    it, with `config.json`.

    kind: of the class of the model.
    """
    names = {
        (os.path.dirname(name), key) for key in keys for name in folder_paths.get_filename_list(key)
    }
    found = {
        name for name, key in names if name and kind.search(_class_in(_find_folder(name, key)))
    }
    return sorted(found, key=str.lower)


def list_packages(*keys: str) -> list[str]:
    """Names of the folders among all `keys` that hold a whole package as diffusers saves it."""
    names = set()
    for directory in (directory for key in keys
                      for directory in folder_paths.get_folder_paths(key)):
        for pattern in ("*/transformer/config.json", "*/unet/config.json",
                        "*/*/transformer/config.json"):
            found = glob.iglob(pattern, root_dir=directory)
            names |= {os.path.dirname(os.path.dirname(name)) for name in found}
    return sorted(names, key=str.lower)


def _class_in(folder: str | None) -> str:
    """The class of diffusers or transformers that was saved into this folder, or ""."""
    try:
        config = read_json(bytes(map_file(file_inside(Path(folder or ""), "config.json"))))
        return str(config.get("_class_name") or config["architectures"][0])
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return ""


def _is_unsafe_name(name: str) -> bool:
    """Whether a name begins with a drive or a machine, as Windows writes them, or no file can have
    it.

    What else begins with a root loses it.
    """
    try:
        return bool(re.match(r"[A-Za-z]:|[\\/]{2}", name)) or b"\0" in os.fsencode(name)
    except UnicodeEncodeError:
        return True


def _find_folder(name: str, key: str) -> str | None:
    # as the host does: no way out of the model folders
    name = os.path.relpath(os.path.join("/", name), "/")
    candidates = [os.path.join(directory, name) for directory in folder_paths.get_folder_paths(key)]
    return next((candidate for candidate in candidates if name != "." and os.path.isdir(candidate)),
                None)


OUTPUT, MODELS = "output", "models"
LONGEST = 200  # bytes of a name, which drives limit to 255 with what is put behind it
SAVED = (".gguf", ".safetensors", ".sft")  # how the files of models end that nodes save


def is_for_models(key: str) -> bool:
    """Whether the host registers the folders of `key` for weight files, or for packages of
    diffusers ("folder").

    It does not for custom_nodes, configs and datasets, nor for what another pack registers for any
    file.
    """
    registered = folder_paths.folder_names_and_paths
    of_models = {*folder_paths.supported_pt_extensions, ".gguf", "folder"}
    return (
        key in registered and key != "custom_nodes" and not of_models.isdisjoint(registered[key][1])
    )


def _model_folders() -> list[str]:
    registered = folder_paths.folder_names_and_paths
    return [folder for key in registered if is_for_models(key) for folder in registered[key][0]]


def _is_inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder: by its words without '..', or with the links of both
    followed.

    So a link in the folder leads on: whoever owns this machine put it there, and no node of this
    pack makes links.
    """
    if ".." in re.split(r"[\\/]", path):
        return False
    return any(
        os.path.normcase(follow(path)).startswith(os.path.normcase(os.path.join(follow(
            folder), ""))) for follow in (os.path.abspath, os.path.realpath))


def _is_in_program_folder(path: str) -> bool:
    """Whether a path, its links followed, lies in custom_nodes."""
    registered = folder_paths.folder_names_and_paths
    programs = registered["custom_nodes"][0] if "custom_nodes" in registered else ()
    return any(_is_inside(os.path.realpath(path), folder) for folder in programs)


def new_model_path(name: str, label: str, suffix: str, where: str = OUTPUT,
                   counted: bool = True) -> str:
    """Where a model file is to be written; its folder is made. Raises WeightFileError for a name
    that leads out of there.

    name: as the host's nodes that save take it, folders and `%year%` included. label: of the type,
    put behind it. where: OUTPUT, or MODELS, where the first part of the name is one of the host's
    folders for models. counted: with the next free number.
    """
    name = name.replace("\\", "/")
    base = folder_paths.get_output_directory()
    if where == MODELS:
        key, _, name = name.partition("/")
        if not name or not is_for_models(key):
            raise WeightFileError(
                f"A name in the model folders begins with one of them, as diffusion_models/name"
                f" does; {safe_repr(key)} is none.")
        directories = folder_paths.get_folder_paths(key)
        base = next((directory for directory in directories if os.path.basename(directory) == key),
                    directories[0])
    if not os.path.basename(name):
        raise WeightFileError(
            f"{safe_repr(name)} is no name for a file. Give one, such as diffusion_models/my_model."
        )
    folder, file, counter = _output_folder(f"{name}_{label}", base)
    return os.path.join(folder, f"{file}_{counter:05}_{suffix}" if counted else f"{file}{suffix}")


def _output_folder(name: str, base: str) -> tuple[str, str, int]:
    """(folder, which is made, beginning of the file's name, next free number) for a name as the
    host's nodes that save take it.

    A folder on the way may be a link to another drive. Raises WeightFileError for a name that leads
    out of the folder `base`, or that no file can have.
    """
    text, (*folders, file) = display_name(name), name.split("/")
    if os.path.isabs(name) or _is_unsafe_name(name) or ".." in folders:
        raise WeightFileError(
            f"{text} lies outside of {base}, where models are saved. Give a name inside it,"
            " without '..'."
        )
    if len(os.fsencode(file)) > LONGEST:
        raise WeightFileError(f"{text} is too long for the name of a file. Give a shorter one.")
    start, rest = base, []  # behind the last link on the way: the host saves behind none
    for folder in folders:
        rest.append(folder)
        if not _is_inside(
            os.path.realpath(os.path.join(start, *rest, "x")), os.path.realpath(start)
        ):
            start, rest = os.path.join(start, *rest), []
    if _is_in_program_folder(os.path.join(start, *rest, "x")):
        raise WeightFileError(
            f"{text} lies in custom_nodes, which holds programs and no models. Give another name.")
    try:
        folder, file, counter, *_ = folder_paths.get_save_image_path("/".join([*rest, file]), start)
    except OSError as error:
        raise WeightFileError(
            f"{text} cannot be a file in {base} ({error.strerror}). Give another name.") from error
    return folder, file, counter


class FileVersions:
    """How often model files have become others of their names since they were first asked about,
    with what is read beside them: the other parts of a split one, and the mmproj files."""

    def __init__(self):
        self._seen: dict[str, tuple[list, int]] = {}

    def count(self, values: Iterable) -> int:
        """Of the files and folders that these values of a node's inputs name, all together; other
        values give nothing.

        A file is told from others by its state (`FileState`), a folder by those of all files in it.
        The number that is returned says nothing of this machine: the host writes it into the
        pictures that it saves, which are to be the same everywhere.
        """
        total = 0
        for path in _named_files(values):
            state = _state(path)
            before, count = self._seen.get(path, (state, 0))
            self._seen[path] = state, count + (state != before)
            total += self._seen[path][1]
        return total


def _named_files(values: Iterable) -> set[str]:
    keys = [*(key for pair in GGUF_FOLDERS.items() for key in pair), "diffusers", "vae_approx"]
    keys = [key for key in keys if key in folder_paths.folder_names_and_paths]
    names = [value for value in values if isinstance(value, str) and value]
    found = {find(key, name.replace("\\", "/")) for name in names if not _is_unsafe_name(name)
             for key in keys for find in (folder_paths.get_full_path, _folder_of)}
    for name in names:
        if name.endswith(SENSITIVITY):
            with contextlib.suppress(WeightFileError):
                found.add(find_sensitivity(name))
    return found - {None}


def _state(path: str) -> list[tuple]:
    found = []
    # gone since, or not to be read: the node says so when it runs
    with contextlib.suppress(OSError):
        for file in _paths_for(path):
            found.append((file, *FileState.from_status(os.stat(file))))
    return sorted(found)


def _paths_for(path: str) -> Iterable[str]:
    """The files that may be read for one that was picked, or for a folder."""
    if os.path.isdir(path):
        return filter(os.path.isfile, (os.path.join(path, name) for pattern in ("*", "*/*")
                                       for name in glob.iglob(pattern, root_dir=path)))
    folder, name = os.path.split(path)
    if part := PART.fullmatch(name):
        return [os.path.join(folder, other) for other in os.listdir(folder)
                if (its := PART.fullmatch(other)) and its.groups() == part.groups()]
    if name.lower().endswith(".gguf"):
        return [
            path, *(os.path.join(folder, other)
                    for other in os.listdir(folder) if "mmproj" in other.lower())
        ]
    return [path]


def _folder_of(key: str, name: str) -> str | None:
    return _find_folder(name, key)


def embedding_folders() -> list[str]:
    """Where textual inversions lie, for text encoders."""
    return folder_paths.get_folder_paths("embeddings")


def find_sensitivity(name: str) -> str:
    """Full path of a measurement by its listed name, or by its path as the node that measures gives
    it.

    Raises WeightFileError where there is none.
    """
    name = name.replace("\\", "/")
    folders = _sensitivity_folders()
    listed = (os.path.isabs(name) and not _is_unsafe_name(os.path.splitdrive(name)[1])
              and any(_is_inside(name, folder) for folder in folders))
    candidates = [name] if listed else []
    if not listed and not _is_unsafe_name(name):
        # as the host does: no way out of the folders
        inside = os.path.relpath(os.path.join("/", name), "/")
        candidates = [os.path.join(directory, inside) for directory in folders]
    found = next(
        (path for path in candidates if path.endswith(SENSITIVITY) and os.path.isfile(path)), None)
    if found is None:
        raise WeightFileError(
            f"{display_name(name)} is in none of the folders of measurements"
            f" ({', '.join(folders)}). Measure the model, put the file there, or pick another one.")
    return found


def new_sensitivity_path(name: str) -> str:
    """Where a measurement of this name is to be written: the next number in `output/sensitivity`,
    which need not be there yet.

    name: as the host's nodes that save take it, `%date:...%` and folders too. Raises
    WeightFileError for one that leads out.
    """
    name = name.replace("\\", "/").strip("/")
    if not os.path.basename(name):
        raise WeightFileError(
            f"{safe_repr(name)} is no name for a file. Give one, such as %model%.")
    prefix = os.path.join("sensitivity", name)
    folder, file, counter = _output_folder(prefix, folder_paths.get_output_directory())
    return os.path.join(folder, f"{file}_{counter:05}_{SENSITIVITY}")


def _sensitivity_folders() -> list[str]:
    beside = [
        directory for key in ("diffusion_models", "checkpoints")
        for directory in folder_paths.get_folder_paths(key)
    ]
    return [os.path.join(folder_paths.get_output_directory(), "sensitivity"), *beside]


def find_file(name: str, *keys: str) -> str:
    """Full path of a listed file or folder. Names from workflows made on another system may use its
    path separator.

    Raises WeightFileError when no folder of the keys holds it.
    """
    if not name:
        raise WeightFileError(
            "No file is picked. Pick one; press R in ComfyUI to refresh the list.")
    if not isinstance(name, str):  # a prompt in API format may hold any JSON
        raise WeightFileError(
            f"{safe_repr(name)} is not the name of a file. Pick one from the list.")
    for key in () if _is_unsafe_name(name) else keys:
        for spelling in (name, name.replace("\\", "/"), name.replace("/", "\\")):
            path = folder_paths.get_full_path(key, spelling) or _find_folder(spelling, key)
            if path is not None:
                return path
    folders = sorted(
        {directory for key in keys for directory in folder_paths.get_folder_paths(key)})
    raise WeightFileError(
        f"{display_name(name)} is in none of the model folders ({', '.join(folders)}). Put the"
        " file there, or pick another one; press R in ComfyUI to refresh the list.")


FILES_MAY_BE_REMOTE = ContextVar("whether the prompt that is asked about runs on other machines",
                                 default=False)


def validate_files(*names: str | None, keys: Iterable[str]) -> bool | str:
    """What a node's `validate_inputs` gives, so that nothing runs in vain before it: True, or the
    sentence of `find_file` about the first of these names that no folder of the keys holds. None
    comes by a link, and is looked for when the node runs, and so is every file of a prompt that
    runs on other machines.
    """
    if FILES_MAY_BE_REMOTE.get():
        return True
    try:
        for name in names:
            if name is not None:
                find_file(name, *keys)
    except WeightFileError as error:
        return str(error)
    return True


def resolve_saved_path(path: str) -> str:
    """The same path, as a node that saves gives it. Raises WeightFileError where no model lies
    there, in a folder of models.

    A workflow that somebody shared may name any path. Only files that end as models do, and
    folders, are looked into, and only where models are saved: in the output folder and in the
    host's folders for models.
    """
    folders = [folder_paths.get_output_directory(), *_model_folders()]
    saved = (
        not _is_unsafe_name(os.path.splitdrive(path)[1])
        and any(_is_inside(path, folder) for folder in folders)
        and not _is_in_program_folder(path)
        and (path.lower().endswith(SAVED) or os.path.isdir(path))
    )
    if not saved or not os.path.exists(path):
        raise WeightFileError(
            f"{display_name(path)} is no model in ComfyUI's output or in its model folders."
            " Connect the path that Save Packed Model (Featherweight) gives, or pick a file.")
    return path
