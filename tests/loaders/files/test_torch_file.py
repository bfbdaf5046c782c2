"""Files that torch saved: those of tensors are read, others are not even unpickled."""
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from pack_api import WeightFileError, load_diffusion_model, open_weights
from patched_models import relative, run, tiny_flux
from safetensors.torch import save_file

from featherweight.loaders.files.torch_file import read_torch_file
from featherweight.loaders.inspect import inspect

TENSORS = {"a.lora_up.weight": torch.randn(8, 4), "a.lora_down.weight": torch.randn(4, 8).half(),
           "a.alpha": torch.tensor(4.0), "b.diff": torch.randn(8).bfloat16(),
           "c.codes": torch.arange(8, dtype=torch.int8)}


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda tensors: {"state_dict": tensors},
                                  lambda tensors: {"state_dict": tensors, "step": 7}])
def test_files_of_tensors_are_read(wrap, zipped, tmp_path):
    torch.save(wrap(TENSORS), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(str(tmp_path / "a.pt"))
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_views_are_not_copied_without_a_bound(zipped, tmp_path):
    base = torch.rand(300, 200)
    for count in (1, 100):
        torch.save({f"{number}": base.t() for number in range(count)}, tmp_path / f"{count}.pt",
                   _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_torch_file(str(tmp_path / "1.pt"))["0"], base.t())
    with pytest.raises(WeightFileError, match=r"^100\.pt cannot .* would take .*\. Get"):
        read_torch_file(str(tmp_path / "100.pt"))


def test_parameters_are_read(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / "a.pt")
    assert torch.equal(read_torch_file(str(tmp_path / "a.pt"))["a"], torch.ones(3))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("call", [
    Call(bytearray, 1 << 40), Call(sorted, [2, 1]), Call(eval, "1"), Call(bytes, 1 << 40),
    Call(torch.zeros, 1 << 40), Call(list, range(1 << 40))])
def test_what_calls_anything_else_is_refused_before_it_is_called(call, protocol, zipped, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": call} if protocol == 2 else call, path, pickle_protocol=protocol,
               _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 2000
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightFileError, match=r"a.pt cannot be read as a LoRA.*safetensors\.$"):
        read_torch_file(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("data", [
    b"PK", b"\x80\x02", b"\x80\x02}q\x00.", b"c__builtin__\nbytearray\n(I9999999999\ntR.",
    pickle.dumps({"a": bytearray(8)}), struct.pack("<Q", 1 << 60), b"cos\nsystem\n(S'x'\ntR."])
def test_damaged_and_hostile_pickles_are_a_sentence(data, tmp_path):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(WeightFileError, match="a.pt cannot be read as a LoRA"):
        read_torch_file(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_that_torch_saved_is_packed_and_inspected(zipped, small_models, tmp_path):
    """It is in ComfyUI's own loader too, without packing."""
    path = str(tmp_path / "model.pt")
    torch.save({"state_dict": tiny_flux()}, path, _use_new_zipfile_serialization=zipped)
    save_file(tiny_flux(), tmp_path / "model.safetensors")
    plain, packed, of_safetensors = (
        run(load_diffusion_model(str(tmp_path / name), pack_to=pack_to))
        for name, pack_to in (("model.pt", None), ("model.pt", "Q8_0"),
                              ("model.safetensors", "Q8_0")))
    assert torch.equal(packed, of_safetensors) and 0 < relative(packed, plain) < 0.05
    found, = inspect(path)
    assert found.title == "model.pt is a diffusion model: Flux.1."
    assert found.nbytes == inspect(tmp_path / "model.safetensors")[0].nbytes


def test_a_model_with_a_program_in_it_is_not_read(tmp_path):
    torch.save({"a": Call(eval, "1")}, tmp_path / "a.pt")
    with pytest.raises(WeightFileError, match=r"^a.pt cannot be read as a model: .*safetensors\.$"):
        open_weights(tmp_path / "a.pt")


def test_an_archive_is_told_from_a_file_of_torch(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("model.safetensors", b"x")
    with pytest.raises(WeightFileError, match="^a.pt: it is an archive. Unpack it and pick the"):
        open_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [
    {}, {"a": 1}, [1], {"a": torch.zeros(2, dtype=torch.complex128)}], ids=str)
def test_a_file_of_torch_without_weights_is_a_sentence(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightFileError, match="^a.pt holds .*, expected the weights of a model"):
        open_weights(tmp_path / "a.pt")
