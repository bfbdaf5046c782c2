"""Reads weights that GPTQ, AutoRound or AWQ packed into 32-bit words.

`PARTS` of a layer of (N, K), with codes of B bits and G groups, become one packed tensor: value =
(code - zero) * scale. GPTQ's and AutoRound's words are a stream of bits along the rows of the
matrix (along the columns for zeros), so that transposing them brings the codes into the order of
the values. GPTQModel's `gptq_p` has, of 32 codes, the words of their low bits first (`PLANES`).
`g_idx` is the group of each column. In AWQ's words (gemm, the second shape of `qweight`), the four
lower nibbles are the rows of even numbers of eight, the upper ones those of odd numbers.

GPTQ's first version stores each zero less 1, modulo 2**b, its second and `gptq_p` as it is. The
`config.json` of the folder says which: `checkpoint_format` of GPTQ, `packing_format` of AutoRound.
Without it, only zeros that are all half the range of the codes say so, and the order of the bits.

Sources: auto-round 0.16.1 `auto_round_extension/torch/qlinear_torch.py`, `qlinear_torch_zp.py` and
`auto_round/inference/backend.py`, `auto_round/utils/bit_packing.py`, gptqmodel 7.7.0
`gptqmodel/utils/planar_packing.py`, autoawq 0.2.9 `awq/utils/packing_utils.py`.
"""
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..container.weight_file import WeightFile
from .base import HeaderOf, Layer, Quantizer, layers_with
from .integers import SCALES, join_codes, known_bits, pack_integers, split_words
from .parts import WHOLE, Part, PartError
from .repack import ROWS, exchange_fields, slices, transpose_words, words_of

PARTS = {"scales": Part("(G, N)", SCALES),
         "qzeros": Part("(G, N * B / 32)", (torch.int32,)),
         "qweight": Part("(K * B / 32, N) or (K, N * B / 32)", (torch.int32,)),
         "g_idx": Part("K", WHOLE, "g_idx")}
# bits of a code that has several planes -> the bits of these, the lowest first
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
SLICE_WORDS = 1 << 18  # of planes, unpacked at a time
AWQ_BITS, AWQ_CODES = 4, 8  # of a code; codes of a word
WORDS = 256  # of a row, unpacked at a time
GROUP_LENGTHS = (128, 64, 32, 256, 512, 1024, 16)  # those that people choose first come first
CONFIG_ADVICE = "pick the folder with its config.json, which says how they are stored"


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with codes that are not Nunchaku's, also those that lack other parts."""
    for layer in layers_with(["qweight"])(names, metadata, header_of):
        has = [f"{layer}.{part}" in names
               for part in ("scales", "qzeros", "wscales", "scaled_zeros")]
        is_int8 = header_of(f"{layer}.qweight").dtype == torch.int8
        if not any(has[2:]) and (not is_int8 or all(has[:2])):
            yield layer


def read(layer: Layer) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    config, rows = layer.file.quantization, layer.sizes["N"]
    bits, is_awq = known_bits(layer.sizes["B"]), layer.parts["qweight"].shape[1] != rows
    if config and is_awq != ("awq" in str(config)):
        raise PartError(f"its words are those of {'AWQ' if is_awq else 'GPTQ'}, and its config"
                        " says otherwise")
    return _awq(layer, bits) if is_awq else _gptq(layer, bits)


def _gptq(layer: Layer, bits: int) -> torch.Tensor:
    file, parts, columns = layer.file, layer.parts, layer.sizes["K"]
    groups, group_of_column = layer.sizes["G"], parts.get("g_idx")
    if columns % 8:
        raise PartError(f"it has {columns} columns, expected a multiple of 8")
    codes = transpose_words(parts["qweight"])
    if _has_planes(file, parts["qzeros"], bits):
        zeros = _split_planes(parts["qzeros"], bits)
        codes = _stream_of_planes(codes, bits)
    else:
        stored = split_words(parts["qzeros"], bits)
        zeros = stored + _zero_offset(file, stored, bits) & (1 << bits) - 1
    if group_of_column is None and file.quantization.get("desc_act") is True:
        raise PartError("it has no g_idx, and its config says that its columns are in another"
                        " order")
    if group_of_column is None and groups > 1:
        group_of_column = torch.arange(columns) // _group_length(file, columns, groups)
    return pack_integers(codes.view(torch.uint8), columns, bits,
                         parts["scales"].t(), zeros.t(), group_of_column)


def _group_length(file: WeightFile, columns: int, groups: int) -> int:
    """Returns how many columns share a scale; the last group may be shorter.

    Where no config says so, it is the length that the writers offer which makes so many groups.
    """
    settled = file.quantization.get("group_size")
    lengths = [settled] if type(settled) is int and settled > 0 else []
    lengths += [length for length in GROUP_LENGTHS if length * groups == columns]
    lengths += GROUP_LENGTHS
    fitting = [length for length in lengths if -(-columns // length) == groups]
    if fitting:
        return fitting[0]
    if columns % groups:
        raise PartError(f"its {groups} groups do not divide its {columns} columns")
    return columns // groups


def _has_planes(file: WeightFile, zeros: torch.Tensor, bits: int) -> bool:
    """Returns whether codes are in planes, by the config or by zeros that are half their range."""
    if bits not in PLANES:
        return False
    settings = file.quantization
    version = settings.get("checkpoint_format", settings.get("format"))
    is_known = "auto" in str(settings.get("quant_method")) or version in ("gptq", "gptq_v2")
    if version == "gptq_p" or is_known or (settings and bits == 3):
        return version == "gptq_p"
    if settings:
        raise PartError(f"its config does not say in which order its {bits} bits are;"
                        f" {CONFIG_ADVICE}")
    return zeros.shape[1] % bits == 0 and bool((_split_planes(zeros, bits) == 1 << bits - 1).all())


def _split_planes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the codes of planes: of 32 codes each, the words of the lowest bits come first.

    Args:
        words: int32 (R, W), W a multiple of `bits`.
        bits: of a code, a key of `PLANES`.

    Returns:
        uint8 (R, W * 32 / bits).
    """
    if words.shape[1] % bits:
        raise PartError(f"it has rows of {words.shape[1]} words of {bits} bits a value, expected"
                        f" multiples of {bits}")
    data = words.contiguous().view(torch.uint8).view(len(words), -1, bits * 4)
    codes = data.new_zeros(*data.shape[:2], 32)
    start = 0
    for width in PLANES[bits]:
        plane = data[..., start * 4:(start + width) * 4]
        fields = [plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        codes |= torch.stack(fields, -1).flatten(2) << start
        start += width
    return codes.view(len(words), -1)


def _stream_of_planes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns rows of codes in planes, int32 (R, W), as a stream, uint8 (R, W * 4)."""
    step = max(1, SLICE_WORDS // max(1, words.shape[1]))
    return torch.cat([join_codes(_split_planes(words[first:first + step], bits), bits)
                      for first in range(0, len(words), step)])


def _zero_offset(file: WeightFile, stored: torch.Tensor, bits: int) -> int:
    """Returns what has to be added to the zeros of GPTQ, uint8 (G, N)."""
    settings, half = file.quantization, 1 << bits - 1
    if "auto" in str(settings.get("quant_method")):  # auto-round, also intel/auto-round
        packing = str(settings.get("packing_format", "auto_gptq"))
        return int("auto_gptq" in packing)
    if settings:
        version = settings.get("checkpoint_format", settings.get("format"))
        return int(all(raw not in str(version) for raw in ("v2", "gptq_p")))
    if bool((stored == half).all()):
        return 0
    if bool((stored == half - 1).all()):
        return 1
    raise PartError(f"its file does not say whether zeros are stored less 1; {CONFIG_ADVICE}")


def _awq(layer: Layer, bits: int) -> torch.Tensor:
    codes = layer.parts["qweight"]
    columns = len(codes)
    if columns % 2 or bits != AWQ_BITS:
        raise PartError(f"it has {columns} columns of {bits} bits, expected an even number of"
                        f" {AWQ_BITS} bits")
    return pack_integers(_awq_codes(codes), columns, AWQ_BITS, layer.parts["scales"].t(),
                         _awq_fields(layer.parts["qzeros"]).t())


def _awq_codes(stored: torch.Tensor) -> torch.Tensor:
    """Returns the codes of AWQ's words in the order of the values.

    Eight neighbouring words of a column have the nibbles of eight rows. Exchanging nibbles between
    them makes words of eight columns, one for each row.

    Args:
        stored: int32 (K, N / 8), K even.

    Returns:
        uint8 (N, K / 2), the low nibble first.
    """
    columns, count = stored.shape
    if columns % AWQ_CODES:
        stored = torch.nn.functional.pad(stored, (0, 0, 0, -columns % AWQ_CODES))
    words = words_of(stored).reshape(-(-columns // AWQ_CODES), 2, 2, 2, count)
    codes = np.empty((count, 2, 2, 2, len(words)), words.dtype)
    for part in slices(len(words), ROWS):
        for row in slices(count, WORDS):
            planes = words[part, ..., row].transpose(1, 2, 3, 4, 0).copy()
            exchange_fields(planes[0], planes[1], 16)
            exchange_fields(planes[:, 0], planes[:, 1], 8)
            exchange_fields(planes[:, :, 0], planes[:, :, 1], 4)
            codes[row, ..., part] = planes.transpose(3, 1, 2, 0, 4)
    packed = torch.from_numpy(codes.view(np.uint8).reshape(count * AWQ_CODES, len(words) * 4))
    return packed[:, :columns // 2].contiguous()


def _awq_fields(words: torch.Tensor) -> torch.Tensor:
    """Returns the fields of words (R, W) in the order of the matrix' rows, uint8 (R, W * 8)."""
    fields = split_words(words, AWQ_BITS).view(len(words), -1, 2, AWQ_CODES // 2)
    return fields.transpose(2, 3).reshape(len(words), -1)


QUANTIZER = Quantizer(
    name="GPTQ, AutoRound or AWQ", find=find, layouts={"GPTQ, AutoRound or AWQ": PARTS}, read=read,
    leftovers=re.compile(r"\.(qweight|qzeros|g_idx)$"), is_uniform=True,
    methods={"gptq": "GPTQ", "auto-round": "AutoRound", "intel/auto-round": "AutoRound",
             "awq": "AWQ"})
