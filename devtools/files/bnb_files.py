"""Files as people have them of bitsandbytes, for tests, demo and bench, written with the
`bitsandbytes` package."""
import torch
from bitsandbytes import functional
from safetensors.torch import save_file


def write_bnb(path, tensors: dict[str, torch.Tensor], quant_type: str = "nf4",
              block_length: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8,
              prefix: str = "", keep=None, quantise=None) -> dict[str, torch.Tensor]:
    """Write float tensors as a safetensors file with 4-bit weights and return the values a reader
    should see.

    keep(name, tensor): whether to leave one as it is; by default everything but matrices named
    `.weight`. storage: the dtype that the codes are stored as. prefix: put before each name in the
    file. quantise: as `quantised`. Returns name, without prefix -> float32.
    """
    def parts_of(name: str, tensor: torch.Tensor):
        parts, values = (quantise or quantised)(tensor, quant_type, block_length, nested, storage)
        return {f"{name}{part}": value for part, value in parts.items()}, values

    return _write(path, tensors, parts_of, prefix, keep)


def write_bnb_int8(path, tensors: dict[str, torch.Tensor], prefix: str = "",
                   keep=None) -> dict[str, torch.Tensor]:
    """Write float tensors as a safetensors file with int8 weights (`SCB`) and return the values a
    reader should see. prefix, keep: as of `write_bnb`."""
    def parts_of(name: str, tensor: torch.Tensor):
        layer = name.removesuffix(".weight")
        weight, scales, _ = functional.int8_vectorwise_quant(tensor.half())
        return {name: weight, f"{layer}.SCB": scales,
                f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8)
                }, weight * (scales / 127).view(-1, 1)

    return _write(path, tensors, parts_of, prefix, keep)


def _write(path, tensors: dict[str, torch.Tensor], parts_of, prefix: str,
           keep) -> dict[str, torch.Tensor]:
    stored, seen = {}, {}
    for name, tensor in tensors.items():
        is_kept = (keep or _not_a_matrix)(name, tensor)
        parts, seen[name] = ({name: tensor}, tensor.float()) if is_kept else parts_of(name, tensor)
        stored |= {prefix + part: value.contiguous() for part, value in parts.items()}
    save_file(stored, str(path), {"format": "pt"})
    return seen


def _not_a_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim != 2 or not name.endswith(".weight")


def quantised(tensor: torch.Tensor, quant_type: str, block_length: int = 64, nested: bool = False,
              storage: torch.dtype = torch.uint8) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one 4-bit weight by what their names end in, and its values in float32.

    The values are the definition, code[nibble] * absmax: bitsandbytes' own `dequantize_4bit` is
    wrong on CPUs where the blocks do not divide the rows.
    """
    codes, state = functional.quantize_4bit(tensor, blocksize=block_length,
                                            compress_statistics=nested, quant_type=quant_type,
                                            quant_storage=storage)
    absmax = state.absmax
    assert state.code is not None
    if nested:
        assert state.offset is not None
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = codes.view(-1).view(torch.uint8).int()
    # of both nibbles of a byte, the upper first
    pairs = torch.stack([state.code.repeat_interleave(16), state.code.repeat(16)], -1)
    values = torch.nn.functional.pad(pairs[packed].view(-1)[:tensor.numel()],
                                     (0, -tensor.numel() % block_length))
    values = values.view(-1, block_length) * absmax.float().view(-1, 1)
    return {"": codes} | {
        f".{part}": value for part, value in state.as_dict(packed=True).items()
    }, values.view(-1)[:tensor.numel()].view(tensor.shape)


def write_random_bnb(path, shapes: dict[str, tuple], quant_type: str = "nf4",
                     block_length: int = 64, largest: float = 0.05):
    """Write a safetensors file of any size with random 4-bit weights.

    Args:
        shapes: name -> logical shape. All but matrices named `.weight` are float32: zeros, or ones
            for the scale of a norm.
        largest: the largest magnitude in a matrix.
    """
    generator, code = (
        torch.Generator().manual_seed(0),
        functional.get_4bit_type(quant_type, device="cpu"),
    )
    stored = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            stored[name] = torch.full(shape, float(name.endswith(".scale")))
            continue
        count = shape[0] * shape[1]
        absmax = torch.rand(-(-count // block_length), generator=generator) * largest
        state = functional.QuantState(absmax, torch.Size(shape), code.clone(), block_length,
                                      quant_type, torch.float32)
        codes = torch.randint(1 << 62, ((count + 15) // 16,),
                              generator=generator).view(torch.uint8)[:(count + 1) // 2]
        stored[name] = codes.view(-1, 1)
        stored |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    save_file(stored, str(path), {"format": "pt"})
