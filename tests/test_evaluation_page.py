"""The page of an evaluation: well-formed, self-contained, and its charts where they belong."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bsafusion.benchmark import Benchmark, EvaluationCfg, EvaluationError
from bsafusion.evaluation import Method, predict_methods, score_methods
from bsafusion.evaluation_page import (
    Series,
    Shown,
    binned,
    box_chart,
    choose_cases,
    render,
    size_chart,
    write_report,
)
from bsafusion.evaluation_tables import compare, summarise_rows
from conftest import SIDE
from pairs import known_weights
from test_evaluation_tables import CFG, ROWS, row


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def check(self, text: str) -> None:
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        assert tag in ("rect", "circle", "path")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(**options: object) -> str:
    return render(ROWS, summarise_rows(ROWS), compare(ROWS, "ours"), CFG, "pairs.csv", ours="ours", **options)  # type: ignore[arg-type]


def test_the_page_is_well_formed_and_reaches_nothing() -> None:
    text = page(shown=[Shown("worst", (("fixed", np.eye(8, dtype=np.float32)),))], notes=["<b>"])
    Balanced().check(text)
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", text)
    assert "&lt;b&gt;" in text
    assert text == page(shown=[Shown("worst", (("fixed", np.eye(8, dtype=np.float32)),))], notes=["<b>"])


def test_names_are_escaped() -> None:
    rows = [r | {"method": "<i>&"} for r in ROWS]
    text = render(rows, summarise_rows(rows), [], CFG, "p.csv", ours=None)
    assert "<i>" not in text
    assert "&lt;i&gt;&amp;" in text


def test_the_page_says_what_the_table_says() -> None:
    text = page(described=[("ours", "weights: x")])
    assert "1.50 [1.00, 2.00]" in text  # error of ours, CT
    assert "<td>-1.50 [-2.00, -1.00]</td><td>0.40</td><td>100%</td>" in text  # paired, with the ratio
    assert "weights: x" in text
    assert "Not for clinical use" in text
    assert "<td>ours</td><td>3 to 5 px</td><td>2</td><td>50%</td>" in text  # suspect against error


def test_a_box_stands_at_its_quartiles() -> None:
    values = tuple(float(v) for v in range(101))
    chart = ET.fromstring(box_chart("t", [Series("a", 0, values), Series("b", 1, (0.0, 100.0))]))
    rect = chart.findall("g/rect")[0]
    left, right = float(rect.get("x", "")), float(rect.get("x", "")) + float(rect.get("width", ""))
    median = float(re.match(r"M([\d.]+) ", chart.findall("g/path[@class='median']")[0].get("d", "")).group(1))  # type: ignore[union-attr]
    whiskers = [float(x) for x in re.findall(r"[MH]([\d.]+)", chart.findall("g/path")[0].get("d", ""))]
    assert whiskers[0] < left < median < right < whiskers[3]
    quarter = (whiskers[3] - whiskers[0]) / 4
    assert left - whiskers[0] == pytest.approx(quarter, abs=0.3)
    assert median - left == pytest.approx(quarter, abs=0.3)


def test_far_values_are_counted_instead_of_stretching_the_axis() -> None:
    chart = box_chart("t", [Series("a", 0, (*map(float, range(20)), 1e6))])
    assert ">+1</text>" in chart
    ET.fromstring(chart)


def test_equal_values_make_a_chart() -> None:
    ET.fromstring(box_chart("t", [Series("a", 0, (0.5, 0.5, 0.5))]))


def test_sizes_are_binned_by_the_deformation() -> None:
    rows = [row("m", "a", 1.0, before=1.0), row("m", "b", 3.0, before=1.5), row("m", "c", 5.0, before=30.0)]
    assert binned(rows) == [(1.25, 2.0, 2), (30.0, 5.0, 1)]
    chart = ET.fromstring(size_chart("t", [("m", 0, binned(rows))]))
    assert len(chart.findall("g/circle")) == 2


def test_the_worst_of_each_task_and_the_best_of_all_are_shown() -> None:
    chosen = [(kind, r["task"], r["id"], r["draw"]) for kind, r in choose_cases(ROWS, "ours")]
    assert chosen == [("worst", "ct-mri", "a", 1), ("worst", "pet-mri", "c", 0), ("best", "ct-mri", "a", 0)]


def test_a_report_is_written_from_the_files(pairs_csv: Path, tmp_path: Path) -> None:
    cfg = EvaluationCfg(side=SIDE, suites=("corrupted",), draws=1, fusions=("average",))
    benchmark = Benchmark(pairs_csv, cfg)
    methods = [
        Method("ours", "network", str(known_weights(tmp_path, (1.0, 0.0)))),
        Method("identity", "registration", ""),
    ]
    predict_methods(benchmark, tmp_path, methods)
    quoted = write_report(benchmark, tmp_path, methods, score_methods(benchmark, tmp_path, methods), ["a note"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<img ") == 3 * 6  # worst of two tasks and the best, six pictures each
    assert "a note" in text
    assert "weights_sha256" in text
    assert quoted in (tmp_path / "summary.md").read_text(encoding="utf-8")
    with pytest.raises(EvaluationError, match="holds no predictions of ours"):
        write_report(benchmark, tmp_path, methods[:1], [])


def test_without_a_network_there_are_no_cases(pairs_csv: Path, tmp_path: Path) -> None:
    cfg = replace(EvaluationCfg(side=SIDE, suites=("paper",)), draws=1, fusions=("average",))
    benchmark, methods = Benchmark(pairs_csv, cfg), [Method("identity", "registration", "")]
    predict_methods(benchmark, tmp_path, methods)
    write_report(benchmark, tmp_path, methods, score_methods(benchmark, tmp_path, methods))
    assert "<img " not in (tmp_path / "report.html").read_text(encoding="utf-8")
