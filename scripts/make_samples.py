"""Make the sample pairs in ``src/bsafusion/samples``. The same sources give the same bytes.

Sources, to be fetched by name (each file's checksum is checked):

- ``--itk``: the folder unpacked from Debian's ``insighttoolkit5-examples`` (``apt-get download``,
  ``dpkg -x``); Apache-2.0, Insight Software Consortium and NumFOCUS. One brain slice in T1 and proton-density
  weighting, and copies of the latter that ITK's authors deformed.
- ``--nilearn``: the wheel ``nilearn`` (``pip download --no-deps``); BSD-3-Clause, The nilearn developers. Its
  MNI ICBM152 2009a symmetric template (T1, grey matter, white matter; 1 mm, brain only) carries the notice of
  the Montreal Neurological Institute that ``NOTICE`` quotes.
- ``--totalsegmentator``: the wheel ``totalsegmentator`` (``pip download --no-deps``); Apache-2.0, Department
  of Research and Analysis, University Hospital Basel. Its CT brain atlas is an average of several
  skull-stripped CTs.

    python scripts/make_samples.py --itk DIR --nilearn WHEEL --totalsegmentator WHEEL -o src/bsafusion/samples
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from bsafusion.samples import KnownTransform

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

CONVENTION = (
    "moving(x) = original(x + p(x)); original is the moving image before it was deformed, on the fixed grid. "
    "x + p(x) = scale * R(rotation) (x - centre) + centre + translation + b(x), in pixels; pairs are (y, x); "
    "R(a): (x, y) -> (x cos a - y sin a, x sin a + y cos a), a in degrees; b is a uniform cubic B-spline "
    "with the coefficients control[component][row][column], component 0 along y, whose mesh of (rows - 3) by "
    "(columns - 3) cells spans the image from the centre of the first pixel to the centre of the last."
)

# Enough of each file's sha256 to tell versions apart.
CHECKSUMS = {
    "BrainT1SliceBorder20.png": "d25689977c23f469",
    "BrainProtonDensitySliceBorder20.png": "c9eec8a16e094573",
    "BrainProtonDensitySliceShifted13x17y.png": "602253ec86418500",
    "BrainProtonDensitySliceRotated10.png": "9965dd65b23b530c",
    "BrainProtonDensitySliceR10X13Y17.png": "843242c112674c39",
    "BrainProtonDensitySliceR10X13Y17S12.png": "5b6b17cc966e7e68",
    "BrainProtonDensitySliceBSplined10.png": "3ea4b7d1a56f003b",
    "BSplineDisplacements1.txt": "8f19df60936db258",
    "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz": "421a10e872fd6cad",
    "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz": "97a5ca69bd24db37",
    "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz": "382d92812de4744f",
    "ct_brain_atlas_1mm.nii.gz": "e6964149f62ae88b",
}

ITK_LICENCE = "Apache-2.0"
MNI_LICENCE = "MNI notice (see NOTICE); packaged by nilearn, BSD-3-Clause"

# ITK's examples rotate about half the image size, not about the middle pixel (ImageRegistration6.cxx names
# (110.5, 128.5)). All of their transforms were checked against BrainProtonDensitySliceBorder20.png: the least
# squares fit of rotation, scale and translation is within 0.003 degrees, 0.0001 and 0.005 pixels of them.
ITK_CENTRE = (128.5, 110.5)

# Affine from MNI millimetres to those of the CT atlas, which is not in MNI space, both RAS: the maximum of
# Mattes mutual information (40 bins) between the T1 template and the atlas clipped to [-10, 80] HU, found by
# SimpleITK in 3-D from the alignment of the brain masks. By eye, ventricles and surface agree to 2 mm or so.
CT_FROM_MNI = np.array(
    [
        [0.878336, 0.020005, 0.031305, 4.431669],
        [-0.017080, 0.852590, 0.089322, 192.006025],
        [-0.037698, -0.093172, 0.836576, 1217.199426],
        [0.0, 0.0, 0.0, 1.0],
    ]
)

# Colour tables: grey level and colour at it, linear between. Both get brighter with the level.
HOT_METAL = ((0.0, 0, 0, 0), (0.4, 200, 0, 0), (0.75, 255, 150, 0), (1.0, 255, 255, 255))
SPECTRUM = (
    (0.0, 0, 0, 0),
    (0.2, 40, 0, 130),
    (0.45, 0, 110, 170),
    (0.65, 0, 180, 60),
    (0.85, 245, 220, 0),
    (1.0, 255, 255, 255),
)

FWHM_PER_SIGMA = 2.0 * np.sqrt(2.0 * np.log(2.0))


def read_source(source: Path, name: str) -> bytes:
    """The bytes of the file called ``name`` anywhere in a folder or a wheel.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not the version that the samples were made from.
    """
    if source.is_dir():
        found = [path.read_bytes() for path in sorted(source.rglob(name))]
    else:
        with zipfile.ZipFile(source) as wheel:
            found = [wheel.read(member) for member in wheel.namelist() if Path(member).name == name]
    if not found:
        raise FileNotFoundError(f"{source} has no {name}; expected an unpacked package or a wheel that holds it")
    digest = hashlib.sha256(found[0]).hexdigest()
    if not digest.startswith(CHECKSUMS[name]):
        raise ValueError(f"{name} of {source} has sha256 {digest}; expected {CHECKSUMS[name]}...: try another version")
    return found[0]


def read_volume(source: Path, name: str) -> tuple[Array, Array]:
    """Voxels ``X Y Z`` and the 4x4 affine to RAS millimetres of a ``.nii.gz``."""
    image = nib.Nifti1Image.from_bytes(gzip.decompress(read_source(source, name)))
    return np.asarray(image.dataobj, dtype=np.float64), np.asarray(image.affine)


def radiological(axial: Array) -> Array:
    """``X Y`` in RAS order to rows and columns: anterior at the top, the patient's right at the left."""
    return axial[::-1, ::-1].T


def blur(image: Array, fwhm: float) -> Array:
    """Gaussian blur of a given full width at half maximum, in voxels."""
    blurred: Array = ndimage.gaussian_filter(image, fwhm / FWHM_PER_SIGMA)
    return blurred


def to_bytes(unit: Array) -> Pixels:
    grey: Pixels = np.rint(255.0 * np.clip(unit, 0.0, 1.0)).astype(np.uint8)
    return grey


def colourise(unit: Array, table: tuple[tuple[float, int, int, int], ...]) -> Pixels:
    """Grey levels in [0, 1], ``H W``, to RGB, ``H W 3``."""
    levels, *channels = np.array(table).T
    colours = [np.interp(unit, levels, channel) for channel in channels]
    rgb: Pixels = np.rint(np.stack(colours, axis=-1)).astype(np.uint8)
    return rgb


def deform(original: Pixels, displacement: Array) -> Pixels:
    """``moving(x) = original(x + p(x))``, bilinear, black outside; ``H W`` or ``H W 3``."""
    points = np.indices(original.shape[:2]) + displacement
    channels = np.moveaxis(np.atleast_3d(original), -1, 0).astype(np.float64)
    moved = np.stack([ndimage.map_coordinates(channel, points, order=1) for channel in channels], axis=-1)
    moving: Pixels = np.rint(moved).astype(np.uint8).reshape(original.shape)
    return moving


def draw_transform(
    seed: int,
    shape: tuple[int, int],
    *,
    rotation: float,
    translation: tuple[float, float],
    elastic: float = 5.0,
) -> KnownTransform:
    """Rotation about the image's middle, translation and an elastic part of at most ``elastic`` pixels."""
    control = np.random.default_rng(seed).standard_normal((2, 7, 7))
    reach = np.linalg.norm(KnownTransform(control=control).displacement(shape), axis=0).max()
    return KnownTransform(
        rotation=rotation,
        translation=translation,
        centre=((shape[0] - 1) / 2, (shape[1] - 1) / 2),
        control=np.round(control * (elastic / reach), 2),
    )


def t1_slice(t1: Array, index: int) -> Pixels:
    # The template leaves the lower quarter of the grey levels unused.
    return to_bytes((radiological(t1[:, :, index]) - 60.0) / 175.0)


def tracer_slice(
    t1: Array,
    grey: Array,
    white: Array,
    index: int,
    *,
    white_uptake: float,
    fwhm: float,
    counts: float,
    seed: int,
) -> Array:
    """Simulated uptake of a brain tracer, ``H W`` in [0, 1].

    Uptake is 1 in grey matter, ``white_uptake`` in white matter and 0.08 in the rest of the brain, blurred to
    ``fwhm`` millimetres; ``counts`` is the mean number of counts of a pixel with uptake 1. Most of the blur
    is the scanner's and comes before the Poisson counts; 4 mm are the reconstruction filter's, after them.
    """
    slab = slice(index - 16, index + 17)
    grey, white, brain = grey[:, :, slab] / 255.0, white[:, :, slab] / 255.0, t1[:, :, slab] > 0
    uptake = grey + white_uptake * white + 0.08 * np.clip(brain - grey - white, 0.0, 1.0)
    filter_fwhm = 4.0
    seen = blur(uptake, float(np.sqrt(fwhm**2 - filter_fwhm**2)))[:, :, 16]
    counted = np.random.default_rng(seed).poisson(counts * radiological(seen)) / counts
    smooth = blur(counted, filter_fwhm)
    uptake_slice: Array = smooth / smooth.max()
    return uptake_slice


def ct_slice(ct: Array, ct_affine: Array, mni_affine: Array, shape: tuple[int, int], index: int) -> Array:
    """The CT atlas in Hounsfield units on the template's axial slice ``index``, ``H W``."""
    x, y = np.indices(shape)
    voxels = np.stack([x, y, np.full(shape, index), np.ones(shape)])
    ct_from_mni_voxels = np.linalg.inv(ct_affine) @ CT_FROM_MNI @ mni_affine
    points = np.einsum("ij,jxy->ixy", ct_from_mni_voxels, voxels)[:3]
    return radiological(ndimage.map_coordinates(ct, points, order=1))


def png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


class Writer:
    """Writes pictures and gathers their records for ``samples.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []

    def add(
        self,
        id: str,
        task: str,
        files: dict[str, tuple[str, bytes]],
        origin: str,
        licence: str,
        known: KnownTransform,
    ) -> None:
        """``files``: for ``fixed``, ``moving`` and ``original`` the file's name and bytes."""
        record: dict[str, Any] = {"id": id, "task": task}
        for role, (name, data) in files.items():
            (self.folder / name).write_bytes(data)
            record[role] = {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
        record |= {"origin": origin, "licence": licence}
        record["known"] = {
            "rotation": known.rotation,
            "scale": known.scale,
            "translation": list(known.translation),
            "centre": list(known.centre),
            "control": None if known.control is None else known.control.tolist(),
        }
        self.records.append(record)

    def add_deformed(
        self, id: str, fixed: Pixels, original: Pixels, origin: str, licence: str, known: KnownTransform
    ) -> None:
        height, width = fixed.shape
        moving = deform(original, known.displacement((height, width)))
        pictures = {"fixed": fixed, "moving": moving, "original": original}
        files = {role: (f"{id}_{role}.png", png(pixels)) for role, pixels in pictures.items()}
        self.add(id, id, files, origin, licence, known)

    def finish(self) -> None:
        text = json.dumps({"convention": CONVENTION, "samples": self.records}, indent=1)
        (self.folder / "samples.json").write_text(text + "\n", encoding="utf-8")
        # The same pairs for `bsafusion batch`, which knows no task of two MR images.
        rows = [f"{r['id']},{r['fixed']['file']},{r['moving']['file']},{r['task']}" for r in self.records]
        manifest = "\n".join(["id,fixed,moving,task", *rows]).replace("mr-mr", "auto") + "\n"
        (self.folder / "manifest.csv").write_text(manifest, encoding="utf-8")


def itk_transforms(itk: Path) -> dict[str, tuple[str, KnownTransform]]:
    """For each deformed proton-density slice its suffix and what was done to it."""
    # Read by BSplineWarping1.cxx: x and y of each of 7 x 7 coefficients, row by row.
    pairs = np.loadtxt(io.BytesIO(read_source(itk, "BSplineDisplacements1.txt"))).reshape(7, 7, 2)
    return {
        "mr-shift": ("Shifted13x17y", KnownTransform(translation=(-17.0, -13.0))),
        "mr-rotation": ("Rotated10", KnownTransform(rotation=-10.0, centre=ITK_CENTRE)),
        # Shifted by (x, y) = (13, 16) after the rotation: the 17 of the name and of ImageRegistration6.cxx is
        # not in the pixels (the result printed there has 16 too). Pulled back, that is -R(-10)(13, 16).
        "mr-rigid": (
            "R10X13Y17",
            KnownTransform(rotation=-10.0, translation=(-13.4995, -15.5809), centre=ITK_CENTRE),
        ),
        "mr-similarity": (
            "R10X13Y17S12",
            KnownTransform(rotation=10.0, scale=1.2, translation=(17.0, 13.0), centre=ITK_CENTRE),
        ),
        "mr-bspline": ("BSplined10", KnownTransform(control=np.moveaxis(pairs[..., ::-1], -1, 0))),
    }


def add_mr_samples(writer: Writer, itk: Path) -> None:
    def grey(name: str) -> tuple[str, bytes]:
        """The same pixels; most of ITK's files hold them as indices into a palette of greys."""
        with Image.open(io.BytesIO(read_source(itk, name))) as picture:
            colours = np.asarray(picture.convert("RGB"))
        if (colours != colours[..., :1]).any():
            raise ValueError(f"{name} is not grey; expected a slice of one intensity")
        return name, png(colours[..., 0])

    for id, (suffix, known) in itk_transforms(itk).items():
        files = {
            "fixed": grey("BrainT1SliceBorder20.png"),
            "moving": grey(f"BrainProtonDensitySlice{suffix}.png"),
            "original": grey("BrainProtonDensitySliceBorder20.png"),
        }
        origin = "ITK 5.2.1 Examples/Data, pixels unchanged: T1 and proton-density weighted slices of one brain"
        writer.add(id, "mr-mr", files, origin, ITK_LICENCE, known)


def add_template_samples(writer: Writer, nilearn: Path, totalsegmentator: Path) -> None:
    t1, affine = read_volume(nilearn, "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    grey, _ = read_volume(nilearn, "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz")
    white, _ = read_volume(nilearn, "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz")
    ct, ct_affine = read_volume(totalsegmentator, "ct_brain_atlas_1mm.nii.gz")
    shape = (t1.shape[1], t1.shape[0])
    template = "MNI ICBM152 2009a symmetric T1 template, axial slice z = {} mm"

    hounsfield = ct_slice(ct, ct_affine, affine, t1.shape[:2], 80)
    writer.add_deformed(
        "ct-mri",
        t1_slice(t1, 80),
        to_bytes(hounsfield / 80.0),
        f"{template.format(8)}; CT brain atlas of TotalSegmentator 2.18.0 (an average of several people, no "
        "skull) brought onto it by an affine registration, about 2 mm accurate; 0 to 80 HU; deformed",
        f"{MNI_LICENCE}; Apache-2.0 (TotalSegmentator)",
        draw_transform(3, shape, rotation=-6.0, translation=(-4.0, 5.0)),
    )
    pet = tracer_slice(t1, grey, white, 88, white_uptake=0.25, fwhm=6.0, counts=60.0, seed=1)
    writer.add_deformed(
        "pet-mri",
        t1_slice(t1, 88),
        colourise(pet, HOT_METAL),
        f"{template.format(16)}; simulated, not measured: FDG-like uptake 4:1 from its grey and white matter "
        "maps, blurred to 6 mm, with noise, in colours, deformed",
        MNI_LICENCE,
        draw_transform(1, shape, rotation=6.0, translation=(3.0, -6.0)),
    )
    spect = tracer_slice(t1, grey, white, 84, white_uptake=0.4, fwhm=9.0, counts=25.0, seed=2)
    writer.add_deformed(
        "spect-mri",
        t1_slice(t1, 84),
        colourise(spect, SPECTRUM),
        f"{template.format(12)}; simulated, not measured: perfusion-like uptake 2.5:1 from its grey and "
        "white matter maps, blurred to 9 mm, with noise, in colours, deformed",
        MNI_LICENCE,
        draw_transform(2, shape, rotation=4.0, translation=(5.0, 4.0)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--itk", type=Path, required=True, metavar="DIR")
    parser.add_argument("--nilearn", type=Path, required=True, metavar="WHEEL_OR_DIR")
    parser.add_argument("--totalsegmentator", type=Path, required=True, metavar="WHEEL_OR_DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    writer = Writer(options.output)
    add_template_samples(writer, options.nilearn, options.totalsegmentator)
    add_mr_samples(writer, options.itk)
    writer.finish()


if __name__ == "__main__":
    main()
