"""Stage 2, MDF-FR: modal-discrepancy-free feature representation.

A class token gathers what is global and specific to the modality of an image (its MFRH, the modality feature
representation head) and a classifier reads the modality from it. The MFRH of each image is *injected* into
(added to) every token of the other; transfer blocks follow, after which a frozen copy of the classifier, the
judge, should not be able to tell the modality any more. What matching sees has lost the discrepancy; what
fusion sees (the plain tokens) has kept it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bsafusion.models.layers import CrossBlock, TransformerBlock, resize, wave_positions

MODALITIES = ("mri", "ct", "pet", "spect")  # the classifier's classes, in the order of its logits


class Representation(NamedTuple):
    """Maps are ``B C h w`` at stride 16, logits ``B 4``; first of the fixed, then of the moving image.

    The judge is asked in training only.
    """

    plain: tuple[Tensor, Tensor]
    matched: tuple[Tensor, Tensor]
    logits: tuple[Tensor, Tensor]
    judge_logits: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class RepresentationCfg:
    """Options of MDF-FR.

    Attributes:
        dim, heads, mlp_dim: channels of a token, attention heads and hidden channels of every block.
        blocks, transfer_blocks: transformer blocks of the classifier, and of the transfer after injection.
        transfer_per_modality: a transfer block for each side, as published, or one that both sides share.
        position_grid: side of the learned grid of position embeddings; 0 for none.
        cross_blocks: after transfer, blocks by which the tokens of each image look at those of the other.
        inject: add the MFRH of each image to the tokens of the other.
    """

    dim: int = 96
    heads: int = 4
    mlp_dim: int = 192
    blocks: int = 2
    transfer_blocks: int = 2
    transfer_per_modality: bool = False
    cross_blocks: int = 4
    position_grid: int = 0
    inject: bool = True

    def __post_init__(self) -> None:
        least = {"dim": 1, "heads": 1, "mlp_dim": 1, "blocks": 0, "transfer_blocks": 0, "cross_blocks": 0}
        for name, value in (least | {"position_grid": 0}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {value}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")


class ModalityClassifier(nn.Module):
    """Class token, transformer blocks and a classification head."""

    def __init__(self, cfg: RepresentationCfg) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, cfg.dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(cfg.dim, cfg.heads, cfg.mlp_dim) for _ in range(cfg.blocks)))
        self.head = nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.GELU(), nn.Linear(cfg.dim, len(MODALITIES)))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``B N C`` -> the MFRH ``B C``, the tokens ``B N C``, the logits ``B 4``."""
        first = self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        out = self.blocks(torch.cat([first, tokens], dim=1))
        mfrh, tokens = out[:, 0], out[:, 1:]
        return mfrh, tokens, self.head(mfrh)


class ModalityRepresentation(nn.Module):
    """Stage 2 for both images at once."""

    def __init__(self, cfg: RepresentationCfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.classifier = ModalityClassifier(cfg)
        self.judge = copy.deepcopy(self.classifier).requires_grad_(False)
        self.judging = True  # in training; off where L_ce2 has no weight
        transfer = [
            nn.Sequential(*(TransformerBlock(cfg.dim, cfg.heads, cfg.mlp_dim) for _ in range(cfg.transfer_blocks)))
            for _ in range(1 + cfg.transfer_per_modality)
        ]
        self.transfer = nn.ModuleList(transfer)
        self.cross = nn.ModuleList(CrossBlock(cfg.dim, cfg.heads, cfg.mlp_dim) for _ in range(cfg.cross_blocks))
        side = cfg.position_grid
        self.positions = nn.Parameter(torch.randn(1, cfg.dim, side, side) * 0.02) if side else None

    @torch.no_grad()
    def refresh_judge(self) -> None:
        """Copy the classifier as it is now into the judge; training calls this before every step."""
        for frozen, live in zip(self.judge.parameters(), self.classifier.parameters(), strict=True):
            frozen.copy_(live)

    def forward(self, fixed: Tensor, moving: Tensor) -> Representation:
        """Token maps of the two images, ``B C h w`` each."""
        shape = (fixed.shape[-2], fixed.shape[-1])
        if self.positions is not None:
            positions = resize(self.positions, shape)
            fixed, moving = fixed + positions, moving + positions
        # Both images in one batch: the fixed ones first, then the moving ones.
        mfrh, tokens, logits = self.classifier(torch.cat([fixed, moving]).flatten(2).transpose(1, 2))
        mfrh_fixed, mfrh_moving = mfrh.chunk(2)
        tokens_fixed, tokens_moving = tokens.chunk(2)
        if self.cfg.inject:
            injected_fixed = tokens_fixed + mfrh_moving[:, None]
            injected_moving = tokens_moving + mfrh_fixed[:, None]
        else:
            injected_fixed, injected_moving = tokens_fixed, tokens_moving
        if self.cfg.transfer_per_modality:
            matched_fixed, matched_moving = self.transfer[0](injected_fixed), self.transfer[1](injected_moving)
        else:
            matched_fixed, matched_moving = self.transfer[0](torch.cat([injected_fixed, injected_moving])).chunk(2)
        judge_logits = None
        if self.training and self.judging:
            _, _, judged = self.judge(torch.cat([matched_fixed, matched_moving]))
            judge_logits = (judged[: len(fixed)], judged[len(fixed) :])

        if self.cross:
            positions = wave_positions(shape, self.cfg.dim, matched_fixed)
            own = torch.cat([matched_fixed, matched_moving])
            for block in self.cross:
                own = block(own, torch.cat(own.chunk(2)[::-1]), (positions, positions))
            matched_fixed, matched_moving = own.chunk(2)

        def as_map(t: Tensor) -> Tensor:
            return t.transpose(1, 2).reshape(len(t), -1, *shape)

        return Representation(
            plain=(as_map(tokens_fixed), as_map(tokens_moving)),
            matched=(as_map(matched_fixed), as_map(matched_moving)),
            logits=(logits[: len(fixed)], logits[len(fixed) :]),
            judge_logits=judge_logits,
        )
