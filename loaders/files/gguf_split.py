"""GGUF models split over several files (`name-00001-of-00003.gguf`), found by the name of any of
them."""
import os
import re

from .container import safe_repr
from .gguf_header import Header


def all_parts(header: Header) -> list[Header]:
    """The headers of all files of the model that `header` is one file of."""
    path, count = header.path, header.metadata.get("split.count", 1)
    if count == 1 or count == 0:
        return [header]
    names = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if names is None or not isinstance(count, int) or int(names[3]) != count:
        raise header.error(
            f"it is one file of a model split into {safe_repr(count)}, but its name does not end "
            f"in -00001-of-0000N.gguf, by which the others are found. Give all of them the names"
            " they were published under.")
    paths = [
        path.with_name(f"{names[1]}{number:05d}-of-{names[3]}{names[4]}")
        for number in range(1, count + 1)
    ]
    missing = [sibling.name for sibling in paths if not os.path.exists(sibling)]
    if missing:
        raise header.error(
            f"it is one file of a model split into {count}; {missing[0]} is missing beside it"
            f"{f' and {len(missing) - 1} more are' if missing[1:] else ''}. Download all {count}"
            " into one folder."
        )
    headers = [header if sibling == path else Header(sibling) for sibling in paths]
    for number, part in enumerate(headers):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, count):
            raise part.error(
                f"by its name it is file {number + 1} of {count}, but inside it says split.no "
                f"{safe_repr(found[0])} of split.count {safe_repr(found[1])}. Give all files the"
                " names they were published under."
            )
    expected, found = (
        headers[0].metadata.get("split.tensors.count"),
        sum(len(part.tensors) for part in headers),
    )
    if expected is not None and expected != found:
        raise header.error(
            f"the {count} files hold {found} tensors together, {safe_repr(expected)} are expected. "
            f"Download all of them again from one place.")
    return headers
