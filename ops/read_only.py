"""Tensors in memory that may not be written, such as a mapped file: torch itself does not remember."""
import torch

MARK = "_featherweight_read_only"  # on the storage, which views of a tensor share


def mark_read_only(tensor: torch.Tensor):
    setattr(tensor.untyped_storage(), MARK, True)


def is_read_only(tensor: torch.Tensor) -> bool:
    """Whether this tensor, or the one it is a view of, was marked. Packed tensors: ask for their bytes."""
    return tensor.device.type == "cpu" and getattr(tensor.untyped_storage(), MARK, False)
