"""A mapped file that others write to is noticed before it is read again; what lies on a network
share is read, not mapped."""
import gc
import os
import types
from pathlib import Path
from unittest import mock

import comfy.cli_args
import comfy.model_management
import numpy as np
import pytest
import torch
from checkpoint_parts import autoencoder
from encoders import ENCODERS
from encoders.encoder import load_encoder, random_weights, small_towers, write_encoder
from pack_api import (
    WeightFileError,
    is_packed,
    load_diffusion_model,
    open_weights,
    pack_types,
    packed_tensors,
    source_of_file,
    source_of_model,
)
from packed_files import PACKED_FILES
from patched_models import lora_for, tiny_flux
from safetensors.torch import save_file
from saving import save

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.container import network_drives
from featherweight.loaders.files import packed_cache
from featherweight.loaders.inspect import difference, inspect
from featherweight.loaders.lora.lora_file import load_lora_file
from featherweight.loaders.models.vae import load_vae
from featherweight.ops.tensor.read_only_memory import guards_of, is_read_only

pytestmark = pytest.mark.usefixtures("small_models")


def write(path, seed=0):
    write_gguf(path,
               tiny_models.flux(seed, hidden=128, double_blocks=1, single_blocks=1, context=128),
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


def overwritten_under_its_time(path):
    status = path.stat()
    overwritten(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def removed(path):
    path.unlink()


def renamed_over(path):
    write(path.with_name("new.gguf"), seed=1)
    os.replace(path.with_name("new.gguf"), path)


WRITTEN_TO = [
    shortened, overwritten,
    pytest.param(overwritten_under_its_time,
                 marks=pytest.mark.skipif(os.name == "nt", reason="it tells no time of a change"))
]


@pytest.mark.parametrize("change", WRITTEN_TO)
def test_a_step_of_a_model_whose_file_was_written_to_is_an_error_and_not_the_end_of_the_process(
        path, change):
    patcher = load_diffusion_model(str(path))
    patcher.prepare_state(torch.ones(1), {})
    change(path)
    with pytest.raises(
            WeightFileError,
            match=r"^model\.gguf was written to after it was loaded \(\d+ bytes then, \d+ now\)"):
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


def test_a_model_is_watched_where_the_host_loads_it(path):
    patcher = load_diffusion_model(str(path))
    comfy.model_management.load_models_gpu([patcher])
    overwritten(path)
    with pytest.raises(WeightFileError, match="was written to"):
        comfy.model_management.load_models_gpu([patcher])
    assert patcher not in [loaded.model for loaded in comfy.model_management.current_loaded_models]


# --- every file that a model lies in ---


def after(count: int, action):
    """A function that passes on a loop's items, and does something before the one of this
    number."""
    def track(items, *sizes):
        for index, item in enumerate(items):
            if index == count:
                action()
            yield item

    return track


def test_the_extra_file_of_a_model_is_watched(path):
    whole = tiny_models.flux(0, hidden=128, double_blocks=1, single_blocks=1, context=128)
    for name, is_extra in (("model.gguf", False), ("extra.gguf", True)):
        write_gguf(path.with_name(name), {name: values for name, values in whole.items()
                                          if name.startswith("single_blocks.") == is_extra},
                   lambda name, values: "F32" if values.ndim < 2 else "Q8_0")
    extra = path.with_name("extra.gguf")
    os.utime(extra, ns=(0, 0))
    patcher = load_diffusion_model(str(path), extra=str(extra))
    patcher.prepare_state(torch.ones(1), {})
    overwritten(extra)
    with pytest.raises(WeightFileError, match=r"^extra\.gguf was written to"):
        patcher.prepare_state(torch.ones(1), {})


@pytest.mark.parametrize("name", ["encoder.gguf", "mmproj-encoder.gguf"])
def test_a_text_encoder_and_what_it_sees_through_are_watched(tmp_path, name):
    encoder = next(encoder for encoder in ENCODERS.values() if encoder.te_model == "QWEN25_7B")
    with small_towers(encoder):
        write_encoder(tmp_path / "encoder.gguf", encoder, random_weights(encoder))
        for path in tmp_path.iterdir():
            os.utime(path, ns=(0, 0))
        clip = load_encoder(tmp_path / "encoder.gguf", encoder)
    clip.patcher.model.packed_patches.check_source()
    overwritten(tmp_path / name)
    with pytest.raises(WeightFileError, match=f"^{name} was written to"):
        clip.load_model()


@pytest.mark.parametrize("use", [lambda vae: vae.decode(torch.zeros(1, 16, 4, 4)),
                                 lambda vae: vae.encode(torch.zeros(1, 32, 32, 3)),
                                 lambda vae: vae.decode_tiled(torch.zeros(1, 16, 4, 4)),
                                 lambda vae: vae.encode_tiled(torch.zeros(1, 32, 32, 3))],
                         ids=["decode", "encode", "decode tiled", "encode tiled"])
@torch.inference_mode()
def test_a_vae_that_lies_in_its_file_is_watched(tmp_path, monkeypatch, use):
    """As it does in dynamic VRAM, where the host assigns the weights of a file."""
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda module, weights, strict=True, assign=False: load(
            module, weights, strict, assign=True))
    write_gguf(tmp_path / "vae.gguf", autoencoder(), lambda name, values: "F32")
    os.utime(tmp_path / "vae.gguf", ns=(0, 0))
    vae = load_vae(str(tmp_path / "vae.gguf"))
    use(vae)
    overwritten(tmp_path / "vae.gguf")
    with pytest.raises(WeightFileError, match=r"^vae\.gguf was written to"):
        use(vae)


@pytest.mark.parametrize(
    "read", [source_of_file, lambda path: source_of_model(load_diffusion_model(str(path)))],
    ids=["file", "model"]
)
@pytest.mark.parametrize("moment", [3, -1], ids=["in the midst", "in the end"])
def test_a_model_whose_file_is_written_to_while_it_is_saved_becomes_no_file(
        path, read, moment):
    source, out = read(path), path.with_name("out.gguf")
    out.write_bytes(b"what was there")
    with pytest.raises(WeightFileError, match=r"^model\.gguf was written to"):
        save(
            source,
            out,
            "Q4_0",
            overwrite=True,
            track=after(moment % len(source.weights), lambda: overwritten(path)),
        )
    assert out.read_bytes() == b"what was there" and sorted(path.parent.iterdir()) == [path, out]


def test_a_model_whose_file_is_replaced_while_it_is_saved_is_saved_as_it_was(path):
    if os.name == "nt":
        pytest.skip("Windows lets nobody do so while the file is mapped")
    out = path.with_name("out.gguf")
    expected = save(source_of_file(path), out, "Q4_0").path.read_bytes()
    save(source_of_file(path), out, "Q4_0", overwrite=True,
         track=after(3, lambda: renamed_over(path)))
    assert out.read_bytes() == expected


def test_a_lora_that_is_written_to_while_it_is_packed_in_is_an_error(tmp_path):
    save_file(tiny_flux(), tmp_path / "model.safetensors")
    lora = tmp_path / "lora.safetensors"
    save_file(lora_for(tiny_flux()), lora)
    source = source_of_file(tmp_path / "model.safetensors", [(str(lora), 1.0)])
    with pytest.raises(WeightFileError, match=r"^lora\.safetensors was written to"):
        save(source, tmp_path / "out.gguf", "Q8_0", track=after(3, lambda: overwritten(lora)))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("moment", [3, 13], ids=["in the midst", "in the end"])
def test_a_file_that_is_written_to_while_it_is_packed_gives_no_model_and_keeps_nothing(
        tmp_path, monkeypatch, moment):
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "cache"))
    path, pack, count = tmp_path / "model.safetensors", pack_types.pack_tensor, []
    save_file({name: values.bfloat16() for name, values in tiny_flux().items()}, path)

    def pack_tensor(*arguments):
        count.append(1)
        packed = pack(*arguments)
        if len(count) == moment:
            overwritten(path)
        return packed

    monkeypatch.setattr(pack_types, "pack_tensor", pack_tensor)
    with pytest.raises(WeightFileError, match=r"^model\.safetensors was written to"):
        load_diffusion_model(str(path), pack_to="Q8_0")
    assert len(count) == moment and not (tmp_path / "cache").exists()


def test_a_file_that_is_written_to_while_it_is_compared_is_said_to_be(path, monkeypatch):
    write(path.with_name("other.gguf"), seed=1)
    monkeypatch.setattr(difference.Progress, "track",
                        lambda self, items: after(3, lambda: overwritten(path))(items))
    [inspection] = inspect(str(path.with_name("other.gguf")), str(path))
    assert inspection.no_errors.startswith("model.gguf was written to")


def test_what_is_packed_from_a_file_needs_it_no_more(tmp_path):
    save_file({name: values.bfloat16() for name, values in tiny_flux().items()},
              tmp_path / "model.safetensors")
    patcher = load_diffusion_model(str(tmp_path / "model.safetensors"), pack_to="Q8_0")
    mapped = [name for name, tensor in patcher.model.named_parameters()
              if is_read_only(packed_tensors(tensor)[0] if is_packed(tensor) else tensor)]
    assert bool(mapped) == bool(patcher.model.packed_patches.check_source.files)


def test_a_lora_of_gguf_lies_in_no_mapped_file(tmp_path):
    lora = {
        f"double_blocks.0.img_attn.proj.weight.lora_{half}": np.ones((4, 4), np.float32)
        for half in "ab"
    }
    write_gguf(tmp_path / "lora.gguf", lora, lambda name, values: "F32",
               metadata={"general.type": "adapter"})
    tensors, _ = load_lora_file(str(tmp_path / "lora.gguf"))
    assert tensors and not guards_of(tensors.values())


# --- read, not mapped ---


def mounts(monkeypatch, *entries):
    found = [
        types.SimpleNamespace(mountpoint=place, fstype=kind, opts=options)
        for place, kind, options in entries
    ]
    monkeypatch.setattr(network_drives.psutil, "disk_partitions", lambda all: found)


@pytest.mark.parametrize(
    ("kind", "options", "is_share"),
    [
        ("ext4", "rw", False),
        ("nfs4", "rw", True),
        ("cifs", "rw", True),
        ("9p", "rw", True),
        ("fuse.sshfs", "rw", True),
        ("fuse.ntfs-3g", "rw", False),
        ("fuseblk", "rw", False),
        ("NTFS", "rw,remote", True),
        ("NTFS", "rw,fixed", False),
    ],
)
def test_a_share_is_known_by_its_kind(tmp_path, monkeypatch, kind, options, is_share):
    mounts(monkeypatch, ("/", "ext4", "rw"), (str(tmp_path), kind, options),
           (f"{tmp_path}2", "nfs", "rw"))
    assert network_drives.is_on_network_share(tmp_path / "model.gguf") == is_share


@pytest.mark.parametrize(("path", "is_share"), [
    (r"\\server\models\a.gguf", True), (r"\\?\UNC\server\models\a.gguf", True),
    (r"\\?\C:\models\a.gguf", False), (r"C:\models\a.gguf", False),
])
def test_a_share_is_known_by_its_path_and_a_long_path_is_none(monkeypatch, path, is_share):
    mounts(monkeypatch, ("C:\\", "NTFS", "rw,fixed"))
    monkeypatch.setattr(network_drives.os.path, "realpath", lambda path: path)
    assert network_drives.is_on_network_share(path) == is_share


@pytest.mark.parametrize(("switch", "copied"), [("map", False), ("copy", True), ("", True)])
def test_the_environment_decides_before_the_drive(path, monkeypatch, switch, copied):
    mounts(monkeypatch, (str(path.parent), "nfs", "rw"))
    monkeypatch.setenv(network_drives.FILES_ENV, switch)
    assert network_drives.should_read_into_memory(path) == copied


@pytest.mark.skipif(not Path("/proc/self/maps").exists(),
                    reason="reads what is mapped where Linux shows it")
@pytest.mark.parametrize("switch", [None, "map"])
@pytest.mark.parametrize("format_name", ["Q8_0", "NF4", "int8"])
def test_comfyuis_disable_mmap_maps_no_packed_file(tmp_path, monkeypatch, format_name, switch):
    flags = comfy.cli_args.parser.parse_args(["--disable-mmap"])
    monkeypatch.setattr(comfy.cli_args.args, "disable_mmap", flags.disable_mmap)
    if switch:
        monkeypatch.setenv(network_drives.FILES_ENV, switch)
    write_file, name = PACKED_FILES[format_name]
    path = tmp_path / name
    write_file(path, tiny_flux())
    patcher = load_diffusion_model(str(path))
    gc.collect()
    assert any(map(is_packed, patcher.model.state_dict().values()))
    is_mapped = str(path) in Path("/proc/self/maps").read_text()
    assert is_mapped == (switch == "map")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_what_is_read_is_what_would_be_mapped_and_outlives_the_file(tmp_path, monkeypatch, kind):
    path = tmp_path / f"model.{kind}"
    if kind == "gguf":
        write(path)
    else:
        save_file(
            {
                "odd": torch.arange(3, dtype=torch.uint8), "late": torch.arange(
                    5, dtype=torch.float32)
            }, path)
    os.utime(path, ns=(0, 0))
    mapped = open_weights(path)
    monkeypatch.setenv(network_drives.FILES_ENV, "copy")
    file = open_weights(path)
    for name in file.entries:
        assert torch.equal(file.tensor(name), mapped.tensor(name))
        assert not is_read_only(file.tensor(name)) and is_read_only(mapped.tensor(name))
    overwritten(path)
    file.guard()
    with pytest.raises(WeightFileError):
        mapped.guard()


@pytest.mark.parametrize("change", [overwritten, overwritten_under_its_time, renamed_over])
def test_a_file_that_changes_while_it_is_read_is_an_error(path, monkeypatch, change):
    monkeypatch.setenv(network_drives.FILES_ENV, "copy")
    with pytest.raises(WeightFileError,
                       match=r"^model\.gguf was written to or replaced while it was read"):
        open_weights(path).state_dict(after(3, lambda: change(path)))


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(path, monkeypatch):
    monkeypatch.setenv(network_drives.FILES_ENV, "copy")
    file = open_weights(path)
    shortened(path)
    last = max(file.entries.values(), key=lambda entry: entry.offset).name
    with pytest.raises(WeightFileError, match="model.gguf was cut short while it was read"):
        file.tensor(last)
