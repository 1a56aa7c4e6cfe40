"""What other programs write is read right, what is written they read right, and the rest is refused."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import sys
import threading
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pydicom
import pydicom.data
import pydicom.encaps
import pydicom.uid
import pytest
import SimpleITK as sitk
import torch

from bsafusion.deformation import DeformationField, MovingFrame, warp
from bsafusion.files import write_json
from bsafusion.image import Geometry, Image, ImageError, Modality
from bsafusion.io import (
    COLORMAPS,
    read_colormap,
    read_deformation,
    read_image,
    write_deformation,
    write_image,
    write_like,
)

DICOM_FILES = Path(pydicom.data.__file__).parent / "test_files"
FLIPPED = Geometry((48, 60), (0.7, 1.3), (12.5, -40.0), ((1.0, 0.0), (0.0, -1.0)), plane="coronal")
TURNED = Geometry((48, 60), (0.7, 1.3), (12.5, -40.0), ((0.8, 0.6), (0.6, -0.8)))
PICTURE = Geometry.picture((48, 60))
VOLUME = Geometry((20, 24, 28), (2.0, 1.5, 1.0), (5.0, -6.0, 7.0), ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _grey(rng: np.random.Generator, dtype: str = "uint8") -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max, (48, 60), dtype=dtype, endpoint=True)


def _rgb(rng: np.random.Generator, dtype: str = "uint8") -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max, (48, 60, 3), dtype=dtype, endpoint=True)


# --- pictures


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_grey_pictures_keep_their_values(tmp_path: Path, rng: np.random.Generator, suffix: str, dtype: str) -> None:
    array = _grey(rng, dtype)
    PIL.Image.fromarray(array).save(tmp_path / f"a{suffix}", dpi=(300, 300))
    image = read_image(tmp_path / f"a{suffix}", modality=Modality.CT)
    np.testing.assert_array_equal(image.array, array[None])
    assert (image.dtype, image.modality, image.source) == (dtype, Modality.CT, f"a{suffix}")
    assert image.geometry == PICTURE
    assert image.sha256 is not None
    assert len(image.sha256) == 64


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_colour_pictures_keep_their_values(tmp_path: Path, rng: np.random.Generator, suffix: str, dtype: str) -> None:
    array = _rgb(rng, dtype)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / f"a{suffix}"))
    image = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(image.array, np.moveaxis(array, -1, 0))
    assert image.dtype == dtype


def test_jpeg_float_tiff_and_the_real_format_behind_a_wrong_suffix(tmp_path: Path, rng: np.random.Generator) -> None:
    smooth = np.outer(np.linspace(0, 255, 48), np.linspace(0, 1, 60)).astype(np.uint8)
    PIL.Image.fromarray(smooth).save(tmp_path / "a.png", format="JPEG", quality=95)
    image = read_image(tmp_path / "a.png")
    assert image.meta["format"] == "JPEG"
    np.testing.assert_allclose(image.array[0], smooth, atol=4)
    values = rng.normal(size=(48, 60)).astype(np.float32) * 1000
    PIL.Image.fromarray(values).save(tmp_path / "f.tif")
    image = read_image(tmp_path / "f.tif")
    np.testing.assert_array_equal(image.array[0], values)
    assert image.dtype == "float32"


def test_palette_one_bit_alpha_and_grey_rgb(tmp_path: Path, rng: np.random.Generator) -> None:
    indices = rng.integers(0, 3, (48, 60), dtype=np.uint8)
    palette = PIL.Image.fromarray(indices).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 5, 5, 250])
    palette.putdata(indices.ravel().tolist())
    palette.save(tmp_path / "p.png")
    colours = np.array([[10, 20, 30], [200, 100, 0], [5, 5, 250]])
    np.testing.assert_array_equal(read_image(tmp_path / "p.png").array, np.moveaxis(colours[indices], -1, 0))

    PIL.Image.fromarray(indices > 0).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_image(tmp_path / "one.png").array[0], np.where(indices > 0, 255, 0))

    for suffix in (".png", ".tif"):
        opaque = np.dstack([_rgb(rng), np.full((48, 60), 255, np.uint8)])
        PIL.Image.fromarray(opaque).save(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}").array, np.moveaxis(opaque[..., :3], -1, 0))
        opaque[3, 4, 3] = 254
        PIL.Image.fromarray(opaque).save(tmp_path / f"t{suffix}")
        with pytest.raises(ImageError, match=rf"^t\{suffix}: has transparent pixels"):
            read_image(tmp_path / f"t{suffix}")

    grey = _grey(rng)
    PIL.Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "g.png")
    image = read_image(tmp_path / "g.png")
    np.testing.assert_array_equal(image.array, grey[None])
    assert "grey" in str(image.meta["channels"])


def test_16_bit_alpha(tmp_path: Path, rng: np.random.Generator) -> None:
    array = np.dstack([_rgb(rng, "uint16"), np.full((48, 60), 65535, np.uint16)])
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, np.moveaxis(array[..., :3], -1, 0))
    array[0, 0, 3] = 0
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "a.png"))
    with pytest.raises(ImageError, match="transparent"):
        read_image(tmp_path / "a.png")


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_significant_bits_of_deep_colour_are_not_applied(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.png"
    array = _rgb(rng, "uint16")
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(path))
    content = path.read_bytes()
    note = _png_chunk(b"tEXt", b"a\0sBIT")
    path.write_bytes(content[:33] + note + _png_chunk(b"sBIT", b"\x10\x10\x10") + content[33:])
    np.testing.assert_array_equal(read_image(path).array, np.moveaxis(array, -1, 0))
    path.write_bytes(content[:33] + note + _png_chunk(b"sBIT", b"\x10\x0c\x0c") + content[33:])
    with pytest.raises(ImageError, match=r"^a\.png: 16-bit colour PNG with 12 significant bits"):
        read_image(path)


def test_deep_grey_with_alpha_is_refused_as_such(tmp_path: Path) -> None:
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60, 48, 16, 4, 0, 0, 0))
    rows = (b"\0" + b"\x12\x34\xff\xff" * 60) * 48
    body = _png_chunk(b"IDAT", zlib.compress(rows)) + _png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(ImageError, match=r"^a\.png: 16-bit grey with alpha; .* save it without alpha"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    array = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (48, 1))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # show it turned a quarter clockwise
    PIL.Image.fromarray(array).save(tmp_path / f"a{suffix}", exif=exif)
    image = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(image.array[0], np.rot90(array, -1), atol=3)
    assert image.geometry.shape == (60, 48)
    assert image.meta["exif_orientation"] == 6


def test_tiff_with_white_as_zero(tmp_path: Path, rng: np.random.Generator) -> None:
    array = _grey(rng, "uint16")
    info = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    info[PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1
    PIL.Image.fromarray(array).save(tmp_path / "a.tif", tiffinfo=info)
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHI", PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 3, 1)
    assert content.count(entry + b"\1") == 1
    (tmp_path / "a.tif").write_bytes(content.replace(entry + b"\1", entry + b"\0"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array[0], 65535 - array.astype(np.int64))


def _png_header_only(width: int, height: int) -> bytes:
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _png_chunk(b"IDAT", zlib.compress(b"\0" * 100))


def test_each_broken_file_has_its_own_message(tmp_path: Path, rng: np.random.Generator) -> None:
    good = tmp_path / "good.png"
    PIL.Image.fromarray(_grey(rng)).save(good)
    contents = {
        "empty.png": (b"", "empty.png: is empty"),
        "text.png": (b"<html>\nNot found\n</html>", "text.png: is a text file"),
        "cut.png": (good.read_bytes()[:1500], "cut.png: damaged or unsupported PNG .*truncated"),
        "photo.gif": (b"GIF89a\x01\0\x01\0\0\0\0", "photo.gif: is a GIF"),
        "noise.png": (bytes(range(200, 256)), r"noise.png: is an unknown format \(first bytes c8 c9 ca cb\)"),
        "wide.png": (_png_header_only(5000, 50), "wide.png: 5000 x 50 pixels; expected at most 2048"),
        "bomb.png": (_png_header_only(60000, 60000), "bomb.png: far more pixels"),
        "warned.png": (_png_header_only(12000, 10000), "warned.png: (far more pixels|12000 x 10000)"),
        "zip.nii.gz": (gzip.compress(b"hello" * 200), "zip.nii.gz: is gzip-compressed but not NIfTI"),
        "cut.nii.gz": (gzip.compress(rng.bytes(5000))[:300], "cut.nii.gz: damaged gzip"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=message) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="slice_index=3 was given"):
        read_image(good, slice_index=3)


@pytest.mark.parametrize("error", [TypeError, OverflowError, struct.error, IndexError, AttributeError, MemoryError])
def test_whatever_pillow_raises_the_file_is_damaged(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    PIL.Image.fromarray(_grey(rng)).save(tmp_path / "a.png")

    def fail(*_: Any) -> None:
        raise error("of a part")

    monkeypatch.setattr(PIL.Image.Image, "getexif", fail)
    with pytest.raises(ImageError, match=r"^a\.png: damaged or unsupported PNG \((\w+: )?of a part\); export it again"):
        read_image(tmp_path / "a.png")


def test_pages_and_colour_spaces_that_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    pages = [PIL.Image.fromarray(_grey(rng)) for _ in range(3)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match="TIFF with more than one page; expected one image"):
        read_image(tmp_path / "m.tif")
    PIL.Image.fromarray(_rgb(rng)).convert("CMYK").save(tmp_path / "c.jpg")
    with pytest.raises(ImageError, match="CMYK"):
        read_image(tmp_path / "c.jpg")
    PIL.Image.fromarray(_grey(rng)[:20]).save(tmp_path / "s.png")
    with pytest.raises(ImageError, match=r"s\.png: 60 x 20 pixels; expected at least 32"):
        read_image(tmp_path / "s.png")
    PIL.Image.fromarray(np.full((48, 60), 9, np.uint8)).save(tmp_path / "k.png")
    with pytest.raises(ImageError, match=r"k\.png: every pixel is 9"):
        read_image(tmp_path / "k.png")


def _tiff(
    path: Path,
    pixels: np.ndarray,
    *,
    extra: int | None = None,
    planar: int = 1,
    tiled: bool = False,
    photometric: int | None = None,
    order: str = "<",
    deflated: bool = False,
    loop: bool = False,
) -> Path:
    """A TIFF of ``H W [C]`` as numpy holds it, which Pillow would not write; ``loop``: its page follows itself."""
    height, width, samples = (*pixels.shape, 1)[:3]
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    data = (np.moveaxis(stored, -1, 0) if planar == 2 else stored).tobytes()
    data = zlib.compress(data) if deflated else data
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags: dict[int, list[int]] = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * samples}
    colour = 2 if samples >= 3 else 1
    tags |= {
        259: [8 if deflated else 1],
        262: [colour if photometric is None else photometric],
        277: [samples],
        284: [planar],
        339: [kind] * samples,
    }
    if extra is not None:
        tags[338] = [extra]
    chunks = samples if planar == 2 else 1
    size = len(data) // chunks
    tags |= {322: [width], 323: [height]} if tiled else {278: [height]}
    where, counts = (324, 325) if tiled else (273, 279)
    tags[where], tags[counts] = [8 + k * size for k in range(chunks)], [size] * chunks
    entries, heap, after = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, heap = struct.pack(f"{order}I", after + len(heap)), heap + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    count, following = struct.pack(f"{order}H", len(tags)), struct.pack(f"{order}I", 8 + len(data) if loop else 0)
    path.write_bytes(head + data + count + entries + following + heap)
    return path


def test_tiffs_made_by_hand_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    grey, colour = _grey(rng), _rgb(rng, "uint16")
    np.testing.assert_array_equal(read_image(_tiff(tmp_path / "a.tif", grey)).array[0], grey)
    np.testing.assert_array_equal(read_image(_tiff(tmp_path / "c.tif", colour)).array, np.moveaxis(colour, -1, 0))


def test_32_bit_tiff_does_not_wrap(tmp_path: Path) -> None:
    values = np.linspace(0, 2**32 - 256, 48 * 60).astype(np.uint32).reshape(48, 60)
    image = read_image(_tiff(tmp_path / "a.tif", values))
    assert image.dtype == "uint32"
    np.testing.assert_array_equal(image.array[0], values.astype(np.float32))
    signed = read_image(_tiff(tmp_path / "s.tif", values.view(np.int32)))
    np.testing.assert_array_equal(signed.array[0], values.view(np.int32).astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_signed_tiffs_keep_their_values_and_type(tmp_path: Path, dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = np.linspace(limits.min, limits.max, 48 * 60).astype(dtype).reshape(48, 60)
    image = read_image(_tiff(tmp_path / "a.tif", values))
    assert image.dtype == dtype
    np.testing.assert_array_equal(image.array[0], values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint64"])
def test_a_tiff_s_pixel_type_is_named_where_it_cannot_be_read(tmp_path: Path, dtype: str) -> None:
    path = _tiff(tmp_path / "a.tif", np.eye(48, 60, dtype=dtype))
    with pytest.raises(
        ImageError, match=rf"^a\.tif: TIFF of {dtype} pixels; expected uint8, uint16 or float32; convert"
    ):
        read_image(path)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_either_byte_order_are_read_right_or_refused(
    tmp_path: Path, order: str, deflated: bool, dtype: str
) -> None:
    values = np.arange(48 * 60).reshape(48, 60).astype(dtype)
    path = _tiff(tmp_path / "a.tif", values, order=order, deflated=deflated)
    if order == ">" and deflated and dtype in ("int16", "int32", "float32"):
        with pytest.raises(ImageError, match=rf"^a\.tif: big-endian compressed TIFF of {dtype}; save it uncompressed"):
            read_image(path)
        return
    np.testing.assert_array_equal(read_image(path).array[0], values)


def test_a_tiff_whose_page_follows_itself_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    # In deep colour ITK would look for its last page for ever.
    with pytest.raises(ImageError, match=r"^a\.tif: TIFF with more than one page"):
        read_image(_tiff(tmp_path / "a.tif", _rgb(rng, "uint16"), loop=True))


def test_a_tiff_in_huge_tiles_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    content = _tiff(tmp_path / "a.tif", rng.integers(0, 255, (48, 64), dtype=np.uint8), tiled=True).read_bytes()
    entry = struct.pack("<HHII", 323, 4, 1, 48)
    assert content.count(entry) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(entry, struct.pack("<HHII", 323, 4, 1, 32768)))
    with pytest.raises(ImageError, match=r"^a\.tif: TIFF with tiles of 32768 pixels; expected at most 4096"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("options", [{"planar": 2}, {"tiled": True}])
def test_deep_colour_in_tiles_or_planes_is_refused_as_such(
    tmp_path: Path, rng: np.random.Generator, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    array = rng.integers(0, 65535, (64, 64, 3), dtype=np.uint16)
    with pytest.raises(ImageError, match=r"16-bit colour TIFF in tiles or separate planes; .* save it as PNG"):
        read_image(_tiff(tmp_path / "a.tif", array, **options))
    assert capfd.readouterr().err == ""  # ITK has a word for it, too


def test_deep_cmyk_is_refused_as_such(
    tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    array = rng.integers(0, 65535, (48, 60, 4), dtype=np.uint16)
    with pytest.raises(ImageError, match=r"TIFF with CMYK colours; expected grey or RGB"):
        read_image(_tiff(tmp_path / "a.tif", array, photometric=5))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("samples", "extra"), [(2, 0), (2, None), (4, 0)])
def test_no_channel_is_lost(
    tmp_path: Path, rng: np.random.Generator, samples: int, extra: int | None, dtype: str
) -> None:
    array = rng.integers(0, 255, (48, 60, samples)).astype(dtype)
    with pytest.raises(ImageError, match=rf"TIFF with {samples} channels; expected 1 \(grey\) or 3 \(RGB\)"):
        read_image(_tiff(tmp_path / "a.tif", array, extra=extra))


@pytest.mark.skipif(sys.platform != "linux", reason="others refuse such names")
def test_a_name_that_is_not_utf_8_can_be_reported(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / os.fsdecode(b"a\xff.png")
    PIL.Image.fromarray(_grey(rng)).save(path)
    image = read_image(path)
    assert image.source == "a\ufffd.png"
    write_json(tmp_path / "a.json", image.source)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"^a.\.png: is empty"):
        read_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (read_image, read_deformation):
        with pytest.raises(ImageError, match=r"^a\.png: is a pipe or a device; expected an image file"):
            read(tmp_path / "a.png")


def test_a_folder_without_a_name_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=r"^\.: is a folder"):
        read_image(".")


def test_threads_leave_the_filters_of_warnings_as_they_were(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    PIL.Image.fromarray(_grey(rng)).save(tmp_path / "a.png")
    opened = PIL.Image.open
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> PIL.Image.Image:
        if threading.current_thread() is first:
            first_in.set()
            second_in.wait(0.2)
        else:
            second_in.set()
            first_out.wait(5)
        return opened(*args, **options)

    def read() -> None:
        read_image(tmp_path / "a.png")
        first_out.set()

    monkeypatch.setattr(PIL.Image, "open", slow)
    first, second = threading.Thread(target=read), threading.Thread(target=read)
    before = list(warnings.filters)
    first.start()
    assert first_in.wait(5)
    second.start()
    first.join()
    second.join()
    assert list(warnings.filters) == before


# --- labels


def test_labels_of_a_palette_are_its_indices(tmp_path: Path, rng: np.random.Generator) -> None:
    indices = rng.integers(0, 3, (48, 60), dtype=np.uint8)
    palette = PIL.Image.fromarray(indices).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 5, 5, 250])
    palette.putdata(indices.ravel().tolist())
    palette.save(tmp_path / "p.png", transparency=0)
    image = read_image(tmp_path / "p.png", labels=True)
    np.testing.assert_array_equal(image.array, indices[None])
    PIL.Image.fromarray(indices > 0).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_image(tmp_path / "one.png", labels=True).array[0], indices > 0)


def _shallow(path: Path, levels: np.ndarray, bits: int, transparent: int | None = None) -> Path:
    """A grey PNG of 1, 2 or 4 bit, which Pillow would not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = levels.shape
    rows = np.packbits(np.unpackbits(levels[..., None], axis=-1)[..., 8 - bits :].reshape(height, -1), axis=-1)
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    if transparent is not None:
        content += chunk(b"tRNS", struct.pack(">H", transparent))
    content += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_not_spread_over_eight(tmp_path: Path, rng: np.random.Generator, bits: int) -> None:
    levels = rng.integers(0, 2**bits, (48, 64), dtype=np.uint8)
    path = _shallow(tmp_path / "a.png", levels, bits)
    np.testing.assert_array_equal(read_image(path, labels=True).array[0], levels)
    np.testing.assert_array_equal(read_image(path).array[0], levels * (255 // (2**bits - 1)))
    path = _shallow(tmp_path / "t.png", levels, bits, transparent=0)
    np.testing.assert_array_equal(read_image(path, labels=True).array[0], levels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_labels_are_not_mirrored_where_white_is_zero(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    labels = rng.integers(0, 5, (48, 60)).astype(dtype)
    path = _tiff(tmp_path / "a.tif", labels, photometric=0)
    image = read_image(path, labels=True)
    assert image.dtype == dtype
    np.testing.assert_array_equal(image.array[0], labels)
    np.testing.assert_array_equal(read_image(path).array[0], np.iinfo(dtype).max - labels)


@pytest.mark.parametrize("bits", [1, 4])
def test_labels_of_few_bits_where_white_is_zero(tmp_path: Path, rng: np.random.Generator, bits: int) -> None:
    levels = rng.integers(0, 2**bits, (48, 64), dtype=np.uint8)
    packed = np.packbits(np.unpackbits(levels[..., None], axis=-1)[..., 8 - bits :].reshape(48, -1), axis=-1)
    content = _tiff(tmp_path / "a.tif", packed, photometric=0).read_bytes()
    for tag, was, now in ((256, packed.shape[1], 64), (258, 8, bits)):
        entry = struct.pack("<HHI", tag, 4, 1)
        assert content.count(entry + struct.pack("<I", was)) == 1
        content = content.replace(entry + struct.pack("<I", was), entry + struct.pack("<I", now))
    (tmp_path / "a.tif").write_bytes(content)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", labels=True).array[0], levels)


def test_labels_in_colour_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    PIL.Image.fromarray(_rgb(rng)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"^a\.png: a label map in colour; expected one value a pixel, .*palette"):
        read_image(tmp_path / "a.png", labels=True)
    grey = _grey(rng)
    PIL.Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "g.png")
    np.testing.assert_array_equal(read_image(tmp_path / "g.png", labels=True).array, grey[None])


def test_dicom_labels_keep_their_values(tmp_path: Path, rng: np.random.Generator) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "MR_small.dcm")
    labels = rng.integers(0, 5, (64, 64)).astype(np.int16)
    dataset.PixelData = labels.tobytes()
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(tmp_path / "m.dcm")
    image = read_image(tmp_path / "m.dcm", labels=True)
    assert (image.dtype, "inverted" in image.meta) == ("int16", False)
    np.testing.assert_array_equal(image.array[0], labels)
    indices = read_image(DICOM_FILES / "examples_palette.dcm", labels=True)
    stored = pydicom.dcmread(DICOM_FILES / "examples_palette.dcm").pixel_array
    assert indices.dtype == stored.dtype.name
    np.testing.assert_array_equal(indices.array[0], stored)


def test_an_empty_label_slice_is_fine(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.zeros((48, 60), np.uint8)).save(tmp_path / "a.png")
    assert not read_image(tmp_path / "a.png", labels=True).array.any()
    with pytest.raises(ImageError, match="every pixel is 0"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("smallest", "largest", "dtype"),
    [(0, 7, "uint8"), (-1, 256, "int16"), (0, 40_000, "uint16"), (-1, 40_000, "int32"), (0, 2**24, "int32")],
)
def test_labels_are_written_as_integers(tmp_path: Path, smallest: int, largest: int, dtype: str) -> None:
    labels = np.full((1, 48, 60), smallest, np.float32)
    labels[0, 3, 4] = largest
    write_image(tmp_path / "a.nii.gz", labels, geometry=TURNED, labels=True)
    written = nib.load(tmp_path / "a.nii.gz")
    assert written.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(written.dataobj).squeeze().T, labels[0])


@pytest.mark.parametrize(
    ("label", "dtype"), [(2**24 + 1, "int32"), (-(2**24) - 1, "int64"), (2**60 + 1, "int64"), (0.1, "float64")]
)
def test_labels_that_would_change_are_refused(tmp_path: Path, label: float, dtype: str) -> None:
    array = np.zeros((60, 48, 1), dtype)
    array[3, 4] = 2**24 if dtype != "float64" else 7
    nib.save(nib.Nifti1Image(array, np.eye(4), dtype=dtype), tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii", labels=True).array[0, 4, 3] == array[3, 4, 0]
    array[5, 6] = label
    nib.save(nib.Nifti1Image(array, np.eye(4), dtype=dtype), tmp_path / "b.nii")
    with pytest.raises(ImageError, match=rf"^b\.nii: label {label} of {dtype} would not keep .* 16777216; renumber"):
        read_image(tmp_path / "b.nii", labels=True)


# --- NIfTI


def _affine(x: tuple[float, ...], y: tuple[float, ...], z: tuple[float, ...], t: tuple[float, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3] = np.array([x, y, z, t]).T
    return affine


def _save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_slice_of_a_volume(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    volume = rng.integers(-1000, 3000, (60, 48, 7)).astype(np.int16)
    affine = _affine((-0.5, 0, 0), (0, 2, 0), (0, 0, 3), (10, 20, 30))
    path = tmp_path / f"v{suffix}"
    _save_nifti(path, volume, affine)
    image = read_image(path, slice_index=5)
    np.testing.assert_array_equal(image.array[0], volume[:, :, 5].T)
    assert image.geometry.plane == "axial"
    # RAS (10 - 0.5 i, 20 + 2 j) is LPS (-10 + 0.5 i, -20 - 2 j)
    np.testing.assert_allclose(image.geometry.index_to_physical(np.array([3, 4])), [-8, -26])
    assert (image.dtype, image.meta["slice_index"]) == ("int16", 5)
    assert image.meta["slice_position_mm"] == 30 + 5 * 3
    with pytest.raises(ImageError, match=r"3-D volume of shape \(60, 48, 7\).*--fixed-slice K"):
        read_image(path)
    with pytest.raises(ImageError, match=r"slice_index=7 .* expected 0\.\.6"):
        read_image(path, slice_index=7)


def test_nifti_slice_agrees_with_simpleitk(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.normal(size=(48, 1, 60)).astype(np.float32)  # z, y, x: a coronal slice
    stored = sitk.GetImageFromArray(volume)
    stored.SetSpacing((0.7, 5.0, 1.3))
    stored.SetOrigin((12.0, -30.0, 8.0))
    stored.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, -1))
    sitk.WriteImage(stored, str(tmp_path / "c.nii.gz"))
    image = read_image(tmp_path / "c.nii.gz")
    np.testing.assert_array_equal(image.array[0], volume[:, 0])
    assert image.geometry.plane == "coronal"
    left, _, up = stored.TransformIndexToPhysicalPoint((17, 0, 9))
    np.testing.assert_allclose(image.geometry.index_to_physical(np.array([9, 17])), (left, up), atol=1e-4)


def test_the_same_anatomy_has_the_same_place_whatever_the_orientation(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = nib.Nifti1Image(rng.random((40, 50, 1)), _affine((1, 0, 0), (0, 2, 0), (0, 0, 3), (-20, -50, 0)))
    values = set()
    for codes in ("RAS", "LPS", "PRS", "ALS"):
        transform = nib.orientations.ornt_transform(
            nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(codes)
        )
        turned = volume.as_reoriented(transform)
        _save_nifti(tmp_path / "t.nii", np.asarray(turned.dataobj), turned.affine)
        image = read_image(tmp_path / "t.nii")
        y, x = np.rint(image.geometry.physical_to_index(np.array([3.0, -10.0]))).astype(int)
        values.add(float(image.array[0, y, x]))
    # LPS (3, -10) is RAS (-3, 10): i = 17, j = 30
    assert values == {float(np.float32(volume.dataobj[17, 30, 0]))}


def test_tilted_nifti_is_recorded_or_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    for degrees in (12.0, 40.0):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        affine = _affine((1, 0, 0), (0, c, s), (0, -s, c), (0, 0, 0))
        _save_nifti(tmp_path / f"{degrees:.0f}.nii", rng.random((40, 50, 1)).astype(np.float32), affine)
    assert read_image(tmp_path / "12.nii").meta["oblique_degrees"] == pytest.approx(12, abs=1e-3)
    with pytest.raises(ImageError, match=r"40\.nii: the slice is tilted 40 degrees"):
        read_image(tmp_path / "40.nii")


@pytest.mark.parametrize("flat", [False, True])
def test_a_qform_beside_another_sform_is_told(tmp_path: Path, rng: np.random.Generator, flat: bool) -> None:
    array = rng.random((60, 48) if flat else (60, 48, 1)).astype(np.float32)
    affine = _affine((-0.5, 0, 0), (0, 2, 0), (0, 0, 3), (10, 20, 30))

    def read(moved: tuple[float, float, float], qform: int = 1, sform: int = 2) -> Image:
        image = nib.Nifti1Image(array, affine)
        there = affine.copy()
        there[:3, 3] += moved
        image.set_qform(there, code=qform)
        image.set_sform(affine, code=sform)
        nib.save(image, tmp_path / "q.nii")
        return read_image(tmp_path / "q.nii")

    image = read((3, 0, 4))
    assert image.meta["placed_by"] == "the sform, from which the qform differs by up to 5 mm"
    np.testing.assert_allclose(image.geometry.index_to_physical(np.array([3, 4])), [-8, -26])
    # A tenth of a voxel, which is 0.5 mm wide, and codes of which one says nothing.
    assert "placed_by" in read((0.06, 0, 0)).meta
    for alike in (read((0.04, 0, 0)), read((0, 0, 0)), read((3, 0, 4), qform=0), read((3, 0, 4), sform=0)):
        assert "placed_by" not in alike.meta
        assert alike.geometry.positioned
    assert not read((0, 0, 0), qform=0, sform=0).geometry.positioned


def test_a_qform_that_is_turned_is_told_by_the_corners(tmp_path: Path, rng: np.random.Generator) -> None:
    affine = _affine((1, 0, 0), (0, 1, 0), (0, 0, 3), (10, 20, 30))
    image = nib.Nifti1Image(rng.random((61, 49, 5)).astype(np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(_affine((0, 1, 0), (-1, 0, 0), (0, 0, 3), (10, 20, 30)), code=1)  # a quarter turn about a corner
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "q.nii")
    told = str(read_image(tmp_path / "q.nii", slice_index=2).meta["placed_by"])
    assert float(told.split()[-2]) == pytest.approx(1e-3 * math.sqrt(2) * math.hypot(60, 48), rel=1e-2)


def test_a_damaged_qform_beside_a_sform_is_told(tmp_path: Path, rng: np.random.Generator) -> None:
    image = nib.Nifti1Image(rng.random((60, 48, 1)), np.diag([2.0, 2, 2, 1]))
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header["quatern_b"] = 3
    nib.save(image, tmp_path / "q.nii")
    read = read_image(tmp_path / "q.nii")
    assert read.geometry.spacing == (2, 2)
    assert read.meta["placed_by"] == "the sform; the qform is damaged"


def test_nifti_without_orientation_and_with_other_units(tmp_path: Path, rng: np.random.Generator) -> None:
    image = nib.Nifti1Image(rng.random((40, 50, 1)), None)
    image.header.set_zooms((0.002, 0.003, 1))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "u.nii")
    geometry = read_image(tmp_path / "u.nii").geometry
    assert (geometry.physical, geometry.positioned, geometry.plane) == (True, False, None)
    np.testing.assert_allclose(geometry.spacing, (2, 3), rtol=1e-6)


def test_nifti_scaling_rgb_and_version_2(tmp_path: Path, rng: np.random.Generator) -> None:
    raw = rng.integers(0, 100, (60, 48)).astype(np.int16)
    stored = nib.Nifti1Image(raw, np.eye(4))
    content = bytearray(stored.to_bytes())
    content[112:120] = struct.pack("<ff", 2.0, -1000.0)  # scl_slope, scl_inter
    (tmp_path / "s.nii").write_bytes(content)
    scaled = read_image(tmp_path / "s.nii")
    np.testing.assert_array_equal(scaled.array[0], raw.T * 2.0 - 1000)
    assert np.issubdtype(np.dtype(scaled.dtype), np.floating)  # the stored type says nothing of these values
    (tmp_path / "plain.nii").write_bytes(stored.to_bytes())
    assert read_image(tmp_path / "plain.nii").dtype == "int16"
    rgb = np.zeros((60, 48), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name in "RGB":
        rgb[name] = rng.integers(0, 255, (60, 48))
    nib.save(nib.Nifti2Image(rgb, np.eye(4)), tmp_path / "rgb.nii.gz")
    image = read_image(tmp_path / "rgb.nii.gz")
    assert image.dtype == "uint8"
    for channel, name in zip(image.array, "RGB", strict=True):
        np.testing.assert_array_equal(channel, rgb[name].T)


def test_pairs_of_files_are_refused_as_such(tmp_path: Path, rng: np.random.Generator) -> None:
    nib.save(nib.Nifti1Pair(rng.random((60, 50)), np.eye(4)), tmp_path / "a.img")
    nib.save(nib.AnalyzeImage(rng.random((60, 50)).astype(np.float32), np.eye(4)), tmp_path / "old.img")
    header = (tmp_path / "a.hdr").read_bytes()
    (tmp_path / "b.nii").write_bytes(header)
    (tmp_path / "a.hdr.gz").write_bytes(gzip.compress(header))
    for name in ("a.hdr", "a.img", "old.hdr", "old.img", "b.nii", "a.hdr.gz"):
        with pytest.raises(ImageError, match=rf"^{name}: is half of a \.hdr/\.img pair; expected a single \.nii"):
            read_image(tmp_path / name)


def test_nifti_that_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    nib.save(nib.Nifti1Image(rng.random((40, 50, 3, 5)), np.eye(4)), tmp_path / "4d.nii.gz")
    with pytest.raises(ImageError, match=r"4-D NIfTI of shape \(40, 50, 3, 5\)"):
        read_image(tmp_path / "4d.nii.gz")
    with pytest.raises(ImageError, match=r"4-D NIfTI"):
        read_image(tmp_path / "4d.nii.gz", slice_index=1)
    nib.save(nib.Nifti1Image(rng.random((40, 50)).astype(np.complex64), np.eye(4)), tmp_path / "z.nii")
    with pytest.raises(ImageError, match="complex"):
        read_image(tmp_path / "z.nii")
    nib.save(nib.Nifti1Image(rng.random((60, 50)), np.eye(4)), tmp_path / "cut.nii.gz")
    whole = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.nii\.gz: damaged"):
        read_image(tmp_path / "cut.nii.gz")
    unit = bytearray(nib.Nifti1Image(rng.random((60, 50)), np.eye(4)).to_bytes())
    unit[123] = 4  # xyzt_units
    (tmp_path / "unit.nii").write_bytes(unit)
    with pytest.raises(ImageError, match=r"unit\.nii: NIfTI with the unknown unit of length 4"):
        read_image(tmp_path / "unit.nii")
    array = rng.random((60, 50))
    array[3, 4] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "nan.nii")
    with pytest.raises(ImageError, match="1 values are NaN"):
        read_image(tmp_path / "nan.nii")


@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sform_code", 6, "NIfTI with sform_code 6; expected 0 to 5"),
        ("qform_code", -1, "NIfTI with qform_code -1; expected 0 to 5"),
        ("vox_offset", 2**30, "NIfTI whose voxels begin at byte 1073741824; expected at most"),
    ],
)
def test_a_damaged_nifti_header_is_refused_not_mended(
    tmp_path: Path, rng: np.random.Generator, version: Any, field: str, value: int, said: str
) -> None:
    nifti = version(rng.random((40, 50)), np.eye(4))
    header = nifti.header.copy()
    header[field] = value
    content = nifti.to_bytes()
    (tmp_path / "h.nii.gz").write_bytes(gzip.compress(header.binaryblock + content[len(header.binaryblock) :]))
    for read in (read_image, read_deformation):
        with pytest.raises(ImageError, match=rf"^h\.nii\.gz: {said}"):
            read(tmp_path / "h.nii.gz")


def test_an_odd_nifti_header_is_read_in_silence(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    array = rng.random((40, 50))
    content = bytearray(nib.Nifti1Image(array, np.eye(4)).to_bytes())
    content[80:84] = struct.pack("<f", -1.0)  # pixdim[1]: nibabel would log it
    (tmp_path / "h.nii").write_bytes(content)
    before = nib.imageglobals.logger.disabled
    assert read_image(tmp_path / "h.nii").geometry.spacing == (1.0, 1.0)
    content[280:284] = struct.pack("<f", math.inf)  # srow_x: numpy would warn of it
    (tmp_path / "h.nii").write_bytes(content)
    with pytest.raises(ImageError, match=r"^h\.nii: slice axes .*; expected two perpendicular directions"):
        read_image(tmp_path / "h.nii")
    assert not caplog.records
    assert nib.imageglobals.logger.disabled == before


# --- DICOM


def test_dicom_ct_against_simpleitk() -> None:
    path = DICOM_FILES / "CT_small.dcm"
    image = read_image(path)
    reference = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(image.array[0], sitk.GetArrayFromImage(reference)[0])
    # Hounsfield units, rescaled from the integers that were stored.
    assert (image.modality, image.dtype, image.geometry.plane) == (Modality.CT, "float64", "axial")
    expected = reference.TransformIndexToPhysicalPoint((31, 7, 0))[:2]
    np.testing.assert_allclose(image.geometry.index_to_physical(np.array([7, 31])), expected, atol=1e-6)


def test_dicom_carries_no_patient(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "CT_small.dcm")
    image = read_image(DICOM_FILES / "CT_small.dcm")
    known = {"format", "transfer_syntax", "oblique_degrees", "inverted", "channels", "slice_position_mm"}
    assert set(image.meta) <= known
    kept = " ".join(str(value) for value in image.meta.values())
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "InstitutionName"):
        value = str(dataset.get(keyword, ""))
        assert not value or value not in kept


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
)
def test_dicom_transfer_syntaxes_give_the_same_pixels(name: str) -> None:
    image = read_image(DICOM_FILES / name)
    np.testing.assert_array_equal(image.array, read_image(DICOM_FILES / "MR_small.dcm").array)
    assert image.modality is Modality.MRI


def test_dicom_modality_can_be_overruled(tmp_path: Path) -> None:
    assert read_image(DICOM_FILES / "MR_small.dcm", modality=Modality.CT).modality is Modality.CT
    for tag, expected in (("PT", Modality.PET), ("NM", Modality.SPECT), ("US", Modality.UNKNOWN)):
        dataset = pydicom.dcmread(DICOM_FILES / "MR_small.dcm")
        dataset.Modality = tag
        dataset.save_as(tmp_path / "m.dcm")
        assert read_image(tmp_path / "m.dcm").modality is expected


def test_dicom_palette_of_8_bits_in_words_of_16_is_an_8_bit_picture(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "examples_palette.dcm")
    for colour in ("Red", "Green", "Blue"):
        table = np.frombuffer(dataset[f"{colour}PaletteColorLookupTableData"].value, "<u2")
        entries, first, _ = dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
        dataset[f"{colour}PaletteColorLookupTableData"].value = (table >> 8).astype("<u2").tobytes()
        dataset[f"{colour}PaletteColorLookupTableDescriptor"].value = [entries, first, 8]
    dataset.save_as(tmp_path / "p.dcm")
    image, wide = read_image(tmp_path / "p.dcm"), read_image(DICOM_FILES / "examples_palette.dcm")
    assert (image.dtype, wide.dtype) == ("uint8", "uint16")
    np.testing.assert_array_equal(image.array, wide.array.astype(np.int64) >> 8)


def test_dicom_without_its_preamble_or_suffix(tmp_path: Path) -> None:
    expected = read_image(DICOM_FILES / "MR_small.dcm").array
    shutil.copy(DICOM_FILES / "MR_small.dcm", tmp_path / "IM0001")
    np.testing.assert_array_equal(read_image(tmp_path / "IM0001").array, expected)
    dataset = pydicom.dcmread(DICOM_FILES / "MR_small.dcm")
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.preamble = None
    dataset.save_as(tmp_path / "bare.dcm", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "bare.dcm").read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_image(tmp_path / "bare.dcm").array, expected)


def test_dicom_monochrome1_and_slope(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "MR_small.dcm")
    plain = dataset.pixel_array.astype(np.float64)
    dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -10
    dataset.save_as(tmp_path / "r.dcm")
    assert read_image(DICOM_FILES / "MR_small.dcm").dtype == dataset.pixel_array.dtype.name
    rescaled = read_image(tmp_path / "r.dcm")
    np.testing.assert_allclose(rescaled.array[0], plain * 0.5 - 10)
    assert rescaled.dtype == "float64"
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(tmp_path / "m1.dcm")
    inverted = read_image(tmp_path / "m1.dcm")
    np.testing.assert_allclose(inverted.array[0], (plain.max() + plain.min() - plain) * 0.5 - 10)
    assert "MONOCHROME1" in str(inverted.meta["inverted"])


@pytest.mark.parametrize("name", ["hot-iron", "pet", "hot-metal-blue", "pet-20-step"])
def test_colour_maps_are_those_of_dicom(name: str) -> None:
    table = read_colormap(name)
    dataset = pydicom.dcmread(pydicom.data.get_palette_files(f"{name.replace('-', '')}.dcm")[0])
    for channel, colour in enumerate(("Red", "Green", "Blue")):
        stored = np.frombuffer(dataset[f"{colour}PaletteColorLookupTableData"].value, dtype=np.uint8)
        np.testing.assert_allclose(table[:, channel], stored[:256] / 255, atol=1e-7)


def test_known_entries_of_colour_maps() -> None:
    assert all(read_colormap(name).shape == (256, 3) for name in COLORMAPS)
    hot = read_colormap("hot-iron")
    np.testing.assert_array_equal(hot[[0, -1]], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_allclose(hot[64], [128 / 255, 0, 0], atol=1e-6)  # red alone rises first, two levels a step
    steps = read_colormap("pet-20-step")
    assert len(np.unique(steps, axis=0)) == 20
    with pytest.raises(ValueError, match="unknown colour map 'jet'; expected one of hot-iron, pet, hot-metal-blue"):
        read_colormap("jet")


def test_dicom_colour(tmp_path: Path) -> None:
    rgb = read_image(DICOM_FILES / "examples_rgb_color.dcm")
    assert rgb.array.shape == (3, 240, 320)
    plain = pydicom.dcmread(DICOM_FILES / "examples_rgb_color.dcm").pixel_array
    np.testing.assert_array_equal(rgb.array, np.moveaxis(plain, -1, 0))
    palette = read_image(DICOM_FILES / "examples_palette.dcm")
    dataset = pydicom.dcmread(DICOM_FILES / "examples_palette.dcm")
    index = int(dataset.pixel_array[100, 200])
    red = np.frombuffer(dataset.RedPaletteColorLookupTableData, "<u2")
    assert palette.array.shape[0] == 3
    assert palette.array[0, 100, 200] == red[index]
    ybr = read_image(DICOM_FILES / "SC_ybr_full_422_uncompressed.dcm")
    same = read_image(DICOM_FILES / "SC_rgb_dcmtk_+eb+cr.dcm")
    np.testing.assert_allclose(ybr.array, same.array, atol=6)


def test_dicom_geometry_of_sagittal_flipped_rows(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "MR_small.dcm")
    dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    dataset.ImagePositionPatient = [3, -100, 80]
    dataset.PixelSpacing = [2.0, 0.5]
    dataset.save_as(tmp_path / "s.dcm")
    image = read_image(tmp_path / "s.dcm")
    geometry = image.geometry
    assert (geometry.plane, geometry.spacing) == ("sagittal", (0.5, 2.0))
    assert image.meta["slice_position_mm"] == 3
    np.testing.assert_allclose(geometry.index_to_physical(np.array([10, 4])), [-98, 60])
    del dataset.ImageOrientationPatient
    dataset.save_as(tmp_path / "n.dcm")
    geometry = read_image(tmp_path / "n.dcm").geometry
    assert (geometry.physical, geometry.positioned, geometry.plane) == (True, False, None)
    del dataset.PixelSpacing
    dataset.save_as(tmp_path / "p.dcm")
    assert read_image(tmp_path / "p.dcm").geometry == Geometry.picture((64, 64))


def _items(**values: Any) -> pydicom.Sequence:
    """A sequence of one item."""
    item = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return pydicom.Sequence([item])


def test_an_enhanced_dicom_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "e.dcm"
    dataset = pydicom.dcmread(DICOM_FILES / "CT_small.dcm")
    stored = dataset.pixel_array.astype(np.float64)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.EnhancedCTImageStorage
    dataset.NumberOfFrames = 1
    for keyword in ("PixelSpacing", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient"):
        del dataset[keyword]
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.SharedFunctionalGroupsSequence = _items(
        PixelMeasuresSequence=_items(PixelSpacing=[0.9, 0.6], SliceThickness=5),
        PlaneOrientationSequence=_items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelValueTransformationSequence=_items(RescaleSlope=2, RescaleIntercept=-1000, RescaleType="HU"),
    )
    dataset.PerFrameFunctionalGroupsSequence = _items(
        PlanePositionSequence=_items(ImagePositionPatient=[-80, -110, 33])
    )
    dataset.save_as(path)
    image = read_image(path)
    np.testing.assert_array_equal(image.array[0], stored * 2 - 1000)
    assert (image.dtype, image.geometry.plane, image.geometry.spacing) == ("float64", "axial", (0.6, 0.9))
    assert image.meta["slice_position_mm"] == 33
    np.testing.assert_allclose(image.geometry.index_to_physical(np.array([10, 5])), [-77, -101])
    assert image.geometry.placement is not None
    assert image.geometry.placement[2][2] == 5
    reference = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(image.array[0], sitk.GetArrayFromImage(reference)[0])
    np.testing.assert_allclose(reference.TransformIndexToPhysicalPoint((5, 10, 0))[:2], [-77, -101])

    # The frame's own word goes before the shared one, and that before the file's.
    dataset.PerFrameFunctionalGroupsSequence[0].PixelMeasuresSequence = _items(PixelSpacing=[0.5, 0.4])
    dataset.PixelSpacing, dataset.RescaleIntercept = [7, 7], 7
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(path)
    image = read_image(path)
    assert image.geometry.spacing == (0.4, 0.5)
    np.testing.assert_array_equal(image.array[0], (stored.max() + stored.min() - stored) * 2 - 1000)


def test_a_dicom_with_a_damaged_modality_is_refused(tmp_path: Path) -> None:
    content = (DICOM_FILES / "MR_small.dcm").read_bytes()
    entry = struct.pack("<HH2sH", 8, 0x60, b"CS", 2)
    assert content.count(entry + b"MR") == 1
    damaged = struct.pack("<HH2sH", 8, 0x60, b"FL", 2)  # a number of 4 bytes
    (tmp_path / "m.dcm").write_bytes(content.replace(entry + b"MR", damaged + b"MR"))
    with pytest.raises(ImageError, match=r"^m\.dcm: damaged or unsupported DICOM"):
        read_image(tmp_path / "m.dcm")


def test_a_dicom_of_double_precision_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "MR_small.dcm")
    values = rng.random((64, 64))
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.BitsAllocated, dataset.DoubleFloatPixelData = 64, values.tobytes()
    dataset.save_as(tmp_path / "d.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "d.dcm").array[0], values.astype(np.float32))


def test_a_segmented_palette_is_refused(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "examples_palette.dcm")
    for colour in ("Red", "Green", "Blue"):
        del dataset[f"{colour}PaletteColorLookupTableData"]
        keyword = f"Segmented{colour}PaletteColorLookupTableData"
        setattr(dataset, keyword, struct.pack("<6H", 0, 1, 0, 1, 255, 65535))
        dataset[keyword].VR = "OW"
    dataset.save_as(tmp_path / "p.dcm")
    with pytest.raises(ImageError, match=r"^p\.dcm: DICOM with a segmented palette; .* export it as RGB"):
        read_image(tmp_path / "p.dcm")
    assert read_image(tmp_path / "p.dcm", labels=True).array.any()  # its indices need no palette


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_box_of_jpeg_2000_that_ends_before_it_begins_is_refused(tmp_path: Path, length: int) -> None:
    dataset = pydicom.dcmread(DICOM_FILES / "JPEG2000.dcm")
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    header = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I", length) + b"free"
    dataset.PixelData = pydicom.encaps.encapsulate([header + frame])
    dataset.save_as(tmp_path / "j.dcm")
    with pytest.raises(ImageError, match=rf"^j\.dcm: damaged JPEG 2000 in a DICOM \(a box of {length} bytes\)"):
        read_image(tmp_path / "j.dcm")


def test_dicom_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("rtdose.dcm", "DICOM with 15 frames"),
        ("test-SR.dcm", "without pixels"),
        ("MR_truncated.dcm", "damaged or unsupported DICOM"),
        ("JPEG-lossy.dcm", "cannot be decoded .*export it uncompressed"),
    ):
        with pytest.raises(ImageError, match=message):
            read_image(DICOM_FILES / name)
    dataset = pydicom.dcmread(DICOM_FILES / "MR_small_jpeg_ls_lossless.dcm")
    assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.JPEGLSLossless
    decoder = pydicom.pixels.decoders.base.get_decoder(pydicom.uid.JPEGLSLossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(ImageError, match=r'no decoder here; pip install "\.\[dicom\]"'):
        read_image(DICOM_FILES / "MR_small_jpeg_ls_lossless.dcm")


# --- writing images


def test_what_was_read_is_written_unchanged(tmp_path: Path, rng: np.random.Generator) -> None:
    names = ("a.png", "b.tiff", "c.PNG", "d.Tif")
    for dtype in ("uint8", "uint16"):
        for pixels in (_grey(rng, dtype)[None], np.moveaxis(_rgb(rng, dtype), -1, 0)):
            for name in names:
                path = tmp_path / name
                write_image(path, Image(pixels, PICTURE, dtype=dtype))
                image = read_image(path)
                np.testing.assert_array_equal(image.array, pixels)
                assert image.dtype == dtype
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_range_rounding_and_clipping_by_hand(tmp_path: Path) -> None:
    array = np.zeros((1, 32, 32))
    array[0, 0, :5] = [-1.0, 0.2, 0.5, 1.0, 2.0]
    write_image(tmp_path / "a.png", array, value_range=(0, 1))
    assert read_image(tmp_path / "a.png").array[0, 0, :5].tolist() == [0, 51, 128, 255, 255]
    write_image(tmp_path / "b.png", array, value_range=(-1, 1), dtype="uint16")
    assert read_image(tmp_path / "b.png").array[0, 0, :4].tolist() == [0, 39321, 49151, 65535]


@pytest.mark.parametrize("geometry", [FLIPPED, TURNED, PICTURE])
def test_nifti_image_round_trip(tmp_path: Path, rng: np.random.Generator, geometry: Geometry) -> None:
    values = rng.normal(size=(1, 48, 60)).astype(np.float32)
    write_image(tmp_path / "a.nii.gz", values, geometry=geometry)
    reference = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reference), values[0])
    np.testing.assert_allclose(
        reference.TransformContinuousIndexToPhysicalPoint((11, 5)),
        geometry.index_to_physical(np.array([5, 11])),
        atol=1e-4,
    )
    write_image(tmp_path / "B.NII.GZ", values, geometry=geometry)
    assert (tmp_path / "B.NII.GZ").read_bytes() == (tmp_path / "a.nii.gz").read_bytes()
    image = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.array, values)
    assert (image.geometry.plane, image.geometry.physical) == (geometry.plane, geometry.physical)
    np.testing.assert_allclose(image.geometry.matrix(), geometry.matrix(), atol=1e-5)


AXES = {
    "axial": ((-0.7, 0, 0), (0, 1.3, 0), (0, 0, 4)),
    "coronal": ((0.7, 0, 0), (0, 0, -1.3), (0, 4, 0)),
    "sagittal": ((0, 0.7, 0), (0, 0, 1.3), (-4, 0, 0)),
    "oblique": ((0.7, 0, 0), (0, 1.3 * math.cos(0.2), 1.3 * math.sin(0.2)), (0, -4 * math.sin(0.2), 4 * math.cos(0.2))),
}


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", AXES)
def test_what_is_written_on_a_slice_s_grid_lies_on_that_slice(
    tmp_path: Path, rng: np.random.Generator, name: str, depth: int
) -> None:
    index = depth - 1
    affine = _affine(*AXES[name], (10, 20, 30))
    _save_nifti(tmp_path / "fixed.nii", rng.normal(size=(60, 48, depth)).astype(np.float32), affine)
    fixed = read_image(tmp_path / "fixed.nii", slice_index=index if depth > 1 else None)
    write_image(tmp_path / "a.nii.gz", fixed)
    write_image(tmp_path / "c.nii.gz", np.moveaxis(_rgb(rng), -1, 0), geometry=fixed.geometry, value_range=(0, 255))
    whole = sitk.ReadImage(str(tmp_path / "fixed.nii"))
    for file in ("a.nii.gz", "c.nii.gz"):
        written = nib.load(tmp_path / file)
        assert written.shape == (60, 48, 1)
        np.testing.assert_allclose(written.affine @ [7, 9, 0, 1], affine @ [7, 9, index, 1], atol=1e-4)
        np.testing.assert_allclose(written.affine[:, 2], affine[:, 2], atol=1e-5)
        for form in (written.get_qform(), written.get_sform()):
            np.testing.assert_allclose(form, written.affine, atol=1e-4)
        theirs = sitk.ReadImage(str(tmp_path / file))
        assert theirs.GetSize() == (60, 48, 1)
        there = whole.TransformIndexToPhysicalPoint((7, 9, index))
        np.testing.assert_allclose(theirs.TransformIndexToPhysicalPoint((7, 9, 0)), there, atol=1e-4)
        back = read_image(tmp_path / file)
        assert back.geometry.plane == fixed.geometry.plane
        np.testing.assert_allclose(back.geometry.matrix(), fixed.geometry.matrix(), atol=1e-5)
        np.testing.assert_allclose(back.geometry.placement, fixed.geometry.placement, atol=1e-5)
        assert back.meta["slice_position_mm"] == pytest.approx(fixed.meta["slice_position_mm"], abs=2e-3)
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").array, fixed.array)


def test_the_axis_that_is_sliced_may_be_any(tmp_path: Path, rng: np.random.Generator) -> None:
    affine = _affine((-0.7, 0, 0), (0, 5, 0), (0, 0, 1.3), (10, 20, 30))
    _save_nifti(tmp_path / "fixed.nii", rng.normal(size=(60, 1, 48)).astype(np.float32), affine)
    fixed = read_image(tmp_path / "fixed.nii")
    write_image(tmp_path / "a.nii.gz", fixed)
    written = nib.load(tmp_path / "a.nii.gz")
    assert (written.shape, fixed.geometry.plane) == ((60, 48, 1), "coronal")
    np.testing.assert_allclose(written.affine @ [7, 9, 0, 1], affine @ [7, 0, 9, 1], atol=1e-4)
    theirs, whole = (sitk.ReadImage(str(tmp_path / name)) for name in ("a.nii.gz", "fixed.nii"))
    np.testing.assert_allclose(
        theirs.TransformIndexToPhysicalPoint((7, 9, 0)), whole.TransformIndexToPhysicalPoint((7, 0, 9)), atol=1e-4
    )


def test_a_dicom_slice_s_place_is_written(tmp_path: Path) -> None:
    for name in ("CT_small.dcm", "MR_small.dcm"):
        fixed = read_image(DICOM_FILES / name)
        write_image(tmp_path / "a.nii.gz", fixed)
        theirs, source = sitk.ReadImage(str(tmp_path / "a.nii.gz")), sitk.ReadImage(str(DICOM_FILES / name))
        for index in ((0, 0, 0), (31, 7, 0)):
            expected = source.TransformIndexToPhysicalPoint(index)
            np.testing.assert_allclose(theirs.TransformIndexToPhysicalPoint(index), expected, atol=1e-3)
        assert theirs.GetSpacing()[2] == pytest.approx(float(pydicom.dcmread(DICOM_FILES / name).SliceThickness))


def test_a_field_on_a_slice_stays_two_dimensional(tmp_path: Path, rng: np.random.Generator) -> None:
    affine = _affine((0.7, 0, 0), (0, 0, -1.3), (0, 4, 0), (10, 20, 30))
    _save_nifti(tmp_path / "fixed.nii", rng.normal(size=(60, 48, 1)).astype(np.float32), affine)
    geometry = read_image(tmp_path / "fixed.nii").geometry
    write_deformation(tmp_path / "d.nii.gz", _field(geometry))
    reference = sitk.ReadImage(str(tmp_path / "d.nii.gz"))
    assert reference.GetSize() == (60, 48)
    np.testing.assert_allclose(reference.TransformIndexToPhysicalPoint((7, 9)), (-10 - 4.9, 30 - 11.7), atol=1e-4)
    vectors = sitk.GetArrayFromImage(reference)
    np.testing.assert_array_equal(vectors[..., 0], np.asarray(nib.load(tmp_path / "d.nii.gz").dataobj)[:, :, 0, 0, 0].T)
    back = read_deformation(tmp_path / "d.nii.gz")
    assert back.geometry.placement == geometry.placement  # what it carries can be written where the slice lies
    torch.testing.assert_close(back.displacement, _field(geometry).displacement, atol=1e-5, rtol=0)


def test_nifti_colour_and_volume(tmp_path: Path, rng: np.random.Generator) -> None:
    rgb = np.moveaxis(_rgb(rng), -1, 0)
    write_image(tmp_path / "c.nii.gz", rgb / 255, geometry=FLIPPED, value_range=(0, 1))
    np.testing.assert_array_equal(read_image(tmp_path / "c.nii.gz").array, rgb)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "c.nii.gz"))), np.moveaxis(rgb, 0, -1)
    )
    volume = rng.normal(size=(1, *VOLUME.shape)).astype(np.float32)
    write_image(tmp_path / "v.nii.gz", volume, geometry=VOLUME)
    reference = sitk.ReadImage(str(tmp_path / "v.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reference), volume[0])
    np.testing.assert_allclose(
        reference.TransformIndexToPhysicalPoint((3, 5, 9)),
        VOLUME.index_to_physical(np.array([9, 5, 3])),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("name", "array", "options", "message"),
    [
        ("a.jpg", np.eye(40)[None], {"value_range": (0, 1)}, "cannot write .jpg"),
        ("a.png", np.eye(40), {"value_range": (0, 1)}, "channels first"),
        ("a.png", np.full((1, 40, 40), np.inf), {"value_range": (0, 1)}, "NaN or infinite"),
        ("a.png", np.eye(40)[None], {}, "need value_range"),
        ("a.png", np.eye(40)[None], {"value_range": (1, 1)}, "low < high"),
        ("a.nii.gz", np.eye(40)[None], {}, "geometry"),
        ("a.nii.gz", np.eye(40)[None], {"geometry": PICTURE}, "geometry"),
    ],
)
def test_images_that_cannot_be_written(
    tmp_path: Path, name: str, array: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        write_image(tmp_path / name, array, **options)
    assert not list(tmp_path.iterdir())


def test_carried_values_are_written_in_the_type_they_came_in(tmp_path: Path, rng: np.random.Generator) -> None:
    deep = Image(_grey(rng, "uint16")[None], PICTURE)
    write_like(tmp_path / "new" / "a.png", deep.array, deep, geometry=PICTURE)
    again = read_image(tmp_path / "new" / "a.png")
    assert again.dtype == "uint16"
    np.testing.assert_array_equal(again.array, deep.array)


def test_carried_values_that_no_picture_holds_leave_no_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    signed = Image(_grey(rng)[None].astype(np.float32) - 100, PICTURE)
    with pytest.raises(ImageError, match=r"a\.png: float32 values -100 to 155 do not fit a picture; write \.nii\.gz"):
        write_like(tmp_path / "new" / "a.png", signed.array, signed, geometry=PICTURE)
    assert list(tmp_path.iterdir()) == []
    write_like(tmp_path / "new" / "a.nii.gz", signed.array, signed, geometry=PICTURE)
    np.testing.assert_array_equal(read_image(tmp_path / "new" / "a.nii.gz").array, signed.array)


# --- deformation fields


def _field(geometry: Geometry, size: float = 3.0) -> DeformationField:
    n = len(geometry.shape)
    index = np.stack(np.meshgrid(*[np.linspace(0, 3, k) for k in geometry.shape], indexing="ij"))
    waves = np.stack([np.sin(index.sum(0) + d) * np.cos(index[d]) for d in range(n)])
    return DeformationField(torch.from_numpy(size * waves).float(), geometry)


@pytest.mark.parametrize("geometry", [FLIPPED, TURNED, PICTURE, VOLUME])
def test_deformation_round_trip(tmp_path: Path, geometry: Geometry) -> None:
    field = _field(geometry)
    write_deformation(tmp_path / "d.nii.gz", field)
    back = read_deformation(tmp_path / "d.nii.gz")
    torch.testing.assert_close(back.displacement, field.displacement, atol=1e-5, rtol=0)
    assert (back.geometry.plane, back.geometry.physical) == (geometry.plane, geometry.physical)
    np.testing.assert_allclose(back.geometry.matrix(), geometry.matrix(), atol=1e-5)
    first = (tmp_path / "d.nii.gz").read_bytes()
    write_deformation(tmp_path / "other.nii.gz", field)
    assert (tmp_path / "other.nii.gz").read_bytes() == first


@pytest.mark.parametrize("moving", [None, MovingFrame(True, (64, 48)), MovingFrame(False, (2048, 33))])
@pytest.mark.parametrize("geometry", [FLIPPED, PICTURE])
def test_a_field_knows_what_it_leads_into(tmp_path: Path, geometry: Geometry, moving: MovingFrame | None) -> None:
    field = replace(_field(geometry), moving=moving)
    write_deformation(tmp_path / "d.nii.gz", field)
    back = read_deformation(tmp_path / "d.nii.gz")
    assert back.moving == moving
    assert (back.geometry.plane, back.geometry.physical) == (geometry.plane, geometry.physical)


def test_deformation_file_holds_lps_mm(tmp_path: Path) -> None:
    displacement = torch.zeros(2, 48, 60)
    displacement[0], displacement[1] = 2.0, 5.0  # 2 voxels in y, 5 in x
    write_deformation(tmp_path / "d.nii.gz", DeformationField(displacement, FLIPPED))
    reference = sitk.ReadImage(str(tmp_path / "d.nii.gz"))
    assert (reference.GetDimension(), reference.GetSize()) == (2, (60, 48))
    np.testing.assert_allclose(reference[7, 9], (5 * 0.7, -2 * 1.3), rtol=1e-6)
    np.testing.assert_allclose(reference.GetOrigin(), (12.5, -40))
    np.testing.assert_allclose(reference.GetDirection(), (1, 0, 0, -1), atol=1e-6)
    header = nib.load(tmp_path / "d.nii.gz").header
    assert int(header["intent_code"]) == 1007
    assert header.get_data_shape() == (60, 48, 1, 1, 2)


@pytest.mark.parametrize("geometry", [TURNED, PICTURE, VOLUME])
def test_fields_written_by_simpleitk_are_read(tmp_path: Path, geometry: Geometry) -> None:
    n = len(geometry.shape)
    vectors = np.random.default_rng(0).normal(size=(*geometry.shape, n)).astype(np.float32)
    stored = sitk.GetImageFromArray(vectors, isVector=True)
    stored.SetSpacing(geometry.spacing)
    stored.SetOrigin(geometry.origin)
    stored.SetDirection(np.ravel(geometry.direction).tolist())
    sitk.WriteImage(stored, str(tmp_path / "d.nii.gz"))
    field = read_deformation(tmp_path / "d.nii.gz")
    assert field.geometry.physical == geometry.physical
    index = np.full(n, 6)
    start = geometry.index_to_physical(index)
    there = geometry.index_to_physical(index + field.displacement[(slice(None), *index)].numpy())
    np.testing.assert_allclose(there - start, vectors[tuple(index)], atol=1e-4)


@pytest.mark.parametrize("geometry", [FLIPPED, TURNED, PICTURE, VOLUME])
def test_simpleitk_applies_a_field_as_we_do(tmp_path: Path, geometry: Geometry) -> None:
    n = len(geometry.shape)
    axes = np.meshgrid(*[np.linspace(0, 2, k) for k in geometry.shape], indexing="ij")
    values = np.prod([np.cos(4 * axis + k) for k, axis in enumerate(axes)], axis=0).astype(np.float32)
    field = _field(geometry, size=2.0)
    write_image(tmp_path / "image.nii.gz", values[None], geometry=geometry)
    write_deformation(tmp_path / "field.nii.gz", field)
    moving = sitk.ReadImage(str(tmp_path / "image.nii.gz"))
    vectors = sitk.ReadImage(str(tmp_path / "field.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(vectors)
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, moving, transform, sitk.sitkLinear, 0.0))
    ours = warp(torch.from_numpy(values)[None, None], field.displacement[None])[0, 0].numpy()
    inner = (slice(3, -3),) * n
    assert np.abs(theirs[inner] - values[inner]).max() > 0.1
    assert np.abs(theirs[inner] - ours[inner]).max() < 0.005 * np.ptp(values)


def test_files_that_hold_no_field(tmp_path: Path, rng: np.random.Generator) -> None:
    PIL.Image.fromarray(_grey(rng)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="is a PNG file; expected a displacement field"):
        read_deformation(tmp_path / "a.png")
    write_image(tmp_path / "i.nii.gz", _grey(rng)[None], geometry=FLIPPED)
    with pytest.raises(ImageError, match=r"shape \(60, 48\) with intent 0; expected a displacement field"):
        read_deformation(tmp_path / "i.nii.gz")
    with pytest.raises(ImageError, match="no such file"):
        read_deformation(tmp_path / "missing.nii.gz")
    write_deformation(tmp_path / "d.nii.gz", _field(FLIPPED))
    with pytest.raises(ImageError, match="5-D NIfTI"):
        read_image(tmp_path / "d.nii.gz")
    with pytest.raises(ImageError, match=r"written as \.nii\.gz"):
        write_deformation(tmp_path / "d.mha", _field(FLIPPED))
