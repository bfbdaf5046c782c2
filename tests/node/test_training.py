"""ComfyUI's Train LoRA trains on a packed model what it trains on the host's dense one of the same
values."""
import dataclasses
import functools
import types
from typing import Any

import comfy.sd
import comfy.utils
import nunchaku_writer
import pytest
import torch
from comfy_extras import nodes_train
from diffusers_names import in_diffusers_names, in_the_hosts_names
from families import (
    FAMILIES,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
)
from host_nodes import Case, Setting, execute
from model_folders import use_folder
from nunchaku_models import table_of
from pack_api import is_packed, load_diffusion_model, packed_tensors
from packed_files import PACKED_FILES, write_q8_0
from quantizer_writers import gptq, quantized_state_dict, save_config
from safetensors.torch import save_file

from featherweight.nodes.apply_lora import ApplyLora

pytestmark = pytest.mark.usefixtures("small_models")

NO_GRADIENT = "comfy_kitchen's rotary embedding has no gradient"
# Families that the host's node cannot train, and why.
UNTRAINABLE = {
    **dict.fromkeys(("joyimage", "cosmos-predict2", "anima", "ernie-image"), NO_GRADIENT),
    **dict.fromkeys(("ltx-2", "minimax-h3", "minimax-h3-pruned"),
                    "the node takes one latent, the model two"),
    "pixart-sigma": "its layer of captions asks for CUDA where it trains",
    "seedvr2-3b": "the node wants a text, the model takes none",
    "hidream-o1": "the node gives a text, the model takes tokens",
}
SLOW = ("ace-step", "ace-step-1.5", "boogu", "chroma-radiance", "sdxl")
# Families of the same classes as another one here: Flux, Wan, Hunyuan Video, and Z-Image, which is
# trained in every format.
SIBLINGS = ("flux-schnell", "flux2-klein", "ovis-image", "longcat-image", "wan2.1-i2v",
            "wan2.1-camera", "wan2.2-ti2v", "hunyuan-image", "hunyuan-video", "z-image")
SETTINGS = {"steps": 2, "training_dtype": "fp32", "lora_dtype": "fp32", "optimizer": "SGD",
            "learning_rate": 0.1}
EFFECT = 0.1  # of a trained LoRA on what the model adds to its input


@dataclasses.dataclass(frozen=True)
class Training(Setting):
    """The inputs of the node for a model of any format."""

    patcher: Any = None

    @property
    def model(self):
        return self.patcher


def train(name: str, patcher, **inputs) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The LoRA that the host's node trains, and the loss of each step."""
    case = Case(name, inputs={**SETTINGS, **inputs})
    node = nodes_train.TrainLoraNode
    (_, lora), (_, losses), _ = execute(node, Training(case, True, patcher))
    return lora, losses["loss"]


def packed_bytes(patcher) -> dict[str, bytes]:
    """Name of each packed weight -> its bytes."""
    return {
        name: b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes()
                       for tensor in packed_tensors(weight))
        for name, weight in patcher.model.diffusion_model.named_parameters() if is_packed(weight)
    }


@pytest.fixture
def record(monkeypatch):
    """What the host's node began its last training with: `patcher`, the clone that it trains on,
    and `start`, the values of the LoRA's tensors."""
    record = types.SimpleNamespace()

    class RecordedGuider(nodes_train.TrainGuider):

        def __init__(self, patcher, **options):
            record.patcher = patcher
            super().__init__(patcher, **options)

    class RecordedOptimizer(torch.optim.SGD):

        def __init__(self, parameters, lr):
            parameters = list(parameters)
            record.start = [parameter.detach().clone() for parameter in parameters]
            super().__init__(parameters, lr)

    monkeypatch.setattr(nodes_train, "TrainGuider", RecordedGuider)
    monkeypatch.setattr(torch.optim, "SGD", RecordedOptimizer)
    return record


def assert_same_steps(name: str, packed, dense, record, **inputs):
    """Trains on both and compares each step's loss and what each tensor of the LoRA has gained.

    Returns:
        The LoRA of the packed model.
    """
    expected, dense_losses = train(name, dense, **inputs)
    before = packed_bytes(packed)
    lora, losses = train(name, packed, **inputs)
    assert before and packed_bytes(packed) == before
    assert packed_bytes(record.patcher) == before
    assert len(losses) == SETTINGS["steps"] and losses == pytest.approx(dense_losses, rel=1e-4)
    assert lora.keys() == expected.keys()
    start = dict(zip(lora, record.start, strict=True))
    changes = {key: (lora[key] - value, expected[key] - value) for key, value in start.items()}
    largest = max(change.norm() for _, change in changes.values())
    assert largest > 0
    for key, (change, expected_change) in changes.items():
        rounding = 1e-7 * start[key].norm() + 1e-7 * largest
        error = (change - expected_change).norm()
        assert error <= 1e-3 * expected_change.norm() + rounding, key
    return lora


@pytest.fixture
def lora_folder(tmp_path, monkeypatch):
    """The host's folder of LoRAs."""
    use_folder(tmp_path, monkeypatch)
    return tmp_path


def assert_same_effect(name: str, packed, dense, lora: dict, folder):
    """Applies a trained LoRA to both, from a file, and compares what it changes."""
    family = FAMILIES[name]
    save_file({key: value.contiguous() for key, value in lora.items()}, folder / "t.safetensors")
    lora = comfy.utils.load_torch_file(str(folder / "t.safetensors"))

    def dense_run(strength: float) -> torch.Tensor:
        return run(comfy.sd.load_lora_for_models(dense, None, lora, strength, 0)[0], family)

    without = run(dense, family)
    strength = EFFECT / relative_error(dense_run(1.0), without)
    expected = dense_run(strength)
    patched, _, report = ApplyLora.execute(packed, "t.safetensors", strength, 0.0).args
    assert "all" in report.splitlines()[0] and "layers match" in report.splitlines()[0]
    effect = expected - without
    assert effect.norm() > EFFECT / 10 * without.norm()
    assert (run(patched, family) - expected).norm() < 1e-3 * effect.norm()


def write_dense(name: str, path, values):
    """A file of a model's dense values beside its packed one."""
    dense = path.with_name("dense.safetensors")
    values = {key: value.float().contiguous() for key, value in values.items()}
    save_file(values, dense, dict(FAMILIES[name].metadata))
    return dense


def load_pair(path, dense) -> tuple:
    """(packed patcher, the host's dense one of the same values); the node clones both anew from
    their files."""
    return load_diffusion_model(str(path)), comfy.sd.load_diffusion_model(str(dense))


def marks(name: str) -> list:
    if name in UNTRAINABLE:
        return [pytest.mark.skip(reason=f"ComfyUI cannot train {name}: {UNTRAINABLE[name]}")]
    return [pytest.mark.heavy] if name in (*SLOW, *SIBLINGS) else []


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=marks(name)) for name, family in FAMILIES.items() if family.latent
])
def test_every_family_of_models_trains_as_dense(name, lora_folder, monkeypatch, record):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    path = lora_folder / "model.gguf"
    values = write_q8_0(path, random_weights(family), metadata=family.metadata)
    packed, dense = load_pair(path, write_dense(name, path, values))
    lora = assert_same_steps(name, packed, dense, record)
    assert_same_effect(name, packed, dense, lora, lora_folder)


def write_in_hosts_names(written: str, folder, name: str):
    write, filename = PACKED_FILES[written]
    return folder / filename, write(folder / filename, dict(random_weights(FAMILIES[name])))


def write_svdquant(precision: str, folder, name: str):
    weights, table = random_weights(FAMILIES[name]), table_of(name)
    model = nunchaku_writer.WRITERS[name](in_diffusers_names(weights, table), precision=precision)
    values = nunchaku_writer.write(folder / "net.safetensors", model)
    return folder / "net.safetensors", in_the_hosts_names(values, weights, table)


def write_gptq(folder, name: str):
    """Q, k and v apart, which are joined where the columns of all three are in order."""
    weights, table = random_weights(FAMILIES[name]), table_of(name)
    (folder / "net").mkdir()
    stored, values = quantized_state_dict(
        in_diffusers_names(weights, table), gptq, lambda key: "transformer_blocks." not in key)
    save_file(stored, folder / "net" / "diffusion_pytorch_model.safetensors")
    save_config(folder / "net", quant_method="gptq")
    return folder / "net", in_the_hosts_names(values, weights, table)


# format -> (model, writer)
FORMATS = {
    **{
        written: (name, functools.partial(write_in_hosts_names, written))
        for written, name in {
            "Q4_K": "flux-dev", "NF4": "z-image", "int8": "wan2.1-t2v", "float8_e4m3fn": "sd1.5",
            "int8_tensorwise": "lumina2", "SDNQ": "qwen-image"
        }.items()
    },
    "SVDQuant int4": ("flux-dev", functools.partial(write_svdquant, "int4")),
    "SVDQuant nvfp4": ("z-image", functools.partial(write_svdquant, "nvfp4")),
    "GPTQ": ("flux-dev", write_gptq),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Key of FORMATS -> paths of the packed file and of the dense one, written once."""

    @functools.cache
    def written(key: str) -> tuple:
        name, write = FORMATS[key]
        path, values = write(tmp_path_factory.mktemp("files"), name)
        return path, write_dense(name, path, values)

    return written


@pytest.fixture
def pair(request, files, monkeypatch):
    """(name of the model, packed patcher, dense patcher) for a key of FORMATS."""
    name, _ = FORMATS[request.param]
    shrunken_detection(FAMILIES[name], monkeypatch)
    return name, *load_pair(*files(request.param))


@pytest.mark.parametrize("pair", FORMATS, indirect=True)
def test_every_family_of_formats_trains_as_dense(pair, lora_folder, record):
    lora = assert_same_steps(*pair, record)
    assert_same_effect(*pair, lora, lora_folder)


INPUTS = [
    {"bypass_mode": True}, {"offloading": True}, {"gradient_checkpointing": False},
    {"checkpoint_depth": 3}, *({"algorithm": name} for name in ("LoHa", "LoKr", "OFT"))
]


@pytest.mark.parametrize(("pair", "inputs"), [
    *(("SVDQuant nvfp4", inputs) for inputs in INPUTS),
    *(("NF4", inputs) for inputs in INPUTS[:2])
], indirect=["pair"], ids=lambda value: value if isinstance(value, str) else "-".join(
    map(str, *value.items())))
def test_every_setting_of_the_node_trains_as_dense(pair, inputs, record):
    assert_same_steps(*pair, record, **inputs)
