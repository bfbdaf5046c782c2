"""What a workflow that somebody shared may hold: names of files, rules, the strings of the expert
mode, numbers."""
import json
import os
from pathlib import Path

from . import Target, target

SIZE = 7_000_000_000  # bytes of a model that is shared among devices
LONGEST = 1 << 11


def as_text(data: bytes) -> str:
    """Returns what a workflow may hold: any JSON text, halves of pairs and zeros too."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def loaded(data: bytes):
    """Returns the value of a JSON text, None for another text."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def assert_shared(plan):
    """Of a model of SIZE bytes each lies on one device."""
    assert all(amount >= 0 for amount in plan.values()) and sum(plan.values()) == SIZE, plan


@target
def block_weights(folder: Path) -> Target:
    """rules for the strength of each block"""
    from featherweight.loaders.lora.block_weights import parse_block_weights

    keys = [f"diffusion_model.{block}.{number}.{layer}.weight"
            for block in ("double_blocks", "single_blocks") for number in range(4)
            for layer in ("img_attn.proj", "linear1")]
    keys += ["clip_l.x.weight", "diffusion_model.img_in.weight"]

    def read(data: bytes):
        try:
            factor = parse_block_weights(as_text(data), keys)
        except ValueError as error:
            if "lock weight" in str(error):
                raise
            raise AssertionError(f"not our sentence: {error}") from error
        assert all(abs(factor(key)) < float("inf") for key in keys)

    return Target(folder, [
        b"double=0.5, single.0-2=0, img_attn=0.8",
        b"preset:first-third\nall=1 # note\ntext=0; double_blocks=1",
        b"preset:double-only, linear1=0"], read, (ValueError,), longest=LONGEST)


@target
def expert_string(folder: Path) -> Target:
    """how much stays on the GPU, as ComfyUI-MultiGPU's workflows write it"""
    import torch

    from featherweight.nodes.legacy import distorch
    from featherweight.nodes.legacy.distorch import UnreadableError, read_expert_string

    distorch.total_memory = lambda device: 8 << 30  # no such device is here

    def read(data: bytes):
        kept, _ = read_expert_string(as_text(data), SIZE, torch.device("cuda", 0))
        assert type(kept) is int and 0 <= kept <= SIZE

    return Target(folder, [
        b"cuda:0,2.5gb;cuda:1,8gb;cpu,*", b"cuda:0,25%;cpu,75%", b"cuda:0,0.1;cpu,0.5",
        b"gpu:1,300m;cpu,*"], read, (UnreadableError,), longest=LONGEST)


@target
def names(folder: Path) -> Target:
    """names of files to load and to write"""
    # an input: which function, and the name
    import folder_paths

    from featherweight.loaders.container.weight_file import WeightFileError
    from featherweight.loaders.paths import folders

    models, output = folder / "models", folder / "output"
    for file in (models / "diffusion_models" / "flux" / "a.gguf", models / "loras/b.safetensors",
                 models / "vae" / "c.sft", folder / "outside.gguf", folder / "outside.sensitivity",
                 output / "sensitivity" / "m.sensitivity"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (models / "diffusion_models" / "package").mkdir()
    folder_paths.set_output_directory(str(output))
    for key in list(folder_paths.folder_names_and_paths):
        folder_paths.folder_names_and_paths[key] = (
            [str(models / key)], folder_paths.supported_pt_extensions)
    functions = {
        "find": lambda name: folders.find_file(name, "diffusion_models", "loras", "vae"),
        "saved": folders.resolve_saved_path,
        "sensitivity": folders.find_sensitivity,
        "new": lambda name: folders.new_model_path(name, "Q4_K", ".gguf"),
        "new_in_models": lambda name: folders.new_model_path(
            name, "Q4_K", ".gguf", folders.MODELS, False),
        "new_sensitivity": folders.new_sensitivity_path}
    allowed = [os.path.realpath(models), os.path.realpath(output)]

    def read(data: bytes):
        function, _, name = as_text(data).partition(" ")
        if function not in functions:
            return
        path = functions[function](name.replace("FOLDER", str(folder)))
        real = os.path.realpath(path)
        assert real.startswith(tuple(each + os.sep for each in allowed)), f"{path} is outside"
        if function.startswith("new"):
            assert not real.startswith(os.path.realpath(models / "custom_nodes")), path
            assert real.endswith((".gguf", ".sensitivity")), path
            made = os.path.dirname(real)  # ComfyUI makes the folders of a new file
            while made not in allowed and os.path.isdir(made) and not os.listdir(made):
                os.rmdir(made)
                made = os.path.dirname(made)

    return Target(folder, [
        b"find flux/a.gguf", b"find flux\\a.gguf", b"find package", b"find ../../outside.gguf",
        b"saved FOLDER/models/loras/b.safetensors", b"saved FOLDER/outside.gguf",
        b"sensitivity m.sensitivity", b"sensitivity FOLDER/outside.sensitivity",
        b"sensitivity ../../outside.sensitivity", b"new diffusion_models/ComfyUI", b"new %year%/x",
        b"new ../x", b"new_in_models diffusion_models/x", b"new_in_models custom_nodes/x/y",
        b"new_sensitivity x", b"new_sensitivity %date:yyyy%/x", b"new_sensitivity ../x"
    ], read, (WeightFileError,), longest=LONGEST)


@target
def numbers(folder: Path) -> Target:
    """budgets, sizes, strengths and devices"""
    # an input: JSON, as a prompt brings it
    import torch

    from featherweight.loaders.byte_sizes import size_text
    from featherweight.loaders.devices import find_device
    from featherweight.nodes.legacy.distorch import allocate_virtual_vram

    def read(data: bytes):
        values = loaded(data)
        values = values if isinstance(values, dict) else {}
        budget, virtual, device = map(values.get, ("gpu_weights", "virtual_vram_gb", "device"))
        if isinstance(device, str):
            find_device(device)
        if isinstance(virtual, float):
            assert_shared(allocate_virtual_vram(
                SIZE, virtual, torch.device("cuda", 0), [torch.device("cpu")]))
        if isinstance(budget, float) and 0 <= budget <= 1000:
            size_text(budget * 1e9)

    return Target(folder, [
        b'{"gpu_weights": 4.0, "virtual_vram_gb": 2.5, "device": "gpu:0"}',
        b'{"gpu_weights": 0, "virtual_vram_gb": 0, "device": "cuda"}',
        b'{"gpu_weights": 1000, "virtual_vram_gb": -1.5, "device": "cpu"}'], read, longest=LONGEST)
