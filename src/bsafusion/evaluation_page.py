"""``report.html`` of an evaluation: tables, box plots and cases in one page that needs nothing else.

Charts are inline SVG, and there is no script (see ``page``). The pictures show the images that were evaluated: the page
is as confidential as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsafusion import page
from bsafusion.about import NOT_CLINICAL
from bsafusion.benchmark import Benchmark, Case, EvaluationCfg, EvaluationError
from bsafusion.evaluation import NETWORK_FUSION, Method, Row, align, fused_file, read_fields
from bsafusion.evaluation_tables import (
    PAGE,
    PairedRow,
    SummaryRow,
    Table,
    compare,
    describe_cfg,
    field_rows,
    fields_table,
    fusions_table,
    glance,
    paired_table,
    render_markdown,
    summarise_rows,
    write_tables,
)
from bsafusion.files import write_whole
from bsafusion.io import read_image
from bsafusion.metrics import DIRECTIONS, PAPER_METRICS, endpoint_error

Array = NDArray[np.float32]

ERROR_SHOWN = 10.0
"""Pixels of endpoint error that are the brightest colour of an error map."""

_BINS = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, float("inf"))
_ERROR_BINS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, float("inf"))
_SERIES = 8  # colours in the style


@dataclass(frozen=True)
class Shown:
    """One case in pictures: ``name, H W or 3 H W in [0, 1]``."""

    title: str
    pictures: tuple[tuple[str, Array], ...]


# --- cases -------------------------------------------------------------------------------------------


def choose_cases(rows: Sequence[Row], ours: str) -> list[tuple[str, Row]]:
    """For every suite the worst case of each task and the best of all, by mean endpoint error."""
    mine = [row for row in field_rows(rows) if row["method"] == ours]
    chosen = []
    for suite in dict.fromkeys(row["suite"] for row in mine):
        of = [row for row in mine if row["suite"] == suite]
        for task in dict.fromkeys(row["task"] for row in of):
            chosen.append(("worst", max((r for r in of if r["task"] == task), key=lambda r: float(r["error"]))))
        chosen.append(("best", min(of, key=lambda r: float(r["error"]))))
    return chosen


def show_cases(benchmark: Benchmark, out: Path, rows: Sequence[Row], ours: str) -> list[Shown]:
    """The chosen cases, read from their prediction files."""
    places = {(pair.task, pair.id): i for i, pair in enumerate(benchmark.data.pairs)}
    shown = []
    for kind, row in choose_cases(rows, ours):
        case = Case(row["suite"], row["task"], row["id"], places[row["task"], row["id"]], row["draw"])
        folder = out / "predictions" / ours / case.folder
        inputs = benchmark.inputs(case)
        displacement, _ = read_fields(folder)
        fixed, truth = ((levels / 255).astype(np.float32) for levels in benchmark.sources(case))
        pictures = [
            ("fixed", inputs.fixed),
            ("moving", inputs.moving),
            ("aligned", align(inputs.moving, displacement)),
        ]
        fusion = next(f for f in (NETWORK_FUSION, *benchmark.cfg.fusions) if fused_file(folder, f).is_file())
        fused = read_image(fused_file(folder, fusion)).luma() / np.float32(255)
        pictures += [(f"fused: {fusion}", fused), ("maximum of fixed and truth", np.maximum(fixed, truth))]
        error = endpoint_error(inputs.known, displacement) * inputs.mask
        pictures.append((f"error: dark 0 px, bright {ERROR_SHOWN:g} px or more", page.coloured(error / ERROR_SHOWN)))
        damaged = f", {row['corruption']}" if row["corruption"] else ""
        title = (
            f"{kind} of {case.suite}: {case.task} {case.id}, draw {case.draw}{damaged}: "
            f"{row['before']:.2f} → {row['error']:.2f} px"
        )
        shown.append(Shown(f"{title}, {row['status']}" if row["status"] else title, tuple(pictures)))
    return shown


# --- charts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Values under a label; ``colour`` counts methods."""

    label: str
    colour: int
    values: tuple[float, ...]


def box_chart(title: str, series: Sequence[Series]) -> str:
    """Horizontal box plots as SVG: median, quartiles, whiskers to the last value within 1.5 interquartile ranges.

    Values beyond the whiskers are dots; the axis goes on for at most half the whiskers' range, what lies farther is
    counted at its end.
    """
    left, width, line = 150, 480, 17
    stats = [_box(of.values) for of in series]
    low, high = min(s[0] for s in stats), max(s[4] for s in stats)
    span = max(high - low, 1e-9)
    values = [v for of in series for v in of.values]
    low, high = max(min(values), low - span / 2), min(max(values), high + span / 2)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5

    def x(value: float) -> float:
        return left + (width - left - 40) * (value - low) / (high - low)

    height = 24 + line * len(series) + 22
    parts = [f'<text class="name" x="0" y="13">{escape(title)}</text>', _axis(low, high, x, 20, height - 20)]
    for row, (of, (whisker_low, q1, median, q3, whisker_high)) in enumerate(zip(series, stats, strict=True)):
        y = 24 + line * row + line / 2
        tip = f"{of.label}: median {median:.4g}, quartiles {q1:.4g} to {q3:.4g}, n = {len(of.values)}"
        dots = [v for v in of.values if not whisker_low <= v <= whisker_high]
        beyond = sum(not low <= v <= high for v in dots)
        parts.append(
            f'<g class="c{of.colour % _SERIES}"><title>{escape(tip)}</title>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(of.label)}</text>'
            f'<path d="M{x(whisker_low):.1f} {y}H{x(q1):.1f}M{x(q3):.1f} {y}H{x(whisker_high):.1f}"/>'
            f'<rect x="{x(q1):.1f}" y="{y - 5}" width="{max(x(q3) - x(q1), 0.5):.1f}" height="10"/>'
            f'<path class="median" d="M{x(median):.1f} {y - 6}v12"/>'
            + "".join(f'<circle cx="{x(v):.1f}" cy="{y}" r="1.5"/>' for v in dots if low <= v <= high)
            + (f'<text x="{width - 34}" y="{y + 4:.1f}">+{beyond}</text>' if beyond else "")
            + "</g>"
        )
    return _svg(width, height, title, parts)


def _box(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    q1, median, q3 = (float(v) for v in np.percentile(values, [25, 50, 75]))
    reach = 1.5 * (q3 - q1)
    inside = [v for v in values if q1 - reach <= v <= q3 + reach]
    return min([*inside, q1]), q1, median, q3, max([*inside, q3])


def size_chart(title: str, lines: Sequence[tuple[str, int, Sequence[tuple[float, float, int]]]]) -> str:
    """Mean error against mean size of the deformation, a line a method; the dashed diagonal is no alignment.

    ``lines``: label, colour and the points ``(before, error, n)`` of the bins.
    """
    width, height, left, bottom = 480, 280, 36, 34
    points = [point for _, _, of in lines for point in of]
    far = max([before for before, _, _ in points] + [error for _, error, _ in points] + [1.0]) * 1.04

    def x(value: float) -> float:
        return left + (width - left - 120) * value / far

    def y(value: float) -> float:
        return 24 + (height - 24 - bottom) * (1 - value / far)

    ticks = _ticks(0, far)
    parts = [
        f'<text class="name" x="0" y="13">{escape(title)}</text>',
        *(f'<path class="grid" d="M{left} {y(t):.1f}H{x(far):.1f}"/>' for t in ticks),
        *(f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in ticks),
        *(f'<text x="{x(t):.1f}" y="{height - 18}" text-anchor="middle">{t:g}</text>' for t in ticks),
        f'<text x="{(left + x(far)) / 2:.1f}" y="{height - 3}" text-anchor="middle">size of the deformation, px</text>',
        f'<path class="grid diagonal" d="M{x(0):.1f} {y(0):.1f}L{x(far):.1f} {y(far):.1f}"/>',
    ]
    for row, (label, colour, of) in enumerate(lines):
        path = "L".join(f"{x(before):.1f} {y(error):.1f}" for before, error, _ in of)
        dots = "".join(
            f'<circle cx="{x(before):.1f}" cy="{y(error):.1f}" r="3"><title>'
            f"{escape(label)}: {before:.2f} → {error:.2f} px, n = {n}</title></circle>"
            for before, error, n in of
        )
        parts.append(
            f'<g class="c{colour % _SERIES}"><path d="M{path}"/>{dots}'
            f'<rect x="{width - 108}" y="{26 + 17 * row}" width="10" height="10"/>'
            f'<text x="{width - 93}" y="{35 + 17 * row}">{escape(label)}</text></g>'
        )
    return _svg(width, height, title, parts)


def binned(rows: Sequence[Row]) -> list[tuple[float, float, int]]:
    """Mean size and error, and the count, of the rows in each range of sizes that has any."""
    found = []
    for low, high in pairwise(_BINS):
        of = [row for row in rows if low <= row["before"] < high]
        if of:
            found.append((*(float(np.mean([r[name] for r in of])) for name in ("before", "error")), len(of)))
    return found  # type: ignore[return-value]  # a generator's length is not known to the checker


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** np.floor(np.log10((high - low) / 3))
    step = next(float(step * k) for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 6)
    return [float(k * step) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _axis(low: float, high: float, x: Callable[[float], float], top: float, bottom: float) -> str:
    return "".join(
        f'<path class="grid" d="M{x(t):.1f} {top}V{bottom}"/>'
        f'<text x="{x(t):.1f}" y="{bottom + 14}" text-anchor="middle">{t:g}</text>'
        for t in _ticks(low, high)
    )


def _svg(width: int, height: float, title: str, parts: Sequence[str]) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


# --- files -------------------------------------------------------------------------------------------


def write_report(
    benchmark: Benchmark, out: Path, methods: Sequence[Method], rows: Sequence[Row], notes: Sequence[str] = ()
) -> str:
    """Write the tables and the page of ``evaluation.score_methods``'s rows into ``out``; returns the table to quote.

    The first network is ours: it is compared with the others and its cases are shown.

    Raises:
        EvaluationError: there are no rows.
    """
    if not rows:
        raise EvaluationError(f"{out} holds no predictions of {', '.join(m.name for m in methods)}; predict first")
    named = [row["method"] for row in rows]
    ours = next((method.name for method in methods if method.kind == "network" and method.name in named), None)
    summary = summarise_rows(rows)
    paired = compare(rows, ours) if ours else []
    described = [(method.name, _made_with(out, method)) for method in methods if method.name in named]
    pairs = benchmark.path.name
    text = render_markdown(summary, paired, benchmark.cfg, pairs, described=described, notes=notes)
    write_tables(out, rows, summary, paired, text)
    shown = show_cases(benchmark, out, rows, ours) if ours else []
    text = render(
        *(rows, summary, paired, benchmark.cfg, pairs), ours=ours, shown=shown, described=described, notes=notes
    )
    with write_whole(out / PAGE) as aside:
        aside.write_text(text, encoding="utf-8")
    return glance(summary)


def _made_with(out: Path, method: Method) -> str:
    path = out / "predictions" / method.name / "settings.json"
    if not path.is_file():
        return "fused images of a third party"
    settings = json.loads(path.read_text(encoding="utf-8"))
    told = ("versions", "parameters", "weights", "preset", "weights_sha256")
    return "; ".join(f"{name}: {_words(settings[name])}" for name in told if settings.get(name))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(of)}" for name, of in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return str(value)


# --- page --------------------------------------------------------------------------------------------


def render(
    rows: Sequence[Row],
    summary: Sequence[SummaryRow],
    paired: Sequence[PairedRow],
    cfg: EvaluationCfg,
    pairs: str,
    *,
    ours: str | None,
    shown: Sequence[Shown] = (),
    described: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page as text; the same for the same arguments.

    Args:
        ours: the method that is compared with the others and shown in cases; None for none.
        described: names of methods and what they were made with.
        notes: sentences for the head of the page, such as which methods were left out.
    """
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    body = [
        f"<header><h1>Evaluation of alignment and fusion</h1><p>{escape(describe_cfg(cfg, pairs).replace('`', ''))}. "
        f"<strong>{NOT_CLINICAL}</strong></p>{''.join(f'<p>{escape(note)}</p>' for note in notes)}</header>",
        _size_section(rows),
        *(_suite_section(suite, rows, summary, first=suite == suites[0]) for suite in suites),
        _paired_section(paired),
        _suspect_section(rows),
        _cases_section(shown, ours),
        f"<section><h2>Methods</h2>{_html((('method', 'made with'), described))}</section>" if described else "",
        f"<footer><strong>{NOT_CLINICAL}</strong></footer>",
    ]
    return page.document("Evaluation", body, style=_STYLE)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _size_section(rows: Sequence[Row]) -> str:
    fields = field_rows(rows)
    if not fields:
        return ""
    names = _names(rows)
    charts = []
    for task in dict.fromkeys(row["task"] for row in fields):
        lines = []
        for method in names:
            of = [row for row in fields if row["method"] == method and row["task"] == task]
            if of and method != "identity":
                lines.append((method, names.index(method), binned(of)))
        charts.append(size_chart(f"{task}: mean error, px", lines))
    return (
        "<section><h2>Error against the size of the deformation</h2><p>Mean endpoint error inside the head over all "
        "suites, in ranges of the size before alignment. On the dashed line nothing is gained.</p>"
        f'<div class="charts">{"".join(charts)}</div></section>'
    )


def _suite_section(suite: str, rows: Sequence[Row], summary: Sequence[SummaryRow], *, first: bool) -> str:
    of = [row for row in rows if row["suite"] == suite]
    fields = field_rows(of)
    names = _names(rows)
    tasks = list(dict.fromkeys(row["task"] for row in of))
    charts = []
    for metric in ("error", *PAPER_METRICS):
        for task in tasks:
            series = _series(fields if metric == "error" else of, metric, task, names)
            if series:
                unit = ", px" if metric == "error" else ""
                better = "higher" if DIRECTIONS.get(metric) == "up" else "lower"
                charts.append(box_chart(f"{task}: {metric}{unit} ({better} is better)", series))
    return (
        f"<section><h2>Suite {escape(suite)}</h2>{_suite_table(suite, summary, tasks)}"
        f"<details{' open' if first else ''}><summary>Box plots by metric and task</summary>"
        f'<div class="charts">{"".join(charts)}</div></details></section>'
    )


def _series(rows: Sequence[Row], metric: str, task: str, names: Sequence[str]) -> list[Series]:
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["task"] == task and row[metric] is not None:
            fusion = "" if metric == "error" else row["fusion"]
            groups.setdefault((row["method"], fusion), []).append(row[metric])
    return [
        Series(f"{method}, {fusion}" if fusion else method, names.index(method), tuple(values))
        for (method, fusion), values in groups.items()
    ]


def _suite_table(suite: str, summary: Sequence[SummaryRow], tasks: Sequence[str]) -> str:
    fields = fields_table(summary, suite, tasks)
    parts = [_html(fields)] if fields else []
    for task in tasks:
        if fusions := fusions_table(summary, suite, task):
            parts.append(f"<details><summary>Fusion metrics, {escape(task)}</summary>{_html(fusions)}</details>")
    return "".join(parts)


def _paired_section(paired: Sequence[PairedRow]) -> str:
    errors = paired_table(paired)
    if not errors:
        return ""
    ours = escape(paired[0].ours)
    return (
        f"<section><h2>{ours} and others on the same pairs and draws</h2>"
        f"<p>Mean endpoint error, px. A negative difference is in favour of {ours}.</p>{_html(errors)}</section>"
    )


def _suspect_section(rows: Sequence[Row]) -> str:
    judged = [row for row in field_rows(rows) if row["status"] in ("ok", "suspect")]
    if not judged:
        return ""
    lines = []
    for method in _names(judged):
        for low, high in pairwise(_ERROR_BINS):
            of = [r for r in judged if r["method"] == method and low <= r["error"] < high]
            if of:
                share = float(np.mean([r["status"] == "suspect" for r in of]))
                span = f"{low:g} to {high:g} px" if np.isfinite(high) else f"{low:g} px and more"
                lines.append([method, span, str(len(of)), f"{share:.0%}"])
    return (
        "<section><h2>Does it know when it is wrong?</h2><p>The share of results that call themselves suspect, by "
        f"their true mean error.</p>{_html((('method', 'error', 'results', 'suspect'), lines))}</section>"
    )


def _cases_section(shown: Sequence[Shown], ours: str | None) -> str:
    if not shown:
        return ""
    cases = []
    for case in shown:
        figures = "".join(page.figure(name, page.picture_of(picture), optimize=True) for name, picture in case.pictures)
        cases.append(f'<h3>{escape(case.title)}</h3><div class="figures">{figures}</div>')
    return f"<section><h2>Worst and best cases of {escape(ours or '')}</h2>{''.join(cases)}</section>"


def _html(table: Table) -> str:
    header, lines = table
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root { --c0: #b3261e; --c1: #2463ae; --c2: #3f7d20; --c3: #8a5a00; --c4: #7b3fa0; --c5: #00757f; --c6: #a8326e;
  --c7: #555e6b; }
@media (prefers-color-scheme: dark) { :root {
  --c0: #ff8a80; --c1: #82b1ff; --c2: #9ccc65; --c3: #ffca61; --c4: #ce9cf0; --c5: #5fd0da;
  --c6: #f48fb1; --c7: #b0bac8; } }
@media screen { body { max-width: 1440px; } }
h3 { font-size: 14px; margin: 16px 0 4px; font-weight: 500; }
summary { cursor: pointer; margin: 8px 0; color: var(--soft); }
.wide { overflow-x: auto; }
table { font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 14px 3px 0; white-space: nowrap; }
th { border-top: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 16px; }
.figures { display: grid; grid-template-columns: repeat(6, 1fr); gap: 8px; }
@media (max-width: 800px) { .figures { grid-template-columns: repeat(3, 1fr); } }
svg { width: 100%; height: auto; display: block; font-size: 11px; }
svg text { fill: var(--soft); }
svg .name { fill: var(--ink); font-size: 13px; }
svg .grid { stroke: var(--line); fill: none; }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 4; }
svg g path { stroke: currentColor; fill: none; stroke-width: 1.5; }
svg g rect { fill: currentColor; fill-opacity: .35; stroke: currentColor; }
svg g .median { stroke: var(--ink); stroke-width: 2; }
svg g circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
@media print { section { break-inside: avoid; } }
"""
