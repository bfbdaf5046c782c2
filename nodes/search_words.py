"""Words by which the editor's search finds nodes.

The search ranks a word in a title before one in an alias, and an alias that begins with the word
before one that has it later. So of several nodes that read the same files, the one that most
people look for has the families of files alone, and the others have them behind what they load.
"""
FAMILIES = (
    "gguf",
    "nf4",
    "fp4",
    "fp8",
    "int8",
    "int4",
    "nvfp4",
    "bitsandbytes",
    "bnb",
    "sdnq",
    "svdquant",
    "nunchaku",
    "gptq",
    "awq",
    "quanto",
    "torchao",
    "hqq",
    "mlx",
    "mflux",
    "quantized",
    "quantised",
)


def family_aliases(part: str = "") -> list[str]:
    """Returns an alias for each family of packed files.

    part: what the node loads, such as "controlnet"; nothing for the node that comes first.
    """
    return [f"{part} {family}".lstrip() for family in FAMILIES]
