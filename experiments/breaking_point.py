"""Where does alignment break, as rotation or elastic deformation grows, and does the result say so?

    python experiments/breaking_point.py PAIRS.csv [--weights default] [--limit N]

No training: each val pair's moving image is turned about the middle by 0 to 45 degrees (to either side, by its place in
the split), or deformed by smooth noise (sigma 16 px, as in the paper) of 0 to 20 px on average inside the head. Writes
``results/breaking_point.csv`` (a row for each point and task), ``.json`` and ``.svg`` beside this file.

-- results, written by the command --
Budget: no training; weights default (dfb5c1f3eb50), 60 val pairs.

                     before, px  error, px   off  suspect  off, not suspect  folds of the truth
rotation 0 degrees         0.00       1.12  0.02     0.05              0.02               0.000
rotation 5 degrees         6.20       1.20  0.02     0.07              0.02               0.000
rotation 10 degrees       12.38       1.37  0.02     0.05              0.02               0.000
rotation 15 degrees       18.54       1.77  0.02     0.10              0.00               0.000
rotation 20 degrees       24.66       2.04  0.02     0.12              0.00               0.000
rotation 25 degrees       30.74       2.33  0.05     0.17              0.00               0.000
rotation 30 degrees       36.76       2.93  0.08     0.22              0.00               0.000
rotation 35 degrees       42.71       4.65  0.25     0.58              0.03               0.000
rotation 40 degrees       48.58      10.72  0.75     0.95              0.02               0.000
rotation 45 degrees       54.36      21.23  1.00     1.00              0.00               0.000

               before, px  error, px   off  suspect  off, not suspect  folds of the truth
elastic 0 px         0.00       1.12  0.02     0.05              0.02               0.000
elastic 1 px         1.00       1.52  0.02     0.05              0.02               0.000
elastic 2 px         2.00       1.87  0.02     0.05              0.02               0.000
elastic 4 px         4.00       2.48  0.02     0.10              0.00               0.000
elastic 6 px         6.00       3.37  0.03     0.13              0.00               0.000
elastic 8 px         8.00       4.56  0.30     0.47              0.08               0.001
elastic 10 px       10.00       6.08  0.80     0.83              0.08               0.009
elastic 12 px       12.00       7.92  0.97     0.98              0.02               0.032
elastic 14 px       14.00      10.12  1.00     1.00              0.00               0.066
elastic 16 px       16.00      12.88  1.00     1.00              0.00               0.105
elastic 18 px       18.00      15.56  1.00     1.00              0.00               0.145
elastic 20 px       20.00      18.39  1.00     1.00              0.00               0.182

Means over the pairs of a task and over tasks. Error: mean endpoint error inside the head. Off: share of pairs
with an error above 5 px; suspect: share whose result says so; off, not suspect: share off and passing for ok.
Folds of the truth: share of the head where the deformation itself folds, which no smooth field can undo.
-- end of results --
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import untrained
from ablations import Column, Figures, table, write_results
from torch import Tensor

from bsafusion import trust
from bsafusion.datasets import PairSet, read_pairs, smooth_noise
from bsafusion.deformation import affine_field, warp
from bsafusion.evidence import measure_evidence
from bsafusion.files import write_whole
from bsafusion.image import TASKS
from bsafusion.metrics import endpoint_error, folds, summarise
from bsafusion.pipeline import Model, load_model
from bsafusion.report import verdict

AMOUNTS: dict[str, tuple[int, ...]] = {
    "rotation": tuple(range(0, 50, 5)),
    "elastic": (0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20),
}
UNITS = {"rotation": "degrees", "elastic": "px"}
OFF = 256 * trust.OFF
"""Pixels: a pair with a larger mean error inside the head counts as off, as in ``benchmarks/trust.py``."""

COLUMNS = (
    Column("before", "before, px"),
    Column("error", "error, px"),
    Column("off", "off"),
    Column("suspect", "suspect"),
    Column("missed", "off, not suspect"),
    Column("folded", "folds of the truth", 3),
)
NOTES = (
    "Means over the pairs of a task and over tasks. Error: mean endpoint error inside the head. Off: share of pairs "
    f"with an error above {OFF:g} px; suspect: share whose result says so; off, not suspect: share off and passing "
    "for ok. Folds of the truth: share of the head where the deformation itself folds, which no smooth field can undo."
)


def known_field(kind: str, amount: float, index: int, mask: Tensor) -> Tensor:
    """The deformation ``1 2 H W`` of the pair ``index``: the same shape at every amount; ``mask``: ``H W``, bool."""
    height, width = mask.shape
    if kind == "rotation":
        angle = math.radians(amount if index % 2 else -amount)
        cosine, sine = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
        return affine_field(turn, shape=(height, width))
    noise = smooth_noise(1, (height, width), 16.0, torch.Generator().manual_seed(index))
    return noise * float(amount / noise[0].norm(dim=0)[mask].mean())


@torch.inference_mode()
def measure_pair(model: Model, data: PairSet, index: int, kind: str, amount: float) -> Figures:
    """The figures of one pair at one point."""
    fixed, truth = data.pictures([index])[:2]
    mask = data.mask[index, 0] > 0
    known = known_field(kind, amount, index, mask)
    moving = warp(truth, known)
    out = model.network.predict(fixed, moving)
    evidence = measure_evidence(out.alignment, fixed[0, 0].numpy(), out.aligned[0, 0].numpy())
    status, _ = verdict(evidence, max(mask.shape), trust=model.trust)
    field, p, inside = out.alignment.displacement[0].numpy(), known[0].numpy(), mask.numpy()
    error = summarise(endpoint_error(p, field), inside).mean
    off, suspect = error > OFF, status == "suspect"
    return {
        "before": summarise(endpoint_error(p, np.zeros_like(p)), inside).mean,
        "error": error,
        "off": float(off),
        "suspect": float(suspect),
        "missed": float(off and not suspect),
        "folded": folds(p, inside).share,
    }


def mean_of(rows: Iterable[Figures]) -> Figures:
    listed = list(rows)
    return {key: statistics.fmean(row[key] for row in listed) for key in listed[0]}


def sweep(model: Model, data: PairSet, limit: int | None) -> dict[str, dict[int, dict[str, Figures]]]:
    """``kind -> amount -> task -> figures``, at most ``limit`` pairs a task."""
    points: dict[str, dict[int, dict[str, Figures]]] = {}
    for kind, amounts in AMOUNTS.items():
        points[kind] = {}
        for amount in amounts:
            points[kind][amount] = {
                task: mean_of(measure_pair(model, data, i, kind, amount) for i in data.indices(task)[:limit])
                for task in TASKS
                if data.indices(task)
            }
            shown = mean_of(points[kind][amount].values())
            print(f"{kind} {amount:2} {UNITS[kind]}", *(f"{c.key} {shown[c.key]:.2f}" for c in COLUMNS), flush=True)
    return points


def breaks_at(points: dict[int, dict[str, Figures]], unit: str) -> str:
    """The first amount at which more than half of the pairs are off, and how many of those are called suspect."""
    for amount, tasks in points.items():
        figures = mean_of(tasks.values())
        if figures["off"] > 0.5:
            told = 1 - figures["missed"] / figures["off"]
            return f"breaks at {amount} {unit} ({figures['off']:.0%} of pairs off, {told:.0%} of them called suspect)"
    return f"holds up to {max(points)} {unit}"


def describe(points: dict[str, dict[int, dict[str, Figures]]], model: Model, pairs: int) -> dict[str, Any]:
    """The content of ``results/breaking_point.json``."""
    lines: list[str] = []
    for kind, amounts in points.items():
        rows = {f"{kind} {amount} {UNITS[kind]}": mean_of(tasks.values()) for amount, tasks in amounts.items()}
        lines += [*table(COLUMNS, rows), ""]
    return {
        "budget": f"no training; weights {model.record.name} ({model.record.sha256[:12]}), {pairs} val pairs",
        "summary": "; ".join(f"{kind} {breaks_at(amounts, UNITS[kind])}" for kind, amounts in points.items()),
        "table": lines[:-1],
        "points": {
            kind: {str(amount): mean_of(tasks.values()) for amount, tasks in amounts.items()}
            for kind, amounts in points.items()
        },
    }


def write_csv(path: Path, points: dict[str, dict[int, dict[str, Figures]]]) -> None:
    with write_whole(path) as aside, aside.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["kind", "amount", "task", *(c.key for c in COLUMNS)])
        for kind, amounts in points.items():
            for amount, tasks in amounts.items():
                for task, figures in tasks.items():
                    writer.writerow([kind, amount, task, *(round(figures[c.key], 5) for c in COLUMNS)])


# --- the picture ----------------------------------------------------------------------------------

COLOURS = dict(zip(TASKS, ("#1f6fb4", "#d1751c", "#2f8f4e"), strict=True))
WIDTH, HEIGHT, LEFT, TOP = 320, 190, 60, 50
GAP_X, GAP_Y = 70, 90
Line = tuple[str, str, str, list[float]]  # name, colour, dashes, a value for each amount


def svg(points: dict[str, dict[int, dict[str, Figures]]]) -> str:
    """Above the error of each task and before alignment, below the shares off and suspect; a column for each kind."""
    parts: list[str] = []
    for column, (kind, amounts) in enumerate(points.items()):
        x0 = LEFT + column * (WIDTH + GAP_X)
        means = [mean_of(tasks.values()) for tasks in amounts.values()]
        errors: list[Line] = [
            (task, COLOURS[task], "", [tasks[task]["error"] for tasks in amounts.values()]) for task in amounts[0]
        ]
        # What alignment leaves is small beside a rotation by 45 degrees: the axis ends at twice the largest error.
        top = max(min(max(m["before"] for m in means), 2 * max(max(line[3]) for line in errors)), 1.0)
        top = 4 * math.ceil(top / 4)
        errors.append(("before", "#888888", "2 4", [m["before"] for m in means]))
        parts += _panel(x0, TOP, kind, "error, px", tuple(amounts), top, errors)
        shares: list[Line] = [
            ("off", "#222222", "6 3", [m["off"] for m in means]),
            ("suspect", "#b3262e", "", [m["suspect"] for m in means]),
        ]
        parts += _panel(x0, TOP + HEIGHT + GAP_Y, kind, "share of pairs", tuple(amounts), 1.0, shares)
    size = (LEFT + 2 * WIDTH + GAP_X + 20, TOP + 2 * HEIGHT + GAP_Y + 50)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _panel(
    x0: int, y0: int, kind: str, label: str, amounts: tuple[int, ...], top: float, lines: list[Line]
) -> list[str]:
    def place(amount: float, value: float) -> str:
        return f"{x0 + WIDTH * amount / max(amounts):.1f},{y0 + HEIGHT * (1 - value / top):.1f}"

    parts = [f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#444444"/>']
    parts.append(f'<text x="{x0}" y="{y0 + HEIGHT + 34}">{kind}, {UNITS[kind]}</text>')
    parts.append(f'<text x="{x0 - 45}" y="{y0 - 24}">{label}</text>')
    for amount in amounts[:: max(len(amounts) // 6, 1)]:
        x = x0 + WIDTH * amount / max(amounts)
        parts.append(f'<text x="{x:.1f}" y="{y0 + HEIGHT + 16}" text-anchor="middle">{amount}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = y0 + HEIGHT * (1 - share)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + WIDTH}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:.3g}</text>')
    for number, (name, colour, dashes, values) in enumerate(lines):
        path = " ".join(place(a, v) for a, v in zip(amounts, values, strict=True) if v <= top)
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
        x = x0 + number * 78
        parts.append(f'<line x1="{x}" y1="{y0 - 10}" x2="{x + 16}" y2="{y0 - 10}" {style}/>')
        parts.append(f'<text x="{x + 20}" y="{y0 - 6}" fill="{colour}">{name.removesuffix("-mri")}</text>')
    return parts


def main() -> None:
    parser = untrained.options(__doc__)
    parser.add_argument("--limit", type=int, help="at most so many pairs a task")
    given = parser.parse_args()
    run(Path(__file__), given.pairs, given.weights, given.limit)


def run(file: Path, pairs: Path, weights: str, limit: int | None) -> None:
    """Sweep, then write the results beside ``file`` and into its docstring."""
    model = load_model(weights)
    data = PairSet(read_pairs(pairs, split="val"), side=model.network.cfg.working_side // 16 * 16)
    points = sweep(model, data, limit)
    counted = sum(len(data.indices(task)[:limit]) for task in TASKS)
    write_results(file, describe(points, model, counted), NOTES)
    write_csv(file.parent / "results" / f"{file.stem}.csv", points)
    with write_whole(file.parent / "results" / f"{file.stem}.svg") as aside:
        aside.write_text(svg(points), encoding="utf-8")


if __name__ == "__main__":
    main()
