"""Many pairs from a manifest: the model is loaded once, what is done is skipped, a bad row does not stop the rest."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from bsafusion.about import versions
from bsafusion.errors import log, one_line
from bsafusion.files import REPORT, check_replaceable, read_csv
from bsafusion.image import TASKS
from bsafusion.pipeline import Model, fuse
from bsafusion.request import AUTO, FuseOptions, RequestError
from bsafusion.result import FILES, expected_files
from bsafusion.weights import file_sha256

LONGEST_ID = 200
"""Bytes of UTF-8: file systems take 255, and a folder that is being written has a longer name than the result."""

Outcome = Literal["ok", "suspect", "skipped", "failed"]


@dataclass(frozen=True)
class Row:
    """One line of a manifest."""

    id: str
    fixed: Path
    moving: Path
    task: str


@dataclass(frozen=True)
class RowResult:
    """What became of a row; ``message`` says why it failed or is suspect, also where a suspect result was skipped."""

    id: str
    outcome: Outcome
    message: str = ""


def read_manifest(path: Path) -> list[Row]:
    """Rows of a CSV with columns ``id,fixed,moving[,task]``; image paths are relative to the CSV.

    Raises:
        RequestError: :func:`bsafusion.files.read_csv` cannot read the file, an id is missing, too long, no folder name
            or used twice (but for case, too), or a task is unknown. Images are not looked at: a row whose image is
            missing fails alone.
    """
    lines = read_csv(path, what="manifest", columns="id,fixed,moving[,task]", error=RequestError)
    rows: list[Row] = []
    lines_of: dict[str, int] = {}  # by what a file system that ignores case would tell names apart
    for number, line in lines:
        where = f"{path}, line {number}"
        name, task = line["id"], (line.get("task") or AUTO).lower()
        if not line["fixed"] or not line["moving"]:
            raise RequestError(f"{where}: fixed or moving is empty; expected a path in each")
        if not name or name in (".", "..") or Path(name).name != name or name.startswith("."):
            raise RequestError(f"{where}: id {name!r} cannot name a folder; use letters, digits, - and _")
        if len(name.encode()) > LONGEST_ID or any(unicodedata.category(c) == "Cc" for c in name):
            raise RequestError(
                f"{where}: id {name[:20]!r}... is longer than {LONGEST_ID} bytes or has control characters; "
                "use a short one of letters, digits, - and _"
            )
        same = unicodedata.normalize("NFC", name).casefold()
        if (earlier := lines_of.setdefault(same, number)) != number:
            raise RequestError(
                f"{where}: id {name!r} stands twice; make the ids unique, not by case alone (the other: line {earlier})"
            )
        if task not in (*TASKS, AUTO):
            raise RequestError(f"{where}: unknown task {task!r}; expected {', '.join(TASKS)} or {AUTO}")
        rows.append(Row(name, path.parent / line["fixed"], path.parent / line["moving"], task))
    if not rows:
        raise RequestError(f"{path}: no rows below the header; expected one a pair")
    return rows


def done_before(row: Row, folder: Path, model: Model, wanted: FuseOptions) -> dict[str, Any] | None:
    """The report of this row's result from the same inputs, weights, calibration, options and versions, if ``folder``
    holds it and all files that belong to it."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        inputs = {"fixed": row.fixed, "moving": row.moving}
        task_given = row.task if row.task != AUTO else None
        options, identity = report["options"], model.identity()
        del identity["weights"]  # the name under which they were found
        done = (
            all(report["inputs"][role]["file"] == path.name for role, path in inputs.items())
            and all(report["inputs"][role]["sha256"] == file_sha256(path) for role, path in inputs.items())
            and {name: options[name] for name in identity} == identity
            and report["versions"] == versions()
            and {name: options[name] for name in wanted.record()} == wanted.record()
            and (options["task"] if options["task_from"] == "request" else None) == task_given
            and all((folder / name).stat().st_size > 0 for name in expected_files(report))
        )
        return report if done and isinstance(report["reasons"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_batch(rows: list[Row], out: Path, model: Model, options: FuseOptions | None = None) -> Iterator[RowResult]:
    """Fuse every row into ``out/<id>``, all with the same options; yields as it goes, one result a row.

    An earlier result of a row that fails is set aside as ``out/<id>.outdated``: nobody is to take it for the new one.
    """
    options = options or FuseOptions()
    for row in rows:
        folder = out / row.id
        try:
            if (report := done_before(row, folder, model, options)) is not None:
                yield RowResult(row.id, "skipped", "; ".join(report["reasons"]))
                continue
            check_replaceable(folder, overwrite=True, holds=FILES)
            result = fuse(row.fixed, row.moving, task=row.task, model=model, **asdict(options))
            result.save(folder, overwrite=True)
        except Exception as error:  # whatever a row's files bring about, the others are to be tried
            log.debug("row %s", row.id, exc_info=error)
            yield RowResult(row.id, "failed", one_line(error) + _set_aside(folder))
        else:
            yield RowResult(row.id, "suspect" if result.status == "suspect" else "ok", "; ".join(result.reasons))


def _set_aside(folder: Path) -> str:
    """Give an earlier result another name, if there is one; what to say of it."""
    names = (folder.with_name(f"{folder.name}.outdated{number or ''}") for number in count())
    try:
        if folder.is_symlink() or not (folder / REPORT).is_file():
            return ""
        aside = next(path for path in names if not path.exists())
        folder.rename(aside)
    except OSError as error:
        return f"; an earlier result in {folder} could not be renamed ({error.strerror}); do not use it"
    return f"; its earlier result is now {aside.name}"
