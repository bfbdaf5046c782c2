"""Which model family a set of layers belongs to, told from their names and shapes alone.

The same table reads a LoRA (its stems and the shapes its factors make) and a model (its weights),
so that the two can be compared in a sentence. Widths and depths are those of the published models,
as the host's detection reads or fixes them (`comfy/model_detection.py`, ComfyUI 0.30) and, for
Flux.2 Klein, as Black Forest Labs' `flux2` repository states them.
"""
import collections
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DOUBLE, SINGLE = r"(?P<block>\d+)", r"(?P<single>\d+)"


@dataclass(frozen=True)
class Family:
    """A published model. width: of its layers, as its layout measures it. depth: of (blocks, single
    blocks), 0: none or any."""

    name: str
    width: int
    depth: tuple[int, int] = (0, 0)
    hint: str = ""  # what trainers write about it into a LoRA's metadata, a regular expression


@dataclass(frozen=True)
class Layout:
    """Layers of one architecture.

    pieces: regular expression for a layer's name -> (rows, columns) in widths; None where it says
    nothing about the width.
    families: the published models of this layout. measure: what the width is called in a sentence.
    """

    name: str
    pieces: Mapping[str, tuple[int | None, int | None]]
    families: tuple[Family, ...]
    measure: str = "wide"


@dataclass(frozen=True)
class FamilyMatch:
    """What layers look like: the families they may belong to, the likeliest first, and the width
    found."""

    names: tuple[str, ...]
    width: int | None
    measure: str

    def __str__(self) -> str:
        return " or ".join(self.names) + (f" ({self.width} {self.measure})" if self.width else "")

    def shared(self, other: "FamilyMatch | None") -> "FamilyMatch | None":
        """The families both may be, or None when they exclude each other."""
        if other is None or (self.width and other.width and self.width != other.width):
            return None
        names = tuple(name for name in self.names if name in other.names)
        return FamilyMatch(names, self.width, self.measure) if names else None


def _diffusers(block: str, mlp: int = 4) -> dict[str, tuple]:
    """Joint attention blocks as diffusers names them."""
    return {
        rf"{block}_attn_(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)": (1, 1),
        rf"{block}_ff(_context)?_net_0_proj": (mlp, 1),
        rf"{block}_ff(_context)?_net_2": (1, mlp),
    }


_STREAMS = {
    rf"double_blocks_{DOUBLE}_(img|txt)_attn_qkv": (3, 1),
    rf"double_blocks_{DOUBLE}_(img|txt)_attn_proj": (1, 1),
    r"img_in|txt_in": (1, None),
}
_CHROMA = _STREAMS | _diffusers(f"transformer_blocks_{DOUBLE}") | {
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
_SD3 = _diffusers(f"transformer_blocks_{DOUBLE}") | {
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
# A UNet's width here is that of the text it reads, which tells its generations apart. What both
# kinds have stands in _UNET.
_UNET = {
    r".*attn2_to_[kv]": (None, 1),
    r"mid_block_.*|middle_block_.*|conv_(in|out)|time_emb.*|out_\d.*": (None, None),
}
_UNET_SD = _UNET | {
    r"(down|up)_blocks_\d_(?!.*transformer_blocks_[1-9]).*": (None, None),
    r"(input|output)_blocks_\d+_(?!.*transformer_blocks_[1-9]).*": (None, None),
}
_UNET_XL = _UNET | {
    r"down_blocks_0_(?!attentions).*|down_blocks_[12]_.*|up_blocks_[01]_.*|up_blocks_2_(?!attentions).*": (
        None, None),
    r"input_blocks_([0-3]_0|[4-8]_\d)_.*|output_blocks_([0-5]_\d|[6-8]_0)_.*|add_embedding.*|label_emb.*": (
        None, None)
}

LAYOUTS = (
    Layout(
        "Flux.1", _FLUX1, (Family("Flux.1", 3072, (19, 38), r"flux[._ -]?1|flux-(dev|schnell)"),)
    ),
    Layout(
        "Flux.2",
        _FLUX2,
        (
            Family("Flux.2 dev", 6144, (8, 48), r"flux[._ -]?2[._ -]?dev"),
            Family("Flux.2 Klein 9B", 4096, (8, 24), r"klein.*9b"),
            Family("Flux.2 Klein 4B", 3072, (5, 20), r"klein.*4b"),
        ),
    ),
    Layout(
        "Chroma",
        _CHROMA | {r"distilled_guidance_layer_.*": (None, None)},
        (Family("Chroma", 3072, (19, 38), r"chroma"),),
    ),
    Layout(
        "HunyuanVideo",
        _HUNYUAN_VIDEO,
        (
            Family("HunyuanVideo", 3072, (20, 40), r"hunyuan[._ -]?video"),
            Family("HunyuanImage 2.1", 3584, (20, 40), r"hunyuan[._ -]?image"),
            Family("HunyuanVideo 1.5", 2048, (54, 0), r"hunyuan[._ -]?video[._ -]?1\.?5"),
        ),
    ),
    Layout(
        "SD3",
        _SD3,
        (
            Family("SD3 or SD3.5 Medium", 1536, (24, 0), r"stable-diffusion-3|sd3"),
            Family("SD3.5 Large", 2432, (38, 0), r"stable-diffusion-3|sd3"),
        ),
    ),
    Layout("Qwen-Image", _QWEN_IMAGE, (Family("Qwen-Image", 3072, (60, 0), r"qwen[._ -]?image"),)),
    Layout(
        "Lumina 2",
        _LUMINA2,
        (
            Family("Z-Image", 3840, (30, 0), r"z[._ -]?image"),
            Family("Lumina 2", 2304, (26, 0), r"lumina"),
            Family("Ideogram 4", 4608, hint=r"ideogram"),
        ),
    ),
    Layout(
        "Wan",
        _WAN,
        (
            Family("Wan 2.1 or 2.2, 14B", 5120, (40, 0), r"wan.*14b"),
            Family("Wan 2.1, 1.3B", 1536, (30, 0), r"wan.*1\.3b"),
            Family("Wan 2.2, 5B", 3072, (30, 0), r"wan.*5b"),
        ),
    ),
    Layout("HiDream", _HIDREAM, (Family("HiDream", 2560, (0, 0), r"hidream"),)),
    Layout(
        "LTX-Video",
        _LTX,
        (
            Family("LTX-Video 2B", 2048, (28, 0), r"ltx"),
            Family("LTX-Video 13B", 4096, (48, 0), r"ltx"),
            Family("PixArt", 1152, (28, 0), r"pixart"),
        ),
    ),
    Layout("LTX-2", _LTX2, (Family("LTX-2", 4096, (48, 0), r"ltx[._ -]?2|ltxav"),)),
    Layout(
        "Cosmos-Predict2",
        _COSMOS,
        (
            Family("Cosmos-Predict2 2B or Anima", 2048, (28, 0), r"cosmos|anima"),
            Family("Cosmos-Predict2 14B", 5120, (36, 0), r"cosmos"),
        ),
    ),
    Layout("OmniGen2", _OMNIGEN2, (Family("OmniGen2", 2520, (32, 0), r"omnigen"),)),
    Layout(
        "Kandinsky 5",
        _KANDINSKY,
        (
            Family("Kandinsky 5 Lite", 1792, (0, 0), r"kandinsky"),
            Family("Kandinsky 5 Image", 2560, (0, 0), r"kandinsky"),
            Family("Kandinsky 5 Pro", 4096, (0, 0), r"kandinsky"),
        ),
    ),
    Layout(
        "Stable Diffusion",
        _UNET_SD,
        (
            Family("SD1.5", 768, hint=r"sd_?v?1|stable-diffusion-v1"),
            Family("SD2", 1024, hint=r"sd_?v?2|stable-diffusion-v2"),
        ),
        "wide text input",
    ),
    Layout(
        "SDXL",
        _UNET_XL,
        (Family("SDXL", 2048, hint=r"sdxl|stable-diffusion-xl"),),
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
# What stands before a layer's name in LoRA files and in the host's models.
PREFIX = re.compile(
    r"^(model\.diffusion_model\.|diffusion_model\.|base_model\.model\.|transformer\.|unet\."
    r"|lora_unet_+|lora_transformer_|lycoris_)+")


def recognise(shapes: Mapping[str, tuple[int | None, int | None]],
              metadata: Mapping[str, str] | None = None) -> FamilyMatch | None:
    """The family that layers look like, or None.

    shapes: layer name, in any of the usual spellings, -> (rows, columns), None where unknown.
    metadata: of the file; what its trainer wrote decides only between families that the layers
    leave open.
    """
    names = {PREFIX.sub("", name).replace(".", "_"): shape for name, shape in shapes.items()}
    found = [(explained, layout, *rest) for layout in LAYOUTS
             for explained, *rest in [_explain(layout, names)]]
    best = max(explained for explained, *_ in found)
    # A handful of names that happen to fit say nothing about a file of hundreds.
    if not best or best * 4 < len(names):
        return None
    found = [
        (layout, width, depth) for explained, layout, width, depth in found if explained == best
    ]
    families = [(family, layout, width) for layout, width, depth in found
                for family in layout.families
                if width in (family.width, None) and _within(depth, family.depth)]
    exact = [
        row for row in families
        if any(depth == row[0].depth for layout, _, depth in found if layout is row[1])
    ]
    families = _by_hint(exact or families, metadata or {})
    if families:
        return FamilyMatch(tuple(family.name for family, *_ in families), families[0][2],
                           families[0][1].measure)
    return FamilyMatch(tuple(layout.name for layout, *_ in found), found[0][1], found[0][0].measure)


def _explain(layout: Layout, shapes: Mapping[str,
                                             tuple]) -> tuple[int, int | None, tuple[int, int]]:
    """How many layers the layout accounts for with one width, that width, and the numbers of blocks
    seen."""
    widths, free, depth = collections.Counter(), 0, [0, 0]
    pieces = [(re.compile(pattern), size) for pattern, size in layout.pieces.items()]
    for name, shape in shapes.items():
        match, size = next(
            ((match, size) for pattern, size in pieces if (match := pattern.fullmatch(name))),
            (None, None))
        if match is None:
            continue
        measured = {
            actual / multiple for actual, multiple in zip(shape, size) if multiple and actual
        }
        if not measured:
            free += 1
        elif len(measured) == 1:
            widths[measured.pop()] += 1
        groups = match.groupdict()
        for index, group in enumerate(("block", "single")):
            if groups.get(group):
                depth[index] = max(depth[index], int(groups[group]) + 1)
    if not widths:
        return free, None, tuple(depth)
    width, count = widths.most_common(1)[0]
    return free + count, int(width), tuple(depth)


def _within(seen: tuple[int, int], depth: tuple[int, int]) -> bool:
    return all(not limit or count <= limit for count, limit in zip(seen, depth))


def _by_hint(families: list, metadata: Mapping[str, str]) -> list:
    said = hints(metadata).lower()
    return [row for row in families if re.search(row[0].hint, said)] or families


def hints(metadata: Mapping[str, str], keys: Iterable[str] = HINT_KEYS) -> str:
    """What a file's metadata says about the model it is made for; "" where it says nothing."""
    return ", ".join(dict.fromkeys(str(metadata[key]) for key in keys if metadata.get(key)))
