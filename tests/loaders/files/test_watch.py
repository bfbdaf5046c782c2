"""A mapped file that others write to is noticed before it is read again; what lies on a network share is read, not mapped."""
import os
import types
from unittest import mock

import pytest
import torch
from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.loaders.files import drives, open_weights
from featherweight.loaders.files.container import Watch, WeightFileError
from featherweight.ops.read_only import is_read_only
from featherweight.ops.tensor import is_packed, packed_tensors
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("small_models")


def write(path, seed=0):
    write_gguf(path, tiny_models.flux(seed, hidden=128, double_blocks=1, single_blocks=1, context=128),
               lambda name, values: "F32" if values.ndim < 2 else "Q8_0")


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "model.gguf")
    os.utime(tmp_path / "model.gguf", ns=(0, 0))  # clocks of drives are coarse
    return tmp_path / "model.gguf"


def shortened(path):
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path):
    with open(path, "r+b") as file:
        file.write(b"GGUF")


def removed(path):
    path.unlink()


def renamed_over(path):
    write(path.with_name("new.gguf"), seed=1)
    os.replace(path.with_name("new.gguf"), path)


@pytest.mark.parametrize("change", [shortened, overwritten])
def test_a_step_of_a_model_whose_file_was_written_to_is_an_error_and_not_the_end_of_the_process(path, change):
    patcher = load_diffusion_model(str(path))
    patcher.prepare_state(torch.ones(1), {})
    change(path)
    with pytest.raises(WeightFileError, match=r"^model\.gguf was written to after it was loaded \(\d+ bytes then, \d+ now\)"):
        patcher.clone().prepare_state(torch.ones(1), {})


@pytest.mark.parametrize("change", [removed, renamed_over])
def test_a_file_that_another_has_taken_the_name_of_stays_in_use(path, change):
    if os.name == "nt":
        pytest.skip("Windows lets nobody do so while the file is mapped")
    patcher = load_diffusion_model(str(path))
    before = bytes(memoryview(open_weights(path).tensor("img_in.weight").numpy()))
    weight = patcher.model.diffusion_model.img_in.weight
    change(path)
    patcher.prepare_state(torch.ones(1), {})
    held = packed_tensors(weight)[0] if is_packed(weight) else weight
    assert bytes(memoryview(held.detach().view(torch.uint8).numpy())) == before


def test_a_step_asks_the_system_once_for_each_file(path):
    patcher = load_diffusion_model(str(path))
    with mock.patch.object(os, "stat", wraps=os.stat) as stat:
        patcher.prepare_state(torch.ones(1), {})
    assert stat.call_count == 1


def test_a_text_encoder_is_watched_where_it_encodes(path):
    from featherweight.loaders.handover import PackedCLIP

    clip = mock.Mock(patcher=mock.Mock())
    clip.patcher.model.packed_patches.watch = Watch.over([path])
    overwritten(path)
    with pytest.raises(WeightFileError, match="was written to"):
        PackedCLIP.load_model(clip)


# --- read, not mapped ---


def mounts(monkeypatch, *entries):
    found = [types.SimpleNamespace(mountpoint=place, fstype=kind, opts=options) for place, kind, options in entries]
    monkeypatch.setattr(drives.psutil, "disk_partitions", lambda all: found)


@pytest.mark.parametrize("kind, options, is_share", [
    ("ext4", "rw", False), ("nfs4", "rw", True), ("cifs", "rw", True), ("9p", "rw", True), ("fuse.sshfs", "rw", True),
    ("fuse.ntfs-3g", "rw", False), ("fuseblk", "rw", False), ("NTFS", "rw,remote", True), ("NTFS", "rw,fixed", False)])
def test_a_share_is_known_by_its_kind(tmp_path, monkeypatch, kind, options, is_share):
    mounts(monkeypatch, ("/", "ext4", "rw"), (str(tmp_path), kind, options), (f"{tmp_path}2", "nfs", "rw"))
    assert drives.is_on_a_share(tmp_path / "model.gguf") == is_share


@pytest.mark.parametrize("switch, copied", [("map", False), ("copy", True), ("", True)])
def test_the_environment_decides_before_the_drive(path, monkeypatch, switch, copied):
    mounts(monkeypatch, (str(path.parent), "nfs", "rw"))
    monkeypatch.setenv(drives.SWITCH, switch)
    assert drives.is_copied(path) == copied


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_what_is_read_is_what_would_be_mapped_and_outlives_the_file(tmp_path, monkeypatch, kind):
    path = tmp_path / f"model.{kind}"
    if kind == "gguf":
        write(path)
    else:
        save_file({"odd": torch.arange(3, dtype=torch.uint8), "late": torch.arange(5, dtype=torch.float32)}, path)
    os.utime(path, ns=(0, 0))
    mapped = open_weights(path)
    monkeypatch.setenv(drives.SWITCH, "copy")
    file = open_weights(path)
    for name in file.entries:
        assert torch.equal(file.tensor(name), mapped.tensor(name))
        assert not is_read_only(file.tensor(name)) and is_read_only(mapped.tensor(name))
    overwritten(path)
    file.watch()
    with pytest.raises(WeightFileError):
        mapped.watch()


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(path, monkeypatch):
    monkeypatch.setenv(drives.SWITCH, "copy")
    file = open_weights(path)
    shortened(path)
    last = max(file.entries.values(), key=lambda entry: entry.offset).name
    with pytest.raises(WeightFileError, match="model.gguf was cut short while it was read"):
        file.tensor(last)
