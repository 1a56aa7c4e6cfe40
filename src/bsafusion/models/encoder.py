"""Stage 1, the shared feature encoder: the same weights look at the fixed and at the moving image.

Every grid in the network has ``16 n + 1`` voxels a side and every reduction keeps corner centres on corner
centres, so that voxel ``i`` of the grid with stride ``s`` *is* pixel ``s i`` of the image: sides of 257, 129,
65, 33 and 17.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsafusion.models.layers import ResidualBlock, RestormerBlock, conv_norm_act, gelu

STRIDE = 16  # of the coarsest grid, where the tokens live
CHROMA_GAIN = 4.0  # brings chroma to about the spread of luminance


class Features(NamedTuple):
    """What the encoder says of one image.

    Attributes:
        shallow: ``B C H W`` at full resolution, straight to fusion.
        pyramid: strides, fine to coarse, to ``B C h w``; the last one (stride 16) holds the tokens.
    """

    shallow: Tensor
    pyramid: dict[int, Tensor]

    @property
    def tokens(self) -> Tensor:
        return self.pyramid[STRIDE]


@dataclass(frozen=True)
class EncoderCfg:
    """Options of the encoder.

    Attributes:
        kind: ``restormer``: as published, tokens cut out at once; ``pyramid``: ours, strides 2 to 16.
        shallow: channels of the shallow features.
        widths: channels per stride of the pyramid, fine to coarse; the last is that of the tokens.
        colour: the pyramid sees chroma beside luminance (pyramid only): the luminance of the usual colour maps of PET
            and SPECT does not grow with uptake.
    """

    kind: Literal["restormer", "pyramid"] = "pyramid"
    shallow: int = 12
    widths: tuple[int, ...] = (24, 48, 64, 96)
    colour: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("restormer", "pyramid"):
            raise ValueError(f"kind {self.kind!r}: expected restormer or pyramid")
        expected = 1 if self.kind == "restormer" else 4
        if len(self.widths) != expected or any(w < 8 or w % 8 for w in self.widths):
            raise ValueError(f"widths {self.widths}: a {self.kind} encoder takes {expected}, each a multiple of 8")
        if self.shallow < 1:
            raise ValueError(f"shallow {self.shallow}: expected at least 1 channel")
        if self.colour and self.kind == "restormer":
            raise ValueError("the restormer encoder sees luminance alone, as published; leave colour out")


class RestormerEncoder(nn.Module):
    """Two Restormer blocks at full resolution (1 -> 8 -> 3 channels), then overlapping patches become tokens.

    Patches are 17 px wide every 16 px, so that their centres fall on the grid of stride 16.
    """

    def __init__(self, cfg: EncoderCfg) -> None:
        super().__init__()
        self.widen = nn.Conv2d(1, cfg.shallow, 3, padding=1)
        self.first = RestormerBlock(cfg.shallow)
        self.second = RestormerBlock(cfg.shallow, 3)
        self.to_tokens = nn.Conv2d(3, cfg.widths[0], STRIDE + 1, stride=STRIDE, padding=STRIDE // 2)

    def see(self, image: Tensor) -> Tensor:
        """The shallow features alone."""
        shallow: Tensor = self.first(self.widen(image))
        return shallow

    def pyramid(self, image: Tensor) -> dict[int, Tensor]:
        """The features at each stride: here the tokens alone."""
        return self(image).pyramid  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Features:
        shallow = self.see(image[:, :1])
        return Features(shallow, {STRIDE: self.to_tokens(self.second(shallow))})


class PyramidEncoder(nn.Module):
    """Group-normalised convolutions at strides 2, 4, 8 and 16, residual blocks below stride 2."""

    def __init__(self, cfg: EncoderCfg) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(1, cfg.shallow, 3, padding=1)
        # A layer of its own, so that it can be added to a network that was trained without: grey then stays as it was.
        self.chroma = nn.Conv2d(2, cfg.widths[0], 3, stride=2, padding=1, bias=False) if cfg.colour else None
        if self.chroma is not None:
            nn.init.normal_(self.chroma.weight, std=0.03)  # colours begin with a part in the features, not the lead
        channels = (1, *cfg.widths)
        self.levels = nn.ModuleList(
            nn.Sequential(conv_norm_act(c_in, c_out, stride=2), ResidualBlock(c_out) if i else nn.Identity())
            for i, (c_in, c_out) in enumerate(pairwise(channels))
        )

    def see(self, image: Tensor) -> Tensor:
        """The shallow features alone."""
        return gelu(self.shallow(image))

    def pyramid(self, image: Tensor) -> dict[int, Tensor]:
        """The features at each stride."""
        convolution, *rest = self.levels[0][0]  # type: ignore[index]
        if self.chroma is not None and image.shape[1] > 1:
            weight = torch.cat([convolution.weight, CHROMA_GAIN * self.chroma.weight], dim=1)
            x = F.conv2d(image, weight, stride=2, padding=1)
        else:
            x = convolution(image[:, :1])
        for layer in rest:
            x = layer(x)
        features, stride = {2: x}, 2
        for level in self.levels[1:]:
            x, stride = level(x), stride * 2
            features[stride] = x
        return features

    def forward(self, image: Tensor) -> Features:
        return Features(self.see(image[:, :1]), self.pyramid(image))


def build_encoder(cfg: EncoderCfg) -> RestormerEncoder | PyramidEncoder:
    return RestormerEncoder(cfg) if cfg.kind == "restormer" else PyramidEncoder(cfg)
