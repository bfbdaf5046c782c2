"""Models whose weights only another pack can read, as those of ComfyUI-GGUF's own loader."""
import pytest
import torch
from pack_api import WeightFileError
from patched_models import dense_flux, packed_flux

from featherweight.loaders.packing.calibration.measure import measure
from featherweight.loaders.packing.calibration.sampling import SamplingRun
from featherweight.loaders.packing.source import check_saveable
from featherweight.loaders.refusals.foreign_weights import foreign_class

pytestmark = pytest.mark.usefixtures("small_models")


class GGMLTensor(torch.Tensor):
    """As ComfyUI-GGUF has it: the bytes of a file under the shape of the weight."""


@pytest.fixture
def foreign():
    """A model of another pack's loader."""
    model = dense_flux("Q4_K")
    weight = model.model.diffusion_model.img_in.weight
    model.model.diffusion_model.img_in.weight = torch.nn.Parameter(
        weight.detach().as_subclass(GGMLTensor), requires_grad=False)
    return model


@pytest.mark.parametrize("use", [check_saveable, lambda model: measure(model, SamplingRun([]))])
def test_they_are_neither_saved_nor_measured_and_the_message_says_why(foreign, use):
    with pytest.raises(WeightFileError, match="class GGMLTensor, which another pack's loader made"):
        use(foreign)


def test_models_of_this_pack_and_dense_ones_have_none():
    for model in (dense_flux("Q4_K"), packed_flux("Q4_K"), packed_flux("IQ4_XS")):
        assert foreign_class(model.model) is None
