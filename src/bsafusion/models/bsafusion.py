"""The network: encoder -> MDF-FR -> BSFA -> MMFF, wired. Two presets of the same four stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsafusion.deformation import resize_field, warp
from bsafusion.models.alignment import (
    STEP_STRIDES,
    Alignment,
    AlignmentCfg,
    Mirror,
    Refine,
    build_alignment,
)
from bsafusion.models.encoder import STRIDE, EncoderCfg, Features, build_encoder
from bsafusion.models.fusion import Fusion, FusionCfg
from bsafusion.models.layers import resize
from bsafusion.models.representation import ModalityRepresentation, Representation, RepresentationCfg

FUSION_PREFIXES = ("fusion.", "encoder.shallow.")
"""How the names of the parameters begin that serve fusion alone."""

JUDGE_PREFIX = "representation.judge."
"""Of the classifier's copy behind ``L_ce2``, which follows the classifier and is never trained itself."""

ASSESSMENT_PREFIX = "alignment.assessment."
"""Of the head that judges a finished alignment."""


@dataclass(frozen=True)
class BSAFusionCfg:
    """Options of the whole network, by default ours; see each stage's own ``Cfg``.

    Attributes:
        working_side: longer side, pixels, at which images are encoded and aligned; the field is brought back
            to full resolution and the fused image is drawn there.
    """

    preset: str = "default"
    encoder: EncoderCfg = field(default_factory=EncoderCfg)
    representation: RepresentationCfg = field(default_factory=RepresentationCfg)
    alignment: AlignmentCfg = field(default_factory=AlignmentCfg)
    fusion: FusionCfg = field(default_factory=FusionCfg)
    working_side: int = 257

    def __post_init__(self) -> None:
        if type(self.working_side) is not int or self.working_side < 33:
            raise ValueError(f"working_side {self.working_side!r}: expected a whole number of pixels, at least 33")
        if self.encoder.widths[-1] != self.representation.dim:
            raise ValueError(
                f"the encoder makes tokens of {self.encoder.widths[-1]} channels, "
                f"MDF-FR expects {self.representation.dim}: set them equal"
            )
        if self.alignment.kind == "attention":
            channels = self.alignment.of(self.alignment.hidden, "1/16")
            if self.alignment.steps[0] != "1/16" or channels != self.representation.dim:
                raise ValueError(
                    f"attention starts on the tokens: its first step must be 1/16 (not {self.alignment.steps[0]}) "
                    f"with {self.representation.dim} channels (not {channels})"
                )
        elif self.encoder.kind == "restormer" and any(STEP_STRIDES[s] < STRIDE for s in self.alignment.steps):
            raise ValueError(
                "matching below 1/16 needs the pyramid encoder; leave those steps out or change the encoder"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> BSAFusionCfg:
        """The inverse of :meth:`to_dict`; lists (as JSON gives them) become tuples again."""

        def build(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
            return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

        stages = {"encoder": EncoderCfg, "representation": RepresentationCfg, "alignment": AlignmentCfg}
        built = {name: build(kind, options[name]) for name, kind in {**stages, "fusion": FusionCfg}.items()}
        return cls(**{**options, **built})


def default() -> BSAFusionCfg:
    """Ours: what a user gets."""
    return BSAFusionCfg()


def paper() -> BSAFusionCfg:
    """The published network (arXiv 2412.08050) with its coordinates put right; the baseline."""
    return BSAFusionCfg(
        preset="paper",
        encoder=EncoderCfg(kind="restormer", shallow=8, widths=(256,), colour=False),
        representation=RepresentationCfg(
            dim=256, mlp_dim=256, transfer_per_modality=True, cross_blocks=0, position_grid=17
        ),
        alignment=AlignmentCfg(
            kind="attention",
            steps=("1/16", "1/8", "1/4", "1/2", "1/1"),
            layers=2,
            hidden=(0, 256, 64, 32, 16, 8),
            carry=False,
            assessment=0,
        ),
        fusion=FusionCfg(kind="restormer", widths=(64, 32, 16, 12), inner=(104, 48, 24, 16)),
    )


PRESETS: dict[str, Callable[[], BSAFusionCfg]] = {"default": default, "paper": paper}


class Represented(NamedTuple):
    """What stages 1 and 2 hand to alignment."""

    fixed: Features
    moving: Features
    representation: Representation


class Matched(NamedTuple):
    """What stages 1 to 3 hand to fusion.

    ``alignment`` is on the encoder's grid, shallow features are at full resolution.
    """

    fixed: Features
    moving: Features
    representation: Representation
    alignment: Alignment


Mirrored = Literal["auto", "always", "never"]


class How(TypedDict, total=False):
    """How a pair is aligned, where not by default.

    Attributes:
        aligned_already: not at all: fuse as given, under a zero field; both similarities are then those before.
        mirrored: whether the mirror images are looked at too, for the mean of both answers: ``auto``, where the network
            expects a large error (``AlignmentCfg.look_again``), but not in training; ``always``, a
            little more exact and slower; or ``never``. The paper preset cannot.
        refine: see :class:`bsafusion.refinement.Refinement`; nothing where ``aligned_already``.
    """

    aligned_already: bool
    mirrored: Mirrored
    refine: Refine | None


class Aligned(NamedTuple):
    """A pair that is aligned and not yet fused: its ``alignment`` at full resolution, and what stage 4 needs."""

    alignment: Alignment
    representation: Representation
    matched: Matched


class Output(NamedTuple):
    """``fused`` and ``aligned``: luminance ``B 1 H W`` in [0, 1] on the fixed grid; ``alignment`` at full resolution
    too, except its ``steps``, which stay on the grids of the encoder."""

    fused: Tensor
    aligned: Tensor
    alignment: Alignment
    representation: Representation


def working_shape(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """The size at which an image is encoded: its own where the longer side is near ``side``."""
    longer = max(shape)
    if 0.75 * side <= longer <= side:
        return shape
    height, width = (max(STRIDE + 1, round((n - 1) * (side - 1) / (longer - 1)) + 1) for n in shape)
    return height, width


def in_colour(picture: Tensor) -> Tensor:
    """A picture ``B 1 H W`` or ``B 3 H W`` as luminance and chroma, ``B 3 H W``; grey has no chroma."""
    return F.pad(picture, (0, 0, 0, 0, 0, 3 - picture.shape[1]))


def _check_pictures(fixed: Tensor, moving: Tensor) -> None:
    images = (fixed, moving)
    of_one_size = len({(len(x), *x.shape[2:]) for x in images}) == 1
    if not of_one_size or any(x.dim() != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 32 for x in images):
        raise ValueError(
            f"fixed {tuple(fixed.shape)} and moving {tuple(moving.shape)}: expected both as B 1 H W or B 3 H W "
            "(luminance, chroma) of one size, 32 pixels a side or more; bring the moving image to the fixed grid first "
            "(preprocessing.match_grids)"
        )


class BSAFusion(nn.Module):
    """``(fixed, moving) -> Output``; see :class:`BSAFusionCfg` for what can be switched off."""

    def __init__(self, cfg: BSAFusionCfg | None = None) -> None:
        super().__init__()
        self.cfg = cfg or default()
        strides = (STRIDE,) if self.cfg.encoder.kind == "restormer" else (2, 4, 8, 16)
        widths = dict(zip(strides, self.cfg.encoder.widths, strict=True))
        self.encoder = build_encoder(self.cfg.encoder)
        self.representation = ModalityRepresentation(self.cfg.representation)
        self.alignment = build_alignment(self.cfg.alignment, widths)
        self.fusion = Fusion(
            self.cfg.fusion,
            tokens=self.cfg.representation.dim,
            widths=widths,
            shallow=self.cfg.encoder.shallow,
        )

    def _working_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Training sees images, and windows of them, at their own scale: the known fields are on their grid."""
        return shape if self.training else working_shape(shape, self.cfg.working_side)

    def to_working(self, image: Tensor) -> Tensor:
        """``B C H W`` -> ``B C h w`` at working size, its border repeated to ``16 n + 1`` voxels a side."""
        shape = self._working_shape((image.shape[-2], image.shape[-1]))
        if shape != tuple(image.shape[-2:]):
            smooth = shape[0] < image.shape[-2] or shape[1] < image.shape[-1]
            image = F.interpolate(image, size=shape, mode="bilinear", align_corners=True, antialias=smooth)
        pad = [-(n - 1) % STRIDE for n in shape]
        return F.pad(image, (0, pad[1], 0, pad[0]), mode="replicate") if any(pad) else image

    def encode(self, images: Tensor) -> Features:
        """Stage 1 at working size, its shallow features at full resolution."""
        features: Features = self.encoder(self.to_working(images))
        shape = (images.shape[-2], images.shape[-1])
        if self._working_shape(shape) == shape:
            return features._replace(shallow=self._crop(features.shallow, shape))
        return features._replace(shallow=self.encoder.see(images[:, :1]))

    def _crop(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        height, width = self._working_shape(shape)
        return x[..., :height, :width]

    def _to_full(self, alignment: Alignment, shape: tuple[int, int]) -> Alignment:
        scale = (max(shape) - 1) / (max(self._working_shape(shape)) - 1)  # of the longer side, which decided the size
        error, similarity, apart = alignment.expected_error, alignment.similarity, alignment.disagreement
        assessed = alignment.assessed_error

        def image(x: Tensor) -> Tensor:
            return resize(self._crop(x, shape), shape)

        return alignment._replace(
            displacement=resize_field(self._crop(alignment.displacement, shape), shape=shape),
            inverse=resize_field(self._crop(alignment.inverse, shape), shape=shape),
            expected_error=None if error is None else image(error) * scale,
            disagreement=None if apart is None else image(apart) * scale,
            assessed_error=None if assessed is None else assessed * scale,
            similarity=None if similarity is None else (image(similarity[0]), image(similarity[1])),
        )

    def match(
        self,
        fixed: Tensor,
        moving: Tensor,
        *,
        aligned_already: bool = False,
        mirrored: Mirrored = "auto",
        refine: Refine | None = None,
    ) -> Matched:
        """Stages 1 to 3 for two images as in :meth:`forward`; for the options see :class:`How`."""
        _check_pictures(fixed, moving)
        if fixed.shape != moving.shape:
            fixed, moving = in_colour(fixed), in_colour(moving)
        images = torch.cat([fixed, moving])
        plain = self._represent(self.encode(images))
        height, width = plain.fixed.tokens.shape[-2:]
        grid = (STRIDE * (height - 1) + 1, STRIDE * (width - 1) + 1)
        if aligned_already:
            return Matched(*plain, self.alignment.leave(*plain, grid))
        return Matched(*plain, self.alignment(*plain, grid, mirror=self._mirror(images, mirrored), refine=refine))

    def _mirror(self, images: Tensor, mirrored: Mirrored) -> Mirror | None:
        """How stage 3 sees the mirror images of a batch, the fixed ``images`` first; None where it shall not."""
        able = self.cfg.alignment.kind == "matching"
        if mirrored == "never" or (mirrored == "auto" and (self.training or not able)):
            return None

        def represent(places: Tensor) -> Represented:
            chosen = torch.cat([half[places] for half in images.chunk(2)])
            return self._represent(Features(chosen, self.encoder.pyramid(self.to_working(chosen).flip(-1))))

        return Mirror(-math.inf if mirrored == "always" else self.cfg.alignment.look_again, represent)

    def _represent(self, both: Features) -> Represented:
        """Stage 2, for features whose first half is of the fixed images."""
        count = len(both.shallow) // 2
        fixed = Features(both.shallow[:count], {s: f[:count] for s, f in both.pyramid.items()})
        moving = Features(both.shallow[count:], {s: f[count:] for s, f in both.pyramid.items()})
        return Represented(fixed, moving, self.representation(fixed.tokens, moving.tokens))

    def see_again(self, fixed: Tensor, moving: Tensor, matched: Matched) -> Matched:
        """``matched`` with the shallow features computed anew, to train them while the rest stays as it is."""
        shallow_fixed, shallow_moving = self.encoder.see(torch.cat([fixed[:, :1], moving[:, :1]])).chunk(2)
        return matched._replace(
            fixed=matched.fixed._replace(shallow=shallow_fixed), moving=matched.moving._replace(shallow=shallow_moving)
        )

    def fuse(self, fixed: Tensor, moving: Tensor, matched: Matched, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """The fused and the aligned luminance, ``B 1 H W``, under a field on the encoder's grid."""
        shape = (fixed.shape[-2], fixed.shape[-1])
        full = resize_field(self._crop(displacement, shape), shape=shape)
        aligned = warp(moving[:, :1], full, padding="zeros")  # beyond the moving frame there is background
        return self.fuse_aligned(fixed, aligned, matched, displacement), aligned

    def fuse_aligned(self, fixed: Tensor, aligned: Tensor, matched: Matched, displacement: Tensor) -> Tensor:
        """Stage 4: the fused luminance; ``aligned``: ``B 1 H W``, the moving luminance under that field."""
        shape = (fixed.shape[-2], fixed.shape[-1])
        features, plain = (matched.fixed, matched.moving), matched.representation.plain
        running = self.fusion.climb(features[0].pyramid, features[1].pyramid, plain, displacement)
        running = resize(self._crop(resize(running, (displacement.shape[-2], displacement.shape[-1])), shape), shape)
        full = resize_field(self._crop(displacement, shape), shape=shape)
        shallow_moving = warp(features[1].shallow, full)
        return self.fusion.draw(fixed[:, :1], aligned, (features[0].shallow, shallow_moving), running)

    def forward(self, fixed: Tensor, moving: Tensor, **how: Unpack[How]) -> Output:
        """Align ``moving`` to ``fixed`` and fuse both.

        Args:
            fixed, moving: ``B 1 H W`` luminance, float32 in [0, 1], or ``B 3 H W`` with chroma (Cb, Cr of BT.601, in
                [-0.5, 0.5]) after it; on one grid, at least 32 pixels a side.
            how: see :class:`How`.
        """
        matched = self.match(fixed, moving, **how)
        fused, aligned = self.fuse(fixed, moving, matched, matched.alignment.displacement)
        alignment = self._to_full(matched.alignment, (fixed.shape[-2], fixed.shape[-1]))
        return Output(fused, aligned, alignment, matched.representation)

    def _evaluating(self) -> BSAFusion:
        """Itself in evaluation mode. To go through all layers anew takes as long as a stage."""
        return self.eval() if self.training else self

    @torch.inference_mode()
    def predict(self, fixed: Tensor, moving: Tensor, **how: Unpack[How]) -> Output:
        """:meth:`forward` for inference; puts the network in evaluation mode."""
        return self._evaluating()(fixed, moving, **how)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def predict_alignment(self, fixed: Tensor, moving: Tensor, **how: Unpack[How]) -> Aligned:
        """:meth:`predict` without stage 4."""
        matched = self._evaluating().match(fixed, moving, **how)
        alignment = self._to_full(matched.alignment, (fixed.shape[-2], fixed.shape[-1]))
        return Aligned(alignment, matched.representation, matched)

    @torch.inference_mode()
    def predict_fusion(self, fixed: Tensor, aligned: Tensor, pair: Aligned) -> Tensor:
        """Stage 4 after :meth:`predict_alignment`: the fused luminance ``B 1 H W``.

        Args:
            fixed: as there.
            aligned: ``B 1 H W``, the moving luminance under the field of ``pair``. It may show more than the moving
                image that was aligned, which ends with the fixed grid.
            pair: what :meth:`predict_alignment` found.
        """
        return self._evaluating().fuse_aligned(fixed, aligned, pair.matched, pair.matched.alignment.displacement)
