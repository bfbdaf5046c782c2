"""One file of a text encoder: its weights and tokenizer under the host's names."""
from pathlib import Path

import comfy.sd
import comfy.utils
import torch

from ..comfyui.comfy_quant_weights import as_tensors, read_marked
from ..comfyui.contents import unwrap_encoder
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFile, WeightFileError, model_name
from ..encoders import archs  # noqa: F401  registers the families
from ..encoders.arch import (
    SENTENCEPIECE,
    TOKENIZER_NAMES,
    Arch,
    Weights,
    arch_of,
)
from ..encoders.encoder_sets import TOKENIZER_OF
from ..encoders.saved_tokenizer import saved_tokenizer
from ..encoders.tokenizer import TokenizerError
from ..files.open_weights import open_weights
from ..progress import Progress
from .loader_choice import needs_own_reader
from .pack_on_load import PackTo

# cache of `Arch.tokenizer`: state of the files of a GGUF -> its tokenizer
TOKENIZERS: dict[tuple, Weights] = {}
TOKENIZERS_KEPT = 4


class EncoderFile:
    """One file of a text encoder, which is read and converted to the host's names."""

    def __init__(self, path: str, progress: Progress, pack_to: PackTo | None,
                 formats: frozenset[str]):
        self.path = Path(path)
        self.name = model_name(path)
        self.arch: type[Arch] | None = None
        self.file: WeightFile | None = None  # None: the host has read it
        self.tower = ""  # name of its mmproj file
        self.tower_notes: list[str] = []  # on it, or on those of a similar name that do not fit
        if not needs_own_reader(path, pack_to, formats):
            weights, metadata = comfy.utils.load_torch_file(path, safe_load=True,
                                                            return_metadata=True)
            self.weights, self.metadata = comfy.utils.convert_old_quants(
                weights, model_prefix="", metadata=metadata)
            self.weights = unwrap_encoder(self.weights)
            if comfy.sd.detect_te_model(self.weights) is None:
                self.arch = arch_of(self.weights)
            progress.stage()
            return
        self.file = file = open_weights(path)
        weights, self.metadata = read_marked(file, progress.track), file.metadata
        if not pack_to:
            weights = as_tensors(file, weights, formats=formats)
        self.weights = unwrap_encoder(weights)
        if self.path.is_dir():
            te_model = comfy.sd.detect_te_model(self.weights)
            tokenizer = TOKENIZER_OF.get(te_model.name if te_model else "", SENTENCEPIECE)
            self.weights |= saved_tokenizer(self.path, tokenizer)
        if pack_to:
            self.weights = as_tensors(file, self.weights)
        self.arch = arch_of(self.weights)
        if self.arch is None and any(name.startswith(("v.blk.", "mm.")) for name in self.weights):
            raise WeightFileError(
                f"{self.name} is the vision part (mmproj) of a text encoder, expected the encoder."
                " Pick that here, and this file in the mmproj input of Load Text Encoder"
                " (GGUF, Featherweight).")

    def convert(self) -> Weights:
        """Returns the weights with the host's names, and tensors for the host's tokenizer."""
        if self.arch is None:
            # GGUF has no uint8.
            return self.weights | {name: self.weights[name].to(torch.uint8, copy=True)
                                   for name in TOKENIZER_NAMES if name in self.weights}
        try:
            tokenizer = self._tokenizer(self.arch)
        except KeyError as error:
            # `reject_missing_tokenizers` names what is missing in other formats.
            if self.path.suffix.lower() != ".gguf":
                return self._converted(self.arch)
            raise WeightFileError(
                f"{self.name} has no {error.args[0]} in its metadata, from which its tokenizer is"
                " made. Get another conversion of the model.") from error
        except TokenizerError as error:
            raise WeightFileError(
                f"{self.name}: in its metadata {error}. Get another conversion of the model."
            ) from error
        return self._converted(self.arch) | tokenizer

    def _converted(self, arch: type[Arch]) -> Weights:
        try:
            return arch.convert(self.weights, self.metadata)
        except KeyError as error:
            raise WeightFileError(f"{self.name} has no weight for {error.args[0]!r} of the model."
                                  f" {DOWNLOAD_AGAIN}") from error

    def _tokenizer(self, arch: type[Arch]) -> Weights:
        """Returns `Arch.tokenizer` of the file; raises KeyError for missing metadata.

        That of a GGUF, which takes seconds to make, is cached.
        """
        is_cached = self.path.suffix.lower() == ".gguf"
        state = self.path, self.file and self.file.states
        if is_cached and state in TOKENIZERS:
            return TOKENIZERS[state]
        tokenizer = arch.tokenizer(self.weights, self.metadata)
        # A tensor of the file would keep the whole file mapped.
        tokenizer = {name: tensor.clone() for name, tensor in tokenizer.items()}
        if is_cached:
            TOKENIZERS[state] = tokenizer
            if len(TOKENIZERS) > TOKENIZERS_KEPT:
                del TOKENIZERS[next(iter(TOKENIZERS))]
        return tokenizer
