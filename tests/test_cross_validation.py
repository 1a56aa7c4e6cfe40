"""Folds of patients: nobody is on both sides, and each pair comes from the network that does not know its patient."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bsafusion import cross_validation
from bsafusion.benchmark import Benchmark, EvaluationCfg, EvaluationError
from bsafusion.cli import app
from bsafusion.cross_validation import METHODS, NEW, SAME, Folds, predict_folds, train_folds
from bsafusion.datasets import DatasetError, Pair, case_folds, read_pairs
from bsafusion.evaluation import Method, Prediction, Predictor, read_fields, score_methods
from bsafusion.models.bsafusion import BSAFusionCfg
from bsafusion.training import TrainingCfg
from conftest import SIDE
from pairs import snapshot

CFG = TrainingCfg(steps=1, batch=2, side=SIDE, precision="float32", warmup=1)


def pair(task: str, case: str, index: int = 0) -> Pair:
    return Pair(f"{case}-{index}", task, Path("f"), Path("m"), "train", case)


@given(st.lists(st.integers(1, 30), min_size=3, max_size=12), st.integers(2, 3))
def test_folds_hold_every_case_once_and_are_balanced(sizes: list[int], count: int) -> None:
    pairs = [pair("ct-mri", f"case{case}", i) for case, size in enumerate(sizes) for i in range(size)]
    folds = case_folds(pairs, count)
    assert set(folds) == {p.case for p in pairs}
    loads = [sum(folds[p.case] == fold for p in pairs) for fold in range(count)]
    assert min(loads) > 0
    assert max(loads) - min(loads) <= max(sizes)
    assert case_folds(pairs[::-1], count) == folds


def test_a_case_of_two_tasks_has_one_fold_and_tasks_are_spread() -> None:
    pairs = [pair("ct-mri", "a"), pair("pet-mri", "a"), pair("ct-mri", "b"), pair("pet-mri", "c")]
    folds = case_folds(pairs, 2)
    assert folds["b"] == folds["c"] != folds["a"]


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_folds_or_cases_are_refused(count: int) -> None:
    pairs = [pair("ct-mri", "a"), pair("ct-mri", "b")]
    with pytest.raises(DatasetError, match=f"{count} folds of 2 cases in ct-mri"):
        case_folds(pairs, count)


@pytest.fixture(scope="module")
def pairs_csv(pairs_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those pairs as slices of three patients, each of whom has slices in ``train``."""
    folder = tmp_path_factory.mktemp("patients")
    shutil.copytree(pairs_csv.parent, folder, dirs_exist_ok=True)
    path = folder / "pairs.csv"
    text = path.read_text()
    for index, case in enumerate("aabbccab"):
        text = text.replace(f",case{index},", f",{case},")
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ct-mri,6,val,a": "ct-mri,6,val,d"}, "ct-mri 6 is of case d, of which no pair is in split 'train'"),
        (
            {"ct-mri,2,train": "ct-mri,2,other", "ct-mri,4,train": "ct-mri,4,other"},
            "without the cases of fold-. no ct-mri pair is left to train on, but 6 is tested there",
        ),
    ],
)
def test_networks_that_would_not_be_what_their_names_say_are_refused(
    changes: dict[str, str], message: str, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    text = pairs_csv.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    changed = pairs_csv.with_name("changed.csv")
    changed.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        train_folds(changed, tmp_path, 2, cfg=CFG, model_cfg=training_cfg)
    assert not (tmp_path / "folds").exists()


def test_pairs_that_were_trained_on_are_no_test(pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg) -> None:
    with pytest.raises(EvaluationError, match=r"split 'train' holds the pairs that are trained on"):
        train_folds(pairs_csv, tmp_path, 2, cfg=CFG, model_cfg=training_cfg, split="train")


@pytest.fixture(scope="module")
def trained(
    pairs_csv: Path, training_cfg: BSAFusionCfg, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Folds]:
    out = tmp_path_factory.mktemp("folds")
    return out, train_folds(pairs_csv, out, 2, cfg=CFG, model_cfg=training_cfg)


def test_no_network_sees_a_slice_of_its_held_out_patients(pairs_csv: Path, trained: tuple[Path, Folds]) -> None:
    out, folds = trained
    for fold, path in enumerate(folds.folds):
        assert path.is_file()
        seen = read_pairs(out / "folds" / f"fold-{fold + 1}" / "pairs.csv")
        assert {p.split for p in seen} == {"train"}
        assert not {p.case for p in seen} & {case for case, of in folds.of_case.items() if of == fold}
    slices = read_pairs(out / "folds" / "slices" / "pairs.csv")
    assert [(p.task, p.id) for p in slices] == [(p.task, p.id) for p in read_pairs(pairs_csv, split="train")]
    assert all(p.fixed.is_file() for p in slices)


def test_another_number_of_folds_or_other_pairs_in_the_same_folder_are_refused(
    pairs_csv: Path, trained: tuple[Path, Folds], training_cfg: BSAFusionCfg, tmp_path: Path
) -> None:
    """``fold-1`` of three has seen patients that ``fold-1`` of two is tested on."""
    out, _ = trained
    before = snapshot(out)
    with pytest.raises(EvaluationError, match=r"folds was made with other settings \(folds: 2 there, 3 now\)"):
        train_folds(pairs_csv, out, 3, cfg=CFG, model_cfg=training_cfg)
    with pairs_csv.open(newline="") as handle:
        rows = [
            [Path(pairs_csv.parent, cell) if cell.endswith(".png") else cell for cell in row]
            for row in csv.reader(handle)
        ]
    rows[1][3] = rows[3][3]
    with (tmp_path / "pairs.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    with pytest.raises(EvaluationError, match=r"pairs_sha256: \w+… there, \w+… now"):
        train_folds(tmp_path / "pairs.csv", out, 2, cfg=CFG, model_cfg=training_cfg)
    assert snapshot(out) == before


def test_the_trainings_differ_and_the_evaluation_runs(pairs_csv: Path, trained: tuple[Path, Folds]) -> None:
    out, folds = trained
    assert len({path.read_bytes() for path in (folds.slices, *folds.folds)}) == 3
    benchmark = Benchmark(pairs_csv, EvaluationCfg(side=SIDE, suites=("paper",), draws=1, fusions=("average",)))
    methods = predict_folds(benchmark, out, folds)
    assert tuple(method.name for method in methods) == METHODS == (NEW, SAME)
    rows = score_methods(benchmark, out, methods)
    assert {(r["method"], r["id"]) for r in rows} == {(m, i) for m in METHODS for i in ("6", "7")}


def test_each_pair_comes_from_the_network_that_does_not_know_its_patient(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("slices", "fold-1", "fold-2")]
    for path in paths:
        path.write_text(path.name)

    @contextmanager
    def numbered(method: Method, *, device: str) -> Iterator[tuple[Predictor, dict[str, object]]]:
        value = paths.index(Path(method.source))
        yield lambda seen: Prediction(np.full((2, *seen.fixed.shape), value, np.float32)), {"weights": "last"}

    monkeypatch.setattr(cross_validation, "open_method", numbered)
    benchmark = Benchmark(pairs_csv, EvaluationCfg(side=SIDE, suites=("paper",), draws=1, fusions=()))
    predict_folds(benchmark, tmp_path, Folds(paths[0], (paths[1], paths[2]), {"a": 1, "b": 0}))
    for case in benchmark.cases(1):
        told = {name: read_fields(tmp_path / "predictions" / name / case.folder)[0].flat[0] for name in METHODS}
        assert told == {SAME: 0, NEW: {"6": 2, "7": 1}[case.id]}


def test_pairs_without_a_case_are_named(pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg) -> None:
    with pairs_csv.open(newline="") as handle:
        rows = list(csv.reader(handle))
    rows[1][3] = ""
    with (tmp_path / "pairs.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    with pytest.raises(EvaluationError, match=r"ct-mri 0 has no case"):
        train_folds(tmp_path / "pairs.csv", tmp_path, 2, cfg=TrainingCfg(), model_cfg=training_cfg)


def test_the_command_shows_known_and_new_patients(pairs_csv: Path, tmp_path: Path) -> None:
    options = {"split-by": "case", "folds": 2, "side": SIDE, "draws": 1, "suites": "paper", "fusions": ""}
    settings = (f"training.side={SIDE}", "training.steps=1", "training.batch=2", f"model.working_side={SIDE}")
    arguments = [f"--{name}={value}" for name, value in options.items()] + [f"--set={setting}" for setting in settings]
    result = CliRunner().invoke(app, ["evaluate", str(pairs_csv), "-o", str(tmp_path), *arguments])
    assert result.exit_code == 0, result.output
    assert [line.split(" | ")[1] for line in result.output.splitlines()[2:4]] == [NEW, SAME]
    with (tmp_path / "paired.csv").open(newline="") as handle:
        compared = [(row["ours"], row["other"]) for row in csv.DictReader(handle) if row["metric"] == "error"]
    assert set(compared) == {(NEW, SAME)}
