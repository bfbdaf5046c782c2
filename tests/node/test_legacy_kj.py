"""The GGUF loader of KJNodes: further layers from a second file, attention, and the switch for
fp16."""
import comfy.ldm.modules.attention
import pytest
import torch
from model_folders import use_folder

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.nodes.legacy.kjnodes import GGUFLoader

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A Flux as one file, and the same in two, the second with the names of a checkpoint."""
    use_folder(tmp_path, monkeypatch)
    whole = tiny_models.flux(hidden=128, double_blocks=1, single_blocks=2)
    further = {name: value for name, value in whole.items() if name.startswith("single_blocks.1.")}
    files = {
        "whole": whole,
        "first": {name: value for name, value in whole.items() if name not in further},
        "further": {f"model.diffusion_model.{name}": value for name, value in further.items()}
    }
    for name, tensors in files.items():
        write_gguf(tmp_path / f"{name}.gguf", tensors, lambda name, values: "Q8_0")


def load(name: str, **inputs):
    return GGUFLoader.execute(f"{name}.gguf", **inputs)[0]


def weights(patcher) -> dict[str, torch.Tensor]:
    return {name: getattr(value, "dequantize", lambda value=value: value)() for name, value in
            patcher.model.diffusion_model.named_parameters()}


def test_layers_of_a_second_file_belong_to_the_model(files):
    expected, found = weights(load("whole")), load("first", extra_model_name="further.gguf")
    for patcher in (found, found.cached_patcher_init[0]()):
        both = weights(patcher)
        assert both.keys() == expected.keys() and all(
            torch.equal(both[name], value) for name, value in expected.items()
        )
    assert weights(load("first")).keys() < expected.keys()


@pytest.mark.parametrize(("name", "library"), [("sdpa", "pytorch"), ("sageattn", "sage")])
def test_attention_is_computed_by_the_library_that_is_picked_where_the_host_has_it(
        name, library, texts, monkeypatch):
    registered, calls = comfy.ldm.modules.attention.REGISTERED_ATTENTION_FUNCTIONS, []
    monkeypatch.setitem(registered, library, lambda *args, **kwargs: calls.append(args))
    options = load("whole", attention_override=name).model_options["transformer_options"]
    options["optimized_attention_override"](None, "q", "k", "v", heads=1)
    assert calls == [("q", "k", "v")]
    monkeypatch.delitem(registered, library)
    expected = load("whole").model_options["transformer_options"]
    model = load("whole", attention_override=name)
    assert model.model_options["transformer_options"] == expected
    assert (
        f"This ComfyUI has no {name} installed, so attention_override has no effect." in texts[-1]
    )


def test_the_switch_for_fp16_is_set_and_taken_back(monkeypatch):
    switches = torch.backends.cuda.matmul
    before = switches.allow_fp16_accumulation
    load("whole", enable_fp16_accumulation=True)
    assert switches.allow_fp16_accumulation
    load("whole", enable_fp16_accumulation=False)
    assert switches.allow_fp16_accumulation == before
