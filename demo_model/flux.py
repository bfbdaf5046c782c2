"""Flux at a small size, trainable: the layers, names and arithmetic of ComfyUI's, with few enough
tokens for a CPU."""
import math

import torch
from torch import nn
from torch.nn import functional

HIDDEN, HEAD, AXES, THETA, DOUBLE, SINGLE, CONTEXT, CHANNELS = (
    256,
    128,
    (16, 56, 56),
    10000,
    2,
    2,
    768,
    16,
)


def modulate(x, scale, shift):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class HeadNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = Scale(), Scale()


class Scale(nn.Module):
    """A root-mean-square norm over one head; Flux calls its weight `scale`."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD))

    def forward(self, x):
        return functional.rms_norm(x.float(), (HEAD,), self.scale, 1e-6)


class Modulation(nn.Module):
    def __init__(self, parts: int):
        super().__init__()
        self.parts, self.lin = parts, nn.Linear(HIDDEN, parts * HIDDEN)

    def forward(self, vec):
        return self.lin(functional.silu(vec))[:, None].chunk(self.parts, -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.norm = HeadNorms()
        self.proj = nn.Linear(HIDDEN, HIDDEN)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(256, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.out_layer(functional.silu(self.in_layer(x)))


def heads(qkv, norm):
    """Query, key and value, each (N, heads, tokens, 128)."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, -1, HEAD).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def attend(q, k, v, turns, bias):
    q, k = turned(q, turns).to(v.dtype), turned(k, turns).to(v.dtype)
    shares = (q @ k.transpose(-1, -2)).float() * HEAD ** -0.5 + bias
    return (shares.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def turned(x, turns):
    """Rotary embedding. turns: complex (tokens, 64)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


class DoubleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        for side in ("img", "txt"):
            setattr(self, f"{side}_mod", Modulation(6))
            setattr(self, f"{side}_attn", Attention())
            setattr(
                self, f"{side}_mlp",
                nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU("tanh"),
                              nn.Linear(4 * HIDDEN, HIDDEN)))

    def forward(self, img, txt, vec, turns, bias):
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        parts = [heads(side.qkv(modulate(x, mod[1], mod[0])), side.norm)
                 for side, x, mod in ((self.txt_attn, txt, txt_mod), (self.img_attn, img, img_mod))]
        mixed = attend(*(torch.cat(pair, 2) for pair in zip(*parts)), turns, bias)
        txt = txt + txt_mod[2] * self.txt_attn.proj(mixed[:, :txt.shape[1]])
        img = img + img_mod[2] * self.img_attn.proj(mixed[:, txt.shape[1]:])
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, txt_mod[4], txt_mod[3]))
        return img + img_mod[5] * self.img_mlp(modulate(img, img_mod[4], img_mod[3])), txt


class SingleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation, self.norm = Modulation(3), HeadNorms()
        self.linear1, self.linear2 = nn.Linear(HIDDEN, 7 * HIDDEN), nn.Linear(5 * HIDDEN, HIDDEN)

    def forward(self, x, vec, turns, bias):
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, scale, shift)).split([3 * HIDDEN, 4 * HIDDEN], -1)
        mixed = attend(*heads(qkv, self.norm), turns, bias)
        return x + gate * self.linear2(
            torch.cat([mixed, functional.gelu(mlp, approximate="tanh")], -1)
        )


class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 2 * HIDDEN))
        self.linear = nn.Linear(HIDDEN, 4 * CHANNELS)

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(modulate(x, scale, shift))


class Flux(nn.Module):
    """Predicts noise - latent, without guidance and without pooled text."""

    def __init__(self):
        super().__init__()
        self.img_in = nn.Linear(4 * CHANNELS, HIDDEN)
        self.txt_in = nn.Linear(CONTEXT, HIDDEN)
        self.time_in = Embedder()
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(DOUBLE))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(SINGLE))
        self.final_layer = FinalLayer()

    def forward(self, x, time, txt, bias):
        """x: latents (N, 16, H, W). time: (N,), 1 is noise. txt: (N, tokens, 768). bias: added in
        attention, (N, tokens)."""
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        img = (
            x.unflatten(3, (columns, 2))
            .unflatten(2, (rows, 2))
            .permute(0, 2, 4, 1, 3, 5)
            .flatten(3)
            .flatten(1, 2)
        )
        turns = positions(txt.shape[1], rows, columns)
        bias = functional.pad(bias, (0, rows * columns))[:, None, None]
        img, txt, vec = self.img_in(img), self.txt_in(txt), self.time_in(waves(time))
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turns, bias)
        both = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            both = block(both, vec, turns, bias)
        out = self.final_layer(both[:, txt.shape[1]:], vec)
        return (
            out.view(-1, rows, columns, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        )


def waves(time):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = 1000 * time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def positions(words: int, rows: int, columns: int) -> torch.Tensor:
    """Rotations of all tokens: words stand at 0, 0, 0 and patches at 0, row, column; complex
    (tokens, 64)."""
    place = torch.cartesian_prod(torch.zeros(1),
                                 torch.arange(rows).float(),
                                 torch.arange(columns).float())
    place = torch.cat([torch.zeros(words, 3), place])
    angles = [
        place[:, axis, None] / THETA ** (torch.arange(0, size, 2) / size)
        for axis, size in enumerate(AXES)
    ]
    angles = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angles), angles)


def initialise(model: Flux):
    """Blocks that at first do nothing, and heads that at first look at places: without, Flux learns
    places late."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, layer in model.named_modules():
        if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
            nn.init.zeros_(layer.weight)
        if name.endswith(("qkv", "linear1")):
            with torch.no_grad():
                pairs = layer.bias[:2 * HIDDEN].view(-1, HEAD)  # queries and keys, one row a head
                for start in (AXES[0], AXES[0] + AXES[1]):
                    pairs[:, start:start + 16].normal_()
