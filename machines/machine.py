"""What a machine of a cluster has for a workflow: asked there, in a process of Ray in which its ComfyUI was started."""
import inspect
import os
import re

INPUT = "input"  # the folder of pictures that a workflow loads, beside the folders of models
NO_MODELS = ("custom_nodes", "datasets")
SPLIT = re.compile(r"(.+)-\d{5}(-of-\d{5}\.\w+)")  # files of one model, of llama.cpp and transformers
FILE = re.compile(r"[^\n]{1,240}\.\w{2,11}")  # a value that may be the name of a file


def memory() -> dict:
    """{"gpus": [(name, free bytes, all bytes)], "free": bytes of RAM, "all": the same}. Where a ComfyUI was started."""
    import comfy.model_management
    import psutil
    import torch

    ram, gpus = psutil.virtual_memory(), []
    for device in comfy.model_management.get_all_torch_devices():
        if device.type != "cpu":
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            gpus.append((name, *map(int, (comfy.model_management.get_free_memory(device),
                                          comfy.model_management.get_total_memory(device)))))
    return {"gpus": gpus, "free": ram.available, "all": ram.total}


def packs(classes: list[str]) -> dict[str, str]:
    """Of the classes of nodes that a started ComfyUI has: the pack each comes from, ComfyUI for its own."""
    import nodes

    found = {}
    for name in classes:
        if name in nodes.NODE_CLASS_MAPPINGS:
            room, _, pack = (getattr(nodes.NODE_CLASS_MAPPINGS[name], "RELATIVE_PYTHON_MODULE", None) or "nodes").partition(".")
            found[name] = pack if room == "custom_nodes" else "ComfyUI"
    return found


def folders() -> dict[str, list[str]]:
    """The folders in which a started ComfyUI looks for models, by its name for each kind, and that of input pictures."""
    import folder_paths

    return {key: folder_paths.get_folder_paths(key) for key in folder_paths.folder_names_and_paths if key not in NO_MODELS} | {
        INPUT: [folder_paths.get_input_directory()]}


def choices(asked: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], dict]:
    """For each (class, input, value) of an input with choices: {"taken": bool, "files": [(kind, folder, name, bytes)]}.

    taken: whether a started ComfyUI would run it. A node that judges an input by itself takes each name that lies where its
    choices lie, with the path separators of any system, as this pack's do. Inputs without choices are left out.
    """
    import folder_paths
    import nodes

    where = folders()
    listed = {key: set(_names_in(where[key][0]) if key == INPUT else folder_paths.get_filename_list(key)) for key in where}
    found, known = {}, nodes.NODE_CLASS_MAPPINGS
    for name, place, value in asked:
        if name in known and (offered := _offered(known[name], place)) is not None:
            files = _files(value, offered, where, listed)
            judges = _judged(known[name], place)
            found[name, place, value] = {"files": files, "taken": value in offered or judges and (
                bool(files) or not FILE.fullmatch(value))}
    return found


def _offered(kind: type, place: str) -> set[str] | None:
    sections = kind.INPUT_TYPES()
    kind_of_input, *options = (sections.get("required", {}) | sections.get("optional", {})).get(place, (None,))
    offered = kind_of_input if isinstance(kind_of_input, (list, tuple)) else options[0].get("options") if (
        options and kind_of_input == "COMBO") else None
    return None if offered is None else {getattr(choice, "key", choice) for choice in offered}


def _judged(kind: type, place: str) -> bool:
    """Whether the host leaves the judgement of an input to the node."""
    judges = [vars(cls)[name] for cls in kind.__mro__ if not cls.__module__.startswith("comfy_api.")
              for name in ("validate_inputs", "VALIDATE_INPUTS") if name in vars(cls)]
    if not judges:
        return False
    code = getattr(judges[0], "__func__", judges[0]).__code__
    return place in code.co_varnames[:code.co_argcount] or bool(code.co_flags & inspect.CO_VARKEYWORDS)


def _files(value: str, offered: set[str], where: dict, listed: dict) -> list[tuple[str, str, str, int]]:
    """The files that a choice stands for: one, all of a split model, or all of a folder; none where it names none."""
    def likeness(key):
        return len(offered & listed[key]) / len(offered | listed[key] | {value})

    for key in sorted((key for key in where if offered & listed[key]), key=likeness, reverse=True):
        for folder in where[key]:
            for name in (value, value.replace("\\", "/")):
                path = os.path.normpath(os.path.join(folder, name))
                if value and path.startswith(os.path.join(os.path.normpath(folder), "")):
                    if names := _parts(folder, name):
                        return [(key, folder, part, os.path.getsize(os.path.join(folder, part)))
                                for part in names]
    return []


def _parts(folder: str, name: str) -> list[str]:
    path = os.path.join(folder, name)
    if os.path.isdir(path):
        names = [os.path.join(at, file) for at, _, files in os.walk(path) for file in files]
        return sorted(os.path.relpath(found, folder).replace(os.sep, "/") for found in names if not found.endswith(".part"))
    if not os.path.isfile(path):
        return []
    beside, _, last = name.replace("\\", "/").rpartition("/")
    split = SPLIT.fullmatch(last)
    if not split:
        return [name]
    return [f"{beside}/{other}" if beside else other for other in _names_in(os.path.dirname(path))
            if (part := SPLIT.fullmatch(other)) and part.groups() == split.groups()]


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
