"""Training and validation pairs: read from a CSV, misaligned by a deformation drawn first, then applied.

The deformation ``p`` that makes the moving image is known exactly, ``moving(x) = truth(x + p(x))``, with
``truth`` on the fixed grid. Everything random is drawn as parameters from an explicit generator; what is
drawn is then applied by deterministic code, so that the truth is kept and a seed gives the same samples
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bsafusion.canonical import canonical
from bsafusion.colour import split_colour
from bsafusion.deformation import affine_field, compose, warp
from bsafusion.files import PathLike, read_csv
from bsafusion.image import TASKS, Geometry, Image, luma_of
from bsafusion.io import read_image
from bsafusion.metrics import head_mask
from bsafusion.models.representation import MODALITIES
from bsafusion.preprocessing import fit_intensity, match_grids, resample_to_grid, slices_apart

_COLUMNS = "task,fixed,moving[,id,slice,split,case]"


class DatasetError(ValueError):
    """A pairs CSV cannot be used."""


@dataclass(frozen=True)
class Pair:
    """One row of a pairs CSV: two images of one patient, aligned as well as their source could."""

    id: str
    task: str
    fixed: Path
    moving: Path
    split: str
    case: str


def read_pairs(path: PathLike, *, split: str | None = None) -> list[Pair]:
    """Rows of a CSV with columns ``fixed``, ``moving`` and ``task`` (``slice`` or ``id``, ``split``, ``case``
    if there are).

    Image paths are relative to the CSV. Raises :class:`DatasetError` for a CSV that :func:`bsafusion.files.read_csv`
    cannot read, an empty cell or an unknown task.
    """
    path = Path(path)
    pairs = []
    for number, row in read_csv(path, what="pairs CSV", columns=_COLUMNS, error=DatasetError):
        if not all(row[column] for column in ("task", "fixed", "moving")):
            raise DatasetError(f"{path}, line {number}: task, fixed or moving is empty; fill in all three")
        task = row["task"].lower()
        if task not in TASKS:
            raise DatasetError(f"{path}, line {number}: unknown task {row['task']!r}; expected {', '.join(TASKS)}")
        name = row.get("id") or row.get("slice") or str(number)
        files = (path.parent / row["fixed"], path.parent / row["moving"])
        pairs.append(Pair(name, task, *files, row.get("split") or "train", row.get("case") or ""))
    chosen = [p for p in pairs if split is None or p.split == split]
    if not chosen:
        raise DatasetError(
            f"{path}: no pairs{f' in split {split!r}' if split else ''}; check the split column "
            "(rows without one are of 'train')"
        )
    return chosen


def case_folds(pairs: Sequence[Pair], count: int) -> dict[str, int]:
    """Assign every case (patient) to one of ``count`` folds, such that each task's pairs are spread evenly.

    A case has one fold in all tasks. The largest cases are placed first, each where the least of its tasks is so far;
    the same pairs give the same folds.

    Raises:
        DatasetError: fewer than two folds, or a task with fewer cases than folds.
    """
    sizes: dict[str, dict[str, int]] = {}  # case -> task -> pairs
    for pair in pairs:
        of_case = sizes.setdefault(pair.case, {})
        of_case[pair.task] = of_case.get(pair.task, 0) + 1
    totals: dict[str, int] = {}
    for pair in pairs:
        totals[pair.task] = totals.get(pair.task, 0) + 1
    for task in totals:
        cases = sum(task in of_case for of_case in sizes.values())
        if not 2 <= count <= cases:
            raise DatasetError(f"{count} folds of {cases} cases in {task}; expected at least 2, at most one a case")
    load = [dict.fromkeys(totals, 0) for _ in range(count)]
    folds: dict[str, int] = {}

    def fullness(case: str, fold: int) -> tuple[float, int, int]:
        of_its_tasks = sum(load[fold][task] / totals[task] for task in sizes[case])
        return of_its_tasks, sum(load[fold].values()), fold

    for case in sorted(sizes, key=lambda name: (-sum(sizes[name].values()), name)):
        folds[case] = min(range(count), key=lambda fold: fullness(case, fold))
        for task, size in sizes[case].items():
            load[folds[case]][task] += size
    return folds


# --- drawn, then applied --------------------------------------------------------------------------


@dataclass(frozen=True)
class Misalignment:
    """A family of deformations; lengths in pixels, angles in degrees, each drawn from +- its value.

    Attributes:
        elastic: factor of uniform noise in [-1, 1] that is blurred with a Gaussian of ``sigma`` pixels.
        scale: largest relative change of size.
    """

    translation: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    elastic: float = 0.0
    sigma: float = 16.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not 0 <= getattr(self, f.name) < math.inf:
                raise ValueError(f"{f.name} {getattr(self, f.name)}: expected a finite number, 0 or more")
        if self.scale >= 1:
            raise ValueError(f"scale {self.scale}: expected less than 1, or the image may vanish")

    def draw(self, count: int, shape: tuple[int, int], generator: torch.Generator, *, milder: float = 0.0) -> Tensor:
        """Fields ``p``, ``count 2 H W``: ``moving(x) = truth(x + p(x))``; elastic first, affine after.

        ``milder``: how often each of rotation, scale and translation is reduced to a random part of itself.
        """
        uniform = torch.rand(count, 4, generator=generator, device=generator.device) * 2 - 1
        if milder:
            reduced, part = torch.rand(2, count, 3, generator=generator, device=generator.device)
            uniform = uniform * torch.where(reduced < milder, part.square(), 1.0)[:, [0, 1, 2, 2]]
        angle, factor = uniform[:, 0] * math.radians(self.rotation), 1 + uniform[:, 1] * self.scale
        cosine, sine, shift = factor * angle.cos(), factor * angle.sin(), uniform[:, 2:] * self.translation
        linear = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
        field = affine_field(torch.cat([linear, shift[:, :, None]], dim=2), shape=shape)
        if self.elastic:
            field = compose(field, self.elastic * smooth_noise(count, shape, self.sigma, generator))
        return field


def smooth_noise(count: int, shape: tuple[int, int], sigma: float, generator: torch.Generator) -> Tensor:
    """Uniform noise in [-1, 1] blurred with a Gaussian, ``count 2 H W``.

    Cut from a torus wide enough not to wrap.
    """
    height, width = (n + math.ceil(6 * sigma) for n in shape)
    noise = torch.rand(count, 2, height, width, generator=generator, device=generator.device) * 2 - 1
    fy = torch.fft.fftfreq(height, device=noise.device)[:, None]
    fx = torch.fft.rfftfreq(width, device=noise.device)[None]
    response = torch.exp(-2 * (math.pi * sigma) ** 2 * (fy.square() + fx.square()))
    blurred: Tensor = torch.fft.irfft2(torch.fft.rfft2(noise) * response, s=(height, width))
    return blurred[..., : shape[0], : shape[1]]


MISALIGNMENTS: dict[str, Misalignment] = {
    "paper": Misalignment(translation=2.56, elastic=256.0),
    "rigid": Misalignment(translation=8.0, rotation=8.0),
    # Noise of amplitude 1 blurred with sigma 16 has a mean magnitude of 0.0128, so 313 gives 4 px.
    "large": Misalignment(translation=24.0, rotation=20.0, scale=0.1, elastic=313.0),
}
"""Named families: the paper's recipe and two that go past it."""


def remap_contrast(image: Tensor, generator: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """Another contrast of the same anatomy, ``B 1 H W`` in [0, 1]: a random curve over the intensities,
    random blur, a slow bias and noise. One image in five keeps its own curve; ``strength`` scales all of it."""
    count, device = len(image), image.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    knots = 8
    curve = uniform(count, knots)
    curve[:, 0] *= (uniform(count) < 0.3).float()  # the background mostly stays dark
    identity = torch.linspace(0, 1, knots, device=device).expand(count, knots)
    curve = torch.where(uniform(count, 1) < 0.2, identity, identity.lerp(curve, strength))
    position = image.flatten(1).clamp(0, 1) * (knots - 1)
    below = position.floor().clamp(max=knots - 2).long()
    part = position - below
    mapped = (curve.gather(1, below) * (1 - part) + curve.gather(1, below + 1) * part).view_as(image)
    sigma = strength * 3 * uniform(count) * (uniform(count) < 0.5)
    mapped = blur(mapped, sigma)
    slope = strength * (uniform(count, 2) - 0.5)
    rows = torch.linspace(-1, 1, image.shape[-2], device=device).view(1, 1, -1, 1)
    columns = torch.linspace(-1, 1, image.shape[-1], device=device).view(1, 1, 1, -1)
    bias = 1 + 0.4 * (slope[:, 0].view(-1, 1, 1, 1) * rows + slope[:, 1].view(-1, 1, 1, 1) * columns)
    noise = torch.randn(image.shape, generator=generator, device=device)
    level = 0.03 * strength * uniform(count).view(-1, 1, 1, 1)
    return (mapped * bias + level * noise).clamp(0, 1)


SHADE_SIGMA = 20.0  # pixels


def shade(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness that changes slowly over the image, ``B 1 H W`` in [0, 1], as uptake and coil sensitivity do.

    The logarithm of the factor is smooth noise (``SHADE_SIGMA``) whose standard deviation is drawn up to ``strength``.
    """
    count, shape = len(image), (image.shape[-2], image.shape[-1])
    level = strength * torch.rand(count, 1, 1, 1, generator=generator, device=image.device)
    noise = smooth_noise(count, shape, SHADE_SIGMA, generator)[:, :1]
    noise = noise * math.sqrt(3) * 2 * math.sqrt(math.pi) * SHADE_SIGMA  # standard deviation 1, see smooth_noise
    return (image * (level * noise).exp()).clamp(0, 1)


def other_colours(chroma: Tensor, generator: torch.Generator) -> Tensor:
    """The same picture from another colour map, or from none: chroma ``B 2 H W`` turned and scaled, or 0 in half."""
    draw = torch.rand(2, len(chroma), 1, 1, generator=generator, device=chroma.device)
    angle, factor = 2 * math.pi * draw[0], (2.4 * (draw[1] - 0.5)).clamp(min=0)
    blue, red = chroma.unbind(1)
    turned = torch.stack([angle.cos() * blue - angle.sin() * red, angle.sin() * blue + angle.cos() * red], dim=1)
    return factor[:, None] * turned


def cut_view(image: Tensor, mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Darken what lies beyond a straight line, as where a scanner's field of view ends.

    Args:
        image, mask: ``B C H W`` and ``B 1 H W``, the head where ``mask`` is above 0.
        share: how many of the images are cut. Most lose top or bottom, at most 0.65 of the head's extent, and the
            line is tilted by up to 8 degrees.
    """
    count, (height, width) = len(image), image.shape[-2:]
    draw = torch.rand(count, 5, generator=generator, device=image.device)
    half_turns = torch.where(draw[:, 1] < 0.8, 0.5, 0.0) + (draw[:, 2] < 0.5)  # 0 left, 0.5 top, 1 right, 1.5 bottom
    angle = half_turns * math.pi + (draw[:, 3] - 0.5) * math.radians(16)
    rows = torch.arange(height, device=image.device, dtype=image.dtype).view(-1, 1)
    columns = torch.arange(width, device=image.device, dtype=image.dtype)
    along = angle.sin().view(-1, 1, 1, 1) * rows + angle.cos().view(-1, 1, 1, 1) * columns
    inside = mask > 0
    first = torch.where(inside, along, math.inf).amin((1, 2, 3))
    last = torch.where(inside, along, -math.inf).amax((1, 2, 3))
    line = torch.where(draw[:, 0] < share, first + 0.65 * draw[:, 4] * (last - first), -math.inf)
    return image * (along >= line.view(-1, 1, 1, 1))


FAINT = 0.3  # of the range, at most
STRIP = 16  # pixels, at most


def without_faint(image: Tensor, level: Tensor) -> Tensor:
    """What is left above a ``level`` (``B``, 0 to 1) of luminance, spread over the range, as another window shows it.

    ``B C H W``, luminance first; chroma goes where luminance does. Level 0 changes nothing.
    """
    level = level.view(-1, 1, 1, 1)
    luma = ((image[:, :1] - level) / (1 - level)).clamp(min=0)
    return torch.cat([luma, image[:, 1:] * ((luma > 0) | (level <= 0))], dim=1)


def strip_head(image: Tensor, mask: Tensor, depth: Tensor) -> Tensor:
    """Darken the rim of the head, to a ``depth`` (``B``, pixels, at most ``STRIP``), as where the brain was extracted.

    ``image``, ``mask``: ``B C H W`` and ``B 1 H W``, the head where ``mask`` is above 0. Depth 0 changes nothing.
    """
    window, depth = 2 * STRIP + 1, depth.view(-1, 1, 1, 1)
    # A box's mean of the mask grows from 1/2 at the rim to 1 where the rim leaves the box: evenly, if it is straight.
    rows = F.avg_pool2d((mask > 0).to(image.dtype), (window, 1), stride=1, padding=(STRIP, 0))
    inside = F.avg_pool2d(rows, (1, window), stride=1, padding=(0, STRIP))
    return image * ((inside >= 0.5 + 0.5 * depth / STRIP) | (depth <= 0))


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one ``sigma`` per image (``B``, pixels, at most 3), border repeated."""
    radius = 6
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    window = torch.exp(-offsets.square() / (2 * sigma.clamp(min=0.05).square())[:, None])
    window = window / window.sum(1, keepdim=True)
    stacked = image.transpose(0, 1)  # images as channels: a group each
    rows = F.pad(stacked, (0, 0, radius, radius), mode="replicate")
    rows = F.conv2d(rows, window.view(-1, 1, 2 * radius + 1, 1), groups=len(image))
    columns = F.pad(rows, (radius, radius, 0, 0), mode="replicate")
    return F.conv2d(columns, window.view(-1, 1, 1, 2 * radius + 1), groups=len(image)).transpose(0, 1)


# --- batches --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """``fixed`` is luminance ``B 1 H W`` in [0, 1], ``moving`` luminance and chroma ``B 3 H W`` (Cb, Cr in
    [-0.5, 0.5], 0 where it is grey); ``truth`` is the moving image before ``known`` (``B 2 H W``) deformed it;
    ``mask`` is 1 inside the head; modalities index ``MODALITIES``, -1 for a remapped contrast; ``pair`` is each
    sample's place in its :class:`PairSet`."""

    fixed: Tensor
    moving: Tensor
    truth: Tensor
    known: Tensor
    mask: Tensor
    modality_fixed: Tensor
    modality_moving: Tensor
    pair: Tensor


class PairSet:
    """All pairs of a list in memory, on one ``side`` x ``side`` grid.

    ``fixed``, ``moving`` and ``mask`` are ``N 1 side side``, bytes (an atlas slice takes 65 kB); ``chroma`` is that of
    the moving images, ``N 2 side side``, in signed bytes. They lie on the CPU until :meth:`to` moves them.
    ``following``: index of the next pair of the same task and case in the list, the pair's own where there is none.
    """

    def __init__(self, pairs: Sequence[Pair], *, side: int = 256) -> None:
        self.pairs = list(pairs)
        loaded = [_load(pair, side) for pair in self.pairs]
        self.fixed, self.moving, self.chroma, self.mask = (torch.stack(t) for t in zip(*loaded, strict=True))
        self.modality_moving = torch.tensor([MODALITIES.index(str(TASKS[p.task])) for p in self.pairs])
        self.following = torch.arange(len(self.pairs))
        latest: dict[tuple[str, str], int] = {}
        for index, pair in enumerate(self.pairs):
            if pair.case:
                self.following[latest.get((pair.task, pair.case), index)] = index
                latest[pair.task, pair.case] = index

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: torch.device | str) -> PairSet:
        """This set, its images on ``device`` from now on."""
        self.fixed, self.moving, self.chroma, self.mask = (
            t.to(device) for t in (self.fixed, self.moving, self.chroma, self.mask)
        )
        return self

    def pictures(
        self, places: Sequence[int] | Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed, moving and mask of the pairs at these places, as in :class:`Batch`."""
        chosen = torch.as_tensor(places)
        fixed, moving, chroma, mask = (
            t[chosen.to(t.device)].to(device).float() for t in (self.fixed, self.moving, self.chroma, self.mask)
        )
        return fixed / 255, torch.cat([moving, chroma], dim=1) / 255, mask

    def indices(self, task: str) -> list[int]:
        return [i for i, p in enumerate(self.pairs) if p.task == task]


def _load(pair: Pair, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fixed, moving = read_image(pair.fixed), read_image(pair.moving)
    grid = Geometry.picture((side, side))
    _check_frames(pair, fixed, moving)
    # The pair already lies on one frame; it is seen upright and with square pixels, as by ``fuse``.
    like = next((image.geometry for image in (fixed, moving) if image.geometry.positioned), None)
    square = fixed.geometry.physical and moving.geometry.physical
    shown = []
    for image in (fixed, moving):
        turn = canonical(image.geometry, like=like, square=square)
        unit = fit_intensity(image).to_unit(image.array).astype(np.float32)
        seen = turn.see(torch.from_numpy(unit)[None])[0].numpy()
        match = match_grids(grid, Geometry.picture(turn.shape))
        shown.append(np.clip(resample_to_grid(seen, match, grid.shape), 0, 1))
    luma = [np.round(luma_of(picture) * 255).astype(np.uint8) for picture in shown]
    mask = head_mask(*luma).astype(np.uint8)
    chroma = np.zeros((2, side, side))
    if len(shown[1]) == 3:
        chroma = split_colour(shown[1])[1]
    tensors = [torch.from_numpy(array)[None] for array in (*luma, mask)]
    return tensors[0], tensors[1], torch.from_numpy(np.round(chroma * 255).clip(-127, 127).astype(np.int8)), tensors[2]


def _check_frames(pair: Pair, fixed: Image, moving: Image) -> None:
    """Raise where the positions in both files say that the two images do not show one frame."""
    if not (fixed.geometry.positioned and moving.geometry.positioned):
        return
    placed = match_grids(fixed.geometry, moving.geometry)
    shown = match_grids(*(Geometry.picture(image.geometry.shape) for image in (fixed, moving)))
    height, width = fixed.geometry.shape
    corners = np.array([[y, x, 1.0] for y in (0, height - 1) for x in (0, width - 1)])
    apart = float(np.abs(corners @ (placed.affine - shown.affine).T).max())
    voxel = max(1.0, float(np.abs(shown.affine[:, :2]).max()))  # the larger of the two, in moving voxels
    across = slices_apart(fixed, moving) or 0.0
    if across > 1:
        raise DatasetError(
            f"{pair.task} {pair.id}: by their positions {pair.fixed.name} and {pair.moving.name} are up to "
            f"{across:.0f} mm apart, across them; expected one slice; reformat the moving image to the fixed one's"
        )
    if placed.method not in ("same grid", "physical") or apart > voxel:
        raise DatasetError(
            f"{pair.task} {pair.id}: by their positions {pair.fixed.name} and {pair.moving.name} do not show the same "
            f"frame ({placed.note}); expected a pair on one grid; resample the moving image to the fixed one first"
        )


@dataclass(frozen=True)
class Mix:
    """What a training batch is made of.

    Attributes:
        own_contrast: share of samples that show one image against a random remapping of its own intensities.
        tasks: how often each of ``TASKS`` is drawn, whatever its number of pairs; relative to each other.
        misalignments: name of a family in ``MISALIGNMENTS`` and its share, as ``(("paper", 0.5), ...)``.
        milder: in families that rotate, how often each of rotation, scale and translation is reduced to a random part
            of itself, so that small rotations without a shift are seen, too.
        pose: both images are moved together by up to this family first.
        between: share of pairs that are mixed with the next slice of their case, by a random part.
        apart: share of pairs whose moving image is mixed with the next slice by a part of its own, so that the two
            images are of neighbouring slices.
        contrast: strength of a random remapping of the intensities of every image, 0 to 1.
        shade: strength of slow changes of brightness over each image, see :func:`shade`.
        cut: share of fixed and of moving images of which a part is out of view.
        recolour: share of moving images in other colours: half of them in grey, half with another hue and saturation.
        faint: share of fixed and of moving images without what is faint, up to ``FAINT``; see :func:`without_faint`.
        strip: share of fixed and of moving images without the rim of the head, up to ``STRIP``; see :func:`strip_head`.
    """

    own_contrast: float = 0.5
    tasks: tuple[float, ...] = (1.0,) * len(TASKS)
    misalignments: tuple[tuple[str, float], ...] = (("paper", 0.4), ("rigid", 0.25), ("large", 0.35))
    milder: float = 0.0
    pose: Misalignment = Misalignment(translation=8, rotation=10, scale=0.12)
    between: float = 0.0
    apart: float = 0.0
    contrast: float = 0.0
    shade: float = 0.0
    cut: float = 0.0
    recolour: float = 0.0
    faint: float = 0.0
    strip: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name, _ in self.misalignments if name not in MISALIGNMENTS]
        if unknown or not _are_shares([share for _, share in self.misalignments]):
            raise ValueError(
                f"misalignments {self.misalignments}: expected {', '.join(MISALIGNMENTS)}, "
                "at least one with a share above 0, none below"
            )
        if len(self.tasks) != len(TASKS) or not _are_shares(self.tasks):
            raise ValueError(
                f"tasks {self.tasks}: expected a share for each of {', '.join(TASKS)}, at least one above 0, none below"
            )
        for name in [f.name for f in fields(self) if f.type == "float"]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")


def _are_shares(values: Sequence[float]) -> bool:
    return all(0 <= value < math.inf for value in values) and sum(values) > 0


def draw_batch(data: PairSet, size: int, mix: Mix, generator: torch.Generator, *, device: torch.device) -> Batch:
    """One training batch; ``generator`` lives on ``device``."""
    cpu = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=device).item()))
    chosen = _draw_pairs(data, size, mix, cpu)
    fixed, moving, mask = _draw_slices(data, chosen, mix, generator, device)
    modalities = (torch.zeros_like(chosen).to(device), data.modality_moving[chosen].to(device))
    fixed, moving, modalities = _draw_own_contrast(fixed, moving, modalities, mix, generator)
    fixed, moving = _draw_appearance(fixed, moving, mask, mix, generator)
    shape = (fixed.shape[-2], fixed.shape[-1])
    pose = mix.pose.draw(size, shape, generator)
    flip = (torch.rand(size, generator=generator, device=device) < 0.5).view(-1, 1, 1, 1)
    fixed, moving, mask = (torch.where(flip, t.flip(-1), t) for t in (fixed, moving, mask))
    known = _draw_misalignments(size, shape, mix, cpu, generator)
    return Batch(
        fixed=warp(fixed, pose),
        moving=warp(moving, compose(pose, known)),
        truth=warp(moving, pose),
        known=known,
        mask=warp(mask, pose),
        modality_fixed=modalities[0],
        modality_moving=modalities[1],
        pair=chosen,
    )


def _draw_pairs(data: PairSet, size: int, mix: Mix, cpu: torch.Generator) -> Tensor:
    """Indices ``B`` of pairs: a task by its share, then any pair of it."""
    tasks = [data.indices(t) for t in TASKS]
    shares = torch.tensor([share if there else 0.0 for share, there in zip(mix.tasks, tasks, strict=True)]).float()
    if not bool(shares.any()):
        raise ValueError(f"tasks {mix.tasks}: the pairs at hand are of tasks that are never drawn; change the shares")
    task = torch.multinomial(shares, size, replacement=True, generator=cpu).tolist()
    return torch.tensor([tasks[t][int(torch.randint(len(tasks[t]), (1,), generator=cpu))] for t in task])


def _draw_slices(
    data: PairSet, chosen: Tensor, mix: Mix, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed and moving images and masks; some are slices that the scanners did not take, in both alike or not."""
    fixed, moving, mask = data.pictures(chosen, device)
    if not (mix.between or mix.apart):
        return fixed, moving, mask

    def uniform() -> Tensor:
        return torch.rand(len(chosen), 1, 1, 1, generator=generator, device=device)

    part = uniform() * (uniform() < mix.between)
    part_moving = part
    if mix.apart:
        part_moving = torch.where(uniform() < mix.apart, uniform(), part)
    next_fixed, next_moving, next_mask = data.pictures(data.following[chosen], device)
    return fixed.lerp(next_fixed, part), moving.lerp(next_moving, part_moving), mask.lerp(next_mask, part)


def _draw_own_contrast(
    fixed: Tensor, moving: Tensor, modalities: tuple[Tensor, Tensor], mix: Mix, generator: torch.Generator
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Some pairs become one image against a remapping of itself: aligned to the last digit, in any contrast.

    ``modalities``: of fixed and moving, ``B``; a remapped image has none, -1.
    """
    size, device = len(fixed), fixed.device
    own = torch.rand(size, generator=generator, device=device) < mix.own_contrast
    from_moving = own & (torch.rand(size, generator=generator, device=device) < 0.4)
    moving, chroma = moving[:, :1], moving[:, 1:]
    source = torch.where(from_moving.view(-1, 1, 1, 1), moving, fixed)
    remapped = remap_contrast(source, generator)
    modality_fixed, modality_moving = modalities
    modality_fixed = torch.where(from_moving, modality_moving, modality_fixed)
    modality_moving = torch.where(own, -1, modality_moving)
    changed = own.view(-1, 1, 1, 1)
    fixed, moving = torch.where(changed, source, fixed), torch.where(changed, remapped, moving)
    chroma = torch.where(changed, 0.0, chroma)  # both in grey
    return fixed, torch.cat([moving, chroma], dim=1), (modality_fixed, modality_moving)


def _draw_appearance(
    fixed: Tensor, moving: Tensor, mask: Tensor, mix: Mix, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Colours, contrast, shading, and what of a head there is to see, each changed in a share of the images."""
    size, device = len(fixed), fixed.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def some(share: float) -> Tensor:
        """A random part for that share of the samples, 0 for the others."""
        drawn, part = uniform(2, size).unbind(0)
        return torch.where(drawn < share, part, 0.0)

    moving, chroma = moving[:, :1], moving[:, 1:]
    if mix.recolour:
        chroma = torch.where(uniform(size, 1, 1, 1) < mix.recolour, other_colours(chroma, generator), chroma)
    # Gains and gammas that no modality would be recognised by.
    gamma = 1 + 0.6 * (uniform(2, size, 1, 1, 1) - 0.5)
    fixed, moving = fixed.clamp(0, 1) ** gamma[0], moving.clamp(0, 1) ** gamma[1]
    if mix.contrast:
        fixed, moving = (remap_contrast(image, generator, strength=mix.contrast) for image in (fixed, moving))
    if mix.shade:
        fixed, moving = (shade(image, mix.shade, generator) for image in (fixed, moving))
    moving = torch.cat([moving, chroma], dim=1)
    if mix.faint:
        fixed, moving = (without_faint(image, FAINT * some(mix.faint)) for image in (fixed, moving))
    if mix.strip:
        fixed, moving = (strip_head(image, mask, STRIP * some(mix.strip)) for image in (fixed, moving))
    if mix.cut:
        fixed, moving = (cut_view(image, mask, mix.cut, generator) for image in (fixed, moving))
    return fixed, moving


def _draw_misalignments(
    size: int, shape: tuple[int, int], mix: Mix, cpu: torch.Generator, generator: torch.Generator
) -> Tensor:
    """Fields ``B 2 H W``, voxels, each of a family of :data:`MISALIGNMENTS` by its share."""
    names, odds = zip(*mix.misalignments, strict=True)
    family = torch.multinomial(torch.tensor(odds).float(), size, replacement=True, generator=cpu)
    known = torch.empty(size, 2, *shape, device=generator.device)
    for index, name in enumerate(names):
        members = (family == index).nonzero().flatten().to(generator.device)
        if len(members):
            chosen = MISALIGNMENTS[name]
            milder = mix.milder if chosen.rotation else 0.0
            known[members] = chosen.draw(len(members), shape, generator, milder=milder)
    return known


def crop_batch(batch: Batch, side: int, generator: torch.Generator) -> Batch:
    """One random ``side`` x ``side`` window of all images of a batch, the same for each."""
    height, width = batch.fixed.shape[-2:]
    if side > min(height, width):
        raise ValueError(f"a crop of {side} pixels from images of {height} x {width}; choose a smaller one")
    corner = torch.rand(2, generator=generator, device=generator.device)
    top, left = (int(c * (n - side + 1)) for c, n in zip(corner.tolist(), (height, width), strict=True))
    images = {
        name: value[..., top : top + side, left : left + side]
        for name, value in batch._asdict().items()
        if value.dim() == 4
    }
    return batch._replace(**images)


def validation_batch(
    data: PairSet, indices: Sequence[int], misalignment: Misalignment, *, draw: int, device: torch.device
) -> Batch:
    """Pairs as they are, each deformed by a field of its own.

    The field depends only on the pair's place in its split and on ``draw``.
    """
    chosen = torch.tensor(list(indices))
    fixed, moving, mask = data.pictures(chosen, device)
    shape = (fixed.shape[-2], fixed.shape[-1])
    fields = [misalignment.draw(1, shape, torch.Generator().manual_seed(100_003 * draw + index)) for index in indices]
    known = torch.cat(fields).to(device)
    modality = data.modality_moving[chosen].to(device)
    return Batch(fixed, warp(moving, known), moving, known, mask, torch.zeros_like(modality), modality, chosen)
