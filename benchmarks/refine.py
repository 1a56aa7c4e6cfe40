"""What ``--refine N`` gains or loses: endpoint error against known fields, likeness and time, for several N.

    python benchmarks/refine.py PAIRS.csv [--steps 0 10 20 50] [--split val] [--limit 5] [--markdown FILE.md]

Rows: the atlas pairs deformed by one draw of each family of ``bsafusion.datasets.MISALIGNMENTS`` (the pairs themselves
are aligned to about 1 to 3 px only, which is in the error); ``consistency``: the mean distance of the residuals of a
pair's families from their mean, which the misalignment of the pair itself does not enter; ``contrast``: the fixed image
of each pair against a random remapping of its own intensities, deformed as ``paper`` and ``rigid`` in turn, where the
truth is exact; ``samples``: the MR pairs that ship with the package, against their own known transforms. Pixels, means
inside the head. ``likeness``: mean cosine of the descriptors after alignment. ``seconds``: of one call of the network,
refinement included. ``--markdown`` also puts the table between the marks ``<!-- figures:refinement -->`` and
``<!-- /figures -->`` of a file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsafusion.benchmark import spaced
from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, remap_contrast, validation_batch
from bsafusion.deformation import warp
from bsafusion.files import write_between
from bsafusion.image import TASKS
from bsafusion.metrics import draw_consistency, endpoint_error, endpoint_residual, folds, head_mask, summarise
from bsafusion.models.bsafusion import BSAFusion
from bsafusion.pipeline import Model, fuse, load_model
from bsafusion.refinement import Refinement
from bsafusion.samples import load_samples


@dataclass
class Figures:
    """What was measured under one number of steps in one row of the table."""

    error: list[float] = field(default_factory=list)
    likeness: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    folds: list[float] = field(default_factory=list)


Table = dict[str, dict[int, Figures]]


def align(network: BSAFusion, fixed: Tensor, moving: Tensor, steps: int) -> tuple[NDArray[np.float32], Tensor, float]:
    """The field ``2 H W``, the likeness after it ``H W`` and the time it took, seconds."""
    started = time.perf_counter()
    out = network.predict_alignment(fixed, moving, refine=Refinement(steps) if steps else None).alignment
    assert out.similarity is not None
    return out.displacement[0].numpy(), out.similarity[1][0, 0], time.perf_counter() - started


def note(
    figures: Figures, known: NDArray[np.float32], found: tuple[NDArray[np.float32], Tensor, float], mask: Tensor
) -> None:
    displacement, likeness, seconds = found
    figures.error.append(summarise(endpoint_error(known, displacement), mask.numpy()).mean)
    figures.likeness.append(float(likeness[mask].mean()))
    figures.seconds.append(seconds)
    figures.folds.append(folds(displacement).share)


def measure_pairs(model: Model, pairs: Path, split: str, limit: int | None, counts: list[int]) -> Table:
    """The atlas pairs, and their fixed images against other contrasts of themselves."""
    listed = read_pairs(pairs, split=split)
    of_task = ([q for q in listed if q.task == task] for task in TASKS)
    data = PairSet([pairs[place] for pairs in of_task for place in spaced(list(range(len(pairs))), limit)])
    table: Table = {}
    for task in TASKS:
        for place, index in enumerate(data.indices(task)):
            residuals: dict[int, list[NDArray[np.float64]]] = {}
            mask = data.mask[index, 0] > 0
            for suite, misalignment in MISALIGNMENTS.items():
                batch = validation_batch(data, [index], misalignment, draw=0, device=torch.device("cpu"))
                for steps in counts:
                    found = align(model.network, batch.fixed, batch.moving, steps)
                    known = batch.known[0].numpy()
                    note(_cell(table, f"{suite} {task}", steps), known, found, mask)
                    residuals.setdefault(steps, []).append(endpoint_residual(known, found[0]))
            for steps, of_pair in residuals.items():
                _cell(table, f"consistency {task}", steps).error.append(draw_consistency(of_pair, mask.numpy()))
            family = MISALIGNMENTS["rigid" if place % 2 else "paper"]
            batch = validation_batch(data, [index], family, draw=1, device=torch.device("cpu"))
            other = warp(remap_contrast(batch.fixed, torch.Generator().manual_seed(index)), batch.known)
            for steps in counts:
                found = align(model.network, batch.fixed, other, steps)
                note(_cell(table, f"contrast {task}", steps), batch.known[0].numpy(), found, mask)
            print(f"{task} {place + 1}", flush=True)
    return table


def _cell(table: Table, row: str, steps: int) -> Figures:
    return table.setdefault(row, {}).setdefault(steps, Figures())


def measure_samples(model: Model, counts: list[int]) -> Table:
    """The shipped MR pairs, through the whole of ``fuse``."""
    table: Table = {}
    for sample in load_samples():
        if sample.task != "mr-mr":
            continue
        for steps in counts:
            started = time.perf_counter()
            result = fuse(sample.fixed, sample.moving, model=model, refine=steps, align_only=True)
            seconds = time.perf_counter() - started
            found = result.displacement.numpy()
            known = sample.known.displacement((found.shape[1], found.shape[2]))
            figures = _cell(table, "samples mr-mr", steps)
            figures.error.append(summarise(endpoint_error(known, found), head_mask(result.fixed.luma())).mean)
            figures.likeness.append(result.evidence.similarity_after or float("nan"))
            figures.seconds.append(seconds)
            figures.folds.append(result.evidence.folded_share)
    return table


def markdown(table: Table, counts: list[int]) -> str:
    """Errors of every row under every number of steps; likeness, time and folds over all."""
    heads = [f"{steps} steps" for steps in counts]
    lines = [f"| misalignment | {' | '.join(heads)} |", "| --- |" + " --- |" * len(counts)]
    names = list(dict.fromkeys(row.split()[0] for row in table))
    for row in sorted(table, key=lambda row: names.index(row.split()[0])):
        errors = [statistics.fmean(table[row][steps].error) for steps in counts]
        cells = [f"**{e:.2f}**" if round(e, 2) == round(min(errors), 2) else f"{e:.2f}" for e in errors]
        n = len(table[row][counts[0]].error)
        lines.append(f"| {row.replace(' ', ', ', 1)} (n = {n}) | {' | '.join(cells)} |")
    for what, form in (("likeness", "{:.3f}"), ("seconds", "{:.2f}"), ("folds", "{:.3%}")):
        values = [[v for of in table.values() for v in getattr(of[steps], what)] for steps in counts]
        lines.append(f"| {what}, all rows | {' | '.join(form.format(statistics.fmean(v)) for v in values)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 10, 20, 50])
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="at most so many pairs a task, evenly spaced")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--markdown", type=Path, help="file whose table is replaced")
    args = parser.parse_args()
    model = load_model(args.weights)
    measured = {
        **measure_samples(model, args.steps),
        **measure_pairs(model, args.pairs, args.split, args.limit, args.steps),
    }
    text = markdown(measured, args.steps)
    print(text)
    if args.markdown:
        told = f"Weights `{model.record.name}` ({model.record.sha256[:12]}), split `{args.split}`.\n\n{text}"
        write_between(args.markdown, "<!-- figures:refinement -->", "<!-- /figures -->", told)


if __name__ == "__main__":
    main()
