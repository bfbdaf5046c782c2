"""Small models with seeded weights that the host accepts as real: a Flux and a tiny autoencoder.

They are not trained: their pictures are patterns. Names and shapes are those of the official files.
"""
import functools

import numpy as np

LATENT_CHANNELS = 16
BLUR = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16


def flux_shapes(hidden: int = 256, double_blocks: int = 2, single_blocks: int = 2,
                context: int = 1024, guidance: bool = False,
                pooled_text: bool = False) -> dict[str, tuple]:
    """Shapes of a Flux, by default without guidance (as schnell is, a plain flow model) and without
    pooled text.

    hidden: a multiple of 128, the width of one head; 3072 in the real one. context: width of the
    text conditioning. guidance,
    pooled_text: the layers that take them; Flux.1-dev has both, 19 double and 38 single blocks and
    a context of 4096.
    """
    shapes = {}

    def linear(name: str, rows: int, columns: int):
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def head_norms(name: str):
        for part in ("query_norm", "key_norm"):
            shapes[f"{name}.{part}.scale"] = (128,)

    linear("img_in", hidden, LATENT_CHANNELS * 4)
    linear("txt_in", hidden, context)
    embedders = (
        {"time_in": 256}
        | ({"guidance_in": 256} if guidance else {})
        | ({"vector_in": 768} if pooled_text else {})
    )
    for name, width in embedders.items():
        linear(f"{name}.in_layer", hidden, width)
        linear(f"{name}.out_layer", hidden, hidden)
    for block in range(double_blocks):
        for side in ("img", "txt"):
            name = f"double_blocks.{block}.{side}"
            linear(f"{name}_mod.lin", 6 * hidden, hidden)
            linear(f"{name}_attn.qkv", 3 * hidden, hidden)
            linear(f"{name}_attn.proj", hidden, hidden)
            head_norms(f"{name}_attn.norm")
            linear(f"{name}_mlp.0", 4 * hidden, hidden)
            linear(f"{name}_mlp.2", hidden, 4 * hidden)
    for block in range(single_blocks):
        name = f"single_blocks.{block}"
        linear(f"{name}.modulation.lin", 3 * hidden, hidden)
        linear(f"{name}.linear1", 7 * hidden, hidden)
        linear(f"{name}.linear2", hidden, 5 * hidden)
        head_norms(f"{name}.norm")
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    linear("final_layer.linear", LATENT_CHANNELS * 4, hidden)
    return shapes


def clip_l_shapes() -> dict[str, tuple]:
    """Shapes of the text encoder CLIP-L, which the host knows in one size: 123 million values."""
    width, names = 768, "text_model.encoder.layers.{}"
    shapes = {"text_model.embeddings.token_embedding.weight": (49408, width),
              "text_model.embeddings.position_embedding.weight": (77, width)}
    for layer in map(names.format, range(12)):
        layers = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        layers |= {"layer_norm1": (width,), "layer_norm2": (width,)}
        layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for part, shape in layers.items():
            shapes |= {f"{layer}.{part}.weight": shape, f"{layer}.{part}.bias": shape[:1]}
    return shapes | {
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
        "text_projection.weight": (width, width),
    }


def flux(seed: int = 0, **sizes) -> dict[str, np.ndarray]:
    """Float32 tensors of a Flux of the given `flux_shapes`."""
    return {name: values.copy() for name, values in _flux(seed, **sizes).items()}


@functools.lru_cache(maxsize=2)
def _flux(seed: int, **sizes) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in flux_shapes(**sizes).items():
        if name.endswith(".scale"):
            tensors[name] = np.ones(shape, np.float32)
        else:
            spread = 1 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.02
            tensors[name] = generator.standard_normal(shape, dtype=np.float32) * np.float32(spread)
    return tensors


def flux_lora(seed: int, part: str, layer: str, down: str, up: str, rank: int = 4,
              strength: float = 1.0, **sizes) -> dict[str, np.ndarray]:
    """A LoRA for the layers of a Flux whose names contain `part`.

    layer: format of a layer's name in the file; `{name}` as in the model, `{flat}` with underscores
    for dots. down, up: ends of the names of its factors, (rank, K) and (N, rank). strength: norm of
    the change, in norms of the weights of `flux`.
    """
    generator = np.random.default_rng(seed)
    tensors = {}
    for weight, shape in flux_shapes(**sizes).items():
        if part not in weight or not weight.endswith(".weight"):
            continue
        name = weight.removesuffix(".weight")
        stem = layer.format(name=name, flat=name.replace(".", "_"))
        for end, size, spread in ((down, (rank, shape[1]), shape[1] ** -0.5),
                                  (up, (shape[0], rank), strength * rank ** -0.5)):
            tensors[stem + end] = generator.standard_normal(size, dtype=np.float32) * np.float32(
                spread
            )
    return tensors


def autoencoder(seed: int = 3) -> dict[str, np.ndarray]:
    """Float32 tensors of a TAESD-shaped autoencoder of 16 latent channels, scaled as Flux's latents
    are."""
    generator = np.random.default_rng(seed)
    tensors = {}

    def convolution(name: str, outputs: int, inputs: int, bias: bool = True, gain: float = 1.0):
        # Every kernel blurs, so that a decoded picture is clouds of colour and not a grain.
        mix = generator.standard_normal((outputs, inputs, 1, 1), dtype=np.float32) * np.float32(
            gain / np.sqrt(inputs)
        )
        tensors[f"{name}.weight"] = mix * BLUR
        if bias:
            tensors[f"{name}.bias"] = np.zeros(outputs, np.float32)

    def half(name: str, blocks: list[int], samplers: list[int], first: tuple, last: tuple):
        # position in the sequence, outputs, inputs
        convolution(f"{name}.{first[0]}", first[1], first[2])
        for block in blocks:
            for part in (0, 2, 4):
                convolution(f"{name}.{block}.conv.{part}", 64, 64)
        for sampler in samplers:
            convolution(f"{name}.{sampler}", 64, 64, bias=False)
        convolution(f"{name}.{last[0]}", last[1], last[2], gain=1.6)

    half("taesd_encoder", [1, 3, 4, 5, 7, 8, 9, 11, 12, 13], [2, 6, 10], (0, 64, 3),
         (14, LATENT_CHANNELS, 64))
    half("taesd_decoder", [3, 4, 5, 8, 9, 10, 13, 14, 15, 18], [7, 12, 17],
         (1, 64, LATENT_CHANNELS), (19, 3, 64))
    tensors["taesd_decoder.19.bias"] += np.float32(0.5)  # mid grey
    tensors["vae_scale"], tensors["vae_shift"] = np.float32(0.3611), np.float32(0.1159)
    return {name: np.asarray(value) for name, value in tensors.items()}
