"""A model saved in one call."""
import torch
from pack_api import is_packed, open_weights, plan_file

from featherweight.loaders.packing import save as packing
from featherweight.loaders.packing.planning.file_plan import SaveOptions
from featherweight.loaders.packing.save_report import Saved
from featherweight.loaders.packing.source import Weight

# Encoders that differ from another one here only in their sizes.
SIBLINGS = (
    "clip-g", "clip-h", "gemma-3-12b", "gemma-4-12b", "gemma-4-31b", "gemma-4-e2b",
    "mistral-3-24b-flux2", "ministral-3-3b", "qwen3-2b", "qwen3-4b", "qwen3-8b", "qwen3-vl-4b",
    "qwen3-vl-8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "t5-xl", "umt5-base",
    "umt5-base of transformers",
)


def save(source, path, wanted, track=None, **options) -> Saved:
    """Plan a file and write it. options: of `SaveOptions`."""
    plan = plan_file(source, path, wanted, SaveOptions(**options))
    return packing.save(plan, **({} if track is None else {"track": track}))


def with_markers(source, encoder, weights):
    """The source with the tensors by which the host knows the encoder, of which the small one has
    none. weights: its own."""
    for name in encoder.markers.keys() - encoder.published(weights).keys():
        values = torch.zeros(encoder.markers[name])
        source.weights[name] = Weight(name, name, tuple(values.shape), values,
                                      lambda start, stop, values=values: values[start:stop])
    return source


def values_in(path) -> dict[str, torch.Tensor]:
    """The values of a file, float32."""
    return {name: tensor.dequantize() if is_packed(tensor) else tensor.float()
            for name, tensor in open_weights(path).state_dict().items()}
