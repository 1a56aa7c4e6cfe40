from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bsafusion import batch, pipeline, result
from bsafusion.batch import Row, RowResult, done_before, read_manifest, run_batch
from bsafusion.cli import app
from bsafusion.pipeline import Model, fuse
from bsafusion.request import FuseOptions, RequestError
from bsafusion.trust import Calibration, alignment_sha256, calibration_file
from pairs import hot, known_model, known_network, known_weights, scan, snapshot, write_picture, write_volume

SHAPE = (81, 65)
DEFAULTS = FuseOptions()
FILES = {
    *("fused.png", "aligned.png", "overview.png", "report.html", "report.json"),
    *("deformation.nii.gz", "deformation_inverse.nii.gz"),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return known_model((2.0, -1.5))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three good rows; the images lie in a folder beside the CSV."""
    (tmp_path / "in" / "scans").mkdir(parents=True)
    lines = ["id,fixed,moving,task"]
    for index, task in enumerate(("", "pet-mri", "AUTO")):
        write_picture(tmp_path / f"in/scans/{index}-mri.png", scan(SHAPE, seed=index))
        write_picture(tmp_path / f"in/scans/{index}-pet.png", hot(scan(SHAPE, seed=index + 10)))
        lines.append(f"case{index},scans/{index}-mri.png,scans/{index}-pet.png,{task}")
    path = tmp_path / "in" / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(manifest: Path, out: Path, model: Model) -> list[RowResult]:
    return list(run_batch(read_manifest(manifest), out, model))


def outcomes(results: list[RowResult]) -> list[str]:
    return ["done" if r.outcome in ("ok", "suspect") else r.outcome for r in results]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


# --- the manifest ---


def written(folder: Path, text: str) -> Path:
    path = folder / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_relative_to_the_manifest(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    rows = read_manifest(manifest)
    assert rows[0] == Row(
        "case0", manifest.parent / "scans/0-mri.png", manifest.parent / "scans/0-pet.png", task="auto"
    )
    assert [row.task for row in rows] == ["auto", "pet-mri", "auto"]


def test_absolute_paths_are_kept(tmp_path: Path) -> None:
    row = read_manifest(written(tmp_path, "id,fixed,moving\na,/data/mri.png,/data/ct.png\n"))[0]
    assert (row.fixed, row.moving, row.task) == (Path("/data/mri.png"), Path("/data/ct.png"), "auto")


def test_spaces_a_byte_order_mark_and_other_columns_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffid , fixed, moving , task, ward\na , m.png , c.png , PET-MRI , 7\n")
    assert read_manifest(path) == [Row("a", tmp_path / "m.png", tmp_path / "c.png", "pet-mri")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"no column id, fixed, moving \(found: none\); add it to the header"),
        ("id,mri,ct\na,b,c\n", r"no column fixed, moving \(found: id, mri, ct\)"),
        ("id,fixed,moving\n", "no rows below the header; expected one a pair"),
        ("id,fixed,moving\na,b,c\na,d,e\n", "line 3: id 'a' stands twice; make the ids unique"),
        ("id,fixed,moving\nCase,b,c\ncase,d,e\n", "line 3: id 'case' stands twice; .*not by case alone .*line 2"),
        ("id,fixed,moving\n\u00e9,b,c\ne\u0301,d,e\n", "line 3: id .* stands twice"),  # é, composed or not
        (f"id,fixed,moving\n{'é' * 101},b,c\n", "line 2: id 'é{20}'... is longer than 200 bytes"),
        ("id,fixed,moving\na\tb,b,c\n", "line 2: id .*has control characters; use a short one"),
        ("id,fixed,moving\na\0b,b,c\n", "line 2: id .*has control characters"),
        ("id,fixed,moving\n../x,b,c\n", "line 2: id '../x' cannot name a folder; use letters"),
        ("id,fixed,moving\n..,b,c\n", "cannot name a folder"),
        ("id,fixed,moving\na/b,b,c\n", "cannot name a folder"),
        ("id,fixed,moving\n.hidden,b,c\n", "cannot name a folder"),
        ("id,fixed,moving\n,b,c\n", "id '' cannot name a folder"),
        ("id,fixed,moving\na,b\n", "line 2: fixed or moving is empty; expected a path in each"),
        ("id,fixed,moving\na,,c\n", "fixed or moving is empty"),
        ("id,fixed,moving,task\na,b,c,ct\n", "line 2: unknown task 'ct'; expected ct-mri"),
        ("id,fixed,moving\na, ,c\n", "fixed or moving is empty"),
        ("id,fixed,moving\na,b,c,d\n", "line 2: 4 cells for 3 columns; expected one a column"),
        ("id;fixed;moving\na;b;c\n", "separated by semicolons, expected commas"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RequestError, match=said) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such manifest; expected a CSV"):
        read_manifest(tmp_path / "none.csv")


def test_a_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "pairs.csv.png", scan(SHAPE))
    with pytest.raises(RequestError, match="not a CSV in UTF-8"):
        read_manifest(path)


@given(name=st.text(min_size=1, max_size=20))
def test_whatever_the_id_its_folder_lies_in_the_output_folder(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    quoted = name.replace('"', '""')
    path.write_text(f'id,fixed,moving\n"{quoted}",b,c\n', encoding="utf-8", newline="", errors="replace")
    try:
        rows = read_manifest(path)
    except RequestError:
        return
    out = Path("/somewhere/out")
    assert [Path(os.path.normpath(out / row.id)).parent for row in rows] == [out]


# --- the rows ---


def test_every_row_gets_the_result_that_fuse_gives(tmp_path: Path, manifest: Path, model: Model) -> None:
    results = run(manifest, tmp_path / "out", model)
    assert [r.id for r in results] == ["case0", "case1", "case2"]
    assert outcomes(results) == ["done"] * 3
    for row in read_manifest(manifest):
        alone = fuse(row.fixed, row.moving, task=row.task, model=model).save(tmp_path / f"alone-{row.id}")
        assert snapshot(alone) == snapshot(tmp_path / "out" / row.id)
        assert set(snapshot(alone)) == FILES


def test_the_same_batch_gives_the_same_bytes_elsewhere(tmp_path: Path, manifest: Path, model: Model) -> None:
    for name in ("a", "b"):
        run(manifest, tmp_path / name, model)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_suspect_rows_say_why(tmp_path: Path, manifest: Path) -> None:
    results = run(manifest, tmp_path / "out", known_model(expected_error=12.0))
    assert [r.outcome for r in results] == ["suspect"] * 3
    assert all("off by 12.0 px" in r.message for r in results)


def test_what_is_done_is_skipped_and_not_touched(tmp_path: Path, manifest: Path, model: Model) -> None:
    out = tmp_path / "out"
    run(manifest, out, model)
    before = times(out)
    assert outcomes(run(manifest, out, model)) == ["skipped"] * 3
    assert times(out) == before


@pytest.mark.parametrize("name", sorted(FILES - {"report.json"}))
def test_a_result_of_which_a_file_is_gone_is_made_again(
    tmp_path: Path, manifest: Path, model: Model, name: str
) -> None:
    rows, out = read_manifest(manifest)[:1], tmp_path / "out"
    list(run_batch(rows, out, model))
    before = snapshot(out)
    (out / rows[0].id / name).unlink()
    assert outcomes(list(run_batch(rows, out, model))) == ["done"]
    assert snapshot(out) == before
    assert outcomes(list(run_batch(rows, out, model))) == ["skipped"]


@pytest.mark.parametrize("align_only", [False, True])
def test_the_files_of_a_result_in_millimetres_are_looked_for(tmp_path: Path, model: Model, align_only: bool) -> None:
    place = np.diag([-1.0, -1.0, 5.0, 1.0])
    for seed, name in enumerate(("mri", "ct")):
        write_volume(tmp_path / f"{name}.nii.gz", scan(SHAPE, seed=seed).T[..., None], place)
    rows = read_manifest(written(tmp_path, "id,fixed,moving\na,mri.nii.gz,ct.nii.gz\n"))
    options, out = FuseOptions(align_only=align_only), tmp_path / "out"
    list(run_batch(rows, out, model, options))
    expected = {*FILES, "aligned.nii.gz", "fused.nii.gz"}
    assert set(snapshot(out / "a")) == (expected - {"fused.png", "fused.nii.gz"} if align_only else expected)
    assert outcomes(list(run_batch(rows, out, model, options))) == ["skipped"]
    (out / "a" / "aligned.nii.gz").unlink()
    assert outcomes(list(run_batch(rows, out, model, options))) == ["done"]


def test_what_was_suspect_before_is_said_again(tmp_path: Path, manifest: Path) -> None:
    weights = known_weights(tmp_path / "weights", expected_error=12.0)
    call = ["batch", str(manifest), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    first, second = (CliRunner().invoke(app, call) for _ in range(2))
    assert second.exit_code == 0
    assert second.stdout.startswith("0 ok, 0 suspect, 3 skipped, 0 failed")
    lines = [line.replace("suspect: ", "suspect, made before: ", 1) for line in first.stderr.splitlines()]
    assert second.stderr.splitlines() == lines
    assert len(lines) == 3


def test_only_what_changed_is_done_again(tmp_path: Path, manifest: Path, model: Model) -> None:
    out = tmp_path / "out"
    run(manifest, out, model)
    before = times(out / "case0")
    old = snapshot(out / "case1")
    write_picture(manifest.parent / "scans/1-pet.png", hot(scan(SHAPE, seed=99)))
    assert outcomes(run(manifest, out, model)) == ["skipped", "done", "skipped"]
    assert times(out / "case0") == before
    new = snapshot(out / "case1")
    assert new["aligned.png"] != old["aligned.png"]
    assert set(new) == FILES


def test_other_weights_another_task_or_other_versions_are_done_again(
    tmp_path: Path, manifest: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(manifest, out, model)
    row = read_manifest(manifest)[0]
    assert done_before(row, out / row.id, model, DEFAULTS)
    other = Model(model.network, pipeline.weights.WeightsRecord(**{**vars(model.record), "sha256": "f" * 64}), "cpu")
    assert not done_before(row, out / row.id, other, DEFAULTS)
    assert not done_before(Row(row.id, row.fixed, row.moving, "ct-mri"), out / row.id, model, DEFAULTS)
    assert not done_before(Row(row.id, row.moving, row.fixed, row.task), out / row.id, model, DEFAULTS)
    monkeypatch.setattr(batch, "versions", lambda: {"bsafusion": "99"})
    assert not done_before(row, out / row.id, model, DEFAULTS)


@pytest.mark.parametrize(
    "options",
    [
        FuseOptions(fusion="average"),
        FuseOptions(blend="alpha"),
        FuseOptions(weight_fixed=0.3),
        FuseOptions(aligned=True),
        FuseOptions(align_only=True),
        FuseOptions(refine=2),
        FuseOptions(mirrored="always"),
    ],
)
def test_other_options_are_done_again_and_then_skipped(
    tmp_path: Path, manifest: Path, model: Model, options: FuseOptions
) -> None:
    rows, out = read_manifest(manifest)[:1], tmp_path / "out"
    list(run_batch(rows, out, model))
    assert not done_before(rows[0], out / rows[0].id, model, options)
    assert outcomes(list(run_batch(rows, out, model, options))) == ["done"]
    assert outcomes(list(run_batch(rows, out, model, options))) == ["skipped"]
    assert not done_before(rows[0], out / rows[0].id, model, DEFAULTS)
    assert ("fused.png" in snapshot(out / rows[0].id)) == (not options.align_only)


def test_another_calibration_of_the_same_weights_is_done_again_and_then_skipped(
    tmp_path: Path, manifest: Path, model: Model
) -> None:
    rows, out = read_manifest(manifest)[:1], tmp_path / "out"
    names = ("expected_error",)
    calibration = Calibration("ab", *(dict.fromkeys(names, 1.0) for _ in range(3)), -9.0, 0.5, "made up")
    stricter = replace(calibration, threshold=1e-6)
    reports = []
    for trust in (calibration, stricter, None):
        judged = replace(model, trust=trust)
        assert not done_before(rows[0], out / rows[0].id, judged, DEFAULTS)
        assert outcomes(list(run_batch(rows, out, judged))) == ["done"]
        assert outcomes(list(run_batch(rows, out, judged))) == ["skipped"]
        reports.append(json.loads((out / rows[0].id / "report.json").read_text()))
    assert [report["options"]["calibration_sha256"] for report in reports] == [
        calibration.sha256,
        stricter.sha256,
        None,
    ]
    assert reports[1]["status"] == "suspect"


def test_the_command_notices_another_calibration(tmp_path: Path, manifest: Path) -> None:
    weights = known_weights(tmp_path / "weights")
    call = ["batch", str(manifest), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    assert CliRunner().invoke(app, call).exit_code == 0
    alone = Calibration(alignment_sha256(known_network()), {}, {}, {}, -9.0, 0.5, "made up")
    calibration_file(weights).write_text(alone.to_json(), encoding="utf-8")
    assert " 0 skipped, 0 failed" in CliRunner().invoke(app, call).stdout
    assert " 3 skipped, 0 failed" in CliRunner().invoke(app, call).stdout


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"inputs": 3}', '{"inputs": {}, "options": null}'])
def test_a_report_that_cannot_be_read_is_not_done(tmp_path: Path, manifest: Path, model: Model, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert not done_before(read_manifest(manifest)[0], tmp_path, model, DEFAULTS)


def test_a_bad_row_does_not_stop_the_others(tmp_path: Path, manifest: Path, model: Model) -> None:
    (manifest.parent / "scans/1-pet.png").write_text("not a picture")
    results = run(manifest, tmp_path / "out", model)
    assert outcomes(results) == ["done", "failed", "done"]
    assert "moving image: 1-pet.png: is a text file" in results[1].message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"case0", "case2"}


def test_an_error_that_nobody_foresaw_does_not_stop_the_others(
    tmp_path: Path, manifest: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "1-pet.png":
            raise KeyError
        return original(path, *args, **options)

    original = pipeline.read_image
    monkeypatch.setattr(pipeline, "read_image", read)
    results = run(manifest, tmp_path / "out", model)
    assert outcomes(results) == ["done", "failed", "done"]
    assert results[1].message == "KeyError"


def test_an_earlier_result_of_a_row_that_fails_is_set_aside(tmp_path: Path, manifest: Path, model: Model) -> None:
    out = tmp_path / "out"
    run(manifest, out, model)
    old = snapshot(out / "case1")
    picture = manifest.parent / "scans/1-pet.png"
    good = picture.read_bytes()
    picture.write_text("not a picture")
    results = run(manifest, out, model)
    assert outcomes(results) == ["skipped", "failed", "skipped"]
    assert results[1].message.endswith("; its earlier result is now case1.outdated")
    assert {path.name for path in out.iterdir()} == {"case0", "case1.outdated", "case2"}
    assert snapshot(out / "case1.outdated") == old
    assert "outdated" not in run(manifest, out, model)[1].message  # nothing is left that could be mistaken
    picture.write_bytes(good)
    assert outcomes(run(manifest, out, model)) == ["skipped", "done", "skipped"]
    assert snapshot(out / "case1") == old
    picture.unlink()
    assert run(manifest, out, model)[1].message.endswith("; its earlier result is now case1.outdated1")
    assert snapshot(out / "case1.outdated") == snapshot(out / "case1.outdated1") == old


def test_an_earlier_result_that_cannot_be_set_aside_is_told(
    tmp_path: Path, manifest: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    run(manifest, tmp_path / "out", model)
    (manifest.parent / "scans/1-pet.png").unlink()
    monkeypatch.setattr(Path, "rename", refuse)
    results = run(manifest, tmp_path / "out", model)
    assert outcomes(results) == ["skipped", "failed", "skipped"]
    assert (
        f"an earlier result in {tmp_path}/out/case1 could not be renamed (Permission denied); do not use it"
        in results[1].message
    )


def test_a_folder_that_cannot_be_looked_into_fails_its_row_alone(tmp_path: Path, manifest: Path, model: Model) -> None:
    first, second, _ = read_manifest(manifest)
    results = list(run_batch([replace(first, id="x" * 300), second], tmp_path / "out", model))
    assert outcomes(results) == ["failed", "done"]
    assert "File name too long" in results[0].message


def test_an_id_of_the_longest_length_names_a_folder(tmp_path: Path, manifest: Path, model: Model) -> None:
    name = "é" * (batch.LONGEST_ID // 2)
    path = written(manifest.parent, f"id,fixed,moving\n{name},scans/0-mri.png,scans/0-pet.png\n")
    assert outcomes(run(path, tmp_path / "out", model)) == ["done"]
    (manifest.parent / "scans/0-pet.png").unlink()
    assert run(path, tmp_path / "out", model)[0].message.endswith(f"; its earlier result is now {name}.outdated")


def test_a_folder_that_cannot_be_replaced_fails_before_the_work(
    tmp_path: Path, manifest: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_manifest(manifest)[:1]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "case0").symlink_to(tmp_path)
    monkeypatch.setattr(batch, "fuse", lambda *_, **__: pytest.fail("it was fused"))
    (result,) = run_batch(rows, tmp_path / "out", model)
    assert (result.outcome, "case0 is a file or a link" in result.message) == ("failed", True)


def test_a_row_does_not_replace_a_folder_that_is_no_result(tmp_path: Path, manifest: Path, model: Model) -> None:
    (tmp_path / "out" / "case1").mkdir(parents=True)
    (tmp_path / "out" / "case1" / "notes.txt").write_text("mine")
    results = run(manifest, tmp_path / "out", model)
    assert outcomes(results) == ["done", "failed", "done"]
    assert "not a result folder" in results[1].message
    assert snapshot(tmp_path / "out" / "case1") == {"notes.txt": b"mine"}


def test_a_result_with_an_emptied_file_or_another_name_of_an_input_is_made_anew(
    tmp_path: Path, manifest: Path, model: Model
) -> None:
    out = tmp_path / "out"
    run(manifest, out, model)
    picture = out / "case0/fused.png"
    before = picture.read_bytes()
    picture.write_bytes(b"")
    (manifest.parent / "scans/1-mri.png").rename(manifest.parent / "scans/renamed.png")
    manifest.write_text(manifest.read_text().replace("1-mri.png", "renamed.png"))
    assert outcomes(run(manifest, out, model)) == ["done", "done", "skipped"]
    assert picture.read_bytes() == before
    report = json.loads((out / "case1/report.json").read_text())
    assert report["inputs"]["fixed"]["file"] == "renamed.png"


@pytest.fixture
def second_save_fails(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Raises what the list holds when the second result is half written."""
    errors: list[BaseException] = []
    drawn = result.overview
    calls = 0

    def overview(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and errors:
            raise errors.pop()
        return drawn(*args, **options)

    monkeypatch.setattr(result, "overview", overview)
    return errors


def test_an_interruption_leaves_no_half_folder_and_the_next_run_goes_on(
    tmp_path: Path, manifest: Path, model: Model, second_save_fails: list[BaseException]
) -> None:
    second_save_fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path / "out", model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case0"]
    assert set(snapshot(tmp_path / "out" / "case0")) == FILES
    assert outcomes(run(manifest, tmp_path / "out", model)) == ["skipped", "done", "done"]


def test_a_fault_of_ours_in_one_row_is_told_with_its_type(
    tmp_path: Path,
    manifest: Path,
    model: Model,
    second_save_fails: list[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    second_save_fails.append(KeyError("panels"))
    with caplog.at_level("DEBUG", logger="bsafusion"):
        results = run(manifest, tmp_path / "out", model)
    assert outcomes(results) == ["done", "failed", "done"]
    assert results[1].message == "KeyError: 'panels'"
    assert "in overview" in caplog.text  # the traceback


def test_a_full_disk_in_one_row_is_listed(
    tmp_path: Path, manifest: Path, model: Model, second_save_fails: list[BaseException]
) -> None:
    second_save_fails.append(OSError(28, "No space left on device"))
    results = run(manifest, tmp_path / "out", model)
    assert outcomes(results) == ["done", "failed", "done"]
    assert "No space left" in results[1].message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"case0", "case2"}


# --- the command ---


def test_the_command_does_all_rows_then_skips_them(tmp_path: Path, manifest: Path) -> None:
    weights = known_weights(tmp_path / "weights")
    call = ["batch", str(manifest), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    first = CliRunner().invoke(app, call)
    assert first.exit_code == 0, first.output
    assert "0 skipped, 0 failed" in first.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"case0", "case1", "case2"}
    before = times(tmp_path / "out")
    second = CliRunner().invoke(app, call)
    assert second.exit_code == 0
    assert second.stdout.startswith("0 ok, 0 suspect, 3 skipped, 0 failed")
    assert second.stderr == ""
    assert times(tmp_path / "out") == before


def test_the_command_lists_what_failed_and_exits_with_1(tmp_path: Path, manifest: Path) -> None:
    weights = known_weights(tmp_path / "weights")
    (manifest.parent / "scans/1-mri.png").unlink()
    call = ["batch", str(manifest), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1
    assert "0 skipped, 1 failed" in done.stdout
    failed = [line for line in done.stderr.splitlines() if not line.startswith("suspect: ")]
    assert len(failed) == 1
    assert failed[0].startswith("failed: case1: fixed image: 1-mri.png: no such file")
    assert json.loads((tmp_path / "out/case0/report.json").read_text())["options"]["weights"] == "known"


def test_the_command_interrupted_leaves_whole_results_only(
    tmp_path: Path, manifest: Path, second_save_fails: list[BaseException]
) -> None:
    second_save_fails.append(KeyboardInterrupt())
    weights = known_weights(tmp_path / "weights")
    call = ["batch", str(manifest), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    assert CliRunner().invoke(app, call).exit_code == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case0"]


def test_the_command_passes_its_options_on(tmp_path: Path, manifest: Path) -> None:
    weights = known_weights(tmp_path / "weights")
    call = ["batch", str(manifest), "-o", str(tmp_path / "out"), "--weights", str(weights)]
    done = CliRunner().invoke(app, [*call, "--fusion", "guided", "--weight-fixed", "0.25", "--aligned"])
    assert done.exit_code == 0, done.output
    options = json.loads((tmp_path / "out/case0/report.json").read_text())["options"]
    assert (options["fusion"], options["weight_fixed"], options["aligned"]) == ("guided", 0.25, True)
    refused = CliRunner().invoke(app, [*call, "--aligned", "--no-fuse"])
    assert refused.exit_code == 2
