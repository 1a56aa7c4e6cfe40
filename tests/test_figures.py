"""The pages say what the kept results say, and their sentences hold whatever was measured."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from bsafusion import pipeline
from bsafusion.evidence import Evidence
from bsafusion.io import read_image
from bsafusion.samples import load_samples
from bsafusion.trust import alignment_sha256
from pairs import write_volume

ROOT = Path(__file__).parent.parent
RUNS = "experiments/shipped_weights/README.md"
PAGES = ("README.md", "docs/evaluation.md", "docs/fusion.md", "docs/training.md", "docs/trust.md", RUNS)
FIGURES = re.compile(r"(<!-- figures:(?!end)\w+ -->).*?(<!-- (?:/figures|figures:end) -->)", re.S)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"figures_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trust, pages = load("benchmarks/trust.py"), load("scripts/write_figures.py")
alignment = load("benchmarks/alignment.py")


# --- the pages that are kept ---


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages, their figures taken out."""
    for page in PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / page).read_text(encoding="utf-8")
        emptied, count = FIGURES.subn(r"\1\n\2", text)
        assert count, page
        (tmp_path / page).write_text(emptied, encoding="utf-8")
    return tmp_path


def test_the_pages_are_what_the_kept_results_give(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = pages.FOLDER / "default.json"
    shutil.copy(card, copy)
    monkeypatch.setattr(pages, "ROOT", copy)
    monkeypatch.setattr(pages, "FOLDER", copy)
    pages.main()
    assert (copy / "default.json").read_bytes() == card.read_bytes()
    monkeypatch.setattr(trust, "PAGE", copy / "docs/trust.md")
    monkeypatch.setattr(trust, "CURVE", copy / "docs/trust_curve.svg")
    model = pipeline.load_model()
    trust.report(trust.read_measured(alignment_sha256(model.network)), model.trust, model.record.name)
    for page in (*PAGES, "docs/trust_curve.svg"):
        assert (copy / page).read_bytes() == (ROOT / page).read_bytes(), page


def test_the_shipped_weights_align_the_shipped_pairs_as_the_kept_results_say() -> None:
    """What the tests of a network as drawn cannot see: one that computes something else than when it was trained."""
    kept, model = json.loads((ROOT / "benchmarks/results/alignment.json").read_text()), pipeline.load_model()
    assert kept["sha256"] == model.record.sha256
    found = alignment.measure_samples(model)
    assert list(found) == list(kept["samples"])
    for name, of in kept["samples"].items():
        assert found[name].pop("status") == of.pop("status"), name
        assert found[name] == pytest.approx(of, rel=0.02), name


def test_the_shipped_weights_leave_identical_images_where_they_are() -> None:
    model = pipeline.load_model()
    for sample in load_samples():
        result = pipeline.fuse(sample.fixed, sample.fixed, model=model)
        assert float(result.displacement.abs().max()) < 0.01, sample.id
        (reason,) = result.reasons
        assert reason.startswith("the fixed and the moving image are the same file")


# --- sentences on limits and fusion ---


def test_how_far_misalignments_are_undone() -> None:
    def points(*off: float) -> dict[str, dict[str, float]]:
        return {str(5 * place): {"off": share, "missed": share / 2} for place, share in enumerate(off)}

    told = pages.breaking_points({"points": {"rotation": points(0, 0.05, 0.3, 0.7, 0.05), "elastic": points(0.2, 0.4)}})
    assert "at most 5 % for rotations about the middle up to 5°, 70 % at 15°; " in told
    assert "at most 0 % for elastic deformations up to 0 px on average. Off and still `ok` are 35 % (15°)" in told
    assert told.split(" at worst")[0].endswith("and 20 % (5 px)")


def test_the_weakest_task_is_the_one_with_the_largest_errors() -> None:
    suites = {f"{s}/{t}": {"error": 1.0 + (t == "pet-mri")} for s in ("paper", "rigid", "large") for t in pages.TASKS}
    told = pages.weakest_task({"suites": suites})
    assert told.startswith("**PET-MRI is the weakest task**: 2.00 px under `paper` (1.00 and 1.00)")
    assert "in brackets CT-MRI and SPECT-MRI" in told


def test_fusions_that_are_ahead_are_named() -> None:
    worse = dict.fromkeys(pages.METRICS, 0.5) | {"qcv": 90.0}
    means = {"network": dict.fromkeys(pages.METRICS, 0.6) | {"qcv": 80.0}, "maximum": worse}
    found = {"wins": {"ct-mri": {"all": 6}}, "means": {"ct-mri": means}}
    assert (
        pages.fusion_wins(found) == "Of the six metrics the network is better than all four plain fusions in: CT-MRI 6."
    )
    means["guided"] = worse | {"qcv": 70.0, "qs": 0.7}
    assert pages.fusion_wins(found).endswith(
        " `guided` is ahead of it in Q_CV 70 against 80 (CT-MRI), Q_S 0.700 against 0.600 (CT-MRI)."
    )


def test_only_the_best_error_of_a_column_is_bold() -> None:
    row = {"ci95_low": "", "ci95_high": ""}
    rows: Any = {}
    for method, error in (("ours", 1.0), ("theirs", 2.0)):
        rows |= {(method, "", "paper", task, "error"): row | {"mean": error} for task in pages.TASKS}
        rows |= {(method, "", "paper", "all", name): row | {"mean": 0.5} for name in ("folds", "seconds")}
    assert pages.errors_table(rows).splitlines()[2:] == [
        "| `paper` | ours | **1.00** | **1.00** | **1.00** | 50.00% | 0.50 |",
        "| `paper` | theirs | 2.00 | 2.00 | 2.00 | 50.00% | 0.50 |",
    ]


def test_commands_are_not_broken_across_lines() -> None:
    told = pages.wrapped(f"{'word ' * 22}`python one.py TWO` and 7 % more", bullet=True)
    assert told == f"- {'word ' * 22}".rstrip() + "\n  `python one.py TWO` and 7 % more"


# --- a snippet ---


@pytest.mark.parametrize("kind", ["picture", "axial slice"])
def test_the_page_carries_an_image_with_simpleitk_as_we_do(kind: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import SimpleITK as sitk.*?)\n\naligned = ", page, re.S)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    sample = next(s for s in load_samples() if s.id == ("pet-mri" if kind == "picture" else "ct-mri"))
    files = [sample.fixed, sample.moving]
    if kind != "picture":
        affine = np.array([[0.9, 0, 0, -90], [0, -0.9, 0, 110], [0, 0, 5, -7], [0, 0, 0, 1.0]])
        for place, file in enumerate(files):
            grey = np.round(10 * read_image(file).luma().T[:, :, None] - 1000).astype(np.int16)
            files[place] = write_volume(tmp_path / f"{place}.nii.gz", grey, affine)
    result = pipeline.fuse(*files)
    deformation = result.save(tmp_path / "out") / "deformation.nii.gz"
    moving = sitk.ReadImage(str(files[1]))
    if kind == "picture":
        carried = scope["carry"](moving, str(deformation))
    else:
        assert "[:, :, 0]" in page
        carried = scope["carry"](moving[:, :, 0], str(deformation), background=-1000.0)
    theirs = sitk.GetArrayFromImage(carried).astype(np.float64)
    ours = result.aligned[0] if theirs.ndim == 2 else np.moveaxis(result.aligned, 0, -1)
    assert np.abs(theirs - ours).mean() < 2e-3 * np.ptp(ours)


# --- sentences on the verdict ---

USUAL = Evidence(0.3, 0.5, 2.0, 3.0, 12.0, 0.0, 0.0, similarity_low=0.3)


def judged(kind: str, error: float | None, suspect: bool) -> Any:
    return trust.Judged(trust.Row("val", 2, kind, "ct-mri/1/2", error, USUAL), suspect)


@pytest.mark.parametrize(
    ("part", "whole", "told"),
    [(0, 54, "none of 54"), (54, 54, "all 54"), (3, 60, "3 of 60 (5 %)"), (1, 400, "1 of 400 (1 %)")],
)
def test_a_share_is_none_or_all_only_where_it_is(part: int, whole: int, told: str) -> None:
    assert trust.counted(part, whole) == told
    assert trust.percent(399, 400) == 99


def test_all_wrong_results_beyond_the_worst_that_passed_are_counted() -> None:
    results = [judged("paper", error, error > 6.2) for error in (2.0, 5.04, 6.2, 6.9, 7.0, 7.1, 30.0)]
    results += [judged("elastic", 8.0, True), judged("noise", None, False)]
    assert trust.wrong_results(results) == (
        "Of the results whose error is known to exceed 5 px, 5 of 7 (71 %) were flagged. The other 2 are off by 5.0 to "
        "6.2 px; the 3 off by more than 7 px were all flagged. Without the strong elastic deformations it is 4 of 6 "
        "(67 %)."
    )


def test_no_claim_is_made_beyond_the_worst_result() -> None:
    told = trust.wrong_results([judged("paper", 9.0, False), judged("paper", 5.5, True)])
    assert "The other one is off by 9.0 px; no result at all is off by more than 9 px." in told
    told = trust.wrong_results([judged("paper", 9.0, True)])
    assert told == (
        "Of the results whose error is known to exceed 5 px, all 1 were flagged. "
        "Without the strong elastic deformations it is all 1."
    )
    assert trust.wrong_results([judged("paper", 4.0, True)]).startswith("No result")


def test_the_verdict_is_called_careful_only_where_large_ones_are_flagged_more() -> None:
    usual = [judged("paper", 2.0, False)] * 9 + [judged("paper", 2.0, True)]
    often = [judged("large", 3.5, True)] * 2 + [judged("large", 2.5, True)] + [judged("large", 1.0, False)] * 7
    told = trust.false_alarms(usual + often)
    assert "1 of 10 (10 %) of `paper`, 3 of 10 (30 %) of `large`. Of those of `large`, 2 of 3 (67 %)" in told
    assert told.endswith("px: the verdict is careful where the images had to be moved far.")
    seldom = [judged("large", 3.5, True)] * 2 + [judged("large", 1.0, False)] * 8
    assert trust.false_alarms(usual + seldom).endswith("all 2 are off by 3 to 5 px.")
    assert trust.false_alarms(usual).endswith("1 of 10 (10 %) of `paper`.")


def test_that_two_patients_pass_is_said_where_they_did() -> None:
    flagged, passed = judged("same level", None, True), judged("same level", None, False)
    assert "**Two patients at the same level may pass:** 1 of 4 such pairs (25 %)" in trust.same_level(
        [flagged] * 3 + [passed]
    )
    assert "did not pass here, which is no promise:** none of 3 such pairs" in trust.same_level([flagged] * 3)


def test_unseen_results_that_passed_are_called_right_only_where_they_are() -> None:
    right, wrong = judged("unseen", 2.0, False), judged("unseen", 8.0, False)
    assert "2 of 3 (67 %) passed, 1 of them right" in trust.unseen([right, wrong, judged("unseen", 2.0, True)])
    assert "all 1 passed, all of them right within 5 px. Of the right ones none of 1" in trust.unseen([right])
    assert "all 1 passed, none of them right within 5 px. MRI" in trust.unseen([wrong])


# --- sentences on training ---


def summary(path: Path, low: float, high: float) -> Path:
    """A ``summary.csv`` whose every interval is from ``low`` to ``high``."""
    row = {"method": "bsafusion", "fusion": "", "suite": "paper", "metric": "error", "n": 20, "mean": (low + high) / 2}
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, [*row, "task", "ci95_low", "ci95_high"])
        table.writeheader()
        for task in ("ct-mri", "pet-mri", "spect-mri", "all"):
            table.writerow({**row, "task": task, "ci95_low": low, "ci95_high": high})
    return path


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ((1.0, 2.0), (3.0, 4.0), "seems to have begun to remember"),
        ((1.0, 3.0), (2.5, 4.0), "the intervals overlap; under `paper` nothing shows"),
        ((3.0, 4.0), (1.0, 2.0), "`val` are ahead; under `paper` nothing shows"),
    ],
)
def test_remembering_is_claimed_only_where_the_intervals_part(
    train: tuple[float, float], val: tuple[float, float], told: str, tmp_path: Path
) -> None:
    rows = [pages._read_rows(summary(tmp_path / f"{low}.csv", low, high)) for low, high in (train, val)]
    text = pages.train_gap(*rows)
    assert told in " ".join(text.split())
    assert f"| `train` | {sum(train) / 2:.2f} [{train[0]:.2f}, {train[1]:.2f}] |" in text


def test_the_threshold_is_the_lowest_with_few_false_alarms() -> None:
    right = [i / 100 for i in range(1, 41)]
    threshold = trust.lowest_threshold(right, 2)
    assert sum(p >= threshold for p in right) == 2
    assert threshold == pytest.approx(0.385)
    assert trust.lowest_threshold(right, 0) == pytest.approx(0.405)
    assert trust.lowest_threshold(right, 40) == pytest.approx(0.005)


def test_half_a_head_is_not_to_be_believed_however_small_its_error() -> None:
    assert [judged("half cut", error, True).row.wrong for error in (2.0, 8.0)] == [True, True]
    assert [judged("half cut", error, True).row.off for error in (2.0, 8.0)] == [False, True]
    assert not judged("rigid", 2.0, True).row.wrong
    assert "1 of 1" not in trust.wrong_results([judged("half cut", 2.0, True)])


def test_what_the_limit_on_cut_heads_flags_is_not_the_calibrations_to_judge() -> None:
    whole, cut = judged("rigid", 2.0, False).row, judged("half cut", 2.0, True).row
    cut = cut._replace(evidence=replace(cut.evidence, cut_share=0.5))
    assert trust.in_view([whole, cut]) == [whole]


def test_the_least_similarity_is_what_unrelated_pairs_stay_below_and_pairs_of_one_head_exceed() -> None:
    def rows(kind: str, *values: float) -> list[Any]:
        row = judged(kind, 2.0, False).row
        return [row._replace(evidence=replace(row.evidence, similarity_before=value)) for value in values]

    given = [*rows("paper", *[0.9] * 99, 0.1), *rows("unrelated", *[0.5] * 99, 0.95), *rows("large", 0.2)]
    assert trust.least_similarity(given) == pytest.approx(0.5)
    # Of a network that cannot tell them apart: no more than a few false alarms.
    given = [*rows("paper", *[0.6] * 99, 0.1), *rows("unrelated", *[0.7] * 99, 0.95)]
    assert trust.least_similarity(given) == pytest.approx(0.6)


def test_the_means_of_the_runs_are_those_of_their_logs() -> None:
    folder, told = ROOT / "experiments/shipped_weights", []
    for run in (6, 9, 12, 13, 14, 17, 24, 27, 30, 33, 34, 44, 45, 51, 53, 56, 58):
        lines = (folder / f"{run}_alignment.jsonl").read_text(encoding="utf-8").splitlines()
        last = [record for record in map(json.loads, lines) if record["kind"] == "val"][-1]
        errors = [value for key, value in last.items() if key.count("/") == 1]
        assert len(errors) == 9
        told.append(f"run {run} {sum(errors) / 9:.2f}")
    page = " ".join((ROOT / RUNS).read_text(encoding="utf-8").split())
    assert ", ".join([f"{told[0]} px", *told[1:]]) in page
    table = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    assert all(f"{figure.split()[-1]} px" in table for figure in told[2:])


def test_how_fast_a_gpu_trains_is_what_the_logs_say() -> None:
    page = " ".join((ROOT / "docs/training.md").read_text(encoding="utf-8").split())
    rates = []
    for run in (29, 30):
        lines = (ROOT / f"experiments/shipped_weights/{run}_alignment.jsonl").read_text(encoding="utf-8").splitlines()
        rates.append([record for record in map(json.loads, lines) if record["kind"] == "train"][-1]["pairs_per_second"])
    assert f"Run 29 of the shipped weights saw {rates[0]:.0f} pairs a second" in page
    assert f"run 30 on two CPU cores with bfloat16 units {rates[1]:.1f}" in page


def test_what_small_rotations_leave_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "experiments/results/breaking_point.json").read_text(encoding="utf-8"))
    of = measured["points"]["rotation"]["5"]
    page = " ".join((ROOT / RUNS).read_text(encoding="utf-8").split())
    assert f"now 5° leave {of['error']:.2f} px and {100 * of['off']:.0f} %" in page
    table = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    assert f"is left with {of['error']:.2f} px and {100 * of['off']:.0f} % of the pairs" in table


def test_the_numbers_that_judge_are_the_fewest_of_the_best() -> None:
    sha256 = pipeline.load_model().trust.alignment_sha256
    listed = trust.choose(trust.read_measured(sha256), sha256)
    assert len({frozenset(choice.features) for choice in listed}) == 2 ** len(trust.SAID) - 1
    assert listed == sorted(listed)
    within = listed[0].loss + listed[0].error  # the rule of one standard error
    best = [choice for choice in listed if choice.missed == listed[0].missed and choice.loss <= within]
    assert set(trust.FEATURES) in [set(choice.features) for choice in best]
    assert len(trust.FEATURES) == min(len(choice.features) for choice in best)
