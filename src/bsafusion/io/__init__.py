"""Images and deformation fields in and out; each file format has a module here.

Formats are recognised by content; only DICOM without its preamble needs its name, ``.dcm``. Every problem with
a file is an :class:`ImageError` with a one-line message that starts with the file's name. Outputs appear whole
or not at all.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsafusion.files import PathLike, write_whole
from bsafusion.image import Geometry, Image, ImageError, Modality
from bsafusion.io.dicom import COLORMAPS, read_colormap, read_dicom
from bsafusion.io.formats import Pixels, recognise
from bsafusion.io.nifti import nifti_bytes, nifti_layout, read_deformation, read_nifti, write_deformation
from bsafusion.io.pictures import read_picture, write_picture

__all__ = [
    "COLORMAPS",
    "LARGEST_LABEL",
    "PixelType",
    "read_colormap",
    "read_deformation",
    "read_image",
    "write_deformation",
    "write_image",
    "write_like",
]

PixelType = Literal["uint8", "uint16"]
LARGEST_LABEL = 2**24
"""Up to here every whole number is a float32."""


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
        kind = recognise(path)
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


def _read_pixels(path: Path, kind: str, slice_index: int | None, labels: bool) -> Pixels:
    if kind == "NIfTI":
        return read_nifti(path, slice_index)
    if slice_index is not None:
        raise ImageError(f"{kind} holds one slice but slice_index={slice_index} was given; leave it out")
    return read_dicom(path, labels) if kind == "DICOM" else read_picture(path, kind, labels)


def _check_labels(array: NDArray[Any]) -> None:
    with np.errstate(over="ignore"):
        changed = array[(np.abs(array.astype(np.float64)) > LARGEST_LABEL) | (array.astype(np.float32) != array)]
    if changed.size:
        raise ImageError(
            f"label {changed.flat[0]} of {array.dtype} would not keep its value; expected whole numbers from "
            f"{-LARGEST_LABEL} to {LARGEST_LABEL}; renumber the labels"
        )


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
        layout = nifti_layout(values)
        content = nifti_bytes(layout if grid.placement is None else layout[..., None], grid)
        with write_whole(path) as temporary:
            temporary.write_bytes(content)
        return
    pixel_type: PixelType = dtype or ("uint16" if stored == "uint16" else "uint8")
    write_picture(path, _quantise(array, value_range, pixel_type, stored, path))


def write_like(path: PathLike, array: NDArray[Any], source: Image, *, geometry: Geometry) -> None:
    """Write values of ``source`` that were brought to another grid, in its own pixel type.

    Label maps stay whole numbers; as NIfTI grey values are kept as they are. Its folder is made as needed.

    Args:
        path, array, geometry: as :func:`write_image`; ``array`` in the units of ``source``.
        source: the image that the values are of.

    Raises:
        ImageError: the format cannot hold these values.
    """
    path = Path(path)
    low, high = float(source.array.min()), float(source.array.max())
    depth: Any = source.dtype
    if source.labels and depth not in _LARGEST and not (source.array % 1).any():
        depth = "uint8" if high <= _LARGEST["uint8"] else "uint16"  # whatever type they were stored in
    largest = _LARGEST.get(depth)
    volume = path.name.lower().endswith(".nii.gz")
    if not volume and (largest is None or low < 0 or high > largest):
        raise ImageError(
            f"{path.name}: {source.dtype} values {low:g} to {high:g} do not fit a picture; write .nii.gz instead"
        )
    if volume and len(array) == 3 and depth == "uint16":
        raise ImageError(
            f"{path.name}: colours of 16 bit, but those of a NIfTI have 8; expected .png or .tif; write one of them"
        )
    spread = None if largest is None else (0.0, largest)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not volume:
        write_image(path, array, value_range=spread, dtype=depth)
    else:  # a volume keeps grey values as they are
        colours = len(array) == 3
        write_image(path, array, geometry=geometry, value_range=spread if colours else None, labels=source.labels)


_LARGEST = {"uint8": 255.0, "uint16": 65535.0}


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
