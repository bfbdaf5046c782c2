"""Groups the tensors of LoRA files into layers by the endings of their names."""
import collections
import re
from collections.abc import Iterable

# Name endings of the two factors of a LoRA, up and down, in all spellings that the host reads.
PRODUCTS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
)
# Name endings of two tensors of which a layer needs both.
PAIRS = (
    *PRODUCTS,
    (".hada_w1_a", ".hada_w1_b"),
    (".hada_w2_a", ".hada_w2_b"),
    (".hada_t1", ".hada_t2"),
    (".lokr_w1_a", ".lokr_w1_b"),
    (".lokr_w2_a", ".lokr_w2_b"),
    (".a1.weight", ".a2.weight"),
    (".b1.weight", ".b2.weight"),
)
# Name endings of two pairs of which a layer needs both.
SIDES = ((".hada_w1_a", ".hada_w2_a"), (".a1.weight", ".b1.weight"))
PARTNER = {name: other for pair in PAIRS for name, other in (pair, pair[::-1])}
WHOLE = (
    ".lokr_w1",
    ".lokr_w2",
    ".oft_blocks",
    ".diff",
    ".diff_b",
    ".set_weight",
    ".w_norm",
    ".b_norm",
)
SINGULAR = ".lora_E"  # of an AdaLoRA: the factors of its ranks
MAGNITUDE = ".lora_magnitude_vector"  # of a DoRA as PEFT computes it
OPTIONAL = (
    ".alpha",
    ".dora_scale",
    MAGNITUDE,
    SINGULAR,
    ".lora_mid.weight",
    ".lokr_t2",
    ".rescale",
    ".reshape_weight",
)
ENDS = sorted((*PARTNER, *WHOLE, *OPTIONAL), key=len, reverse=True)

TEXT_STEM = re.compile(r"(lora_te|lora_prior_te|text_encoder|te\d?[._]|lycoris_te)")


def is_text_name(name: str) -> bool:
    """Returns whether a name says that its layer belongs to a text encoder."""
    return TEXT_STEM.match(name) is not None


def layer_names(names: Iterable[str]) -> dict[str, set[str]]:
    """Returns layer name -> name endings of its tensors, for layers that change a weight."""
    stems = collections.defaultdict(set)
    for name in names:
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is not None:
            stems[name.removesuffix(end)].add(end)
    return {stem: ends for stem, ends in stems.items() if not ends <= set(OPTIONAL)}
