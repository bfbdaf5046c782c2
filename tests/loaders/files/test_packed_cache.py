"""What was packed is kept: found again, never stale, never above its limit, never in the way."""
import errno
import logging
import os
import shutil
import types
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from patched_models import tiny_flux
from recipe_process import digest
from safetensors.torch import load_file, save_file

from featherweight.loaders.files import packed_cache
from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.inspect.model_summary import memory_summary
from featherweight.loaders.models import pack_on_load
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.quantize.pack_tensor import pack_tensor

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "flux.safetensors"
    save_file({name: values.bfloat16() for name, values in tiny_flux().items()}, path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "kept here"))
    return tmp_path / "kept here"


@pytest.fixture
def packings(monkeypatch) -> list:
    """Grows by one for each weight that is packed."""
    count, pack = [], pack_on_load.pack_tensor

    def counted(*arguments):
        count.append(1)
        return pack(*arguments)

    monkeypatch.setattr(pack_on_load, "pack_tensor", counted)
    return count


def load(path, type_name: str = "Q8_0"):
    return load_diffusion_model(str(path), pack_to=type_name)


@pytest.mark.parametrize("type_name", ["Q8_0", "NF4"])
def test_the_second_load_packs_nothing_and_holds_the_same(type_name, source, folder, packings):
    first = load(source, type_name)
    assert len(packings) == 13 and memory_summary(first).endswith(
        f", kept for the next time in {folder} (FEATHERWEIGHT_PACKED_CACHE=off keeps nothing)")
    second = load(source, type_name)
    assert len(packings) == 13 and digest(second) == digest(first)
    assert memory_summary(second).endswith("packed from BF16 in an earlier load")
    [entry] = folder.glob(packed_cache.NAMES)
    assert entry.stat().st_size < 1.1 * first.model_size()


@pytest.mark.parametrize(("setting", "seconds", "is_kept"), [
    (None, 61, True), (None, 59, False), ("off", 61, False), ("OFF", 61, False)])
def test_what_took_a_minute_is_kept_in_comfyuis_user_folder_unless_turned_off(
        setting, seconds, is_kept, source, packings, tmp_path, monkeypatch):
    if setting is None:
        monkeypatch.delenv(packed_cache.FOLDER, raising=False)
    else:
        monkeypatch.setenv(packed_cache.FOLDER, setting)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    clock = iter(range(0, 100 * seconds, seconds))
    monkeypatch.setattr(pack_on_load.time, "perf_counter", lambda: next(clock))
    first = load(source)
    assert ("kept for the next time in" in memory_summary(first)) == is_kept
    second = load(source)
    assert len(packings) == (13 if is_kept else 26) and digest(first) == digest(second)
    kept = tmp_path / "user" / "featherweight" / "packed"
    assert len(list(kept.glob(packed_cache.NAMES))) == is_kept
    assert is_kept or not (tmp_path / "user").exists()


@pytest.mark.parametrize("makes_room", [False, True])
def test_a_drive_is_never_filled(makes_room, source, folder, monkeypatch, caplog):
    load(source, "Q4_K")
    [entry] = folder.iterdir()
    size = entry.stat().st_size
    total = 1000 * size
    left = total * packed_cache.FREE_SHARE
    free = left + (size * 1.5 if makes_room else -size)
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda folder: types.SimpleNamespace(total=total, free=free))
    assert ("kept" in memory_summary(load(source, "Q8_0"))) == makes_room
    assert len(list(folder.iterdir())) == 1 and entry.exists() != makes_room
    assert ("some of the drive is left free" in caplog.text) != makes_room


@pytest.mark.parametrize("change", ["time", "size", "type", "packers", "place"])
def test_another_state_of_anything_is_another_entry(change, source, folder, packings, monkeypatch):
    load(source)
    other = source
    if change == "time":
        os.utime(source, (1, 1))
    elif change == "size":
        with open(source, "ab") as file:
            file.write(b"\0")
    elif change == "packers":
        monkeypatch.setattr(packed_cache, "PACKER_VERSION", packed_cache.PACKER_VERSION + 1)
    elif change == "place":
        other = source.rename(source.with_name("other.safetensors"))
    load(other, "Q6_K" if change == "type" else "Q8_0")
    assert len(packings) == 26 and len(list(folder.iterdir())) == 2


def test_another_model_of_the_same_size_and_time_is_another_entry(source, folder, packings):
    first, status = digest(load(source)), source.stat()
    new = source.with_name("new")
    save_file({name: values.bfloat16() for name, values in tiny_flux(1).items()}, new)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(new, source)
    assert (source.stat().st_size, source.stat().st_mtime_ns) == (
        status.st_size,
        status.st_mtime_ns,
    )
    assert digest(load(source)) != first and len(packings) == 26


def test_an_entry_belongs_to_the_file_that_was_opened(source, folder):
    """Another file that takes its name while it is packed does not find what was packed of the
    first."""
    file, wanted = open_weights(source), {"a": ("Q8_0", (4, 32))}
    opened = packed_cache.entry_path(file, wanted, folder)
    os.utime(source, (1, 1))
    assert (
        packed_cache.entry_path(file, wanted, folder)
        == opened
        != packed_cache.entry_path(open_weights(source), wanted, folder)
    )


def test_an_entry_is_watched_while_its_model_is_in_use_and_others_may_read_it(source, folder):
    load(source)
    model, _ = load(source), load(source)
    model.prepare_state(torch.ones(1), {})
    [entry] = folder.glob(packed_cache.NAMES)
    with open(entry, "r+b") as file:
        file.write(b"\0")
    with pytest.raises(WeightFileError, match=f"^{entry.name} was written to after it was loaded"):
        model.prepare_state(torch.ones(1), {})


@pytest.mark.parametrize("damage", ["cut short", "zeros", "empty", "of another model",
                                    "one bit", "a page of zeros"])
def test_a_damaged_entry_is_as_none_and_is_made_anew(damage, source, folder, packings, caplog):
    expected = digest(load(source))
    [entry] = folder.iterdir()
    content = entry.read_bytes()
    if damage == "of another model":
        save_file({"a": torch.zeros(1)}, entry)
    else:
        middle = len(content) // 2
        entry.write_bytes({
            "cut short": content[:-1000], "zeros": bytes(4096), "empty": b"",
            "one bit": content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1:],
            "a page of zeros": content[:middle] + bytes(4096) + content[middle + 4096:]
        }[damage])
    assert digest(load(source)) == expected and len(packings) == 26
    assert entry.name in caplog.text and entry.read_bytes() == content


@pytest.mark.parametrize("type_name", ["Q8_0", "NF4"])
def test_an_entry_of_an_earlier_version_is_used_unchecked(type_name, source, folder, packings):
    expected = digest(load(source, type_name))
    [entry] = folder.iterdir()
    tensors = load_file(entry)
    del tensors[packed_cache.DIGESTS]
    save_file(tensors, entry)
    assert digest(load(source, type_name)) == expected and len(packings) == 13


def test_the_least_recently_used_goes_first_and_nothing_else(source, folder, monkeypatch):
    for type_name in ("Q8_0", "Q6_K"):
        load(source, type_name)
    sizes = {entry.stat().st_size: entry for entry in folder.iterdir()}
    q6_k, q8_0 = (sizes[size] for size in sorted(sizes))
    os.utime(q8_0, (1, 1))
    os.utime(q6_k, (2, 2))
    load(source, "Q8_0")  # so it was used last
    (folder / "mine.safetensors").write_bytes(bytes(10_000_000))
    monkeypatch.setenv(packed_cache.LIMIT, str((sum(sizes) + 100) / 1e9))
    load(source, "Q4_K")
    left = sorted(folder.glob(packed_cache.NAMES))
    assert [path.name for path in folder.glob("*.used")] == [q8_0.with_suffix(".used").name]
    assert (
        q8_0 in left
        and q6_k not in left
        and len(left) == 2
        and (folder / "mine.safetensors").exists()
    )
    assert sum(entry.stat().st_size for entry in left) <= sum(sizes) + 100


def test_what_is_larger_than_the_limit_is_not_kept(source, folder, monkeypatch, caplog):
    monkeypatch.setenv(packed_cache.LIMIT, "0.001")
    assert "kept" not in memory_summary(load(source))
    assert list(folder.iterdir()) == [] and packed_cache.LIMIT in caplog.text


def test_what_is_larger_than_the_limit_leaves_what_is_kept_already(source, folder, monkeypatch):
    load(source, "Q4_K")
    [entry] = folder.iterdir()
    monkeypatch.setenv(packed_cache.LIMIT, str((entry.stat().st_size + 100) / 1e9))
    assert "kept" not in memory_summary(load(source, "Q8_0"))
    assert list(folder.iterdir()) == [entry]


def test_what_a_killed_process_left_takes_no_room(source, folder, monkeypatch):
    load(source)
    [entry] = folder.iterdir()
    left = entry.rename(entry.with_name(f"{entry.name}.99999999.featherweight.part"))
    monkeypatch.setenv(packed_cache.LIMIT, str(left.stat().st_size * 1.5 / 1e9))
    assert "kept for the next time" in memory_summary(load(source))
    assert list(folder.iterdir()) == [entry]


def test_an_entry_whose_time_cannot_be_set_is_read_and_stays(tmp_path, monkeypatch):
    """Another user's, or one on a drive that is only read."""
    entry, wanted = tmp_path / packed_cache.NAMES.replace("*", "0"), {"a": ("Q8_0", (4, 32))}
    assert packed_cache.keep(entry, {"a": pack_tensor(torch.ones(4, 32), FORMATS["Q8_0"])}, wanted)

    def refused(path, *arguments, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(Path, "touch", refused)
    assert packed_cache.read(entry, wanted) is not None and entry.exists()


def test_a_limit_that_is_no_number_is_said_and_the_usual_one_taken(
    source, folder, monkeypatch, caplog
):
    monkeypatch.setenv(packed_cache.LIMIT, "lots")
    load(source)
    assert "'lots', not a number of GB" in caplog.text and len(list(folder.iterdir())) == 1


def test_a_load_that_is_cancelled_keeps_nothing(source, folder, monkeypatch):
    pack, count = pack_on_load.pack_tensor, []

    def cancelled(*arguments):
        count.append(1)
        if len(count) == 5:
            raise comfy.model_management.InterruptProcessingException
        return pack(*arguments)

    monkeypatch.setattr(pack_on_load, "pack_tensor", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load(source)
    assert not folder.exists()


@pytest.mark.parametrize(
    "trouble", ["a file in its place", "a full disk", "another process was faster"]
)
def test_where_nothing_can_be_kept_the_model_loads_all_the_same(
    trouble, source, folder, monkeypatch, caplog
):
    if trouble == "a file in its place":
        folder.write_text("")
    elif trouble == "a full disk":
        def full(*arguments):
            raise packed_cache.WriteError("The disk is full.")

        monkeypatch.setattr(
            "featherweight.loaders.files.safetensors_writer.SafetensorsWriter.write", full)
    else:
        finish = "featherweight.loaders.files.safetensors_writer.SafetensorsWriter.finish"
        monkeypatch.setattr(finish,
                            lambda writer: Path(writer.file._path).write_bytes(b"the other's"))
    with caplog.at_level(logging.WARNING):
        patcher = load(source)
    assert "are not cached: " in caplog.text and "kept" not in memory_summary(patcher)
    left = list(folder.iterdir()) if folder.is_dir() else []
    assert [path.read_bytes() for path in left] == (
        [b"the other's"] if trouble == "another process was faster" else []
    )
