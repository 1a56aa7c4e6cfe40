"""Reading and writing files: the only module that knows file formats.

Formats are recognised by content; only DICOM without its preamble needs its name, ``.dcm``. Every problem with
a file is an :class:`ImageError` with a one-line message that starts with the file's name. Outputs appear whole
or not at all.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin
import pydicom
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array

from bsafusion.deformation import DeformationField, MovingFrame
from bsafusion.image import (
    LARGEST_SIDE,
    SLICE_POSITION,
    Geometry,
    Image,
    ImageError,
    Modality,
    check_size,
    slice_geometry,
)

PathLike = str | os.PathLike[str]
PixelType = Literal["uint8", "uint16"]

COLORMAPS = {
    name: f"1.2.840.10008.1.5.{number}"
    for number, name in enumerate(
        ("hot-iron", "pet", "hot-metal-blue", "pet-20-step", "spring", "summer", "fall", "winter"), start=1
    )
}
"""The well-known colour palettes of DICOM (PS3.6, annex B) with their identifiers."""

LARGEST_LABEL = 2**24
"""Up to here every whole number is a float32."""

_HEAD_BYTES = 544
_NIFTI_HEADER_BYTES = 540
_LARGEST_OFFSET = 2**26  # of a NIfTI's voxels; before them are extensions, such as the header of a DICOM
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"RIFF": "a WebP or other RIFF file",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89HDF": "an HDF5 file",
    b"NRRD": "an NRRD file",
}
_MODALITY_TAGS = {"MR": Modality.MRI, "CT": Modality.CT, "PT": Modality.PET, "NM": Modality.SPECT}
# Where an enhanced DICOM keeps of each frame what a classic one states once.
_FRAME_GROUPS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_MM_PER_UNIT = (1.0, 1000.0, 1.0, 0.001)  # by NIfTI's code: unknown, m, mm, micron
_NIFTI_CLASSES: dict[int, Any] = {1: nib.Nifti1Image, 2: nib.Nifti2Image}
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# NIfTI-1 keeps 80 bytes of free text: what a 4x4 matrix cannot say about a 2-D grid is kept there.
_NOTE_PREFIX = "bsafusion "
_NOTE_MOVING = ", into "  # of a field: the grid it leads into, see _frame_note
_NOTE_PLACEMENT = "bsafusion placement "  # of a field, in a header extension: where its slice lies


_Facts = dict[str, str | float]
_FILTERS = threading.Lock()
_LITTER = re.compile(r"\.DS_Store|\.nfs.*|\.[0-9a-f]{8}-.*")
"""What a system, or a writer of ours that was killed (:func:`_temporary_sibling`), leaves in a folder."""


@dataclass(frozen=True)
class _Pixels:
    """What a format's reader found: ``array`` is ``C *S``."""

    array: NDArray[Any]
    geometry: Geometry
    dtype: str
    modality: Modality = Modality.UNKNOWN
    meta: dict[str, str | float] = field(default_factory=dict)


def read_image(
    path: PathLike, *, slice_index: int | None = None, modality: Modality = Modality.UNKNOWN, labels: bool = False
) -> Image:
    """Read one 2-D image.

    PNG, JPEG and TIFF (8 or 16 bit, grey or RGB, float TIFF) become pictures in pixel units; their DPI says
    nothing about the patient and is ignored. NIfTI and DICOM bring their geometry along. Three identical
    channels are read as one grey channel.

    Args:
        path: the file.
        slice_index: which slice of a 3-D NIfTI to take, along its last stored axis.
        modality: overrides what the file says, unless unknown.
        labels: it is a label map: its values are those that are stored, whatever they look like (a palette gives
            its indices), and one may fill it. Colours, and values that float32 would change, are refused.

    Raises:
        ImageError: the file is missing, not a supported image, damaged, or not one 2-D image.
    """
    path = Path(path)
    name = os.fsencode(path.name).decode("utf-8", "replace")  # JSON and pages hold no bytes that are not UTF-8
    shown = name or str(path)  # "." has no name
    try:
        kind = _recognise(path)
        pixels = _read_pixels(path, kind, slice_index, labels)
        if labels:
            _check_labels(pixels.array)
        array, meta = pixels.array, {"format": kind, **pixels.meta}
        if len(array) == 3 and (array == array[:1]).all():
            array = array[:1]
            meta["channels"] = "three identical channels, read as grey"
        if labels and len(array) == 3:
            raise ImageError("a label map in colour; expected one value a pixel, grey or with a palette; save it so")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Image(
            array=array,
            geometry=pixels.geometry,
            modality=pixels.modality if modality is Modality.UNKNOWN else modality,
            dtype=pixels.dtype,
            source=name,
            sha256=digest,
            meta=meta,
            labels=labels,
        )
    except ImageError as error:
        raise ImageError(f"{shown}: {error}") from error
    except OSError as error:
        raise ImageError(f"{shown}: cannot be read ({error}); check the file") from error


@contextmanager
def _quiet() -> Iterator[None]:
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


def _check_labels(array: NDArray[Any]) -> None:
    with np.errstate(over="ignore"):
        changed = array[(np.abs(array.astype(np.float64)) > LARGEST_LABEL) | (array.astype(np.float32) != array)]
    if changed.size:
        raise ImageError(
            f"label {changed.flat[0]} of {array.dtype} would not keep its value; expected whole numbers from "
            f"{-LARGEST_LABEL} to {LARGEST_LABEL}; renumber the labels"
        )


def _read_pixels(path: Path, kind: str, slice_index: int | None, labels: bool) -> _Pixels:
    if kind == "NIfTI":
        return _read_nifti(path, slice_index)
    if slice_index is not None:
        raise ImageError(f"{kind} holds one slice but slice_index={slice_index} was given; leave it out")
    return _read_dicom(path, labels) if kind == "DICOM" else _read_picture(path, kind, labels)


def _recognise(path: Path) -> str:
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


_PAIR = "is half of a .hdr/.img pair; expected a single .nii or .nii.gz; convert the pair to one"


# --- tables ---------------------------------------------------------------------


def read_csv(path: Path, *, what: str, columns: str, error: type[ValueError]) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV below its header, each with its number in the file and its cells by the names of the columns.

    Spaces around names and cells are removed; a cell that is missing is empty.

    Args:
        what: the file is called so in messages.
        columns: those that must be there, and in brackets those that may: ``id,fixed,moving[,task]``.
        error: raised for a file that is missing, not text in UTF-8 or not separated by commas, for a column that is
            missing or stands twice, and for a line with more cells than there are columns.
    """
    if not path.is_file():
        raise error(f"{path}: no such {what}; expected a CSV with columns {columns}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if line]
    except (UnicodeDecodeError, csv.Error) as problem:
        raise error(f"{path}: not a CSV in UTF-8 ({problem}); expected columns {columns}; save it so") from problem
    header = lines[0][1] if lines else []
    missing = [name for name in columns.partition("[")[0].split(",") if name not in header]
    if missing:
        mark = next((name for char, name in _SEPARATORS.items() if header and char in header[0]), None)
        if mark is not None and len(header) == 1:
            raise error(f"{path}: separated by {mark}, expected commas; save it with commas")
        found = ", ".join(header) or "none"
        raise error(f"{path}: no column {', '.join(missing)} (found: {found}); add it to the header")
    twice = [name for name in re.findall(r"\w+", columns) if header.count(name) > 1]
    if twice:
        raise error(f"{path}: column {twice[0]} stands twice; expected it once; rename one")
    rows = []
    for number, cells in lines[1:]:
        if any(cells[len(header) :]):
            raise error(
                f"{path}, line {number}: {len(cells)} cells for {len(header)} columns; expected one a column; "
                "put cells with commas in quotes"
            )
        rows.append((number, dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))))
    return rows


_SEPARATORS = {";": "semicolons", "\t": "tabs"}


# --- PNG, JPEG, TIFF ---------------------------------------------------------------------


def _read_picture(path: Path, kind: str, labels: bool) -> _Pixels:
    with _quiet():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            # Given a path, Pillow memory-maps uncompressed TIFF and scrambles those stored on their side.
            with path.open("rb") as stream, PIL.Image.open(stream, formats=[kind]) as picture:
                return _picture_pixels(picture, path, kind, labels)
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            raise ImageError("far more pixels than 2048 x 2048; crop or downsample it first") from error
        except ImageError:
            raise
        except PIL.UnidentifiedImageError as error:
            samples, pixel_type = _tiff_samples(path) if kind == "TIFF" else (1, "")
            if pixel_type and pixel_type not in ("uint8", "uint16", "float32"):
                raise ImageError(
                    f"TIFF of {pixel_type} pixels; expected uint8, uint16 or float32; convert it"
                ) from error
            if samples not in (1, 3):
                raise ImageError(_CHANNELS.format(samples)) from error
            raise ImageError(f"damaged or unsupported {kind} (unknown header); export it again") from error
        # Pillow raises nearly every type on damaged files.
        except Exception as error:
            raise ImageError(f"damaged or unsupported {kind} ({_one_line(error)}); export it again") from error


def _tiff_samples(path: Path) -> tuple[int, str]:
    """How many samples a pixel of a TIFF has, and what numpy would call their type; also where Pillow cannot open it.

    ``(1, "")`` where its first directory is damaged.
    """
    tags = PIL.TiffImagePlugin
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
            directory = tags.ImageFileDirectory_v2(head + (stream.read(8) if 43 in head[2:4] else b""))
            stream.seek(directory.next)
            directory.load(stream)
        kind = {1: "uint", 2: "int", 3: "float", 5: "complex", 6: "complex"}[directory.get(tags.SAMPLEFORMAT, (1,))[0]]
        return int(directory.get(tags.SAMPLESPERPIXEL, 1)), f"{kind}{directory[tags.BITSPERSAMPLE][0]}"
    except Exception:
        return 1, ""


_CHANNELS = "TIFF with {} channels; expected 1 (grey) or 3 (RGB); save one of them on its own"


def _check_tiff(picture: PIL.TiffImagePlugin.TiffImageFile, path: Path) -> None:
    """Refuse what Pillow or ITK would read otherwise than it is stored."""
    tags = PIL.TiffImagePlugin
    # Not n_frames: counting takes quadratic time, and it forgives a loop of pages, in which ITK hangs.
    if picture.tag_v2.next:
        raise ImageError("TIFF with more than one page; expected one image; save one page to a file of its own")
    packed = picture.tag_v2.get(tags.COMPRESSION, 1) != 1
    # libtiff gives these in the byte order of the machine, and Pillow swaps them once more.
    if packed and picture.tag_v2.prefix == b"MM" and picture.mode in ("I", "F"):
        raise ImageError(
            f"big-endian compressed TIFF of {_tiff_samples(path)[1]}; save it uncompressed or little-endian"
        )
    side = max(int(picture.tag_v2.get(tag, 0)) for tag in (tags.TILEWIDTH, tags.TILELENGTH))
    if side > 2 * LARGEST_SIDE:  # memory is taken for a whole tile
        raise ImageError(
            f"TIFF with tiles of {side} pixels; expected at most {2 * LARGEST_SIDE}; save it without tiles"
        )
    # Samples that are neither colour nor alpha: Pillow drops them without a word.
    samples = picture.tag_v2.get(tags.SAMPLESPERPIXEL, 1)
    photometric = int(picture.tag_v2.get(tags.PHOTOMETRIC_INTERPRETATION, 1))
    extra = samples - {0: 1, 1: 1, 2: 3}.get(photometric, samples)
    alpha = [sample for sample in picture.tag_v2.get(tags.EXTRASAMPLES, ()) if sample in (1, 2)]
    if extra > len(alpha):
        raise ImageError(_CHANNELS.format(samples))


def _picture_pixels(picture: PIL.Image.Image, path: Path, kind: str, labels: bool) -> _Pixels:
    if isinstance(picture, PIL.TiffImagePlugin.TiffImageFile):
        _check_tiff(picture, path)
    elif (pages := getattr(picture, "n_frames", 1)) > 1:
        raise ImageError(f"{kind} with {pages} pages; expected one image; save one page to a file of its own")
    check_size((picture.height, picture.width))
    orientation = int(picture.getexif().get(0x0112, 1))
    meta: dict[str, str | float] = {} if orientation == 1 else {"exif_orientation": float(orientation)}
    if _has_16_bit_colour(picture, path):
        if orientation != 1:
            raise ImageError("16-bit colour with an EXIF orientation; expected none; save it upright")
        array, dtype = _read_16_bit_colour(picture, path, kind), "uint16"
    else:
        array, dtype = _decode(PIL.ImageOps.exif_transpose(picture), kind, labels)
        if labels:
            array = _as_stored(array, picture, path)
        elif dtype == "uint16" and _white_is_zero(picture):
            array = 65535 - array
        stored = _tiff_samples(path)[1] if kind == "TIFF" and picture.mode in ("L", "I") else ""
        if stored in ("int8", "int16", "uint32"):  # Pillow reads these as uint8, int32 and int32.
            array, dtype = array.astype(stored), stored
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return _Pixels(array, Geometry.picture(array.shape[1:]), dtype, meta=meta)


def _has_16_bit_colour(picture: PIL.Image.Image, path: Path) -> bool:
    if isinstance(picture, PIL.TiffImagePlugin.TiffImageFile):
        bits = picture.tag_v2.get(PIL.TiffImagePlugin.BITSPERSAMPLE, (1,))
        return len(bits) > 1 and max(bits) == 16 and picture.mode != "CMYK"
    if picture.format != "PNG":
        return False
    depth, colour_type = _png_depth(path)
    if depth == 16 and colour_type == 4:
        raise ImageError("16-bit grey with alpha; expected grey alone; save it without alpha")
    return depth == 16 and colour_type in (2, 6)


def _png_depth(path: Path) -> tuple[int, int]:
    """Bits a sample, and the colour type: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGB + alpha."""
    with path.open("rb") as stream:
        depth, colour_type = stream.read(26)[24:]
    return depth, colour_type


def _significant_bits(path: Path) -> int:
    """Of a 16-bit colour PNG: ITK shifts the others out, and the picture comes out darker."""
    with path.open("rb") as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8 and head[4:] != b"IDAT":
            if head[4:] == b"sBIT":
                return min(stream.read(3))
            stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return 16


def _as_stored(array: NDArray[Any], picture: PIL.Image.Image, path: Path) -> NDArray[Any]:
    """Undo what Pillow does for looks at up to 8 bit: 2 and 4 bit spread over 8, white-is-zero mirrored."""
    if picture.mode not in ("1", "L"):
        return array
    bits = 8
    if isinstance(picture, PIL.TiffImagePlugin.TiffImageFile):
        bits = picture.tag_v2.get(PIL.TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
    elif picture.format == "PNG":
        bits, _ = _png_depth(path)
    white = 1 if picture.mode == "1" else 255
    levels: NDArray[Any] = white - array if _white_is_zero(picture) else array
    return levels // (white // ((1 << bits) - 1))


def _white_is_zero(picture: PIL.Image.Image) -> bool:
    # Pillow inverts such files itself at 8 bit but not at 16.
    return (
        isinstance(picture, PIL.TiffImagePlugin.TiffImageFile)
        and picture.tag_v2.get(PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    )


def _read_16_bit_colour(picture: PIL.Image.Image, path: Path, kind: str) -> NDArray[Any]:
    # ITK would reduce these to 8 bit and print warnings.
    if isinstance(picture, PIL.TiffImagePlugin.TiffImageFile) and (
        picture.tag_v2.get(PIL.TiffImagePlugin.PLANAR_CONFIGURATION, 1) != 1
        or PIL.TiffImagePlugin.TILEWIDTH in picture.tag_v2
    ):
        raise ImageError(
            f"16-bit colour {kind} in tiles or separate planes; expected strips of whole pixels; save it as PNG"
        )
    if kind == "PNG" and (bits := _significant_bits(path)) < 16:
        raise ImageError(
            f"16-bit colour PNG with {bits} significant bits (sBIT); expected 16; save it without that note"
        )
    # Pillow reduces all of them to 8 bit.
    try:
        array: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO=f"{kind}ImageIO"))
    except RuntimeError as error:
        raise ImageError(f"damaged or unsupported 16-bit {kind}; export it again") from error
    if array.dtype != np.uint16:
        raise ImageError(f"unsupported kind of 16-bit {kind}; expected strips of whole pixels; save it as PNG")
    if array.shape[-1] == 4:
        if (array[..., -1] != 65535).any():
            raise ImageError(_TRANSPARENT)
        array = array[..., :-1]
    return array


_TRANSPARENT = "has transparent pixels; expected an opaque image; flatten it onto its background first"


def _decode(picture: PIL.Image.Image, kind: str, labels: bool) -> tuple[NDArray[Any], str]:
    """``(H, W)`` or ``(H, W, 3)`` and the file's pixel type."""
    if labels and picture.mode in ("P", "1", "L"):
        return np.asarray(picture).astype(np.uint8), "uint8"
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        if picture.mode.startswith("I"):
            raise ImageError(_TRANSPARENT)
        opaque = picture.convert("RGBA")
        if opaque.getchannel("A").getextrema() != (255, 255):
            raise ImageError(_TRANSPARENT)
        picture = opaque.convert("RGB")
    picture = picture.convert({"P": "RGB", "1": "L"}.get(picture.mode, picture.mode))
    if picture.mode not in ("L", "RGB", "I", "F") and not picture.mode.startswith("I;16"):
        raise ImageError(f"{kind} with {picture.mode} colours; expected grey or RGB; convert it first")
    array = np.asarray(picture)
    # Before version 11 Pillow opened 16-bit PNG in 32-bit mode.
    dtype = "uint16" if (kind, picture.mode) == ("PNG", "I") else array.dtype.name
    return array, dtype


# --- NIfTI ---------------------------------------------------------------------


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
        raise ImageError(f"damaged or unsupported NIfTI ({_one_line(error)}); export it again") from error


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


@_quiet()
def _read_nifti(path: Path, slice_index: int | None) -> _Pixels:
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
    return _Pixels(pixels.swapaxes(1, 2), geometry, np.dtype(stored).name, meta=meta | facts)


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
            f"3-D volume of shape {shape} where a slice is meant: pass slice_index "
            "(on the command line --fixed-slice K, --moving-slice K, of warp --image-slice K, and the like)"
        )
    if not 0 <= slice_index < shape[2]:
        raise ImageError(f"slice_index={slice_index} of a volume of shape {shape}; expected 0..{shape[2] - 1}")
    return (0, 1), 2, slice_index


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


def _disagreement(nifti: Any, *, x: int, y: int, through: int | None, index: int) -> _Facts:
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


def _nifti_geometry(nifti: Any, *, x: int, y: int, through: int | None, index: int) -> tuple[Geometry, _Facts]:
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
    geometry, facts = _placed(shape, spacing, origin, affine[:3, x], affine[:3, y], to_next)
    facts |= _disagreement(nifti, x=x, y=y, through=through, index=index)
    if through is None and geometry.plane == "axial":
        # ITK writes every 2-D image as if it were axial and at 0, whatever plane it was cut from.
        unknown = replace(geometry, plane=None, placement=None)
        return unknown, {k: v for k, v in facts.items() if k != SLICE_POSITION}
    return geometry, facts


def _placed(
    shape: tuple[int, int],
    spacing: tuple[float, float],
    origin: NDArray[np.float64],
    x_axis: NDArray[np.float64],
    y_axis: NDArray[np.float64],
    through: NDArray[np.float64] | None,
) -> tuple[Geometry, _Facts]:
    """:func:`bsafusion.image.slice_geometry`, and what a 2-D geometry cannot say as facts for :attr:`Image.meta`.

    ``through``: mm to the next slice, 1 mm across the slice where that is None or 0.
    """
    if through is None or not through.any():
        normal = np.cross(x_axis, y_axis)
        through = normal / (np.linalg.norm(normal) or 1.0)
    geometry, tilt, across = slice_geometry(
        shape=shape, spacing=spacing, origin=origin, x_axis=x_axis, y_axis=y_axis, through=through
    )
    facts: _Facts = {SLICE_POSITION: round(across, 3)}
    return geometry, facts | ({"oblique_degrees": tilt} if tilt > 0.01 else {})


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


def _nifti_bytes(
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


# --- DICOM ---------------------------------------------------------------------


def _read_dicom(path: Path, labels: bool) -> _Pixels:
    with _quiet():
        try:
            dataset = pydicom.dcmread(path, force=True)
            if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
                raise ImageError("DICOM without pixels; expected an image; choose one of the slices")
            frames = int(dataset.get("NumberOfFrames") or 1)
            if frames > 1:
                raise ImageError(f"DICOM with {frames} frames; expected one slice; extract one frame to a file")
            check_size((int(dataset.Rows), int(dataset.Columns)))
            _state_frame(dataset)
            syntax = _check_decoder(dataset)
            array, dtype, meta = _dicom_array(dataset, labels)
            geometry, facts = _dicom_geometry(dataset)
            tag = str(dataset.get("Modality", ""))
        except ImageError:
            raise
        # pydicom raises nearly every type on damaged files.
        except Exception as error:
            raise ImageError(f"damaged or unsupported DICOM ({_one_line(error)}); export it again") from error
    meta["transfer_syntax"] = syntax
    return _Pixels(array, geometry, dtype, _MODALITY_TAGS.get(tag, Modality.UNKNOWN), meta | facts)


def _state_frame(dataset: pydicom.Dataset) -> None:
    """Make a classic DICOM of an enhanced one with a single frame: what is said of the frame goes before the rest."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for frame in dataset.get(groups) or ():
            for group, keywords in _FRAME_GROUPS.items():
                for item in frame.get(group) or ():
                    for keyword in keywords:
                        if keyword in item:
                            dataset[keyword] = item[keyword]


def read_colormap(name: str) -> NDArray[np.float32]:
    """One of :data:`COLORMAPS` as pydicom ships it, ``256 3`` in [0, 1].

    Raises:
        ValueError: an unknown name.
    """
    if name not in COLORMAPS:
        raise ValueError(f"unknown colour map {name!r}; expected one of {', '.join(COLORMAPS)}")
    table = apply_color_lut(np.arange(256, dtype=np.uint8), palette=COLORMAPS[name])
    return (table / 255).astype(np.float32)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_decoder(dataset: pydicom.Dataset) -> str:
    """The transfer syntax's name, if its pixels can be decoded here."""
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if syntax is None:
        # A file without its header cannot be compressed; pydicom has found out the byte order.
        little = dataset.original_encoding[1] is not False
        syntax = pydicom.uid.ImplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
    if syntax.is_encapsulated:
        _check_boxes(next(generate_frames(dataset.PixelData, number_of_frames=1)))
        try:
            available = get_decoder(syntax).is_available
        except RuntimeError:  # pydicom does not know the syntax at all
            available = False
        if not available:
            raise ImageError(f'DICOM compressed as {syntax.name}; no decoder here; pip install ".[dicom]" in the clone')
    return str(syntax.name)


def _check_boxes(frame: bytes) -> None:
    """Refuse a JPEG 2000 file with a box that ends before it begins: pydicom would look for the pixels for ever."""
    position = 12 if frame.startswith(b"\0\0\0\x0cjP  ") else len(frame)
    while position < len(frame) and frame[position + 4 : position + 8] != b"jp2c":
        length = int.from_bytes(frame[position : position + 4], "big")
        if length < 8:
            raise ImageError(f"damaged JPEG 2000 in a DICOM (a box of {length} bytes); export it again")
        position += length


def _dicom_array(dataset: pydicom.Dataset, labels: bool) -> tuple[NDArray[Any], str, dict[str, str | float]]:
    try:
        raw = pixel_array(dataset)
    except RuntimeError as error:
        raise ImageError(
            f'DICOM pixels cannot be decoded ({_one_line(error)}); pip install ".[dicom]" in the clone '
            "or export it uncompressed"
        ) from error
    photometric = str(dataset.PhotometricInterpretation)
    meta: dict[str, str | float] = {}
    if photometric == "PALETTE COLOR" and not labels:
        if "SegmentedRedPaletteColorLookupTableData" in dataset:  # a few bytes may stand for gigabytes
            raise ImageError("DICOM with a segmented palette; expected a plain one; export it as RGB")
        raw = apply_color_lut(raw, dataset)[..., :3]
        if dataset.RedPaletteColorLookupTableDescriptor[2] == 8 and raw.max() <= 255:
            raw = raw.astype(np.uint8)  # entries of 8 bits may be stored in words of 16
    if raw.ndim == 3:
        return np.moveaxis(raw, -1, 0), raw.dtype.name, meta
    array = apply_modality_lut(raw, dataset)
    # A rescaled value is not one that was stored.
    stored = raw.dtype.name if np.array_equal(array, raw) else "float64"
    if photometric == "MONOCHROME1" and not labels:
        array = array.astype(np.float64)
        array = array.max() + array.min() - array
        meta["inverted"] = "MONOCHROME1: values mirrored so that more is brighter"
    return array[None], stored, meta


def _dicom_geometry(dataset: pydicom.Dataset) -> tuple[Geometry, _Facts]:
    shape = (int(dataset.Rows), int(dataset.Columns))
    if not dataset.get("PixelSpacing"):
        return Geometry.picture(shape), {}
    # PixelSpacing is between rows (y), then between columns (x): DICOM PS3.3 10.7.1.3.
    y_spacing, x_spacing = (float(value) for value in dataset.PixelSpacing)
    spacing = (x_spacing, y_spacing)
    orientation, position = dataset.get("ImageOrientationPatient"), dataset.get("ImagePositionPatient")
    if not orientation or not position:
        return replace(Geometry.picture(shape), physical=True, spacing=spacing), {}
    cosines = np.asarray(orientation, dtype=np.float64)
    through = np.cross(cosines[:3], cosines[3:]) * float(dataset.get("SliceThickness") or 0.0)
    return _placed(shape, spacing, np.asarray(position, dtype=np.float64), cosines[:3], cosines[3:], through)


# --- writing ---------------------------------------------------------------------


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(4)}-{path.name}")


@contextmanager
def write_whole(path: PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder with the same suffix; move it to ``path`` if all went well.

    On an exception the temporary file is removed and ``path`` is left as it was.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_between(path: PathLike, begin: str, end: str, content: str) -> None:
    """Replace what stands between two marks of a text file, each mark a line of its own; the file changes as a whole.

    Raises:
        ValueError: the file has no ``begin`` with ``end`` after it.
    """
    before, _, rest = Path(path).read_text(encoding="utf-8").partition(f"{begin}\n")
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no line {begin!r} with {end!r} after it; put both where the text belongs")
    with write_whole(path) as aside:
        aside.write_text(f"{before}{begin}\n{content.rstrip()}\n{end}{after}", encoding="utf-8")


@contextmanager
def atomic_folder(
    out: PathLike, *, overwrite: bool = False, marker: str = "report.json", holds: Collection[str] = ()
) -> Iterator[Path]:
    """Give a temporary folder beside ``out``; rename it to ``out`` if all went well, remove it otherwise.

    Args:
        out: the folder to make. Its parents are made as needed.
        overwrite: replace an existing folder, but only one that holds ``marker``, and nothing that is not among
            ``holds``: a wrong path must not cost the user's own files.
        marker: the file by which a result folder is known.
        holds: names of the files that a result may have.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: as :func:`check_replaceable`.
    """
    out = Path(out)
    check_replaceable(out, overwrite=overwrite, marker=marker, holds=holds)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(out)
    temporary.mkdir()
    try:
        yield temporary
        check_replaceable(out, overwrite=overwrite, marker=marker, holds=holds)
        if out.exists():
            old = _temporary_sibling(out)
            try:
                os.replace(out, old)
                os.replace(temporary, out)
            except BaseException:
                if old.exists() and not out.exists():
                    os.replace(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)  # the new result is there, whatever remains of the old one
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(
    out: Path, *, overwrite: bool = False, marker: str = "report.json", holds: Collection[str] = ()
) -> None:
    """Refuse, before any work, what :func:`atomic_folder` could not make or may not replace; the same arguments.

    Raises:
        FileExistsError: ``out`` is in the way and may not be replaced.
        NotADirectoryError, PermissionError: as :func:`check_writable`, of the folder that would hold it.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise FileExistsError(f"{out} is a file or a link; expected a folder to make; choose another path")
    if os.path.ismount(out):
        raise FileExistsError(f"{out} is a mount point, which cannot be replaced; choose a folder in it")
    check_writable(out.parent)
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists and is not empty; choose another folder or allow overwriting")
    if not (out / marker).is_file():
        raise FileExistsError(f"{out} has no {marker}, so it is not a result folder; remove it or choose another")
    names = sorted(path.name for path in out.iterdir())
    others = [name for name in names if name not in {marker, *holds} and not _LITTER.fullmatch(name)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise FileExistsError(f"{out} holds {others[0]}{more}, which is no part of a result; move it away first")


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made, or that cannot be made itself.

    Raises:
        NotADirectoryError: it, or what should hold it, is a file or a link that leads nowhere.
        PermissionError: it, or the nearest folder above it that there is, may not be written to.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not there.exists():
        raise NotADirectoryError(
            f"{there} is a link that leads nowhere; expected a folder for the result; choose another path"
        )
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; expected a folder for the result; choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} may not be written to; expected a folder for the result; choose another path")


def write_csv(path: PathLike, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table as UTF-8 CSV, whole or not at all."""
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *lines])


def write_json(path: PathLike, data: Any) -> None:
    """Write ``data`` as indented UTF-8 JSON, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_image(
    path: PathLike,
    image: Image | NDArray[Any],
    *,
    value_range: tuple[float, float] | None = None,
    dtype: PixelType | None = None,
    geometry: Geometry | None = None,
    labels: bool = False,
) -> None:
    """Write an image; the suffix chooses the format.

    ``.png``, ``.tif``, ``.tiff`` hold 2-D integers: ``value_range`` (low, high) is spread over the pixel
    type, rounded and clipped. ``.nii.gz`` holds 2-D or 3-D grey values as they are (float32) unless
    ``dtype`` is given, RGB as uint8, and the geometry; SimpleITK reads it back as an image of the same
    dimension, and a slice with a :attr:`Geometry.placement` as a volume of one slice that lies there.

    Args:
        path: where to.
        image: an :class:`Image`, or an array ``C *S`` with C 1 or 3.
        value_range: the values that become the smallest and the largest integer. An :class:`Image` that was
            read with the pixel type to be written needs none: its values are kept.
        dtype: ``uint8`` or ``uint16``; by default the image's own type if it is one of these, else ``uint8``.
        geometry: needed to write an array as NIfTI.
        labels: it is a label map: as NIfTI its grey values, if they are whole numbers, are kept in the smallest
            integer type that holds them; at most :data:`LARGEST_LABEL`.

    Raises:
        ImageError: suffix, shape, values or range do not fit.
    """
    path = Path(path)
    array = image.array if isinstance(image, Image) else np.asarray(image)
    stored = image.dtype if isinstance(image, Image) else None
    nifti = path.name.lower().endswith(".nii.gz")
    if not nifti and path.suffix.lower() not in (".png", ".tif", ".tiff"):
        raise ImageError(f"{path.name}: cannot write {path.suffix or 'no suffix'}; use .png, .tif, .tiff or .nii.gz")
    if array.ndim not in ((3, 4) if nifti else (3,)) or array.shape[0] not in (1, 3) or array.size == 0:
        raise ImageError(f"{path.name}: array of shape {array.shape}; expected channels first, (1 or 3, H, W)")
    if not np.isfinite(array).all():
        raise ImageError(f"{path.name}: NaN or infinite values; expected finite ones; replace them first")
    if nifti:
        grid = image.geometry if isinstance(image, Image) else geometry
        if grid is None or grid.shape != array.shape[1:]:
            raise ImageError(f"{path.name}: NIfTI needs the geometry of a grid {array.shape[1:]}; pass geometry=")
        keep = len(array) == 1 and dtype is None and value_range is None
        exact = _smallest_type(array) if labels else np.dtype(np.float32)
        values = array.astype(exact) if keep else _quantise(array, value_range, dtype or "uint8", stored, path)
        layout = _nifti_layout(values)
        content = _nifti_bytes(layout if grid.placement is None else layout[..., None], grid)
        with write_whole(path) as temporary:
            temporary.write_bytes(content)
        return
    pixel_type: PixelType = dtype or ("uint16" if stored == "uint16" else "uint8")
    _write_picture(path, _quantise(array, value_range, pixel_type, stored, path))


def _smallest_type(labels: NDArray[Any]) -> np.dtype[Any]:
    """Of whole numbers up to LARGEST_LABEL; float32 for others."""
    if (labels % 1).any():
        return np.dtype(np.float32)
    kinds = (np.iinfo(kind) for kind in ("uint8", "int16", "uint16", "int32"))
    return next(kind.dtype for kind in kinds if kind.min <= labels.min() and labels.max() <= kind.max)


def _quantise(
    array: NDArray[Any],
    value_range: tuple[float, float] | None,
    dtype: PixelType,
    stored: str | None,
    path: Path,
) -> NDArray[Any]:
    largest = float(np.iinfo(dtype).max)
    if value_range is None:
        if stored != dtype:
            raise ImageError(f"{path.name}: {stored or 'array'} values as {dtype} need value_range=(low, high)")
        value_range = (0.0, largest)
    low, high = value_range
    if not (np.isfinite([low, high]).all() and high > low):
        raise ImageError(f"{path.name}: value_range {value_range}; expected finite (low, high) with low < high")
    scaled = (array.astype(np.float64) - low) * (largest / (high - low))
    return np.clip(np.rint(scaled), 0, largest).astype(dtype)


def _nifti_layout(array: NDArray[Any]) -> NDArray[Any]:
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


def _write_picture(path: Path, array: NDArray[Any]) -> None:
    pixels = array[0] if len(array) == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1))
    with write_whole(path) as temporary:
        if pixels.ndim == 3 and pixels.dtype == np.uint16:
            # Pillow has no 16-bit colour. ITK knows .tif and .TIF, but not .Tif.
            kind = "PNG" if path.suffix.lower() == ".png" else "TIFF"
            picture = sitk.GetImageFromArray(pixels, isVector=True)
            sitk.WriteImage(picture, str(temporary), imageIO=f"{kind}ImageIO")
        else:
            PIL.Image.fromarray(pixels).save(temporary)


# --- deformation fields ---------------------------------------------------------------------


@_quiet()
def read_deformation(path: PathLike) -> DeformationField:
    """Read an ITK displacement field: NIfTI, intent 1007 (VECTOR), components x, y[, z] in LPS mm.

    Fields of other tools are accepted if they follow ITK. One with spacing 1, origin 0 and identity
    direction is taken as a field in pixels.

    Raises:
        ImageError: the file is missing, damaged, or not such a field.
    """
    path = Path(path)
    try:
        kind = _recognise(path)
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
    content = _nifti_bytes(layout, field.geometry, intent="vector", moving=field.moving)
    with write_whole(path) as temporary:
        temporary.write_bytes(content)
