"""Files that torch saved: those of tensors are read, others are not even unpickled."""
import pickle
import resource
import struct
from collections import OrderedDict

import pytest
import torch

from featherweight.loaders.container.weight_file import WeightFileError
from featherweight.loaders.lora.torch_file import read_torch_file

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
