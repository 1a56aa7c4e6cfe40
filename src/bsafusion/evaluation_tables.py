"""The tables of an evaluation: every row, the summary, and this program against the others pair by pair.

A pair counts once: its draws are averaged first, then pairs are summarised, and the bootstrap draws pairs
(``scoring.summarise_scores``). Slices of one patient are not independent all the same, so intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bsafusion.about import NOT_CLINICAL, version_of
from bsafusion.benchmark import EvaluationCfg
from bsafusion.evaluation import COLUMNS, NETWORK_FUSION, REGISTRATION_METRICS, Row
from bsafusion.files import write_csv, write_whole
from bsafusion.metrics import DIRECTIONS, PAPER_METRICS
from bsafusion.scoring import ALL, RowScore, Score, summarise_scores

SHARES = ("suspect", "failed")
FIELD_METRICS = (*REGISTRATION_METRICS, "expected_error", "seconds", *SHARES)
"""What is said of a field, whatever is fused with it."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header and the lines below it, cells as text."""

PER_IMAGE, SUMMARY, PAIRED, MARKDOWN, PAGE = "per_image.csv", "summary.csv", "paired.csv", "summary.md", "report.html"


@dataclass(frozen=True)
class SummaryRow:
    """One metric of one method over the pairs of a task, or over all; ``fusion`` is empty for metrics of fields."""

    method: str
    fusion: str
    suite: str
    task: str
    metric: str
    better: str
    n: int
    mean: float
    median: float
    ci95_low: float | None
    ci95_high: float | None


@dataclass(frozen=True)
class PairedRow:
    """Ours and another method on the same pairs and draws, fused by ``fusion_ours`` and ``fusion`` (empty for fields).

    ``difference`` is ours minus other, with its 95 % interval; ``share_better``: of the pairs on which ours is better.
    """

    suite: str
    task: str
    ours: str
    other: str
    fusion_ours: str
    fusion: str
    metric: str
    n: int
    mean_ours: float
    mean_other: float
    difference: float
    ci95_low: float | None
    ci95_high: float | None
    share_better: float


Key = tuple[str, str]
"""Task and id of a pair."""


def _by_pair(rows: Iterable[Row], metrics: Sequence[str]) -> dict[Key, dict[str, float]]:
    """The mean over draws of each metric that all draws of a pair have."""
    drawn: dict[Key, list[Row]] = {}
    for row in rows:
        drawn.setdefault((row["task"], row["id"]), []).append(row)
    return {
        key: {
            metric: float(np.mean([row[metric] for row in draws]))
            for metric in metrics
            if all(row[metric] is not None for row in draws)
        }
        for key, draws in drawn.items()
    }


def _summarised(pairs: Mapping[Key, Mapping[str, float]], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metric -> task (or ``all``) -> ``MetricSummary``; pairs without a metric are left out of it alone."""
    members = {metric: tuple(key for key, of in pairs.items() if metric in of) for metric in metrics}
    found: dict[str, dict[str, Any]] = {}
    for keys in set(members.values()) - {()}:
        names = [metric for metric in metrics if members[metric] == keys]
        scores = [RowScore(k[1], k[0], Score({m: pairs[k][m] for m in names}, {})) for k in keys]
        for task, group in summarise_scores(scores).items():
            for metric, of in group.items():
                found.setdefault(metric, {})[task] = of
    return found


def field_rows(rows: Iterable[Row]) -> list[Row]:
    """One row per method, suite, pair and draw, with the shares of :data:`SHARES` as 0 and 1.

    ``suspect`` is None where a method has no verdict on the result, ``failed`` never: success may go without saying.
    """
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["error"] is not None:
            key = tuple(row[name] for name in ("method", "suite", "task", "id", "draw"))
            status = row["status"]
            suspect = float(status == "suspect") if status in ("ok", "suspect") else None
            chosen.setdefault(key, row | {"suspect": suspect, "failed": float(status == "failed")})
    return list(chosen.values())


def _groups(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def summarise_rows(rows: Sequence[Row]) -> list[SummaryRow]:
    """Every metric per method, fusion, suite and task, and over all tasks."""
    parts: list[tuple[tuple[str, str, str], list[Row], Sequence[str]]] = []
    for (method, suite), of in _groups(field_rows(rows), "method", "suite").items():
        parts.append(((method, "", suite), of, FIELD_METRICS))
    for (method, fusion, suite), of in _groups(rows, "method", "fusion", "suite").items():
        parts.append(((method, fusion, suite), of, PAPER_METRICS))
    found = []
    for (method, fusion, suite), of, metrics in parts:
        summarised = _summarised(_by_pair(of, metrics), metrics)
        for metric in metrics:
            better = DIRECTIONS.get(metric, "" if metric == "before" else "down")
            for task, s in summarised.get(metric, {}).items():
                found.append(
                    SummaryRow(method, fusion, suite, task, metric, str(better), s.n, s.mean, s.median, s.low, s.high)
                )
    return found


def compare(rows: Sequence[Row], ours: str) -> list[PairedRow]:
    """The method ``ours`` against every other one: error of the field, and each fusion metric.

    Every fusion of another method is compared with the network's own, where ``ours`` has one, and with the same one.
    """
    found: list[PairedRow] = []
    fields_of = _groups(field_rows(rows), "suite", "method")
    fusions_of = _groups(rows, "suite", "method", "fusion")
    for (suite, other), theirs in fields_of.items():
        if other != ours and (suite, ours) in fields_of:
            found += _paired(fields_of[suite, ours], theirs, ("error",), (suite, ours, other, "", ""))
    for (suite, other, fusion), theirs in fusions_of.items():
        for own in dict.fromkeys((NETWORK_FUSION, fusion)):
            mine = fusions_of.get((suite, ours, own))
            if other != ours and mine:
                found += _paired(mine, theirs, PAPER_METRICS, (suite, ours, other, own, fusion))
    return found


def _paired(
    mine: list[Row], theirs: list[Row], metrics: Sequence[str], compared: tuple[str, str, str, str, str]
) -> list[PairedRow]:
    """``compared``: suite, both methods and both fusions, as in :class:`PairedRow`."""
    suite, ours, other, own, fusion = compared

    def drawn(row: Row) -> tuple[Any, ...]:
        return row["task"], row["id"], row["draw"]

    both = {drawn(row) for row in mine} & {drawn(row) for row in theirs}
    a = _by_pair((row for row in mine if drawn(row) in both), metrics)
    b = _by_pair((row for row in theirs if drawn(row) in both), metrics)
    differences = {key: {m: a[key][m] - b[key][m] for m in metrics if m in a[key] and m in b[key]} for key in a}
    found = []
    for metric, tasks in _summarised(differences, metrics).items():
        sign = 1 if DIRECTIONS.get(metric) == "up" else -1
        for task, s in tasks.items():
            keys = [k for k in differences if metric in differences[k] and task in (ALL, k[0])]
            mean_ours, mean_other = (float(np.mean([of[k][metric] for k in keys])) for of in (a, b))
            share = float(np.mean([sign * differences[k][metric] > 0 for k in keys]))
            who = (suite, task, ours, other, own, fusion, metric)
            found.append(PairedRow(*who, s.n, mean_ours, mean_other, s.mean, s.low, s.high, share))
    return found


# --- files -------------------------------------------------------------------------------------------


def write_tables(
    out: Path, rows: Sequence[Row], summary: Sequence[SummaryRow], paired: Sequence[PairedRow], markdown: str
) -> None:
    """``per_image.csv``, ``summary.csv``, ``paired.csv`` and ``summary.md`` in the folder ``out``, each whole."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / PER_IMAGE, COLUMNS, ([row[name] for name in COLUMNS] for row in rows))
    write_csv(out / SUMMARY, [f.name for f in fields(SummaryRow)], map(astuple, summary))
    write_csv(out / PAIRED, [f.name for f in fields(PairedRow)], map(astuple, paired))
    with write_whole(out / MARKDOWN) as aside:
        aside.write_text(markdown, encoding="utf-8")


def check_folder(out: Path) -> None:
    """Refuse a folder whose tables and page are not those of an evaluation, before any work.

    Raises:
        FileExistsError: it holds files of these names, but neither predictions nor scores.
    """
    theirs = [name for name in (PER_IMAGE, SUMMARY, PAIRED, MARKDOWN, PAGE) if (out / name).exists()]
    if theirs and not any((out / folder).is_dir() for folder in ("predictions", "scores")):
        raise FileExistsError(
            f"{out} holds {', '.join(theirs)}, which no evaluation has written; choose another folder or move them away"
        )


# --- Markdown ----------------------------------------------------------------------------------------

Lookup = Callable[[str, str, str, str, str], SummaryRow | None]


def lookup(summary: Iterable[SummaryRow]) -> Lookup:
    """``(method, fusion, suite, task, metric)`` to the row, or None."""
    table = {(row.method, row.fusion, row.suite, row.task, row.metric): row for row in summary}
    return lambda *key: table.get(key)


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(row: SummaryRow | None, digits: int = 2) -> str:
    """``mean [low, high]``."""
    if row is None:
        return ""
    interval = "" if row.ci95_low is None else f" [{number(row.ci95_low, digits)}, {number(row.ci95_high, digits)}]"
    return number(row.mean, digits) + interval


def digits_of(metric: str) -> int:
    return {"qcv": 0, "folds": 5, "suspect": 2, "failed": 2}.get(metric, 3 if metric in PAPER_METRICS else 2)


def describe_cfg(cfg: EvaluationCfg, pairs: str) -> str:
    """The settings of an evaluation in words."""
    limited = "" if cfg.limit is None else f", at most {cfg.limit} pairs a task"
    return (
        f"`{pairs}`, split `{cfg.split}`{limited}, {cfg.side} x {cfg.side} pixels; {cfg.draws} misalignments of each "
        f"pair ({cfg.competitor_draws} for the slower methods), fixed seeds; fusion metrics against the reference "
        f"`{cfg.reference}`; bsafusion {version_of('bsafusion')}"
    )


def glance(summary: Sequence[SummaryRow]) -> str:
    """The table to quote: mean error of the fields by suite and method, a column a task."""
    of = lookup(summary)
    tasks = [task for task in dict.fromkeys(row.task for row in summary) if task != ALL]
    lines = [
        f"| suite | method | {' | '.join(task.upper() for task in tasks)} | folds | seconds |",
        "| --- " * (4 + len(tasks)) + "|",
    ]
    for (suite, method), _ in _groups_of(summary, "error").items():
        cells = [with_interval(of(method, "", suite, task, "error")) for task in tasks]
        rest = [of(method, "", suite, ALL, name) for name in ("folds", "seconds")]
        folded, seconds = (None if row is None else row.mean for row in rest)
        share = "" if folded is None else f"{folded:.2%}"
        lines.append(f"| `{suite}` | {method} | {' | '.join(cells)} | {share} | {number(seconds)} |")
    return "\n".join(lines)


def _groups_of(summary: Iterable[SummaryRow], metric: str) -> dict[tuple[str, str], None]:
    """(suite, method) in the order of suites, then of methods."""
    keys = dict.fromkeys((row.suite, row.method) for row in summary if row.metric == metric)
    suites = list(dict.fromkeys(suite for suite, _ in keys))
    return {key: None for suite in suites for key in keys if key[0] == suite}


def render_markdown(
    summary: Sequence[SummaryRow],
    paired: Sequence[PairedRow],
    cfg: EvaluationCfg,
    pairs: str,
    *,
    described: Sequence[tuple[str, str]] = (),
    notes: Iterable[str] = (),
) -> str:
    """``summary.md``; ``described``: names of methods and what they are."""
    tasks = [task for task in dict.fromkeys(row.task for row in summary) if task != ALL]
    parts = [
        "# Evaluation",
        f"{describe_cfg(cfg, pairs)}. {NOT_CLINICAL}",
        *notes,
        "## Error at a glance",
        "Mean endpoint error inside the head in pixels, with the 95 % bootstrap interval over pairs.",
        glance(summary),
    ]
    for suite in dict.fromkeys(row.suite for row in summary):
        if fields := fields_table(summary, suite, tasks):
            parts += [f"## Fields: {suite}", _markdown(fields)]
        for task in tasks:
            if fusions := fusions_table(summary, suite, task):
                parts += [f"## Fusion: {suite}, {task}", _markdown(fusions)]
    if errors := paired_table(paired):
        parts += [f"## Error of {paired[0].ours} and of others on the same pairs and draws", _markdown(errors)]
    if described:
        parts += ["## Methods", _markdown((("method", "made with"), described))]
    return "\n\n".join(parts) + "\n"


_OF_FIELDS = ("before", "error", "error_median", "error_p95", "seen", "consistency", "inverse", "folds")


def fields_table(summary: Sequence[SummaryRow], suite: str, tasks: Sequence[str]) -> Table | None:
    """One suite's registrations, by task and of all tasks; None where there are none."""
    of, columns = lookup(summary), (*_OF_FIELDS, *SHARES, "seconds")
    methods = list(dict.fromkeys(row.method for row in summary if row.suite == suite and row.metric == "error"))
    lines = [
        [m, t, str(row.n), *(cell(of(m, "", suite, t, name)) for name in columns)]
        for t in (*tasks, ALL)
        for m in methods
        if (row := of(m, "", suite, t, "error")) is not None
    ]
    return (("method", "task", "n", *columns), lines) if lines else None


def fusions_table(summary: Sequence[SummaryRow], suite: str, task: str) -> Table | None:
    """The fused pictures of one suite and task; None where there are none."""
    of = lookup(summary)
    lines = [
        [
            row.method,
            row.fusion,
            str(row.n),
            *(cell(of(row.method, row.fusion, suite, task, name)) for name in PAPER_METRICS),
        ]
        for row in summary
        if row.suite == suite and row.task == task and row.metric == PAPER_METRICS[0]
    ]
    header = ("method", "fusion", "n", *map(arrow, PAPER_METRICS))
    return (header, lines) if lines else None


def paired_table(paired: Sequence[PairedRow]) -> Table | None:
    """One method's errors beside those of others; None where there are none."""
    lines = [
        [
            *(r.suite, r.task, r.other, str(r.n), number(r.mean_ours), number(r.mean_other), difference(r)),
            f"{r.mean_ours / r.mean_other:.2f}" if r.mean_other else "",
            f"{r.share_better:.0%}",
        ]
        for r in paired
        if r.metric == "error"
    ]
    header = ("suite", "task", "other", "n", "ours", "other's", "difference", "ratio", "ours better")
    return (header, lines) if lines else None


def cell(row: SummaryRow | None) -> str:
    """``mean [low, high]``; heavy tails also with the median."""
    if row is None:
        return ""
    digits = digits_of(row.metric)
    if row.metric in PAPER_METRICS or row.metric == "error":
        median = f"; {number(row.median, digits)}" if row.metric == "qcv" else ""
        return with_interval(row, digits) + median
    return number(row.mean, digits)


def difference(row: PairedRow) -> str:
    """``ours minus other [low, high]``, with signs."""
    interval = "" if row.ci95_low is None else f" [{row.ci95_low:+.2f}, {row.ci95_high:+.2f}]"
    return f"{row.difference:+.2f}{interval}"


def arrow(metric: str) -> str:
    """The heading of a column of :func:`cell`: the metric and which way is better."""
    return f"{metric} {'↑' if DIRECTIONS[metric] == 'up' else '↓ (mean; median)'}"


def _markdown(table: Table) -> str:
    header, lines = table
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
