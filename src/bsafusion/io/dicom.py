"""Single DICOM slices, and the colour palettes of the standard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array

from bsafusion.errors import one_line
from bsafusion.image import Geometry, ImageError, Modality, check_size
from bsafusion.io.formats import Facts, Pixels, placed, quiet

COLORMAPS = {
    name: f"1.2.840.10008.1.5.{number}"
    for number, name in enumerate(
        ("hot-iron", "pet", "hot-metal-blue", "pet-20-step", "spring", "summer", "fall", "winter"), start=1
    )
}
"""The well-known colour palettes of DICOM (PS3.6, annex B) with their identifiers."""

_MODALITY_TAGS = {"MR": Modality.MRI, "CT": Modality.CT, "PT": Modality.PET, "NM": Modality.SPECT}
# Where an enhanced DICOM keeps of each frame what a classic one states once.
_FRAME_GROUPS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}


def read_colormap(name: str) -> NDArray[np.float32]:
    """One of :data:`COLORMAPS` as pydicom ships it, ``256 3`` in [0, 1].

    Raises:
        ValueError: an unknown name.
    """
    if name not in COLORMAPS:
        raise ValueError(f"unknown colour map {name!r}; expected one of {', '.join(COLORMAPS)}")
    table = apply_color_lut(np.arange(256, dtype=np.uint8), palette=COLORMAPS[name])
    return (table / 255).astype(np.float32)


def read_dicom(path: Path, labels: bool) -> Pixels:
    """Read a DICOM of one slice, with its geometry in LPS mm; as a label map the stored values."""
    with quiet():
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
            raise ImageError(f"damaged or unsupported DICOM ({one_line(error)[:200]}); export it again") from error
    meta["transfer_syntax"] = syntax
    return Pixels(array, geometry, dtype, _MODALITY_TAGS.get(tag, Modality.UNKNOWN), meta | facts)


def _state_frame(dataset: pydicom.Dataset) -> None:
    """Make a classic DICOM of an enhanced one with a single frame: what is said of the frame goes before the rest."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for frame in dataset.get(groups) or ():
            for group, keywords in _FRAME_GROUPS.items():
                for item in frame.get(group) or ():
                    for keyword in keywords:
                        if keyword in item:
                            dataset[keyword] = item[keyword]


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
            f'DICOM pixels cannot be decoded ({one_line(error)[:200]}); pip install ".[dicom]" in the clone '
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


def _dicom_geometry(dataset: pydicom.Dataset) -> tuple[Geometry, Facts]:
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
    return placed(shape, spacing, np.asarray(position, dtype=np.float64), cosines[:3], cosines[3:], through)
