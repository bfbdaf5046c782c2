"""A Flux in diffusers' names by each quantiser of the Hugging Face libraries."""
import functools
import json
import shutil
from pathlib import Path

import torch
from diffusers_names import DIFFUSERS, in_diffusers_names, in_the_hosts_names
from patched_models import folder as kept_models
from patched_models import tiny_flux
from quantizer_writers import (
    awq,
    bit_planes,
    fp8_blocks,
    gptq,
    int_quantized,
    mxfp,
    mxfp8,
    nvfp4,
    pack_quantized,
    quantized_state_dict,
    quanto_bits,
    quanto_bytes,
    svdquant,
    torchao_bytes,
    torchao_header,
    torchao_integers,
)
from safetensors.torch import load_file, save_file

CONFIG = {"depth": 1, "depth_single_blocks": 1, "hidden_size": 256}


def out_of_order(values):
    return gptq(values, order=torch.randperm(values.shape[1],
                                             generator=torch.Generator().manual_seed(3)))


def of_llm_compressor(values):
    """Blocks of fp8 as float-quantized."""
    parts, expected = fp8_blocks(values)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, expected


# family -> (writer of a weight, quantization_config, header of a weight or None)
QUANTIZED_MODELS = {
    "gptq": (gptq, {"quant_method": "gptq"}, None),
    "gptq act-order": (out_of_order, {"quant_method": "gptq", "desc_act": True}, None),
    "auto-round": (functools.partial(gptq, symmetric=True), {"quant_method": "auto-round"}, None),
    "auto-round 2 bits": (functools.partial(gptq, bits=2, stored_less=0), {
        "quant_method": "auto-round", "packing_format": "auto_round"}, None),
    "auto-round 3 bits": (functools.partial(gptq, bits=3), {"quant_method": "auto-round"}, None),
    "awq": (awq, {"quant_method": "awq"}, None),
    "compressed-tensors": (functools.partial(pack_quantized, symmetric=False),
                           {"quant_method": "compressed-tensors"}, None),
    "compressed-tensors int8": (int_quantized, {"quant_method": "compressed-tensors"}, None),
    "compressed-tensors nvfp4": (nvfp4, {"quant_method": "compressed-tensors"}, None),
    "compressed-tensors 5 bits": (functools.partial(pack_quantized, bits=5), {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": {
            "weights": {"num_bits": 5, "strategy": "group", "group_size": 32}}}}, None),
    "compressed-tensors mxfp4": (mxfp, {"quant_method": "compressed-tensors"}, None),
    "compressed-tensors mxfp6": (functools.partial(mxfp, bits=6), {
        "quant_method": "compressed-tensors"}, None),
    "compressed-tensors blocks": (of_llm_compressor, {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": {
            "weights": {"strategy": "block", "block_structure": [128, 128]}}}}, None),
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
    "auto-round mxfp8": (mxfp8, {"quant_method": "auto-round"}, None),
    "gptqmodel 7 bits": (functools.partial(gptq, bits=7, stored_less=0, join=bit_planes), {
        "quant_method": "gptq", "checkpoint_format": "gptq_p"}, None),
    "modelopt svdquant": (svdquant, {"quant_method": "modelopt"}, None),
    "quanto": (quanto_bits, {"quant_method": "quanto", "weights_dtype": "int4"}, None),
    "quanto int8": (quanto_bytes, {"quant_method": "quanto", "weights_dtype": "int8"}, None),
    "torchao int8": (torchao_bytes, {"quant_method": "torchao"}, torchao_header("Int8Tensor")),
    "torchao int4": (torchao_integers, {"quant_method": "torchao"},
                     torchao_header("IntxUnpackedToInt8Tensor", target_dtype="int4")),
}


def write_quantized_flux(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Writes a Flux whose blocks are quantised; returns its dense values in the host's names.

    family: of QUANTIZED_MODELS.
    """
    kept = _quantized_flux(family)
    shutil.copytree(kept / "model", folder, dirs_exist_ok=True)
    return load_file(kept / "values.safetensors")


@functools.cache  # quantising takes longer than most of what is tested with it
def _quantized_flux(family: str) -> Path:
    kept = Path(kept_models().name, f"quantized {family}")
    (kept / "model").mkdir(parents=True)
    write, config, header = QUANTIZED_MODELS[family]
    # the table's spelling
    weights = {name.replace("_norm.scale", "_norm.weight"): value
               for name, value in tiny_flux().items()}
    table = DIFFUSERS["flux-dev"](CONFIG)
    stored, values = quantized_state_dict(in_diffusers_names(weights, table), write, _keeps)
    metadata = {name: header for name, tensor in values.items()
                if tensor.ndim == 2 and not _keeps(name)} if header else None
    save_file(stored, kept / "model" / "diffusion_pytorch_model.safetensors", metadata)
    (kept / "model" / "config.json").write_text(json.dumps({
        "_class_name": "FluxTransformer2DModel", "quantization_config": config}))
    dense = in_the_hosts_names(values, weights, table)
    save_file({name: value.contiguous() for name, value in dense.items()},
              kept / "values.safetensors")
    return kept


def _keeps(name: str) -> bool:
    return "transformer_blocks." not in name
