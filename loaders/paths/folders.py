"""Finds and names files in the model folders; only this module uses the host's `folder_paths`."""
import contextlib
import functools
import glob
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import folder_paths

from ...ops.bounded_json import read_json
from ..container.weight_file import WeightFileError, display_name, map_file, safe_repr
from ..files.diffusers_folder import file_inside, is_folder_of_mflux
from .workflow_paths import NOT_ON_WINDOWS, is_inside, is_unsafe_name, use_slashes

# Folder keys that other packs and shared workflows use -> the host's key that each one extends by
# GGUF files.
GGUF_FOLDERS = {
    "unet_gguf": "diffusion_models", "checkpoints_gguf": "checkpoints",
    "clip_gguf": "text_encoders", "loras_gguf": "loras", "vae_gguf": "vae",
    "controlnet_gguf": "controlnet", "model_patches_gguf": "model_patches",
    "clip_vision_gguf": "clip_vision"
}
LORA_FOLDERS = ("loras", "loras_gguf")

# Suffix of files with measurements of a model. With .safetensors the loaders would offer them as
# models.
SENSITIVITY = ".sensitivity"
# Suffixes of files that are read as measurements: imatrix files end in the last two.
MEASUREMENTS = (SENSITIVITY, ".gguf", ".dat")
IMATRIX_SUFFIXES = (".imatrix.gguf", ".imatrix.dat")  # of the imatrices next to a measurement

# diffusers' classes of diffusion models: FluxTransformer2DModel, LuminaNextDiT2DModel,
# UNet2DConditionModel ...
DIFFUSION_MODEL = re.compile(r"Transformer|DiT|^UNet")
# part of the name of a folder of mflux's, which has no config -> a class that tells what is in it
MFLUX_CLASSES = {"transformer": "Transformer2DModel", "encoder": "TextEncoderModel"}
CONTROLNET = re.compile("ControlNet")  # ControlNetModel, FluxControlNetModel ...
MODEL_PATCH = re.compile("Control")  # ZImageControlNetModel, ZImageControlTransformer2DModel ...
# transformers' classes of vision models: CLIPVisionModel, CLIPModel, SiglipVisionModel, Dinov2Model
CLIP_VISION = re.compile("Vision|^CLIPModel|^Siglip|^D(ino|INO)v")
# transformers' classes of text encoders: T5EncoderModel, CLIPTextModelWithProjection,
# Qwen3ForCausalLM ...
ENCODER = re.compile(
    r"Encoder|TextModel|ForCausalLM$|ForConditionalGeneration$|^(Gemma|Qwen|Llama|Mistral)\w*Model$"
)


def packed_folder() -> Path:
    """Returns the folder in ComfyUI's user folder for weights that were packed while loading."""
    return Path(folder_paths.get_user_directory()) / "featherweight" / "packed"


def register_folders():
    """Makes the host list GGUF files, under the keys that other packs use for them.

    Directories that a user's yaml or another pack has added stay. The lists of other keys are not
    changed: some packs let two keys share one list.
    """
    registered = folder_paths.folder_names_and_paths
    for key, host_key in GGUF_FOLDERS.items():
        directories, extensions = registered.get(key, ([], set()))
        missing = [
            directory for directory in registered[host_key][0] if directory not in directories
        ]
        registered[key] = ([*directories, *missing], {*extensions, ".gguf"})


def _once(function: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Has a list made once for all nodes that the host describes in one answer."""
    @functools.wraps(function)
    def listed(*keys, **options) -> list[str]:
        name: Any = (function.__name__, keys, *options.values())  # the host has names of folders
        found: Any = folder_paths.cache_helper.get(name)
        if found is None:
            found = function(*keys, **options)
            folder_paths.cache_helper.set(name, found)
        return [*found]
    return listed


@_once
def list_files(*keys: str) -> list[str]:
    """Returns the model files in the folders of all `keys`, GGUF first, without duplicates.

    Links that lead to no file are left out.
    """
    register_folders()  # another pack may have added directories since
    names = set()
    for key in keys:
        listed = folder_paths.get_filename_list(key)
        dangling = _missing_files(key, tuple(listed))
        names.update(name for name in listed if name not in dangling or _exists(key, name))
    return sorted(names, key=lambda name: (not name.lower().endswith(".gguf"), name.lower()))


@functools.lru_cache(maxsize=64)  # so that the files of a list are looked at once
def _missing_files(key: str, names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for name in names if not _exists(key, name))


def _exists(key: str, name: str) -> bool:
    return any(os.path.exists(os.path.join(directory, name))
               for directory in folder_paths.get_folder_paths(key))


@_once
def list_model_folders(*keys: str, model_class: re.Pattern = DIFFUSION_MODEL) -> list[str]:
    """Returns the folders that hold one model with its `config.json`.

    Args:
        keys: of the folders to look in.
        model_class: regular expression for the class of the model, in diffusers or transformers.
    """
    folders = {
        (os.path.dirname(name), key) for key in keys for name in folder_paths.get_filename_list(key)
    }
    names = {
        name for name, key in folders
        if name and model_class.search(_class_in(_find_folder(name, key)))
    }
    return sorted(names, key=str.lower)


@_once
def list_pipeline_folders(*keys: str) -> list[str]:
    """Returns the folders in the folders of all `keys` that hold a whole diffusers pipeline."""
    patterns = ("*/transformer/config.json", "*/unet/config.json", "*/*/transformer/config.json")
    names = {
        os.path.dirname(os.path.dirname(config))
        for key in keys for directory in folder_paths.get_folder_paths(key)
        for pattern in patterns for config in glob.iglob(pattern, root_dir=directory)
    }
    return sorted(names, key=str.lower)


def _class_in(folder: str | None) -> str:
    """Returns the class of diffusers or transformers that was saved into a folder, or ""."""
    path = Path(folder or "")
    try:
        config = read_json(bytes(map_file(file_inside(path, "config.json"))))
        return str(config.get("_class_name") or config["architectures"][0])
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return _class_of_mflux(path)


def _class_of_mflux(folder: Path) -> str:
    """Returns a class for what mflux saved into a folder, or ""."""
    try:
        is_of_mflux = is_folder_of_mflux(folder)
    except (OSError, WeightFileError):
        return ""
    return next((kind for part, kind in MFLUX_CLASSES.items()
                 if is_of_mflux and part in folder.name), "")


def _find_folder(name: str, key: str) -> str | None:
    # like the host's: the name cannot lead out of the model folders
    name = os.path.relpath(os.path.join("/", name), "/")
    candidates = [os.path.join(directory, name) for directory in folder_paths.get_folder_paths(key)]
    return next((candidate for candidate in candidates if name != "." and os.path.isdir(candidate)),
                None)


def find_paths(name: str) -> set[str]:
    """Returns every file or folder in the model folders that a name of a workflow may mean."""
    if is_unsafe_name(name):
        return set()
    keys = {*GGUF_FOLDERS, *GGUF_FOLDERS.values(), "diffusers", "vae_approx"}
    paths: set[str | None] = set()
    for key in keys & folder_paths.folder_names_and_paths.keys():
        for path in _spellings(use_slashes(name)):
            paths |= {folder_paths.get_full_path(key, path), _find_folder(path, key)}
    return {path for path in paths if path is not None}


OUTPUT, MODELS = "output", "models"
MAX_NAME_BYTES = 200  # file systems allow 255, and a counter and a suffix follow
SAVED = (".gguf", ".safetensors", ".sft")  # suffixes of the files that nodes save


def is_for_models(key: str) -> bool:
    """Returns whether the host registers the folders of `key` for weights or diffusers ("folder").

    It does not for custom_nodes, configs, datasets and what another pack registers for any file.
    """
    registered = folder_paths.folder_names_and_paths
    of_models = {*folder_paths.supported_pt_extensions, ".gguf", "folder"}
    return (
        key in registered and key != "custom_nodes" and not of_models.isdisjoint(registered[key][1])
    )


def _is_in_program_folder(path: str) -> bool:
    """Returns whether a path lies in custom_nodes once its links are resolved."""
    registered = folder_paths.folder_names_and_paths
    programs = registered["custom_nodes"][0] if "custom_nodes" in registered else ()
    return any(is_inside(os.path.realpath(path), folder) for folder in programs)


def new_model_path(name: str, label: str, suffix: str, where: str = OUTPUT,
                   counted: bool = True) -> str:
    """Returns the path of a new model file, and makes its folder.

    Args:
        name: as for the host's nodes that save, with folders and `%year%`.
        label: of the type; follows the name.
        suffix: of the file.
        where: OUTPUT, or MODELS, in which `name` begins with the key of a model folder.
        counted: whether the name ends with the next free number.

    Raises:
        WeightFileError: if the name is not possible or leads out of the folder.
    """
    name = use_slashes(name)
    base = folder_paths.get_output_directory()
    if where == MODELS:
        key, _, name = name.partition("/")
        if not name or not is_for_models(key):
            raise WeightFileError(
                f"{safe_repr(key)} is not a model folder. In the model folders a name begins with"
                " one of them, such as diffusion_models/my_model.")
        directories = folder_paths.get_folder_paths(key)
        base = next((directory for directory in directories if os.path.basename(directory) == key),
                    directories[0])
    if not os.path.basename(name):
        raise WeightFileError(
            f"{safe_repr(name)} is not a file name. Give one, such as diffusion_models/my_model.")
    folder, file, counter = _output_folder(name, base, f"_{label}")
    return os.path.join(folder, f"{file}_{counter:05}_{suffix}" if counted else f"{file}{suffix}")


def _output_folder(name: str, base: str, label: str = "") -> tuple[str, str, int]:
    """Makes the folder for a name, and returns (folder, start of the file name, next free number).

    A folder on the way may be a link to another drive.

    Args:
        name: as for the host's nodes that save.
        base: folder that the name is relative to.
        label: follows the name.

    Raises:
        WeightFileError: if the name is not possible or leads out of `base`.
    """
    text = display_name(name)
    *folders, file = name.split("/")
    if os.path.isabs(name) or is_unsafe_name(name) or ".." in folders:
        raise WeightFileError(
            f"{text} lies outside of {base}, where models are saved. Give a name inside it,"
            " without '..'.")
    if wrong := next(filter(NOT_ON_WINDOWS.search, (*folders, file)), None):
        raise WeightFileError(
            f"{display_name(wrong)} cannot be the name of a file or folder on Windows, so it is not"
            ' saved. Give a name without < > : " | ? *, and not one such as con.')
    file += label
    if len(os.fsencode(file)) > MAX_NAME_BYTES:
        raise WeightFileError(f"{text} is too long for the name of a file. Give a shorter one.")
    # The host does not save through a link, so it gets the target of the last link as its base.
    start, rest = base, []
    for folder in folders:
        rest.append(folder)
        path = os.path.join(start, *rest)
        if not is_inside(os.path.realpath(os.path.join(path, "x")), os.path.realpath(start)):
            start, rest = path, []
    if _is_in_program_folder(os.path.join(start, *rest, "x")):
        raise WeightFileError(
            f"{text} lies in custom_nodes, which holds programs, not models. Give another name.")
    try:
        folder, file, counter, *_ = folder_paths.get_save_image_path("/".join([*rest, file]), start)
    except OSError as error:
        raise WeightFileError(
            f"{text} cannot be a file in {base} ({error.strerror}). Give another name.") from error
    return folder, file, counter


def embedding_folders() -> list[str]:
    """Returns the folders of textual inversions, for text encoders."""
    return folder_paths.get_folder_paths("embeddings")


def find_sensitivity(name: str) -> str:
    """Returns the full path of a measurement.

    Args:
        name: as listed, or the path that the node that measures returns.

    Raises:
        WeightFileError: if there is no such file.
    """
    name = use_slashes(name)
    folders = _sensitivity_folders()
    listed = (os.path.isabs(name) and not is_unsafe_name(os.path.splitdrive(name)[1])
              and any(is_inside(name, folder) for folder in folders))
    candidates = [name] if listed else []
    if not listed and not is_unsafe_name(name):
        # like the host's: the name cannot lead out of the folders
        inside = os.path.relpath(os.path.join("/", name), "/")
        candidates = [os.path.join(directory, inside) for directory in folders]
    path = next(
        (path for path in candidates
         if path.lower().endswith(MEASUREMENTS) and os.path.isfile(path)), None)
    if path is None:
        raise WeightFileError(
            f"{display_name(name)} is in none of the folders of measurements"
            f" ({', '.join(folders)}). Measure the model, put the file there, or pick another one.")
    return path


def list_measurements() -> list[str]:
    """Returns the names of the measurements in `output/sensitivity`, and of those next to models.

    Next to models a GGUF file is one if its name says that it is an imatrix.
    """
    output, *model_folders = _sensitivity_folders()
    names = {name for name in glob.iglob("**/*", root_dir=output, recursive=True)
             if name.lower().endswith(MEASUREMENTS)}
    for folder in model_folders:
        names |= {name for name in glob.iglob("*", root_dir=folder)
                  if name.lower().endswith((SENSITIVITY, *IMATRIX_SUFFIXES))}
    return sorted(map(use_slashes, names), key=str.lower)


def validate_measurement(name: str | None) -> bool | str:
    """Checks for a node's `validate_inputs` that a measurement exists, as `validate_files` does."""
    if name is None or FILES_MAY_BE_REMOTE.get():
        return True
    if not isinstance(name, str):  # a prompt in API format may hold any JSON
        return f"{safe_repr(name)} is not the name of a measurement. Pick one from the list."
    try:
        find_sensitivity(name)
    except WeightFileError as error:
        return str(error)
    return True


def sensitivities_of(model_path: str | os.PathLike) -> list[str]:
    """Returns the paths of the measurements in `output/sensitivity` that have a model's name, as
    the node that measures gives it, the newest first."""
    stem = os.path.splitext(os.path.basename(model_path))[0]
    name = re.compile(rf"{re.escape(stem)}_\d{{5}}_{re.escape(SENSITIVITY)}")
    folder = _sensitivity_folders()[0]
    with contextlib.suppress(OSError):
        names = sorted(filter(name.fullmatch, os.listdir(folder)), reverse=True)
        return [os.path.join(folder, name) for name in names]
    return []


def imatrix_of(model_path: str | os.PathLike) -> str | None:
    """Returns the path of an imatrix next to a model's file that has the model's name:
    NAME.imatrix.gguf, NAME.imatrix.dat or NAME.dat; None if there is none."""
    stem = os.path.splitext(os.path.normpath(model_path))[0]
    suffixes = (*IMATRIX_SUFFIXES, ".dat")
    return next(filter(os.path.isfile, (f"{stem}{suffix}" for suffix in suffixes)), None)


def new_sensitivity_path(name: str) -> str:
    """Returns the path of a new measurement: the next number in `output/sensitivity`, which is made
    if needed.

    Args:
        name: as for the host's nodes that save, with folders and `%year%`.

    Raises:
        WeightFileError: if the name is not possible or leads out of the folder.
    """
    name = use_slashes(name).strip("/")
    if not os.path.basename(name):
        raise WeightFileError(f"{safe_repr(name)} is not a file name. Give one, such as %model%.")
    base = folder_paths.get_output_directory()
    folder, file, counter = _output_folder(f"sensitivity/{name}", base)
    return os.path.join(folder, f"{file}_{counter:05}_{SENSITIVITY}")


def _sensitivity_folders() -> list[str]:
    model_folders = [
        directory for key in ("diffusion_models", "checkpoints")
        for directory in folder_paths.get_folder_paths(key)
    ]
    return [os.path.join(folder_paths.get_output_directory(), "sensitivity"), *model_folders]


def find_file(name: str, *keys: str) -> str:
    """Returns the full path of a listed file or folder.

    Args:
        name: as listed, with the path separator of any system and accents in any form of Unicode: a
            workflow may come from another.
        keys: of the folders to look in.

    Raises:
        WeightFileError: if no folder of the keys holds it.
    """
    path = _find_path(name, keys)
    if path is None:
        raise WeightFileError(_missing_text([name], keys))
    return path


def _find_path(name: str, keys: Iterable[str]) -> str | None:
    """Returns what `find_file` does, or None if no folder holds it; raises if it is not a name."""
    if not name:
        raise WeightFileError(
            "No file is picked. Pick one; press R in ComfyUI to refresh the list.")
    if not isinstance(name, str):  # a prompt in API format may hold any JSON
        raise WeightFileError(
            f"{safe_repr(name)} is not the name of a file. Pick one from the list.")
    for key in () if is_unsafe_name(name) else keys:
        for spelling in _spellings(name):
            path = folder_paths.get_full_path(key, spelling) or _find_folder(spelling, key)
            if path is not None:
                return path
    return None


def _spellings(name: str) -> list[str]:
    separators = (name, use_slashes(name), name.replace("/", "\\"))
    forms = (unicodedata.normalize(form, name) for name in separators for form in ("NFC", "NFD"))
    return list(dict.fromkeys([*separators, *forms]))


def _missing_text(names: list[str], keys: Iterable[str]) -> str:
    """Returns the message about files that no folder of the keys holds."""
    folders = ", ".join(sorted(
        {directory for key in keys for directory in folder_paths.get_folder_paths(key)}))
    *others, last = map(display_name, names)
    if not others:
        return (f"{last} is in none of the model folders ({folders}). Put the file there, or pick"
                " another one; press R in ComfyUI to refresh the list.")
    return (f"{', '.join(others)} and {last} are in none of the model folders ({folders}). Put the"
            " files there, or pick others; press R in ComfyUI to refresh the lists.")


def find_companion(path: str, names: Iterable[str]) -> str | None:
    """Returns the first of some files that is in the folder of a model, or in a folder of diffusion
    models or text encoders; None if none is.

    Args:
        path: of the model.
        names: of the files, without folders.
    """
    folders = [os.path.dirname(path)]
    for key in ("diffusion_models", "text_encoders"):
        folders += folder_paths.get_folder_paths(key)
    paths = (os.path.join(folder, name) for folder in folders for name in names)
    return next(filter(os.path.isfile, paths), None)


# whether the prompt that is being validated runs on other machines
FILES_MAY_BE_REMOTE = ContextVar("FILES_MAY_BE_REMOTE", default=False)


def validate_files(*names: str | None, keys: Iterable[str]) -> bool | str:
    """Checks for a node's `validate_inputs` that its files exist, before anything runs.

    The files of a prompt that runs on other machines are not checked.

    Args:
        names: as for `find_file`; None for an input that comes by a link.
        keys: of the folders to look in.

    Returns:
        True, or a message that names all missing files.
    """
    if FILES_MAY_BE_REMOTE.get():
        return True
    try:
        missing = [name for name in names
                   if name is not None and _find_path(name, keys) is None]
    except WeightFileError as error:
        return str(error)
    return _missing_text(list(dict.fromkeys(missing)), keys) if missing else True


def resolve_saved_path(path: str) -> str:
    """Returns a path from a node that saves, after checking that it may be read.

    A shared workflow may contain any path. Only folders and files with the suffix of a model are
    read, and only in the output folder and the host's model folders.

    Raises:
        WeightFileError: if it is not a model there.
    """
    registered = folder_paths.folder_names_and_paths
    folders = [folder_paths.get_output_directory(), *(
        folder for key in registered if is_for_models(key) for folder in registered[key][0])]
    saved = (
        not is_unsafe_name(os.path.splitdrive(path)[1])
        and any(is_inside(path, folder) for folder in folders)
        and not _is_in_program_folder(path)
        and (path.lower().endswith(SAVED) or os.path.isdir(path))
    )
    if not saved or not os.path.exists(path):
        raise WeightFileError(
            f"{display_name(path)} is not a model in ComfyUI's output or model folders."
            " Connect the path that Save Packed Model (Featherweight) gives, or pick a file.")
    return path
