"""How far planned types are from the weights, by the planner's own table."""
import math
from collections.abc import Mapping

from featherweight.loaders.packing.planning.plan import relative_error


def signal_to_error(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Returns the dB of the weights' power over the error's, for weights of equal power.

    types: name -> type, or STAYS. shapes: name -> shape.
    """
    errors = sum(relative_error(type_name) * math.prod(shapes[name])
                 for name, type_name in types.items())
    values = sum(math.prod(shapes[name]) for name in types)
    return -10 * math.log10(max(errors / values, relative_error("BF16")))
