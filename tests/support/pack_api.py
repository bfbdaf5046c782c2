"""What tests use of the pack by name, and where it lies: a module that moves is named here, and
in the few tests that look into it."""
# ruff: noqa: F401
import comfyui_and_pack  # first: puts both where they can be imported

from featherweight.loaders.comfyui import compute
from featherweight.loaders.comfyui.compute import AUTOMATIC, COMFYUI, EXACT, FAST, host_multiplies
from featherweight.loaders.comfyui.load_check import load_notes
from featherweight.loaders.comfyui.model_summary import memory_summary
from featherweight.loaders.container.weight_file import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.checkpoint import load_checkpoint
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.loaders.packing.planning.file_plan import HOST_TYPES, KEEP_TYPES, plan_file
from featherweight.loaders.packing.source import SaveError, source_of_file, source_of_model
from featherweight.ops.formats.base import FORMATS, GGML_FORMATS, Format, FormatError
from featherweight.ops.kernels import cpp_backend
from featherweight.ops.kernels.validation import check, random_tensors
from featherweight.ops.layers import packed_layers, product
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.layers.packed_layers import PackedLayer
from featherweight.ops.packing import pack_types
from featherweight.ops.packing.pack_tensor import pack_tensor
from featherweight.ops.packing.pack_types import ROW_TYPES
from featherweight.ops.quantize.second_moments import SecondMoments
from featherweight.ops.tensor.packed_layout import (
    QuantizedTensor,
    is_comfy_quantized,
    is_packed,
    join_packed,
    packed_tensor,
    packed_tensors,
    relabel,
    with_low_rank,
)
