"""Building blocks that several stages share: Restormer, transformer and convolutional blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """GELU. torch's CPU kernel is slow on maps with the channels last; seen as ``B H W C`` the same memory is
    contiguous and takes the fast path."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return F.gelu(x.movedim(1, -1)).movedim(-1, 1)
    return F.gelu(x)


class GELU(nn.Module):
    """:func:`gelu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of queries ``B H N C`` over keys and values ``B H M C``.

    Written out where torch's fused kernel is slow: trained in half precision on a CPU.
    """
    if q.requires_grad and q.device.type == "cpu" and q.dtype != torch.float32:
        written_out: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        return written_out
    return F.scaled_dot_product_attention(q, k, v)


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
        attended = attend(q, k, v).transpose(1, 2).reshape(batch, count, dim)
        tokens = tokens + self.project(attended)
        mlp: Tensor = self.mlp(self.norm_mlp(tokens))
        return tokens + mlp


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP: the tokens ``B N C`` of one image look at those of another, ``B M C``.

    Starts as the identity. ``positions`` (``N C`` and ``M C``) are seen by the attention alone.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))
        for last in (self.project, self.mlp[-1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, other: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        batch, count, dim = tokens.shape
        q = self.to_q(self.norm_attention(tokens) + positions[0])
        k, v = self.to_kv(self.norm_attention(other) + positions[1]).chunk(2, dim=-1)
        q, k, v = (t.view(batch, -1, self.heads, dim // self.heads).transpose(1, 2) for t in (q, k, v))
        attended = attend(q, k, v).transpose(1, 2).reshape(batch, count, dim)
        tokens = tokens + self.project(attended)
        mlp: Tensor = self.mlp(self.norm_mlp(tokens))
        return tokens + mlp


def wave_positions(shape: tuple[int, int], dim: int, like: Tensor) -> Tensor:
    """Sines and cosines of a grid's coordinates, ``h w`` voxels -> ``hw dim``; wavelengths of 2 to 200 voxels."""
    count = dim // 4
    steps = torch.linspace(0, 1, count, dtype=torch.float32, device=like.device)
    frequency = math.pi * 100.0**-steps
    rows, columns = (torch.arange(n, dtype=torch.float32, device=like.device)[:, None] * frequency for n in shape)
    rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, shape[1], -1)
    columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(shape[0], -1, -1)
    waves = torch.cat([rows, columns], 2).flatten(0, 1)
    return F.pad(waves, (0, dim - 4 * count)).to(like)


def conv_norm_act(channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution, group normalisation (groups of 8 channels), GELU.

    Stride 2 keeps corner centres on corners.
    """
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.GroupNorm(out_channels // 8, out_channels),
        GELU(),
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
    if tuple(x.shape[-2:]) == shape:
        return x
    if x.is_cuda:  # torch's kernel for channels first goes through them one by one
        x = x.contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(x, size=shape, mode="bilinear", align_corners=True)
    return resized.contiguous() if x.is_cuda else resized


def join(*maps: Tensor) -> Tensor:
    """The channels of all maps ``B C H W`` in one, for a convolution to read.

    In inference with the channels last, as weights are then kept: torch's own concatenation is slow where layouts
    differ, and the convolution would copy its result once more.
    """
    if not torch.is_inference_mode_enabled() or any(m.dtype != maps[0].dtype for m in maps):
        return torch.cat(maps, dim=1)
    first = maps[0]
    shape = (len(first), sum(m.shape[1] for m in maps), *first.shape[2:])
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    return torch.cat(maps, dim=1, out=out)
