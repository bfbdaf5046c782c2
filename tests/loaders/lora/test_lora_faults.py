"""A LoRA with one tensor dropped, doubled, renamed, of another type, cut, transposed or added: what
is applied has its effect, or the report says that it fits in part, or the load stops."""
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from pack_api import WeightFileError
from patched_models import KINDS, error_by_effect, flux_file, flux_pair, lora_for, run
from safetensors.torch import save_file

from featherweight.loaders.lora.apply import apply_lora
from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.lora_file import load_lora_file

pytestmark = pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests")

# Without them a layer is that of another LoRA, which is as good: of full strength, without a bias.
OPTIONAL = (".alpha", ".dora_scale", ".diff_b")
WHOLE = (".diff", ".set_weight", ".oft_blocks")  # the only tensor of a layer
FEW, MANY = 6, 200


def faults_of(lora: dict, chance: random.Random, count: int) -> Iterator[tuple[str, dict]]:
    """Yields (what was done, tensors)."""
    kinds: dict[str, list[str]] = {}
    for name in lora:
        kinds.setdefault(name.partition(".")[2], []).append(name)
    while count:
        name = chance.choice(kinds[chance.choice(list(kinds))])
        tensors, tensor = dict(lora), lora[name]
        kind = chance.choice(["drop", "double", "rename", "retype", "cut", "transpose", "add"])
        if kind == "drop" and not name.endswith((*OPTIONAL, *WHOLE)):
            del tensors[name]
        elif kind == "double":
            tensors[f"{name}.1"] = tensor.clone()
        elif kind == "rename":
            tensors[f"{name}x"] = tensors.pop(name)
        elif kind == "retype":
            tensors[name] = tensor.to(chance.choice([torch.int32, torch.bool]))
        elif kind == "cut" and tensor.ndim:
            dim = chance.randrange(tensor.ndim)
            if tensor.ndim == 4 and dim == 0:
                continue  # a BOFT of fewer stages is one too
            tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
        elif (kind == "transpose" and not name.endswith(".dora_scale")
              and tensor.ndim == len(set(tensor.shape)) == 2):
            tensors[name] = tensor.t()
        elif kind == "add":
            tensors[f"{name.partition('.')[0]}.mystery"] = torch.ones(3)
        else:
            continue
        count -= 1
        yield f"{kind} {name}", tensors


def check_faults(kind: str, count: int, tmp_path):
    packed, _ = flux_pair("Q8_0")
    lora, chance = lora_for(flux_file("Q8_0")[1], kind), random.Random(random.randrange(1 << 30))
    numbers = itertools.count()

    def apply(tensors):
        path = str(tmp_path / f"lora {next(numbers)}.safetensors")  # the last one is mapped
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        report = check_lora(packed, None, *load_lora_file(path), measure=False)
        return report, run(apply_lora(packed, None, report, 1.0, 0.0)[0])

    without, (report, expected) = run(packed), apply(lora)
    assert report.fits == "yes"
    silent = []
    for done, tensors in faults_of(lora, chance, count):
        try:
            report, found = apply(tensors)
        except WeightFileError:
            continue
        except Exception as error:
            silent.append(f"{done}: {type(error).__name__}: {error}")
            continue
        if report.fits == "yes" and not error_by_effect(found, expected, without) < 1e-4:
            silent.append(done)
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_a_lora_is_never_silent(kind, count, tmp_path):
    check_faults(kind, count, tmp_path)
