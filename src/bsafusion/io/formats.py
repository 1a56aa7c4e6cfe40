"""Which format a file has, and what the readers of all formats share."""

from __future__ import annotations

import gzip
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bsafusion.image import SLICE_POSITION, Geometry, ImageError, Modality, slice_geometry

Facts = dict[str, str | float]
_FILTERS = threading.Lock()
_HEAD_BYTES = 544
_NIFTI_HEADER_BYTES = 540
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"RIFF": "a WebP or other RIFF file",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89HDF": "an HDF5 file",
    b"NRRD": "an NRRD file",
}
_PAIR = "is half of a .hdr/.img pair; expected a single .nii or .nii.gz; convert the pair to one"


@dataclass(frozen=True)
class Pixels:
    """What a format's reader found: ``array`` is ``C *S``."""

    array: NDArray[Any]
    geometry: Geometry
    dtype: str
    modality: Modality = Modality.UNKNOWN
    meta: dict[str, str | float] = field(default_factory=dict)


def recognise(path: Path) -> str:
    """The format, from the first bytes: PNG, JPEG, TIFF, NIfTI or DICOM."""
    if not path.exists():
        raise ImageError(f"no such file in {path.parent.absolute()}; check the path")
    if path.is_dir():
        raise ImageError("is a folder; expected one image file; choose a file in it")
    if not path.is_file():  # reading a pipe could wait for ever
        raise ImageError("is a pipe or a device; expected an image file; save it as one")
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise ImageError("is empty (0 bytes); expected an image; copy or export it again")
    # First, because the free 128 bytes before it may look like a TIFF.
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head.startswith(b"\x1f\x8b"):
        return _recognise_gzip(path)
    if _is_nifti(head):
        return "NIfTI"
    if _is_text(head):
        raise ImageError("is a text file; expected PNG, JPEG, TIFF, NIfTI or DICOM")
    if path.suffix.lower() in (".hdr", ".img"):
        raise ImageError(_PAIR)
    if path.suffix.lower() == ".dcm":
        return "DICOM"
    found = next((name for magic, name in _OTHER_FORMATS.items() if head.startswith(magic)), None)
    found = found or f"an unknown format (first bytes {head[:4].hex(' ')})"
    raise ImageError(f"is {found}; expected PNG, JPEG, TIFF, NIfTI or DICOM; convert it first")


def _is_text(head: bytes) -> bool:
    printable = all(byte > 31 or byte in b"\t\n\r\f" for byte in head)
    return printable and sum(byte < 128 for byte in head) > len(head) / 2


def _recognise_gzip(path: Path) -> str:
    try:
        with gzip.open(path) as stream:
            head = stream.read(_NIFTI_HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"damaged gzip file ({error}); copy or export it again") from error
    if not _is_nifti(head):
        raise ImageError("is gzip-compressed but not NIfTI; decompress it first")
    return "NIfTI"


def _is_nifti(head: bytes) -> bool:
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise ImageError(_PAIR)
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of other libraries: odd metadata is no reason to complain, and what is used is checked here.

    The filters are those of the whole process, so one thread at a time changes them and puts them back.
    """
    log = nib.imageglobals.logger
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = before


def placed(
    shape: tuple[int, int],
    spacing: tuple[float, float],
    origin: NDArray[np.float64],
    x_axis: NDArray[np.float64],
    y_axis: NDArray[np.float64],
    through: NDArray[np.float64] | None,
) -> tuple[Geometry, Facts]:
    """:func:`bsafusion.image.slice_geometry`, and what a 2-D geometry cannot say as facts for :attr:`Image.meta`.

    ``through``: mm to the next slice, 1 mm across the slice where that is None or 0.
    """
    if through is None or not through.any():
        normal = np.cross(x_axis, y_axis)
        through = normal / (np.linalg.norm(normal) or 1.0)
    geometry, tilt, across = slice_geometry(
        shape=shape, spacing=spacing, origin=origin, x_axis=x_axis, y_axis=y_axis, through=through
    )
    facts: Facts = {SLICE_POSITION: round(across, 3)}
    return geometry, facts | ({"oblique_degrees": tilt} if tilt > 0.01 else {})
