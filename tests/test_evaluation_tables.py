"""Tables of rows whose summary is known by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bsafusion.benchmark import EvaluationCfg
from bsafusion.evaluation import COLUMNS, Row
from bsafusion.evaluation_tables import (
    SummaryRow,
    compare,
    field_rows,
    glance,
    lookup,
    render_markdown,
    summarise_rows,
    write_tables,
)
from bsafusion.metrics import PAPER_METRICS


def row(method: str, id: str, error: float | None, *, draw: int = 0, **others: Any) -> Row:
    values = dict.fromkeys(COLUMNS) | {
        "method": method,
        "fusion": "maximum",
        "suite": "paper",
        "task": "ct-mri",
        "id": id,
        "draw": draw,
        "reference": "truth",
        "status": "",
        "error": error,
        "before": 4.0,
    }
    return values | dict.fromkeys(PAPER_METRICS, 0.5) | others


ROWS = [
    row("ours", "a", 1.0, fusion="network", qabf=0.6, qcv=10.0, status="ok"),
    row("ours", "a", 3.0, draw=1, fusion="network", qabf=0.8, qcv=30.0, status="suspect"),
    row("ours", "b", 1.0, fusion="network", qabf=0.5, qcv=10.0, status="ok"),
    row("ours", "c", 3.0, task="pet-mri", fusion="network", qabf=0.9, qcv=90.0, status="ok"),
    row("other", "a", 3.0, qabf=0.5, qcv=20.0),
    row("other", "b", 2.0, qabf=0.6, qcv=5.0),
]
CFG = EvaluationCfg()


def found(summary: list[SummaryRow], *key: str) -> SummaryRow:
    chosen = lookup(summary)(*key)
    assert chosen is not None
    return chosen


def test_a_pair_counts_once_whatever_its_draws() -> None:
    error = found(summarise_rows(ROWS), "ours", "", "paper", "ct-mri", "error")
    assert (error.n, error.mean, error.median, error.better) == (2, 1.5, 1.5, "down")  # (2 + 1) / 2
    assert error.ci95_low is not None
    assert 1 <= error.ci95_low <= 1.5 <= error.ci95_high <= 2  # type: ignore[operator]
    everything = found(summarise_rows(ROWS), "ours", "", "paper", "all", "error")
    assert (everything.n, everything.mean) == (3, 2.0)


def test_fusion_metrics_stand_under_their_fusion() -> None:
    summary = summarise_rows(ROWS)
    assert found(summary, "ours", "network", "paper", "ct-mri", "qabf").mean == pytest.approx(0.6)
    assert found(summary, "ours", "network", "paper", "ct-mri", "qabf").better == "up"
    assert found(summary, "other", "maximum", "paper", "ct-mri", "qcv").median == 12.5
    assert lookup(summary)("other", "network", "paper", "ct-mri", "qabf") is None


def test_shares_are_of_those_that_judge_themselves() -> None:
    summary = summarise_rows(ROWS)
    assert found(summary, "ours", "", "paper", "ct-mri", "suspect").mean == 0.25  # one draw of two, of one pair of two
    assert lookup(summary)("other", "", "paper", "ct-mri", "suspect") is None


def test_a_metric_that_some_pairs_lack_is_summarised_over_the_others() -> None:
    rows = [row("ours", "a", 1.0, seen=0.5), row("ours", "b", 2.0, seen=None)]
    assert found(summarise_rows(rows), "ours", "", "paper", "ct-mri", "seen").n == 1
    assert found(summarise_rows(rows), "ours", "", "paper", "ct-mri", "error").n == 2


def test_a_pair_has_a_metric_where_all_its_draws_have_it() -> None:
    rows = [row("ours", "a", 1.0, seen=0.5), row("ours", "a", 3.0, draw=1, seen=None), row("ours", "b", 2.0, seen=0.1)]
    seen = found(summarise_rows(rows), "ours", "", "paper", "ct-mri", "seen")
    assert (seen.n, seen.mean) == (1, 0.1)


def test_a_field_counts_once_whatever_is_fused_with_it() -> None:
    rows = [row("ours", "a", 1.0), row("ours", "a", 1.0, fusion="average"), row("theirs", "a", None)]
    assert [r["fusion"] for r in field_rows(rows)] == ["maximum"]


def test_comparison_takes_the_same_pairs_and_draws() -> None:
    paired = {(r.task, r.metric, r.fusion): r for r in compare(ROWS, "ours")}
    assert {(r.fusion_ours, r.fusion) for r in paired.values()} == {("", ""), ("network", "maximum")}
    error = paired["ct-mri", "error", ""]
    assert (error.ours, error.other, error.n) == ("ours", "other", 2)
    # Draw 1 of a and all of c have no partner: a is 1 against 3, b is 1 against 2.
    assert (error.mean_ours, error.mean_other, error.difference, error.share_better) == (1.0, 2.5, -1.5, 1.0)
    qabf = paired["ct-mri", "qabf", "maximum"]
    assert (qabf.difference, qabf.share_better) == (
        pytest.approx(0.0),
        0.5,
    )  # higher is better: 0.6, 0.5 against 0.5, 0.6
    qcv = paired["ct-mri", "qcv", "maximum"]
    assert (qcv.mean_ours, qcv.mean_other, qcv.share_better) == (10.0, 12.5, 0.5)


def test_comparison_at_the_same_fusion_has_rows_of_its_own() -> None:
    rows = [*ROWS, row("ours", "a", 1.0, qabf=0.9), row("ours", "b", 1.0, qabf=0.8)]
    paired = {(r.fusion_ours, r.fusion): r for r in compare(rows, "ours") if (r.task, r.metric) == ("ct-mri", "qabf")}
    assert paired.keys() == {("network", "maximum"), ("maximum", "maximum")}
    assert paired["network", "maximum"].mean_ours == pytest.approx(0.55)
    assert paired["maximum", "maximum"].mean_ours == pytest.approx(0.85)


def test_a_method_that_only_says_when_it_fails_failed_in_a_share_of_all_its_pairs() -> None:
    rows = [row("other", "a", 3.0, status="failed"), *(row("other", id, 1.0) for id in "bcd")]
    summary = summarise_rows(rows)
    failed = found(summary, "other", "", "paper", "ct-mri", "failed")
    assert (failed.n, failed.mean) == (4, 0.25)
    assert not any(r.metric == "suspect" for r in summary)


def test_of_a_registration_without_fusions_errors_alone_are_compared() -> None:
    plain = row("other", "a", 2.0, fusion="", **dict.fromkeys(PAPER_METRICS))
    for rows in ([row("ours", "a", 1.0, fusion="network"), plain], [row("ours", "a", 1.0, fusion=""), plain]):
        assert {r.metric for r in compare(rows, "ours")} == {"error"}


def test_comparison_without_ours_is_empty() -> None:
    assert compare(ROWS, "nobody") == []


def test_tables_are_written_in_full(tmp_path: Path) -> None:
    summary = summarise_rows(ROWS)
    write_tables(tmp_path, ROWS, summary, compare(ROWS, "ours"), "text\n")
    with (tmp_path / "per_image.csv").open(newline="") as handle:
        read = list(csv.DictReader(handle))
    assert tuple(read[0]) == COLUMNS
    assert [float(line["error"]) for line in read] == [r["error"] for r in ROWS]
    assert read[0]["inverse"] == ""
    with (tmp_path / "summary.csv").open(newline="") as handle:
        assert len(list(csv.DictReader(handle))) == len(summary)
    assert (tmp_path / "summary.md").read_text() == "text\n"


def test_markdown_says_the_figures_the_reference_and_what_was_left_out() -> None:
    summary = summarise_rows(ROWS)
    text = render_markdown(summary, compare(ROWS, "ours"), CFG, "pairs.csv", notes=["ants was not run: no"])
    assert glance(summary) in text
    assert glance(summary).startswith("| suite | method | CT-MRI | PET-MRI | folds | seconds |\n")
    assert "reference `truth`" in text
    assert "ants was not run: no" in text
    assert "Not for clinical use" in text
    assert "## Fusion: paper, ct-mri" in text
    table = [line for line in text.splitlines() if line.startswith("| `paper` | other |")]
    assert table[0].startswith("| `paper` | other | 2.50 [2.00, 3.00] |")
    widths = {line.count("|") for line in glance(summary).splitlines()}
    assert len(widths) == 1
