"""What holds for every kind of model that is loaded here, said once: a kind of models fills in the
hooks of a class of tests."""
import copy
import gc
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter
from families import deep_clone, relative_error
from pack_api import (
    AUTOMATIC,
    COMFYUI,
    HOST_TYPES,
    PackedLayer,
    QuantizedTensor,
    WeightFileError,
    compute,
    is_packed,
    memory_summary,
    product,
)
from packed_files import PACKED_FILES, WIDTHS, load_values_of, write_with_dense
from patched_models import LIMIT
from safetensors.torch import save_file

from featherweight.loaders.models import side_models
from featherweight.loaders.quantizers.comfy_quant import row_type_of
from featherweight.ops.patcher import PackedPatcher

Weights = Mapping[str, torch.Tensor]


def quantized_layers(network: torch.nn.Module) -> dict[str, PackedLayer]:
    """Those of packed weights, without those in 16 bits."""
    return {name: layer for name, layer in network.named_modules()
            if isinstance(layer, PackedLayer) and is_packed(layer.weight)
            and layer.weight.params.format.plain_dtype is None}


def places(network: torch.nn.Module) -> dict[str, int]:
    """Where the bytes of each packed weight lie in memory."""
    return {name: layer.weight._qdata.data_ptr()
            for name, layer in quantized_layers(network).items()}


def size_of(path: str) -> int:
    """Bytes of a file or of those in a folder."""
    return sum(file.stat().st_size for file in [Path(path), *Path(path).glob("*")]
               if file.is_file())


class ModelTester:
    """The tests of a kind of models.

    Attributes:
        kinds: name -> model, as the hooks take it.
        main: name of the one that is tried in each format.
        formats: format -> (writer, name of the file or folder); all are tried in the first.
        some_formats: those in which is tried what little depends on them.
        limit: of the error of what a model gives.
        stored: dtype of a file without packed weights.
        plain: names of models of which a plan packs no layer.
        without_packed: model -> formats whose writers pack none of its weights, or not all: it is
            too narrow, or they do not know its names.
        not_the_hosts: names of models whose layers ComfyUI renames without their scales, or has of
            torch's own.
    """

    kinds: Mapping[str, Any]
    main: str
    formats: Mapping[str, tuple[Callable, str]] = PACKED_FILES
    some_formats: Sequence[str] = ("Q8_0", "NF4", "SDNQ")
    limit = 1e-5
    stored = torch.float32
    plain: tuple[str, ...] = ()
    without_packed: Mapping[str, Collection[str]] = {}
    not_the_hosts: tuple[str, ...] = ()

    # --- hooks ---

    def shrink(self, kind, monkeypatch):
        """Has the host build a model in the size of these tests."""

    def weights(self, kind) -> Weights:
        return kind.weights()

    def load(self, path: str, pack_to=None, **options):
        raise NotImplementedError

    def load_dense(self, path: str):
        """What the host loads by itself."""
        raise NotImplementedError

    def run(self, kind, loaded) -> torch.Tensor:
        """What a model gives, with its patches."""
        raise NotImplementedError

    def without(self, kind) -> torch.Tensor | None:
        """What is given without such a model; None: nothing."""
        return None

    def patcher(self, loaded) -> ModelPatcher:
        return loaded

    def network(self, loaded) -> torch.nn.Module:
        return self.patcher(loaded).model

    def with_patcher(self, loaded, patcher: ModelPatcher):
        """The same with another patcher, of a clone."""
        return patcher

    def stays_dense(self, packed: torch.nn.Module, dense: torch.nn.Module) -> set[str]:
        """Names of layers whose matrices are not packed, whatever their file has."""
        return {name for name, layer in packed.named_modules()
                if isinstance(layer, PackedLayer) and layer.stays_plain(layer.weight)}

    def values(self, network: torch.nn.Module) -> Weights:
        """The values of the weights that files have."""
        return {name: product.dequantize(weight, torch.float32) if is_packed(weight) else
                (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).float()
                for name, weight in network.named_parameters()}

    def packs(self, format_name: str, name: str, matrix: torch.Tensor) -> bool:
        """Whether files of a format have a matrix packed."""
        return matrix.ndim == 2 and matrix.shape[1] % WIDTHS.get(format_name, 32) == 0

    def held(self, format_name: str) -> float:
        """The most bytes in memory for one in a file."""
        return 1.05

    # --- files ---

    def write(self, kind, format_name: str, folder: Path) -> tuple[str, Any]:
        """Path of a packed file, and the host's dense model of its values."""
        write, name = self.formats[format_name]
        dense = write_with_dense(write, folder / name, self.weights(kind))
        return str(folder / name), self.load_dense(dense)

    def write_plain(self, kind, path: Path, dtype=torch.float32) -> str:
        save_file({name: value.to(dtype).contiguous()
                   for name, value in self.weights(kind).items()}, path)
        return str(path)

    def cases(self, with_loras: bool) -> Iterator:
        """Each model in the first format, and one in each; the others are heavy. with_loras: those
        of the tests of LoRAs."""
        first = next(iter(self.formats))
        for kind in self.kinds:
            for name in self.formats:
                if name in self.without_packed.get(kind, ()):
                    continue
                is_light = name == first or kind == self.main
                yield pytest.param(kind, name, id=f"{kind}-{name}",
                                   marks=() if is_light else pytest.mark.heavy)

    def pytest_generate_tests(self, metafunc):
        names = metafunc.fixturenames
        if "type_name" in names:
            metafunc.parametrize(("kind_name", "type_name"), [
                pytest.param(kind, name, marks=() if name == HOST_TYPES[0] else pytest.mark.heavy)
                for kind in self.kinds for name in HOST_TYPES])
        elif "format_name" in names and "kind_name" in names:
            with_loras = "lora" in metafunc.function.__name__
            metafunc.parametrize(("kind_name", "format_name"), [*self.cases(with_loras)])
        elif "format_name" in names:
            metafunc.parametrize("format_name", self.some_formats)
        elif "kind_name" in names:
            metafunc.parametrize("kind_name", [
                pytest.param(name, marks=() if name in self.light_kinds else pytest.mark.heavy)
                for name in self.kinds])

    def kind_of(self, format_name: str) -> str:
        """Name of the model that is tried in a format."""
        return self.main

    @property
    def light_kinds(self) -> Collection[str]:
        return self.kinds

    @pytest.fixture
    def kind(self, request, monkeypatch):
        """The model of the case, the main one where it has no name, small in the host."""
        named = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        name = named.get("kind_name") or self.kind_of(named.get("format_name"))
        kind = self.kinds[name]
        self.shrink(kind, monkeypatch)
        return kind

    # --- values ---

    def test_a_packed_file_computes_what_the_hosts_dense_model_computes(
            self, kind, kind_name, format_name, tmp_path):
        """And stays packed, no larger than its file."""
        path, dense = self.write(kind, format_name, tmp_path)
        packed = self.load(path)
        expected, without = self.run(kind, dense), self.without(kind)
        assert without is None or without.shape != expected.shape or (
            relative_error(without, expected) > 1e-3)
        assert relative_error(self.run(kind, packed), expected) < self.limit
        self.check_packed(packed, dense, path, format_name)

    def check_packed(self, packed, dense, path: str, format_name: str):
        ours, theirs = self.network(packed), self.network(dense)
        assert isinstance(self.patcher(packed), PackedPatcher)
        values, actual = self.values(theirs), self.values(ours)
        for name, value in values.items():
            assert torch.equal(actual[name], value) or (
                relative_error(actual[name], value) < self.limit), name
        layers, dense_ones = quantized_layers(ours), self.stays_dense(ours, theirs)
        matrices = {name.removesuffix(".weight"): value for name, value in values.items()
                    if name.endswith(".weight") and value.ndim > 1}
        assert layers and {name for name, value in matrices.items()
                           if self.packs(format_name, name, value)} <= layers.keys() | dense_ones
        plain = sum(matrices[name].nbytes for name in dense_ones & matrices.keys())
        self.check_size(packed, plain, path, format_name)

    def check_size(self, packed, plain: int, path: str, format_name: str):
        """plain: bytes of matrices that are dense, whatever their file has."""
        assert self.patcher(packed).model_size() <= self.held(format_name) * size_of(path) + plain

    def test_a_model_that_is_packed_as_it_is_read_computes_what_its_dense_self_computes(
            self, kind, kind_name, tmp_path):
        path = self.write_plain(kind, tmp_path / "net.safetensors", self.stored)
        packed = self.load(path, "Q8_0")
        dense = self.load_dense(self.write_plain(kind, tmp_path / "dense.safetensors"))
        load_values_of(self.network(dense), self.network(packed))
        assert relative_error(self.run(kind, packed), self.run(kind, dense)) < self.limit
        layers = quantized_layers(self.network(packed)).values()
        assert {layer.weight.params.format.name for layer in layers} == (
            set() if kind_name in self.plain else {"Q8_0"})
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[self.stored]
        assert bool(layers) == (f"packed from {dtype}" in memory_summary(self.patcher(packed)))

    def test_a_file_without_packed_weights_loads_as_the_host_loads_it(
            self, kind, kind_name, tmp_path):
        path = self.write_plain(kind, tmp_path / "net.safetensors")
        ours, theirs = self.load(path), self.load_dense(path)
        assert isinstance(ours, type(theirs))
        patchers = [self.patcher(loaded) for loaded in (ours, theirs)]
        assert type(patchers[0]) is type(patchers[1])
        rebuilds = [(patcher.cached_patcher_init or [None])[0] for patcher in patchers]
        assert rebuilds[0] is rebuilds[1]
        assert torch.equal(self.run(kind, ours), self.run(kind, theirs))

    def test_layers_are_the_hosts_where_its_loader_takes_them_and_it_multiplies(
            self, kind, kind_name, type_name, tmp_path, monkeypatch):
        path = self.write_plain(kind, tmp_path / "net.safetensors")
        own = self.load(path, type_name)
        packed = sum(is_packed(weight.data) and row_type_of(weight.data) == type_name
                     for weight in self.network(own).parameters())
        assert layers_of_the_host(self.network(own)) == 0  # on this CPU
        as_on_a_gpu_that_multiplies(monkeypatch)
        theirs = self.load(path, type_name)
        is_theirs = kind_name not in self.not_the_hosts
        assert layers_of_the_host(self.network(theirs)) == packed * is_theirs
        # of convrot_w4a4 kitchen's torch code rounds the inputs to 4 bits, whatever is asked for
        most = 0.4 if type_name == "convrot_w4a4" else 0.05
        assert relative_error(self.run(kind, theirs), self.run(kind, own)) < (
            most if is_theirs else 1e-6)

    # --- LoRAs ---

    def test_a_lora_on_every_packed_layer_is_exact(self, kind, kind_name, format_name, tmp_path):
        path, dense = self.write(kind, format_name, tmp_path)
        packed = self.load(path)
        without, before = self.run(kind, dense), places(self.network(packed))
        for size in (0.3, 3.0):  # of some models' layers the output has little
            patches = self.loras(packed, size)
            actual, expected = self.run_patched(kind, packed, dense, patches)
            if (effect := (expected - without).norm()) > 0.02 * without.norm():
                break
        assert (actual - expected).norm() < max(LIMIT, self.limit) * effect > 0
        actual, expected = self.run_patched(kind, packed, dense, patches, 0.4)
        assert (actual - expected).norm() < max(LIMIT, self.limit) * effect
        assert places(self.network(packed)) == before != {}
        assert relative_error(self.run(kind, packed), self.run(kind, dense)) < self.limit

    def loras(self, packed, size: float) -> Mapping[str, LoRAAdapter]:
        """One for each packed matrix. size: divided by that of its weight."""
        patches, generator = {}, torch.Generator().manual_seed(1)
        for name, layer in quantized_layers(self.patcher(packed).model).items():
            if layer.has_branch and layer.weight.ndim == 2:
                rows, columns = layer.weight.shape
                up, down = (torch.randn(shape, generator=generator) for shape in (
                    (rows, 4), (4, columns)))
                up *= size * layer.weight.dequantize().std()
                patches[f"{name}.weight"] = LoRAAdapter(
                    set(), (up, down, 4.0, None, None, None))
        return patches

    def run_patched(self, kind, packed, dense, *patches) -> list[torch.Tensor]:
        return [self.run(kind, self.patched(loaded, *patches)) for loaded in (packed, dense)]

    def patched(self, loaded, patches: Mapping[str, LoRAAdapter], strength: float = 1.0):
        """The same, of a clone with patches."""
        clone = self.patcher(loaded).clone()
        assert len(clone.add_patches(patches, strength)) == len(patches) > 0
        return self.with_patcher(loaded, clone)

    # --- in the host's hands ---

    def test_a_deep_clone_has_packed_weights_of_its_own(self, kind, format_name, tmp_path):
        packed = self.load(self.write(kind, format_name, tmp_path)[0])
        clone = self.deep_clone(packed)
        assert isinstance(self.patcher(clone), PackedPatcher)
        network, own = self.network(packed), self.network(clone)
        states = [self.patcher(loaded).model.packed_patches for loaded in (packed, clone)]
        assert own is not network and states[0] is not states[1]
        assert quantized_layers(own).keys() == quantized_layers(network).keys()
        assert torch.equal(self.run(kind, clone), self.run(kind, packed))

    def deep_clone(self, loaded):
        return self.with_patcher(loaded, deep_clone(self.patcher(loaded)))

    def test_a_model_is_gone_with_its_last_user(self, kind, format_name, tmp_path):
        packed = self.load(self.write(kind, format_name, tmp_path)[0])
        left = [weakref.ref(part) for part in (packed, copy.copy(packed), self.network(packed))]
        gc.collect()
        gc.disable()
        try:
            del packed
            assert not [reference for reference in left if reference()]
        finally:
            gc.enable()

    # --- the file ---

    def test_a_damaged_file_is_refused(self, kind, format_name, tmp_path):
        path = Path(self.write(kind, format_name, tmp_path)[0])
        file = next(path.glob("*.safetensors"), path)
        file.write_bytes(file.read_bytes()[:-4096])
        with pytest.raises(WeightFileError, match=f"^({path.name}|{file.name})"):
            self.load(str(path))

    def test_use_that_follows_a_change_of_the_file_is_refused(self, kind, format_name, tmp_path):
        path = Path(self.write(kind, format_name, tmp_path)[0])
        packed = self.load(str(path))
        self.run(kind, packed)
        file = next(path.glob("*.safetensors"), path)
        with open(file, "r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"abcd")
        os.utime(file, ns=(0, 0))
        with pytest.raises(WeightFileError, match="was written to after it was loaded"):
            self.run(kind, packed)


def layers_of_the_host(model: torch.nn.Module) -> int:
    return sum(isinstance(weight.data, QuantizedTensor) and not is_packed(weight.data)
               for weight in model.parameters())


def as_on_a_gpu_that_multiplies(monkeypatch):
    """As where ComfyUI's kernels multiply every type."""
    automatic = compute.packed_formats

    def packed_formats(host_formats, device):
        return automatic(COMFYUI if host_formats == AUTOMATIC else host_formats, device)

    monkeypatch.setattr(side_models, "packed_formats", packed_formats)
