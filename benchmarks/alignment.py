"""How well the shipped (or any) weights align: endpoint error against fields that are known exactly.

    python benchmarks/alignment.py PAIRS.csv [--split val] [--draws 3] [--weights default] [-o OUT.json]
    python benchmarks/alignment.py --samples [--weights default]

With a pairs CSV: every pair's moving image is deformed by fields drawn with fixed seeds (families in
``bsafusion.datasets.MISALIGNMENTS``), and the recovered field is compared with it inside the head (``error``)
and where, inside it, the moving image shows anything at all (``seen``); reference: the moving image as it was before.
``twice``: the share of results for which the network looked at the mirror images as well.
``self`` deforms each MRI and aligns it with itself; ``identical``: the field between an MRI and itself as it is, where
there is nothing to align. With ``--samples``: the pairs that ship with the package, each against its own known
transform. Lengths in pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.deformation import warp
from bsafusion.image import TASKS
from bsafusion.metrics import (
    draw_consistency,
    endpoint_error,
    endpoint_residual,
    folds,
    head_mask,
    inverse_consistency,
    summarise,
)
from bsafusion.pipeline import Model, fuse, load_model
from bsafusion.samples import load_samples


def _mean(values: Sequence[ArrayLike]) -> float:
    return float(np.mean(values))


def measure_suite(
    model: Model, data: PairSet, indices: list[int], suite: str, draws: int, *, itself: bool
) -> dict[str, float]:
    """Means over pairs and draws for one family of deformations."""
    rows: dict[str, list[float]] = {
        k: [] for k in ("before", "error", "seen", "p95", "consistency", "inverse", "folds", "twice")
    }
    for index in indices:
        residuals, mask = [], data.mask[index, 0].numpy() > 0
        seen = mask & head_mask((data.fixed if itself else data.moving)[index, 0].numpy())
        for draw in range(draws):
            batch = validation_batch(data, [index], MISALIGNMENTS[suite], draw=draw, device=torch.device("cpu"))
            moving = warp(batch.fixed, batch.known) if itself else batch.moving
            out = model.network.predict(batch.fixed, moving)
            field, known = out.alignment.displacement[0].numpy(), batch.known[0].numpy()
            lengths = endpoint_error(known, field)
            error = summarise(lengths, mask)
            rows["seen"].append(summarise(lengths, seen).mean)
            rows["before"].append(summarise(endpoint_error(known, np.zeros_like(field)), mask).mean)
            rows["error"].append(error.mean)
            rows["p95"].append(error.p95)
            rows["inverse"].append(inverse_consistency(field, out.alignment.inverse[0].numpy(), mask).mean)
            rows["folds"].append(folds(field).share)
            rows["twice"].append(out.alignment.disagreement is not None)
            residuals.append(endpoint_residual(known, field))
        if draws > 1:
            rows["consistency"].append(draw_consistency(residuals, mask))
    return {name: round(_mean(values), 6) for name, values in rows.items() if values}


def measure_identical(model: Model, data: PairSet) -> dict[str, float]:
    """Lengths of the field that each fixed image is given with itself: of all pixels of all images."""
    lengths = []
    for index in range(len(data)):
        image, _, _ = data.pictures([index])
        field = model.network.predict(image, image).alignment.displacement[0].numpy()
        lengths.append(endpoint_error(np.zeros_like(field), field))
    found = {"n": len(lengths), "mean": round(_mean(lengths), 6), "max": round(float(np.max(lengths)), 6)}
    print(f"identical images: field of {found['mean']:.3g} px on average, at most {found['max']:.3g} px")
    return found


def measure_pairs(model: Model, data: PairSet, draws: int, suites: list[str]) -> dict[str, Any]:
    """One row per suite and task."""
    table: dict[str, Any] = {}
    for suite in [*suites, "self"]:
        for task in TASKS:
            indices = data.indices(task)
            if not indices:
                continue
            started = time.perf_counter()
            itself = suite == "self"
            row = measure_suite(model, data, indices, "paper" if itself else suite, draws, itself=itself)
            table[f"{suite}/{task}"] = {"n": len(indices), **row}
            cells = "  ".join(f"{name} {value:.3g}" for name, value in row.items())
            print(f"{suite:6} {task:10} n={len(indices)}  {cells}  ({time.perf_counter() - started:.0f} s)", flush=True)
    return table


def measure_samples(model: Model) -> dict[str, Any]:
    """The shipped pairs against their known transforms."""
    table: dict[str, Any] = {}
    for sample in load_samples():
        result = fuse(sample.fixed, sample.moving, model=model)
        shape = result.displacement.shape[1:]
        known: NDArray[np.float64] = sample.known.displacement((shape[0], shape[1]))
        mask = head_mask(result.fixed.luma())
        before = summarise(endpoint_error(known, np.zeros_like(known)), mask)
        error = summarise(endpoint_error(known, result.displacement.numpy()), mask)
        table[sample.id] = {
            "before": round(before.mean, 4),
            "error": round(error.mean, 4),
            "median": round(error.median, 4),
            "p95": round(error.p95, 4),
            "status": result.status,
        }
        print(
            f"{sample.id:14} before {before.mean:6.2f}  error {error.mean:6.2f}  p95 {error.p95:6.2f}  {result.status}"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--split", default="val")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--suites", nargs="+", default=list(MISALIGNMENTS))
    parser.add_argument("--weights", default="default")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.pairs is None and not args.samples:
        parser.error("name a pairs CSV, or --samples")
    model = load_model(args.weights)
    found: dict[str, Any] = {"weights": model.record.name, "sha256": model.record.sha256}
    if args.samples:
        found["samples"] = measure_samples(model)
    if args.pairs is not None:
        found |= {"pairs": args.pairs.name, "split": args.split, "draws": args.draws}
        data = PairSet(read_pairs(args.pairs, split=args.split))
        found["identical"] = measure_identical(model, data)
        found["suites"] = measure_pairs(model, data, args.draws, args.suites)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
