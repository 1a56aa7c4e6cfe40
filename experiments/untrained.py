"""What the experiments share that train nothing: one table of ways and their errors, and the command."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from ablations import Column, Figures, table, write_results
from torch import Tensor

from bsafusion.datasets import MISALIGNMENTS, Batch, PairSet, read_pairs, validation_batch
from bsafusion.image import TASKS
from bsafusion.metrics import endpoint_error, summarise
from bsafusion.models.bsafusion import BSAFusion
from bsafusion.pipeline import load_model

Ways = Callable[[BSAFusion, Batch], dict[str, Tensor]]
"""The displacement ``1 2 H W`` of every way to align the one pair of a batch."""
BEFORE = "before alignment"


@torch.inference_mode()
def measure(
    network: BSAFusion, data: PairSet, ways: Ways, columns: Sequence[Column], *, draws: int, limit: int | None
) -> dict[str, Figures]:
    """``way -> suite/task -> mean error``, pixels, of the columns of which ``data`` has pairs."""
    errors: dict[str, dict[str, list[float]]] = {}
    for column in columns:
        suite, task = column.key.split("/")
        for index in data.indices(task)[:limit]:
            inside = data.mask[index, 0].numpy() > 0
            for draw in range(draws):
                b = validation_batch(data, [index], MISALIGNMENTS[suite], draw=draw, device=torch.device("cpu"))
                for name, field in ({BEFORE: torch.zeros_like(b.known)} | ways(network, b)).items():
                    error = summarise(endpoint_error(b.known[0].numpy(), field[0].numpy()), inside).mean
                    errors.setdefault(name, {}).setdefault(column.key, []).append(error)
        if data.indices(task):
            print(column.heading, *(f"{name} {statistics.fmean(row[column.key]):.2f}" for name, row in errors.items()))
    return {name: {key: statistics.fmean(values) for key, values in row.items()} for name, row in errors.items()}


def run(
    file: Path,
    pairs: Path,
    weights: str,
    draws: int,
    limit: int | None,
    *,
    ways: Ways,
    columns: Sequence[Column],
    notes: str,
) -> None:
    """Measure, then write the results beside ``file`` and into its docstring."""
    model = load_model(weights)
    network = model.network.eval()
    data = PairSet(read_pairs(pairs, split="val"), side=network.cfg.working_side // 16 * 16)
    rows = measure(network, data, ways, columns, draws=draws, limit=limit)
    counted = sum(len(data.indices(task)[:limit]) for task in TASKS)
    means = {name: statistics.fmean(row.values()) for name, row in rows.items()}
    results = {
        "budget": f"no training; weights {model.record.name} ({model.record.sha256[:12]}), {counted} val pairs, "
        f"draws: {draws}",
        "summary": "error, px, mean of suites and tasks: " + "; ".join(f"{k} {v:.2f}" for k, v in means.items()),
        "table": table([c for c in columns if c.key in rows[BEFORE]], rows),
        "errors": rows,
    }
    write_results(file, results, notes)


def options(description: str | None) -> argparse.ArgumentParser:
    """A command line with what all of them take: pairs, weights."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pairs", type=Path, metavar="PAIRS.csv")
    parser.add_argument("--weights", default="default", help="%(default)s")
    return parser


def command(description: str | None, run: Callable[[Path, str, int, int | None], None]) -> None:
    """Read the command line and run with what was given: pairs, weights, draws, limit."""
    parser = options(description)
    parser.add_argument("--draws", type=int, default=1, help="misalignments of each pair; %(default)s")
    parser.add_argument("--limit", type=int, help="at most so many pairs a task")
    given = parser.parse_args()
    run(given.pairs, given.weights, given.draws, given.limit)
