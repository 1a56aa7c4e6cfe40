"""Scores of files against the metrics of their arrays, tables against values known by hand."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from bsafusion.cli import app
from bsafusion.image import Geometry, Image, ImageError
from bsafusion.io import read_image, write_image
from bsafusion.metrics import ALL_METRICS, PAPER_METRICS, fusion_metrics
from bsafusion.scoring import (
    EIGHT_BIT,
    SIXTEEN_BIT,
    STRETCHED,
    MetricSummary,
    Row,
    RowScore,
    Score,
    ScoringCfg,
    ScoringError,
    grey_levels,
    match_folders,
    read_table,
    score_one,
    score_table,
    summarise_scores,
)
from pairs import hot, pixels_of, scan, write_picture, write_volume

Array = NDArray[np.float64]
SHAPE = (64, 72)


def triple(folder: Path, seed: int = 0) -> tuple[Path, Path, Path]:
    """Grey fixed, moving and fused pictures in a folder."""
    fixed, moving = scan(SHAPE, seed=seed), scan(SHAPE, seed=seed + 100)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"fixed": fixed, "moving": moving, "fused": np.maximum(fixed, moving)}
    paths = [write_picture(folder / f"{role}.png", pixels) for role, pixels in pictures.items()]
    return paths[0], paths[1], paths[2]


def expected(paths: tuple[Path, ...], names: tuple[str, ...] = PAPER_METRICS) -> dict[str, float]:
    """From the pixels as Pillow reads them."""
    return fusion_metrics(*(pixels_of(path) for path in paths), names)


def write_table(path: Path, lines: list[str], header: str = "id,fixed,moving,fused,task") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["metrics", *map(str, arguments)])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


# --- grey levels ------------------------------------------------------------------------------


def test_eight_bit_pictures_stay_as_they_are(tmp_path: Path) -> None:
    pixels = scan(SHAPE) // 2  # the brightest is 127: nothing is stretched
    levels, rule = grey_levels(read_image(write_picture(tmp_path / "a.png", pixels)))
    assert rule == EIGHT_BIT
    np.testing.assert_array_equal(levels, pixels)


def test_sixteen_bits_are_the_same_picture_as_eight(tmp_path: Path) -> None:
    pixels = scan(SHAPE) // 2
    write_picture(tmp_path / "a.png", pixels.astype(np.uint16) * 257)
    levels, rule = grey_levels(read_image(tmp_path / "a.png"))
    assert rule == SIXTEEN_BIT
    np.testing.assert_array_equal(levels, pixels)


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    colour = np.zeros((3, *SHAPE), dtype=np.uint16)
    colour[0] = 65535  # red; luma 0.299 * 65535 = 19594.965
    colour[1, :10] = 65535
    write_image(tmp_path / "a.png", colour, value_range=(0, 65535), dtype="uint16")
    levels, rule = grey_levels(read_image(tmp_path / "a.png"))
    assert rule == SIXTEEN_BIT
    assert np.unique(levels).tolist() == [19595 / 257, round(0.886 * 65535) / 257]


def test_colour_becomes_whole_levels_of_luma(tmp_path: Path) -> None:
    colours = {(255, 0, 0): 76, (0, 255, 0): 150, (0, 0, 255): 29, (10, 20, 30): 18, (200, 100, 50): 124}
    halves = {(0, 0, 250): 28, (0, 250, 0): 147, (1, 1, 251): 30}  # 28.5, 146.75, 29.5
    pixels = np.zeros((*SHAPE, 3), dtype=np.uint8)
    for row, colour in enumerate([*colours, *halves]):
        pixels[row] = colour
    levels, rule = grey_levels(read_image(write_picture(tmp_path / "a.png", pixels)))
    assert rule == EIGHT_BIT
    assert levels[:9, 0].tolist() == [*colours.values(), *halves.values(), 0]


@given(st.integers(0, 2**32 - 1))
def test_luma_of_random_colours_against_decimal_arithmetic(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 32, 33))
    levels, _ = grey_levels(Image(pixels, Geometry.picture((32, 33)), dtype="uint8"))
    thousandths = 299 * pixels[0] + 587 * pixels[1] + 114 * pixels[2]
    whole, rest = np.divmod(thousandths, 1000)
    np.testing.assert_array_equal(levels, whole + ((rest > 500) | ((rest == 500) & (whole % 2 == 1))))


@pytest.mark.parametrize("form", ["nifti", "float tiff", "16-bit DICOM"])
def test_scans_are_stretched_between_their_percentiles_and_clipped(tmp_path: Path, form: str) -> None:
    values = np.linspace(-1000, 1000, 64 * 72).reshape(SHAPE).astype(np.float32)
    values[0, 0] = 1e6  # one voxel far off must not set the scale
    if form == "nifti":
        image = read_image(write_volume(tmp_path / "a.nii.gz", values.T[..., None], np.diag([1.0, 1.0, 2.0, 1.0])))
    elif form == "float tiff":
        image = read_image(write_picture(tmp_path / "a.tif", values))
    else:  # Hounsfield units in a file without spacing
        image = Image(values[None], Geometry.picture(SHAPE), dtype="uint16", meta={"format": "DICOM"})
    levels, rule = grey_levels(image)
    low, high = np.percentile(values[values > values.min()], [0.1, 99.9])
    assert rule == STRETCHED
    assert (levels.min(), levels.max(), levels[0, 0]) == (0, 255, 255)
    inside = (values > low) & (values < high)
    np.testing.assert_allclose(levels[inside], ((values - low) / (high - low) * 255)[inside], atol=1e-3)


# --- one triple -------------------------------------------------------------------------------


def test_files_score_as_their_arrays(tmp_path: Path) -> None:
    paths = triple(tmp_path)
    score = score_one(*paths)
    assert score.values == expected(paths)
    assert score.scaling == dict.fromkeys(("fixed", "moving", "fused"), EIGHT_BIT)
    assert score_one(*map(read_image, paths)) == score
    every = score_one(*paths, ScoringCfg(ALL_METRICS)).values
    assert tuple(every) == ALL_METRICS
    assert every == expected(paths, ALL_METRICS)


def test_a_colour_image_scores_as_its_luma(tmp_path: Path) -> None:
    fixed, moving, fused = triple(tmp_path)
    colour = write_picture(tmp_path / "colour.png", hot(scan(SHAPE, seed=7)))
    grey = np.rint(pixels_of(colour).astype(np.int64) @ [299, 587, 114] / 1000).astype(np.uint8)
    luma = write_picture(tmp_path / "luma.png", grey)
    assert score_one(fixed, colour, fused) == score_one(fixed, luma, fused)
    assert score_one(fixed, moving, colour) == score_one(fixed, moving, luma)
    assert score_one(fixed, colour, fused).values != score_one(fixed, moving, fused).values


def test_the_roles_are_not_mixed_up(tmp_path: Path) -> None:
    fixed, moving, fused = triple(tmp_path)
    assert score_one(fixed, moving, fused).values["viff"] != score_one(fixed, fused, moving).values["viff"]
    noisy = write_picture(tmp_path / "noise.png", np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8))
    assert score_one(fixed, moving, noisy, ScoringCfg(("en",))).values["en"] > 7.5


def test_one_size_is_demanded_and_the_odd_one_named(tmp_path: Path) -> None:
    fixed, moving, fused = triple(tmp_path)
    small = write_picture(tmp_path / "small.png", scan((50, 60)))
    with pytest.raises(
        ScoringError, match=r"moving image small.png is 60 x 50 pixels, fixed image fixed.png 72 x 64; .* fixed grid"
    ):
        score_one(fixed, small, fused)
    with pytest.raises(ScoringError, match=r"fused image small.png is 60 x 50 .* resample it"):
        score_one(fixed, moving, small)
    with pytest.raises(ImageError, match=r"moving image: no.png: no such file"):
        score_one(fixed, tmp_path / "no.png", fused)


def test_scans_of_one_size_in_different_places_are_refused(tmp_path: Path) -> None:
    values = scan(SHAPE).T[..., None].astype(np.float32)
    here = np.diag([-1.0, -1.0, 1.0, 1.0])
    elsewhere, mirrored = here.copy(), np.diag([1.0, -1.0, 1.0, 1.0])
    elsewhere[0, 3] = 5
    fixed = write_volume(tmp_path / "fixed.nii.gz", values, here)
    fused = write_volume(tmp_path / "fused.nii.gz", values[:, ::-1], here)
    for affine in (elsewhere, mirrored):
        moving = write_volume(tmp_path / "moving.nii.gz", values, affine)
        with pytest.raises(ScoringError, match=r"moving image moving.nii.gz .* lie in different places"):
            score_one(fixed, moving, fused)
    picture = write_picture(tmp_path / "moving.png", scan(SHAPE))  # a picture states no place
    assert score_one(fixed, picture, fused).scaling == {"fixed": STRETCHED, "moving": EIGHT_BIT, "fused": STRETCHED}


def test_slices_of_one_plane_that_lie_apart_are_refused(tmp_path: Path) -> None:
    volume = write_volume(
        tmp_path / "v.nii.gz", np.stack([scan(SHAPE, seed=k).T for k in range(3)], axis=-1), np.diag([-1.0, -1, 3, 1])
    )
    with pytest.raises(ScoringError, match=r"moving image v.nii.gz and fixed image .*\(6 mm apart, across"):
        score_one(volume, volume, volume, slices={"fixed": 0, "moving": 2, "fused": 0})
    picture = write_picture(tmp_path / "fixed.png", scan(SHAPE))
    with pytest.raises(ScoringError, match=r"fused image v.nii.gz and moving image .*\(3 mm apart"):
        score_one(picture, volume, volume, slices={"moving": 1, "fused": 0})
    assert score_one(picture, volume, volume, slices={"moving": 1, "fused": 1}).values


def test_slices_go_to_their_roles(tmp_path: Path) -> None:
    fixed, moving, _ = triple(tmp_path)
    volume = np.stack([scan(SHAPE, seed=seed).T for seed in (3, 4)], axis=-1)
    path = write_volume(tmp_path / "fused.nii.gz", volume, np.eye(4))
    alone = write_volume(tmp_path / "alone.nii.gz", volume[..., 1:], np.eye(4))
    assert score_one(fixed, moving, path, slices={"fused": 1}).values == score_one(fixed, moving, alone).values
    result = invoke(fixed, moving, path, "--fused-slice", 1, "--json")
    assert json.loads(result.stdout)["qs"] == score_one(fixed, moving, alone).values["qs"]
    with pytest.raises(ImageError, match=r"fused image: fused.nii.gz: 3-D volume"):
        score_one(fixed, moving, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("qabf", "vif")}, "no metric is called 'vif'; choose from qabf"),
        ({"names": ()}, "no metric is called an empty list"),
        ({"names": ("qabf", "qabf")}, "expected each one once"),
        ({"reference": "own"}, "unknown reference 'own'; expected truth or aligned"),
    ],
)
def test_settings_are_valid_once_constructed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        ScoringCfg(**options)


# --- tables and folders -----------------------------------------------------------------------


def test_a_table_is_relative_to_itself(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "in" / "t.csv",
        ["b, f.png ,m.png,/abs/u.png,CT-MRI", "a,f,m,u,", "c,f,m,u"],
        "\ufeffid, fixed,moving,fused,task",
    )
    folder = tmp_path / "in"
    assert read_table(path) == [
        Row("b", folder / "f.png", folder / "m.png", Path("/abs/u.png"), "CT-MRI"),
        Row("a", folder / "f", folder / "m", folder / "u"),
        Row("c", folder / "f", folder / "m", folder / "u"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,fixed,moving\na,b,c\n", r"no column fused \(found: id, fixed, moving\)"),
        ("", r"no column id, fixed, moving, fused \(found: none\)"),
        ("id,fixed,moving,fused\n", "no rows below the header"),
        ("id,fixed,moving,fused\na,b,,d\n", "line 2: moving is empty"),
        ("id,fixed,moving,fused\n,b,c\n", "line 2: id, fused is empty"),
        ("id,fixed,moving,fused\na,b,c,d\na,b,c,d\n", "line 3: id 'a' stands twice"),
        ("id,fixed,moving,fused,task\na,b,c,d,all\n", "a task is called 'all'"),
        (b"\x89PNG\r\n\x1a\n\xff\xff", "not a CSV in UTF-8"),
        ("id,fixed,moving,fused\na,b,c,d,e\n", "line 2: 5 cells for 4 columns"),
        ("id\tfixed\tmoving\tfused\na\tb\tc\td\n", "separated by tabs, expected commas"),
    ],
)
def test_a_malformed_table_exits_2_with_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ScoringError, match=message):
        read_table(path)
    result = invoke(path, "-o", tmp_path / "out")
    assert_one_line(result, 2)
    assert not (tmp_path / "out").exists()


def assert_one_line(result: Result, code: int) -> None:
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("bsafusion: ")
    assert result.stderr.count("\n") == 1
    assert ";" in result.stderr  # what came and what was expected; what to try


def test_folders_are_matched_by_name(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("mri", "ct", "fused")]
    suffixes = [(".png", ".nii.gz", ""), (".jpg", ".PNG", ".dcm"), (".tif", ".nii", ".png")]
    for folder, endings in zip(folders, suffixes, strict=True):
        folder.mkdir()
        for stem, ending in zip(("case.10", "b", "IM0001"), endings, strict=True):
            (folder / f"{stem}{ending}").touch()
        (folder / ".hidden.png").touch()
        (folder / "notes.txt").touch()
        (folder / "sub.png").mkdir()
    mri, ct, fused = folders
    assert match_folders(mri, ct, fused) == [
        Row("IM0001", mri / "IM0001", ct / "IM0001.dcm", fused / "IM0001.png"),
        Row("b", mri / "b.nii.gz", ct / "b.PNG", fused / "b.nii"),
        Row("case.10", mri / "case.10.png", ct / "case.10.jpg", fused / "case.10.tif"),
    ]
    (ct / "b.png").touch()
    with pytest.raises(ScoringError, match=r"b.PNG and b.png have one name"):
        match_folders(mri, ct, fused)


@pytest.mark.parametrize("where", ["mri", "ct", "fused"])
def test_a_missing_partner_is_named(tmp_path: Path, where: str) -> None:
    for name in ("mri", "ct", "fused"):
        (tmp_path / name).mkdir()
        for stem in ("a", "b", "c"):
            if (name, stem) not in ((where, "b"), (where, "c")):
                (tmp_path / name / f"{stem}.png").touch()
    folders = [tmp_path / name for name in ("mri", "ct", "fused")]
    with pytest.raises(ScoringError, match=rf"{where}: no image 'b' and 1 more"):
        match_folders(*folders)
    assert_one_line(invoke(*folders, "-o", tmp_path / "out"), 2)


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="no images"):
        match_folders(tmp_path, tmp_path, tmp_path)


def test_a_bad_row_does_not_stop_the_rest(tmp_path: Path) -> None:
    paths = triple(tmp_path)
    small = write_picture(tmp_path / "small.png", scan((33, 35)))  # too small for the windows of VIF
    rows = [
        Row("gone", paths[0], tmp_path / "gone.png", paths[2], "A"),
        Row("small", small, small, small, "A"),
        Row("good", *paths, "A"),
    ]
    gone, too_small, good = score_table(rows)
    assert (gone.score, too_small.score) == (None, None)
    assert "gone.png: no such file" in gone.message
    assert "vif_sum needs images of at least 41 pixels" in too_small.message
    assert good == RowScore("good", "A", score_one(*paths))


# --- summary ----------------------------------------------------------------------------------


def row_scores(values: list[float], tasks: list[str] | None = None, name: str = "qabf") -> list[RowScore]:
    tasks = tasks or [""] * len(values)
    return [RowScore(str(i), task, Score({name: v}, {})) for i, (v, task) in enumerate(zip(values, tasks, strict=True))]


@pytest.mark.parametrize("count", [3, 7])
def test_a_constant_column_has_no_width(count: int) -> None:
    """Exactly, though three times 0.1 is a little more than 0.3."""
    assert summarise_scores(row_scores([0.1] * count)) == {"all": {"qabf": MetricSummary(count, 0.1, 0.1, 0.1, 0.1)}}


def test_means_and_medians_by_hand_and_by_task() -> None:
    scores = row_scores([1, 2, 6, 10, 5], ["b", "b", "b", "a", ""])
    scores.insert(2, RowScore("failed", "b", None, "gone"))
    found = {group: summary["qabf"] for group, summary in summarise_scores(scores).items()}
    assert list(found) == ["all", "b", "a"]
    assert {group: (of.n, of.mean, of.median) for group, of in found.items()} == {
        "all": (5, 4.8, 5),
        "b": (3, 3, 2),
        "a": (1, 10, 10),
    }
    assert (found["a"].low, found["a"].high) == (None, None)  # one image says nothing about the spread
    assert summarise_scores(scores[2:3]) == {}


def test_the_interval_of_two_images_is_known() -> None:
    # Of two draws from {0, 1} the mean is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    of = summarise_scores(row_scores([0, 1]))["all"]["qabf"]
    assert (of.low, of.mean, of.high) == (0, 0.5, 1)


def test_the_interval_is_that_of_the_normal_distribution_for_many_images() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    of = summarise_scores(row_scores(values.tolist()))["all"]["qabf"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert of.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert of.high == pytest.approx(values.mean() + half, abs=0.15 * half)


@settings(max_examples=25)
@given(st.lists(st.floats(-100, 5000), min_size=2, max_size=12))
def test_the_interval_holds_the_mean_is_repeatable_and_lies_in_the_range(values: list[float]) -> None:
    of = summarise_scores(row_scores(values))["all"]["qabf"]
    assert of == summarise_scores(row_scores(values))["all"]["qabf"]
    assert of.low is not None
    assert of.high is not None
    rounding = 1e-9 * max(1, *map(abs, values))
    assert min(values) - rounding <= of.low <= of.mean + rounding
    assert of.mean - rounding <= of.high <= max(values) + rounding


def test_the_metrics_of_an_image_are_drawn_together() -> None:
    values = [1.0, 5.0, 2.0, 9.0]
    scores = [RowScore(str(v), "", Score({"qabf": v, "qs": 10 - v}, {})) for v in values]
    found = summarise_scores(scores)["all"]
    assert found["qs"].low == pytest.approx(10 - found["qabf"].high)  # type: ignore[operator]


def test_an_infinite_value_is_no_number_in_json(tmp_path: Path) -> None:
    fixed, moving, fused = triple(tmp_path)
    assert json.loads(invoke(fixed, fixed, fixed, "--names", "psnr,qs", "--json").stdout)["psnr"] is None
    assert "inf" in invoke(fixed, fixed, fixed, "--names", "psnr").stdout
    table = write_table(tmp_path / "t.csv", ["a,fixed.png,fixed.png,fixed.png,", "b,fixed.png,moving.png,fused.png,"])
    assert invoke(table, "-o", tmp_path / "out", "--names", "psnr").exit_code == 0
    of = json.loads((tmp_path / "out" / "summary.json").read_text())["groups"]["all"]["psnr"]
    psnr = score_one(fixed, moving, fused, ScoringCfg(("psnr",))).values["psnr"]
    assert (of["mean"], of["median"], of["ci95"]) == (None, None, [psnr, None])
    assert [row["psnr"] for row in read_csv(tmp_path / "out" / "per_image.csv")] == ["inf", repr(psnr)]


# --- the command ------------------------------------------------------------------------------


def test_one_triple_as_json(tmp_path: Path) -> None:
    paths = triple(tmp_path)
    found = json.loads(invoke(*paths, "--json", "--reference", "aligned").stdout)
    assert found.pop("reference") == "aligned"
    assert found.pop("scaling") == dict.fromkeys(("fixed", "moving", "fused"), EIGHT_BIT)
    assert found == expected(paths)
    every = json.loads(invoke(*paths, "--json", "--all").stdout)
    assert {name: every[name] for name in ALL_METRICS} == expected(paths, ALL_METRICS)
    assert every["reference"] == "truth"


def test_one_triple_as_a_table(tmp_path: Path) -> None:
    paths = triple(tmp_path)
    result = invoke(*paths, "--names", "qcv, en")
    values = expected(paths, ("qcv", "en"))
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[:3]] == [
        ["qcv", f"{values['qcv']:.4f}", "lower", "is", "better"],
        ["en", f"{values['en']:.4f}", "higher", "is", "better"],
        ["reference:", "truth"],
    ]
    assert f"fused: {EIGHT_BIT}" in result.stdout


@pytest.mark.parametrize("mode", ["table", "folders"])
def test_many_images(tmp_path: Path, mode: str) -> None:
    roles = ("fixed", "moving", "fused")
    triples = {name: triple(tmp_path / name, seed) for seed, name in enumerate(("one", "two", "three"))}
    if mode == "table":
        tasks = {"one": "PET-MRI", "two": "CT-MRI", "three": "PET-MRI"}
        lines = [f"{name},{name}/fixed.png,{name}/moving.png,{name}/fused.png,{tasks[name]}" for name in triples]
        given: list[Path] = [write_table(tmp_path / "t.csv", lines)]
    else:
        tasks = dict.fromkeys(sorted(triples), "")
        given = [tmp_path / role for role in roles]
        for role in roles:
            (tmp_path / role).mkdir()
            for name in triples:
                (tmp_path / name / f"{role}.png").rename(tmp_path / role / f"{name}.png")
        triples = {name: tuple(tmp_path / role / f"{name}.png" for role in roles) for name in sorted(triples)}  # type: ignore[misc]
    out = tmp_path / "out" / "deep"
    result = invoke(*given, "-o", out, "--json", "--reference", "aligned")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["per_image.csv", "summary.csv", "summary.json"]

    values = {name: expected(paths) for name, paths in triples.items()}
    per_image = read_csv(out / "per_image.csv")
    assert [(row.pop("id"), row.pop("task")) for row in per_image] == list(tasks.items())
    assert [{name: float(value) for name, value in row.items()} for row in per_image] == list(values.values())

    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(result.stdout) == summary
    assert summary["bsafusion"]
    assert summary["settings"]["reference"] == "aligned"
    assert summary["settings"]["metrics"] == list(PAPER_METRICS)
    assert summary["scaling"] == {role: {EIGHT_BIT: 3} for role in roles}
    assert summary["failed"] == []
    groups = {"all": list(triples)}
    if mode == "table":
        groups |= {"PET-MRI": ["one", "three"], "CT-MRI": ["two"]}
    assert list(summary["groups"]) == list(groups)
    rows = {(row["task"], row["metric"]): row for row in read_csv(out / "summary.csv")}
    assert len(rows) == len(groups) * len(PAPER_METRICS)
    for group, members in groups.items():
        for name in PAPER_METRICS:
            column = [values[member][name] for member in members]
            of, row = summary["groups"][group][name], rows[group, name]
            assert (of["n"], of["better"]) == (len(members), "down" if name == "qcv" else "up")
            assert of["mean"] == pytest.approx(np.mean(column), rel=1e-12)
            assert of["median"] == pytest.approx(np.median(column), rel=1e-12)
            assert (row["n"], row["better"]) == (str(len(members)), of["better"])
            assert [float(row[key]) for key in ("mean", "median")] == [of["mean"], of["median"]]
            if len(members) == 1:
                assert (of["ci95"], row["ci95_low"], row["ci95_high"]) == (None, "", "")
            else:
                assert min(column) <= of["ci95"][0] <= of["mean"] <= of["ci95"][1] <= max(column)
                assert [float(row["ci95_low"]), float(row["ci95_high"])] == of["ci95"]


def test_without_a_folder_the_summary_is_printed(tmp_path: Path) -> None:
    triple(tmp_path)
    table = write_table(tmp_path / "t.csv", ["a,fixed.png,moving.png,fused.png,X"])
    result = invoke(table, "--names", "qcv")
    value = expected(tuple(tmp_path / f"{role}.png" for role in ("fixed", "moving", "fused")))["qcv"]
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["all:", "n", "=", "1,", "reference:", "truth"],
        ["qcv", "mean", f"{value:.4f}", "median", f"{value:.4f}", "lower", "is", "better"],
        ["X:", "n", "=", "1,", "reference:", "truth"],
        ["qcv", "mean", f"{value:.4f}", "median", f"{value:.4f}", "lower", "is", "better"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed.png", "fused.png", "moving.png", "t.csv"]


def test_a_failed_row_is_listed_and_exits_1_and_the_rest_is_written(tmp_path: Path) -> None:
    triple(tmp_path)
    line = "fixed.png,moving.png,fused.png,"
    table = write_table(tmp_path / "t.csv", [f"a,{line}", "b,fixed.png,gone.png,fused.png,", f"c,{line}"])
    result = invoke(table, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("failed: b: moving image: gone.png: no such file")
    assert result.stderr.count("\n") == 1
    assert [row["id"] for row in read_csv(tmp_path / "out" / "per_image.csv")] == ["a", "c"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["groups"]["all"]["qs"]["n"] == 2
    assert [failed["id"] for failed in summary["failed"]] == ["b"]


def test_nothing_but_failed_rows(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", ["a,f.png,m.png,u.png,"])
    result = invoke(table, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["groups"] == {}


def test_earlier_tables_are_not_lost(tmp_path: Path) -> None:
    paths = triple(tmp_path)
    out = tmp_path / "out"
    assert invoke(*paths, "-o", out, "--names", "qs").exit_code == 0
    before = (out / "summary.json").read_bytes()
    result = invoke(*paths, "-o", out)
    assert_one_line(result, 2)
    assert "--overwrite" in result.stderr
    assert (out / "summary.json").read_bytes() == before
    assert invoke(*paths, "-o", out, "--overwrite").exit_code == 0
    assert list(json.loads((out / "summary.json").read_text())["groups"]["all"]) == list(PAPER_METRICS)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert invoke(*paths, "-o", out, "--overwrite").exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_a_full_disk_leaves_no_table_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bsafusion.scoring.write_json", full)
    result = invoke(*triple(tmp_path), "-o", tmp_path / "out", "--names", "qs")
    assert (result.exit_code, result.stderr) == (1, "bsafusion: [Errno 28] No space left on device\n")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        lambda fixed, moving, fused: (fixed, moving),
        lambda fixed, moving, fused: (fixed, moving, fused, fused),
        lambda fixed, moving, fused: (fixed.parent, moving, fused),
        lambda fixed, moving, fused: (fixed.parent,),
        lambda fixed, moving, fused: (fixed.parent / "no.csv",),
        lambda fixed, moving, fused: (fixed, moving, fused.parent / "no.png"),
        lambda fixed, moving, fused: (fixed, moving, fused, "--names", "vif"),
        lambda fixed, moving, fused: (fixed, moving, fused, "--names", ""),
        lambda fixed, moving, fused: (fixed, moving, fused, "--names", "qs", "--all"),
        lambda fixed, moving, fused: (fixed, moving, fused, "--reference", "own"),
        lambda fixed, moving, fused: (fixed, moving, fused, "--fused-slice", 3),
        lambda fixed, moving, fused: (fixed, moving, fused, "-o", fixed),
    ],
)
def test_a_wrong_request_exits_2_with_one_line(tmp_path: Path, arguments: Callable[..., tuple[object, ...]]) -> None:
    assert_one_line(invoke(*arguments(*triple(tmp_path))), 2)


# --- reference values -------------------------------------------------------------------------


@pytest.mark.skipif(
    not {"BSAFUSION_ATLAS", "BSAFUSION_GOLDEN"} <= os.environ.keys(),
    reason="set BSAFUSION_ATLAS (folder of pairs.csv) and BSAFUSION_GOLDEN (csv of reference values)",
)
def test_the_command_reproduces_an_independent_implementation(tmp_path: Path) -> None:
    atlas = Path(os.environ["BSAFUSION_ATLAS"])
    pairs = {(row["task"], row["slice"]): row for row in read_csv(atlas / "pairs.csv")}
    golden: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in read_csv(Path(os.environ["BSAFUSION_GOLDEN"])):
        if row["fused"] == "max":
            golden[row["task"], row["slice"]][row["metric"]] = float(row["value"])
    assert len(golden) >= 3
    lines = []
    for task, slice_ in golden:
        paths = [atlas / pairs[task, slice_][role] for role in ("fixed", "moving")]
        grey = [pixels_of(path).astype(np.float64) for path in paths]
        grey = [np.round(pixels @ [0.299, 0.587, 0.114]) if pixels.ndim == 3 else pixels for pixels in grey]
        fused = write_picture(tmp_path / f"{task}-{slice_}.png", np.maximum(*grey).astype(np.uint8))
        lines.append(f"{task}-{slice_},{paths[0]},{paths[1]},{fused.name},{task}")
    out = tmp_path / "out"
    assert invoke(write_table(tmp_path / "t.csv", lines), "-o", out, "--all").exit_code == 0
    found = {row["id"]: row for row in read_csv(out / "per_image.csv")}
    for (task, slice_), values in golden.items():
        row = found[f"{task}-{slice_}"]
        assert {name: float(row[name]) for name in values} == pytest.approx(values, rel=1e-6)
