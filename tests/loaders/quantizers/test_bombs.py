"""A small file with extreme numbers in its settings, metadata, shapes or names loads or is one
sentence, soon, and takes no more memory than its bytes can declare."""
import copy
import ctypes
import json
import random
import re
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders.encoder import small_towers
from pack_api import WeightFileError, is_packed
from patched_models import KINDS, flux_file, flux_pair, lora_for
from safetensors.torch import save_file
from stored_files import CLIP, FILES, Stored, StoredGGUF, stored_in, written

from featherweight.loaders.lora.apply import apply_lora
from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.lora_file import load_lora_file

pytestmark = [
    pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests"),
    pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")]

FEW, MANY = 4, 150
SECONDS = 10
SPARE = 64 << 20  # bytes
# a byte may be eight codes, which are computed in float32
VALUES_OF_A_BYTE = 8 * 4
LONGEST_SENTENCE = 1000  # characters
MOST_BYTES = 1 << 20  # of what is put into a file
LARGEST_SPACE = 8 << 30  # bytes that a bomb gets before it is stopped
NUMBERS: list[Any] = [
    -1, 0, 1, 2, 3, 7, 16, 64, 4096, 4**7, 1 << 16, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31,
    1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 64, 10**30, 0.5, 1e-300, 1e300, float("inf"),
    float("nan")]
# names that say how many values belong together
SIZES = ("group_size", "convrot_groupsize", "hadamard_group_size", "group", "bits", "rank",
         "svd_rank", "block_size", "num_bits", "weight_block_size", "columns", "level_group",
         "orig_shape", "n_layers", "num_hidden_layers", "vocab_size", "hidden_size")


class TooLongError(Exception):
    """A load took more than `SECONDS`."""


def extreme(chance: random.Random) -> Any:
    kind = chance.randrange(6)
    if kind < 3:
        return chance.choice(NUMBERS)
    if kind == 3:
        return [chance.choice(NUMBERS) for _ in range(chance.choice([1, 2, 4, 10000]))]
    if kind == 4:
        text = chance.choice(["a", "(a+)+", ".*", "*", "é", "\\", "%", "layer.*", "9"])
        return text * chance.choice([1, 30, 50000])
    return {text * 2: chance.choice(NUMBERS) for text in map(str, range(chance.choice([1, 5000])))}


def change_json(value: Any, chance: random.Random) -> Any:
    """Puts something extreme into one place of a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice([*value, *(chance.choices(SIZES, k=1))])
        return value | {key: change_json(value.get(key), chance)}
    if isinstance(value, list) and value and chance.random() < 0.5:
        at = chance.randrange(len(value))
        return [*value[:at], change_json(value[at], chance), *value[at + 1:]]
    return extreme(chance)


def reshaped(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """A tensor of the same dtype and a shape of another kind."""
    count = tensor.numel()
    shape = chance.choice([
        (count,), (count, 1), (1, count), (1,) * 40 + (count,), (0, 1 << 40), (1 << 40, 0),
        (1 << 20, 0, 1 << 20), (0,), (MOST_BYTES // tensor.itemsize, 1),
        (1, MOST_BYTES // tensor.itemsize), (MOST_BYTES // tensor.itemsize,), ()])
    if torch.Size(shape).numel() == count:
        return tensor.reshape(shape)
    return torch.zeros(shape, dtype=tensor.dtype)


def bombs_of(stored: Stored | StoredGGUF, chance: random.Random, count: int) -> Iterator[tuple]:
    """Yields (what was done, tensors, metadata, settings)."""
    names = list(stored.tensors)
    for _ in range(count):
        name = chance.choice(names)
        tensors, tensor = dict(stored.tensors), stored.tensors[name]
        metadata, settings = dict(stored.metadata), copy.deepcopy(stored.settings)
        marks = [each for each, tensor in tensors.items() if each.endswith("comfy_quant")]
        kinds = ["names", *(["shape"] * 2 if isinstance(stored, Stored) else []),
                 *(["mark"] * 4 if marks else []), *(["metadata"] * 3 if metadata else []),
                 *(["settings"] * 4 if settings else [])]
        kind = chance.choice(kinds)
        if kind == "names":
            number = re.search(r"\.\d+\.", name)
            name = name if number is None else name.replace(number[0], ".%d.", 1)
            value = torch.zeros(chance.choice([(), (0,), (1,), (1, 1)]))
            for index in range(1, 3000):
                tensors[name % index if "%" in name else f"{name}.{index}"] = value
        elif kind == "shape":
            tensors[name] = reshaped(tensor, chance)
        elif kind == "mark":
            for name in marks if chance.random() < 0.3 else [chance.choice(marks)]:
                text = change_json(json.loads(bytes(tensors[name].tolist())), chance)
                tensors[name] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
        elif kind == "metadata":
            name = chance.choice(list(metadata))
            try:
                metadata[name] = json.dumps(change_json(json.loads(metadata[name]), chance))
            except ValueError:
                metadata[name] = str(extreme(chance))
        else:
            settings = change_json(settings, chance)
        yield f"{kind} {name}", tensors, metadata, settings


class Watch:
    """Measures the memory that a load takes, and stops what takes too long or too much."""

    def __enter__(self):
        import resource

        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = self._status("VmRSS")
        self.limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS,
                           (self._status("VmSize") + LARGEST_SPACE, self.limits[1]))
        self.handler = signal.signal(signal.SIGALRM, self._stop)
        signal.alarm(SECONDS)
        return self

    def __exit__(self, *exception):
        import resource

        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.handler)
        resource.setrlimit(resource.RLIMIT_AS, self.limits)
        self.taken = self._status("VmHWM") - self.before

    @staticmethod
    def _stop(*_):
        raise TooLongError

    @staticmethod
    def _status(name: str) -> int:
        line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert line is not None
        return int(line[1]) << 10


def bytes_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def use(model: torch.nn.Module):
    """Dequantises each weight, as a run would."""
    for weight in model.parameters():
        if is_packed(weight):
            weight.dequantize()


def check_bombs(name: str, seed: int, count: int, tmp_path: Path):
    load, stored = written(name, tmp_path)
    check_each(stored, lambda: use(load(str(stored.path))[0]), random.Random(seed), count)


def check_each(stored: Stored | StoredGGUF, load: Callable[[], Any], chance: random.Random,
               count: int):
    for _ in range(2):
        load()
    wrong: list[str] = []
    for done, *parts in bombs_of(stored, chance, count):
        try:
            stored.write(*parts)
        except (RuntimeError, ValueError, TypeError, struct.error):
            continue  # its writer refuses it
        told = ""
        with Watch() as watch:
            try:
                load()
            except WeightFileError as error:
                told = str(error)
            except Exception as error:
                wrong.append(f"{done}: {type(error).__name__}: {str(error)[:200]}")
        if len(told) > LONGEST_SENTENCE:
            wrong.append(f"{done}: a sentence of {len(told)} characters")
        nbytes = bytes_of(stored.path)
        if watch.taken > SPARE + (1 + VALUES_OF_A_BYTE) * nbytes:
            wrong.append(f"{done}: {watch.taken >> 20} MB for {nbytes >> 10} KB")
    assert not wrong, "\n".join(wrong)


def check_lora_bombs(kind: str, count: int, tmp_path: Path):
    packed, _ = flux_pair("Q8_0")
    path, chance = tmp_path / "lora.safetensors", random.Random(random.randrange(1 << 30))
    save_file({name: tensor.contiguous().clone()
               for name, tensor in lora_for(flux_file("Q8_0")[1], kind).items()}, path,
              {"ss_network_args": '{"algo": "lora"}', "ss_network_dim": "4", "format": "pt",
               "lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "rank_pattern": {"a": 1}}'})

    def apply():
        report = check_lora(packed, None, *load_lora_file(str(path)))
        apply_lora(packed, None, report, 1.0, 0.0)

    check_each(stored_in(path), apply, chance, count)


counts = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.heavy)])


@counts
@pytest.mark.parametrize("name", FILES)
def test_a_small_file_is_no_bomb(name, count, tmp_path):
    with small_towers(CLIP):
        check_bombs(name, random.randrange(1 << 30), count, tmp_path)


@counts
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_lora_is_no_bomb(kind, count, tmp_path):
    check_lora_bombs(kind, count, tmp_path)
