"""Finds the model family of a set of layers by their names and shapes alone.

One table serves LoRAs (layers and the shapes that their factors make) and models (weights), so that
the two can be compared. Widths and depths are those of the published models, as the host's
detection has them (`comfy/model_detection.py`, ComfyUI 0.30) and, for Flux.2 Klein, as Black Forest
Labs' `flux2` repository states them.
"""
import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .model_blocks import WRAPPERS

DOUBLE, SINGLE = r"(?P<block>\d+)", r"(?P<single>\d+)"


@dataclass(frozen=True)
class ModelFamily:
    """A published model.

    Attributes:
        name: as people know it.
        width: of its layers, as its layout measures it.
        depth: (blocks, single blocks); 0: none, or any number.
        hint: regular expression for what trainers write about it into a LoRA's metadata.
    """

    name: str
    width: int
    depth: tuple[int, int] = (0, 0)
    hint: str = ""


@dataclass(frozen=True)
class Layout:
    """The layers of one architecture.

    Attributes:
        name: of the architecture.
        pieces: regular expression for a layer's name -> (rows, columns) as multiples of the width;
            None where the size does not depend on it.
        families: the published models of this layout.
        measure: what the width is called in a sentence.
    """

    name: str
    pieces: Mapping[str, tuple[int | None, int | None]]
    families: tuple[ModelFamily, ...]
    measure: str = "wide"


@dataclass(frozen=True)
class FamilyMatch:
    """The families that layers may belong to, the likeliest first, and their width."""

    names: tuple[str, ...]
    width: int | None
    measure: str

    def __str__(self) -> str:
        return " or ".join(self.names) + (f" ({self.width} {self.measure})" if self.width else "")

    def shared(self, other: "FamilyMatch | None") -> "FamilyMatch | None":
        """Returns the families that both matches have, or None if there are none."""
        if other is None or (self.width and other.width and self.width != other.width):
            return None
        names = tuple(name for name in self.names if name in other.names)
        return FamilyMatch(names, self.width, self.measure) if names else None


# joint attention blocks with diffusers' names
_DIFFUSERS = {
    rf"transformer_blocks_{DOUBLE}_attn_(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_ff(_context)?_net_0_proj": (4, 1),
    rf"transformer_blocks_{DOUBLE}_ff(_context)?_net_2": (1, 4),
}
_STREAMS = {
    rf"double_blocks_{DOUBLE}_(img|txt)_attn_qkv": (3, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_attn_proj": (1, 1),
    r"img_in|txt_in": (1, None),
}
_CHROMA = _STREAMS | _DIFFUSERS | {
    rf"double_blocks_{DOUBLE}_(img|txt)_mlp_0": (4, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_mlp_2": (1, 4),
    rf"single_blocks_{SINGLE}_linear1": (7, 1),
    rf"single_blocks_{SINGLE}_linear2": (1, 5),
    rf"single_transformer_blocks_{SINGLE}_attn_to_[qkv]": (1, 1),
    rf"single_transformer_blocks_{SINGLE}_proj_mlp": (4, 1),
    rf"single_transformer_blocks_{SINGLE}_proj_out": (1, 5),
}
_FLUX1 = _CHROMA | {
    rf"double_blocks_{DOUBLE}_(img|txt)_mod_lin": (6, 1),
    rf"transformer_blocks_{DOUBLE}_norm1(_context)?_linear": (6, 1),
    rf"single_blocks_{SINGLE}_modulation_lin": (3, 1),
    rf"single_transformer_blocks_{SINGLE}_norm_linear": (3, 1),
    r"vector_in_(in|out)_layer|guidance_in_(in|out)_layer": (1, None),
    rf"single_blocks_{SINGLE}_linear1_qkv": (3, 1),
}
_FLUX2 = _STREAMS | {
    rf"double_blocks_{DOUBLE}_(img|txt)_mlp_0": (6, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_mlp_2": (1, 3),
    rf"single_blocks_{SINGLE}_linear1": (9, 1),
    rf"single_blocks_{SINGLE}_linear2": (1, 4),
    r"double_stream_modulation_(img|txt)_lin(ear)?": (6, 1),
    r"single_stream_modulation_lin(ear)?": (3, 1),
    rf"transformer_blocks_{DOUBLE}_attn_(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_ff(_context)?_linear_in": (6, 1),
    rf"transformer_blocks_{DOUBLE}_ff(_context)?_linear_out": (1, 3),
    rf"single_transformer_blocks_{SINGLE}_attn_to_qkv_mlp_proj": (9, 1),
    rf"single_transformer_blocks_{SINGLE}_attn_to_out": (1, 4),
}
_HUNYUAN_VIDEO = {
    rf"double_blocks_{DOUBLE}_(img|txt)_attn_qkv": (3, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_attn_proj": (1, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_mlp_(0|fc1)": (4, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_mlp_(2|fc2)": (1, 4),
    rf"double_blocks_{DOUBLE}_(img|txt)_mod_lin(ear)?": (6, 1),
    rf"single_blocks_{SINGLE}_linear1": (7, 1),
    rf"single_blocks_{SINGLE}_linear2": (1, 5),
    rf"single_blocks_{SINGLE}_modulation_lin(ear)?": (3, 1),
    r"txt_in_individual_token_refiner_blocks_\d+_self_attn_qkv": (3, 1),
    r"txt_in_individual_token_refiner_blocks_\d+_.*": (None, None),
}
_SD3 = _DIFFUSERS | {
    rf"joint_blocks_{DOUBLE}_(x|context)_block_attn2?_qkv": (3, 1),
    rf"joint_blocks_{DOUBLE}_(x|context)_block_attn2?_proj": (1, 1),
    rf"joint_blocks_{DOUBLE}_(x|context)_block_mlp_fc1": (4, 1),
    rf"joint_blocks_{DOUBLE}_(x|context)_block_mlp_fc2": (1, 4),
    rf"joint_blocks_{DOUBLE}_(x|context)_block_adaLN_modulation_1": (None, 1),
    rf"transformer_blocks_{DOUBLE}_attn2_(to_[qkv]|to_out_0)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_norm1(_context)?_linear": (None, 1),
}
_QWEN_IMAGE = {
    rf"transformer_blocks_{DOUBLE}_attn_(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_(img|txt)_mlp_net_0_proj": (4, 1),
    rf"transformer_blocks_{DOUBLE}_(img|txt)_mlp_net_2": (1, 4),
    rf"transformer_blocks_{DOUBLE}_(img|txt)_mod_1": (6, 1),
}
_LUMINA2 = {
    rf"layers_{DOUBLE}_attention_(qkv|to_[qkv])": (None, 1),
    rf"layers_{DOUBLE}_attention_(out|to_out_0|to_out)": (1, 1),
    rf"layers_{DOUBLE}_feed_forward_w[13]": (None, 1),
    rf"layers_{DOUBLE}_feed_forward_w2": (1, None),
    rf"layers_{DOUBLE}_adaLN_modulation_[01]": (None, None),
    r"(noise|context)_refiner_\d+_(attention_|feed_forward_w|adaLN).*": (None, None),
}
_WAN = {
    rf"blocks_{DOUBLE}_(self|cross)_attn_([qkvo]|[kv]_img)": (1, 1),
    rf"blocks_{DOUBLE}_ffn_0": (None, 1),
    rf"blocks_{DOUBLE}_ffn_2": (1, None),
}
_HIDREAM = {
    rf"(double|single)_stream_blocks_{DOUBLE}_block_attn1?_to_([qkv]|out)(_t)?": (1, 1),
    rf"(double|single)_stream_blocks_{DOUBLE}_block_(ff_|adaLN).*": (None, None),
}
_LTX = {
    rf"transformer_blocks_{DOUBLE}_attn1_(to_[qkv]|to_out_0)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_attn2_(to_q|to_out_0)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_attn2_to_[kv]": (1, None),
    rf"transformer_blocks_{DOUBLE}_ff_net_0_proj": (4, 1),
    rf"transformer_blocks_{DOUBLE}_ff_net_2": (1, 4),
}
_LTX2 = _LTX | {
    rf"transformer_blocks_{DOUBLE}_(audio_|video_to_audio|audio_to_video).*": (None, None)
}
_COSMOS = {
    rf"blocks_{DOUBLE}_(self|cross)_attn_q_proj": (1, 1),
    rf"blocks_{DOUBLE}_self_attn_[kv]_proj": (1, 1),
    rf"blocks_{DOUBLE}_cross_attn_[kv]_proj": (1, None),
    rf"blocks_{DOUBLE}_(self|cross)_attn_output_proj": (1, 1),
    rf"blocks_{DOUBLE}_mlp_layer1": (4, 1),
    rf"blocks_{DOUBLE}_mlp_layer2": (1, 4),
}
_OMNIGEN2 = {
    rf"layers_{DOUBLE}_attn_(to_q|to_out_0)": (1, 1),
    rf"layers_{DOUBLE}_(attn|feed_forward).*": (None, None)
}
_KANDINSKY = {
    rf"visual_transformer_blocks_{DOUBLE}_(self|cross)_attention_(to_query|out_layer)": (1, 1),
    rf"visual_transformer_blocks_{DOUBLE}_.*": (None, None),
}
# own names, and diffusers'
_KREA2 = {
    rf"blocks_{DOUBLE}_attn_(w[qo]|gate)": (1, 1),
    rf"blocks_{DOUBLE}_attn_w[kv]": (None, 1),
    rf"blocks_{DOUBLE}_mlp_(gate|up)": (None, 1),
    rf"blocks_{DOUBLE}_mlp_down": (1, None),
    rf"transformer_blocks_{DOUBLE}_attn_to_(q|gate|out(_0)?)": (1, 1),
    rf"transformer_blocks_{DOUBLE}_attn_to_[kv]": (None, 1),
    rf"transformer_blocks_{DOUBLE}_ff_(gate|up)": (None, 1),
    rf"transformer_blocks_{DOUBLE}_ff_down": (1, None),
    r"(txtfusion|text_fusion)_.*": (None, None),
    r"first|img_in|tmlp_0|time_embed_linear_1|txtmlp_1|txt_in_linear_1": (1, None),
    r"tmlp_2|time_embed_linear_2|txtmlp_3|txt_in_linear_2": (1, 1),
    r"tproj_1|time_mod_proj": (6, 1),
    r"last_linear|final_layer_linear": (None, 1),
}
_MINIMAX_H3 = {
    rf"blocks_{DOUBLE}_attn_qkv_proj": (None, 1),
    rf"blocks_{DOUBLE}_attn_out_proj": (1, None),
    rf"blocks_{DOUBLE}_mlp_fc1": (None, 1),
    rf"blocks_{DOUBLE}_mlp_fc2": (1, None),
    rf"blocks_{DOUBLE}_adaln_proj_linear": (18, None),
    r"token_refiner_blocks_\d+_.*|time_embedder_.*|final_layer_.*": (None, None),
    r"(video_patch|audio_patch|condition)_proj": (1, None),
}
# The width of a UNet is that of its text input, which differs between generations. _UNET has the
# layers that all of them share.
_UNET = {
    r".*attn2_to_[kv]": (None, 1),
    r"mid_block_.*|middle_block_.*|conv_(in|out)|time_emb.*|out_\d.*": (None, None),
}
_UNET_SD = _UNET | {
    r"(down|up)_blocks_\d_(?!.*transformer_blocks_[1-9]).*": (None, None),
    r"(input|output)_blocks_\d+_(?!.*transformer_blocks_[1-9]).*": (None, None),
}
_UNET_XL = _UNET | {
    r"down_blocks_0_(?!attentions).*|down_blocks_[12]_.*": (None, None),
    r"up_blocks_[01]_.*|up_blocks_2_(?!attentions).*": (None, None),
    r"input_blocks_([0-3]_0|[4-8]_\d)_.*|output_blocks_([0-5]_\d|[6-8]_0)_.*": (None, None),
    r"add_embedding.*|label_emb.*": (None, None),
}

LAYOUTS = (
    Layout(
        "Flux.1",
        _FLUX1,
        (ModelFamily("Flux.1", 3072, (19, 38), r"flux[._ -]?1|flux-(dev|schnell)"),),
    ),
    Layout(
        "Flux.2",
        _FLUX2,
        (
            ModelFamily("Flux.2 dev", 6144, (8, 48), r"flux[._ -]?2[._ -]?dev"),
            ModelFamily("Flux.2 Klein 9B", 4096, (8, 24), r"klein.*9b"),
            ModelFamily("Flux.2 Klein 4B", 3072, (5, 20), r"klein.*4b"),
        ),
    ),
    Layout(
        "Chroma",
        _CHROMA | {r"distilled_guidance_layer_.*": (None, None)},
        (ModelFamily("Chroma", 3072, (19, 38), r"chroma"),),
    ),
    Layout(
        "HunyuanVideo",
        _HUNYUAN_VIDEO,
        (
            ModelFamily("HunyuanVideo", 3072, (20, 40), r"hunyuan[._ -]?video"),
            ModelFamily("HunyuanImage 2.1", 3584, (20, 40), r"hunyuan[._ -]?image"),
            ModelFamily("HunyuanVideo 1.5", 2048, (54, 0), r"hunyuan[._ -]?video[._ -]?1\.?5"),
        ),
    ),
    Layout(
        "SD3",
        _SD3,
        (
            ModelFamily("SD3 or SD3.5 Medium", 1536, (24, 0), r"stable-diffusion-3|sd3"),
            ModelFamily("SD3.5 Large", 2432, (38, 0), r"stable-diffusion-3|sd3"),
        ),
    ),
    Layout(
        "Qwen-Image",
        _QWEN_IMAGE,
        (ModelFamily("Qwen-Image", 3072, (60, 0), r"qwen[._ -]?image"),),
    ),
    Layout(
        "Z-Image or Lumina 2",
        _LUMINA2,
        (
            ModelFamily("Z-Image", 3840, (30, 0), r"z[._ -]?image"),
            ModelFamily("Lumina 2", 2304, (26, 0), r"lumina"),
            ModelFamily("Ideogram 4", 4608, hint=r"ideogram"),
        ),
    ),
    Layout(
        "Wan",
        _WAN,
        (
            ModelFamily("Wan 2.1 or 2.2, 14B", 5120, (40, 0), r"wan.*14b"),
            ModelFamily("Wan 2.1, 1.3B", 1536, (30, 0), r"wan.*1\.3b"),
            ModelFamily("Wan 2.2, 5B", 3072, (30, 0), r"wan.*5b"),
        ),
    ),
    Layout("HiDream", _HIDREAM, (ModelFamily("HiDream", 2560, (0, 0), r"hidream"),)),
    Layout(
        "LTX-Video",
        _LTX,
        (
            ModelFamily("LTX-Video 2B", 2048, (28, 0), r"ltx"),
            ModelFamily("LTX-Video 13B", 4096, (48, 0), r"ltx"),
            ModelFamily("PixArt", 1152, (28, 0), r"pixart"),
        ),
    ),
    Layout("LTX-2", _LTX2, (ModelFamily("LTX-2", 4096, (48, 0), r"ltx[._ -]?2|ltxav"),)),
    Layout(
        "Cosmos-Predict2",
        _COSMOS,
        (
            ModelFamily("Cosmos-Predict2 2B or Anima", 2048, (28, 0), r"cosmos|anima"),
            ModelFamily("Cosmos-Predict2 14B", 5120, (36, 0), r"cosmos"),
        ),
    ),
    Layout("Krea 2", _KREA2, (ModelFamily("Krea 2", 6144, (28, 0), r"krea[._ -]?2"),)),
    Layout("MiniMax-H3", _MINIMAX_H3,
           (ModelFamily("MiniMax-H3", 5376, (50, 0), r"minimax[._ -]?h3"),)),
    Layout("OmniGen2", _OMNIGEN2, (ModelFamily("OmniGen2", 2520, (32, 0), r"omnigen"),)),
    Layout(
        "Kandinsky 5",
        _KANDINSKY,
        (
            ModelFamily("Kandinsky 5 Lite", 1792, (0, 0), r"kandinsky"),
            ModelFamily("Kandinsky 5 Image", 2560, (0, 0), r"kandinsky"),
            ModelFamily("Kandinsky 5 Pro", 4096, (0, 0), r"kandinsky"),
        ),
    ),
    Layout(
        "Stable Diffusion",
        _UNET_SD,
        (
            ModelFamily("SD1.5", 768, hint=r"sd_?v?1|stable-diffusion-v1"),
            ModelFamily("SD2", 1024, hint=r"sd_?v?2|stable-diffusion-v2"),
        ),
        "wide text input",
    ),
    Layout(
        "SDXL",
        _UNET_XL,
        (ModelFamily("SDXL", 2048, hint=r"sdxl|stable-diffusion-xl"),),
        "wide text input",
    ),
)

HINT_KEYS = (
    "ss_base_model_version",
    "modelspec.architecture",
    "ss_sd_model_name",
    "base_model",
    "general.architecture",
)
# prefixes of layer names in LoRA files and in the host's models


def match_family(shapes: Mapping[str, tuple[int | None, int | None]],
                 metadata: Mapping[str, str] | None = None) -> FamilyMatch | None:
    """Finds the family that layers belong to.

    Args:
        shapes: layer name, in any usual spelling, -> (rows, columns); None where unknown.
        metadata: of the file; it decides only between families that the layers leave open.

    Returns:
        The families of the best layout, or None if no layout explains the layers.
    """
    names = {WRAPPERS.sub("", name).replace(".", "_"): shape for name, shape in shapes.items()}
    fits = [_fit(layout, names) for layout in LAYOUTS]
    best = max(fit.explained for fit in fits)
    # A few matching names prove nothing about a file of hundreds.
    if not best or best * 4 < len(names):
        return None
    fits = [fit for fit in fits if fit.explained == best]
    candidates = [
        (family, fit) for fit in fits for family in fit.layout.families
        if fit.width in (family.width, None) and _is_within(fit.depth, family.depth)
    ]
    exact = [(family, fit) for family, fit in candidates if fit.depth == family.depth]
    candidates = exact or candidates
    hints = metadata_hints(metadata or {}).lower()
    candidates = [(family, fit) for family, fit in candidates
                  if re.search(family.hint, hints)] or candidates
    if not candidates:
        layouts = tuple(fit.layout.name for fit in fits)
        return FamilyMatch(layouts, fits[0].width, fits[0].layout.measure)
    families = tuple(family.name for family, _ in candidates)
    _, fit = candidates[0]
    return FamilyMatch(families, fit.width, fit.layout.measure)


class _Fit(NamedTuple):
    """How well a layout explains layers.

    Attributes:
        layout: the layout.
        explained: number of layers that it accounts for with one width.
        width: that width; None if no layer shows it.
        depth: largest number of a block and of a single block, plus 1.
    """
    layout: Layout
    explained: int
    width: int | None
    depth: tuple[int, int]


def _fit(layout: Layout, shapes: Mapping[str, tuple[int | None, int | None]]) -> _Fit:
    widths = collections.Counter()
    without_width = 0
    depth = {"block": 0, "single": 0}
    pieces = [(re.compile(pattern), multiples) for pattern, multiples in layout.pieces.items()]
    for name, shape in shapes.items():
        match, multiples = next(
            ((match, size) for pattern, size in pieces if (match := pattern.fullmatch(name))),
            (None, ()))
        if match is None:
            continue
        measured = {
            size / multiple for size, multiple in zip(shape, multiples) if multiple and size
        }
        if not measured:
            without_width += 1
        elif len(measured) == 1:
            widths[measured.pop()] += 1
        for group, number in match.groupdict().items():
            if number:
                depth[group] = max(depth[group], int(number) + 1)
    counts = depth["block"], depth["single"]
    if not widths:
        return _Fit(layout, without_width, None, counts)
    width, count = widths.most_common(1)[0]
    return _Fit(layout, without_width + count, int(width), counts)


def _is_within(counts: tuple[int, int], depth: tuple[int, int]) -> bool:
    return all(not limit or count <= limit for count, limit in zip(counts, depth))


def metadata_hints(metadata: Mapping[str, str]) -> str:
    """Returns what a file's metadata says about its model; "" if it says nothing."""
    return ", ".join(dict.fromkeys(str(metadata[key]) for key in HINT_KEYS if metadata.get(key)))
