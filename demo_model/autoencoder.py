"""An autoencoder with the layers and names of TAESD at 16 latent channels, narrow where pictures
are large.

ComfyUI builds every layer 64 wide: `widened` fills up with zeros, which changes no value.
"""
import torch
from torch import nn
from torch.nn import functional

# at the size of the picture, a half, a quarter, an eighth
WIDTHS, HOST_WIDTH, CHANNELS = (16, 32, 48, 64), 64, 16
# ComfyUI divides Flux's latents by this after moving them: with both in the file, the encoder's own
# output is the latent.
SCALE, SHIFT = 0.3611, 0.1159


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(),
                                  conv(width, width))

    def forward(self, x):
        return functional.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Autoencoder(nn.Module):
    """Pictures (N, 3, H, W) in 0..1 to latents (N, 16, H / 8, W / 8) and back."""

    def __init__(self, widths: tuple = WIDTHS):
        super().__init__()
        first, *_, last = widths
        encoder, decoder = (
            [conv(3, first), Block(first)],
            [Clamp(), conv(CHANNELS, last), nn.ReLU()],
        )
        for wide, narrow in zip(widths[1:], widths):
            encoder += [
                conv(narrow, wide, stride=2, bias=False),
                Block(wide),
                Block(wide),
                Block(wide)
            ]
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1]):
            decoder += [
                Block(wide),
                Block(wide),
                Block(wide),
                nn.Upsample(scale_factor=2),
                conv(wide, narrow, bias=False)
            ]
        self.taesd_encoder = nn.Sequential(*encoder, conv(last, CHANNELS))
        self.taesd_decoder = nn.Sequential(*decoder, Block(first), conv(first, 3))

    def encode(self, pictures):
        return self.taesd_encoder(pictures)

    def decode(self, latents):
        return self.taesd_decoder(latents)


def widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file that ComfyUI loads, from weights of any smaller widths."""
    ends = {name for name in tensors if name.startswith(("taesd_encoder.0.", "taesd_decoder.1."))}
    wide = {}
    for name, value in tensors.items():
        shape = list(value.shape)
        last = name.rpartition(".")[0] in ("taesd_encoder.14", "taesd_decoder.19")
        if not last:
            shape[0] = HOST_WIDTH
        if value.ndim == 4 and name not in ends:
            shape[1] = HOST_WIDTH
        wide[name] = value.new_zeros(shape)
        wide[name][tuple(slice(size) for size in value.shape)] = value
    return wide | {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
