"""Stage 4, MMFF: multi-modal feature fusion.

FusionBLKs climb from the tokens' grid: at each scale the moving features are warped by the field at that
scale, joined with the fixed ones and with what has been fused so far, and raised. At full resolution the
shallow features of both images join in and the fused luminance comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bsafusion.deformation import resize_field, warp
from bsafusion.models.layers import GELU, RestormerBlock, join, resize

BLOCK_STRIDES = (16, 8, 4, 2)


@dataclass(frozen=True)
class FusionCfg:
    """Options of MMFF.

    Attributes:
        kind: ``restormer``: as published, the luminance is drawn by the network; ``weights``: ours, the
            network says how much of each image goes into each pixel, so that nothing appears that neither
            image shows.
        blocks: number of FusionBLKs, from stride 16 up; one to four.
        widths: output channels of each block.
        inner: channels inside each block, which is then a Restormer block; empty: plain convolutions.
        hidden: channels at full resolution (weights only).
        layers: convolutions at full resolution before the one that says the weights (weights only).
    """

    kind: Literal["restormer", "weights"] = "weights"
    blocks: int = 4
    widths: tuple[int, ...] = (48, 32, 24, 16)
    inner: tuple[int, ...] = ()
    hidden: int = 14
    layers: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("restormer", "weights"):
            raise ValueError(f"kind {self.kind!r}: expected restormer or weights")
        if self.inner and len(self.inner) < self.blocks:
            raise ValueError(f"inner {self.inner} for {self.blocks} blocks: expected one value each")
        if not 1 <= self.blocks <= len(BLOCK_STRIDES) or len(self.widths) < self.blocks:
            raise ValueError(f"blocks {self.blocks} with widths {self.widths}: expected 1 to 4 blocks, one width each")
        if self.hidden < 1 or self.layers < 1:
            raise ValueError(f"hidden {self.hidden}, layers {self.layers}: expected at least 1 of each")


class FusionBlock(nn.Module):
    """FusionBLK: fixed, warped moving and running features in, ``C_out`` channels out, all at one scale."""

    def __init__(self, channels: int, out_channels: int, inner: int | None) -> None:
        super().__init__()
        if inner is None:
            self.body = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1),
                GELU(),
                nn.Conv2d(out_channels, out_channels, 3, padding=1),
                GELU(),
            )
        else:
            self.body = nn.Sequential(nn.Conv2d(channels, inner, 1), RestormerBlock(inner, out_channels))

    def forward(self, *features: Tensor) -> Tensor:
        fused: Tensor = self.body(join(*features))
        return fused


class Fusion(nn.Module):
    """Stage 4 of both presets.

    Args:
        cfg: options.
        tokens: channels of the plain tokens.
        widths: channels of the encoder's pyramid per stride; scales it lacks are raised from the tokens.
        shallow: channels of the shallow features.
    """

    def __init__(self, cfg: FusionCfg, *, tokens: int, widths: dict[int, int], shallow: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.strides = BLOCK_STRIDES[: cfg.blocks]
        self.blocks = nn.ModuleList()
        self.raised = nn.ModuleDict()  # tokens for the scales that the encoder does not have
        running = 0
        for index, stride in enumerate(self.strides):
            channels = tokens if stride == BLOCK_STRIDES[0] else widths.get(stride, cfg.widths[index])
            if stride != BLOCK_STRIDES[0] and stride not in widths:
                self.raised[str(stride)] = nn.Conv2d(tokens, channels, 1)
            inner = cfg.inner[index] if cfg.inner else None
            self.blocks.append(FusionBlock(2 * channels + running, cfg.widths[index], inner))
            running = cfg.widths[index]
        self.last: nn.Module
        if cfg.kind == "restormer":
            joined = running + 2 * shallow
            self.last = nn.Sequential(
                RestormerBlock(joined, 12, expansion=2), RestormerBlock(12, 1), nn.Conv2d(1, 1, 3, padding=1)
            )
        else:
            joined = running + 2 * shallow + 2
            hidden: list[nn.Module] = []
            for channels in (joined, *[cfg.hidden] * (cfg.layers - 1)):
                hidden += [nn.Conv2d(channels, cfg.hidden, 3, padding=1), GELU()]
            self.last = nn.Sequential(*hidden, nn.Conv2d(cfg.hidden, 2, 3, padding=1))

    def climb(
        self,
        fixed: dict[int, Tensor],
        moving: dict[int, Tensor],
        plain: tuple[Tensor, Tensor],
        displacement: Tensor,
    ) -> Tensor:
        """The FusionBLKs: what is fused at the finest scale; ``displacement`` is on the encoder's grid."""
        running: Tensor | None = None
        shape = displacement.shape[-2:]
        for stride, block in zip(self.strides, self.blocks, strict=True):
            grid = ((shape[0] - 1) // stride + 1, (shape[1] - 1) // stride + 1)
            if stride == BLOCK_STRIDES[0]:
                a, b = plain
            elif str(stride) in self.raised:
                a, b = (self.raised[str(stride)](resize(t, grid)) for t in plain)
            else:
                a, b = fixed[stride], moving[stride]
            b = warp(b, resize_field(displacement, shape=grid))
            running = block(a, b) if running is None else block(a, b, resize(running, grid))
        assert running is not None
        return running

    def draw(self, fixed: Tensor, aligned: Tensor, shallow: tuple[Tensor, Tensor], running: Tensor) -> Tensor:
        """The fused luminance ``B 1 H W`` in [0, 1].

        All inputs are at full resolution, the moving ones already warped.
        """
        if self.cfg.kind == "restormer":
            drawn: Tensor = torch.sigmoid(self.last(torch.cat([running, *shallow], dim=1)).float())
            return drawn
        logits = self.last(join(running, *shallow, fixed, aligned)).float()
        weight_fixed, weight_moving = torch.sigmoid(logits).chunk(2, dim=1)
        return (weight_fixed * fixed.float() + weight_moving * aligned.float()).clamp(0, 1)
