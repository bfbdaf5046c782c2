"""Says whether a LoRA was trained on a base model or on a distilled one, and which the model is.

Both have the same shapes (FLUX.2 klein and klein base, Flux dev and schnell, a model and its Turbo
or Lightning), so only words tell them apart: in metadata, in names of files. The line names where
each word stands, and claims no more than it says.
"""
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..container.weight_file import WeightFileError, safe_repr
from ..files.diffusers_folder import MODEL_FOLDERS
from ..files.open_weights import open_weights
from ..recipe import model_paths

TURBO = "turbo"
DISTILLED = ("distilled", "distill", "schnell", TURBO, "lightning", "lcm", "hyper", "dmd", "dmd2")
BASE = ("base", "raw", "dev", "undistilled", "dedistilled")
# What trainers write about the model, and what is the LoRA's own name.
TRAINED_ON = ("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture",
              "modelspec.implementation", "base_model", "general.base_model.0.name")
OWN_NAME = ("modelspec.title", "ss_output_name", "general.name", "name")
# What a model's file says about itself.
MODEL_KEYS = ("general.name", "general.basename", "general.finetune", "modelspec.architecture",
              "modelspec.implementation", "modelspec.title", "general.base_model.0.name")
PATH_KEY = "ss_sd_model_name"  # of which some trainers write the whole path
READ = 100  # characters of a text, which a message shows whole
GUIDANCE = re.compile(r"(^|[._])guidance_(in|embedder)[._]")
UNKNOWN = "the file does not say if on a base or a distilled model"


@dataclass(frozen=True)
class Said:
    """A word on what a model is.

    Attributes:
        word: one of DISTILLED or BASE, as people write it.
        source: where it stands, as a clause; "" where the weights of the model show it.
        distilled: whether it means a distilled model.
        is_own_name: whether it is from a LoRA's own name, so that the LoRA itself may distil.
    """

    word: str
    source: str
    distilled: bool
    is_own_name: bool = False

    @property
    def model_text(self) -> str:
        """What it says of a model: "your model is turbo (distilled; its file name: 'a.gguf')"."""
        kind = "distilled" if self.distilled else "base"
        texts = [kind] if kind not in self.word else []
        texts += [self.source] if self.source else []
        return f"your model is {self.word}" + (f" ({'; '.join(texts)})" if texts else "")

    def __str__(self) -> str:
        return f"{self.word} ({self.source})"


def read_words(text: str) -> tuple[str, bool] | None:
    """Returns the word of a text that tells a base from a distilled model, and whether distilled.

    Words are whole: "turbocharged" is none. One of DISTILLED counts more, since a distilled model
    is often named after its base.
    """
    tokens = _tokens(text)
    if any(before in ("de", "un") and token.startswith("distill")
           for before, token in itertools.pairwise(tokens)):
        return "undistilled", False
    for word in (*DISTILLED, *BASE):
        if word not in tokens:
            continue
        if word == "base" and {"xl", "sdxl"} & {*tokens}:
            continue  # not the refiner: trainers write it for every SDXL
        if word == "raw" and not {"krea", "krea2"} & {*tokens}:
            continue  # as in raw photos
        return word, word in DISTILLED
    return None


def _tokens(text: str) -> list[str]:
    words = re.finditer(r"[a-z0-9]+", text[:READ + 1].lower())
    return [word[0] for word in words if word.end() <= READ]  # a last one may be cut


def _first(texts: Iterable[tuple[str, Any]], is_own_name: bool = False) -> Said | None:
    """Returns what the first of some texts says. texts: (where it stands, text)."""
    for place, text in texts:
        found = read_words(text) if isinstance(text, str) else None
        if found is not None:
            return Said(found[0], f"{place}: {safe_repr(text)}", found[1], is_own_name)
    return None


def _in_metadata(metadata: Mapping[str, Any], keys: Iterable[str]) -> list[tuple[str, Any]]:
    """Returns (where it stands, value) of each key."""
    return [
        (f"its metadata {key}",
         re.split(r"[\\/]", str(value))[-1] if key == PATH_KEY else value)
        for key in keys if (value := metadata.get(key))
    ]


def words_of_model(patcher) -> Said | None:
    """Returns what a model's file says it is, in its metadata or its name, else its weights.

    Args:
        patcher: the host's ModelPatcher.
    """
    for path in map(Path, model_paths(patcher)[:1]):
        try:
            metadata = open_weights(path).metadata
        except WeightFileError:  # gone, or of a kind that has none
            metadata = {}
        name = path.parent.name if path.name in MODEL_FOLDERS else path.name
        place = "its file name"
        said = _first([*_in_metadata(metadata, MODEL_KEYS), (place, name)])
        if said is not None:
            return said
        tokens = {*_tokens(name)}
        if "klein" in tokens and {"4b", "9b"} & tokens:  # as its publisher names it
            return Said("distilled", f"{place}: {safe_repr(name)}, klein without base", True)
    config = getattr(getattr(patcher.model, "model_config", None), "unet_config", {})
    if config.get("image_model") != "flux":
        return None
    if config.get("guidance_embed"):
        return Said("dev", "", False)
    return Said("schnell", "", True)


def words_of_lora(metadata: Mapping[str, Any], name: str, layers: Iterable[str]) -> Said | None:
    """Returns what a LoRA's file says about the model it was trained on.

    Args:
        metadata: of the file.
        name: of the file, "" where it is not known.
        layers: their names.
    """
    said = _first(_in_metadata(metadata, TRAINED_ON))
    if said is None:
        names = [*_in_metadata(metadata, OWN_NAME), ("its file name", name)]
        said = _first(names, is_own_name=True)
    if said is None and any(map(GUIDANCE.search, layers)):
        said = Said("dev", "it changes a guidance embedding, which schnell lacks", False)
    return said


def training_line(metadata: Mapping[str, Any], name: str, layers: Iterable[str],
                  model: Said | None) -> str:
    """Returns what is said of a LoRA's training and of the model that it is used on.

    Args:
        metadata, name, layers: see `words_of_lora`.
        model: of `words_of_model`.
    """
    lora = words_of_lora(metadata, name, layers)
    is_what = model.model_text if model else "the model's file does not say which it is"
    if lora is None:
        return f"{UNKNOWN}; {is_what}" if model else UNKNOWN
    effect = ""
    if lora.is_own_name and lora.distilled:
        # A style may be named after the model it is for, and turbo is such a model's name.
        other = " or is for a turbo" if lora.word == TURBO else ""
        if model is not None and model.distilled and not other:
            effect = ": expect worse images"
        return f"by its name it makes a base model fast{other}: {lora}; {is_what}{effect}"
    if model is not None and lora.distilled != model.distilled:
        effect = ": expect less effect" if model.distilled else ": expect a weak or wrong effect"
    return f"trained on {lora}; {is_what}{effect}"
