"""Pairs, drawn deformations and batches, with synthetic scans."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from bsafusion import datasets
from bsafusion.colour import split_colour
from bsafusion.datasets import (
    MISALIGNMENTS,
    DatasetError,
    Misalignment,
    Mix,
    Pair,
    PairSet,
    blur,
    crop_batch,
    cut_view,
    draw_batch,
    read_pairs,
    remap_contrast,
    shade,
    smooth_noise,
    strip_head,
    validation_batch,
    without_faint,
)
from bsafusion.deformation import identity_grid, jacobian_determinant, warp
from bsafusion.image import Geometry
from bsafusion.io import write_image
from bsafusion.models.representation import MODALITIES
from pairs import scan

CPU = torch.device("cpu")
SIDE = 65


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def train(pairs_csv: Path) -> PairSet:
    return PairSet(read_pairs(pairs_csv, split="train"), side=SIDE)


# --- the frames of a pair ---


def scan_file(path: Path, shape: tuple[int, int], spacing: float, origin: tuple[float, float]) -> Path:
    picture = scan(shape).astype(np.float32)
    grid = Geometry(shape, (spacing, spacing), origin, ((1.0, 0.0), (0.0, 1.0)), plane="axial")
    write_image(path, picture[None], geometry=grid)
    return path


@pytest.mark.parametrize(
    ("shape", "spacing", "origin", "fits"),
    [
        ((64, 64), 1.0, (0.0, 0.0), True),
        ((128, 128), 0.5, (-0.25, -0.25), True),  # the same frame, finer
        ((64, 64), 1.0, (20.0, 0.0), False),
        ((32, 32), 1.0, (16.0, 16.0), False),  # the middle of it
        ((64, 64), 1.0, (500.0, 0.0), False),
    ],
)
def test_the_files_of_a_pair_must_show_one_frame(
    tmp_path: Path, shape: tuple[int, int], spacing: float, origin: tuple[float, float], fits: bool
) -> None:
    fixed = scan_file(tmp_path / "mri.nii.gz", (64, 64), 1.0, (0.0, 0.0))
    moving = scan_file(tmp_path / "pet.nii.gz", shape, spacing, origin)
    pair = Pair("1", "pet-mri", fixed, moving, "train", "a")
    if fits:
        assert len(PairSet([pair], side=SIDE)) == 1
        return
    with pytest.raises(DatasetError, match=r"pet-mri 1: .*mri\.nii\.gz and pet\.nii\.gz do not show the same frame"):
        PairSet([pair], side=SIDE)


def test_slices_of_a_pair_that_lie_apart_are_refused(tmp_path: Path) -> None:
    files = []
    for name, level in (("mri.nii.gz", 0.0), ("pet.nii.gz", 50.0)):
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        affine[2, 3] = level
        nib.save(nib.Nifti1Image(scan((64, 64)).T[..., None].astype(np.float32), affine), tmp_path / name)  # type: ignore[no-untyped-call]
        files.append(tmp_path / name)
    with pytest.raises(DatasetError, match=r"pet-mri 1: .* up to 50 mm apart, across them; expected one slice"):
        PairSet([Pair("1", "pet-mri", *files, "train", "a")], side=SIDE)


@pytest.mark.parametrize("moving_has_place", [True, False])
def test_pairs_are_seen_upright_however_files_store_them(tmp_path: Path, moving_has_place: bool) -> None:
    ramp = np.linspace(0.2, 1, 40)[:, None]  # brighter below
    upright, other = (ramp * scan((40, 64), seed=seed) for seed in (0, 1))
    from_below = np.diag([-1.0, 1.0, 1.0, 1.0])  # LAS: rows grow to the front
    nib.save(nib.Nifti1Image(upright[::-1].T[..., None].astype(np.float32), from_below), tmp_path / "mri.nii.gz")  # type: ignore[no-untyped-call]
    if moving_has_place:
        moving = tmp_path / "pet.nii.gz"
        nib.save(nib.Nifti1Image(other[::-1].T[..., None].astype(np.float32), from_below), moving)  # type: ignore[no-untyped-call]
    else:
        moving = tmp_path / "pet.png"
        write_image(moving, other[None, ::-1].astype(np.float32), dtype="uint8", value_range=(0, 255))
    stored = PairSet([Pair("1", "pet-mri", tmp_path / "mri.nii.gz", moving, "train", "a")], side=64)
    for images, expected in ((stored.fixed, upright), (stored.moving, other)):
        found = images[0, 0, 12:52].double()
        assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.99
        assert np.corrcoef(found.flip(0).flatten(), expected.flatten())[0, 1] < 0.9


def test_what_lies_beyond_the_range_of_a_scan_is_black_or_white(tmp_path: Path) -> None:
    files, grid = [], Geometry((SIDE, SIDE), (1.0, 1.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")
    for name, depth in (("mri.nii.gz", 0.0), ("ct.nii.gz", -5000.0)):
        values = np.where(scan((SIDE, SIDE)) > 0, 100.0 + scan((SIDE, SIDE)), depth).astype(np.float32)
        values[30, 20:22] = 4000
        write_image(tmp_path / name, values[None], geometry=grid)
        files.append(tmp_path / name)
    data = PairSet([Pair("1", "ct-mri", *files, "train", "a")], side=SIDE)
    for images in (data.fixed, data.moving):
        assert images[0, 0, 30, 20:22].tolist() == [255, 255]
        assert images[0, 0, 0, 0] == 0


# --- the CSV --------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_pairs_are_read_as_written(pairs_csv: Path) -> None:
    everything = read_pairs(pairs_csv)
    assert Counter(p.split for p in everything) == {"train": 6, "val": 2}
    assert [p.id for p in read_pairs(pairs_csv, split="val")] == ["6", "7"]
    first = everything[0]
    assert (first.task, first.case) == ("ct-mri", "case0")
    assert first.fixed == pairs_csv.parent / "0-mri.png"
    assert first.moving == pairs_csv.parent / "0-ct.png"


def test_optional_columns_have_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "\ufefftask,fixed,moving\nCT-MRI,a.png,/elsewhere/b.png\nspect-mri,c.png,d.png\n")
    first, second = read_pairs(path)
    assert (first.id, first.task, first.split, first.case) == ("2", "ct-mri", "train", "")
    assert first.moving == Path("/elsewhere/b.png")
    assert second.id == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,fixed\nct-mri,a.png\n", "no column moving .*found: task, fixed"),
        ("", "no column task, fixed, moving .*found: none"),
        ("task,fixed,moving\nxray-mri,a,b\n", "line 2: unknown task 'xray-mri'; expected ct-mri, pet-mri, spect-mri"),
        ("task,fixed,moving\nct-mri,a,b\n", "no pairs in split 'val'"),
        ("task,fixed,moving\n", "no pairs in split 'val'"),
        ("task,fixed,moving\nct-mri,a, \n", "line 2: task, fixed or moving is empty"),
        ("task,fixed,moving\nct-mri,a,b,c\n", "line 2: 4 cells for 3 columns"),
        ("task;fixed;moving\nct-mri;a;b\n", "separated by semicolons, expected commas"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        read_pairs(write(tmp_path / "p.csv", text), split="val")


def test_spaces_around_cells_and_names_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "task , fixed ,moving, split\nct-mri , a.png , b.png , val \n")
    assert read_pairs(path) == [Pair("2", "ct-mri", tmp_path / "a.png", tmp_path / "b.png", "val", "")]


def test_a_csv_in_another_encoding_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("task,fixed,moving\nct-mri,ä,b\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"p\.csv: not a CSV in UTF-8"):
        read_pairs(tmp_path / "p.csv")


def test_a_missing_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such pairs CSV"):
        read_pairs(tmp_path / "p.csv")


# --- drawn deformations ---------------------------------------------------------------------------


def test_a_drawn_shift_is_the_same_everywhere() -> None:
    fields = Misalignment(translation=5).draw(64, (40, 30), seeded())
    assert fields.shape == (64, 2, 40, 30)
    torch.testing.assert_close(fields, fields[:, :, :1, :1].expand_as(fields), rtol=0, atol=1e-5)
    shifts = fields[:, :, 0, 0]
    assert shifts.abs().max() <= 5
    # Uniform on [-5, 5]: standard deviation 5 / sqrt 3, the same for both axes.
    assert shifts.std(0).tolist() == pytest.approx([5 / math.sqrt(3)] * 2, rel=0.2)


def test_a_drawn_rotation_turns_about_the_centre() -> None:
    shape = (41, 31)
    fields = Misalignment(rotation=20).draw(64, shape, seeded())
    centre = torch.tensor([20.0, 15.0]).view(2, 1, 1)
    offset = identity_grid(shape, fields) - centre
    turned = offset + fields
    torch.testing.assert_close(turned.norm(dim=1), offset.norm(dim=0).expand(64, -1, -1), rtol=0, atol=1e-3)
    angles = torch.rad2deg(torch.atan2(turned[:, 0, 20, 30], turned[:, 1, 20, 30]))
    assert 15 < angles.abs().max() <= 20
    assert angles.min() < 0 < angles.max()
    scaled = offset + Misalignment(rotation=20, scale=0.3).draw(64, shape, seeded())
    factor = scaled[:, :, 20, 30].norm(dim=1) / 15
    assert 0.7 <= factor.min() < 0.8
    assert 1.2 < factor.max() <= 1.3
    unturned = offset + Misalignment(scale=0.3).draw(64, shape, seeded())
    torch.testing.assert_close(factor, unturned[:, :, 20, 30].norm(dim=1) / 15)  # whatever the angle
    expected = factor.view(-1, 1, 1) * offset.norm(dim=0)  # the same in all directions
    torch.testing.assert_close(scaled.norm(dim=1), expected, rtol=0, atol=1e-3)


def test_milder_draws_have_rotations_without_a_shift(train: PairSet) -> None:
    def turned_in_place(fields: Tensor) -> float:
        across = fields[:, 0, 32, 64] - fields[:, 0, 32, 0]  # rows gained over 64 columns
        turned = across.abs() > 64 * math.sin(math.radians(3))
        return float((turned & (fields[:, :, 32, 32].norm(dim=1) < 1)).float().mean())

    rigid, large = MISALIGNMENTS["rigid"], MISALIGNMENTS["large"]
    plain, milder = (rigid.draw(600, (SIDE, SIDE), seeded(), milder=share) for share in (0.0, 1.0))
    assert turned_in_place(plain) < 0.02
    assert turned_in_place(milder) > 0.04
    assert milder[:, :, 32, 32].abs().max() <= rigid.translation
    shifts = Misalignment(translation=8).draw(600, (SIDE, SIDE), seeded(), milder=1.0)[:, :, 0, 0]
    assert shifts.abs().mean() == pytest.approx(4 / 3, rel=0.15)  # the square of a uniform part has a mean of 1/3
    for name, family in (("rigid", rigid), ("large", large), ("paper", MISALIGNMENTS["paper"])):
        mixes = [Mix(misalignments=((name, 1.0),), milder=share) for share in (0.0, 1.0)]
        sizes = [draw_batch(train, 16, mix, seeded(), device=CPU).known[:, :, 32, 32].norm(dim=1) for mix in mixes]
        assert torch.equal(*sizes) if not family.rotation else sizes[1].mean() < 0.7 * sizes[0].mean()


def test_a_drawn_scale_keeps_directions() -> None:
    fields = Misalignment(scale=0.1).draw(64, (41, 41), seeded())
    factors = (20 + fields[:, 1, 20, 40]) / 20
    assert 0.9 <= factors.min() < 0.95
    assert 1.05 < factors.max() <= 1.1
    assert fields[:, 0, 20].abs().max() < 1e-5
    torch.testing.assert_close(jacobian_determinant(fields)[:, 20, 20], factors.square(), rtol=0, atol=1e-4)


def test_nothing_drawn_is_the_identity() -> None:
    assert Misalignment().draw(2, (20, 30), seeded()).abs().max() < 1e-5


def test_the_papers_misalignment_has_its_size() -> None:
    fields = MISALIGNMENTS["paper"].draw(32, (256, 256), seeded())
    length = fields.norm(dim=1)
    assert float(length.mean()) == pytest.approx(3.9, abs=0.4)
    assert 8 < float(length.max()) < 16
    assert fields.mean().abs() < 0.5
    assert (jacobian_determinant(fields) > 0).all()


def test_smooth_noise_has_the_variance_of_blurred_uniform_noise() -> None:
    sigma = 4.0
    noise = smooth_noise(40, (60, 80), sigma, seeded())
    assert noise.shape == (40, 2, 60, 80)
    # Uniform noise has variance 1/3; a Gaussian of sigma s keeps 1 / (4 pi s^2) of it.
    expected = math.sqrt(1 / 3 / (4 * math.pi * sigma**2))
    assert float(noise.std()) == pytest.approx(expected, rel=0.1)
    # Neighbours at distance d correlate as exp(-d^2 / 4 s^2), across the border not at all.
    near = (noise[..., :-4] * noise[..., 4:]).mean() / noise.square().mean()
    assert float(near) == pytest.approx(math.exp(-(4**2) / (4 * sigma**2)), abs=0.1)
    ends = (noise[..., 0] * noise[..., -1]).mean() / noise.square().mean()
    assert abs(float(ends)) < 0.2


@pytest.mark.parametrize("name", MISALIGNMENTS)
def test_a_seed_gives_the_same_bytes(name: str) -> None:
    family = MISALIGNMENTS[name]
    first = family.draw(2, (60, 80), seeded(5))
    assert torch.equal(first, family.draw(2, (60, 80), seeded(5)))
    assert not torch.equal(first, family.draw(2, (60, 80), seeded(6)))


# --- contrasts ------------------------------------------------------------------------------------


def test_blur_agrees_with_scipy() -> None:
    image = torch.rand(3, 1, 30, 40, dtype=torch.float64)
    sigmas = torch.tensor([1.5, 0.0, 0.8], dtype=torch.float64)
    blurred = blur(image, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        expected = (
            ndimage.gaussian_filter(image[i, 0].numpy(), sigma, mode="nearest", radius=6) if sigma else image[i, 0]
        )
        np.testing.assert_allclose(blurred[i, 0], expected, atol=1e-9)


def test_a_remapped_contrast_keeps_the_anatomy() -> None:
    image = torch.zeros(40, 1, SIDE, SIDE)
    image[:, :, 20:40, 10:50] = 0.7
    remapped = remap_contrast(image, seeded())
    assert remapped.shape == image.shape
    assert remapped.min() >= 0
    assert remapped.max() <= 1
    assert torch.equal(remapped, remap_contrast(image, seeded()))
    # Inside and outside stay two different, nearly even levels in most draws, and draws differ from each other.
    inside, outside = remapped[:, 0, 26:34, 20:40], remapped[:, 0, 46:, :]
    assert ((inside.mean((1, 2)) - outside.mean((1, 2))).abs() > 0.1).float().mean() > 0.7
    assert inside.std((1, 2)).max() < 0.12
    assert inside.mean((1, 2)).std() > 0.15


def test_a_remapped_contrast_is_brighter_towards_any_side() -> None:
    even = remap_contrast(torch.full((60, 1, SIDE, SIDE), 0.5), seeded())[:, 0]
    for lines in (even, even.transpose(1, 2)):
        first, middle, last = lines[:, 0].mean(1), lines[:, SIDE // 2].mean(1), lines[:, -1].mean(1)
        rise = (last - first) / middle
        assert rise.min() < -0.15
        assert rise.max() > 0.15
        assert ((first + last) / 2 - middle).abs().max() < 0.05  # evenly, about the middle


def test_strength_scales_a_remapped_contrast() -> None:
    image = torch.rand(8, 1, SIDE, SIDE, generator=seeded(1))
    none, mild, full = (remap_contrast(image, seeded(), strength=s) - image for s in (0.0, 0.2, 1.0))
    assert none.abs().max() < 1e-6
    assert 0.01 < mild.abs().mean() < 0.4 * full.abs().mean()


def test_a_cut_view_is_dark_beyond_a_line() -> None:
    count = 60
    image = torch.rand(count, 1, SIDE, SIDE, generator=seeded(1)) + 0.1
    mask = torch.zeros(count, 1, SIDE, SIDE)
    mask[..., 10:50, 15:45] = 1
    cut = cut_view(image, mask, 1.0, seeded())
    assert torch.equal(cut, cut_view(image, mask, 1.0, seeded()))
    kept = cut > 0
    assert torch.equal(cut[kept], image[kept])
    left = (kept * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    assert left.min() > 0.2
    assert left.max() <= 1
    assert left.std() > 0.1
    sides, tilts = [0, 0, 0, 0], []
    for picture in kept[:, 0]:
        # A line parts the two: every row and column is kept on one side only.
        assert all((line.int().diff().abs().sum() <= 1) for line in (*picture, *picture.T))
        rows, columns = picture.nonzero().float().mean(0) - (SIDE - 1) / 2
        along_rows = rows.abs() > columns.abs()
        sides[2 * int(not along_rows) + int((rows if along_rows else columns) > 0)] += 1
        depth = picture.sum(0 if along_rows else 1)
        tilts.append(math.degrees(math.atan(float(depth.max() - depth.min()) / (SIDE - 1))))
    assert 6 < max(tilts) < 9
    assert min(sides) >= 1
    assert sides[0] + sides[1] > 2 * (sides[2] + sides[3])
    assert torch.equal(cut_view(image, mask, 0.0, seeded()), image)
    some = (cut_view(image, mask, 0.5, seeded()) != image).any(3).any(2).float().mean()
    assert 0.3 < some < 0.7


def test_what_is_faint_goes_and_the_rest_spreads_over_the_range() -> None:
    ramp = torch.linspace(0, 1, SIDE).expand(3, 1, SIDE, SIDE)
    image = torch.cat([ramp, 0.2 * torch.ones(3, 2, SIDE, SIDE)], dim=1)
    left = without_faint(image, torch.tensor([0.0, 0.25, 0.5]))
    assert torch.equal(left[0], image[0])
    for one, level in ((left[1], 0.25), (left[2], 0.5)):
        assert torch.equal(one[0] > 0, ramp[0, 0] > level)
        assert torch.equal(one[1:] > 0, (ramp[0] > level).expand(2, -1, -1))
    np.testing.assert_allclose(left[2, 0, 0], [max(0.0, 2 * x - 1) for x in ramp[0, 0, 0].tolist()], atol=1e-6)


def test_a_stripped_head_has_lost_its_rim() -> None:
    side, half = 129, 40
    rows, columns = identity_grid((side, side), torch.zeros(1)) - side // 2
    square = (torch.maximum(rows.abs(), columns.abs()) <= half).float()
    image = torch.rand(4, 3, side, side, generator=seeded(2)) + 0.1
    left = strip_head(image, square.expand(4, 1, -1, -1), torch.tensor([0.0, 4.0, 10.0, 16.0]))
    assert torch.equal(left[0], image[0])
    for one, whole, depth in zip(left[1:], image[1:], (4, 10, 16), strict=True):
        kept = one[0] > 0
        assert torch.equal(one, whole * kept)
        middle = kept[side // 2]  # far from the corners, the rim is as deep as asked
        assert abs(int(middle.sum()) - (2 * half + 1 - 2 * depth)) <= 1
        assert torch.equal(kept, kept.flip(0))
        assert torch.equal(kept, kept.flip(1))
        assert not bool(kept[(1 - square).bool()].any())


# --- pairs in memory ------------------------------------------------------------------------------


def test_pictures_are_held_as_bytes_of_luma_and_chroma(train: PairSet, pairs_csv: Path) -> None:
    assert len(train) == 6
    assert train.fixed.shape == train.moving.shape == train.mask.shape == (6, 1, SIDE, SIDE)
    assert train.fixed.dtype == train.mask.dtype == torch.uint8
    assert train.indices("ct-mri") == [0, 2, 4]
    assert train.indices("spect-mri") == []
    assert [MODALITIES[i] for i in train.modality_moving] == ["ct", "pet"] * 3
    grey = np.asarray(Image.open(pairs_csv.parent / "0-mri.png"), dtype=float)
    stretched = (grey - grey.min()) / np.ptp(grey) * 255
    np.testing.assert_allclose(train.fixed[0, 0], stretched, atol=0.51)
    colour = np.asarray(Image.open(pairs_csv.parent / "1-pet.png"), dtype=float)
    luma = colour @ [0.299, 0.587, 0.114]
    scaled = (luma - colour.min()) / np.ptp(colour) * 255
    np.testing.assert_allclose(train.moving[1, 0], scaled, atol=0.51)
    _, chroma = split_colour(np.moveaxis(colour, -1, 0))
    assert train.chroma.dtype == torch.int8
    assert np.abs(chroma).max() / np.ptp(colour) > 0.1
    np.testing.assert_allclose(train.chroma[1], chroma / np.ptp(colour) * 255, atol=0.51)
    assert not train.chroma[0].any()


def test_pictures_of_a_place_are_luma_and_chroma(train: PairSet) -> None:
    fixed, moving, mask = train.pictures([1, 2])
    assert torch.equal(fixed, train.fixed[1:3] / 255)
    assert torch.equal(moving[:, :1], train.moving[1:3] / 255)
    assert torch.equal(moving[:, 1:], train.chroma[1:3] / 255)
    assert torch.equal(mask, train.mask[1:3].float())


def test_the_mask_is_the_head(train: PairSet) -> None:
    assert set(train.mask.unique().tolist()) == {0, 1}
    shown = (train.fixed > 40) | (train.moving > 40)
    assert (train.mask[shown] == 1).float().mean() > 0.99
    assert train.mask[..., :2, :2].sum() == 0
    assert 0.3 < train.mask.float().mean() < 0.8


def test_pictures_of_other_sizes_are_brought_to_the_grid(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:97, :129]
    disc = 255 * (np.hypot(rows - 48, columns - 64) < 40)
    for name in ("a.png", "b.png"):
        Image.fromarray(disc.astype(np.uint8)).save(tmp_path / name)
    path = write(tmp_path / "p.csv", "task,fixed,moving\nspect-mri,a.png,b.png\n")
    data = PairSet(read_pairs(path), side=SIDE)
    assert data.fixed.shape == (1, 1, SIDE, SIDE)
    assert torch.equal(data.fixed, data.moving)
    # The longer side fills the grid: a radius of 40 of 129 becomes 20 of 65, about the centre, still round.
    inside = data.fixed[0, 0].numpy() > 127
    assert inside.sum() == pytest.approx(math.pi * (40 * 65 / 129) ** 2, rel=0.03)
    assert ndimage.center_of_mass(inside) == pytest.approx((32, 32), abs=0.3)
    assert np.ptp(np.nonzero(inside)[0]) == pytest.approx(np.ptp(np.nonzero(inside)[1]), abs=1)


def test_the_following_slice_is_of_the_same_task_and_case(train: PairSet) -> None:
    pairs = [
        replace(train.pairs[0], task=task, case=case)
        for task, case in [("ct-mri", "a"), ("pet-mri", "a"), ("ct-mri", "a"), ("ct-mri", "b"), ("ct-mri", "a")]
    ]
    assert PairSet(pairs, side=SIDE).following.tolist() == [2, 1, 4, 3, 4]
    assert PairSet([replace(p, case="") for p in pairs], side=SIDE).following.tolist() == [0, 1, 2, 3, 4]


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_keeps_its_truth(train: PairSet) -> None:
    batch = draw_batch(train, 16, Mix(), seeded(), device=CPU)
    again = draw_batch(train, 16, Mix(), seeded(), device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert batch.fixed.shape == batch.mask.shape == (16, 1, SIDE, SIDE)
    assert batch.moving.shape == batch.truth.shape == (16, 3, SIDE, SIDE)
    for image in (batch.fixed, batch.moving[:, :1], batch.truth[:, :1], batch.mask):
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
    assert batch.moving[:, 1:].abs().max() > 0.1
    assert batch.known.shape == (16, 2, SIDE, SIDE)
    # The moving image was interpolated once, the truth warped by what is known twice.
    difference = (batch.moving - warp(batch.truth, batch.known)).abs()
    assert difference.mean() < 0.01
    assert (batch.moving - batch.truth).abs().mean() > 4 * difference.mean()
    assert (batch.moving - warp(batch.truth, -batch.known)).abs().mean() > 4 * difference.mean()


def test_slices_between_are_mixed_alike_in_both_images(train: PairSet) -> None:
    data = PairSet([replace(p, task="ct-mri", case="a") for p in train.pairs[:2]], side=SIDE)
    for dark_then_bright in (data.fixed, data.moving, data.mask):
        dark_then_bright[0] = 0
        dark_then_bright[1] = 255 if dark_then_bright is not data.mask else 1
    batch = draw_batch(data, 64, Mix(own_contrast=0, pose=Misalignment(), between=1.0), seeded(), device=CPU)
    fixed, moving, part = (t[:, 0, SIDE // 2, SIDE // 2] for t in (batch.fixed, batch.truth, batch.mask))
    mixed = (part > 0) & (part < 1)  # the last slice has none to be mixed with
    assert 0.25 < mixed.float().mean() < 0.75
    assert part[mixed].std() > 0.2
    for image in (fixed, moving):
        gamma = image[mixed].log() / part[mixed].log()
        assert 0.69 < gamma.min() < gamma.max() < 1.31
        assert torch.equal(image[~mixed], torch.ones_like(image[~mixed]))


def test_slices_apart_are_mixed_by_parts_of_their_own(train: PairSet) -> None:
    data = PairSet([replace(p, task="ct-mri", case="a") for p in train.pairs[:2]], side=SIDE)
    for dark_then_bright in (data.fixed, data.moving, data.mask):
        dark_then_bright[0] = 0
        dark_then_bright[1] = 255 if dark_then_bright is not data.mask else 1
    mix = Mix(own_contrast=0, pose=Misalignment(), between=1.0, apart=0.5)
    batch = draw_batch(data, 64, mix, seeded(), device=CPU)
    fixed, moving, part = (t[:, 0, SIDE // 2, SIDE // 2] for t in (batch.fixed, batch.truth, batch.mask))
    mixed = (part > 0) & (part < 1) & (moving > 0)
    of_fixed, of_moving = (image[mixed].log() / part[mixed].log() for image in (fixed, moving))
    assert 0.69 < of_fixed.min() < of_fixed.max() < 1.31  # the mask goes with the fixed image
    alike = (of_moving > 0.69) & (of_moving < 1.31)
    assert 0.4 < alike.float().mean() < 0.9  # half of the moving images do, and some by chance


def test_shade_changes_brightness_slowly_and_by_its_strength() -> None:
    image = torch.full((16, 1, 128, 128), 0.3)
    image[..., 0] = 0
    shaded = shade(image, 0.4, seeded())
    assert torch.equal(shaded, shade(image, 0.4, seeded()))
    assert torch.equal(shaded[..., 0], image[..., 0])  # black stays black
    factor = (shaded / image)[..., 1:].log()
    assert 0.15 < factor.std() < 0.28  # strengths are even between 0 and 0.4
    assert factor.diff(dim=3).abs().max() < 0.15
    assert factor.flatten(1).std(1).max() > 2 * factor.flatten(1).std(1).min()
    assert torch.equal(shade(image, 0.0, seeded()), image)


def test_both_images_of_a_batch_are_shaded_each_by_itself(train: PairSet) -> None:
    data = PairSet(train.pairs[:2], side=SIDE)
    data.fixed.fill_(128)
    data.moving.fill_(128)
    plain, shaded = (
        draw_batch(data, 16, Mix(own_contrast=0, pose=Misalignment(), shade=strength), seeded(), device=CPU)
        for strength in (0.0, 0.4)
    )
    for even, image in ((plain.fixed, shaded.fixed), (plain.truth[:, :1], shaded.truth[:, :1])):
        assert even.flatten(1).std(1).max() < 1e-6
        assert image.flatten(1).std(1).median() > 0.01  # the picture is little wider than the noise is smooth
    factors = [(image / image.mean((2, 3), keepdim=True)).flatten(1) for image in (shaded.fixed, shaded.truth[:, :1])]
    assert (factors[0] - factors[1]).abs().mean() > 0.02


@pytest.mark.parametrize("name", sorted(f.name for f in fields(Mix) if f.type == "float"))
def test_shares_are_shares(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} 1\.5.*expected 0 to 1"):
        Mix(**{name: 1.5})


def test_cut_and_remapped_images_stay_in_range_and_keep_their_truth(train: PairSet) -> None:
    plain, changed = (
        draw_batch(train, 16, Mix(own_contrast=0, **more), seeded(), device=CPU)
        for more in ({}, {"contrast": 0.3, "shade": 0.3, "cut": 1.0})
    )
    for image in (changed.fixed, changed.moving[:, :1], changed.truth[:, :1]):
        assert 0 <= image.min() <= image.max() <= 1
    assert (changed.moving - warp(changed.truth, changed.known)).abs().mean() < 0.01
    assert (changed.fixed > 0.1).float().mean() < 0.9 * (plain.fixed > 0.1).float().mean()
    assert (changed.moving > 0.1).float().mean() < 0.9 * (plain.moving > 0.1).float().mean()
    coloured = [(batch.moving[:, 1:].abs() > 0.02).float().mean() for batch in (plain, changed)]
    assert 0.1 < coloured[1] < 0.9 * coloured[0]


@pytest.mark.parametrize("name", ["faint", "strip"])
def test_some_images_of_a_batch_have_lost_a_part_each_by_itself(train: PairSet, name: str) -> None:
    plain, changed = (
        draw_batch(train, 60, Mix(own_contrast=0, pose=Misalignment(), **{name: share}), seeded(), device=CPU)
        for share in (0.0, 0.5)
    )
    assert (changed.moving - warp(changed.truth, changed.known)).abs().mean() < 0.01
    lost = [
        (before > 0.02).flatten(1).sum(1) > 1.05 * (after > 0.02).flatten(1).sum(1)
        for before, after in ((plain.fixed, changed.fixed), (plain.truth[:, :1], changed.truth[:, :1]))
    ]
    shares = [float(of.float().mean()) for of in lost]
    assert 0.2 < min(shares) <= max(shares) < 0.6, shares
    assert (lost[0] != lost[1]).float().mean() > 0.1


def hue(picture: Tensor) -> Tensor:
    """Angle of the chroma where there is some."""
    blue, red = picture[-2:]
    return torch.atan2(red, blue)[torch.hypot(blue, red) > 0.1]


def test_other_colours_are_of_one_hue_less_or_more_of_it_or_none(train: PairSet) -> None:
    _, moving, _ = train.pictures([1] * 400)
    chroma = moving[:, 1:]
    other = datasets.other_colours(chroma, seeded())
    factor = other.norm(dim=1).amax((1, 2)) / chroma.norm(dim=1).amax((1, 2))
    assert 0.4 < (factor == 0).float().mean() < 0.6
    assert 1.1 < factor.max() < 1.21
    turned = torch.stack([hue(o / f) for o, f in zip(other, factor, strict=True) if f > 0]) - hue(chroma[0])
    turned = torch.remainder(turned, 2 * math.pi)
    quarters = Counter((turned[:, 0] // (math.pi / 2)).int().tolist())
    assert set(quarters) == {0, 1, 2, 3}
    assert min(quarters.values()) > 30
    around = (turned - turned[:, :1] + math.pi) % (2 * math.pi) - math.pi
    assert around.abs().max() < 1e-3


def test_pairs_in_one_contrast_are_grey_and_others_keep_their_colours(train: PairSet) -> None:
    own, others, recoloured = (
        draw_batch(train, 64, mix, seeded(), device=CPU)
        for mix in (Mix(own_contrast=1), Mix(own_contrast=0), Mix(own_contrast=0, recolour=1))
    )
    assert not own.moving[:, 1:].any()
    pet = others.modality_moving == MODALITIES.index("pet")
    assert not others.moving[~pet, 1:].any()
    hues = torch.cat([hue(picture) for picture in others.truth[pet]])
    assert hues.std() < 0.05  # that of the files
    in_colour = recoloured.truth[recoloured.modality_moving == MODALITIES.index("pet"), 1:].abs().amax((1, 2, 3)) > 0.02
    assert 0.3 < in_colour.float().mean() < 0.7


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_modalities_are_those_of_the_files_or_none(own: float, train: PairSet) -> None:
    batch = draw_batch(train, 48, Mix(own_contrast=own), seeded(), device=CPU)
    if own:
        assert (batch.modality_moving == -1).all()
        assert set(batch.modality_fixed.tolist()) == {0, 1, 2}
    else:
        assert (batch.modality_fixed == 0).all()
        counts = Counter(MODALITIES[i] for i in batch.modality_moving)
        assert set(counts) == {"ct", "pet"}
        assert min(counts.values()) >= 12


def test_tasks_are_drawn_evenly_whatever_their_number(train: PairSet) -> None:
    uneven = PairSet(train.pairs[:1] + train.pairs[1::2], side=SIDE)
    assert len(uneven.indices("pet-mri")) == 3 * len(uneven.indices("ct-mri"))
    batch = draw_batch(uneven, 200, Mix(own_contrast=0), seeded(), device=CPU)
    assert 75 < int((batch.modality_moving == MODALITIES.index("ct")).sum()) < 125


def test_tasks_are_drawn_by_their_shares(train: PairSet) -> None:
    batch = draw_batch(train, 200, Mix(own_contrast=0, tasks=(3.0, 1.0, 5.0)), seeded(), device=CPU)
    assert 125 < int((batch.modality_moving == MODALITIES.index("ct")).sum()) < 175  # of SPECT there is no pair
    with pytest.raises(ValueError, match="never drawn"):
        draw_batch(train, 4, Mix(tasks=(0.0, 0.0, 1.0)), seeded(), device=CPU)


@pytest.mark.parametrize("tasks", [(1.0, 1.0), (1.0, -1.0, 1.0)])
def test_shares_that_are_no_shares_are_refused(tasks: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a share for each of ct-mri"):
        Mix(tasks=tasks)


def test_a_window_is_cut_from_all_images_alike(train: PairSet) -> None:
    batch = draw_batch(train, 3, Mix(), seeded(), device=CPU)
    generator = seeded()
    corners = set()
    for _ in range(6):
        window = crop_batch(batch, 48, generator)
        assert torch.equal(window.modality_moving, batch.modality_moving)
        places = [
            (top, left)
            for top in range(SIDE - 47)
            for left in range(SIDE - 47)
            if torch.equal(window.known, batch.known[..., top : top + 48, left : left + 48])
        ]
        assert len(places) == 1
        top, left = places[0]
        corners.add(places[0])
        for name in ("fixed", "moving", "truth", "mask"):
            whole = getattr(batch, name)
            assert torch.equal(getattr(window, name), whole[..., top : top + 48, left : left + 48])
    assert len(corners) > 3
    with pytest.raises(ValueError, match="a crop of 80 pixels"):
        crop_batch(batch, 80, generator)


def test_images_and_masks_are_posed_and_flipped_together(train: PairSet) -> None:
    """With the same picture on both sides, the truth differs from the fixed image by a gamma alone."""
    same = PairSet([replace(p, moving=p.fixed) for p in train.pairs], side=SIDE)
    batch = draw_batch(same, 12, Mix(own_contrast=0), seeded(), device=CPU)
    for fixed, truth in zip(batch.fixed, batch.truth[:, :1], strict=True):
        assert np.corrcoef(fixed.flatten(), truth.flatten())[0, 1] > 0.97
    still = draw_batch(same, 12, Mix(own_contrast=0, pose=Misalignment()), seeded(), device=CPU)
    candidates = [(j, flip) for j in range(len(same)) for flip in (False, True)]
    flips = set()
    for fixed, mask in zip(still.fixed, still.mask, strict=True):

        def alike(key: tuple[int, bool], fixed: Tensor = fixed) -> float:
            picture = same.fixed[key[0]].flip(-1) if key[1] else same.fixed[key[0]]
            return float(np.corrcoef(fixed.flatten(), picture.flatten())[0, 1])

        j, flip = max(candidates, key=alike)
        flips.add(flip)
        expected = same.mask[j].flip(-1) if flip else same.mask[j]
        torch.testing.assert_close(mask, expected.float(), rtol=0, atol=1e-3)
    assert flips == {False, True}


def test_the_misalignment_families_have_their_shares(train: PairSet) -> None:
    still = Mix(misalignments=(("rigid", 1.0),))
    known = draw_batch(train, 32, still, seeded(), device=CPU).known
    assert jacobian_determinant(known).sub(1).abs().max() < 1e-3  # rotations and shifts keep areas
    mixed = Mix(misalignments=(("rigid", 0.5), ("large", 0.5)))
    known = draw_batch(train, 64, mixed, seeded(), device=CPU).known
    rigid = (jacobian_determinant(known) - 1).abs().amax((1, 2)) < 1e-3
    assert 20 < int(rigid.sum()) < 44


def test_whole_numbers_are_shares_too(pairs_csv: Path) -> None:
    mix = Mix(misalignments=(("rigid", 1),), tasks=(1, 1, 0))
    data = PairSet(read_pairs(pairs_csv), side=64)
    batch = draw_batch(data, 2, mix, torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert len(batch.fixed) == 2


@pytest.mark.parametrize("tasks", [(1.0, 1.0), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0), (1.0, math.nan, 1.0)])
def test_shares_of_tasks_that_are_none_are_refused(tasks: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected a share for each of ct-mri"):
        Mix(tasks=tasks)


@pytest.mark.parametrize(
    "misalignments", [(), (("elastic", 1.0),), (("paper", -1.0), ("rigid", 2.0)), (("paper", math.nan),)]
)
def test_an_unknown_mix_is_refused(misalignments: tuple[tuple[str, float], ...]) -> None:
    with pytest.raises(ValueError, match="expected paper, rigid, large"):
        Mix(misalignments=misalignments)


def test_validation_pairs_do_not_depend_on_their_company(train: PairSet) -> None:
    family = MISALIGNMENTS["rigid"]
    together = validation_batch(train, [0, 3, 4], family, draw=1, device=CPU)
    alone = validation_batch(train, [4], family, draw=1, device=CPU)
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[2:], one)
    other = validation_batch(train, [4], family, draw=2, device=CPU)
    assert not torch.equal(other.known, alone.known)
    assert torch.equal(other.truth, alone.truth)


def test_validation_pairs_are_as_their_files(train: PairSet) -> None:
    batch = validation_batch(train, [1, 2], MISALIGNMENTS["paper"], draw=0, device=CPU)
    assert torch.equal(batch.fixed, train.fixed[1:3] / 255)
    assert torch.equal(batch.truth, torch.cat([train.moving, train.chroma], dim=1)[1:3] / 255)
    assert torch.equal(batch.moving, warp(batch.truth, batch.known))
    assert batch.modality_fixed.tolist() == [0, 0]
    assert batch.modality_moving.tolist() == [2, 1]


def test_every_task_has_a_modality_the_classifier_knows() -> None:
    assert {str(m) for m in datasets.TASKS.values()} | {"mri"} == set(MODALITIES)


def test_parameters_are_drawn_before_they_are_applied(train: PairSet) -> None:
    """A different pose leaves the known field alone."""

    def known(pose: Misalignment) -> Tensor:
        mix = Mix(misalignments=(("rigid", 1.0),), pose=pose)
        return draw_batch(train, 4, mix, seeded(), device=CPU).known

    assert torch.equal(known(Misalignment(rotation=5)), known(Misalignment(translation=3)))
