"""A file with one tensor, mark or setting dropped, doubled, renamed, of another type, cut or added:
what loads has the right values, or the node says what is amiss, or the load stops."""
import copy
import gc
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from encoders.encoder import small_towers
from pack_api import WeightFileError, load_notes
from patched_models import relative
from stored_files import CLIP, FILES, Stored, StoredGGUF, Tensors, weights_of, written

pytestmark = pytest.mark.usefixtures("small_models")

WHOLE = 400
FEW = 12
DEFAULTS = ("packing_format",)  # settings whose absence means something
# TAESD's of later models, which earlier ones are without
OPTIONAL = ("vae_scale", "vae_shift")
# cut, they are those of a model with fewer channels or a narrower encoder
SETS_A_SIZE = re.compile(r"^(img_in|txt_in|x_embedder|context_embedder)\.")


def retyped(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.float().to(chance.choice([torch.int32, torch.bool]))
    if tensor.itemsize == 1:
        return tensor.view(chance.choice([torch.int8, torch.uint8, torch.bool,
                                          torch.float8_e4m3fn]))
    return tensor.to(chance.choice([torch.float32, torch.uint8, torch.int64, torch.bool]))


def faults_of(stored: Stored | StoredGGUF, chance: random.Random, count: int) -> Iterator[tuple]:
    """Yields (what was done, tensors, metadata, settings)."""
    names = list(stored.tensors)
    kinds: dict[str, list[str]] = {}
    for name in names:  # so that each kind of part is drawn
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for _ in range(count):
        name = chance.choice(kinds[chance.choice(list(kinds))])
        tensors, tensor = dict(stored.tensors), stored.tensors[name]
        metadata, settings = dict(stored.metadata), copy.deepcopy(stored.settings)
        kind = chance.choice(["drop", "double", "rename", "retype", "cut", "transpose", "add",
                              "setting"])
        if stored.is_whole(name) and kind in ("retype", "cut", "transpose"):
            continue
        if kind in ("drop", "rename") and name in OPTIONAL:
            continue
        if kind == "drop":
            del tensors[name]
        elif kind == "double":
            tensors[f"{name}.1"] = tensor.clone()
        elif kind == "rename":
            tensors[name[:-1] + "x"] = tensors.pop(name)
        elif kind == "retype":
            tensors[name] = retyped(tensor, chance)
        elif kind == "cut" and tensor.ndim and not SETS_A_SIZE.search(name):
            dim = chance.randrange(tensor.ndim)
            tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
        elif kind == "transpose" and tensor.ndim == len(set(tensor.shape)) == 2:
            tensors[name] = tensor.t()
        elif kind == "add":
            layer = name.rpartition(".")[0]
            part = chance.choice(["mystery", "weight_scale_3", "lora.up.weight"])
            tensors[f"{layer}.{part}"] = torch.ones(3)
        elif kind == "setting":
            name = change_a_setting(tensors, metadata, settings, chance)
        yield f"{kind} {name}", tensors, metadata, settings


def change_a_setting(tensors: Tensors, metadata: dict, settings: dict,
                     chance: random.Random) -> str:
    """Changes one number or text of the JSON in a mark, in the metadata or in config.json."""
    marks = [name for name, tensor in tensors.items()
             if tensor.dtype == torch.uint8 and tensor.ndim == 1
             and bytes(tensor.tolist()).startswith(b"{")]
    if marks:
        name = chance.choice(marks)
        text = json.loads(bytes(tensors[name].tolist()))
        done = change_one(text, chance)
        tensors[name] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
        return f"{name}: {done}"
    if metadata:
        name = chance.choice(list(metadata))
        try:
            text = json.loads(metadata[name])
        except ValueError:
            text = None
        if isinstance(text, dict) and text:
            done = change_one(text, chance)
            metadata[name] = json.dumps(text)
            return f"metadata {name}: {done}"
    if "quantization_config" in settings:
        return f"config.json: {change_one(settings['quantization_config'], chance)}"
    return "none"


def change_one(settings: dict, chance: random.Random) -> str:
    key = chance.choice(list(settings))
    value = settings[key]
    if isinstance(value, dict) and value:
        return f"{key}.{change_one(value, chance)}"
    if chance.random() < 0.3 and key not in DEFAULTS:
        del settings[key]
        return f"{key} dropped"
    settings[key] = (not value if isinstance(value, bool) else 2 * value + 1
                     if isinstance(value, int | float) else "other")
    return f"{key} = {settings[key]}"


def check_faults(name: str, seed: int, count: int, tmp_path: Path):
    load, stored = written(name, tmp_path)
    path, chance = stored.path, random.Random(seed)
    model, patcher = load(str(path))
    assert load_notes(patcher) == ()
    values = {key: value.clone() for key, value in weights_of(model).items()}
    silent: list[str] = []
    for done, *parts in faults_of(stored, chance, count):
        model = patcher = found = None
        if sys.platform == "win32":  # which writes over no file that a model maps
            gc.collect()
        stored.write(*parts)
        try:
            model, patcher = load(str(path))
        except WeightFileError:
            continue
        except Exception as error:
            silent.append(f"{done}: {type(error).__name__}: {error}")
            continue
        if not load_notes(patcher):
            found = weights_of(model)
            silent += [f"{done}: {key}" for key, value in values.items()
                       if found[key].shape != value.shape
                       or not relative(found[key], value) < 1e-6][:1]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("count", [FEW, pytest.param(WHOLE, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", FILES)
def test_a_fault_is_never_silent(name, count, tmp_path):
    with small_towers(CLIP):
        check_faults(name, random.randrange(1 << 30), count, tmp_path)
