"""The models that are told apart, and what each needs: layers, packing, text encoders, pipelines.

No model must be here to load. A row only adds what a file alone does not say: which LoRAs fit,
which parts converters keep exact, which text encoders and VAE belong to it. Widths and depths are
those of the published models, as the host's detection has them (`comfy/model_detection.py`, ComfyUI
0.30) and, for Flux.2 Klein, as Black Forest Labs' `flux2` repository states them.
"""
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from comfy.supported_models_base import BASE

from .packing_rules import GENERAL_RULES, KEEP_EXACT, KEEP_EXACT_IN_ROWS, PackingRules, Shapes

DOUBLE, SINGLE = r"(?P<block>\d+)", r"(?P<single>\d+)"


@dataclass(frozen=True)
class Model:
    """A published model.

    Where several of a family need the same, the first says it.

    Attributes:
        name: as people know it.
        width: of its layers, as its family measures it; 0: not told by widths.
        depth: (blocks, single blocks); 0: none, or any number.
        hint: regular expression for what trainers write about it into a LoRA's metadata.
        host: the host's class of its configuration; derived classes without a row count as it.
        clip_type: the `type` of its text encoders in the loaders.
        encoders: keys of `encoder_sets.TITLES` that go together; a | between those of which one is
            enough. Of three and more, any one and any two work too.
        also: encoders that its type takes alone, too.
        text_width: columns of its text input, where they tell models of one `host` apart.
        pipelines: how the names of its diffusers pipelines begin, in lower case.
        experts: files of which each is the model in a part of the steps.
    """

    name: str
    width: int = 0
    depth: tuple[int, int] = (0, 0)
    hint: str = ""
    host: str = ""
    clip_type: str = ""
    encoders: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    text_width: int = 0
    pipelines: tuple[str, ...] = ()
    experts: int = 1

    @property
    def encoder_groups(self) -> list[set[str]]:
        """The encoders that go together, one of each group."""
        return [set(group.split("|")) for group in self.encoders]


@dataclass(frozen=True)
class Family:
    """Models whose layers have the same names.

    Attributes:
        name: of the architecture.
        models: the published ones.
        layers: regular expression for a layer's name -> (rows, columns) as multiples of the width;
            None where the size does not depend on it.
        measure: what the width is called in a sentence.
        packing: which of its tensors may be packed; None for the rules of any model.
    """

    name: str
    models: tuple[Model, ...] = ()
    layers: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    measure: str = "wide"
    packing: PackingRules | None = None


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

EXACT_IN_UNETS = (
    r"^(class|time|add)_embedding\.|^time_embed\.|^label_emb\.|^conv_(in|out)\."
    r"|^input_blocks\.0\.0\.|^out\."
)
TEXT_ENCODER = PackingRules(
    "text encoder", "",
    signature=(
        r"^(encoder\.block\.0\.layer\.0\."
        r"|((text_)?model\.)?(language_model\.|encoder\.)?layers\.\d+\.(self_attn|attn)\."
        r"|encoder\.layer\.0\.attention\.)"
        r"|(^|\.)text_model\.embeddings\.token_embedding\."
    ),
    exact=(
        r"relative_attention_bias|position_embedding|^text_projection|^(model\.)?visual\."
        r"|vision|multi_modal|token_type"
    ),
    embedding=(
        r"^shared\.|(^|\.)(embed_tokens|token_embedding|word_embeddings|lm_head)\.weight$"
    ),
    exact_in_rows=r"in_proj_[ab]\.|(^|\.)mtp\.|per_layer_(input_gate|projection)|audio",
)


def _needs(name: str, host: str, clip_type: str, *encoders: str,
           pipelines: tuple[str, ...] = ()) -> Model:
    return Model(name, host=host, clip_type=clip_type, encoders=encoders, pipelines=pipelines)


# The likeliest first, for LoRAs that fit several. Of those whose `packing` fits, the last counts.
FAMILIES = (
    Family("text encoder", packing=TEXT_ENCODER),
    Family(
        "Flux.1",
        (
            Model("Flux.1", 3072, (19, 38), r"flux[._ -]?1|flux-(dev|schnell)", "Flux", "flux",
                  ("CLIP_L", "T5_XXL"), pipelines=("flux",)),
        ),
        _FLUX1,
        packing=PackingRules(
            "flux", "flux",
            signature=r"^double_blocks\.\d+\.img_attn\.norm\.key_norm\.",
            exact=r"^(txt|img|time|vector|guidance)_in\.|^final_layer\.",
        ),
    ),
    Family(
        "Flux.2",
        (
            Model("Flux.2 dev", 6144, (8, 48), r"flux[._ -]?2[._ -]?dev", "Flux2", "flux2",
                  ("MISTRAL3_24B",), ("MISTRAL3_24B_PRUNED_FLUX2",), 15360, ("flux2",)),
            Model("Flux.2 Klein 9B", 4096, (8, 24), r"klein.*9b", "Flux2", "flux2", ("QWEN3_8B",),
                  ("QWEN3VL_8B",), 12288),
            Model("Flux.2 Klein 4B", 3072, (5, 20), r"klein.*4b", "Flux2", "flux2", ("QWEN3_4B",),
                  ("QWEN3VL_4B",), 7680),
        ),
        _FLUX2,
        packing=PackingRules(
            "flux2", "flux",
            signature=r"^double_stream_modulation_img\.",
            exact=r"^(txt|img|time|vector|guidance)_in\.|^final_layer\.",
        ),
    ),
    Family(
        "Chroma",
        (
            Model("Chroma", 3072, (19, 38), r"chroma", "Chroma", "chroma", ("T5_XXL",),
                  pipelines=("chroma",)),
        ),
        _CHROMA | {r"distilled_guidance_layer_.*": (None, None)},
        packing=PackingRules(
            "chroma", "flux",
            signature=r"^distilled_guidance_layer\.",
            exact=r"^(txt|img)_in(_patch)?\.|^final_layer\.|^distilled_guidance_layer\.|^nerf_",
        ),
    ),
    Family(
        "HunyuanVideo",
        (
            Model("HunyuanVideo", 3072, (20, 40), r"hunyuan[._ -]?video", "HunyuanVideo",
                  "hunyuan_video", ("CLIP_L", "LLAMA3_8"), pipelines=("hunyuanvideo",)),
            Model("HunyuanImage 2.1", 3584, (20, 40), r"hunyuan[._ -]?image", "HunyuanImage21",
                  "hunyuan_image", ("QWEN25_7B", "BYT5_SMALL_GLYPH"), ("QWEN25_7B",),
                  pipelines=("hunyuanimage",)),
            Model("HunyuanVideo 1.5", 2048, (54, 0), r"hunyuan[._ -]?video[._ -]?1\.?5",
                  "HunyuanVideo15", "hunyuan_video_15", ("QWEN25_7B", "BYT5_SMALL_GLYPH"),
                  pipelines=("hunyuanvideo15",)),
        ),
        _HUNYUAN_VIDEO,
        packing=PackingRules(
            "hyvid", "hyvid",
            signature=r"^txt_in\.individual_token_refiner\.",
            exact=(
                r"^(txt|img|time|time_r|vector|guidance|byt5|vision)_in\.|^final_layer\."
                r"|^cond_type_embedding"
            ),
        ),
    ),
    Family(
        "SD3",
        (
            Model("SD3 or SD3.5 Medium", 1536, (24, 0), r"stable-diffusion-3|sd3", "SD3", "sd3",
                  ("CLIP_L", "CLIP_G", "T5_XXL"), pipelines=("stablediffusion3",)),
            Model("SD3.5 Large", 2432, (38, 0), r"stable-diffusion-3|sd3"),
        ),
        _SD3,
        packing=PackingRules(
            "sd3", "sd3",
            signature=r"^joint_blocks\.\d+\.context_block\.",
            exact=(
                r"^final_layer\.|time_text_embed|^(context|t|y|x)_embedder\.|^proj_out\.|^pos_embed"
                r"|^context_processor\."
            ),
        ),
    ),
    Family(
        "Qwen-Image",
        (
            Model("Qwen-Image", 3072, (60, 0), r"qwen[._ -]?image", "QwenImage", "qwen_image",
                  ("QWEN25_7B",), pipelines=("qwenimage",)),
        ),
        _QWEN_IMAGE,
        packing=PackingRules(
            "qwen_image", "qwen_image",
            signature=r"^time_text_embed\.timestep_embedder\.linear_1\.bias$",
            exact=r"^time_text_embed\.|^(img|txt)_in\.|^norm_out\.|^proj_out\.",
            exact_in_rows=r"^transformer_blocks\.0\.img_mod\.",
        ),
    ),
    Family(
        "Lens",
        (
            Model("Lens", host="Lens", clip_type="lens", encoders=("GPT_OSS_20B",)),
        ),
        packing=PackingRules(
            "lens", "qwen_image",
            signature=r"^transformer_blocks\.\d+\.attn\.img_qkv\.",
            exact=r"^time_text_embed\.|^(img|txt)_in\.|^norm_out\.|^proj_out\.",
            exact_in_rows=r"\.(img|txt)_mod\.",
        ),
    ),
    Family(
        "Z-Image or Lumina 2",
        (
            Model("Z-Image", 3840, (30, 0), r"z[._ -]?image", "ZImage", "lumina2", ("QWEN3_4B",),
                  pipelines=("zimage",)),
            Model("Lumina 2", 2304, (26, 0), r"lumina", "Lumina2", "lumina2", ("GEMMA_2_2B",),
                  ("GEMMA_3_4B", "GEMMA_3_4B_VISION"), pipelines=("lumina",)),
            Model("Ideogram 4", 4608, (0, 0), r"ideogram", "Ideogram4", "ideogram4",
                  ("QWEN3_8B|QWEN3VL_8B",), pipelines=("ideogram4",)),
        ),
        _LUMINA2,
        packing=PackingRules(
            "lumina2", "lumina2",
            signature=r"^cap_embedder\.1\.weight$",
            exact=r"^(t|x|cap|siglip)_embedder\.|^final_layer\.|^(context|noise|siglip)_refiner\.",
            exact_in_rows=r"adaLN_modulation",
        ),
    ),
    Family(
        "Wan",
        (
            Model("Wan 2.1 or 2.2, 14B", 5120, (40, 0), r"wan.*14b", "WAN21_T2V", "wan",
                  ("UMT5_XXL",), pipelines=("wan", "skyreelsv2"), experts=2),
            Model("Wan 2.1, 1.3B", 1536, (30, 0), r"wan.*1\.3b"),
            Model("Wan 2.2, 5B", 3072, (30, 0), r"wan.*5b"),
        ),
        _WAN,
        packing=PackingRules(
            "wan", "wan",
            signature=r"^head\.modulation$",
            exact=(
                r"modulation$|^patch_embedding|^(text|time)_(embedding|projection)\.|^img_emb\."
                r"|^head\."
            ),
            exact_in_rows=(
                r"audio_encoder|frame_packer|cond_encoder|face_(encoder|adapter)|motion_encoder"
                r"|audio_injector|control_adapter"
            ),
        ),
    ),
    Family(
        "HiDream",
        (
            Model("HiDream", 2560, (0, 0), r"hidream", "HiDream", "hidream",
                  ("CLIP_L", "CLIP_G", "T5_XXL", "LLAMA3_8"), pipelines=("hidreamimage",)),
        ),
        _HIDREAM,
        packing=PackingRules(
            "hidream", "hidream",
            signature=r"^caption_projection\.0\.linear\.weight$",
            exact=r"^(p|t|x)_embedder\.|^final_layer\.|ff_i\.gate\.|^caption_projection\.",
        ),
    ),
    Family(
        "LTX-Video",
        (
            Model("LTX-Video 2B", 2048, (28, 0), r"ltx", "LTXV", "ltxv", ("T5_XXL",),
                  pipelines=("ltx",)),
            Model("LTX-Video 13B", 4096, (48, 0), r"ltx"),
            Model("PixArt", 1152, (28, 0), r"pixart", "PixArtAlpha", "pixart", ("T5_XXL",),
                  pipelines=("pixart",)),
        ),
        _LTX,
        packing=PackingRules(
            "ltxv", "ltxv",
            signature=r"^adaln_single\.emb\.timestep_embedder\.linear_1\.bias$",
            exact=(
                r"adaln_single\.|caption_projection\.|patchify_proj\.|proj_out\.|scale_shift_table"
                r"|embeddings_connector\."
            ),
            exact_in_rows=r"to_gate_logits",
            outer_blocks=(2, 2),
        ),
    ),
    Family(
        "LTX-2",
        (
            Model("LTX-2", 4096, (48, 0), r"ltx[._ -]?2|ltxav", "LTXAV", "ltxv", ("GEMMA_3_12B",)),
        ),
        _LTX | {
            rf"transformer_blocks_{DOUBLE}_(audio_|video_to_audio|audio_to_video).*": (None, None)
        },
    ),
    Family(
        "Cosmos-Predict2",
        (
            Model("Cosmos-Predict2 2B or Anima", 2048, (28, 0), r"cosmos|anima",
                  "CosmosT2IPredict2", "cosmos", ("T5_XXL_OLD",),
                  pipelines=("cosmos2text", "cosmos2video")),
            Model("Cosmos-Predict2 14B", 5120, (36, 0), r"cosmos"),
        ),
        _COSMOS,
        packing=PackingRules(
            "cosmos", "cosmos",
            signature=(
                r"^blocks\.(block)?0\..*adaln_modulation_self_attn\.1\.weight$|^blocks\.block0\."
            ),
            exact=r"^(x|t|extra_pos)_embedder|^final_layer\.|^affline_norm|^llm_adapter\.",
            exact_in_rows=r"^blocks\.1\.adaln_modulation",
            outer_blocks=(1, 0),
        ),
    ),
    Family(
        "Krea 2",
        (
            Model("Krea 2", 6144, (28, 0), r"krea[._ -]?2", "Krea2", "krea2", ("QWEN3VL_4B",),
                  pipelines=("krea2",)),
        ),
        _KREA2,
    ),
    Family(
        "MiniMax-H3",
        (
            Model("MiniMax-H3", 5376, (50, 0), r"minimax[._ -]?h3", "MiniMaxH3", "minimax",
                  ("QWEN3VL_32B",)),
        ),
        _MINIMAX_H3,
    ),
    Family(
        "OmniGen2",
        (
            Model("OmniGen2", 2520, (32, 0), r"omnigen", "Omnigen2", "omnigen2", ("QWEN25_3B",),
                  pipelines=("omnigen2",)),
        ),
        _OMNIGEN2,
        packing=PackingRules(
            "omnigen2", "",  # and Boogu
            signature=r"^time_caption_embed\.",
            exact=KEEP_EXACT,
            exact_in_rows=KEEP_EXACT_IN_ROWS,
        ),
    ),
    Family(
        "Kandinsky 5",
        (
            Model("Kandinsky 5 Lite", 1792, (0, 0), r"kandinsky", "Kandinsky5", "kandinsky5",
                  ("QWEN25_7B", "CLIP_L"), pipelines=("kandinsky5",)),
            Model("Kandinsky 5 Image", 2560, (0, 0), r"kandinsky", "Kandinsky5Image",
                  "kandinsky5_image", ("QWEN25_7B", "CLIP_L"),
                  pipelines=("kandinsky5t2i", "kandinsky5i2i")),
            Model("Kandinsky 5 Pro", 4096, (0, 0), r"kandinsky"),
        ),
        _KANDINSKY,
    ),
    Family(
        "Stable Diffusion",
        (
            Model("SD1.5", 768, hint=r"sd_?v?1|stable-diffusion-v1", host="SD15",
                  clip_type="stable_diffusion", encoders=("CLIP_L",)),
            Model("SD2", 1024, hint=r"sd_?v?2|stable-diffusion-v2", host="SD20",
                  encoders=("CLIP_H",)),
        ),
        _UNET_SD,
        "wide text input",
        packing=PackingRules(
            "sd1", "sd1",
            signature=r"^input_blocks\.0\.0\.weight$",
            exact=EXACT_IN_UNETS,
            convolutions="F16",
        ),
    ),
    Family(
        "SDXL",
        (
            Model("SDXL", 2048, hint=r"sdxl|stable-diffusion-xl", host="SDXL", clip_type="sdxl",
                  encoders=("CLIP_L", "CLIP_G")),
        ),
        _UNET_XL,
        "wide text input",
        packing=PackingRules(
            "sdxl", "sdxl",
            signature=r"^label_emb\.",
            exact=EXACT_IN_UNETS,
            convolutions="F16",
        ),
    ),
    Family(
        "AuraFlow",
        (
            Model("AuraFlow", host="AuraFlow", encoders=("T5_XL",)),
        ),
        packing=PackingRules(
            "aura", "aura",
            signature=r"^double_layers\.0\.attn\.w1q\.weight$",
            exact=(
                r"^(t_embedder|init_x_linear|cond_seq_linear|modF|final_linear)\b"
                r"|^positional_encoding|^register_tokens"
            ),
        ),
    ),
)
# Models that are not told by their layers, and what they need.
OTHER_MODELS = (
    _needs("ACE-Step 1.0", "ACEStep", "ace", "UMT5_BASE"),
    _needs("ACE-Step 1.5", "ACEStep15", "ace", "QWEN3_06B", "QWEN3_2B|QWEN3_4B"),
    _needs("Anima", "Anima", "", "QWEN3_06B"),
    _needs("Boogu", "Boogu", "boogu", "QWEN3VL_8B"),
    _needs("CogVideoX", "CogVideoX_T2V", "cogvideox", "T5_XXL", pipelines=("cogvideox",)),
    _needs("Cosmos", "CosmosT2V", "cosmos", "T5_XXL_OLD",
           pipelines=("cosmostext", "cosmosvideo")),
    _needs("HunyuanDiT", "", "hunyuan_dit", pipelines=("hunyuandit",)),
    _needs("JoyAI-Image", "JoyImage", "joyimage", "QWEN3VL_8B", pipelines=("joyimage",)),
    _needs("LongCat-Image", "LongCatImage", "longcat_image", "QWEN25_7B",
           pipelines=("longcatimage",)),
    _needs("Mage-Flow", "MageFlow", "mage", "QWEN3VL_4B"),
    _needs("Mochi", "GenmoMochi", "mochi", "T5_XXL", pipelines=("mochi",)),
    _needs("NewBie", "", "newbie", "GEMMA_3_4B|GEMMA_3_4B_VISION", "JINA_CLIP_2"),
    _needs("Ovis-Image", "", "ovis", "QWEN3_2B", pipelines=("ovisimage",)),
    _needs("PixelDiT", "PixelDiTT2I", "pixeldit", "GEMMA_2_2B"),
    _needs("SDXL Refiner", "SDXLRefiner", "", "CLIP_G"),
    _needs("Stable Audio", "StableAudio", "stable_audio", "T5_BASE|T5_GEMMA",
           pipelines=("stableaudio",)),
    _needs("Stable Cascade", "", "stable_cascade", "CLIP_G", pipelines=("stablecascade",)),
)
MODELS = (*(model for family in FAMILIES for model in family.models), *OTHER_MODELS)


def model_of(config: BASE) -> Model | None:
    """Returns the model of the first of a configuration's classes that one has, and with encoders.

    config: the host's, of a diffusion model.
    """
    text_width = config.unet_config.get("context_in_dim")
    for host in (cls.__name__ for cls in type(config).__mro__):
        found = [model for model in MODELS if model.host == host and model.encoders]
        if found:
            return next((model for model in found if model.text_width == text_width), found[0])
    return None


def rules_for(shapes: Shapes) -> PackingRules:
    """Returns the rules for a model by the names of its tensors, the host's without prefix."""
    for family in reversed(FAMILIES):
        if family.packing and any(re.search(family.packing.signature, name) for name in shapes):
            return family.packing
    return GENERAL_RULES
