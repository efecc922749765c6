"""Small transformers, written by hand in the ways in which people write them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention with one weight for queries, keys and values; the product written out, or by PyTorch's own op."""

    def __init__(self, width: int, heads: int, written_out: bool) -> None:
        super().__init__()
        self.heads, self.written_out = heads, written_out
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.written_out:
            scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, written_out: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, written_out)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    shape = (3, 24, 24)

    def __init__(self) -> None:
        super().__init__()
        width = 24
        self.patches = nn.Conv2d(3, width, 6, 6)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.Sequential(Block(width, 3, False), Block(width, 2, True))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Bert(nn.Module):
    """Words in, a number for each sentence and a vector for each word out; linear layers for query, key and value."""

    shape = (12,)
    words = 50

    def __init__(self) -> None:
        super().__init__()
        width, self.heads = 32, 4
        self.embed, self.places = nn.Embedding(self.words, width), nn.Embedding(12, width)
        self.first = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, width) for name in ("query", "key", "value", "out")},
                    **{"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)},
                    **{"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)},
                }
            )
            for _ in range(2)
        )
        self.pool = nn.Linear(width, width)
        self.register_buffer("positions", torch.arange(12)[None])

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(self.embed(words) + self.places(self.positions))
        for layer in self.layers:
            q, k, v = (self._split(layer[name](x)) for name in ("query", "key", "value"))
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            y = torch.matmul(F.softmax(scores, -1), v).permute(0, 2, 1, 3).contiguous()
            x = layer["norm1"](x + layer["out"](y.flatten(2)))
            x = layer["norm2"](x + layer["down"](F.gelu(layer["up"](x))))
        return x, torch.tanh(self.pool(x[:, 0]))


class Encoder(nn.Module):
    """PyTorch's own encoder layers, on frames of a signal."""

    shape = (11, 16)

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


TOKENS = (ViT, Bert, Encoder)
