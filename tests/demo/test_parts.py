"""The parts of the demo's model are what ComfyUI runs: text and autoencoder give the same
values."""
import math

import comfy.sd
import comfy.sd1_clip
import pytest
import torch
from pack_api import load_text_encoder
from torch.nn import functional

from demo_model import scenes, text
from demo_model.autoencoder import Autoencoder, widened
from devtools.files.demo_files import ENCODER_NAME, write_encoder

SHORT = 18  # tokens of 77 that a prompt may fill
PROMPTS = [
    "a red house left of a pine tree on grass at noon under a sun", "a blue house under a moon",
    "a house", "snow"
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / ENCODER_NAME
    write_encoder(path)
    return load_text_encoder([str(path)], "stable_diffusion")


def encoded(clip, prompt):
    return clip.encode_from_tokens(clip.tokenize(prompt)).float().cpu()


def test_every_word_is_one_token_with_its_number():
    tokenizer = comfy.sd1_clip.SDTokenizer()
    assert set(text.TOKENS) == set(scenes.WORDS)
    for word, token in text.TOKENS.items():
        assert [pair[0] for pair in tokenizer.tokenize_with_weights(word)[0]][:3] == [
            49406,
            token,
            49407,
        ], word


def expected(words: list[str], length: int) -> torch.Tensor:
    """What the encoder gives for a prompt of these words, (length, 768): the start, the words,
    padding. Each is its vector and twice the mean of the words up to it."""
    known = text.vectors()
    tokens = [known.get(text.TOKENS.get(word), text.padding()) for word in words]
    x = torch.stack([text.padding(), *tokens, *[text.padding()] * (length - 1 - len(words))])
    h = functional.layer_norm(x, (text.WIDTH,))
    logits = torch.tensor([-text.EXCLUDE / math.sqrt(text.WIDTH // text.HEADS)]) * h[:, 0]
    logits = logits.expand(length, length).masked_fill(
        torch.ones(length, length).triu(1).bool(), -torch.inf)
    return functional.layer_norm(x + 2 * logits.softmax(-1) @ h, (text.WIDTH,))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_encoder_file_gives_the_words_and_their_mean(clip, prompt):
    values, words = encoded(clip, prompt)[0], prompt.split()
    assert values.shape == (77, 768)
    torch.testing.assert_close(values, expected(words, len(values)), atol=0.05, rtol=0)
    off = (values[SHORT:] - values[SHORT - 1]).abs().max()
    assert off < 1e-3, off  # all padding is alike


def test_a_word_that_it_does_not_know_changes_no_other(clip):
    plain, more = encoded(clip, "red snow")[0], encoded(clip, "red tall snow")[0]
    assert torch.allclose(plain[[1, 2, -1]], more[[1, 3, -1]], atol=1e-5)


def test_the_widened_autoencoder_is_comfyuis_and_changes_nothing():
    torch.manual_seed(0)
    ours = Autoencoder().requires_grad_(False)
    theirs = comfy.sd.VAE(sd=widened(ours.state_dict())).first_stage_model.float()
    pictures = torch.rand(2, 3, 64, 48)
    latents = ours.encode(pictures)
    scaled = (theirs.encode(pictures * 2 - 1) - theirs.vae_shift) * theirs.vae_scale
    assert torch.allclose(scaled, latents, atol=1e-5)
    decoded = (theirs.decode(latents / theirs.vae_scale + theirs.vae_shift) + 1) / 2
    assert torch.allclose(decoded, ours.decode(latents), atol=1e-5)
