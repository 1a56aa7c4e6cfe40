"""Results as the page needs them: numbers to draw, files to download, rows to sort."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from bsafusion.canonical import canonical
from bsafusion.deformation import jacobian_determinant, lengths
from bsafusion.errors import one_line
from bsafusion.files import REPORT
from bsafusion.image import Geometry, Image, ImageError
from bsafusion.io import read_deformation, read_image
from bsafusion.page import picture_of
from bsafusion.preprocessing import fit_intensity, match_grids, network_field
from bsafusion.report import ALIGN_ONLY
from bsafusion.report_page import pictures, words
from bsafusion.result import FusionResult

PAGE = "report.html"
MOST_VIEWS = 3
"""Kept in memory, those asked for last."""
LARGEST_TEXT = 200 * 2**20
"""Bytes of a report or report page that is read at all."""

Array = NDArray[Any]
Written = tuple[int, int, int]


def told(error: BaseException) -> str:
    """A message for the page: what the library says, on one line; of the system's errors without the path."""
    return getattr(error, "strerror", None) or one_line(error)


@dataclass(frozen=True, eq=False)
class Layer:
    """Numbers on the fixed grid, upright and with square pixels (see :mod:`bsafusion.canonical`).

    Attributes:
        array: ``C H W``, uint8 where that holds the values, else float32; little endian.
        low, high: the values to show as black and white.
        unit: of the values: ``""`` as stored in the image, ``px``, ``display levels``.
    """

    array: Array
    low: float = 0.0
    high: float = 1.0
    unit: str = ""

    def describe(self) -> dict[str, Any]:
        """Everything but the numbers, for the page."""
        kind = "uint8" if self.array.dtype == np.uint8 else "float32"
        return {"shape": list(self.array.shape), "dtype": kind, "low": self.low, "high": self.high, "unit": self.unit}


@dataclass(frozen=True, eq=False)
class View:
    """One result as the page shows it: its report, its layers by name, and a note where something is missing."""

    name: str
    report: Mapping[str, Any]
    layers: Mapping[str, Layer]
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """What the page gets at once; the layers' numbers follow one by one."""
        return {
            "name": self.name,
            "report": self.report,
            "words": words(self.report),
            "note": self.note,
            "layers": {name: layer.describe() for name, layer in self.layers.items()},
        }


def _compact(array: Array) -> Array:
    levels = np.clip(array, 0, 255).astype(np.uint8)
    return levels if np.array_equal(levels, array) else np.ascontiguousarray(array, dtype="<f4")


def _upright(array: Array, fixed: Geometry) -> Array:
    """``C H W`` on the fixed grid as it is seen."""
    return canonical(fixed).see(torch.from_numpy(np.array(array, dtype=np.float32))[None])[0].numpy()


def _image_layer(image: Image, array: Array, fixed: Geometry) -> Layer:
    scaling = fit_intensity(image)
    return Layer(_compact(_upright(array, fixed)), scaling.low, scaling.high, "")


def _field_layers(displacement: torch.Tensor, fixed: Geometry) -> dict[str, Layer]:
    """The field ``2 H W`` (y, x), voxels of the fixed grid, and its Jacobian determinant."""
    displacement = canonical(fixed).see_field(displacement[None])[0]
    determinant = jacobian_determinant(displacement[None])[0].numpy()
    largest = float(lengths(displacement[None]).max())
    return {
        "displacement": Layer(np.ascontiguousarray(displacement.numpy(), dtype="<f4"), 0.0, largest, "px"),
        "jacobian": Layer(np.ascontiguousarray(determinant[None], dtype="<f4"), 0.5, 1.5, ""),
    }


def _error_layer(upright: Array) -> Layer:
    return Layer(np.ascontiguousarray(upright, dtype="<f4"), 0.0, float(upright.max()), "px")


def view_of(result: FusionResult, name: str) -> View:
    """What has just been fused, with the inputs' own values."""
    grid = result.fixed.geometry
    layers = {
        "fixed": _image_layer(result.fixed, result.fixed.array, grid),
        "moving": _image_layer(result.moving, result.moving_on_fixed_grid, grid),
        "aligned": _image_layer(result.moving, result.aligned, grid),
        **_field_layers(result.displacement, grid),
    }
    if result.fused is not None:
        layers["fused"] = Layer(np.ascontiguousarray(_upright(result.fused, grid), dtype="<f4"))
    if result.expected_error is not None:
        layers["expected_error"] = _error_layer(_upright(result.expected_error[None], grid))
    return View(name, result.report, layers)


def read_report(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``report.json``.

    Raises:
        ValueError: it is damaged or not of this package, or the page could not show it.
        OSError: it cannot be read.
    """
    try:
        report: dict[str, Any] = json.loads(_text(folder / REPORT))
        _check(report)
        words(report)
    except RecursionError:
        problem = "nested too deeply"
    except KeyError as error:
        problem = f"{error} is missing"
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        problem = str(error)
    else:
        return report
    raise ValueError(f"{_shown(folder)}/{REPORT} is damaged ({problem}); fuse the pair again")


def _check(report: dict[str, Any]) -> None:
    """Whether the page can make something of a report, beside its words."""
    kinds = {"reasons": list, "inputs": dict, "grid": dict, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(report.get(name, kind()), kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    if not all(isinstance(value, int | float | None) for value in report["alignment"].values()):
        raise TypeError("alignment holds more than numbers")
    json.dumps(report, allow_nan=False, ensure_ascii=False).encode()  # as the page gets it


def _shown(folder: Path) -> str:
    """The name of a folder as text, whatever bytes it is of."""
    return os.fsencode(folder.name).decode(errors="replace")


def _text(path: Path) -> str:
    if path.is_symlink() or path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path.name} is a link or larger than {LARGEST_TEXT // 2**20} MiB; expected a report")
    return path.read_text(encoding="utf-8")


def read_view(folder: Path) -> View:
    """A result folder; pictures that only its report page holds are in display levels 0 to 255.

    What cannot be read is left out, and the note says so.

    Raises:
        ValueError, OSError: see :func:`read_report`.
    """
    report = read_report(folder)
    layers: dict[str, Layer] = {}
    missing: list[str] = []
    for name in ("aligned",) if report.get("mode") == ALIGN_ONLY else ("fused", "aligned"):
        try:
            layers[name] = _stored(folder, name)
        except ImageError as error:
            missing.append(str(error))
    try:
        layers.update(_field_layers(*_alignment(folder, report)))
    except (ImageError, ValueError) as error:
        missing.append(str(error))
    shape = next((layer.array.shape[1:] for layer in layers.values()), None)
    try:
        layers.update(_embedded(_text(folder / PAGE), shape))
    except (OSError, ValueError):
        missing.append(f"no usable {PAGE}, which holds the fixed and the moving image: fuse the pair again for them")
    shape = next((layer.array.shape[1:] for layer in layers.values()), None)
    fitting = {name: layer for name, layer in layers.items() if layer.array.shape[1:] == shape}
    missing.extend(f"{name} has another size than the others" for name in layers if name not in fitting)
    return View(_shown(folder), report, fitting, "; ".join(missing))


def _own(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_symlink():
        raise ImageError(f"{name} is a link; expected a file of the result folder itself; copy it there")
    return path


def _alignment(folder: Path, report: Mapping[str, Any]) -> tuple[torch.Tensor, Geometry]:
    """What the network moved, ``2 H W``, voxels: a saved field without how the two grids were laid onto each other; and
    the fixed grid.

    Raises:
        ImageError: the field cannot be read, or what the folder holds does not tell how the grids were laid.
    """
    field = read_deformation(_own(folder, "deformation.nii.gz"))
    method = str(report.get("grid", {}).get("method", ""))
    if "centred" not in method:  # then the points of the field had their places before
        return field.displacement, field.geometry
    try:
        # The way back lies on the moving grid.
        moving = read_deformation(_own(folder, "deformation_inverse.nii.gz")).geometry
        match = match_grids(field.geometry, moving)
        if match.method != method:
            raise ImageError(f"the two fields lie as of {match.method!r}, the report says {method!r}")
    except ImageError as error:
        raise ImageError(
            "no arrows, no Jacobian: the field includes how the two grids were laid onto each other, which cannot be "
            f"taken out here ({error})"
        ) from error
    return network_field(field, match, moving), field.geometry


def _stored(folder: Path, name: str) -> Layer:
    """The values of a volume file where there is one, else those of the picture."""
    values = folder / f"{name}.nii.gz"
    image = read_image(_own(folder, values.name if values.exists() else f"{name}.png"))
    if name == "fused":  # 0 to 1, or the whole range of a picture's type
        white = {"uint8": 255, "uint16": 65535}.get(image.dtype, 1)
        return Layer(np.ascontiguousarray(_upright(image.array / white, image.geometry), dtype="<f4"))
    return _image_layer(image, image.array, image.geometry)


def _embedded(page: str, shape: tuple[int, ...] | None) -> dict[str, Layer]:
    """Layers that only the report page has, brought to ``shape`` (the page's pictures may be smaller)."""
    found = pictures(page)
    layers: dict[str, Layer] = {}
    for name in ("fixed", "moving"):
        if name in found:
            array = np.asarray(_sized(found[name][0], shape))
            layers[name] = Layer(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), 0, 255, "display levels")
    picture, largest = found.get("expected-error", (None, None))
    if picture is not None and largest is not None and picture.mode == "P":
        levels = PIL.Image.frombytes("L", picture.size, picture.tobytes())
        layers["expected_error"] = _error_layer(
            np.asarray(_sized(levels, shape), dtype=np.float32)[None] * (largest / 255)
        )
    return {name: Layer(np.ascontiguousarray(x.array), x.low, x.high, x.unit) for name, x in layers.items()}


def _sized(picture: PIL.Image.Image, shape: tuple[int, ...] | None) -> PIL.Image.Image:
    if shape is None or picture.size == shape[::-1]:
        return picture
    return picture.resize((shape[1], shape[0]), PIL.Image.Resampling.BILINEAR)


# --- folders ---


@dataclass(frozen=True)
class Entry:
    """A result folder that may be opened, under a key that says nothing about its place."""

    key: str
    name: str
    folder: Path

    def row(self) -> dict[str, Any]:
        """For the table; a report that cannot be read is a row too, not an error."""
        try:
            report = read_report(self.folder)
        except (OSError, ValueError) as error:
            return {"key": self.key, "name": self.name, "status": "unreadable", "reasons": [told(error)]}
        return {
            **report["alignment"],
            "key": self.key,
            "name": self.name,
            "status": report["status"],
            "reasons": report.get("reasons", []),
            "task": report.get("options", {}).get("task"),
        }


def files_of(folder: Path) -> dict[str, Path]:
    """What may be downloaded: the regular files directly in the folder, neither hidden nor links."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    }


def zip_of(folder: Path) -> bytes:
    """All files of :func:`files_of`; the same bytes for the same files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, path in files_of(folder).items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def thumbnail(folder: Path, side: int = 96) -> bytes:
    """``fused.png`` as a small PNG, upright.

    Raises:
        ImageError: there is none that can be read.
    """
    image, volume = read_image(_own(folder, "fused.png")), _own(folder, "fused.nii.gz")
    fixed = read_image(volume).geometry if volume.is_file() else image.geometry
    picture = picture_of(_upright(image.array / np.iinfo(image.dtype).max, fixed))
    picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def check_root(root: Path) -> None:
    """Raise for a path that is neither a result folder nor a folder of them.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: each with what to pass instead.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; expected a result folder or the OUT of a batch")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; expected a result folder or the OUT of a batch")
    if not _result_folders(root):
        raise ValueError(f"{root}: no {REPORT} in it or in a folder of it; expected a result folder or OUT of a batch")


def _result_folders(root: Path) -> list[Path]:
    if (root / REPORT).is_file():
        return [root]
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    return [root / name for name in names if not name.startswith(".") and (root / name / REPORT).is_file()]


class Library:
    """The folders that the page may open: those that were chosen, and what is fused while the viewer runs.

    A request names a folder by its key and never by a path, so that there is nothing to escape from.
    """

    def __init__(self, roots: tuple[Path, ...] = ()) -> None:
        for root in roots:
            check_root(root)
        self._roots = tuple(root.resolve() for root in roots)
        self._entries: dict[str, Entry] = {}
        self._views: dict[str, tuple[View, Written]] = {}
        self._lock = threading.Lock()
        self.scan()

    def scan(self) -> list[Entry]:
        """The results in the chosen folders; a batch may still be adding some."""
        entries = [
            Entry(_key(folder), _shown(folder), folder)
            for root in self._roots
            if root.is_dir()
            for folder in _result_folders(root)
        ]
        with self._lock:
            self._entries.update({entry.key: entry for entry in entries})
        return entries

    def add(self, folder: Path, view: View) -> Entry:
        """Take in what has just been fused."""
        folder = folder.resolve()
        entry, written = Entry(_key(folder), view.name, folder), _written(folder)
        with self._lock:
            self._entries[entry.key] = entry
            self._remember(entry.key, view, written)
        return entry

    def entry(self, key: str) -> Entry:
        """Raise :class:`KeyError` for a key that was never given out, and where its folder is gone or now a link."""
        with self._lock:
            entry = self._entries[key]
        if not (entry.folder / REPORT).is_file() or entry.folder.resolve() != entry.folder:
            raise KeyError(key)
        return entry

    def view(self, key: str) -> View:
        """Its report and layers; the last few stay in memory.

        Raises:
            KeyError, ValueError, OSError: see :meth:`entry` and :func:`read_view`.
        """
        entry = self.entry(key)
        written = _written(entry.folder)
        with self._lock:
            known = self._views.get(key)
        if known is not None and known[1] == written:
            return known[0]
        view = read_view(entry.folder)
        with self._lock:
            self._remember(key, view, written)
        return view

    def _remember(self, key: str, view: View, written: Written) -> None:
        self._views.pop(key, None)
        self._views[key] = view, written
        while len(self._views) > MOST_VIEWS:
            self._views.pop(next(iter(self._views)))


def _written(folder: Path) -> Written:
    """Tells a result from one that is made again in the same folder."""
    stat = (folder / REPORT).stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _key(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:20]
