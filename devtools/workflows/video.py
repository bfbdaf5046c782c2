"""Video: Wan 2.1, Wan 2.2 and LTX-2."""
from devtools.workflows.editor import File, Node, Workflow
from devtools.workflows.parts import (
    diffusion_model,
    lora,
    picture,
    prompt,
    sampled_step_by_step,
    text_encoder,
    vae,
)

MOVING = (
    "a white feather drifts down onto a brass balance scale, which tips slowly, soft morning"
    " light, fixed camera"
)
NEGATIVE = "blurry, overexposed, still picture, text, watermark, low quality, deformed"
WAN_LORAS = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"

UMT5 = File(
    "text_encoders", "city96/umt5-xxl-encoder-gguf", "umt5-xxl-encoder-Q5_K_M.gguf", "4.1 GB"
)
WAN_21 = File(
    "diffusion_models", "city96/Wan2.1-T2V-14B-gguf", "wan2.1-t2v-14b-Q4_K_M.gguf", "10.1 GB"
)
VACE = File(
    "diffusion_models",
    "Kijai/WanVideo_comfy",
    "Wan2_1-VACE_module_14B_fp8_e4m3fn.safetensors",
    "3.1 GB",
)
WAN_5B = File(
    "diffusion_models", "QuantStack/Wan2.2-TI2V-5B-GGUF", "Wan2.2-TI2V-5B-Q4_K_M.gguf", "3.4 GB"
)
WAN_VAE_22 = File(
    "vae",
    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
    "split_files/vae/wan2.2_vae.safetensors",
    "1.4 GB",
)
WAN_VAE_21 = File(
    "vae",
    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
    "split_files/vae/wan_2.1_vae.safetensors",
    "0.3 GB",
)
WAN_HIGH = File("diffusion_models", "QuantStack/Wan2.2-T2V-A14B-GGUF",
                "HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "9.8 GB")
WAN_LOW = File(
    "diffusion_models",
    "QuantStack/Wan2.2-T2V-A14B-GGUF",
    "LowNoise/Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf",
    "9.8 GB",
)
HIGH_LORA = File(
    "loras",
    WAN_LORAS,
    "split_files/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
    "1.2 GB",
)
LOW_LORA = File(
    "loras",
    WAN_LORAS,
    "split_files/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors",
    "1.2 GB",
)

LTX_GGUF = File(
    "diffusion_models",
    "Kijai/LTXV2_comfy",
    "diffusion_models/ltx-2-19b-distilled_Q4_K_M.gguf",
    "12.7 GB",
)
LTX_CONNECTOR = File(
    "text_encoders",
    "Kijai/LTXV2_comfy",
    "text_encoders/ltx-2-19b-embeddings_connector_distill_bf16.safetensors",
    "2.9 GB",
)
GEMMA = File("text_encoders", "unsloth/gemma-3-12b-it-GGUF", "gemma-3-12b-it-Q4_K_M.gguf", "7.3 GB")
LTX_VIDEO_VAE = File("vae", "Kijai/LTXV2_comfy", "VAE/LTX2_video_vae_bf16.safetensors", "2.4 GB")
LTX_AUDIO_VAE = File(
    "checkpoints", "Kijai/LTXV2_comfy", "VAE/LTX2_audio_vae_bf16.safetensors", "0.2 GB"
)
LTX_SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"


def film(images: Node, fps: float, **audio) -> list[Node]:
    video = Node("CreateVideo", {"images": images, "fps": fps, **audio})
    return [
        images,
        video,
        Node("SaveVideo", {"video": video, "filename_prefix": "featherweight", "codec": "auto"}),
    ]


def wan_vace() -> Workflow:
    model, encoder = diffusion_model(WAN_21, module=VACE), text_encoder("wan", UMT5)
    decoder = vae(WAN_VAE_21)
    shift = Node("ModelSamplingSD3", {"model": model, "shift": 8.0})
    shown = picture("Who or what the video shows")
    positive = prompt(
        encoder,
        "a girl in a pink dress waves both arms on a green hill, clouds drift past behind her,"
        " fixed camera",
    )
    negative = prompt(encoder, NEGATIVE, "Negative prompt")
    reference = Node(
        "WanVaceToVideo",
        {
            "positive": positive,
            "negative": negative,
            "vae": decoder,
            "width": 832,
            "height": 480,
            "length": 81,
            "strength": 1.0,
            "reference_image": shown,
        },
        "Size and length of the video",
    )
    sampler = Node(
        "KSampler",
        {
            "model": shift,
            "positive": (reference, 0),
            "negative": (reference, 1),
            "latent_image": (reference, 2),
            "steps": 20,
            "cfg": 6.0,
            "sampler_name": "uni_pc",
            "scheduler": "simple",
        },
    )
    trimmed = Node(
        "TrimVideoLatent",
        {"samples": sampler, "trim_amount": (reference, 3)},
        "Without the picture itself",
    )
    return Workflow(
        "Wan 2.1 14B VACE module",
        [
            {"Load": [model, shift, encoder, decoder]},
            {"Picture": [shown]},
            {"Prompt and size": [positive, negative, reference]},
            {
                "Video": [
                    sampler,
                    trimmed,
                    *film(Node("VAEDecode", {"samples": trimmed, "vae": decoder}), 16.0),
                ]
            },
        ],
        about="Five seconds of video with what a picture shows. Wan 2.1 for text is a GGUF, and"
        " *module* (among the advanced inputs of its loader) joins it with the layers of VACE, a"
        " file in fp8: both stay packed in one model. `example.png` comes with ComfyUI; take a"
        " picture of your own.",
        memory="The text encoder (4.1 GB) runs first and makes room. Model and module take 13.2 GB,"
        " and ComfyUI sets 8.0 to 15.9 GB aside for the computation at 832 × 480 and 81 frames, 2.9"
        " to 5.8 GB at 25 frames. What of the model does not fit beside it stays in main memory, by"
        " itself: have 24 GB of it free.",
        change="The sentence: say what happens to what the picture shows. Strength: how closely the"
        " video keeps to the picture. Length: 16 frames are a second, in steps of 4 and one more"
        " (49, 81). A video of outlines, depth or poses goes into `control_video` of the size node."
        " Any Wan 2.1 14B for text goes with the module, packed in any way.",
        licence="Wan 2.1 and VACE are under the Apache-2.0 licence.",
    )


def wan_5b() -> Workflow:
    model, encoder, decoder = diffusion_model(WAN_5B), text_encoder("wan", UMT5), vae(WAN_VAE_22)
    shift = Node("ModelSamplingSD3", {"model": model, "shift": 8.0})
    positive, negative = prompt(encoder, MOVING), prompt(encoder, NEGATIVE, "Negative prompt")
    latent = Node(
        "Wan22ImageToVideoLatent",
        {"vae": decoder, "width": 1280, "height": 704, "length": 121},
        "Size and length of the video",
    )
    sampler = Node(
        "KSampler",
        {
            "model": shift,
            "positive": positive,
            "negative": negative,
            "latent_image": latent,
            "steps": 20,
            "cfg": 5.0,
            "sampler_name": "uni_pc",
            "scheduler": "simple",
        },
    )
    return Workflow(
        "Wan 2.2 5B GGUF video",
        [
            {"Load": [model, shift, encoder, decoder]},
            {"Prompt and size": [positive, negative, latent]},
            {
                "Video": [
                    sampler,
                    *film(Node("VAEDecode", {"samples": sampler, "vae": decoder}), 24.0),
                ]
            },
        ],
        about="Five seconds of video from text, or from text and a first picture: link **Load"
        " Image** to `start_image` of the size node. Model and text encoder are GGUF and stay"
        " packed while they run.",
        memory="The text encoder (4.1 GB) runs first and makes room. The model takes 3.4 GB, and"
        " ComfyUI sets 3.2 to 6.3 GB aside for the computation at 1280 × 704 and 121 frames, half"
        " of that at 832 × 480: in a video the computation takes more than the weights. It runs on"
        " a card of 8 GB. Where decoding does not fit, ComfyUI decodes in tiles, by itself.",
        change="Length: 24 frames are a second, in steps of 4 and one more (49, 121). Steps from"
               " 20 to 30; cfg about 5.",
        licence="Wan 2.2 is under the Apache-2.0 licence.",
    )


def wan_14b() -> Workflow:
    encoder, decoder = text_encoder("wan", UMT5), vae(WAN_VAE_21)
    models, loras = [], []
    for file, lora_file, part in (
        (WAN_HIGH, HIGH_LORA, "first steps"),
        (WAN_LOW, LOW_LORA, "last steps"),
    ):
        models.append(diffusion_model(file, f"Load Diffusion Model: {part}"))
        loras.append(lora(models[-1], lora_file, title=f"Load LoRA: {part}"))
    shifts = [Node("ModelSamplingSD3", {"model": model, "shift": 5.0}) for model in loras]
    positive = prompt(encoder, MOVING)
    negative = prompt(encoder, NEGATIVE, "Negative prompt")
    latent = Node(
        "EmptyHunyuanLatentVideo",
        {"width": 640, "height": 640, "length": 81},
        "Size and length of the video",
    )
    common = {
        "positive": positive,
        "negative": negative,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
    }
    first = Node("KSamplerAdvanced", common | {
        "model": shifts[0], "latent_image": latent, "add_noise": "enable", "end_at_step": 2,
        "return_with_leftover_noise": "enable"})
    second = Node("KSamplerAdvanced", common | {
        "model": shifts[1], "latent_image": first, "add_noise": "disable", "start_at_step": 2,
        "return_with_leftover_noise": "disable"})
    return Workflow(
        "Wan 2.2 14B GGUF video in 4 steps",
        [
            {"Load": [*models, encoder, decoder]},
            {"LoRAs and shift": [*loras, *shifts]},
            {"Prompt and size": [positive, negative, latent]},
            {"Sample": [first, second]},
            {"Video": film(Node("VAEDecode", {"samples": second, "vae": decoder}), 16.0)},
        ],
        about="Five seconds of video from text. Two models work in turn: one begins, one finishes."
        " A LoRA on each makes four steps enough; the packed weights are not changed.",
        memory="The text encoder (4.1 GB) runs first and makes room. Each model takes 9.8 GB and"
        " its LoRA 1.2 GB; the first makes room for the second. ComfyUI sets 6.5 GB aside for the"
        " computation at 640 × 640 and 81 frames, 2.2 GB at 25 frames: a card of 16 GB holds most"
        " of it. On smaller ones more of the model stays in main memory, by itself: have 24 GB of"
        " it free.",
        change="Without the LoRAs, set steps to 20 and cfg to 3.5 in both samplers, and let the"
        " first end, the second start, at 10. Length: 16 frames are a second, in steps of 4 and"
        " one more (49, 81).",
        licence="Wan 2.2 is under the Apache-2.0 licence.",
    )


def ltx_2() -> Workflow:
    model, decoder = diffusion_model(LTX_GGUF), vae(LTX_VIDEO_VAE)
    encoder = text_encoder("ltxv", GEMMA, LTX_CONNECTOR)
    voice = Node("LTXVAudioVAELoader", {"ckpt_name": LTX_AUDIO_VAE.name}, files=(LTX_AUDIO_VAE,))
    positive = prompt(encoder, f"{MOVING}. A clock ticks in the background.")
    rate = Node(
        "LTXVConditioning", {"positive": positive, "negative": positive, "frame_rate": 24.0}
    )
    pictures = Node(
        "EmptyLTXVLatentVideo",
        {"width": 960, "height": 544, "length": 121},
        "Size and length of the video",
    )
    sound = Node(
        "LTXVEmptyLatentAudio",
        {"frames_number": 121, "frame_rate": 24.0, "audio_vae": voice},
        "Length of the sound",
    )
    latent = Node("LTXVConcatAVLatent", {"video_latent": pictures, "audio_latent": sound})
    steps = sampled_step_by_step(
        model,
        (rate, 0),
        (rate, 1),
        latent,
        Node("ManualSigmas", {"sigmas": LTX_SIGMAS}),
        sampler_name="euler_ancestral",
    )
    apart = Node("LTXVSeparateAVLatent", {"av_latent": steps[-1]})
    images = Node(
        "VAEDecodeTiled",
        {
            "samples": (apart, 0),
            "vae": decoder,
            "tile_size": 512,
            "overlap": 64,
            "temporal_size": 4096,
            "temporal_overlap": 8,
        },
    )
    heard = Node("LTXVAudioVAEDecode", {"samples": (apart, 1), "audio_vae": voice})
    return Workflow(
        "LTX-2 GGUF video with sound",
        [
            {"Load": [model, encoder, decoder, voice]},
            {"Prompt and size": [positive, rate, pictures, sound, latent]},
            {"Sample": [*steps, apart]},
            {"Video": [heard, *film(images, 24.0, audio=heard)]},
        ],
        about="Five seconds of video with sound from text, in eight steps. Model and Gemma are"
        " GGUF and stay packed while they run; the connector between them and both VAEs are"
        " ordinary files. The VAE of the sound belongs into `checkpoints`, where ComfyUI's node"
        " looks for it.",
        memory="The text encoder is the larger part: Gemma takes 7.3 GB and the connector 2.9 GB."
        " They run first and make room for the model, which takes 12.7 GB. It fits on a card of 16"
        " GB; on smaller ones part of it stays in main memory, by itself: have 24 GB of it free on"
        " a card of 8 GB. `device: cpu` of the text encoder (among its advanced inputs) leaves the"
        " card to the model.",
        change="Width and height, in steps of 32. Length: 24 frames are a second, in steps of 8"
        " and one more (97, 121), the same for pictures and sound. Keep cfg at 1 and the eight"
        " steps: this model is the distilled one.",
        licence="LTX-2 is under Lightricks' community licence.",
    )


WORKFLOWS = (wan_vace, wan_5b, wan_14b, ltx_2)
