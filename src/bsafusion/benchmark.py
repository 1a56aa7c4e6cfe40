"""The benchmark's inputs: the pairs of a split, misaligned by fields that are known exactly, for every method alike.

The families of deformations are ``datasets.MISALIGNMENTS``; the suite ``corrupted`` takes the paper's and damages one
of the two images as well. All is drawn from fixed seeds, so a case is the same wherever and whenever it is made.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion.datasets import MISALIGNMENTS, Pair, PairSet, read_pairs, validation_batch
from bsafusion.image import LARGEST_SIDE, SMALLEST_SIDE, TASKS
from bsafusion.io import read_image
from bsafusion.plain_fusion import FUSIONS
from bsafusion.preprocessing import white_level
from bsafusion.scoring import Reference, grey_levels
from bsafusion.weights import file_sha256

Array = NDArray[np.float32]
Levels = NDArray[np.float64]

PROTOCOL = 1
"""Of inputs and files; results made with another one are refused."""

SUITES = (*MISALIGNMENTS, "corrupted")
"""Families of misalignment; ``corrupted`` is ``paper`` with one image damaged as well."""

OWN = "own"
"""The suite of a third party's fused images that were made from misaligned inputs of its own."""

LEAST_RANGE = 2 / 3
"""Of black to white that a picture must use: methods see it stretched, metrics are taken from the file's levels."""

PLAIN_FUSIONS = ("maximum", "average", "laplacian")
_CPU = torch.device("cpu")


class EvaluationError(ValueError):
    """An evaluation that cannot be carried out as it was asked for."""


# --- corruptions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corruption:
    """Damage to one of the two images.

    Attributes:
        kind: ``noise`` (Gaussian), ``bias`` (a slope of brightness across the image), ``slab`` (a band of rows or
            columns is missing) or ``clip`` (a window too narrow: what lies beyond it is black or white).
        image: ``fixed`` or ``moving``.
        strength: standard deviation; change from the middle to the border; share of the rows; share of the range left
            out; each of the range or size of the image.
        place: in [0, 1]: direction of the slope, place of the band, place of the window.
        seed: of the noise; its parity chooses rows or columns.
    """

    kind: str
    image: str
    strength: float
    place: float
    seed: int

    def __str__(self) -> str:
        return f"{self.kind} {self.image}"


CORRUPTIONS: dict[str, tuple[float, float]] = {
    "noise": (0.05, 0.15),
    "bias": (0.3, 0.7),
    "slab": (0.1, 0.25),
    "clip": (0.3, 0.6),
}
"""Kinds and the range that their strength is drawn from."""


def draw_corruption(index: int, draw: int) -> Corruption:
    """The corruption of the pair at a place in its split; kind, image and strength are drawn evenly."""
    random = np.random.default_rng([PROTOCOL, index, draw])
    kind = str(random.choice(list(CORRUPTIONS)))
    image = str(random.choice(["fixed", "moving"]))
    strength = float(random.uniform(*CORRUPTIONS[kind]))
    return Corruption(kind, image, strength, float(random.uniform()), int(random.integers(2**31)))


def corrupt(image: Array, corruption: Corruption) -> Array:
    """A damaged copy of an image ``H W`` in [0, 1]."""
    strength, place = corruption.strength, corruption.place
    height, width = image.shape
    damaged = image.astype(np.float64)
    if corruption.kind == "noise":
        damaged += np.random.default_rng(corruption.seed).normal(scale=strength, size=image.shape)
    elif corruption.kind == "bias":
        rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        damaged *= 1 + strength * (np.sin(2 * np.pi * place) * rows + np.cos(2 * np.pi * place) * columns)
    elif corruption.kind == "slab":
        axis = corruption.seed % 2
        size = image.shape[axis]
        first = round((0.2 + 0.6 * place - strength / 2) * size)
        np.moveaxis(damaged, axis, 0)[first : first + round(strength * size)] = 0
    elif corruption.kind == "clip":
        damaged = (damaged - place * strength) / (1 - strength)
    else:
        raise EvaluationError(f"no corruption is called {corruption.kind!r}; choose from {', '.join(CORRUPTIONS)}")
    return np.clip(damaged, 0, 1).astype(np.float32)


# --- what is asked -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationCfg:
    """What an evaluation covers.

    Attributes:
        split: of the pairs CSV.
        suites: from :data:`SUITES`.
        draws: misalignments of each pair for networks and ``identity``; ``competitor_draws`` for the slower methods.
        fusions: from ``plain_fusion.FUSIONS``; applied to each method's aligned image.
        reference: what the moving image of the fusion metrics is, see ``scoring.ScoringCfg``.
        side: pixels a side of the grid that pairs are brought to.
        limit: at most so many pairs a task, evenly spaced in its list; all of them if None.
        jobs: workers, one thread each.
    """

    split: str = "val"
    suites: tuple[str, ...] = SUITES
    draws: int = 3
    competitor_draws: int = 1
    fusions: tuple[str, ...] = PLAIN_FUSIONS
    reference: Reference = "truth"
    side: int = 256
    limit: int | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        for names, known, what in ((self.suites, SUITES, "suite"), (self.fusions, tuple(FUSIONS), "fusion")):
            unknown = [name for name in names if name not in known]
            if unknown or len(set(names)) < len(names):
                raise EvaluationError(f"{what}s {', '.join(names)}: choose from {', '.join(known)}, each at most once")
        if not self.suites:
            raise EvaluationError(f"no suite is left; choose from {', '.join(SUITES)}")
        if self.reference not in get_args(Reference):
            raise EvaluationError(f"unknown reference {self.reference!r}; expected {' or '.join(get_args(Reference))}")
        if not SMALLEST_SIDE <= self.side <= LARGEST_SIDE:
            raise EvaluationError(f"side {self.side}: expected {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
        counts = {"draws": self.draws, "competitor draws": self.competitor_draws, "jobs": self.jobs}
        counts |= {} if self.limit is None else {"limit": self.limit}
        for what, count in counts.items():
            if count < 1:
                raise EvaluationError(f"{what} is {count}; expected at least 1")


@dataclass(frozen=True)
class Case:
    """One pair, misaligned once. ``index`` is the pair's place in its split, from which the field is drawn."""

    suite: str
    task: str
    id: str
    index: int
    draw: int

    @property
    def folder(self) -> Path:
        """Relative to a method's folder."""
        return Path(self.suite, self.task, f"draw-{self.draw}", self.id)


class Inputs(NamedTuple):
    """What a method sees (``fixed``, ``moving``: luminance ``H W`` float32 in [0, 1]; ``chroma`` of the moving image,
    ``2 H W``, 0 where it is grey) and what only the score knows."""

    fixed: Array
    moving: Array
    chroma: Array
    known: Array
    mask: NDArray[np.bool_]
    corruption: Corruption | None


class Benchmark:
    """The pairs of one split and their misalignments, the same for every method.

    Raises:
        DatasetError: the pairs cannot be used.
        EvaluationError: an id cannot be the name of a folder, or stands twice in a task; a picture that is to be
            scored is too dim for it by its levels (:data:`LEAST_RANGE`).
    """

    def __init__(self, pairs: Path, cfg: EvaluationCfg) -> None:
        self.path, self.cfg = pairs, cfg
        listed = read_pairs(pairs, split=cfg.split)
        seen: set[tuple[str, str]] = set()
        for pair in listed:
            if Path(pair.id).name != pair.id or pair.id in (".", ".."):
                raise EvaluationError(f"{pairs}: id {pair.id!r} cannot be the name of a folder; rename it")
            if (pair.task, pair.id) in seen:
                raise EvaluationError(f"{pairs}: id {pair.id!r} stands twice in {pair.task}; make the ids unique")
            seen.add((pair.task, pair.id))
        self.data = PairSet(listed, side=cfg.side)
        self.chosen = [i for task in TASKS for i in spaced(self.data.indices(task), cfg.limit)]
        for path in dict.fromkeys(path for i in self.chosen for path in (listed[i].fixed, listed[i].moving)):
            _check_range(path, cfg.side)

    def cases(self, draws: int) -> list[Case]:
        """All cases, those of one pair next to each other."""
        pairs = self.data.pairs
        return [
            Case(suite, pairs[i].task, pairs[i].id, i, draw)
            for suite in self.cfg.suites
            for i in self.chosen
            for draw in range(draws)
        ]

    def pair(self, case: Case) -> Pair:
        return self.data.pairs[case.index]

    def inputs(self, case: Case) -> Inputs:
        family = MISALIGNMENTS["paper" if case.suite == "corrupted" else case.suite]
        batch = validation_batch(self.data, [case.index], family, draw=case.draw, device=_CPU)
        images = {"fixed": batch.fixed[0, 0].numpy(), "moving": batch.moving[0, 0].numpy()}
        chroma = batch.moving[0, 1:].numpy()
        corruption = draw_corruption(case.index, case.draw) if case.suite == "corrupted" else None
        if corruption is not None:
            images[corruption.image] = corrupt(images[corruption.image], corruption)
            if corruption.image == "moving":  # its colours would show what the damage hides
                chroma = np.zeros_like(chroma)
        mask = batch.mask[0, 0].numpy() > 0
        return Inputs(**images, chroma=chroma, known=batch.known[0].numpy(), mask=mask, corruption=corruption)

    def sources(self, case: Case) -> tuple[Levels, Levels]:
        """Fixed and undeformed moving luminance, ``H W`` on 0..255: ``scoring.grey_levels`` of the files.

        A picture of another size is scored as the methods saw it, on the grid of the evaluation.
        """
        pair = self.pair(case)
        levels = [grey_levels(read_image(path))[0] for path in (pair.fixed, pair.moving)]
        resampled = (self.data.fixed, self.data.moving)
        fixed, moving = (
            own if own.shape == grid.shape[-2:] else grid[case.index, 0].numpy().astype(np.float64)
            for own, grid in zip(levels, resampled, strict=True)
        )
        return fixed, moving

    def settings(self) -> dict[str, Any]:
        """What shapes the inputs, by content: other images or fields give other settings."""
        images = hashlib.sha256()
        for pair in self.data.pairs:
            for path in (pair.fixed, pair.moving):
                images.update(bytes.fromhex(file_sha256(path)))
        return {
            "protocol": PROTOCOL,
            "pairs": self.path.name,
            "pairs_sha256": file_sha256(self.path),
            "images_sha256": images.hexdigest(),
            "split": self.cfg.split,
            "side": self.cfg.side,
            "seeds": "field: 100003 draw + place of the pair in its split; corruption: (protocol, place, draw)",
            "misalignments": {name: asdict(family) for name, family in MISALIGNMENTS.items()},
            "corruptions": {name: list(spread) for name, spread in CORRUPTIONS.items()},
        }


def _check_range(path: Path, side: int) -> None:
    """Raise where a picture is scored by its levels and they are far from what methods see."""
    image = read_image(path)
    white, low, high = white_level(image), float(image.array.min()), float(image.array.max())
    if white is not None and image.geometry.shape == (side, side) and high - low < LEAST_RANGE * white:
        raise EvaluationError(
            f"{path}: its levels {low:g} to {high:g} are less than two thirds of 0 to {white:g}; methods see a picture "
            "stretched and metrics are taken from the levels of the file, so they would not fit; stretch the file first"
        )


def spaced(indices: list[int], limit: int | None) -> list[int]:
    """At most ``limit`` of them, evenly spaced; all if None."""
    if limit is None or limit >= len(indices):
        return indices
    return [indices[len(indices) * i // limit] for i in range(limit)]
