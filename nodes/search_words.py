"""Words by which the editor's search finds nodes.

The search ranks a word in a title before one in an alias, so loaders of what is published as GGUF
have that in their titles. An alias that begins with the word comes before one that has it later. So
of several nodes that read the same files, the one that most people look for has the families of
files alone, and the others have them behind what they load. All words that are typed must be in one
alias, in any order, so a phrase is one of its own; those of the others begin with no family. Each
alias with a word makes its node come nearer to the first.
"""
from ..loaders import families
from ..loaders.encoders.encoder_sets import TITLES

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
_FIRST_WORDS = {model.name.split()[0].lower()
                for family in families.FAMILIES for model in family.models}
# such as flux.1 and flux, and the kinds of text encoders
MODELS = sorted(_FIRST_WORDS | {word.partition(".")[0] for word in _FIRST_WORDS})
ENCODERS = sorted({key.lower().partition("_")[0] for key in TITLES})
FORMATS = "gguf nf4 fp8"  # behind such a name: the editor finds nothing after 30 letters
# what people type who know the nodes of other packs, or a type, a model or a card
MODEL_WORDS = (
    "gguf loader", "unet loader (gguf)", "unet loader gguf", "nf4 loader",
    "nunchaku flux dit loader", "nunchaku qwen-image dit loader", "q3_k", "q4_k", "q4_k_m", "q5_k",
    "q6_k", "q8_0", "fit this gpu", "pack to", "out of memory", "oom", "black image",
    *(f"{name} {FORMATS}" for name in MODELS),
    *(f"{size}gb vram" for size in (6, 8, 10, 12, 16, 24, 32)))
# with more formats the node of encoders would come first for nf4 and fp8
ENCODER_WORDS = ("dualcliploader (gguf)", "quadruplecliploader (gguf)",
                 "text encoder loader nunchaku", *(f"{name} gguf" for name in ENCODERS))
CHECKPOINT_WORDS = ("checkpoint loader nf4", "checkpoint loader gguf")
SAVING_WORDS = ("convert to gguf", "quantize gguf converter")
PLACING_WORDS = ("memory", "gpu memory", "multigpu loader", "distorch2")


def family_aliases(part: str = "") -> list[str]:
    """Returns an alias for each family of quantized files.

    part: what the node loads, such as "controlnet"; nothing for the node that comes first.
    """
    return [f"{part} {family}".lstrip() for family in FAMILIES]
