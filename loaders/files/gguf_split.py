"""Finds the files of a split GGUF model (`name-00001-of-00003.gguf`) by the name of one of them."""
import os
import re

from ..container.weight_file import safe_repr
from ..name_lists import join_some
from .gguf_header import GGUFHeader


def split_headers(header: GGUFHeader) -> list[GGUFHeader]:
    """Returns the headers of all files of a model.

    Args:
        header: header of one of the files, or of the only one.

    Raises:
        WeightFileError: a file is missing, misnamed or of another model.
    """
    path, count = header.path, header.metadata.get("split.count", 1)
    if count == 1 or count == 0:
        return [header]
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", path.name, re.IGNORECASE)
    if match is None or not isinstance(count, int) or int(match[3]) != count:
        raise header.error(
            f"it is one file of a model split into {safe_repr(count)}, but its name does not end"
            " in -00001-of-0000N.gguf, which is needed to find the others. Give all files the"
            " names they were published under.")
    paths = [
        path.with_name(f"{match[1]}{number:05d}-of-{match[3]}{match[4]}")
        for number in range(1, count + 1)
    ]
    missing = [sibling.name for sibling in paths if not os.path.exists(sibling)]
    if missing:
        raise header.error(
            f"it is one file of a model split into {count}; missing in its folder:"
            f" {join_some(missing, 1)}. Download all {count} into one folder."
        )
    headers = [header if sibling == path else GGUFHeader(sibling) for sibling in paths]
    for number, part in enumerate(headers):
        split_number = part.metadata.get("split.no")
        split_count = part.metadata.get("split.count")
        if (split_number, split_count) != (number, count):
            raise part.error(
                f"by its name it is file {number + 1} of {count}, but its metadata has split.no"
                f" {safe_repr(split_number)} and split.count {safe_repr(split_count)}. Give all"
                " files the names they were published under."
            )
    expected = headers[0].metadata.get("split.tensors.count")
    actual = sum(len(part.tensors) for part in headers)
    if expected is not None and expected != actual:
        raise header.error(
            f"the {count} files hold {actual} tensors together, {safe_repr(expected)} are expected."
            " Download all of them again from one place.")
    return headers
