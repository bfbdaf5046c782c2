"""Weights of SDNQ."""
import itertools
from dataclasses import replace

import torch
from sdnq_writer import H2, H4, config_of, write_weight

from .base import Written, damaged, each, grid, weight

TYPES = ("int8", "int7", "int6", "int5", "int4", "int3", "int2", "uint8", "uint7", "uint6",
         "uint5", "uint4", "uint3", "uint2", "uint1", "float8_e4m3fn", "float8_e5m2")
FLOATS = [f"float{bits}_e{e}m{bits - signed - e}fn{'' if signed else 'u'}"
          for bits in range(1, 9) for signed in (1, 0) for e in range(1, min(5, bits - signed) + 1)]
FLOATS = ["float8_e4m3fn_sdnq" if name == "float8_e4m3fn" else name for name in FLOATS]


def config(name="int4", **settings):
    return config_of(name, **settings)["quantization_config"]


def of_sdnq(name="uint4", shape=(24, 192), settings=None, has_config=True, bias=None, **options):
    parts, values = write_weight(weight(*shape), name, **options)
    if bias is not None:
        parts["bias"] = bias
    of_layer = {"use_codebook": options.get("codebook", False)} | (settings or {})
    return Written(parts, values, bias, error=1e-6, held=None,
                   config=config(name, **of_layer) if has_config else None)


def rotated(name, rank, version, shape):
    """version: (of SDNQ, size of the rotation, what it is made of)."""
    number, size, base = version
    return of_sdnq(name, shape, rank=rank, rotated=(size, base), settings={
        "use_hadamard": True, "hadamard_group_size": size, "sdnq_version": number})


def rotated_by_default(columns, default):
    """The rotation is as large as divides the channels, and no larger than a version's own."""
    most, version = default
    size = min(most, columns & -columns)
    base = H4 if version == "0.2.8" and size.bit_length() % 2 else H2
    return of_sdnq(shape=(8, columns), rotated=(size, base), settings={
        "use_hadamard": True, "sdnq_version": version})


def rotated_channels(columns):
    """Taps are no channels to rotate."""
    return of_sdnq(shape=(8, columns, 4, 4), rotated=(columns & -columns, H2),
                   settings={"use_hadamard": True})


def of_one_scale(evidence, name):
    """One scale of a whole weight is that of all rows, whose number something else tells."""
    written = of_sdnq(name, (1, 24 * 64))
    parts = dict(written.parts)
    if name == "int8":
        parts["weight"] = parts["weight"].view(24, 64)
    if evidence == "bias":
        bias = torch.zeros(24)
        return replace(written, parts=parts | {"bias": bias}, bias=bias,
                       values=written.values.view(24, 64))
    up, down = weight(24, 4), weight(4, 64)
    return replace(written, parts=parts | {"svd_up": up, "svd_down": down},
                   values=written.values.view(24, 64) + up @ down)


def with_a_factor(dtype):
    """Scales have a factor."""
    written = of_sdnq("int4", (24, 64), scale_dtype=dtype)
    return replace(written, parts=written.parts | {"scale_2": torch.tensor([0.75])},
                   values=written.values * 0.75)


def transposed(name, rank, shape):
    return of_sdnq(name, shape, {"use_quantized_matmul": True}, bias=torch.zeros(shape[0]),
                   transposed=True, rank=rank)


WRITERS = {
    **grid("type", of_sdnq, group=[48],
           name=[name for name in [*TYPES, *FLOATS] if "8_e" not in name]),
    **each("layout", of_sdnq, *(
        {"rank": 8}, {"rank": 8, "group": 96}, {"name": "int8", "rank": 8}, {"name": "int8"},
        {"scale_dtype": torch.bfloat16}, {"scale_dtype": torch.float16, "group": 64, "rank": 4},
        {"codebook": True}, {"codebook": True, "group": 48},
        {"codebook": True, "name": "uint3", "scale_dtype": torch.bfloat16},
        {"shape": (24, 16, 3, 3)}, {"shape": (24, 16, 3, 3), "group": 8},
        {"shape": (24, 32, 1, 1)}, {"shape": (24, 16, 3), "group": 8},
        {"shape": (24, 16, 2, 3, 3), "group": 8, "rank": 4},
        {"shape": (24, 16, 3, 3), "name": "int8"}, {"shape": (24, 32, 3, 3), "codebook": True},
        {"shape": (24, 32, 3, 3), "codebook": True, "group": 8},
        {"name": "int8", "group": 48, "shape": (24, 192)})),
    **grid("rotated", rotated, name=["uint4", "int8"], rank=[0, 4],
           version=[("0.2.0", 16, H4), ("0.2.8", 4, H4), ("0.2.8", 8, H2), ("0.1.9", 16, H2),
                    ("0.1.9", 4, H2)], shape=[(24, 256), (24, 16, 3, 3)]),
    **grid("rotated by default", rotated_by_default, columns=[768, 192, 72],
           default=[(256, "0.2.8"), (128, "0.1.9")]),
    **grid("rotated channels", rotated_channels, columns=[8, 96]),
    **grid("one scale", of_one_scale, evidence=["bias", "svd_up"], name=["uint4", "int8"]),
    **grid("a factor of scales", with_a_factor, dtype=[torch.float32, torch.bfloat16]),
    **grid("transposed", transposed, name=["int8", "uint8", "uint4"], rank=[0, 4, 32],
           shape=[(24, 64), (32, 32)]),
    # sizes tell the bits
    **each("no config", of_sdnq, *(
        {"name": name, "shape": (24, 512), "has_config": False, **options} for name, options in (
            ("uint4", {"rank": 32}), ("int8", {}), ("uint8", {}), ("int5", {}), ("uint7", {}),
            ("uint4", {"group": 64}), ("int4", {"group": 64}), ("uint2", {"group": 16}),
            ("int6", {"group": 256}), ("int3", {"group": 32}), ("uint4", {"codebook": True}),
            ("uint1", {"group": 8}), ("uint2", {"rank": 4})))),
}
CODES = torch.zeros(24 * 32, dtype=torch.uint8)


def of_parts(parts=None, **settings):
    """A weight of (24, 64) in int4, its config with some settings."""
    return Written({"weight": CODES, "scale": torch.ones(24, 1)} | (parts or {}),
                   config=config() | settings)


def by_settings(**cases):
    return {name.replace("_", " "): (lambda settings=settings: of_parts(**settings), *case)
            for name, (settings, *case) in cases.items()}


def of_factors(part, dtype, transposed):
    """Factors of a dtype that no writer has."""
    written = of_sdnq("int8", (128, 64), {"use_svd": True, "use_quantized_matmul": transposed},
                      rank=4, transposed=transposed)
    return replace(written, parts=written.parts | {part: written.parts[part].to(dtype)})


def beside_int8(name):
    other, _ = write_weight(weight(24, 64), "int8")
    return Written(write_weight(weight(24, 64), name)[0],
                   config=config("uint4", modules_dtype_dict={"int8": ["M"]}),
                   beside={f"M.{part}": tensor for part, tensor in other.items()})


BAD = damaged(
    of_parts,
    scales_of_no_groups=({"scale": torch.ones(24, 2)},
                         "its scale is float32 .24, 2.; expected scales of rows"),
    scales_of_other_rows=({"scale": torch.ones(7, 1)}, "of 7 rows"),
    scales_of_one_dimension=({"scale": torch.ones(24)},
                             "its scale is float32 .24,.; expected .rows, 1."),
    groups_of_other_columns=({"scale": torch.ones(24, 5, 1)},
                             "make no SDNQ int4 weight of 24 rows"),
    zeros_of_signed_codes=({"zero_point": torch.ones(24, 1)},
                           "it has a zero_point; expected no zero_point"),
    zeros_of_other_groups=({"zero_point": torch.ones(24, 3)}, "expected the same shape"),
    codes_of_16_bits=({"weight": torch.zeros(24, 64, dtype=torch.int16)},
                      "it has weight of int16 .24, 64., expected uint8, int8"),
    an_empty_low_rank=({"svd_up": torch.ones(24, 0), "svd_down": torch.ones(0, 64)},
                       "it has svd_up of float32 .24, 0., expected .A, B."),
    factors_of_one_number=({"svd_up": torch.ones(()), "svd_down": torch.ones(()),
                            "scale": torch.ones(1, 1)}, "it has svd_up of float32 .., expected"),
    no_rows=({"scale": torch.ones(0, 1)}, "of 0 rows"),
    no_codes=({"weight": CODES[:0]}, "make no SDNQ int4 weight"),
    half_a_low_rank=({"svd_up": torch.ones(24, 4)}, "it has no svd_down, expected"),
    factors_of_two_ranks=({"svd_up": torch.ones(24, 4), "svd_down": torch.ones(3, 64)},
                          "expected factors of a weight of .24, 64."),
    factors_of_integers=({"svd_up": torch.ones(24, 4).int(), "svd_down": torch.ones(4, 64).int()},
                         "it has svd_up of int32"),
    scales_of_fp8=({"scale": torch.ones(24, 1).to(torch.float8_e5m2)},
                   "without the numbers that it is read"),
    three_factors_of_scales=({"scale_2": torch.ones(3)},
                             "it has scale_2 of float32 .3,., expected one number or 256"),
    scales_of_integers=({"scale": torch.ones(24, 1).int()},
                        "it has scale of int32 .24, 1., expected float32"),
    one_scale=({"scale": torch.ones(1, 1)}, "one scale for all rows, which do not say how many"),
) | by_settings(
    no_zeros=({"weights_dtype": "uint4"}, {}, "it has no zero_point; expected a zero_point"),
    codes_of_int5=({"weights_dtype": "int5"}, {},
                   "its codes are uint8 .768,.; expected those of int5"),
    codes_of_int8=({"weights_dtype": "int8"}, {}, "expected those of int8"),
    a_type_of_12_bits=({"weights_dtype": "int12"}, {},
                       "of the type 'int12'; expected one of at most 8 bits"),
    a_type_that_is_a_number=({"weights_dtype": 3}, {}, "of the type 3; expected"),
    codes_of_fp8=({"weights_dtype": "int8"}, {"weight": torch.zeros(24, 64).to(torch.float8_e5m2)},
                  "its codes are float8_e5m2 .24, 64.; expected int8"),
    int8_of_other_rows=({"weights_dtype": "int8"},
                        {"weight": CODES.view(torch.int8).view(12, 64)}, "of 24 rows"),
    a_rotation_of_48=({"use_hadamard": True, "hadamard_group_size": 48}, {},
                      "groups of 48 values; expected a"),
    a_rotation_of_text=({"use_hadamard": True, "hadamard_group_size": "a"}, {},
                        "groups of 'a' values"),
    a_rotation_of_no_version=({"use_hadamard": True, "sdnq_version": None,
                               "hadamard_group_size": 16}, {}, "sdnq_version"),
    a_codebook_and_zeros=({"use_codebook": True}, {"scale": torch.ones(24, 16),
                                                   "zero_point": torch.ones(24, 16)},
                          "both a codebook and a zero_point"),
    a_codebook_of_7=({"use_codebook": True}, {"scale": torch.ones(24, 7)}, "expected 16 levels"),
) | {
    f"{part} {dtype}, transposed {transposed}": (
        lambda options=(part, dtype, transposed): of_factors(*options), {},
        f"it has {part} of {str(dtype)[6:]} .*, expected .* of bfloat16, float16 or float32")
    for part, dtype, transposed in itertools.product(
        ("svd_up", "svd_down"), (torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn),
        (False, True))
} | {
    "a rotation of gigabytes": (
        lambda: of_sdnq(shape=(2, 1 << 14), settings={
            "use_hadamard": True, "hadamard_group_size": 1 << 14}), {},
        "it is rotated in groups of 16384 values; expected at most 4096"),
    "codes across the ends of rows": (lambda: of_sdnq(shape=(24, 9, 3, 3)), {},
                                      "its rows have 81 codes of 4 bits, of which 2"),
} | {
    f"{name} without {part}": (lambda name=name: beside_int8(name), {part: None},
                               "'L.* not in the file")
    for name, part in (("uint4", "scale"), ("uint4", "weight"), ("int8", "scale"))
} | {
    f"bits that nothing tells, {name} {options}": (
        lambda name=name, options=options: of_sdnq(name, (24, 512), has_config=False, **options),
        {}, "its codes.* may have .* bits.* expected a config.* Put the config.json")
    for name, options in (("uint4", {}), ("uint4", {"group": 32}), ("int6", {}))
}
