"""What was packed is kept: found again, never stale, never above its limit, never in the way."""
import errno
import hashlib
import logging
import os
import re
import shutil
import types
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from families import FAMILIES, random_weights, shrunken_detection
from pack_api import (
    ROW_TYPES,
    WeightFileError,
    is_packed,
    load_diffusion_model,
    memory_summary,
    open_weights,
    pack_types,
    packed_tensors,
)
from packed_files import PACKED_FILES
from patched_models import tiny_flux
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.files import atomic_file, packed_cache
from featherweight.loaders.files.gguf_writer import GGUFWriter
from featherweight.loaders.files.safetensors_writer import SafetensorsWriter
from featherweight.loaders.models import pack_on_load

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
    count = []

    def counted(pack):
        def run(*arguments):
            count.append(1)
            return pack(*arguments)
        return run

    for name in ("pack_tensor", "pack_rows"):
        monkeypatch.setattr(pack_types, name, counted(getattr(pack_types, name)))
    return count


def entries(folder: Path) -> list[Path]:
    return sorted(path for name in packed_cache.NAMES for path in folder.glob(name))


def held(patcher) -> list[str]:
    """The bytes of each weight, whose codes a GGUF holds in rows."""
    weights = sorted(patcher.model.diffusion_model.named_parameters())
    return [f"{name} {part.dtype} {hashlib.sha256(data).hexdigest()}" for name, weight in weights
            for part in (packed_tensors(weight.data) if is_packed(weight.data) else [weight.data])
            for data in [part.contiguous().flatten().view(torch.uint8).numpy().tobytes()]]


SPARE = 400_000  # bytes that an entry is taken to be larger than it is, at most


def load(path, type_name: str = "Q8_0"):
    return load_diffusion_model(str(path), pack_to=type_name)


@pytest.mark.parametrize("type_name", pack_on_load.LOAD_TYPES)
def test_the_second_load_packs_nothing_and_holds_the_same(type_name, source, folder, packings):
    first = load(source, type_name)
    where = f" in {folder} (FEATHERWEIGHT_PACKED_CACHE=off keeps nothing)"
    assert len(packings) == 13
    assert memory_summary(first).endswith(f", kept for the next time{where}")
    second = load(source, type_name)
    assert len(packings) == 13 and held(second) == held(first)
    loss = re.search(r", loss: [a-z ]+ \([\d.]+ % of the weights\)", memory_summary(first))[0]
    assert memory_summary(second).endswith(
        f"packed from BF16 in an earlier load{loss}, kept{where}")
    [entry] = entries(folder)
    assert entry.stat().st_size < 1.1 * first.model_size()
    assert held(load_diffusion_model(str(entry))) == held(first)  # a file of the whole model


def test_an_entry_of_a_gguf_has_what_stays_packed_too(folder, tmp_path, packings):
    write_gguf(tmp_path / "flux.gguf", tiny_flux(), lambda name, values: "Q5_K"
               if "img_mlp" in name and values.ndim == 2 else "F32")
    first = load(tmp_path / "flux.gguf")
    assert "Q5_K stays as in the file" in memory_summary(first)
    [entry] = entries(folder)
    assert held(load_diffusion_model(str(entry))) == held(first)
    count = len(packings)
    assert held(load(tmp_path / "flux.gguf")) == held(first) and len(packings) == count


def test_what_an_entry_cannot_hold_is_read_from_its_file(folder, tmp_path, packings):
    write_int8, _ = PACKED_FILES["int8"]
    path, layer = tmp_path / "flux.safetensors", "double_blocks.0.img_mlp.0"
    source = tmp_path / "source.safetensors"
    write_int8(source, tiny_flux())
    tensors = {name: tensor for name, tensor in load_file(source).items()
               if not name.startswith(f"{layer}.")}
    save_file(tensors | {f"{layer}.{part}": tiny_flux()[f"{layer}.{part}"].bfloat16()
                         for part in ("weight", "bias")}, path)
    first = load(path)
    assert "; INT8 stays as in the file" in memory_summary(first) and len(packings) == 1
    assert held(load(path)) == held(first) and len(packings) == 1


def test_of_a_checkpoint_an_entry_has_the_model(folder, tmp_path, packings, monkeypatch):
    """With what tells ComfyUI how it was trained."""
    shrunken_detection(FAMILIES["sdxl"], monkeypatch)
    path = tmp_path / "checkpoint.safetensors"
    model = {f"model.diffusion_model.{name}": values.half().contiguous()
             for name, values in random_weights(FAMILIES["sdxl"]).items()}
    save_file(model | {"v_pred": torch.empty(0), "first_stage_model.a": torch.ones(1)}, path)
    first = load(path, "int8_convrot")
    [entry] = entries(folder)
    with safe_open(entry, "pt") as file:
        names = set(file.keys())
    assert names.isdisjoint({"first_stage_model.a", *model}) and "v_pred" in names
    by_the_host = comfy.sd.load_diffusion_model(str(entry))
    assert by_the_host.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    count = len(packings)
    assert held(load(path, "int8_convrot")) == held(first) and len(packings) == count > 10


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
    assert len(packings) == (13 if is_kept else 26) and held(first) == held(second)
    kept = tmp_path / "user" / "featherweight" / "packed"
    assert len(entries(kept)) == is_kept
    assert is_kept or not (tmp_path / "user").exists()


@pytest.mark.parametrize(("entries_that_fit", "makes_room"), [(0.2, False), (1.5, True)])
@pytest.mark.parametrize("drive", ["large", "nearly full"])
def test_a_drive_is_never_filled(drive, entries_that_fit, makes_room, source, folder, monkeypatch,
                                 caplog):
    load(source, "Q4_K")
    [entry] = folder.iterdir()
    size = entry.stat().st_size
    monkeypatch.setattr(atomic_file, "SPARE", 0)  # larger than these files
    if drive == "large":
        left = 5 * size
        total, free = left / packed_cache.FREE_SHARE, left + entries_that_fit * size
    else:
        total, free = 1000 * size, entries_that_fit * size / packed_cache.NEARLY_FULL_SHARE
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda folder: types.SimpleNamespace(total=total, free=free))
    assert ("kept" in memory_summary(load(source, "Q8_0"))) == makes_room
    assert len(list(folder.iterdir())) == 1 and entry.exists() != makes_room
    assert ("is left free" in caplog.text) != makes_room


@pytest.mark.parametrize("change", [
    "time", "size", "type", "packers", "place", "scales", "config", "READ_ANYWAY"])
def test_another_state_of_anything_is_another_entry(change, source, folder, packings, monkeypatch):
    load(source)
    other = source
    if change == "time":
        os.utime(source, (1, 1))
    elif change == "size":
        with open(source, "ab") as file:
            file.write(b"\0")
    elif change == "scales":
        source.with_name(f"{source.stem}_map.pt").write_bytes(b"scales")
    elif change == "config":
        source.with_name("config.json").write_text('{"quant_method": "sdnq"}')
    elif change == "READ_ANYWAY":
        monkeypatch.setenv("FEATHERWEIGHT_READ_ANYWAY", "1")
    elif change == "packers":
        monkeypatch.setattr(packed_cache, "PACKER_VERSION", packed_cache.PACKER_VERSION + 1)
    elif change == "place":
        other = source.rename(source.with_name("other.safetensors"))
    load(other, "Q6_K" if change == "type" else "Q8_0")
    assert len(packings) == 26 and len(list(folder.iterdir())) == 2


def test_another_model_of_the_same_size_and_time_is_another_entry(source, folder, packings):
    first, status = held(load(source)), source.stat()
    new = source.with_name("new")
    save_file({name: values.bfloat16() for name, values in tiny_flux(1).items()}, new)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(new, source)
    assert (source.stat().st_size, source.stat().st_mtime_ns) == (
        status.st_size,
        status.st_mtime_ns,
    )
    assert held(load(source)) != first and len(packings) == 26


def test_an_entry_belongs_to_the_file_that_was_opened(source, folder):
    """Another file that takes its name while it is packed does not find what was packed of the
    first."""
    file, wanted = open_weights(source), {"a": ("Q8_0", (4, 32))}
    opened = packed_cache.entry_path(file, wanted, folder, ".gguf")
    os.utime(source, (1, 1))
    assert (
        packed_cache.entry_path(file, wanted, folder, ".gguf")
        == opened
        != packed_cache.entry_path(open_weights(source), wanted, folder, ".gguf")
    )


def test_an_entry_is_watched_while_its_model_is_in_use_and_others_may_read_it(source, folder):
    load(source)
    model, _ = load(source), load(source)
    model.prepare_state(torch.ones(1), {})
    [entry] = entries(folder)
    with open(entry, "r+b") as file:
        file.write(b"\0")
    with pytest.raises(WeightFileError, match=f"^{entry.name} was written to after it was loaded"):
        model.prepare_state(torch.ones(1), {})


@pytest.mark.parametrize("damage", ["cut short", "zeros", "empty", "of another model",
                                    "one bit", "a page of zeros", "no digests"])
@pytest.mark.parametrize("type_name", ["Q8_0", "NF4", "int8_convrot", "nvfp4"])
def test_a_damaged_entry_is_as_none_and_is_made_anew(damage, type_name, source, folder, packings,
                                                     caplog):
    expected = held(load(source, type_name))
    [entry] = folder.iterdir()
    content = entry.read_bytes()
    if damage == "of another model":
        save_file({"a": torch.zeros(1)}, entry)
    else:
        middle = len(content) // 2
        entry.write_bytes({
            "cut short": content[:-1000], "zeros": bytes(4096), "empty": b"",
            "no digests": content.replace(b"digests", b"another"),
            "one bit": content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1:],
            "a page of zeros": content[:middle] + bytes(4096) + content[middle + 4096:]
        }[damage])
    assert held(load(source, type_name)) == expected and len(packings) == 26
    assert entry.name in caplog.text and entry.read_bytes() == content
    assert "packed again" in caplog.text and "ownload" not in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o644])
@pytest.mark.parametrize("type_name", ["Q8_0", "NF4"])
def test_an_entry_is_read_by_those_who_may_read_its_source(mode, type_name, source, folder,
                                                           monkeypatch):
    source.chmod(mode)
    modes, put = [], atomic_file.WeightsWriter.put

    def watched(writer, data):
        modes.append(os.fstat(writer.file._file.fileno()).st_mode)
        return put(writer, data)

    monkeypatch.setattr(atomic_file.WeightsWriter, "put", watched)
    load(source, type_name)
    [entry] = entries(folder)
    wanted = mode | 0o200  # the cache removes and replaces it
    assert {each & 0o777 for each in [*modes, entry.stat().st_mode]} == {wanted}


def test_an_entry_of_an_earlier_version_is_not_read_and_goes_first(source, folder, monkeypatch):
    load(source)
    [entry] = entries(folder)
    size = entry.stat().st_size
    old = folder / f"featherweight-{'0' * 40}.safetensors"
    save_file({"a": torch.zeros(size // 4)}, old)
    os.utime(entry, (1, 1))  # used before the old one
    monkeypatch.setenv(packed_cache.LIMIT, str((2 * size + SPARE) / 1e9))
    load(source, "Q6_K")
    assert len(entries(folder)) == 2 and entry.exists() and not old.exists()


def test_the_least_recently_used_goes_first_and_nothing_else(source, folder, monkeypatch):
    for type_name in ("Q8_0", "Q6_K"):
        load(source, type_name)
    sizes = {entry.stat().st_size: entry for entry in entries(folder)}
    q6_k, q8_0 = (sizes[size] for size in sorted(sizes))
    os.utime(q8_0, (1, 1))
    os.utime(q6_k, (2, 2))
    load(source, "Q8_0")  # so it was used last
    (folder / "mine.safetensors").write_bytes(bytes(10_000_000))
    monkeypatch.setenv(packed_cache.LIMIT, str((sum(sizes) + SPARE) / 1e9))
    load(source, "Q4_K")
    left = entries(folder)
    assert [path.name for path in folder.glob("*.used")] == [q8_0.with_suffix(".used").name]
    assert (
        q8_0 in left
        and q6_k not in left
        and len(left) == 2
        and (folder / "mine.safetensors").exists()
    )
    assert sum(entry.stat().st_size for entry in left) <= sum(sizes) + SPARE


def test_what_is_larger_than_the_limit_is_not_kept(source, folder, monkeypatch, caplog):
    monkeypatch.setenv(packed_cache.LIMIT, "0.001")
    assert "kept" not in memory_summary(load(source))
    assert list(folder.iterdir()) == [] and packed_cache.LIMIT in caplog.text


def test_what_is_larger_than_the_limit_leaves_what_is_kept_already(source, folder, monkeypatch):
    load(source, "Q4_K")
    [entry] = folder.iterdir()
    monkeypatch.setenv(packed_cache.LIMIT, str((entry.stat().st_size + SPARE) / 1e9))
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
    entry = tmp_path / "featherweight-0.gguf"
    assert packed_cache.keep(entry, 6, lambda path: path.write_bytes(b"packed"))

    def refused(path, *arguments, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(Path, "touch", refused)
    assert packed_cache.read(entry, Path.read_bytes) == b"packed" and entry.exists()


def test_a_limit_that_is_no_number_is_said_and_the_usual_one_taken(
    source, folder, monkeypatch, caplog
):
    monkeypatch.setenv(packed_cache.LIMIT, "lots")
    load(source)
    assert "'lots', not a number of GB" in caplog.text and len(list(folder.iterdir())) == 1


def test_a_load_that_is_cancelled_keeps_nothing(source, folder, monkeypatch):
    pack, count = pack_types.pack_tensor, []

    def cancelled(*arguments):
        count.append(1)
        if len(count) == 5:
            raise comfy.model_management.InterruptProcessingException
        return pack(*arguments)

    monkeypatch.setattr(pack_types, "pack_tensor", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load(source)
    assert not folder.exists()


@pytest.mark.parametrize("type_name", ["Q8_0", "NF4", *ROW_TYPES])
@pytest.mark.parametrize("trouble", ["a file in its place", "a full disk",
                                     "a folder that is only read", "another process was faster"])
def test_where_nothing_can_be_kept_the_model_loads_all_the_same(
    trouble, type_name, source, folder, monkeypatch, caplog
):
    if trouble == "a file in its place":
        folder.write_text("")
    elif trouble == "a full disk":
        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(atomic_file.WeightsWriter, "put", full)
    elif trouble == "a folder that is only read":
        monkeypatch.setattr(atomic_file.os, "access", lambda path, mode: mode != os.W_OK)
    else:
        for writer in (SafetensorsWriter, GGUFWriter):
            monkeypatch.setattr(writer, "finish", lambda writer: Path(
                writer.file._path).write_bytes(b"the other's"))
    with caplog.at_level(logging.WARNING):
        patcher = load(source, type_name)
    assert "are not cached: " in caplog.text and "kept" not in memory_summary(patcher)
    left = list(folder.iterdir()) if folder.is_dir() else []
    assert [path.read_bytes() for path in left] == (
        [b"the other's"] if trouble == "another process was faster" else []
    )
