"""All packed formats; importing this package registers them in `ops.format`."""
from . import (  # noqa: F401  each registers what it defines
    bnb_4bit,
    bnb_int8,
    column_groups,
    comfy,
    iq1,
    iq2,
    iq3,
    iq4,
    k_quants,
    legacy,
    micro_fp4,
    plain,
    q1_0,
    q2_0,
    svdquant,
    ternary,
)
