from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bsafusion.about import NOT_CLINICAL
from bsafusion.evidence import Evidence
from bsafusion.image import Geometry, Image, Modality
from bsafusion.report import (
    MODES,
    Limits,
    _rounded,
    checkerboard,
    deformed_grid,
    describe_input,
    overview,
    told_share,
    verdict,
)

GOOD = Evidence(
    similarity_before=0.5,
    similarity_after=0.6,
    expected_error=1.0,
    displacement_mean=3.0,
    displacement_max=12.0,
    folded_share=0.0,
    outside_share=0.0,
)
SIDE = 256
RED, GREEN = (255, 120, 90), (140, 205, 150)


# --- the verdict ---


def test_good_evidence_is_ok() -> None:
    assert verdict(GOOD, SIDE) == ("ok", [])


def test_a_preset_without_its_own_evidence_can_be_ok() -> None:
    bare = replace(GOOD, similarity_before=None, similarity_after=None, expected_error=None)
    assert verdict(bare, SIDE) == ("ok", [])


@pytest.mark.parametrize(
    ("name", "trusted", "suspect", "said"),
    [
        ("expected_error", 4.0, 4.06, "off by 4.1 px on average; at most 4.0 px is trusted"),
        ("displacement_max", 90.0, 91.0, "the field reaches 91 px; up to 90 px was trained for"),
        ("folded_share", 1e-3, 1.2e-3, "the field folds in 0.12% of the pixels"),
        ("outside_share", 0.25, 0.3, "30% of the head lies outside the moving image"),
    ],
)
def test_each_limit_from_both_sides(name: str, trusted: float, suspect: float, said: str) -> None:
    assert verdict(replace(GOOD, **{name: trusted}), SIDE) == ("ok", [])
    status, reasons = verdict(replace(GOOD, **{name: suspect}), SIDE)
    assert status == "suspect"
    assert len(reasons) == 1
    assert said in reasons[0]


def test_similarity_below_its_limit_is_suspect() -> None:
    assert verdict(replace(GOOD, similarity_before=-0.2, similarity_after=0.35), SIDE)[0] == "ok"
    status, reasons = verdict(replace(GOOD, similarity_before=-0.2, similarity_after=0.34), SIDE)
    assert status == "suspect"
    assert reasons == [
        "the aligned images have a descriptor similarity of 0.340; at least 0.350 is expected of images of one head"
    ]


def test_an_alignment_that_made_it_worse_is_suspect() -> None:
    assert verdict(replace(GOOD, similarity_before=0.61, similarity_after=0.6), SIDE)[0] == "ok"
    status, reasons = verdict(replace(GOOD, similarity_before=0.7, similarity_after=0.6), SIDE)
    assert status == "suspect"
    assert reasons == ["alignment lowered the descriptor similarity from 0.700 to 0.600"]


def test_images_as_given_are_judged_where_nothing_was_aligned() -> None:
    skipped = replace(GOOD, similarity_after=None, expected_error=None)
    assert verdict(skipped, SIDE) == ("ok", [])
    status, reasons = verdict(replace(skipped, similarity_before=0.2), SIDE)
    assert status == "suspect"
    assert reasons == [
        "the images as given have a descriptor similarity of 0.200; at least 0.350 is expected of images of one head"
    ]


def test_every_reason_is_given() -> None:
    bad = Evidence(0.9, -0.5, 50.0, 60.0, 200.0, 0.5, 0.9)
    status, reasons = verdict(bad, SIDE)
    assert status == "suspect"
    assert len(reasons) == 6


def test_half_a_head_out_of_view_is_not_to_be_believed_whatever_its_probability() -> None:
    assert verdict(replace(GOOD, cut_share=0.4), SIDE) == ("ok", [])
    assert verdict(replace(GOOD, cut_share=0.5), SIDE) == (
        "suspect",
        [
            "the moving image ends at a straight line, beyond which 50.0% of the head lies; "
            "at most 44% may be out of view"
        ],
    )


@pytest.mark.parametrize(
    ("moving", "advice"),
    [
        (Modality.MRI, "swap the images"),
        (Modality.UNKNOWN, "swap the images"),
        (Modality.PET, "it was not trained to align PET with CT"),
    ],
)
def test_swapping_is_advised_only_where_it_helps(moving: Modality, advice: str) -> None:
    reason = f"the fixed image is a CT by its file; the network knows MRI there: {advice}"
    assert verdict(GOOD, SIDE, fixed=Modality.CT, moving=moving) == ("suspect", [reason])


def test_a_report_has_five_digits_after_the_point_and_no_share_that_counts_is_none() -> None:
    assert [_rounded("displacement_mean", v) for v in (12.3456789, 1e-6)] == [12.34568, 0.0]
    assert [_rounded("folded_share", v) for v in (0.1234567, 1.26e-6, 0.0)] == [0.12346, 1e-6, 0.0]


def test_a_small_share_is_not_told_as_none() -> None:
    assert [told_share(share, 2) for share in (0.0, 1e-6, 0.0002)] == ["0.00%", "less than 0.01%", "0.02%"]


def test_other_limits_are_obeyed() -> None:
    assert verdict(GOOD, SIDE, Limits(displacement_max=11 / SIDE))[0] == "suspect"
    assert verdict(replace(GOOD, folded_share=0.5), SIDE, Limits(folded_share=0.6))[0] == "ok"


@given(
    error=st.floats(0, 20),
    reach=st.floats(0, 300),
    size=st.sampled_from([32, 64, 512, 1024, 2048]),
)
def test_lengths_are_judged_by_the_size_of_the_image(error: float, reach: float, size: int) -> None:
    evidence = replace(GOOD, expected_error=error, displacement_max=reach)
    factor = size / SIDE  # a power of two: no rounding
    larger = replace(GOOD, expected_error=error * factor, displacement_max=reach * factor)
    assert verdict(evidence, SIDE)[0] == verdict(larger, size)[0]


# --- what is said of an input ---


def test_an_input_is_described_without_its_folder() -> None:
    geometry = Geometry((32, 48), (0.5, 2.0), (1.0, 2.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")
    array = np.arange(32 * 48, dtype=np.float32).reshape(1, 32, 48)
    image = Image(array, geometry, Modality.CT, "int16", "slice.dcm", "ab12", {"format": "DICOM"})
    assert describe_input(image) == {
        "file": "slice.dcm",
        "sha256": "ab12",
        "modality": "ct",
        "size": [48, 32],
        "channels": 1,
        "pixel_type": "int16",
        "spacing_mm": [0.5, 2.0],
        "plane": "axial",
        "notes": {"format": "DICOM"},
    }


def test_a_picture_has_no_millimetres() -> None:
    array = np.arange(32 * 32, dtype=np.float32).reshape(1, 32, 32)
    assert describe_input(Image(array, Geometry.picture((32, 32))))["spacing_mm"] is None


# --- pictures ---


def flat(value: float, shape: tuple[int, int] = (40, 40)) -> NDArray[np.float32]:
    return np.full((3, *shape), value, dtype=np.float32)


def test_checkerboard_alternates_and_starts_with_the_first() -> None:
    board = checkerboard(flat(0.0), flat(1.0), squares=4)[0]
    assert board[0, 0] == 0
    assert board[0, 9] == 0
    assert board[0, 10] == 1
    assert board[10, 10] == 0
    assert board[10, 0] == 1
    assert board.mean() == 0.5


def test_checkerboard_has_square_squares_on_a_long_image() -> None:
    board = checkerboard(flat(0.0, (16, 80)), flat(1.0, (16, 80)))[0]
    assert (np.flatnonzero(np.diff(board[0])) == np.arange(1, 79, 2)).all()
    assert (np.flatnonzero(np.diff(board[:, 0])) == np.arange(1, 15, 2)).all()


def test_deformed_grid_without_a_field_is_regular() -> None:
    grid = deformed_grid(torch.zeros(2, 48, 64), spacing=16)
    assert grid.shape == (3, 48, 64)
    assert np.flatnonzero(grid[0, 5] > 0.01).tolist() == [0, 16, 32, 48]
    assert np.flatnonzero(grid[0, :, 5] > 0.01).tolist() == [0, 16, 32]
    assert grid.max() == pytest.approx(1.0)


def test_deformed_grid_moves_its_lines_against_the_pull_back() -> None:
    field = torch.zeros(2, 48, 64)
    field[1] = 3.0  # looks three pixels further right, so that lines appear three further left
    row = deformed_grid(field, spacing=16)[0, 5]
    assert np.flatnonzero(row > 0.01).tolist() == [13, 29, 45]  # and nothing where it looks beyond the frame


def sheet(status: str, reasons: list[str], shape: tuple[int, int] = (256, 256)) -> NDArray[np.uint8]:
    names = ["a", "b", "c", "d", "e", "f"]
    panels = [(name, flat(0.1 * (index + 1), shape)) for index, name in enumerate(names)]
    return np.asarray(overview(panels, status, reasons))


def has(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(axis=-1).any())


def test_overview_has_two_rows_of_three_at_a_fixed_width() -> None:
    picture = sheet("ok", [])
    gap, line = 8, 18
    assert picture.shape == (2 * (320 + line + gap) + gap + 2 * line, 3 * 320 + 4 * gap, 3)
    for index in range(6):
        x, y = gap + (index % 3) * (320 + gap), gap + (index // 3) * (320 + line + gap) + line
        cell = picture[y : y + 320, x : x + 320]
        assert (cell == round(25.5 * (index + 1))).all()
        assert np.ptp(picture[y - line : y, x : x + 40]) > 100  # its name


@pytest.mark.parametrize("shape", [(32, 32), (2048, 1024), (33, 257), (257, 33)])
def test_overview_keeps_proportions(shape: tuple[int, int]) -> None:
    picture = sheet("ok", [], shape)
    cell = (picture == round(25.5)).all(axis=-1)
    rows, columns = np.flatnonzero(cell.any(axis=1)), np.flatnonzero(cell.any(axis=0))
    assert max(len(rows), len(columns)) == 320
    assert len(rows) / len(columns) == pytest.approx(shape[0] / shape[1], rel=0.02)


def test_overview_says_ok_in_green_and_suspect_in_red() -> None:
    good, bad = sheet("ok", []), sheet("suspect", ["the field folds"])
    assert has(good, GREEN)
    assert not has(good, RED)
    assert has(bad, RED)
    assert not has(bad, GREEN)


def test_a_long_reason_is_wrapped_and_not_cut_off() -> None:
    short, long = sheet("suspect", ["a few words"]), sheet("suspect", ["a few words"] * 2 + [" ".join(["word"] * 80)])
    assert long.shape[0] > short.shape[0] + 2 * 18
    assert not (long[:, -8:] == np.array(RED)).all(axis=-1).any()


@pytest.mark.parametrize("mode", ["fuse only", "align only"])
def test_overview_says_what_was_left_out(mode: str) -> None:
    panels = [(name, flat(0.5)) for name in "abcd"]
    usual, other = overview(panels, "ok", []), overview(panels, "ok", [], mode=mode)
    assert other.height == usual.height + 18
    assert MODES["align and fuse"] == ""
    assert MODES[mode]


def test_narrow_pictures_leave_room_for_the_names() -> None:
    panels = [("checkerboard of fixed and aligned", flat(0.5, (257, 33)))] * 6
    assert overview(panels, "ok", []).width > 3 * 180


def test_the_disclaimer_is_the_one_that_is_asked_for() -> None:
    assert NOT_CLINICAL == "Research use only. Not for clinical use."
