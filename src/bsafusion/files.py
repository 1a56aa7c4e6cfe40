"""Files and folders that appear whole or not at all, and tables."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]

REPORT = "report.json"
"""The file by which a result folder is known."""

_LITTER = re.compile(r"\.DS_Store|\.nfs.*|\.[0-9a-f]{8}-.*")
"""What a system, or a writer of ours that was killed (:func:`_temporary_sibling`), leaves in a folder."""


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


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(4)}-{path.name}")


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


def write_json(path: PathLike, data: Any) -> None:
    """Write ``data`` as indented UTF-8 JSON, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def write_csv(path: PathLike, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table as UTF-8 CSV, whole or not at all."""
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *lines])


@contextmanager
def atomic_folder(out: PathLike, *, overwrite: bool = False, holds: Collection[str] = ()) -> Iterator[Path]:
    """Give a temporary folder beside ``out``; rename it to ``out`` if all went well, remove it otherwise.

    Args:
        out: the folder to make. Its parents are made as needed.
        overwrite: replace an existing folder, but only one that holds a report, and nothing that is not among
            ``holds``: a wrong path must not cost the user's own files.
        holds: names of the files that a result may have.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: as :func:`check_replaceable`.
    """
    out = Path(out)
    check_replaceable(out, overwrite=overwrite, holds=holds)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(out)
    temporary.mkdir()
    try:
        yield temporary
        check_replaceable(out, overwrite=overwrite, holds=holds)
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


def check_replaceable(out: Path, *, overwrite: bool = False, holds: Collection[str] = ()) -> None:
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
    if not (out / REPORT).is_file():
        raise FileExistsError(f"{out} has no {REPORT}, so it is not a result folder; remove it or choose another")
    names = sorted(path.name for path in out.iterdir())
    others = [name for name in names if name not in {REPORT, *holds} and not _LITTER.fullmatch(name)]
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
