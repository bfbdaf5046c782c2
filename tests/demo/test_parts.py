"""The trainable parts of the demo's model are what ComfyUI runs: text, Flux and autoencoder give
the same values."""
import comfy.sd
import comfy.sd1_clip
import pytest
import torch

from demo_model import scenes, text
from demo_model.autoencoder import Autoencoder, widened
from demo_model.flux import Flux, initialise
from demo_model.lora import RANK, add_lora, file_tensors
from devtools.files.demo_files import ENCODER_NAME, write_encoder
from featherweight.loaders.models.text_encoder import load_text_encoder

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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_encoder_file_gives_what_training_sees(clip, prompt):
    values, words = encoded(clip, prompt)[0], prompt.split()
    assert values.shape == (77, 768)
    expected = text.encode(words)
    assert torch.allclose(values[:text.SHORT], expected,
                          atol=0.05), (values[:text.SHORT] - expected).abs().max()
    off = (values[text.SHORT:] - values[text.SHORT - 1]).abs().max()
    assert off < 1e-3, off  # all padding is alike


def test_a_word_that_it_does_not_know_changes_no_other(clip):
    plain, more = encoded(clip, "red snow")[0], encoded(clip, "red tall snow")[0]
    assert torch.allclose(plain[[1, 2, -1]], more[[1, 3, -1]], atol=1e-5)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_flux_with_few_tokens_is_comfyuis_with_all(prompt):
    torch.manual_seed(0)
    ours, words = Flux(), prompt.split()
    initialise(ours)
    for value in ours.parameters():
        value.requires_grad_(False)
        if not value.any():  # modulations and the last layer, which start at nothing
            value.normal_(std=0.05)
    theirs = comfy.sd.load_diffusion_model_state_dict(ours.state_dict(),
                                                      model_options={"dtype": torch.float32}).model
    long = text.encode(words, text.LENGTH)
    x, time = torch.randn(2, 16, 16, 12), torch.tensor([0.9, 0.3])
    expected = theirs.diffusion_model(x, time, long.expand(2, -1, -1))
    values = ours(x, time,
                  text.encode(words).expand(2, -1, -1),
                  text.bias(len(words)).expand(2, -1))
    assert expected.std() > 0.1 and torch.allclose(values, expected, atol=1e-4), (
        (values - expected).abs().max()
    )


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


@pytest.mark.parametrize("kohya", [True, False])
def test_a_new_lora_changes_nothing_and_has_the_rank_it_says(kohya):
    torch.manual_seed(0)
    model = Flux()
    initialise(model)
    inputs = (
        torch.randn(1, 16, 4, 4),
        torch.tensor([0.5]),
        torch.randn(1, 3, 768),
        torch.zeros(1, 3),
    )
    before = model(*inputs)
    factors = add_lora(model)
    assert torch.equal(model(*inputs), before)
    tensors = file_tensors(factors, kohya)
    assert len(tensors) == 2 * 20 and all(min(value.shape) == RANK for value in tensors.values())
