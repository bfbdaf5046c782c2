"""pack.py: what the node does, from a command line, in little memory, and nothing left by whatever
ends it."""
import importlib.util
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import comfy.sd
import pytest
import torch
from checkpoint_parts import stable_diffusion
from comfy.model_base import ModelType
from comfy.quant_ops import QuantizedTensor
from comfy.supported_models import SDXL
from host_formats import in_host_format
from pack_api import FORMATS, open_weights, pack_tensor
from patched_models import lora_for, relative, tiny_flux
from safetensors.torch import load_file, save_file
from saving import values_in

from devtools import ROOT
from devtools.files import tiny_models
from featherweight.loaders.files import atomic_file

if sys.platform != "win32":
    import resource

spec = importlib.util.spec_from_file_location("pack_command", ROOT / "pack.py")
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)

pytestmark = pytest.mark.usefixtures("small_models")
HOST = Path(sys.modules["comfy"].__path__[0]).parent
BLOCK = "double_blocks.0.img_mlp.0.weight"


def start(*arguments) -> subprocess.Popen:
    """The command as people run it."""
    environment = os.environ | {"COMFYUI_PATH": str(HOST), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / "pack.py", *map(str, arguments)],
                            env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.fixture
def pack(capsys, monkeypatch):
    """The command in this process, where the host is there already: -> (exit code, all it said)."""
    monkeypatch.setattr(command, "start_host", lambda host: None)

    def run(*arguments) -> tuple[int, str]:
        try:
            code = command.main([*map(str, arguments)])
        except SystemExit as end:  # argparse
            code = end.code
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a bf16 Flux, an fp8-scaled one, and two LoRAs."""
    folder = tmp_path_factory.mktemp("source")
    weights = {name: tensor.bfloat16() for name, tensor in tiny_flux().items()}
    save_file(weights, folder / "model.safetensors")
    for seed in (1, 2):
        save_file(lora_for(tiny_flux(), seed=seed, size=0.1), folder / f"lora {seed}.safetensors")
    scaled = dict(weights)
    scaled |= in_host_format(BLOCK, scaled.pop(BLOCK).float(), "float8_e4m3fn")[0]
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in scaled.items()},
              folder / "fp8.safetensors")
    return folder


def test_a_file_with_loras_is_packed_and_the_last_line_says_what_came_out(source, tmp_path, pack):
    code, said = pack(source / "model.safetensors", tmp_path / "a.gguf", "--type", "Q8_0", "--lora",
                      f"{source / 'lora 1.safetensors'}:0.13", "--lora",
                      source / "lora 2.safetensors")
    last = said.strip().split("\n")[-1]
    done = rf"Done: {re.escape(str(tmp_path / 'a.gguf'))}: [\d.]+ MB in \d+ s"
    assert code == 0 and re.fullmatch(done, last), said
    files = "'lora 1.safetensors', 'lora 2.safetensors', 'model.safetensors'"
    assert f"- Made from {files}, with Featherweight for ComfyUI.\n" in said
    assert [
        float(share) for share in re.findall(
            r"LoRA \d \(strength [\d.]+\): ([\d.]+)%", said.partition("For the model card")[0])
    ] == [pytest.approx(100, abs=1)] * 2
    change, layer = 0, "lora_unet_double_blocks_0_img_mlp_0"
    for seed, strength in ((1, 0.13), (2, 1.0)):
        lora = lora_for(tiny_flux(), seed=seed, size=0.1)
        change += (
            strength * 0.5 * lora[f"{layer}.lora_up.weight"] @ lora[f"{layer}.lora_down.weight"]
        )
    expected = pack_tensor(tiny_flux()[BLOCK].bfloat16().float() + change,
                           FORMATS["Q8_0"]).dequantize()
    assert relative(values_in(tmp_path / "a.gguf")[BLOCK], expected) < 1e-4


def test_an_imatrix_is_taken_as_a_measurement_is(source, tmp_path, pack):
    model, names = source / "model.safetensors", [BLOCK.encode(), b"x.weight"]
    columns = tiny_flux()[BLOCK].shape[1]
    importance = [float(1 + index % 7) for index in range(columns)]
    (tmp_path / "i.dat").write_bytes(struct.pack("<i", 2) + b"".join(
        struct.pack("<i", len(name)) + name + struct.pack(f"<ii{columns}f", 1, columns, *importance)
        for name in names))
    assert pack(model, tmp_path / "a.gguf", "--type", "Q3_K")[0] == 0
    code, said = pack(model, tmp_path / "b.gguf", "--type", "Q3_K", "--sensitivity",
                      tmp_path / "i.dat")
    assert code == 0 and re.search(
        r"i.dat covers 1 of \d+ packed matrices, not .*; of its own names, no matrix has 'x.weig",
        said)
    files = [values_in(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    changed = [name for name, values in files[0].items() if not torch.equal(values, files[1][name])]
    assert changed == [BLOCK]
    (tmp_path / "i.dat").write_bytes(b"no imatrix at all")
    code, said = pack(model, tmp_path / "c.gguf", "--type", "Q3_K", "--sensitivity",
                      tmp_path / "i.dat")
    assert code == 1 and said.startswith("Failed: i.dat cannot be used as an imatrix: the number")


def test_scaled_fp8_in_a_checkpoint_is_packed_by_its_values(source, tmp_path, pack):
    assert pack(source / "fp8.safetensors", tmp_path / "a.gguf", "--type", "Q8_0")[0] == 0
    values = values_in(tmp_path / "a.gguf")
    assert values.keys() == tiny_flux().keys()
    assert 0.005 < relative(values[BLOCK], tiny_flux()[BLOCK]) < 0.05  # fp8's own error
    assert pack(tmp_path / "a.gguf", tmp_path / "b.gguf", "--type", "keep types")[0] == 0
    assert pack(tmp_path / "a.gguf", tmp_path / "c.gguf", "--type", "as it is")[0] == 0  # earlier
    assert values_in(tmp_path / "c.gguf").keys() == values.keys()
    again = values_in(tmp_path / "b.gguf")
    assert all(torch.equal(again[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize(
    ("marks", "kind", "settings"),
    [
        (
            {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)},
            ModelType.V_PREDICTION,
            {"zsnr": True},
        ),
        (
            {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)},
            ModelType.EDM,
            {},
        ),
        (
            {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.01)},
            ModelType.V_PREDICTION_EDM,
            {"sigma_max": 120, "sigma_min": 0.01},
        ),
        ({}, ModelType.EPS, {}),
    ],
)
def test_what_a_whole_checkpoint_predicts_is_known_of_its_model_too(
    tmp_path, pack, marks, kind, settings
):
    model = {
        "label_emb.0.0.weight": (64, 64), "input_blocks.0.0.weight": (32, 4, 3, 3),
        "out.0.bias": (32,), "out.2.weight": (4, 32, 3, 3),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (64, 256),
        "time_embed.0.weight": (64, 64)
    }
    save_file({f"model.diffusion_model.{name}": torch.rand(shape)
               for name, shape in model.items()} | marks, tmp_path / "whole.safetensors")
    assert pack(tmp_path / "whole.safetensors", tmp_path / "a.gguf", "--type", "Q8_0")[0] == 0
    found = open_weights(tmp_path / "a.gguf").state_dict()
    assert found.keys() == model.keys() | marks.keys()
    config = SDXL({})
    assert config.model_type(found) == kind
    assert {name: config.sampling_settings[name] for name in settings} == pytest.approx(settings)


def test_a_lora_that_fits_in_part_is_said_to(source, tmp_path, pack):
    lora = lora_for(tiny_flux(), size=0.1)
    for name in [name for name in lora if "double_blocks_0_img_mlp_0" in name]:
        lora[name.replace("double_blocks_0", "double_blocks_7")] = lora.pop(name)
    save_file(lora, tmp_path / "part.safetensors")
    code, said = pack(source / "model.safetensors", tmp_path / "a.gguf", "--type", "Q8_0", "--lora",
                      tmp_path / "part.safetensors")
    assert code == 0 and re.search(
        r"part\.safetensors: .*fits in part: 18 of 19 layers match", said
    ), said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "2.2MB"], 0, "Done: "),
        (["--size", "1MB"], 1, "Failed: .*too small"),
        (["--size", "lots"], 2, "invalid size"),
        (["--type", "Q9"], 2, "unknown type 'Q9', expected Q8_0"),
        (["--type", "NF4"], 2, "ends in .safetensors"),
        (["--type", "nvfp4"], 2, "ends in .safetensors"),
        (["--type", "Q4_K+Q8_0", "--size", "2MB"], 2, "which may have a --type of ComfyUI's own"),
        (["--type", "nvfp4+mxfp8"], 2, "is required"),
        ([], 2, "required"),
    ],
)
def test_sizes_and_mistakes(source, tmp_path, pack, arguments, code, message):
    found, said = pack(source / "model.safetensors", tmp_path / "a.gguf", *arguments)
    assert found == code and re.search(message, said), said
    assert [path.stat().st_size <= 2_200_000 for path in tmp_path.iterdir()] == [True] * (code == 0)


@pytest.mark.parametrize("kind", ["int8_convrot", "nvfp4"])
def test_comfyuis_own_types_go_into_safetensors(source, tmp_path, pack, kind):
    code, said = pack(source / "fp8.safetensors", tmp_path / "a.safetensors", "--type", kind,
                      "--lora", source / "lora 1.safetensors")
    report = said.partition("For the model card")[0]
    share, = re.findall(r"LoRA 1 \(strength 1\): ([\d.]+)%", report)
    assert code == 0 and said.splitlines()[-1].startswith(f"Done: {tmp_path / 'a.safetensors'}: ")
    assert float(share) == pytest.approx(100, abs=10) and f"\n{kind}" in said
    model = comfy.sd.load_diffusion_model(str(tmp_path / "a.safetensors"))
    assert isinstance(model.model.diffusion_model.double_blocks[0].img_mlp[0].weight,
                      QuantizedTensor)


def test_a_whole_checkpoint_keeps_its_other_parts(source, tmp_path, pack):
    tensors = stable_diffusion()
    save_file(tensors, tmp_path / "sd.safetensors")
    out = tmp_path / "a.safetensors"
    code, said = pack(tmp_path / "sd.safetensors", out, "--type", "int8_convrot", "--checkpoint")
    found = load_file(out)
    assert code == 0 and "\nint8_convrot: " in said
    for name, tensor in tensors.items():
        if not name.startswith("model."):
            assert torch.equal(found[name], tensor), name
    assert isinstance(comfy.sd.load_checkpoint_guess_config(str(out))[2].first_stage_model,
                      torch.nn.Module)
    for path, kind, message in (
            (source / "model.safetensors", "nvfp4", "is not a checkpoint that this ComfyUI knows"),
            (tmp_path / "sd.safetensors", "NF4", "cannot have weights in GGUF types or NF4")):
        code, said = pack(path, tmp_path / "b.safetensors", "--type", kind, "--checkpoint")
        assert code == 1 and message in said, said


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1_0", "1e3", "0x1", "\u0663", "", " ", "9" * 400, "strong"]
)
def test_a_strength_or_size_is_a_plain_finite_number(source, tmp_path, pack, text):
    arguments = [source / "model.safetensors", tmp_path / "a.gguf"]
    code, said = pack(*arguments, "--type", "Q8_0", "--lora",
                      f"{source / 'lora 1.safetensors'}:{text}")
    assert (
        code == 2
        and said.endswith(", for example FILE:0.8\n")
        and "invalid strength" in said
        and "lora 1.safetensors" in said
    )
    code, said = pack(*arguments, f"--size={text}GB")
    assert (
        code == 2
        and said.endswith(", for example 5.9GB\n")
        and "invalid size" in said
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-.5", ("a.safetensors", -0.5)),
        (r"C:\a.safetensors:+2.", (r"C:\a.safetensors", 2.0)),
        (r"C:\a.safetensors", (r"C:\a.safetensors", 1.0)),
        ("a.safetensors", ("a.safetensors", 1.0)),
    ],
)
def test_a_lora_is_a_file_with_or_without_a_strength(text, expected):
    assert command.parse_lora(text) == expected


@pytest.mark.skipif(os.name == "nt", reason="no names with a colon")
def test_a_lora_may_have_a_colon_in_its_name(tmp_path):
    (tmp_path / "style: old").touch()
    assert command.parse_lora(f"{tmp_path}/style: old") == (f"{tmp_path}/style: old", 1.0)


@pytest.mark.parametrize(
    ("out", "wanted"),
    [("o.bin", "Q8_0"), ("o", "as it is"), ("o.safetensors", "Q8_0"), ("o.gguf", "NF4")],
)
def test_a_file_has_the_ending_of_what_it_is(source, tmp_path, pack, out, wanted):
    code, said = pack(source / "model.safetensors", tmp_path / out, "--type", wanted)
    assert code == 2 and "ends in .gguf" in said and list(tmp_path.iterdir()) == []


def the_file_itself(path, model):
    return path


def a_link_to_it(path, model):
    (path.parent / "link.safetensors").symlink_to(path)
    return path.parent / "link.safetensors"


def another_name_of_it(path, model):
    os.link(path, path.parent / "name.safetensors")
    return path.parent / "name.safetensors"


def a_lora(path, model):
    return path.parent / "lora.safetensors"


def another_part_of_it(path, model):
    names = list(model)
    parts = [path.parent / f"part-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for part, some in zip(parts, (names[::2], names[1::2])):
        save_file({name: model[name] for name in some}, part)
    path.unlink()
    return parts[1]


@pytest.mark.parametrize(("target", "options"), [
    (the_file_itself, []), *((target, ["--overwrite"]) for target in (
        the_file_itself, a_link_to_it, another_name_of_it, a_lora, another_part_of_it))])
def test_no_file_that_a_model_is_made_of_is_overwritten(tmp_path, pack, target, options):
    path, model = (
        tmp_path / "model.safetensors",
        {name: tensor.bfloat16() for name, tensor in tiny_flux().items()},
    )
    save_file(model, path)
    save_file(lora_for(tiny_flux(), size=0.1), tmp_path / "lora.safetensors")
    out = target(path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    source = path if path.exists() else tmp_path / "part-00001-of-00002.safetensors"
    code, said = pack(source, out, "--type", "NF4", "--lora", tmp_path / "lora.safetensors",
                      *options)
    expected = " is a file of the model that is to be saved, .* another name\\.\n"
    assert code == 1 and re.fullmatch(f"Failed: {re.escape(str(out))}{expected}", said), said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
@pytest.mark.parametrize("kind", ["Q8_0", "nvfp4"])
@pytest.mark.parametrize("trouble", ["a read-only folder", "a full disk", "one that gets full"])
def test_where_no_file_can_be_written_one_sentence_says_so_and_nothing_is_left(
        source, tmp_path, pack, monkeypatch, kind, trouble):
    out = tmp_path / ("a.gguf" if kind == "Q8_0" else "a.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "a read-only folder":
        monkeypatch.setattr(atomic_file.os, "access", lambda path, mode: False)
    elif trouble == "a full disk":
        usage = atomic_file.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(atomic_file.shutil, "disk_usage",
                            lambda path: usage._replace(free=100_000))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        code, said = pack(source / "model.safetensors", out, "--type", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    expected = {"a read-only folder": "is not writable by this user", "a full disk": "free",
                "one that gets full": "cannot be written"}[trouble]
    assert code == 1 and re.search(f"Failed: .*{expected}", said), said
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none_are_refused_in_a_sentence(source, tmp_path, pack):
    (tmp_path / "old.gguf").write_text("old")
    for model, out, more in ((tmp_path / "no.safetensors", "a.gguf",
                              []), (source / "lora 1.safetensors", "a.gguf",
                                    []), (source / "model.safetensors", "old.gguf",
                                          []), (source / "model.safetensors", "no/a.gguf", []),
                             (source / "model.safetensors", "a.gguf",
                              ["--lora", source / "model.safetensors"])):
        code, said = pack(model, tmp_path / out, "--type", "Q8_0", *more)
        assert code == 1 and said.startswith("Failed: ") and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_stopped_while_it_packs_nothing_is_under_the_name(tmp_path):
    shapes = tiny_models.flux_shapes(256, 8, 8)
    path, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
              path)
    out.mkdir()
    process = start(path, out / "a.gguf", "--type", "Q3_K")
    while not any(out.iterdir()) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    if process.returncode and "Done: " not in said:  # it had not ended before
        assert process.returncode == 130 and not any(out.iterdir())
        assert "Nothing was written." in said


INTERRUPTED = """
import builtins, os, runpy, signal, sys
module, sys.argv = sys.argv[1], sys.argv[2:]
import_module = builtins.__import__

def interrupted(name, *arguments, **options):
    if name == module:
        os.kill(os.getpid(), signal.SIGINT)
    return import_module(name, *arguments, **options)

builtins.__import__ = interrupted
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["argparse", "pathlib", "gguf"])
def test_stopped_while_it_imports_it_ends_without_a_traceback(module, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, ROOT / "pack.py", "a.gguf",
         tmp_path / "b.gguf", "--type", "Q4_K"], env=os.environ | {"COMFYUI_PATH": str(HOST)},
        text=True, capture_output=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        130, "\nStopped. Nothing was written.\n", "")


def sparse_safetensors(path, shapes: dict[str, tuple]):
    """A bf16 file of zeros that takes no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * math.prod(shape)]
        }
        at += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("width", "double", "single"), [(3072, 6, 6), (6144, 1, 2)])
def test_memory_is_bounded_whatever_the_size_of_the_file(tmp_path, width, double, single):
    """The layers of Flux.1 dev, fewer of them but more bytes than are allowed; and larger matrices
    than any of its."""
    path = tmp_path / "model.safetensors"
    sparse_safetensors(path, tiny_models.flux_shapes(width, double, single))
    process, peak = start(path, tmp_path / "a.gguf", "--type", "Q8_0"), 0
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()
    assert path.stat().st_size > 2.5e9 and peak <= 2e9, f"{peak / 1e9:.2f} GB"
