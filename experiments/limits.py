"""What is left of the misalignment: the atlas, the images, or what the network knows by heart?

    python experiments/limits.py PAIRS.csv [--weights default] [--draws 3] [--limit 60]

No training. Pairs of ``train`` and of ``val`` are misaligned by fields with fixed seeds and aligned; the residual of a
pair is split into what all its draws share (*common*: the atlas' own misalignment, or the network's for that pair) and
what is left of each (*own*). All three (*rms* is that of the whole) are root mean squares, the first two without the
bias of few draws: the squares of *common* and *own* add up to that of *rms*. *Error*, as elsewhere, is the mean length.
*Shift* is the length of the mean residual's mean over the head. *Known image*: the
moving image is aligned with itself as it was before, as if its undeformed look were known. *To next*: how far the
atlas' own alignment of a pair differs from that of the next slice of its case: both images are aligned with those of
the next slice, each within its modality, and the mean fields over the moving head are subtracted from each other.
*Moved*: the length of the mean field that the network finds in a pair as the atlas has it, without any deformation.
*Confirmed*: how much of that a search of all shifts by mutual information, which knows nothing of the network or the
atlas, finds as well: the slope of its shifts over the network's (1: all of it, 0: nothing); not in pixels.
Writes ``results/limits.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (dfb5c1f3eb50), at most 60 pairs a task and split, draws: 3.

                  paper CT  paper PET  paper SPECT  rigid CT  rigid PET  rigid SPECT  atlas CT  atlas PET  atlas SPECT
error, train          1.49       1.74         1.82      0.48       0.46         0.57
error, val            1.98       1.98         2.58      1.22       0.66         1.86
rms, train            1.81       2.17         2.18      0.61       0.57         0.70
rms, val              2.39       2.42         3.05      1.63       0.84         2.49
common, train         0.87       0.83         0.97      0.38       0.41         0.45
common, val           1.87       1.09         2.21      1.56       0.71         2.32
own, train            1.59       2.01         1.95      0.48       0.40         0.54
own, val              1.49       2.17         2.10      0.48       0.45         0.91
shift, train          0.24       0.31         0.34      0.22       0.18         0.27
shift, val            0.77       0.35         1.23      0.79       0.35         1.34
known image, val      0.59       1.33         0.84      0.27       0.41         0.38
to next, train                                                                            0.81       0.29         0.91
to next, val                                                                              1.17       0.45         1.12
moved, val                                                                                0.76       0.30         1.25
confirmed, val                                                                            0.33       0.18         1.32

Means over pairs, pixels, inside the head; *to next*, *moved* and *confirmed* are of pairs as the atlas has
them, not under a suite.
-- end of results --
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
import untrained
from ablations import CPU, Column, Figures, table, write_results
from numpy.typing import NDArray

from bsafusion.benchmark import spaced
from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.image import TASKS
from bsafusion.metrics import endpoint_error, endpoint_residual, head_mask, summarise
from bsafusion.models.bsafusion import BSAFusion
from bsafusion.pipeline import load_model

SUITES = ("paper", "rigid")
SLICES = "atlas"
COLUMNS = tuple(
    Column(f"{group}/{task}", f"{group} {task.removesuffix('-mri').upper()}")
    for group in (*SUITES, SLICES)
    for task in TASKS
)
SQUARES = ("rms", "common", "own")
ROWS = ("error", *SQUARES, "shift", "known image", "to next", "moved", "confirmed")
REACH = 8
"""Of the search by mutual information, pixels."""
NOTES = (
    "Means over pairs, pixels, inside the head; *to next*, *moved* and *confirmed* are of pairs as the atlas has them, "
    "not under a suite."
)
Field = NDArray[np.float32]


def displacement(network: BSAFusion, fixed: torch.Tensor, moving: torch.Tensor) -> Field:
    """The field ``2 H W`` from ``moving`` to ``fixed``, ``1 C H W`` each."""
    return np.asarray(network.predict_alignment(fixed, moving).alignment.displacement[0].numpy(), dtype=np.float32)


def parts(residuals: list[NDArray[np.float64]], mask: NDArray[np.bool_]) -> Figures:
    """Lengths of the residuals ``2 H W`` of one pair's draws, and the mean squares of all, of what the draws share and
    of what they do not. The product of two draws is free of what each has of its own: what is shared is taken from
    those, and may come out below 0 by chance."""
    inside = np.stack(residuals)[:, :, mask]  # draws 2 pixels
    draws = len(inside)
    every = float(np.square(inside).sum(1).mean())
    shared = (float(np.square(inside.sum(0)).sum(0).mean()) / draws - every) / (draws - 1)
    return {
        "error": float(np.hypot(inside[:, 0], inside[:, 1]).mean()),
        "rms": every,
        "common": shared,
        "own": every - shared,
        "shift": float(np.hypot(*inside.mean((0, 2)))),
    }


def mean_of(found: list[Figures]) -> Figures:
    """The mean over pairs of what :func:`parts` says; the roots of the mean squares, in pixels."""
    means = {name: statistics.fmean(figures[name] for figures in found) for name in found[0]}
    return {name: max(value, 0.0) ** 0.5 if name in SQUARES else value for name, value in means.items()}


def measure_pair(network: BSAFusion, data: PairSet, index: int, suite: str, draws: int) -> Figures:
    """:func:`parts` of a pair under the draws of a suite."""
    residuals, mask = [], data.mask[index, 0].numpy() > 0
    for draw in range(draws):
        b = validation_batch(data, [index], MISALIGNMENTS[suite], draw=draw, device=CPU)
        residuals.append(endpoint_residual(b.known[0].numpy(), displacement(network, b.fixed, b.moving)))
    return parts(residuals, mask)


def measure_known(network: BSAFusion, data: PairSet, index: int, suite: str) -> float:
    """The mean error where the moving image is aligned with itself as it was before."""
    b = validation_batch(data, [index], MISALIGNMENTS[suite], draw=0, device=CPU)
    errors = endpoint_error(b.known[0].numpy(), displacement(network, b.truth, b.moving))
    return summarise(errors, data.mask[index, 0].numpy() > 0).mean


def neighbours(data: PairSet) -> list[tuple[int, int]]:
    """Places of consecutive slices of one task and case, by their ids."""
    order = sorted(range(len(data)), key=lambda i: (data.pairs[i].task, data.pairs[i].case, data.pairs[i].id))
    pairs = [(data.pairs[i].task, data.pairs[i].case) for i in order]
    return [(order[k], order[k + 1]) for k in range(len(order) - 1) if pairs[k][1] and pairs[k] == pairs[k + 1]]


def atlas_differs(network: BSAFusion, data: PairSet, here: int, after: int) -> float | None:
    """How far the atlas' alignment of one slice is from that of the next, pixels; None where they share no head."""
    seen = [head_mask(data.moving[i, 0].numpy()) for i in (here, after)]
    both = seen[0] & seen[1]
    if not both.any():
        return None
    shifts = []
    for one, other in zip(*(data.pictures([i])[:2] for i in (here, after)), strict=True):
        shifts.append(displacement(network, one, other)[:, both].mean(1))
    return float(np.hypot(*(shifts[1] - shifts[0])))


def best_shift(fixed: NDArray[np.float32], moving: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The shift ``(y, x)`` in whole pixels, each at most :data:`REACH`, from ``fixed`` to ``moving`` (``H W``) with the
    most mutual information inside the head."""
    search = sitk.ImageRegistrationMethod()
    search.SetMetricAsMattesMutualInformation(32)
    search.SetMetricFixedMask(sitk.GetImageFromArray(mask.astype(np.uint8)))
    search.SetInterpolator(sitk.sitkLinear)
    search.SetInitialTransform(sitk.TranslationTransform(2), inPlace=False)
    search.SetOptimizerAsExhaustive([REACH, REACH])
    images = [sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(image), 1.0) for image in (fixed, moving)]
    return np.array(search.Execute(*images).GetParameters()[::-1])


def without_deformation(network: BSAFusion, data: PairSet, places: list[int]) -> tuple[float, float]:
    """Of pairs as the atlas has them: how far the network moves them, and the part that mutual information confirms."""
    moved, found = [], []
    for index in places:
        (fixed, moving, _), mask = data.pictures([index]), data.mask[index, 0].numpy() > 0
        moved.append(displacement(network, fixed, moving)[:, mask].mean(1))
        found.append(best_shift(fixed[0, 0].numpy(), moving[0, 0].numpy(), mask))
    here, there = np.stack(moved).astype(np.float64), np.stack(found)
    return float(np.hypot(*here.T).mean()), float((here * there).sum() / max((here * here).sum(), 1e-9))


@torch.inference_mode()
def measure(
    network: BSAFusion, read: Callable[[str], PairSet], together: PairSet, *, draws: int, limit: int
) -> dict[str, Figures]:
    """``row -> column -> pixels``; ``read`` gives the pairs of a split, ``together`` holds all of them."""
    rows: dict[str, Figures] = {}
    for split in ("train", "val"):
        data = read(split)
        for suite in SUITES:
            for task in TASKS:
                if not data.indices(task):
                    continue
                chosen, key = spaced(data.indices(task), limit), f"{suite}/{task}"
                found = [measure_pair(network, data, index, suite, draws) for index in chosen]
                for name, value in mean_of(found).items():
                    rows.setdefault(f"{name}, {split}", {})[key] = value
                if split == "val":
                    known = [measure_known(network, data, index, suite) for index in chosen]
                    rows.setdefault("known image, val", {})[key] = statistics.fmean(known)
                print(split, key, {name: round(row[key], 2) for name, row in rows.items() if key in row}, flush=True)
    for task in TASKS:
        if data.indices(task):
            figures = without_deformation(network, data, spaced(data.indices(task), limit))
            for name, figure in zip(("moved, val", "confirmed, val"), figures, strict=True):
                rows.setdefault(name, {})[f"{SLICES}/{task}"] = figure
    apart: dict[str, dict[str, list[float]]] = {}
    for here, after in neighbours(together):
        one, other = together.pairs[here], together.pairs[after]
        differs = atlas_differs(network, together, here, after)
        if differs is not None:
            name = "to next, val" if "val" in (one.split, other.split) else "to next, train"
            apart.setdefault(name, {}).setdefault(f"{SLICES}/{one.task}", []).append(differs)
    for name, row in apart.items():
        rows[name] = {key: statistics.fmean(values) for key, values in row.items()}
    order = [f"{name}, {split}" for name in ROWS for split in ("train", "val")]
    return {name: rows[name] for name in order if name in rows}


def run(file: Path, pairs: Path, weights: str, draws: int, limit: int) -> None:
    """Measure, then write the results beside ``file`` and into its docstring."""
    model = load_model(weights)
    network = model.network.eval()
    side = network.cfg.working_side // 16 * 16

    def read(split: str) -> PairSet:
        return PairSet(read_pairs(pairs, split=split), side=side)

    rows = measure(network, read, PairSet(read_pairs(pairs), side=side), draws=draws, limit=limit)
    gap = [
        f"{task.upper()} {rows['error, train'][f'rigid/{task}']:.2f} / {rows['error, val'][f'rigid/{task}']:.2f}"
        for task in TASKS
        if f"rigid/{task}" in rows["error, val"]
    ]
    results = {
        "budget": f"no training; weights {model.record.name} ({model.record.sha256[:12]}), at most {limit} pairs a "
        f"task and split, draws: {draws}",
        "summary": f"rigid, px, train / val: {'; '.join(gap)}",
        "table": table([c for c in COLUMNS if any(c.key in row for row in rows.values())], rows),
        "pixels": rows,
    }
    write_results(file, results, NOTES)


def main() -> None:
    parser = untrained.options(__doc__)
    parser.add_argument("--draws", type=int, default=3, help="misalignments of each pair, at least 2; %(default)s")
    parser.add_argument("--limit", type=int, default=60, help="at most so many pairs a task and split; %(default)s")
    given = parser.parse_args()
    if given.draws < 2 or given.limit < 1:
        parser.error("expected at least 2 draws, to be compared with each other, and a limit of at least 1")
    run(Path(__file__), given.pairs, given.weights, given.draws, given.limit)


if __name__ == "__main__":
    main()
