"""What the experiments share that train nothing: one table of ways and their errors, and the command."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from ablations import Column, Figures, table, write_results

from bsafusion.datasets import TASKS, PairSet, read_pairs
from bsafusion.models.bsafusion import BSAFusion
from bsafusion.pipeline import load_model

Measure = Callable[[BSAFusion, PairSet, int, int | None], dict[str, Figures]]
"""From a network, the val pairs, the number of draws and a limit of pairs a task: ``way -> suite/task -> error``."""


def run(
    file: Path,
    pairs: Path,
    weights: str,
    draws: int,
    limit: int | None,
    *,
    measure: Measure,
    columns: Sequence[Column],
    notes: str,
) -> None:
    """Measure, then write the results beside ``file`` and into its docstring."""
    model = load_model(weights)
    network = model.network.eval()
    data = PairSet(read_pairs(pairs, split="val"), side=network.cfg.working_side // 16 * 16)
    rows = measure(network, data, draws, limit)
    counted = sum(len(data.indices(task)[:limit]) for task in TASKS)
    means = {name: statistics.fmean(row.values()) for name, row in rows.items()}
    results = {
        "budget": f"no training; weights {model.record.name} ({model.record.sha256[:12]}), {counted} val pairs, "
        f"draws: {draws}",
        "summary": "error, px, mean of suites and tasks: " + "; ".join(f"{k} {v:.2f}" for k, v in means.items()),
        "table": table([c for c in columns if all(c.key in row for row in rows.values())], rows),
        "errors": rows,
    }
    write_results(file, results, notes)


def command(description: str | None, run: Callable[[Path, str, int, int | None], None]) -> None:
    """Read the command line and run with what was given: pairs, weights, draws, limit."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pairs", type=Path, metavar="PAIRS.csv")
    parser.add_argument("--weights", default="default", help="%(default)s")
    parser.add_argument("--draws", type=int, default=1, help="misalignments of each pair; %(default)s")
    parser.add_argument("--limit", type=int, help="at most so many pairs a task")
    given = parser.parse_args()
    run(given.pairs, given.weights, given.draws, given.limit)
