"""What is written appears whole or not at all, nothing of the user's is lost, and tables are read as they are meant."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bsafusion.files import atomic_folder, check_replaceable, read_csv, write_between, write_json, write_whole


def test_write_whole_leaves_the_old_file_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_text("old")
    with pytest.raises(RuntimeError), write_whole(path) as temporary:  # noqa: PT012
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with write_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"grösse": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"grösse": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"x": math.nan})
    assert not (tmp_path / "b.json").exists()


def test_atomic_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result"
    with pytest.raises(RuntimeError), atomic_folder(out) as folder:  # noqa: PT012
        (folder / "half.txt").write_text("")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "report.json").write_text("1")
        assert not out.exists()
    assert (out / "report.json").read_text() == "1"
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(out):
        pass
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "other.txt").write_text("2")
    assert [path.name for path in out.iterdir()] == ["other.txt"]
    # It has no report any more: it could be anybody's folder.
    with pytest.raises(FileExistsError, match=r"no report\.json"), atomic_folder(out, overwrite=True):
        pass
    (out / "report.json").write_text("3")
    with (
        pytest.raises(FileExistsError, match=r"holds other\.txt, which is no part"),
        atomic_folder(out, overwrite=True),
    ):
        pass
    with atomic_folder(out, overwrite=True, holds=("other.txt",)) as folder:
        (folder / "other.txt").write_text("4")
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(out / "other.txt"):
        pass
    assert [path.name for path in out.parent.iterdir()] == ["result"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "report.json").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "report.json"]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result"
    with atomic_folder(out) as folder:
        (folder / "report.json").write_text("old")
    moved = os.replace

    def busy(source: Path, target: Path) -> None:
        if target == out and (Path(source) / "report.json").read_text() == "new":
            raise OSError(16, "busy")
        moved(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match="busy"), atomic_folder(out, overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert (out / "report.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_new_result_stands_where_the_old_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result"
    with atomic_folder(out) as folder:
        (folder / "report.json").write_text("old")

    def busy(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(16, "busy", str(path))

    monkeypatch.setattr(os, "unlink", busy)
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert (out / "report.json").read_text() == "new"


@pytest.mark.parametrize("name", [".htaccess", ".git", ".deadbeef", ".DS_Store2"])
def test_hidden_files_of_the_user_are_not_lost(tmp_path: Path, name: str) -> None:
    for file in ("report.json", name):
        (tmp_path / file).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"holds {re.escape(name)}, which is no part of a result"):
        check_replaceable(tmp_path, overwrite=True)


def test_what_systems_and_killed_writers_leave_is_no_hindrance(tmp_path: Path) -> None:
    for file in ("report.json", ".DS_Store", ".nfs000000000123", ".0123abcd-report.json"):
        (tmp_path / file).write_text("")
    check_replaceable(tmp_path, overwrite=True)


def test_folders_that_cannot_be_made_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    check_replaceable(tmp_path / "new" / "deep")
    with pytest.raises(FileExistsError, match="link is a file or a link"):
        check_replaceable(tmp_path / "link")
    with pytest.raises(NotADirectoryError, match="file is a file; expected a folder"):
        check_replaceable(tmp_path / "file" / "a" / "b")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="lost is a link that leads nowhere; expected a folder"):
        check_replaceable(tmp_path / "lost" / "a" / "b")
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
        with pytest.raises(FileExistsError, match=r"disk is a mount point, .*; choose a folder in it"):
            check_replaceable(tmp_path / "disk")
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(PermissionError, match=rf"{tmp_path} may not be written to; .* choose another path"):
        check_replaceable(tmp_path / "new" / "deep")


def _table(path: Path, content: str | bytes) -> list[tuple[int, dict[str, str]]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_csv(path, what="list", columns="id,file[,task]", error=KeyError)  # type: ignore[arg-type]


def test_tables_are_read_without_spaces_marks_and_empty_ends(tmp_path: Path) -> None:
    text = '\ufeff id , file,task ,ward\n\n a , "b,c" ,\n d,e, f ,g,,\n'
    assert _table(tmp_path / "t.csv", text) == [
        (3, {"id": "a", "file": "b,c", "task": "", "ward": ""}),
        (4, {"id": "d", "file": "e", "task": "f", "ward": "g"}),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id;file\na;b\n", "separated by semicolons, expected commas"),
        ("id\tfile\na\tb\n", "separated by tabs, expected commas"),
        ("id,file\na,\xe4\n".encode("latin-1"), "not a CSV in UTF-8 .* expected columns id,file"),
        ("id,file\na,b,c\n", "line 2: 3 cells for 2 columns; expected one a column"),
        ("id,file,id\na,b,c\n", "column id stands twice"),
        ("id\na\n", r"no column file \(found: id\); add it"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(KeyError, match=rf"t\.csv.*{said}"):
        _table(tmp_path / "t.csv", content)


def test_text_between_two_marks_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a <!-- x -->\n<!-- y -->\nold\n<!-- / -->\n<!-- x -->\n<!-- / -->\nend\n", encoding="utf-8")
    write_between(page, "<!-- y -->", "<!-- / -->", "one\ntwo\n")
    expected = "a <!-- x -->\n<!-- y -->\none\ntwo\n<!-- / -->\n<!-- x -->\n<!-- / -->\nend\n"
    assert page.read_text(encoding="utf-8") == expected
    write_between(page, "<!-- y -->", "<!-- / -->", "one\ntwo")
    assert page.read_text(encoding="utf-8") == expected


def test_a_page_without_its_marks_is_left_and_said(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- / -->\n<!-- y -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no line '<!-- y -->' with '<!-- / -->' after it"):
        write_between(page, "<!-- y -->", "<!-- / -->", "text")
    assert page.read_text(encoding="utf-8") == "<!-- / -->\n<!-- y -->\n"
    assert list(tmp_path.iterdir()) == [page]
