"""The text encoder of the demo: weights for CLIP-L made by code. It understands no language, it
only tells 22 words apart.

ComfyUI knows CLIP-L in one size, 123.65 million values; they are written when the demo runs, not
shipped. Each word of `scenes.WORDS` has a random vector, every other token is padding. All layers
but the last do nothing. The attention of the last adds to each token twice the mean of the words up
to it, so that the padding after a prompt holds all its words at once.
"""
import numpy as np
import torch

WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY = 768, 12, 12, 77, 49408
# The words of `scenes.WORDS` as CLIP's tokenizer numbers them
TOKENS = {
    "red": 736, "yellow": 4481, "blue": 1746, "purple": 5496, "pink": 3360, "white": 1579,
    "left": 1823, "right": 1155, "pine": 7374, "oak": 7221, "palm": 8612, "grass": 5922,
    "snow": 2583, "sand": 5094, "noon": 2347, "dusk": 19708, "dawn": 7689, "night": 930,
    "sun": 2176, "moon": 3293, "cloud": 3887, "rainbow": 6286
}
FLAG = 16.0  # in the first value of a vector: this token is padding
EXCLUDE = 40.0  # weight of the flag against attention


def vectors() -> dict[int, torch.Tensor]:
    """Token -> vector (768,) of mean zero, for the words; the first value is zero."""
    drawn = np.random.RandomState(0).randn(len(TOKENS), WIDTH - 1)
    drawn -= drawn.mean(1, keepdims=True)
    return {
        token: torch.tensor([0.0, *row], dtype=torch.float32)
        for token, row in zip(TOKENS.values(), drawn)
    }


def padding() -> torch.Tensor:
    """The vector of every other token."""
    vector = torch.full((WIDTH,), -FLAG / (WIDTH - 1))
    vector[0] = FLAG
    return vector


def table() -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors that tokens have, (words + 1, 768), and which of them each token has,
    (49408,)."""
    known = vectors()
    picks = torch.full((VOCABULARY,), len(known))
    picks[list(known)] = torch.arange(len(known))
    return torch.stack([*known.values(), padding()]), picks


def weights(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """The weights that are not zero, by their names, but for the table of tokens. shapes: of the
    encoder's weights."""
    result = {"text_projection.weight": torch.eye(WIDTH)}
    result |= {
        name: torch.ones(shape) for name, shape in shapes.items()
        if "norm" in name and name.endswith("weight")
    }
    last = f"text_model.encoder.layers.{LAYERS - 1}.self_attn"
    key, query = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)
    key[::WIDTH // HEADS, 0] = -EXCLUDE  # the first value of each head
    query[::WIDTH // HEADS] = 1
    return result | {
        f"{last}.k_proj.weight": key,
        f"{last}.q_proj.bias": query,
        f"{last}.v_proj.weight": torch.eye(WIDTH),
        f"{last}.out_proj.weight": 2 * torch.eye(WIDTH),
    }
