"""The benchmark's inputs: the same for everybody, and what the suites do to them."""

from __future__ import annotations

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PictureImage

from bsafusion.benchmark import (
    CORRUPTIONS,
    PROTOCOL,
    SUITES,
    Benchmark,
    Corruption,
    EvaluationCfg,
    EvaluationError,
    corrupt,
    draw_corruption,
)
from bsafusion.datasets import MISALIGNMENTS, validation_batch
from bsafusion.io import read_image
from bsafusion.scoring import grey_levels
from conftest import SIDE
from pairs import write_volume

CFG = EvaluationCfg(side=SIDE, draws=2)


@pytest.fixture(scope="module")
def benchmark(pairs_csv: Path) -> Benchmark:
    return Benchmark(pairs_csv, CFG)


def copied(pairs_csv: Path, folder: Path, **changes: str) -> Path:
    """The pairs in another folder; ``changes`` replace cells of the last row."""
    shutil.copytree(pairs_csv.parent, folder, dirs_exist_ok=True)
    with pairs_csv.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows[-1] |= changes
    with (folder / pairs_csv.name).open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / pairs_csv.name


def test_cases_are_every_pair_suite_and_draw_once(benchmark: Benchmark) -> None:
    cases = benchmark.cases(2)
    assert len(cases) == len(set(cases)) == 2 * len(SUITES) * 2  # pairs, suites, draws
    assert len({case.folder for case in cases}) == len(cases)


def test_a_limit_takes_evenly_spaced_pairs_that_keep_their_fields(pairs_csv: Path) -> None:
    whole = Benchmark(pairs_csv, replace(CFG, split="train"))
    limited = Benchmark(pairs_csv, replace(CFG, split="train", limit=2))
    some = limited.cases(1)
    assert [case.index for case in some if case.suite == "paper"] == [0, 2, 1, 3]  # 3 of CT, 3 of PET: first and second
    assert set(some) < set(whole.cases(1))
    assert np.array_equal(limited.inputs(some[1]).known, whole.inputs(some[1]).known)


@pytest.mark.parametrize("suite", MISALIGNMENTS)
def test_inputs_are_those_of_training_s_validation(benchmark: Benchmark, suite: str) -> None:
    case = next(case for case in benchmark.cases(2) if case.suite == suite and case.draw == 1)
    inputs = benchmark.inputs(case)
    batch = validation_batch(
        benchmark.data, [case.index], MISALIGNMENTS[suite], draw=case.draw, device=torch.device("cpu")
    )
    assert np.array_equal(inputs.fixed, batch.fixed[0, 0].numpy())
    assert np.array_equal(inputs.moving, batch.moving[0, 0].numpy())
    assert np.array_equal(inputs.chroma, batch.moving[0, 1:].numpy())
    assert np.array_equal(inputs.known, batch.known[0].numpy())
    assert inputs.corruption is None


def test_the_corrupted_suite_damages_one_image_and_keeps_the_paper_s_field(benchmark: Benchmark) -> None:
    for case in benchmark.cases(2):
        if case.suite != "corrupted":
            continue
        damaged, clean = benchmark.inputs(case), benchmark.inputs(replace(case, suite="paper"))
        assert damaged.corruption == draw_corruption(case.index, case.draw)
        assert np.array_equal(damaged.known, clean.known)
        same = {
            "fixed": np.array_equal(damaged.fixed, clean.fixed),
            "moving": np.array_equal(damaged.moving, clean.moving),
        }
        assert [name for name, equal in same.items() if not equal] == [damaged.corruption.image]
        kept = np.array_equal(damaged.chroma, clean.chroma)
        assert kept if damaged.corruption.image == "fixed" else not damaged.chroma.any()


def test_every_corruption_is_drawn_of_either_image() -> None:
    drawn = [draw_corruption(index, draw) for index in range(60) for draw in range(3)]
    assert {(c.kind, c.image) for c in drawn} == {(k, i) for k in CORRUPTIONS for i in ("fixed", "moving")}
    assert all(CORRUPTIONS[c.kind][0] <= c.strength <= CORRUPTIONS[c.kind][1] for c in drawn)
    assert drawn[0] == draw_corruption(0, 0)


def test_what_is_drawn_changes_only_with_the_protocol() -> None:
    assert PROTOCOL == 1
    drawn = [draw_corruption(*place) for place in ((0, 0), (7, 2), (1, 0))]
    assert [(str(c), round(c.strength, 6), round(c.place, 6), c.seed) for c in drawn] == [
        ("bias moving", 0.680185, 0.14416, 1767258089),
        ("noise moving", 0.064907, 0.791949, 1077728583),
        ("slab fixed", 0.191784, 0.507633, 1104591634),
    ]


def test_noise_has_its_standard_deviation() -> None:
    noisy = corrupt(np.full((200, 200), 0.5, np.float32), Corruption("noise", "fixed", 0.1, 0.5, 3))
    assert noisy.std() == pytest.approx(0.1, rel=0.02)
    assert noisy.mean() == pytest.approx(0.5, abs=0.002)


def test_a_bias_is_a_slope_along_its_direction() -> None:
    grey = np.full((81, 81), 0.5, np.float32)
    along_columns = corrupt(grey, Corruption("bias", "fixed", 0.4, 0.0, 0))
    assert along_columns[:, 0] == pytest.approx(0.5 * 0.6)
    assert along_columns[:, 40] == pytest.approx(0.5)
    assert along_columns[:, -1] == pytest.approx(0.5 * 1.4)
    along_rows = corrupt(grey, Corruption("bias", "fixed", 0.4, 0.25, 0))
    assert along_rows == pytest.approx(along_columns.T, abs=1e-6)


def test_a_slab_is_missing_where_it_was_placed() -> None:
    white = np.ones((100, 80), np.float32)
    rows, columns = (corrupt(white, Corruption("slab", "moving", 0.2, 0.5, seed)) for seed in (0, 1))
    assert np.array_equal(np.flatnonzero(rows[:, 0] == 0), np.arange(40, 60))
    assert np.array_equal(np.flatnonzero(columns[0] == 0), np.arange(32, 48))
    assert rows.mean() == pytest.approx(0.8)
    assert columns.mean() == pytest.approx(0.8)


def test_a_narrow_window_saturates_what_lies_beyond_it() -> None:
    ramp = np.linspace(0, 1, 101, dtype=np.float32)[None].repeat(2, 0)
    clipped = corrupt(ramp, Corruption("clip", "fixed", 0.5, 0.5, 0))[0]
    assert clipped[:26] == pytest.approx(0)
    assert clipped[75:] == pytest.approx(1)
    assert clipped[50] == pytest.approx(0.5)


def test_an_unknown_corruption_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"no corruption is called 'rain'; choose from noise"):
        corrupt(np.zeros((4, 4), np.float32), Corruption("rain", "fixed", 0.5, 0.5, 0))


def test_sources_are_the_files_grey_levels_as_bsafusion_metrics_sees_them(benchmark: Benchmark) -> None:
    case = next(case for case in benchmark.cases(1) if case.task == "pet-mri")
    pair = benchmark.pair(case)
    fixed, moving = benchmark.sources(case)
    assert np.array_equal(fixed, grey_levels(read_image(pair.fixed))[0])
    assert np.array_equal(moving, grey_levels(read_image(pair.moving))[0])  # BT.601 luma of a colour picture


def test_pairs_of_another_size_are_scored_on_the_grid_of_the_evaluation(pairs_csv: Path) -> None:
    smaller = Benchmark(pairs_csv, replace(CFG, side=49))
    case = smaller.cases(1)[0]
    fixed, moving = smaller.sources(case)
    assert fixed.shape == moving.shape == smaller.inputs(case).fixed.shape == (49, 49)
    assert np.allclose(fixed / 255, smaller.inputs(case).fixed, atol=1e-6)


def test_a_scan_has_no_levels_that_it_must_use(pairs_csv: Path, tmp_path: Path) -> None:
    """Where a picture would be refused as too dim: a scan is stretched for the methods and for the metrics alike."""
    changed = copied(pairs_csv, tmp_path, fixed="scan.nii.gz")
    values = np.asarray(PictureImage.open(changed.parent / "7-mri.png").convert("L"), dtype=np.float32).T / 1000
    write_volume(changed.parent / "scan.nii.gz", values[..., None], np.diag([-1.0, -1.0, 1.0, 1.0]))
    benchmark = Benchmark(changed, CFG)
    case = next(case for case in benchmark.cases(1) if case.id == "7")
    levels = benchmark.sources(case)[0]
    assert (levels.min(), levels.max()) == (0, 255)
    assert np.abs(levels / 255 - benchmark.inputs(case).fixed).max() < 0.01


def test_settings_change_with_an_image_and_not_with_the_folder(pairs_csv: Path, tmp_path: Path) -> None:
    here = Benchmark(pairs_csv, CFG).settings()
    elsewhere = Benchmark(copied(pairs_csv, tmp_path / "a"), CFG).settings()
    assert here["images_sha256"] == elsewhere["images_sha256"]
    changed = copied(pairs_csv, tmp_path / "b")
    shutil.copy(changed.parent / "0-mri.png", changed.parent / "7-mri.png")
    assert Benchmark(changed, CFG).settings()["images_sha256"] != here["images_sha256"]


def test_ids_must_name_folders_and_be_unique(pairs_csv: Path, tmp_path: Path) -> None:
    for name in ("../x", "..", "."):
        with pytest.raises(EvaluationError, match=rf"id '{re.escape(name)}' cannot be the name of a folder"):
            Benchmark(copied(pairs_csv, tmp_path / "a", slice=name), CFG)
    with pytest.raises(EvaluationError, match=r"id '5' stands twice in pet-mri"):
        Benchmark(copied(pairs_csv, tmp_path / "b", slice="5", split="train"), replace(CFG, split="train"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suites": ("paper", "huge")}, "suites paper, huge: choose from paper, rigid, large, corrupted"),
        ({"suites": ()}, "no suite is left"),
        ({"fusions": ("maximum", "maximum")}, "each at most once"),
        ({"reference": "guess"}, "unknown reference 'guess'; expected truth or aligned"),
        ({"draws": 0}, "draws is 0; expected at least 1"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"jobs": 0}, "jobs is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        EvaluationCfg(**options)  # type: ignore[arg-type]
