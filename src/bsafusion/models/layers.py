"""Building blocks that several stages share: Restormer, transformer and convolutional blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of ``B C H W``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)


class TransposedAttention(nn.Module):
    """Attention between channels, not positions: linear in the number of pixels (Zamir et al., CVPR 2022)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.to_qkv = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, 1),
            nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels),
        )
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.to_qkv(x).view(batch, 3, self.heads, channels // self.heads, -1).unbind(1)
        similarity = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        attended = (similarity * self.temperature).softmax(-1) @ v
        projected: Tensor = self.project(attended.reshape(batch, channels, height, width))
        return projected


class GatedFeedForward(nn.Module):
    """A dense 3x3 convolution in two halves, one gating the other (Zamir et al. 2022, there depthwise)."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, hidden, 3, padding=1))
        self.project = nn.Conv2d(hidden // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=1)
        projected: Tensor = self.project(F.gelu(gate) * value)
        return projected


class RestormerBlock(nn.Module):
    """Transposed attention and gated feed-forward, each with its residual; ``B C_in H W -> B C_out H W``."""

    def __init__(self, channels: int, out_channels: int | None = None, *, heads: int = 1, expansion: int = 4) -> None:
        super().__init__()
        self.norm_attention = ChannelNorm(channels)
        self.attention = TransposedAttention(channels, heads)
        self.norm_feed_forward = ChannelNorm(channels)
        self.feed_forward = GatedFeedForward(channels, expansion)
        self.project = nn.Identity() if out_channels is None else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        x = x + self.feed_forward(self.norm_feed_forward(x))
        projected: Tensor = self.project(x)
        return projected


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP over tokens ``B N C``."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        qkv = self.to_qkv(self.norm_attention(tokens)).view(batch, count, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Written out: for a few hundred tokens on a CPU, torch's fused kernel is several times slower.
        weights = (q * (dim // self.heads) ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        attended = (weights @ v).transpose(1, 2).reshape(batch, count, dim)
        tokens = tokens + self.project(attended)
        mlp: Tensor = self.mlp(self.norm_mlp(tokens))
        return tokens + mlp


def conv_norm_act(channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution, group normalisation (groups of 8 channels), GELU.

    Stride 2 keeps corner centres on corners.
    """
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.GroupNorm(out_channels // 8, out_channels),
        nn.GELU(),
    )


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm_act(channels, channels), conv_norm_act(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        body: Tensor = self.body(x)
        return x + body


def resize(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bilinear resizing with the package's one convention: corner centres stay on corner centres."""
    return x if tuple(x.shape[-2:]) == shape else F.interpolate(x, size=shape, mode="bilinear", align_corners=True)
