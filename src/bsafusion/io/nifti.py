"""NIfTI: slices in any orientation, volumes, and displacement fields as ITK has them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion.deformation import DeformationField, MovingFrame
from bsafusion.errors import one_line
from bsafusion.files import PathLike, write_whole
from bsafusion.image import SLICE_POSITION, Geometry, ImageError, check_size
from bsafusion.io.formats import Facts, Pixels, placed, quiet, recognise

_LARGEST_OFFSET = 2**26  # of a NIfTI's voxels; before them are extensions, such as the header of a DICOM
_MM_PER_UNIT = (1.0, 1000.0, 1.0, 0.001)  # by NIfTI's code: unknown, m, mm, micron
_NIFTI_CLASSES: dict[int, Any] = {1: nib.Nifti1Image, 2: nib.Nifti2Image}
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# NIfTI-1 keeps 80 bytes of free text: what a 4x4 matrix cannot say about a 2-D grid is kept there.
_NOTE_PREFIX = "bsafusion "
_NOTE_MOVING = ", into "  # of a field: the grid it leads into, see _frame_note
_NOTE_PLACEMENT = "bsafusion placement "  # of a field, in a header extension: where its slice lies


@quiet()
def read_nifti(path: Path, slice_index: int | None) -> Pixels:
    """Read a NIfTI of one slice, or one slice of a volume, with its geometry in LPS mm."""
    with _open_nifti(path) as nifti:
        shape = tuple(int(size) for size in nifti.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        (x, y), through, index = _choose_slice(shape, slice_index)
        check_size((shape[y], shape[x]))
        selection = [slice(None) if axis in (x, y) else (index if axis == through else 0) for axis in range(nifti.ndim)]
        array = np.asarray(nifti.dataobj[tuple(selection)])
        stored = nifti.get_data_dtype()
        if (nifti.dataobj.slope, nifti.dataobj.inter) != (1, 0):
            stored = array.dtype  # the values are not those that were stored
        geometry, facts = _nifti_geometry(nifti, x=x, y=y, through=through, index=index)
    if array.dtype.names is not None:
        if array.dtype.names != ("R", "G", "B"):
            raise ImageError(f"NIfTI with pixels of {array.dtype}; expected numbers or RGB; convert it first")
        array = np.stack([array[name] for name in "RGB"], axis=-1)
        stored = array.dtype
    if array.dtype.kind == "c":
        raise ImageError("NIfTI with complex values; expected real ones; write the magnitude first")
    pixels = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    meta: dict[str, str | float] = {} if through is None else {"slice_index": float(index)}
    return Pixels(pixels.swapaxes(1, 2), geometry, np.dtype(stored).name, meta=meta | facts)


@contextmanager
def _open_nifti(path: Path) -> Iterator[Any]:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as content:
            head = content.read(8)
            content.seek(0)
            kind = _NIFTI_CLASSES[2 if head[4:8] == b"n+2\0" else 1]
            _check_nifti_header(kind.header_class(content.read(kind.header_class.sizeof_hdr), check=False))
            content.seek(0)
            yield kind.from_stream(content)
    except ImageError:
        raise
    # nibabel raises many types on damaged headers: KeyError, OverflowError, HeaderDataError.
    except Exception as error:
        raise ImageError(f"damaged or unsupported NIfTI ({one_line(error)[:200]}); export it again") from error


def _check_nifti_header(header: Any) -> None:
    """As it is stored: nibabel mends it without a word, and reads all that stands before the voxels."""
    for name in ("qform_code", "sform_code"):
        if not 0 <= int(header[name]) <= 5:
            raise ImageError(f"NIfTI with {name} {int(header[name])}; expected 0 to 5; repair the header")
    if float(header["vox_offset"]) > _LARGEST_OFFSET:
        raise ImageError(
            f"NIfTI whose voxels begin at byte {float(header['vox_offset']):.0f}; expected at most {_LARGEST_OFFSET}; "
            "export it again without extensions"
        )


def _choose_slice(shape: tuple[int, ...], slice_index: int | None) -> tuple[tuple[int, int], int | None, int]:
    """Which stored axes are x and y, which one is sliced (or None), and where."""
    if len(shape) == 2:
        if slice_index is not None:
            raise ImageError(f"a 2-D NIfTI but slice_index={slice_index} was given; leave it out")
        return (0, 1), None, 0
    if len(shape) != 3:
        raise ImageError(f"{len(shape)}-D NIfTI of shape {shape}; expected one slice or one volume; extract it first")
    single = [axis for axis in range(3) if shape[axis] == 1]
    if len(single) == 1 and slice_index is None:
        x, y = (axis for axis in range(3) if axis != single[0])
        return (x, y), single[0], 0
    if slice_index is None:
        raise ImageError(
            f"3-D volume of shape {shape} where a slice is meant: pass slice_index (in Python read_image(path, "
            "slice_index=K), on the command line --fixed-slice K, --moving-slice K, of warp --image-slice K, and the "
            "like; batch takes slices only)"
        )
    if not 0 <= slice_index < shape[2]:
        raise ImageError(f"slice_index={slice_index} of a volume of shape {shape}; expected 0..{shape[2] - 1}")
    return (0, 1), 2, slice_index


def _nifti_geometry(nifti: Any, *, x: int, y: int, through: int | None, index: int) -> tuple[Geometry, Facts]:
    shape = (int(nifti.shape[y]), int(nifti.shape[x]))
    if through is None and _note(nifti) is not None:
        return _flat_geometry(nifti, shape), {}
    affine = _lps_affine(nifti)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    spacing = (float(lengths[x]), float(lengths[y]))
    if not (int(nifti.header["qform_code"]) or int(nifti.header["sform_code"])):
        return replace(Geometry.picture(shape), physical=True, spacing=spacing), {}
    origin = affine[:3, 3] + (0.0 if through is None else index * affine[:3, through])
    to_next = None if through is None else affine[:3, through]
    geometry, facts = placed(shape, spacing, origin, affine[:3, x], affine[:3, y], to_next)
    facts |= _disagreement(nifti, x=x, y=y, through=through, index=index)
    if through is None and geometry.plane == "axial":
        # ITK writes every 2-D image as if it were axial and at 0, whatever plane it was cut from.
        unknown = replace(geometry, plane=None, placement=None)
        return unknown, {k: v for k, v in facts.items() if k != SLICE_POSITION}
    return geometry, facts


def _lps_affine(nifti: Any) -> NDArray[np.float64]:
    """Homogeneous matrix from stored index (i, j, k) to LPS mm, by the sform if there is one."""
    affine: NDArray[np.float64] = _LPS_FROM_RAS @ np.asarray(nifti.affine, dtype=np.float64)
    affine[:3] *= _unit_mm(nifti)
    return affine


def _unit_mm(nifti: Any) -> float:
    code = int(nifti.header["xyzt_units"]) % 8  # the rest is of time
    if code >= len(_MM_PER_UNIT):
        raise ImageError(f"NIfTI with the unknown unit of length {code}; expected m, mm or micron; repair the header")
    return _MM_PER_UNIT[code]


def _disagreement(nifti: Any, *, x: int, y: int, through: int | None, index: int) -> Facts:
    """What to say where the qform, which others may go by, places the slice elsewhere than the sform."""
    if not (int(nifti.header["qform_code"]) > 0 and int(nifti.header["sform_code"]) > 0):
        return {}
    sform = np.asarray(nifti.get_sform(), dtype=np.float64)
    try:
        qform = np.asarray(nifti.get_qform(), dtype=np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError):  # its quaternion is none
        return {"placed_by": "the sform; the qform is damaged"}
    corners = np.zeros((4, 4))
    corners[3] = 1
    corners[x] = np.array([0, 0, 1, 1]) * (nifti.shape[x] - 1)
    corners[y] = np.array([0, 1, 0, 1]) * (nifti.shape[y] - 1)
    if through is not None:
        corners[through] = index
    moved = float(np.linalg.norm(((qform - sform) @ corners)[:3], axis=0).max())
    if moved <= 0.1 * np.linalg.norm(sform[:3, [x, y]], axis=0).min():
        return {}
    return {"placed_by": f"the sform, from which the qform differs by up to {moved * _unit_mm(nifti):.3g} mm"}


def _flat_geometry(nifti: Any, shape: tuple[int, ...]) -> Geometry:
    """The geometry of a grid whose physical axes are the file's first D ones."""
    note = _note(nifti)
    if note == "picture":
        return Geometry.picture(shape)
    n = len(shape)
    affine = _lps_affine(nifti)
    spacing = np.linalg.norm(affine[:n, :n], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        direction = affine[:n, :n] / spacing
    plane, place = note.split() if note else ("unknown", "positioned")
    geometry = Geometry(
        shape=shape,
        spacing=tuple(float(value) for value in spacing),
        origin=tuple(float(value) for value in affine[:n, 3]),
        direction=tuple(tuple(float(value) for value in row) for row in direction),
        plane=None if plane == "unknown" else plane,
        positioned=place == "positioned",
    )
    pixels = Geometry.picture(shape)
    if note is None and np.array_equal(geometry.matrix(), pixels.matrix()):
        return pixels
    return geometry


def _description(nifti: Any) -> str:
    return bytes(nifti.header["descrip"].item()).split(b"\0")[0].decode("ascii", "replace")


def _note(nifti: Any) -> str | None:
    text = _description(nifti).partition(_NOTE_MOVING)[0]
    return text.removeprefix(_NOTE_PREFIX) if text.startswith(_NOTE_PREFIX) else None


def _moving_frame(nifti: Any) -> MovingFrame | None:
    """The grid that a field leads into, if its file says so."""
    pattern = rf"{_NOTE_MOVING}(\d+(?:x\d+)+) (mm|pixels)(?: (placed|unplaced)(?: (\S+))?)?$"
    found = re.search(pattern, _description(nifti))
    if found is None or _note(nifti) is None:
        return None
    size, unit, place, numbers = found.groups()
    return MovingFrame(
        physical=unit == "mm",
        shape=tuple(int(n) for n in reversed(size.split("x"))),
        positioned=None if place is None else place == "placed",
        spacing=tuple(float(mm) for mm in numbers.split("x")) if numbers and place == "unplaced" else None,
        across=float(numbers) if numbers and place == "placed" else None,
    )


def _frame_note(moving: MovingFrame) -> str:
    """What :func:`_moving_frame` reads: ``80x64 pixels``, ``80x64 mm``, ``80x64 mm placed[ ACROSS]`` or
    ``80x64 mm unplaced[ XxY]``."""
    note = f"{'x'.join(str(n) for n in reversed(moving.shape))} {'mm' if moving.physical else 'pixels'}"
    if moving.positioned:
        return f"{note} placed" + ("" if moving.across is None else f" {moving.across:.3f}")
    if moving.positioned is None:
        return note
    # A third spacing would not always fit into 80 bytes.
    spacing = moving.spacing if moving.spacing and len(moving.spacing) == 2 else ()
    return f"{note} unplaced" + (f" {'x'.join(f'{mm:.4g}' for mm in spacing)}" if spacing else "")


def _placement(nifti: Any) -> tuple[tuple[float, ...], ...] | None:
    """:attr:`Geometry.placement` of a field's grid, if its file says so."""
    for extension in nifti.header.extensions:
        text = bytes(extension.get_content()).rstrip(b"\0").decode("ascii", "replace")
        if text.startswith(_NOTE_PLACEMENT):
            return tuple(tuple(map(float, row)) for row in json.loads(text.removeprefix(_NOTE_PLACEMENT)))
    return None


def nifti_layout(array: NDArray[Any]) -> NDArray[Any]:
    """``C *S`` with x first and colour as one RGB value per pixel."""
    stored = array.transpose(0, *reversed(range(1, array.ndim)))
    if len(stored) == 1:
        return np.asarray(stored[0])
    if stored.dtype != np.uint8:
        raise ImageError(f"RGB NIfTI of {stored.dtype}; expected uint8, the only RGB type NIfTI has")
    rgb = np.empty(stored.shape[1:], dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for channel, name in zip(stored, "RGB", strict=True):
        rgb[name] = channel
    return rgb


def nifti_bytes(
    array: NDArray[Any], geometry: Geometry, *, intent: str = "none", moving: MovingFrame | None = None
) -> bytes:
    """A compressed NIfTI-1 file; ``array`` is stored as given, x, y[, z] first. Same input, same bytes.

    A 2-D geometry becomes a grid in the first two axes, unless the array has a third axis for its ``placement``.
    """
    n = len(geometry.shape)
    affine = np.eye(4)
    placed = geometry.placement is not None and array.ndim == 3
    if placed:
        affine[:3] = geometry.placement
    else:
        affine[:n, :n] = geometry.matrix()[:n, :n][:, ::-1]
        affine[:n, 3] = geometry.origin
    affine = _LPS_FROM_RAS @ affine
    nifti: Any = _NIFTI_CLASSES[1](array, affine)
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=1)
    nifti.header.set_xyzt_units("mm")
    nifti.header.set_intent(intent)
    place = "positioned" if geometry.positioned else "unpositioned"
    note = f"{geometry.plane or 'unknown'} {place}" if geometry.physical else "picture"
    if moving is not None:
        note += _NOTE_MOVING + _frame_note(moving)
    nifti.header["descrip"] = (_NOTE_PREFIX + note).encode("ascii")
    if geometry.placement is not None and not placed:
        remark = _NOTE_PLACEMENT + json.dumps(geometry.placement)
        nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", remark.encode("ascii")))
    return gzip.compress(nifti.to_bytes(), mtime=0)


@quiet()
def read_deformation(path: PathLike) -> DeformationField:
    """Read an ITK displacement field: NIfTI, intent 1007 (VECTOR), components x, y[, z] in LPS mm.

    Fields of other tools are accepted if they follow ITK. One with spacing 1, origin 0 and identity
    direction is taken as a field in pixels.

    Raises:
        ImageError: the file is missing, damaged, or not such a field.
    """
    path = Path(path)
    try:
        kind = recognise(path)
        if kind != "NIfTI":
            raise ImageError(f"is a {kind} file; expected a displacement field as .nii.gz")
        with _open_nifti(path) as nifti:
            n = int(nifti.shape[-1])
            intent = int(nifti.header["intent_code"])
            if nifti.ndim != 5 or n not in (2, 3) or intent != 1007 or (n == 2 and nifti.shape[2] != 1):
                raise ImageError(
                    f"NIfTI of shape {nifti.shape} with intent {intent}; expected a displacement field "
                    "(x, y, 1, 1, 2) or (x, y, z, 1, 3) with intent 1007"
                )
            vectors = np.asarray(nifti.dataobj, dtype=np.float64).reshape(*nifti.shape[:n], n)
            geometry = _flat_geometry(nifti, tuple(int(size) for size in reversed(nifti.shape[:n])))
            geometry = replace(geometry, placement=_placement(nifti))
            moving = _moving_frame(nifti)
        millimetres = vectors.transpose(*reversed(range(n)), n)
        to_voxels = np.linalg.inv(geometry.matrix()[:n, :n])
        voxels = np.moveaxis(millimetres @ to_voxels.T, -1, 0).astype(np.float32)
        return DeformationField(torch.from_numpy(np.ascontiguousarray(voxels)), geometry, moving)
    except ImageError as error:
        raise ImageError(f"{path.name}: {error}") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path.name}: cannot be read ({error}); check the file") from error


def write_deformation(path: PathLike, field: DeformationField) -> None:
    """Write an ITK displacement field: float32, components x, y[, z] in LPS mm, pixels for a picture.

    ``SimpleITK.ReadImage`` gives a vector image of the same dimension; cast to float64 it makes a
    ``SimpleITK.DisplacementFieldTransform``. ITK takes the vectors of intent 1007 as they are in the file,
    so they are stored in LPS although the header's matrix is RAS. The same field gives the same bytes.

    Raises:
        ImageError: the path does not end in ``.nii.gz``.
    """
    path = Path(path)
    if not path.name.lower().endswith(".nii.gz"):
        raise ImageError(f"{path.name}: a displacement field is written as .nii.gz; rename it")
    n = len(field.geometry.shape)
    voxels = np.moveaxis(field.displacement.numpy().astype(np.float64), 0, -1)
    millimetres = voxels @ field.geometry.matrix()[:n, :n].T
    stored = millimetres.transpose(*reversed(range(n)), n).astype(np.float32)
    layout = stored.reshape(*stored.shape[:n], *[1] * (4 - n), n)
    content = nifti_bytes(layout, field.geometry, intent="vector", moving=field.moving)
    with write_whole(path) as temporary:
        temporary.write_bytes(content)
