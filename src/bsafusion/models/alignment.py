"""Stage 3, BSFA: bidirectional stepwise feature alignment.

Both images move. The network keeps a grid *between* the two images and two displacement fields on it: the
middle point ``m`` shows the anatomy of the fixed point ``m + u_fixed(m)`` and of the moving point
``m + u_moving(m)``. Steps go from coarse to fine; each pulls both images' features to the middle, finds what
displacement is left between them, and shares it: ``u_fixed`` composes with one part of it, ``u_moving`` with
the rest. At the end

    ``x -> x + u(x)``  =  (middle -> moving) after (middle -> fixed)^-1,

so that swapping the images gives the inverse. Fields are pull-back, in voxels of their own grid (see
``deformation``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsafusion.deformation import affine_field, compose, identity_grid, integrate, invert, lengths, resize_field, warp
from bsafusion.models.assessment import RADIUS, Assessment
from bsafusion.models.encoder import STRIDE, Features
from bsafusion.models.layers import GELU, ResidualBlock, conv_norm_act, join, resize
from bsafusion.models.representation import Representation

Direction = Literal["both", "forward", "reverse"]
SIMILARITY_STRIDE = 4  # of the descriptors whose likeness is reported
ASSESSMENT_STRIDES = (4, 8, 16)  # of the descriptors by which the whole result is judged
STEP_STRIDES = {"affine": STRIDE, "1/16": 16, "1/8": 8, "1/4": 4, "1/2": 2, "1/1": 1}


class Step(NamedTuple):
    """The state after one named step, on the grid of that step.

    Attributes:
        name: key of ``STEP_STRIDES``.
        field_fixed, field_moving: ``B 2 h w``, from the middle grid to the two images, voxels of this grid.
        velocity: ``B 2 h w``, the displacement that the step found between the two.
        match_logits: what the step compared, for supervision: ``B N N`` between all tokens (``affine``) or
            ``B (2r+1)^2 h w`` over a window, offsets in row-major order; None where the step does not match.
        before: the pair of fields as they were when the step looked.
    """

    name: str
    field_fixed: Tensor
    field_moving: Tensor
    velocity: Tensor
    match_logits: Tensor | None
    before: tuple[Tensor, Tensor]


class Refined(NamedTuple):
    """What a refinement makes of the last step: its fields, ``B 2 h w``, and its objective before and after, ``B``."""

    field_fixed: Tensor
    field_moving: Tensor
    objective: tuple[Tensor, Tensor]


class Mirror(NamedTuple):
    """A look at the mirror images (left and right exchanged) of some pairs of a batch.

    Attributes:
        above: pixels of the working grid; of pairs whose expected error, averaged over the middle grid, exceeds it.
            That is the same for the swapped images and for the mirror images. Minus infinity: of all.
        represent: from the places of pairs in the batch to what stages 1 and 2 say of their mirror images.
    """

    above: float
    represent: Callable[[Tensor], tuple[Features, Features, Representation]]


Refine = Callable[[Step, tuple[Tensor, Tensor], Tensor, tuple[float, float]], Refined]
"""From the last step, the descriptors of both images on its grid (``B C h w``), the scale of their logits and the
shares of the two sides; see ``refinement``."""


class Alignment(NamedTuple):
    """Fields ``B 2 H W``: ``aligned(x) = moving(x + displacement(x))``, ``inverse`` the other way.

    ``expected_error``: ``B 1 H W``, pixels, the network's own estimate of how far the field is off.
    ``similarity``: ``B 1 H W`` twice, the cosine of the images' descriptors at each pixel before and after
    alignment (in evaluation mode only). ``disagreement``: ``B 1 H W``, pixels, how far the answers for the images
    and for their mirror images are from their mean; NaN in pairs whose mirror images were not looked at, None where
    that is all of them (see :class:`Mirror`). ``assessed_error``: ``B``, pixels, the mean error inside the head as
    judged from the aligned pair, where weights were trained to (see ``assessment``). The attention preset has none of
    them. ``refined``: the objective of a refinement before and after, ``B``, where there was one. ``steps`` stay on
    their own grids; of mirror images the last one alone has a part in them.
    """

    displacement: Tensor
    inverse: Tensor
    steps: tuple[Step, ...]
    expected_error: Tensor | None = None
    similarity: tuple[Tensor, Tensor] | None = None
    disagreement: Tensor | None = None
    assessed_error: Tensor | None = None
    refined: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class AlignmentCfg:
    """Options of BSFA.

    Attributes:
        kind: ``attention``: as published; ``matching``: ours, local correlation of shared descriptors.
        steps: names of the steps, coarse to fine; one to five.
        direction: who moves: ``both``, the moving image (``forward``) or the fixed one (``reverse``).
        layers: convolutional layers in each step.
        residual: residual blocks after them, one value for each name in ``STEP_STRIDES``, taken or not (matching only).
        context: channels of each image that a step sees beside the correlation (matching only).
        hidden: channels of those layers, one value for each name in ``STEP_STRIDES``, taken or not (affine has none).
        descriptors: channels of a unit-length descriptor (matching only).
        radius: of the local correlation window, in voxels of the step's grid, likewise (matching only).
        squarings: of each local step, taken as a velocity field to integrate; with 0 it is a displacement
            (matching only).
        assessment: channels of the head that judges the result as a whole; 0 for none (matching only).
        carry: each step sees the field so far and what the local step before it made of its matches (matching only).
        look_again: pixels of the working grid; where the error that the network expects, averaged over the middle
            grid, is larger, it looks at the mirror images as well (matching only). Chosen on ``val`` for the shipped
            weights, for what it gains (``experiments/inference.py``) and so that a pair of ``paper`` takes a quarter
            of the paper preset's time on average (``README.md``).
    """

    kind: Literal["attention", "matching"] = "matching"
    steps: tuple[str, ...] = ("affine", "1/16", "1/8", "1/4")
    direction: Direction = "both"
    layers: int = 2
    residual: tuple[int, ...] = (0, 2, 2, 0, 0, 0)
    context: int = 24
    hidden: tuple[int, ...] = (0, 64, 64, 48, 24, 8)
    descriptors: int = 32
    radius: tuple[int, ...] = (0, 3, 3, 3, 2, 1)
    squarings: int = 0
    carry: bool = True
    assessment: int = 32
    look_again: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.steps) <= 5 or any(s not in STEP_STRIDES for s in self.steps):
            raise ValueError(f"steps {self.steps}: expected one to five of {', '.join(STEP_STRIDES)}")
        places = [tuple(STEP_STRIDES).index(s) for s in self.steps]
        if any(later <= earlier for earlier, later in pairwise(places)):
            raise ValueError(
                f"steps {self.steps}: expected each once, from coarse to fine, as in {tuple(STEP_STRIDES)}"
            )
        if self.kind not in ("attention", "matching"):
            raise ValueError(f"kind {self.kind!r}: expected attention or matching")
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction {self.direction!r}: expected one of {', '.join(get_args(Direction))}")
        if self.kind == "attention" and "affine" in self.steps:
            raise ValueError("the attention preset has no affine step; start its steps at 1/16")
        if min(self.layers, self.context, *self.residual, *self.radius) < 0:
            raise ValueError(
                f"layers {self.layers}, context {self.context}, residual {self.residual}, radius {self.radius}: "
                "expected 0 or more in each"
            )
        if not self.look_again >= 0:
            raise ValueError(f"look_again {self.look_again}: expected pixels, 0 or more")
        if not 0 <= self.squarings <= 8:
            raise ValueError(f"squarings {self.squarings}: expected 0 to 8")
        if min(len(self.hidden), len(self.radius), len(self.residual)) <= places[-1]:
            raise ValueError(
                f"hidden {self.hidden}, radius {self.radius} and residual {self.residual}: expected a value for each "
                f"of {tuple(STEP_STRIDES)}, at least to {self.steps[-1]}"
            )
        if self.kind == "matching":
            if "1/1" in self.steps:
                raise ValueError(f"steps {self.steps}: matching has no descriptors at 1/1; expected steps down to 1/2")
            widths = [
                self.descriptors,
                *([self.assessment] if self.assessment else []),
                *(self.of(self.hidden, s) for s in self.steps if s != "affine"),
            ]
            if any(w < 8 or w % 8 for w in widths):
                raise ValueError(
                    f"descriptors, assessment and hidden {widths}: expected multiples of 8, the size of a norm's group"
                )

    @staticmethod
    def of(values: tuple[int, ...], name: str) -> int:
        """The value of a step in ``hidden``, ``radius`` or ``residual``."""
        return values[tuple(STEP_STRIDES).index(name)]

    def carried(self, name: str) -> int:
        """Channels that a local step is handed by the steps before it."""
        place = self.steps.index(name)
        return 2 + (self.of(self.hidden, self.steps[place - 1]) if place else 0) if self.carry else 0


def _share(direction: Direction) -> tuple[float, float]:
    """Which part of a step's displacement the fixed and the moving side take."""
    return {"both": (-0.5, 0.5), "forward": (0.0, 1.0), "reverse": (-1.0, 0.0)}[direction]


def between_images(
    steps: tuple[Step, ...], shape: tuple[int, int], *, exactly: bool = True
) -> tuple[Alignment, Tensor]:
    """Turn the middle grid's fields into fields between the two images at full resolution.

    ``exactly``: inverses are iterated until they are right; otherwise, for training, a few times. Also returns the
    field from the fixed image to the middle, on the grid of the last step.
    """
    field_fixed, field_moving = steps[-1].field_fixed, steps[-1].field_moving
    both = torch.cat([field_fixed, field_moving])
    inverses = invert(both) if exactly else invert(both, tolerance=None, iterations=8)
    fixed_to_middle, moving_to_middle = inverses.chunk(2)
    displacement = resize_field(compose(field_moving, fixed_to_middle), shape=shape)
    inverse = resize_field(compose(field_fixed, moving_to_middle), shape=shape)
    return Alignment(displacement, inverse, steps), fixed_to_middle


# --- ours: matching -------------------------------------------------------------------------------


def mirror_field(field: Tensor) -> Tensor:
    """The field ``B 2 H W`` between the mirror images (left and right exchanged) of two images."""
    down, right = field.flip(-1).unbind(1)
    return torch.stack([down, -right], dim=1)


def local_correlation(a: Tensor, b: Tensor, radius: int, *, block: int = 11) -> Tensor:
    """Inner products of every descriptor of ``a`` with those of ``b`` in a window around it.

    ``B C H W`` twice -> ``B (2r+1)^2 H W``; channel ``(dy + r)(2r + 1) + dx + r`` holds
    ``<a(y, x), b(y + dy, x + dx)>``, 0 beyond the border. Rows are cut into blocks, each compared by one matrix
    product with all that its windows see, whose bands hold the answer: on a CPU several times faster, and smaller, than
    one product per offset. The channels lie last in memory.
    """
    batch, channels, height, width = a.shape
    count, span, reach = -(-width // block), 2 * radius + 1, block + 2 * radius
    fill = count * block - width
    rows_a = F.pad(a.movedim(1, -1), (0, 0, 0, fill)).reshape(batch, height, count, block, channels)
    rows_b = F.pad(b.movedim(1, -1), (0, 0, radius, radius + fill, radius, radius))
    windows = rows_b.unfold(2, reach, block).unfold(1, span, 1)  # B H count C reach span
    seen = windows.permute(0, 1, 2, 5, 4, 3).flatten(3, 4)  # B H count span*reach C
    products = rows_a @ seen.mT  # B H count block span*reach
    # Entry (i, dy, i + dx) of each product is wanted: one more column a row brings the bands to the front.
    padded = F.pad(products.flatten(-2), (0, block)).view(batch, height, count, block, span * reach + 1)
    skewed = padded[..., :-1].view(batch, height, count, block, span, reach)
    bands = skewed[..., :span].reshape(batch, height, count * block, span**2)
    return bands[:, :, :width].movedim(-1, 1)


def reverse_correlation(correlation: Tensor, radius: int) -> Tensor:
    """``local_correlation(b, a)`` from ``local_correlation(a, b)``: the same products, at the other end."""
    batch, channels, height, width = correlation.shape
    span = 2 * radius + 1
    planes = F.pad(correlation.movedim(1, -1), (0, 0, *(radius,) * 4)).contiguous()
    # At (y, x) offset (dy, dx), both from 0, was channel -1 - (dy span + dx) of (y + dy, x + dx): steps of this size.
    item, row, column, _ = planes.stride()
    steps = (item, row, column, row - span, column - 1)
    moved = planes.as_strided((batch, height, width, span, span), steps, channels - 1)
    return moved.flatten(3).movedim(-1, 1)


class Descriptors(nn.Module):
    """Top-down path from the transferred tokens to unit-length descriptors, shared by both images."""

    def __init__(self, cfg: AlignmentCfg, widths: dict[int, int]) -> None:
        super().__init__()
        finest = STEP_STRIDES[cfg.steps[-1]]
        self.strides = sorted((s for s in widths if s >= finest), reverse=True)
        width = cfg.descriptors
        self.lateral = nn.ModuleDict({str(s): nn.Conv2d(widths[s], width, 1) for s in self.strides})
        self.mix = nn.ModuleDict({str(s): conv_norm_act(width, width) for s in self.strides})
        self.head = nn.ModuleDict({str(s): nn.Conv2d(width, width, 1) for s in self.strides})

    def forward(self, matched: Tensor, pyramid: dict[int, Tensor]) -> dict[int, Tensor]:
        descriptors: dict[int, Tensor] = {}
        above: Tensor | None = None
        for stride in self.strides:
            key = str(stride)
            x = self.lateral[key](matched if stride == STRIDE else pyramid[stride])
            if above is not None:
                x = x + resize(above, (x.shape[-2], x.shape[-1]))
            above = self.mix[key](x)
            descriptors[stride] = F.normalize(self.head[key](above), dim=1)
        return descriptors


def solve_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution ``B N M`` of ``matrix @ x = right``, by Gauss and Jordan; ``matrix``, ``B N N``, is symmetric and
    positive definite, so no pivots are needed.

    torch's own solver waits for the device to say whether it went well.
    """
    rows, count = torch.cat([matrix, right], dim=2), matrix.shape[1]
    for i in range(count):
        row = rows[:, i : i + 1] / rows[:, i : i + 1, i : i + 1]
        others = rows - rows[:, :, i : i + 1] * row
        rows = torch.cat([others[:, :i], row, others[:, i + 1 :]], dim=1)
    return rows[:, :, count:]


class AffineStep(nn.Module):
    """One affine map from all-to-all matches of the tokens, antisymmetric in the two images.

    A match of ``x`` with ``y`` says ``y - x = G (x + y) / 2 + t``. Fitting the generator ``(G, t)`` to the
    *midpoints* makes it change its sign, and nothing else, when the images are swapped;
    ``m -> m -+ (G m + t) / 2`` are then the two maps out of the middle, exact for any affine map (for a
    rotation this is Cayley's formula).
    """

    RIDGE = 2e-3
    ROUNDS = 3  # of iteratively reweighted least squares
    INLIER = 0.08  # residual, in half image sides, at which a match counts half

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Descriptors at stride 16 -> velocity ``B 2 h w`` in voxels, logits of all matches ``B N N``."""
        batch, _, height, width = a.shape
        logits = (a.flatten(2).transpose(1, 2) @ b.flatten(2)).float() * self.log_scale.exp()
        half = max(height, width) / 2
        points = identity_grid((height, width), logits, centred=True).flatten(1).T / half  # N 2
        forward, backward = logits.softmax(2), logits.softmax(1).transpose(1, 2)
        here = points.expand(batch, -1, -1)
        x = torch.cat([here, backward @ points], dim=1)
        y = torch.cat([forward @ points, here], dim=1)
        weight = torch.cat([forward.square().sum(2), backward.square().sum(2)], dim=1)
        middle = torch.cat([(x + y) / 2, torch.ones_like(x[..., :1])], dim=2)  # B 2N 3
        robust = torch.ones_like(weight)
        ridge = self.RIDGE * torch.eye(3, dtype=weight.dtype, device=weight.device)
        for _ in range(self.ROUNDS):
            weighted = middle * (weight * robust / weight.shape[1])[..., None]
            generator = solve_definite(weighted.mT @ middle + ridge, weighted.mT @ (y - x))
            residual = (y - x - middle @ generator).norm(dim=2).detach()
            robust = 1 / (1 + (residual / self.INLIER).square())
        matrix = generator.transpose(1, 2).clone()  # B 2 3: linear part, translation in half sides
        matrix = torch.cat(
            [
                matrix[..., :2] + torch.eye(2, dtype=matrix.dtype, device=matrix.device),
                matrix[..., 2:] * half,
            ],
            2,
        )
        return affine_field(matrix, shape=(height, width)), logits


class Found(NamedTuple):
    """What a local step says: ``velocity`` ``B 2 h w`` and the log of its expected error ``B 1 h w``, voxels;
    ``logits`` ``B (2r+1)^2 h w``; ``body``, the features behind them, of each direction it looked in."""

    velocity: Tensor
    log_error: Tensor
    logits: Tensor
    body: Tensor


class MatchingStep(nn.Module):
    """Finds what displacement is left between two sets of descriptors on the middle grid."""

    def __init__(self, cfg: AlignmentCfg, name: str) -> None:
        super().__init__()
        self.radius, hidden = cfg.of(cfg.radius, name), cfg.of(cfg.hidden, name)
        self.direction, self.carry, self.stride = cfg.direction, cfg.carry, STEP_STRIDES[name]
        span = 2 * self.radius + 1
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.context = nn.Conv2d(cfg.descriptors, cfg.context, 1)
        self.body = nn.Sequential(
            nn.Conv2d(span * span + 3 + 2 * cfg.context + cfg.carried(name), hidden, 1),
            GELU(),
            *(conv_norm_act(hidden, hidden, dilation=i + 1) for i in range(cfg.layers)),
            *(ResidualBlock(hidden) for _ in range(cfg.of(cfg.residual, name))),
        )
        self.out = nn.Conv2d(hidden, 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def _look(self, correlation: Tensor, own: Tensor, other: Tensor, *carried: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The displacement from the first to the second image, voxels, the log of its expected error, and what the
        next step is handed."""
        probability = self._logits(correlation).movedim(1, -1).softmax(-1)
        offsets = identity_grid((2 * self.radius + 1,) * 2, probability).flatten(1) - self.radius  # 2 span^2
        mean = (probability @ offsets.T).movedim(-1, 1)
        peak = probability.amax(-1).unsqueeze(1)
        body = self.body(join(correlation, *(t.to(correlation) for t in (mean, peak, own, other, *carried))))
        out = self.out(body).float()
        limit = self.radius + 1.0
        return limit * torch.tanh((out[:, :2] + peak * mean) / limit), out[:, 2:], body

    def _logits(self, correlation: Tensor) -> Tensor:
        return correlation.float() * self.log_scale.exp()

    def forward(self, descriptors: Tensor, so_far: Tensor, body: Tensor | None) -> Found:
        """Look at the descriptors of both images under the field so far.

        Args:
            descriptors: ``2B C h w``, those of the fixed images first.
            so_far: ``B 2 h w``, the displacement between the two that the steps before found, voxels of this grid.
            body: of the local step before, on its own grid.
        """
        fixed, moving = descriptors.chunk(2)
        correlation = local_correlation(fixed, moving, self.radius)
        context_fixed, context_moving = self.context(descriptors).chunk(2)
        # In units of the coarsest grid: of order 1 at every step.
        so_far = so_far * (self.stride / STRIDE)
        looks = []  # from the fixed image, from the moving one or from both, in one batch
        if self.direction != "reverse":
            looks.append((correlation, context_fixed, context_moving, so_far))
        if self.direction != "forward":
            looks.append((reverse_correlation(correlation, self.radius), context_moving, context_fixed, -so_far))
        correlations, own, other, fields = (torch.cat(of) for of in zip(*looks, strict=True))
        carried: tuple[Tensor, ...] = ()
        if self.carry:
            carried = (fields,) if body is None else (fields, resize(body, (fields.shape[-2], fields.shape[-1])))
        velocities, log_errors, body = self._look(correlations, own, other, *carried)
        # What is seen from the moving image counts the other way, so two looks are antisymmetric in the images.
        signs = {"forward": (1,), "reverse": (-1,), "both": (1, -1)}[self.direction]
        parts = zip(signs, velocities.chunk(len(signs)), strict=True)
        velocity = torch.stack([sign * part for sign, part in parts]).mean(0)
        log_error = torch.stack(log_errors.chunk(len(signs))).mean(0)
        return Found(velocity, log_error, self._logits(correlation), body)


class Search(NamedTuple):
    """What the steps found for a batch: ``log_error`` of the last one and ``disagreement`` (see :class:`Alignment`),
    ``B 1 h w`` in voxels of its grid; None where no local step was taken, or no mirror image was looked at."""

    steps: tuple[Step, ...]
    log_error: Tensor | None
    disagreement: Tensor | None = None

    def doubtful(self, above: float) -> Tensor:
        """The places in the batch of the pairs that :class:`Mirror` is for."""
        last = self.steps[-1]
        if self.log_error is None:
            expected = last.velocity.new_zeros(len(last.velocity))
        else:
            expected = self.log_error.exp().mean((1, 2, 3)) * STEP_STRIDES[last.name]
        return (expected > above).nonzero().flatten()

    def averaged(self, places: Tensor, mirrored: Search) -> Search:
        """For the pairs at these ``places`` the mean with the answer for their mirror images: of the last fields and
        of the expected error."""
        last, other = self.steps[-1], mirrored.steps[-1]
        own = (last.field_fixed[places], last.field_moving[places])
        seen = (mirror_field(other.field_fixed), mirror_field(other.field_moving))
        to_fixed, to_moving = ((a + b) / 2 for a, b in zip(own, seen, strict=True))
        apart = lengths((own[1] - own[0]) - (seen[1] - seen[0])) / 2
        unseen = last.velocity.new_full((len(last.velocity), 1, *apart.shape[2:]), math.nan)
        log_error = self.log_error
        if log_error is not None and mirrored.log_error is not None:
            mean = (log_error[places] + mirrored.log_error.flip(-1)) / 2
            log_error = log_error.index_copy(0, places, mean)
        step = last._replace(
            field_fixed=last.field_fixed.index_copy(0, places, to_fixed),
            field_moving=last.field_moving.index_copy(0, places, to_moving),
        )
        return Search((*self.steps[:-1], step), log_error, unseen.index_copy(0, places, apart))


def _reported(strides: Iterable[int]) -> int:
    """The stride of the descriptors whose likeness is reported."""
    return min(strides, key=lambda stride: abs(stride - SIMILARITY_STRIDE))


def _similarity(a: Tensor, b: Tensor, shape: tuple[int, int]) -> Tensor:
    """The cosine of two sets of descriptors ``B C h w`` at each pixel, ``B 1 H W``."""
    return resize((a * b).sum(1, keepdim=True), shape)


def _aligned(both: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Descriptors ``B C h w`` of the fixed, the moving and the aligned image, from ``2B C h w`` of the first two."""
    fixed, moving = both.detach().float().chunk(2)
    field = resize_field(displacement.detach(), shape=(both.shape[-2], both.shape[-1]))
    return fixed, moving, warp(moving, field)


class MatchingAlignment(nn.Module):
    """Stage 3 of the default preset."""

    def __init__(self, cfg: AlignmentCfg, widths: dict[int, int]) -> None:
        super().__init__()
        self.cfg = cfg
        self.descriptors = Descriptors(cfg, widths)
        self.steps = nn.ModuleDict(
            {
                name.replace("/", "_"): AffineStep() if name == "affine" else MatchingStep(cfg, name)
                for name in cfg.steps
            }
        )
        compared = [s for s in ASSESSMENT_STRIDES if s in self.descriptors.strides]
        judging = cfg.assessment and len(cfg.steps) > ("affine" in cfg.steps)  # the affine step expects no error
        self.assessment = Assessment(compared, cfg.assessment) if judging else None
        self.assessing = False  # in training; on where the assessment is what is trained

    def forward(
        self,
        fixed: Features,
        moving: Features,
        representation: Representation,
        shape: tuple[int, int],
        *,
        mirror: Mirror | None = None,
        refine: Refine | None = None,
    ) -> Alignment:
        """Align a batch. What ``mirror`` asks for is averaged with the answer for the mirror images; ``refine`` has the
        last word."""
        descriptors = self._describe(fixed, moving, representation)
        found = self._search(descriptors)
        if mirror is not None and len(places := found.doubtful(mirror.above)):
            found = found.averaged(places, self._search(self._describe(*mirror.represent(places))))
        refined: Refined | None = None
        if refine is not None:
            last = found.steps[-1]
            scale = self.steps[last.name.replace("/", "_")].get_parameter("log_scale").exp()
            of_fixed, of_moving = descriptors[STEP_STRIDES[last.name]].chunk(2)
            refined = refine(last, (of_fixed, of_moving), scale, _share(self.cfg.direction))
            last = last._replace(field_fixed=refined.field_fixed, field_moving=refined.field_moving)
            found = found._replace(steps=(*found.steps[:-1], last))
        alignment = self._conclude(found, descriptors, shape)
        return alignment if refined is None else alignment._replace(refined=refined.objective)

    def _search(self, descriptors: dict[int, Tensor]) -> Search:
        """Take the steps, from coarse to fine."""
        coarsest = descriptors[STRIDE]
        fields = coarsest.new_zeros(len(coarsest), 2, *coarsest.shape[-2:], dtype=torch.float32)
        share_fixed, share_moving = _share(self.cfg.direction)
        log_error: Tensor | None = None
        body: Tensor | None = None
        steps: list[Step] = []
        for name in self.cfg.steps:
            stride, step = STEP_STRIDES[name], self.steps[name.replace("/", "_")]
            both = descriptors[stride]
            # Each step is trained by its own loss: gradients do not run back through earlier fields.
            fields = resize_field(fields.detach(), shape=(both.shape[-2], both.shape[-1]))
            before_fixed, before_moving = fields.chunk(2)
            if name == "affine":
                velocity, logits = step(*both.chunk(2))
            else:
                velocity, log_error, logits, body = step(warp(both, fields), before_moving - before_fixed, body)
            squarings = 0 if name == "affine" else self.cfg.squarings
            fields = compose(fields, integrate(torch.cat([share_fixed * velocity, share_moving * velocity]), squarings))
            field_fixed, field_moving = fields.chunk(2)
            steps.append(Step(name, field_fixed, field_moving, velocity, logits, (before_fixed, before_moving)))
        return Search(tuple(steps), log_error)

    def _conclude(self, found: Search, descriptors: dict[int, Tensor], shape: tuple[int, int]) -> Alignment:
        """The fields between the two images, and what is said of them."""
        alignment, fixed_to_middle = between_images(found.steps, shape, exactly=not self.training)

        def pixels(middle: Tensor) -> Tensor:
            return resize(warp(middle, fixed_to_middle) * STEP_STRIDES[self.cfg.steps[-1]], shape)

        if found.log_error is not None:
            alignment = alignment._replace(expected_error=pixels(found.log_error.exp()))
        if found.disagreement is not None:
            alignment = alignment._replace(disagreement=pixels(found.disagreement))
        if self.training and not self.assessing:
            return alignment
        # The descriptors once more, after alignment: what is said of them trains nothing that they came from.
        after = {stride: _aligned(both, alignment.displacement) for stride, both in descriptors.items()}
        if self.assessment is not None and (self.assessing or bool(self.assessment.trained)):
            alignment = alignment._replace(assessed_error=self._assess(self.assessment, after, alignment))
        if not self.training:
            of_fixed, of_moving, of_aligned = after[_reported(after)]
            similarity = _similarity(of_fixed, of_moving, shape), _similarity(of_fixed, of_aligned, shape)
            alignment = alignment._replace(similarity=similarity)
        return alignment

    def leave(
        self, fixed: Features, moving: Features, representation: Representation, shape: tuple[int, int]
    ) -> Alignment:
        """No step at all, for images that are aligned already: zero fields, and both similarities as given."""
        descriptors = self._describe(fixed, moving, representation)
        of_fixed, of_moving = descriptors[_reported(descriptors)].float().chunk(2)
        as_given = None if self.training else _similarity(of_fixed, of_moving, shape)
        still = of_fixed.new_zeros(len(of_fixed), 2, *shape)
        return Alignment(still, still, (), similarity=None if as_given is None else (as_given, as_given))

    def _describe(self, fixed: Features, moving: Features, representation: Representation) -> dict[int, Tensor]:
        """Descriptors of both images at each stride, ``2B C h w``: those of the fixed ones first."""
        pyramid = {s: torch.cat([fixed.pyramid[s], moving.pyramid[s]]) for s in self.descriptors.strides if s != STRIDE}
        described: dict[int, Tensor] = self.descriptors(torch.cat(representation.matched), pyramid)
        return described

    def start_assessing(self) -> None:
        """From now on the assessment speaks, in training, too; it is what is trained."""
        if self.assessment is None:
            raise ValueError("this network has no assessment; set alignment.assessment above 0, with a local step")
        self.assessing = True
        self.assessment.trained.fill_(1)

    @staticmethod
    def _assess(
        assessment: Assessment, after: dict[int, tuple[Tensor, Tensor, Tensor]], alignment: Alignment
    ) -> Tensor:
        """The mean error that the head says, from the descriptors after alignment and the field between them."""
        correlations = {
            stride: local_correlation(after[stride][0], after[stride][2], RADIUS) for stride in assessment.strides
        }
        assert alignment.expected_error is not None
        error: Tensor = assessment(correlations, alignment.expected_error.detach(), alignment.displacement.detach())
        return error


# --- as published: attention ----------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Attention between the channels of two maps: queries from one, keys and values from the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_kv = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.to_kv(context).flatten(2).chunk(2, dim=1)
        q = self.to_q(x).flatten(2)
        similarity = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        attended = (similarity * self.temperature).softmax(-1) @ v
        projected: Tensor = self.project(attended.unflatten(2, x.shape[-2:]))
        return projected


class AttentionLayer(nn.Module):
    """FRL or RRL: a step of at most one voxel for one image, from its features and those of both."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.join = nn.Conv2d(2 * channels, channels, 1)
        self.attend_own = CrossAttention(channels)
        self.attend_joint = CrossAttention(channels)
        convolutions: list[nn.Module] = []
        for _ in range(layers):
            convolutions += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2)]
        self.residual = nn.Sequential(*convolutions)
        self.out = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        joint = self.join(torch.cat([own, other], dim=1))
        x = self.attend_own(own, joint) + self.attend_joint(joint, own)
        x = x + self.residual(x)
        return torch.tanh(self.out(x).float())


class UpBlock(nn.Module):
    """Twice the resolution, fewer channels; one for both images."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.InstanceNorm2d(out_channels, affine=True),
            nn.LeakyReLU(0.2),
        )

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        raised: Tensor = self.body(resize(x, shape))
        return raised


class AttentionAlignment(nn.Module):
    """Stage 3 of the paper preset: steps of at most one voxel per scale, added up, in both directions.

    As published, the total field is the sum of A's steps minus the sum of B's; its coordinates are put right.
    """

    def __init__(self, cfg: AlignmentCfg) -> None:
        super().__init__()
        self.cfg = cfg
        widths = [cfg.of(cfg.hidden, name) for name in cfg.steps]
        self.up = nn.ModuleList(UpBlock(c_in, c_out) for c_in, c_out in pairwise(widths))
        sides = {"both": ("moving", "fixed"), "forward": ("moving",), "reverse": ("fixed",)}[cfg.direction]
        self.sides = nn.ModuleDict({s: nn.ModuleList(AttentionLayer(c, cfg.layers) for c in widths) for s in sides})

    def forward(
        self,
        fixed: Features,
        moving: Features,
        representation: Representation,
        shape: tuple[int, int],
        *,
        mirror: Mirror | None = None,
        refine: Refine | None = None,
    ) -> Alignment:
        if mirror is not None:
            raise ValueError("the attention preset does not look at mirror images; leave mirrored out")
        if refine is not None:
            raise ValueError("the attention preset has no descriptors to refine by; leave the refinement out")
        features = dict(zip(("fixed", "moving"), representation.matched, strict=True))
        zero = torch.zeros_like(representation.matched[0][:, :2], dtype=torch.float32)
        totals = {"fixed": zero, "moving": zero}
        steps: list[Step] = []
        for index, name in enumerate(self.cfg.steps):
            stride = STEP_STRIDES[name]
            grid = ((shape[0] - 1) // stride + 1, (shape[1] - 1) // stride + 1)
            if index:
                features = {k: self.up[index - 1](v, grid) for k, v in features.items()}
            totals = {k: resize_field(v, shape=grid) for k, v in totals.items()}
            zero, before = torch.zeros_like(totals["moving"]), totals["moving"] - totals["fixed"]
            found = {
                own: self.sides[own].get_submodule(str(index))(
                    features[own], features["fixed" if own == "moving" else "moving"]
                )
                for own in self.sides
            }
            for own, step in found.items():
                features[own] = warp(features[own], step)
                totals[own] = totals[own] + step
            total = totals["moving"] - totals["fixed"]
            steps.append(Step(name, zero, total, total - before, None, (zero, before)))
        return between_images(tuple(steps), shape, exactly=not self.training)[0]

    def leave(
        self, fixed: Features, moving: Features, representation: Representation, shape: tuple[int, int]
    ) -> Alignment:
        """No step at all: zero fields."""
        still = representation.matched[0].new_zeros(len(representation.matched[0]), 2, *shape, dtype=torch.float32)
        return Alignment(still, still, ())

    def start_assessing(self) -> None:
        raise ValueError("the attention preset has no assessment to train; leave this part out")


def build_alignment(cfg: AlignmentCfg, widths: dict[int, int]) -> MatchingAlignment | AttentionAlignment:
    return AttentionAlignment(cfg) if cfg.kind == "attention" else MatchingAlignment(cfg, widths)
