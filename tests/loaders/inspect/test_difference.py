"""The error of each tensor against a reference file: right, in slices, whatever holds the tensors,
and cancellable."""
import comfy.model_management
import comfy.sd
import pytest
import torch
from host_formats import HOST_FORMATS, in_host_format
from patched_models import relative
from safetensors.torch import save_file

from devtools.files import bnb_files, tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.inspect import difference, inspect
from featherweight.loaders.inspect.difference import relative_errors
from featherweight.loaders.inspect.inspection_chart import inspection_picture
from featherweight.loaders.inspect.inspection_text import error_text, inspection_text

SIZES = {"hidden": 128, "double_blocks": 1, "single_blocks": 1}
WEIGHT = "double_blocks.0.img_mlp.0.weight"


@pytest.fixture(scope="module")
def model():
    return {
        name: torch.as_tensor(values).clone() for name, values in tiny_models.flux(**SIZES).items()
    }


@pytest.fixture(scope="module")
def dense(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_file(model, path)
    return path


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "packed.gguf"
    return path, write_gguf(path, model, lambda name, values: "Q4_0" if values.ndim > 1 else "F32")


def test_errors_are_those_of_the_packed_values(packed, dense, model):
    path, values = packed
    errors = relative_errors(file_contents(path), file_contents(dense))
    assert errors.keys() == {name for name, tensor in model.items() if tensor.ndim > 1}
    for name, error in errors.items():
        assert error == pytest.approx(
            relative(torch.as_tensor(values[name]), model[name]), rel=1e-4
        )
    assert 0.03 < errors[WEIGHT] < 0.2


def test_slices_of_rows_give_what_whole_tensors_give(packed, dense, monkeypatch):
    whole = relative_errors(file_contents(packed[0]), file_contents(dense))
    monkeypatch.setattr(difference, "SLICE_VALUES", 300)
    sliced = relative_errors(file_contents(packed[0]), file_contents(dense))
    assert sliced == pytest.approx(whole, rel=1e-6)


def test_a_model_against_itself_is_exact(dense):
    found, = inspect(dense, dense)
    assert set(found.errors.values()) == {0.0}
    assert "exact" in inspection_text(found)


def test_errors_are_in_report_and_picture(packed, dense):
    found, plain = inspect(packed[0], dense)[0], inspect(packed[0])[0]
    assert (
        f"loss against dense.safetensors, in {sum(map(bool, found.errors.values()))} of"
        f" {len(found.errors)} tensors: "
        in inspection_text(found)
    )
    assert not torch.equal(inspection_picture(found), inspection_picture(plain))


def test_nf4_whose_blocks_cross_rows_and_fp8_with_its_scale(tmp_path):
    weights = {
        f"double_blocks.{index}.w.weight": torch.randn(
            24, 40, generator=torch.Generator().manual_seed(index)) for index in range(2)
    }
    save_file(weights, tmp_path / "dense.safetensors")
    tensors, expected = {}, {}
    name, other = weights
    state, expected[name] = bnb_files.quantised(weights[name], "nf4")[:2]
    tensors |= {
        f"{name}{end}": part
        for end, part in ((key.removeprefix("weight"), part) for key, part in state.items())
    }
    scale = weights[other].abs().max() / 448
    tensors[other] = (weights[other] / scale).to(torch.float8_e4m3fn)
    tensors[other.removesuffix("weight") + "weight_scale"] = scale
    expected[other] = tensors[other].float() * scale
    save_file(tensors, tmp_path / "packed.safetensors")
    errors = relative_errors(file_contents(tmp_path / "packed.safetensors"),
                         file_contents(tmp_path / "dense.safetensors"))
    assert errors == pytest.approx(
        {key: relative(expected[key].view(24, 40), weights[key]) for key in weights}, rel=1e-4
    )


def test_a_weight_whose_rows_share_blocks_is_dequantized_once(tmp_path, monkeypatch):
    weight = torch.randn(24, 40)
    state, _ = bnb_files.quantised(weight, "nf4")[:2]
    save_file(
        {
            f"a{end}": part
            for end, part in ((key.removeprefix("weight"), part) for key, part in state.items())
        }, tmp_path / "packed.safetensors")
    save_file({"a": weight}, tmp_path / "dense.safetensors")
    taken, take_rows = [], difference.take_rows
    monkeypatch.setattr(difference, "take_rows",
                        lambda tensor, rows: taken.append(rows) or take_rows(tensor, rows))
    monkeypatch.setattr(difference, "SLICE_VALUES", 80)
    packed_contents = file_contents(tmp_path / "packed.safetensors")
    assert len(relative_errors(packed_contents, file_contents(tmp_path / "dense.safetensors"))) == 1
    assert taken == [slice(0, 24)]


def test_a_checkpoints_prefix_is_no_other_model(packed, model, tmp_path):
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in model.items()},
              tmp_path / "all.safetensors")
    errors = relative_errors(file_contents(packed[0]), file_contents(tmp_path / "all.safetensors"))
    assert len(errors) == sum(tensor.ndim > 1 for tensor in model.values())


def test_another_programs_names_are_the_same_model(tmp_path):
    """llama.cpp's names of a T5 against the host's."""
    width, hosts, theirs = 32, {}, {}
    for block in range(3):
        values = torch.randn(width, width, generator=torch.Generator().manual_seed(block))
        hosts[f"encoder.block.{block}.layer.0.SelfAttention.q.weight"] = values
        theirs[f"enc.blk.{block}.attn_q.weight"] = values
        hosts[f"encoder.block.{block}.layer.0.layer_norm.weight"] = torch.ones(width)
        theirs[f"enc.blk.{block}.attn_norm.weight"] = torch.ones(width)
    hosts["shared.weight"] = theirs["token_embd.weight"] = torch.randn(64, width)
    save_file(hosts, tmp_path / "host.safetensors")
    write_gguf(tmp_path / "t5.gguf", theirs, lambda name, values: "F32", architecture="t5")
    contents = file_contents(tmp_path / "t5.gguf")
    errors = relative_errors(contents, file_contents(tmp_path / "host.safetensors"))
    assert len(errors) == 4 and set(errors.values()) == {0.0}


def test_a_reference_of_another_model_is_said(packed, tmp_path):
    save_file({"other.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    text = inspection_text(inspect(packed[0], tmp_path / "other.safetensors")[0])
    assert "not measured. other.safetensors has no tensor of the same name and shape" in text


def test_a_reference_that_cannot_be_read_is_said(packed, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(3))
    text = inspection_text(inspect(packed[0], tmp_path / "broken.gguf")[0])
    assert "not measured. broken.gguf" in text and "is a diffusion model" in text


def test_the_user_can_cancel(packed, dense, monkeypatch):
    def cancelled(*args):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr("comfy.utils.ProgressBar.update_absolute", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inspect(packed[0], dense)


@pytest.mark.parametrize(
    ("error", "text"), [(0.0, "exact"), (0.0712, "7.1 %"), (0.3, "30 %"), (1.2e-4, "0.012 %")]
)
def test_errors_are_said_in_percent(error, text):
    assert error_text(error) == text


@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_a_file_in_a_format_of_the_host_is_measured_by_the_hosts_values(tmp_path, format_name):
    weights = {f"model.diffusion_model.double_blocks.{index}.img_mlp.0.weight": torch.randn(
        256, 512, generator=torch.Generator().manual_seed(index)) for index in range(2)}
    stored, expected = {}, {}
    for name, tensor in weights.items():
        parts, values = in_host_format(name, tensor, format_name)
        stored |= {key: part.contiguous() for key, part in parts.items()}
        expected[name.removeprefix("model.diffusion_model.")] = relative(values.float(), tensor)
    save_file(weights, tmp_path / "dense.safetensors")
    save_file(stored, tmp_path / "quantised.safetensors")
    found, = inspect(tmp_path / "quantised.safetensors", tmp_path / "dense.safetensors")
    assert found.errors == pytest.approx(expected, rel=1e-3) and not found.no_errors


@pytest.mark.parametrize("format_name", [
    *HOST_FORMATS, pytest.param("mxfp8", marks=pytest.mark.fake_gpus, id="mxfp8 on a GPU")
])
def test_a_model_that_the_host_quantises_is_measured_by_its_values(tmp_path, format_name):
    weights = {name: torch.as_tensor(values).clone()
               for name, values in tiny_models.flux(**SIZES | {"hidden": 256}).items()}
    stored, expected = {}, {}
    for name, tensor in weights.items():
        parts, values = {name: tensor}, tensor
        if "_blocks." in name and tensor.ndim == 2:
            parts, values = in_host_format(name, tensor, format_name)
        if format_name == "nvfp4" and name == WEIGHT:
            smoothing = torch.linspace(0.5, 2, tensor.shape[1])
            stored[name.replace("weight", "pre_quant_scale")] = smoothing
            values = values * smoothing
        stored |= parts
        if tensor.ndim > 1:
            expected[name] = relative(values.float(), tensor)
    save_file(weights, tmp_path / "dense.safetensors")
    model = comfy.sd.load_diffusion_model_state_dict(stored)
    comfy.model_management.load_models_gpu([model])
    found, = inspect(model, tmp_path / "dense.safetensors")
    assert found.errors == pytest.approx(expected, rel=1e-3, abs=1e-6) and not found.no_errors
    held = model.model.diffusion_model.state_dict().values()
    assert sum(nbytes for _, nbytes in found.types.values()) == sum(part.nbytes for part in held)


def test_each_model_in_a_package_is_compared_with_the_file_or_the_same_part_of_a_package(tmp_path):
    for package, factor in (("a", 1.0), ("b", 1.1)):
        for part, shape in (("transformer", (8, 8)), ("vae", (8, 4, 3, 3))):
            folder = tmp_path / package / part
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            save_file({f"{part}_in.weight": torch.full(shape, factor)},
                      folder / "model.safetensors")
    error = pytest.approx(0.1, rel=1e-5)
    model, vae = inspect(tmp_path / "b", tmp_path / "a")
    assert (model.errors, vae.errors) == (
        {"transformer_in.weight": error}, {"vae_in.weight": error})
    model, vae = inspect(tmp_path / "b", tmp_path / "a" / "transformer" / "model.safetensors")
    assert model.errors == {"transformer_in.weight": error}
    assert vae.no_errors.startswith("model.safetensors has no tensor of the same name and shape;")
