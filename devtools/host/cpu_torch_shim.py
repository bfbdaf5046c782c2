"""Lets torchvision and torchaudio wheels built for CUDA be imported beside a CPU build of torch,
and torchaudio beside a newer torch, of which there is none.

Copied into the virtual environment's site-packages and imported by a `.pth` file at every start of
its Python, so it must cost nothing until one of the two is imported.
"""
import importlib.abc
import importlib.machinery
import sys


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Declares the operators torchvision expects, and stands in for torchaudio's extension
    module."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None and _torch_is_cpu():
            import torch
            # torchvision's own Python registers fakes for these two while it is imported.
            type(self).library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        elif name == "torchaudio._extension" and (_torch_is_cpu() or _torch_is_newer()):
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module._IS_TORCHAUDIO_EXT_AVAILABLE = module._IS_ALIGN_AVAILABLE = (
            module._IS_RIR_AVAILABLE
        ) = False
        module.fail_if_no_align = lambda function: function
        module._check_cuda_version = module.lazy_import_sox_ext = lambda: None


def _torch_is_cpu() -> bool:
    import torch
    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def _torch_is_newer() -> bool:
    import importlib.metadata

    import torch
    return (importlib.metadata.version("torchaudio").split(".")[:2]
            != torch.__version__.split(".")[:2])


sys.meta_path.insert(0, _Finder())
