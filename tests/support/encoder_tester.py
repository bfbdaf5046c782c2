"""The tests of text encoders."""
from pathlib import Path

from encoders import ENCODERS
from encoders.encoder import (
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
    shapes_of,
    text_model,
    write_encoder,
)
from model_tester import ModelTester
from pack_api import PackedLayer


class EncoderTester(ModelTester):
    """Text encoders of llama.cpp's files."""

    kinds = ENCODERS
    main = "t5-xxl"
    formats = {"GGUF": (write_encoder, "encoder.gguf")}
    some_formats = ("GGUF",)
    limit = 1e-4
    # what is packed as it is read has tables too, see test_pack_on_load.py
    test_a_model_that_is_packed_as_it_is_read_computes_what_its_dense_self_computes = None
    test_a_file_without_packed_weights_loads_as_the_host_loads_it = None
    test_layers_are_the_hosts_where_its_loader_takes_them_and_it_multiplies = None

    def shrink(self, kind, monkeypatch):
        self.encoder = kind
        for config, changes in kind.towers:
            for name, value in changes.items():
                monkeypatch.setitem(config, name, value)

    def write(self, kind, format_name, folder):
        weights = random_weights(kind)
        write, name = self.formats[format_name]
        write(folder / name, kind, weights)
        return str(folder / name), host_clip(kind, weights)

    def load(self, path, pack_to=None):
        return load_encoder(path, self.encoder)

    def run(self, kind, loaded):
        return hidden_states(loaded)

    def patcher(self, loaded):
        return loaded.patcher

    def network(self, loaded):
        return text_model(loaded).transformer

    def values(self, network):
        """Without those by which the host knows the model, which may be zeros."""
        return {name: value for name, value in super().values(network).items()
                if name in shapes_of(self.encoder)
                and not {name, f"model.{name}"} & self.encoder.markers.keys()}

    def stays_dense(self, packed, dense):
        """Stacks of experts and their routers, which are no layers."""
        return super().stays_dense(packed, dense) | {
            name for name, layer in packed.named_modules() if not isinstance(layer, PackedLayer)}

    def with_patcher(self, loaded, patcher):
        loaded = loaded.clone()
        loaded.patcher, loaded.cond_stage_model = patcher, patcher.model
        return loaded

    def check_size(self, packed, plain, path, format_name):
        """With the file of what it sees and hears through."""
        path = Path(path)
        super().check_size(packed, plain, str(path if path.is_dir() else path.parent), format_name)
