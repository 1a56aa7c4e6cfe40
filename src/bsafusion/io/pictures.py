"""PNG, JPEG and TIFF, 8 and 16 bit, grey and in colour."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin
import SimpleITK as sitk
from numpy.typing import NDArray

from bsafusion.errors import one_line
from bsafusion.files import write_whole
from bsafusion.image import LARGEST_SIDE, Geometry, ImageError, check_size
from bsafusion.io.formats import Pixels, quiet

_CHANNELS = "TIFF with {} channels; expected 1 (grey) or 3 (RGB); save one of them on its own"
_TRANSPARENT = "has transparent pixels; expected an opaque image; flatten it onto its background first"


def read_picture(path: Path, kind: str, labels: bool) -> Pixels:
    """Read a PNG, JPEG or TIFF (``kind``); as a label map the stored values, a palette's indices among them."""
    with quiet():
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
            raise ImageError(f"damaged or unsupported {kind} ({one_line(error)[:200]}); export it again") from error


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


def _picture_pixels(picture: PIL.Image.Image, path: Path, kind: str, labels: bool) -> Pixels:
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
    return Pixels(array, Geometry.picture(array.shape[1:]), dtype, meta=meta)


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


def write_picture(path: Path, array: NDArray[Any]) -> None:
    """Write ``C H W`` of uint8 or uint16, C 1 or 3, as PNG or TIFF."""
    pixels = array[0] if len(array) == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1))
    with write_whole(path) as temporary:
        if pixels.ndim == 3 and pixels.dtype == np.uint16:
            # Pillow has no 16-bit colour. ITK knows .tif and .TIF, but not .Tif.
            kind = "PNG" if path.suffix.lower() == ".png" else "TIFF"
            picture = sitk.GetImageFromArray(pixels, isVector=True)
            sitk.WriteImage(picture, str(temporary), imageIO=f"{kind}ImageIO")
        else:
            PIL.Image.fromarray(pixels).save(temporary)
