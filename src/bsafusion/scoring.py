"""Fused images scored from their files, one or many, whoever made them.

A triple is three files on one grid: ``fixed``, ``moving`` and ``fused``. The moving image is either as it was before
it was deformed (reference ``truth``) or as a method aligned it (reference ``aligned``); which one it is cannot be seen
from the file, so the caller says it and every output repeats it.

Metrics live on grey levels 0..255. :func:`grey_levels` is the one way to them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bsafusion.about import version_of
from bsafusion.files import PathLike, read_csv, write_csv, write_json, write_whole
from bsafusion.image import Image, ImageError
from bsafusion.io import read_image
from bsafusion.metrics import ALL_METRICS, DIRECTIONS, PAPER_METRICS, fusion_metrics
from bsafusion.preprocessing import fit_intensity, match_grids, slices_apart, white_level

Array = NDArray[np.float64]
Role = Literal["fixed", "moving", "fused"]
Reference = Literal["truth", "aligned"]

ROLES: tuple[Role, ...] = get_args(Role)
ALL = "all"
"""The group of every image, beside one a task."""

EIGHT_BIT = "8-bit picture: values as stored"
SIXTEEN_BIT = "16-bit picture: values / 257"
STRETCHED = "scan or floating point: percentiles 0.1 and 99.9 of the values above the minimum to 0 and 255, clipped"
LUMA = "BT.601, full range, rounded to whole levels of the picture"

RESAMPLES = 2000
SEED = 0
_CUT = RESAMPLES // 40  # 2.5 % at either end

OUTPUTS = ("per_image.csv", "summary.csv", "summary.json")
_COLUMNS = "id,fixed,moving,fused[,task]"
_SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm")
_HINTS = {
    "moving": "give the moving image on the fixed grid, or the aligned one with reference aligned",
    "fused": "give it as it was fused, or resample it to the fixed grid",
}


class ScoringError(ValueError):
    """A request to score images that cannot be met; the message says why and what to try."""


@dataclass(frozen=True)
class ScoringCfg:
    """What shapes a figure.

    Attributes:
        names: of the metrics, from ``ALL_METRICS``.
        reference: what the moving image is: ``truth``, as it was before it was deformed, or ``aligned``, as a method
            aligned it. It is recorded and changes no value.

    Raises:
        ScoringError: an unknown name or reference, a name twice, or no name.
    """

    names: tuple[str, ...] = PAPER_METRICS
    reference: Reference = "truth"

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in ALL_METRICS]
        if unknown or not self.names:
            found = ", ".join(map(repr, unknown)) or "an empty list"
            raise ScoringError(f"no metric is called {found}; choose from {', '.join(ALL_METRICS)}")
        if len(set(self.names)) < len(self.names):
            raise ScoringError(f"metrics {', '.join(self.names)}; expected each one once; remove the repeated name")
        if self.reference not in get_args(Reference):
            raise ScoringError(f"unknown reference {self.reference!r}; expected {' or '.join(get_args(Reference))}")


def choose_metrics(names: str | None, every: bool) -> tuple[str, ...]:
    """Names separated by commas, or every metric, or those of the paper.

    Raises:
        ScoringError: both were asked for.
    """
    if names is None:
        return ALL_METRICS if every else PAPER_METRICS
    if every:
        raise ScoringError(f"metrics {names!r} and all of them were asked for; expected one of the two; drop one")
    return tuple(name.strip() for name in names.split(","))


@dataclass(frozen=True)
class Row:
    """One triple of files; ``task`` may be empty."""

    id: str
    fixed: Path
    moving: Path
    fused: Path
    task: str = ""


@dataclass(frozen=True)
class Score:
    """The value of each metric, and how each image came to 0..255."""

    values: Mapping[str, float]
    scaling: Mapping[Role, str]


@dataclass(frozen=True)
class RowScore:
    """What became of a row: its score, or the message that says why there is none."""

    id: str
    task: str
    score: Score | None
    message: str = ""


@dataclass(frozen=True)
class MetricSummary:
    """One metric over ``n`` images.

    Attributes:
        n: number of images.
        mean: their mean; infinite if one value is.
        median: their median.
        low, high: ends of the 95 % bootstrap interval of the mean; None for a single image.
    """

    n: int
    mean: float
    median: float
    low: float | None
    high: float | None


# --- one triple ---------------------------------------------------------------------


def grey_levels(image: Image) -> tuple[Array, str]:
    """The luminance of an image as ``H W`` float64 in 0..255, and the rule that was used.

    Pictures, as :func:`bsafusion.preprocessing.white_level` knows them, show levels that mean the same in every file:
    8-bit values stay as they are (:data:`EIGHT_BIT`), 16-bit values are divided by 257 (:data:`SIXTEEN_BIT`). Their
    colour is reduced to BT.601 luma in whole levels of the file, half to even. Other images have no such scale and are
    stretched, each on its own (:data:`STRETCHED`).
    """
    white = white_level(image)
    if white is not None:
        levels = np.rint(_luma(image.array.astype(np.float64)))
        return levels / (white / 255), EIGHT_BIT if white == 255 else SIXTEEN_BIT
    scaled = fit_intensity(image, method="percentile").to_unit(image.array)
    return np.clip(_luma(scaled.astype(np.float64)), 0, 1) * 255, STRETCHED


def _luma(channels: Array) -> Array:
    """``C H W`` to ``H W``. Weights in thousandths are exact on whole levels, so a half is a half everywhere."""
    weights = np.array([299, 587, 114] if len(channels) == 3 else [1000], dtype=np.float64)
    luma: Array = (weights[:, None, None] * channels).sum(axis=0) / 1000
    return luma


def score_one(
    fixed: PathLike | Image,
    moving: PathLike | Image,
    fused: PathLike | Image,
    cfg: ScoringCfg | None = None,
    *,
    slices: Mapping[Role, int | None] | None = None,
) -> Score:
    """Score one fused image.

    Args:
        fixed, moving, fused: files or images of one size, on one grid.
        cfg: which metrics; those of the paper when left out.
        slices: which slice of a 3-D NIfTI to take, by role.

    Raises:
        ImageError: a file cannot be used.
        ScoringError: the images are not on one grid.
        ValueError: an image is too small for a metric.
    """
    cfg = cfg or ScoringCfg()
    given: dict[Role, PathLike | Image] = {"fixed": fixed, "moving": moving, "fused": fused}
    images = {role: _read(image, role, (slices or {}).get(role)) for role, image in given.items()}
    for role in ("moving", "fused"):
        _check_size(images[role], role, images["fixed"])
    # A picture has no place, but the two others may have.
    pairs: tuple[tuple[Role, Role], ...] = (("moving", "fixed"), ("fused", "fixed"), ("fused", "moving"))
    for role, other in pairs:
        _check_place(images[role], role, images[other], other)
    levels = {role: grey_levels(image) for role, image in images.items()}
    values = fusion_metrics(levels["fixed"][0], levels["moving"][0], levels["fused"][0], cfg.names)
    return Score(values, {role: rule for role, (_, rule) in levels.items()})


def _read(image: PathLike | Image, role: Role, slice_index: int | None) -> Image:
    if isinstance(image, Image):
        return image
    try:
        return read_image(image, slice_index=slice_index)
    except ImageError as error:
        raise ImageError(f"{role} image: {error}") from error


def _check_size(image: Image, role: str, fixed: Image) -> None:
    (height, width), (fixed_height, fixed_width) = image.array.shape[1:], fixed.array.shape[1:]
    if (height, width) != (fixed_height, fixed_width):
        raise ScoringError(
            f"{role} image {image.source} is {width} x {height} pixels, fixed image {fixed.source} "
            f"{fixed_width} x {fixed_height}; expected one size; {_HINTS[role]}"
        )


def _check_place(image: Image, role: str, other: Image, other_role: str) -> None:
    """Two scans of one size may lie in different places, or mirrored: both files must say so to be sure."""
    if not (image.geometry.positioned and other.geometry.positioned):
        return
    apart = slices_apart(other, image)
    if match_grids(other.geometry, image.geometry).method != "same grid" or (apart is not None and apart > 1):
        across = f" ({apart:.0f} mm apart, across the slices)" if apart else ""
        raise ScoringError(
            f"{role} image {image.source} and {other_role} image {other.source} are of one size but lie in different "
            f"places by their headers{across}; expected one grid; {_HINTS[role]}"
        )


# --- many triples ---------------------------------------------------------------------


def find_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of one table, of three folders, or of three images (one row, its id the fused image's name).

    Raises:
        ScoringError: another number of paths, folders mixed with files, or what :func:`read_table` and
            :func:`match_folders` raise.
    """
    folders = sum(path.is_dir() for path in paths)
    if (len(paths), folders) == (1, 0):
        return read_table(paths[0])
    if len(paths) != 3 or folders not in (0, 3):
        raise ScoringError(
            f"got {len(paths)} paths, {folders} of them folders; expected three images FIXED MOVING FUSED, "
            "three folders of them, or one CSV table; give one of these"
        )
    fixed, moving, fused = paths
    return match_folders(fixed, moving, fused) if folders else [Row(fused.name, fixed, moving, fused)]


def read_table(path: Path) -> list[Row]:
    """Rows of a CSV with columns ``id,fixed,moving,fused[,task]``; image paths are relative to the CSV.

    Raises:
        ScoringError: :func:`bsafusion.files.read_csv` cannot read the file, an id or a path is missing, an id is used
            twice, a task is called ``all``, or there are no rows. Images are not looked at: a row whose image is
            missing fails alone.
    """
    lines = read_csv(path, what="table", columns=_COLUMNS, error=ScoringError)
    rows: dict[str, Row] = {}
    for number, line in lines:
        where = f"{path}, line {number}"
        empty = [name for name in ("id", *ROLES) if not line[name]]
        if empty:
            raise ScoringError(f"{where}: {', '.join(empty)} is empty; expected {_COLUMNS} on every line")
        if line["id"] in rows:
            raise ScoringError(f"{where}: id {line['id']!r} stands twice; make the ids unique")
        if line.get("task") == ALL:
            raise ScoringError(f"{where}: a task is called {ALL!r}, the name of the summary of all; rename it")
        fixed, moving, fused = (path.parent / line[role] for role in ROLES)
        rows[line["id"]] = Row(line["id"], fixed, moving, fused, line.get("task", ""))
    if not rows:
        raise ScoringError(f"{path}: no rows below the header; expected one a fused image")
    return list(rows.values())


def match_folders(fixed: Path, moving: Path, fused: Path) -> list[Row]:
    """Rows of three folders whose files have the same names up to the suffix, sorted; the name is the id.

    Image suffixes and files without a suffix count (DICOM often has none); hidden and other files do not.

    Raises:
        ScoringError: an image has no partner, two of a folder have one name, or there are none.
    """
    found = {folder: _images(folder) for folder in (fixed, moving, fused)}
    names = sorted(set().union(*found.values()))
    if not names:
        raise ScoringError(f"{fixed}: no images; expected files such as case1.png in each of the three folders")
    for folder, images in found.items():
        missing = [name for name in names if name not in images]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ScoringError(
                f"{folder}: no image {missing[0]!r}{more}; expected the same names in all three folders; "
                "add it, or list the triples in a CSV"
            )
    return [Row(name, found[fixed][name], found[moving][name], found[fused][name]) for name in names]


def image_name(path: Path) -> str:
    """A file's name less the suffix of an image format; an id with dots keeps them."""
    suffix = next((end for end in _SUFFIXES if path.name.lower().endswith(end)), "")
    return path.name[: len(path.name) - len(suffix)]


def _images(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = image_name(path)
        if path.name.startswith(".") or not path.is_file() or (path.suffix and name == path.name):
            continue
        if name in images:
            raise ScoringError(
                f"{folder}: {images[name].name} and {path.name} have one name; expected one image a name; rename one"
            )
        images[name] = path
    return images


def score_table(
    rows: Iterable[Row], cfg: ScoringCfg | None = None, *, slices: Mapping[Role, int | None] | None = None
) -> Iterator[RowScore]:
    """Score every row; yields as it goes, one result a row, and a row that fails does not stop the rest."""
    for row in rows:
        try:
            score = score_one(row.fixed, row.moving, row.fused, cfg, slices=slices)
        except (ValueError, OSError, RuntimeError) as error:
            yield RowScore(row.id, row.task, None, " ".join(str(error).split()))
        else:
            yield RowScore(row.id, row.task, score)


# --- summary ---------------------------------------------------------------------


def summarise_scores(scores: Sequence[RowScore]) -> dict[str, dict[str, MetricSummary]]:
    """Each metric over all images (group :data:`ALL`) and over those of each task; failed rows are left out.

    The interval is a percentile bootstrap of the mean (Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
    ch. 13): images are drawn with replacement 2000 times, all metrics of an image together, from seed 0 in every group;
    of the sorted means the 50 smallest and 50 largest are dropped. It treats images as independent: slices of one
    patient are not, and then it is too narrow.
    """
    good = [(row.task, row.score.values) for row in scores if row.score is not None]
    if not good:
        return {}
    tasks = dict.fromkeys(task for task, _ in good if task)
    groups = {ALL: [values for _, values in good]}
    groups |= {task: [values for of, values in good if of == task] for task in tasks}
    return {name: _summarise_group(values) for name, values in groups.items()}


def _summarise_group(values: Sequence[Mapping[str, float]]) -> dict[str, MetricSummary]:
    names = list(values[0])
    table = np.array([[row[name] for name in names] for row in values])
    n = len(table)
    draw = np.random.default_rng(SEED)

    def mean_of(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        # A mean of equal numbers may be rounded past them.
        means: NDArray[np.float64] = np.clip(rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))
        return means

    means = np.sort([mean_of(table[draw.integers(n, size=n)]) for _ in range(RESAMPLES)], axis=0)
    # Sorted means, not interpolated percentiles: between infinite ones there is nothing to interpolate.
    ends = zip(means[_CUT].tolist(), means[-_CUT - 1].tolist(), strict=True) if n > 1 else [(None, None)] * len(names)
    centres = zip(mean_of(table).tolist(), np.median(table, axis=0).tolist(), strict=True)
    return {
        name: MetricSummary(n, mean, median, low, high)
        for name, (mean, median), (low, high) in zip(names, centres, ends, strict=True)
    }


def describe_scores(scores: Sequence[RowScore], cfg: ScoringCfg) -> dict[str, Any]:
    """What ``summary.json`` holds: version, settings, how the images were scaled, groups, failed rows.

    An infinite value (PSNR of equal images) is None, which JSON can hold.
    """
    good = [row.score for row in scores if row.score is not None]
    return {
        "bsafusion": version_of("bsafusion"),
        "settings": {
            "reference": cfg.reference,
            "metrics": list(cfg.names),
            "luma": LUMA,
            "interval": f"95 % percentile bootstrap of the mean, {RESAMPLES} resamples, seed {SEED}",
        },
        "scaling": {role: dict(Counter(score.scaling[role] for score in good)) for role in ROLES},
        "groups": {
            task: {
                name: {
                    "better": DIRECTIONS[name],
                    "n": of.n,
                    "mean": json_number(of.mean),
                    "median": json_number(of.median),
                    "ci95": None if of.low is None else [json_number(of.low), json_number(of.high)],
                }
                for name, of in group.items()
            }
            for task, group in summarise_scores(scores).items()
        },
        "failed": [{"id": row.id, "message": row.message} for row in scores if row.score is None],
    }


def json_number(value: float | None) -> float | None:
    """The number, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def write_scores(out: Path, scores: Sequence[RowScore], described: Mapping[str, Any]) -> None:
    """Write ``per_image.csv``, ``summary.csv`` and ``summary.json`` into the folder ``out``, all or none.

    ``per_image.csv`` has a line for every row that has a score: id, task, the metrics. Numbers are written in full;
    a number that ``described``, from :func:`describe_scores`, has as None is an empty cell in ``summary.csv``.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = described["settings"]["metrics"]
    values = [
        [row.id, row.task, *(row.score.values[name] for name in names)] for row in scores if row.score is not None
    ]
    lines = [
        [task, name, *(of[key] for key in ("better", "n", "mean", "median")), *(of["ci95"] or (None, None))]
        for task, group in described["groups"].items()
        for name, of in group.items()
    ]
    header = ["task", "metric", "better", "n", "mean", "median", "ci95_low", "ci95_high"]
    per_image, summary, settings = (write_whole(out / name) for name in OUTPUTS)
    with per_image as first, summary as second, settings as third:
        write_csv(first, ["id", "task", *names], values)
        write_csv(second, header, lines)
        write_json(third, described)
