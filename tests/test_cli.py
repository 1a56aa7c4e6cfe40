from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk
import torch
from pydicom.data import get_testdata_file
from typer.testing import CliRunner, Result

import bsafusion
from bsafusion import pipeline
from bsafusion.cli import app
from bsafusion.deformation import DeformationField
from bsafusion.image import Geometry
from bsafusion.io import read_image, write_deformation, write_image
from bsafusion.training import TrainingCfg
from bsafusion.weights import FOLDER, file_sha256
from pairs import hot, known_weights, pixels_of, scan, snapshot, write_picture, write_volume

SHAPE = (81, 65)
FILES = {
    *("fused.png", "aligned.png", "overview.png", "report.html", "report.json"),
    *("deformation.nii.gz", "deformation_inverse.nii.gz"),
}
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]
AXIAL = np.diag([-1.0, -1.0, 5.0, 1.0])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="bsafusion")


def run_outside(*arguments: str | Path, module: bool = False) -> subprocess.CompletedProcess[str]:
    """The command as users start it."""
    script = Path(sys.executable).with_name("bsafusion")
    start = [sys.executable, "-m", "bsafusion"] if module or not script.exists() else [str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that moves nothing."""
    return known_weights(tmp_path_factory.mktemp("still"))


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Path]:
    fixed = write_picture(tmp_path / "mri.png", scan(SHAPE))
    return fixed, write_picture(tmp_path / "pet.png", hot(scan(SHAPE, seed=1)))


# --- help and what it costs ---


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    for flag in ("--help", "-h"):
        shown = run(command, flag)
        assert shown.exit_code == 0
        assert "Usage: bsafusion " + command in shown.stdout
        assert shown.stderr == ""


def test_the_version_is_that_of_the_package() -> None:
    shown = run("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"bsafusion {bsafusion.__version__}\n")


def test_help_lists_the_commands_and_the_intended_use() -> None:
    assert {"fuse", "batch", "warp", "train", "info"} <= set(COMMANDS)
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(f"\n  {command} " in shown.stdout for command in COMMANDS)
    assert "Not for clinical use" in " ".join(shown.stdout.split())


def test_help_and_info_import_nothing_heavy() -> None:
    program = f"""
import sys
from bsafusion.cli import app
for arguments in (["--help"], ["info"], ["info", "--json"], *([name, "-h"] for name in {COMMANDS})):
    try:
        app(arguments, prog_name="bsafusion")
    except SystemExit as end:
        assert end.code in (0, None), arguments
heavy = set("torch numpy scipy SimpleITK nibabel pydicom PIL safetensors".split()) & set(sys.modules)
sys.exit(" ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    for name in bsafusion.__all__:
        assert getattr(bsafusion, name) is not None
    assert dir(bsafusion) == bsafusion.__all__ == sorted(bsafusion.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fusion'"):
        _ = bsafusion.fusion


def test_info_in_words_and_as_json() -> None:
    words, data = run("info"), run("info", "--json")
    assert words.exit_code == data.exit_code == 0
    listed = json.loads(data.stdout)
    assert listed["version"] == importlib.metadata.version("bsafusion")
    assert "Not for clinical use" in listed["use"]
    assert any(record["name"] == "default" for record in listed["weights"])
    assert (Path(listed["samples"]) / "samples.json").is_file()
    for record in listed["weights"]:
        assert record["sha256"] == file_sha256(FOLDER / record["file"])
        assert f"weights {record['name']}: " in words.stdout
        assert record["sha256"] in words.stdout
        assert record["use"] in words.stdout


# --- fuse ---


def test_fuse_writes_the_promised_folder(tmp_path: Path, good: tuple[Path, Path]) -> None:
    done = run("fuse", *good, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert done.stdout.startswith(f"{report['status']} in ")
    assert done.stdout.rstrip().endswith(str(tmp_path / "out" / "overview.png"))
    assert done.stderr.splitlines() == [f"bsafusion: suspect: {reason}" for reason in report["reasons"]]
    assert pixels_of(tmp_path / "out" / "fused.png").shape == (*SHAPE, 3)


def test_fuse_as_users_start_it(tmp_path: Path, good: tuple[Path, Path], still: Path) -> None:
    done = run_outside("fuse", *good, "-o", tmp_path / "out", "--weights", still, "--task", "pet-mri")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    np.testing.assert_array_equal(pixels_of(tmp_path / "out" / "aligned.png"), pixels_of(good[1]))
    options = json.loads((tmp_path / "out" / "report.json").read_text())["options"]
    assert (options["task"], options["task_from"]) == ("pet-mri", "request")


def test_fuse_says_that_a_result_is_suspect_and_why(tmp_path: Path, good: tuple[Path, Path]) -> None:
    doubtful = known_weights(tmp_path / "weights", expected_error=9.0)
    done = run("fuse", *good, "-o", tmp_path / "out", "--weights", doubtful)
    assert done.exit_code == 0
    assert done.stdout.startswith("suspect in ")
    assert "bsafusion: suspect: the network expects its field to be off by 9.0 px" in done.stderr


@pytest.mark.parametrize(
    ("extra", "mode", "told"),
    [
        (("--aligned",), "fuse only", "(alignment was skipped as asked"),
        (("--no-fuse",), "align only", "(nothing was fused, as asked)"),
        (("--fusion", "laplacian", "--weight-fixed", "0.75"), "align and fuse", "ok in "),
        (("--blend", "alpha"), "align and fuse", "ok in "),
        (("--refine", "2"), "align and fuse", "ok in "),
        (("--mirrored", "always"), "align and fuse", "ok in "),
    ],
)
def test_fuse_does_what_its_options_say(
    tmp_path: Path, still: Path, extra: tuple[str, ...], mode: str, told: str
) -> None:
    images = [write_picture(tmp_path / name, scan(SHAPE)) for name in ("mri.png", "same.tif")]
    done = run("fuse", *images, "-o", tmp_path / "out", "--weights", still, *extra)
    assert done.exit_code == 0, done.output
    assert told in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mode"] == mode
    assert (tmp_path / "out" / "fused.png").exists() == (mode != "align only")
    for name, value in zip(extra[::2], extra[1::2], strict=False):
        assert str(report["options"][name[2:].replace("-", "_")]) == value


def test_fuse_replaces_a_result_only_when_asked(tmp_path: Path, good: tuple[Path, Path], still: Path) -> None:
    call = ["fuse", *good, "-o", tmp_path / "out", "--weights", still]
    assert run(*call).exit_code == 0
    first = snapshot(tmp_path / "out")
    (tmp_path / "out" / "fused.png").write_bytes(b"")
    assert run(*call).exit_code == 2
    assert run(*call, "--overwrite").exit_code == 0
    assert snapshot(tmp_path / "out") == first


def full_folder(folder: Path) -> Path:
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    return folder / "full"


def linked_folder(folder: Path) -> Path:
    (folder / "link").symlink_to(folder)
    return folder / "link"


def mixed_folder(folder: Path) -> Path:
    (full_folder(folder) / "report.json").write_text("{}")
    return folder / "full"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (full_folder, "full has no report.json, so it is not a result folder; remove it or choose another"),
        (mixed_folder, "full holds notes.txt, which is no part of a result; move it away first"),
        (linked_folder, "link is a file or a link; expected a folder to make; choose another path"),
    ],
)
def test_fuse_does_no_work_for_a_folder_it_may_not_replace(
    tmp_path: Path, good: tuple[Path, Path], make: Callable[[Path], Path], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "read_input", lambda *_, **__: pytest.fail("it was read"))
    out = make(tmp_path)
    done = run("fuse", *good, "-o", out, "--overwrite")
    assert (done.exit_code, done.stderr) == (2, f"bsafusion: {tmp_path / said}\n")


@pytest.mark.parametrize("out", ["out", "made/out", "there"])
def test_a_folder_that_may_not_be_written_to_is_told_before_any_work(
    tmp_path: Path, good: tuple[Path, Path], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(pipeline, "read_input", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    before = snapshot(tmp_path)
    done = run("fuse", *good, "-o", tmp_path / out)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"bsafusion: {tmp_path} may not be written to; expected a folder for the result")
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_termination_cleans_up_as_an_interruption_does(
    tmp_path: Path, good: tuple[Path, Path], still: Path, name: str, code: int
) -> None:
    program = f"""
import os, shutil, signal, sys
from bsafusion import cli, result
signal.signal(signal.{name}, signal.SIG_DFL)  # whatever these tests run under
remove = shutil.rmtree
end = lambda *_: os.kill(os.getpid(), signal.{name})
result.write_deformation = end
shutil.rmtree = lambda *a, **k: (end(), remove(*a, **k))  # it comes twice
sys.argv = ["bsafusion", "fuse", *{[str(path) for path in good]}, "-o", {str(tmp_path / "out")!r},
            "--weights", {str(still)!r}]
cli.main()
"""
    before = snapshot(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (code, "")
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    program = """
import os, signal, sys
from bsafusion import cli, weights
signal.signal(signal.SIGHUP, signal.SIG_IGN)
shipped = weights.shipped
weights.shipped = lambda: (os.kill(os.getpid(), signal.SIGHUP), shipped())[1]
sys.argv = ["bsafusion", "info"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_fuse_writes_into_an_empty_folder_and_makes_parents(
    tmp_path: Path, good: tuple[Path, Path], still: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert run("fuse", *good, "-o", out, "--weights", still).exit_code == 0
        assert {path.name for path in out.iterdir()} == FILES


def test_fuse_takes_slices_of_volumes(tmp_path: Path, still: Path) -> None:
    for name, seed in (("mri", 0), ("ct", 5)):
        slices = np.stack([scan((65, 81), seed=seed + k).T for k in range(3)], axis=-1)
        write_volume(tmp_path / f"{name}.nii.gz", slices.astype(np.int16), AXIAL)
    out = tmp_path / "out"
    call = ["fuse", tmp_path / "mri.nii.gz", tmp_path / "ct.nii.gz", "-o", out, "--weights", still]
    done = run(*call, "--fixed-slice", "1", "--moving-slice", "2")
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == FILES | {"fused.nii.gz", "aligned.nii.gz"}
    aligned = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "aligned.nii.gz")))
    np.testing.assert_allclose(aligned[0], scan((65, 81), seed=7), atol=0.05)
    notes = json.loads((out / "report.json").read_text())["inputs"]
    assert (notes["fixed"]["notes"]["slice_index"], notes["moving"]["notes"]["slice_index"]) == (1, 2)


def test_fuse_takes_dicom(tmp_path: Path, still: Path) -> None:
    files = [get_testdata_file(name, download=False) for name in ("MR_small.dcm", "CT_small.dcm")]
    done = run("fuse", *files, "-o", tmp_path / "out", "--weights", still)
    assert done.exit_code == 0, done.output
    source, aligned = (sitk.ReadImage(str(path)) for path in (files[0], tmp_path / "out" / "aligned.nii.gz"))
    assert aligned.GetSize() == (64, 64, 1)
    for corner in ((0, 0, 0), (63, 63, 0)):
        places = (image.TransformIndexToPhysicalPoint(corner) for image in (source, aligned))
        np.testing.assert_allclose(*places, atol=1e-3)


def test_control_c_is_no_traceback(
    tmp_path: Path, good: tuple[Path, Path], still: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "fuse", interrupted)
    done = run("fuse", *good, "-o", tmp_path / "out", "--weights", still)
    assert done.exit_code == 130
    assert not (tmp_path / "out").exists()


# --- requests that cannot be carried out ---


class Bad(NamedTuple):
    """A request, what makes its files, and what the one line on stderr must say: what came, what to try."""

    name: str
    arguments: Callable[[Path], list[Any]]
    said: tuple[str, ...]


def moving(make: Callable[[Path], Any], *extra: str) -> Callable[[Path], list[Any]]:
    """``fuse`` with a good fixed image and the moving one that ``make`` returns the path of."""
    return lambda folder: ["fuse", folder / "mri.png", make(folder), "-o", folder / "out", *extra]


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def truncated(folder: Path) -> Path:
    data = (folder / "pet.png").read_bytes()
    return content("cut.png", data[: len(data) // 2])(folder)


def nifti(name: str, array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] = AXIAL) -> Callable[[Path], Path]:
    return lambda folder: write_volume(folder / name, array, affine)


def with_nan() -> np.ndarray[Any, Any]:
    array = scan((64, 64)).astype(np.float32)[..., None]
    array[3, 4] = np.nan
    return array


def different_planes(folder: Path) -> list[Any]:
    axial = write_volume(folder / "axial.nii", scan((64, 64))[..., None].astype(np.int16), AXIAL)
    sagittal = write_volume(folder / "sagittal.nii", scan((64, 64))[None].astype(np.int16), np.eye(4))
    return ["fuse", axial, sagittal, "-o", folder / "out"]


def out_of_view(folder: Path) -> list[Any]:
    # Forty of 64 columns are shared, and all that the moving image shows lies in the others.
    array = np.zeros((64, 64, 1), dtype=np.int16)
    array[48:] = 1 + np.arange(16)[:, None, None]
    shifted = AXIAL.copy()
    shifted[0, 3] = -24
    fixed = write_volume(folder / "fixed.nii", scan((64, 64))[..., None].astype(np.int16), AXIAL)
    return ["fuse", fixed, write_volume(folder / "moving.nii", array, shifted), "-o", folder / "out"]


def damaged_weights(folder: Path) -> list[Any]:
    (folder / "weights").mkdir()
    for name in ("default.safetensors", "default.json"):
        shutil.copy(FOLDER / name, folder / "weights" / name)
    path = folder / "weights" / "default.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return ["fuse", folder / "mri.png", folder / "pet.png", "-o", folder / "out", "--weights", path]


def fuse_to(make: Callable[[Path], Path], *extra: str) -> Callable[[Path], list[Any]]:
    return lambda folder: ["fuse", folder / "mri.png", folder / "pet.png", "-o", make(folder), *extra]


def fuse_with(*extra: str) -> Callable[[Path], list[Any]]:
    return fuse_to(lambda folder: folder / "out", *extra)


def manifest(text: str | None) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        if text is not None:
            (folder / "m.csv").write_text(text)
        return ["batch", folder / "m.csv", "-o", folder / "out"]

    return make


def field_file(folder: Path) -> Path:
    field = DeformationField(torch.zeros(2, *SHAPE), Geometry.picture(SHAPE))
    write_deformation(folder / "field.nii.gz", field)
    return folder / "field.nii.gz"


def warp_to(name: str, image: str = "pet.png") -> Callable[[Path], list[Any]]:
    return lambda folder: ["warp", field_file(folder), folder / image, "-o", folder / name]


def training(text: str, *extra: str) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        (folder / "pairs.csv").write_text(text)
        return ["train", folder / "pairs.csv", "-o", folder / "out", "--steps", "1", "--batch", "1", *extra]

    return make


GOOD_PAIR = "task,fixed,moving\npet-mri,mri.png,pet.png\n"
CONVERT = "expected PNG, JPEG, TIFF, NIfTI or DICOM"

REFUSED = [
    Bad("wrong path", moving(lambda f: f / "none.png"), ("moving image: none.png: no such file in", "check the path")),
    Bad("a folder", moving(lambda f: f), ("moving image: ", "is a folder", "choose a file in it")),
    Bad("text", moving(content("note.png", b"hello\n")), ("note.png: is a text file", CONVERT)),
    Bad("another format", moving(content("a.png", b"GIF89a" + bytes(99))), ("a.png: is a GIF", CONVERT, "convert")),
    Bad("half a PNG", moving(truncated), ("cut.png: damaged or unsupported PNG", "export it again")),
    Bad("no bytes", moving(content("empty.png", b"")), ("empty.png: is empty (0 bytes)", "copy or export it again")),
    Bad(
        "constant",
        moving(lambda f: write_picture(f / "flat.png", np.full((64, 64), 7, np.uint8))),
        ("flat.png: every pixel is 7", "expected an image with content", "choose another slice"),
    ),
    Bad("NaN", moving(nifti("nan.nii.gz", with_nan())), ("nan.nii.gz: 1 values are NaN", "replace them")),
    Bad(
        "a volume",
        moving(nifti("v.nii", np.ones((64, 48, 5), np.int16))),
        ("v.nii: 3-D volume of shape (64, 48, 5) where a slice is meant", "--moving-slice"),
    ),
    Bad(
        "a slice that is not there",
        moving(nifti("v.nii", np.ones((64, 48, 5), np.int16)), "--moving-slice", "5"),
        ("slice_index=5", "expected 0..4"),
    ),
    Bad(
        "a slice of a picture",
        moving(lambda f: f / "pet.png", "--moving-slice", "0"),
        ("pet.png: PNG holds one slice but slice_index=0 was given", "leave it out"),
    ),
    Bad(
        "five pixels",
        moving(lambda f: write_picture(f / "tiny.png", scan((5, 5)))),
        ("tiny.png: 5 x 5 pixels", "expected at least 32", "use the full image"),
    ),
    Bad(
        "3000 pixels",
        moving(lambda f: write_picture(f / "huge.png", np.eye(40, 3000, dtype=np.uint8))),
        ("huge.png: 3000 x 40 pixels", "expected at most 2048", "crop or downsample"),
    ),
    Bad(
        "colour as fixed",
        lambda f: ["fuse", f / "pet.png", f / "mri.png", "-o", f / "out"],
        ("fixed image pet.png is in colour", "expected a grey one", "swap the two images"),
    ),
    Bad("different planes", different_planes, ("axial", "sagittal", "expected one plane", "reformat one")),
    Bad("out of view", out_of_view, ("nothing of it but background falls on the fixed grid", "check the positions")),
    Bad("unknown task", fuse_with("--task", "mri-ct"), ("unknown task 'mri-ct'", "expected ct-mri, pet-mri")),
    Bad("unknown fusion", fuse_with("--fusion", "mean"), ("unknown fusion 'mean'", "expected one of network, maximum")),
    Bad("unknown mirrored", fuse_with("--mirrored", "yes"), ("unknown mirrored 'yes'", "expected one of auto, always")),
    Bad("unknown blend", fuse_with("--blend", "add"), ("unknown blend 'add'", "expected one of luminance, alpha")),
    Bad("unknown colour map", fuse_with("--colormap", "jet"), ("unknown colormap 'jet'", "expected one of none, hot")),
    Bad("a weight too large", fuse_with("--weight-fixed", "2"), ("a weight of 2 for the fixed image", "expected 0")),
    Bad("nothing to do", fuse_with("--aligned", "--no-fuse"), ("nothing is to be fused", "leave out one or the other")),
    Bad("too many steps", fuse_with("--refine", "500"), ("500 steps of refinement", "whole number, 0 (none) to 200")),
    Bad("nothing to refine", fuse_with("--refine", "9", "--aligned"), ("nothing to refine", "leave out one of both")),
    Bad("a colour map on colour", fuse_with("--colormap", "pet"), ("pet.png has colours of its own", "leave the")),
    Bad("unknown weights", fuse_with("--weights", "best"), ("no weights 'best'", "one of the shipped: default")),
    Bad("damaged weights", damaged_weights, ("default.safetensors: sha256 is", "fetch the file again")),
    Bad("unknown device", fuse_with("--device", "tpu"), ("device 'tpu' is not there", "expected one of cpu")),
    Bad("a full folder", fuse_to(full_folder), ("full exists and is not empty", "choose another folder")),
    Bad(
        "the folder at hand",
        fuse_to(lambda _: Path()),
        (". is no folder of the result's own", "give it a name: result"),
    ),
    Bad("a folder of another kind", fuse_to(full_folder, "--overwrite"), ("is not a result folder", "choose another")),
    Bad("a file as OUT", fuse_to(lambda f: f / "pet.png"), ("pet.png is a file; expected a folder", "choose another")),
    Bad(
        "a file as OUT to be replaced",
        fuse_to(lambda f: f / "pet.png", "--overwrite"),
        ("pet.png is a file; expected a folder", "choose another path"),
    ),
    Bad("a file above OUT", fuse_to(lambda f: f / "pet.png" / "a"), ("pet.png is a file; expected a folder",)),
    Bad("no manifest", manifest(None), ("m.csv: no such manifest", "expected a CSV with columns id,fixed,moving")),
    Bad("a column missing", manifest("id,fixed\na,b\n"), ("no column moving (found: id, fixed)", "add it")),
    Bad("an id twice", manifest("id,fixed,moving\na,b,c\na,d,e\n"), ("line 3: id 'a' stands twice", "unique")),
    Bad("an id that climbs", manifest("id,fixed,moving\n../x,b,c\n"), ("id '../x' cannot name a folder", "letters")),
    Bad("a row's task", manifest("id,fixed,moving,task\na,b,c,ct\n"), ("unknown task 'ct'", "expected ct-mri")),
    Bad("no rows", manifest("id,fixed,moving\n"), ("no rows below the header", "expected one a pair")),
    Bad(
        "a file as OUT of a batch",
        lambda f: [*manifest("id,fixed,moving\na,b,c\n")(f)[:-1], f / "pet.png"],
        ("pet.png is a file; expected a folder", "choose another path"),
    ),
    Bad(
        "a picture as field",
        lambda f: ["warp", f / "mri.png", f / "pet.png", "-o", f / "w.png"],
        ("mri.png: is a PNG file", "expected a displacement field"),
    ),
    Bad(
        "an image as field",
        lambda f: ["warp", nifti("i.nii", scan((64, 64)))(f), f / "pet.png", "-o", f / "w.png"],
        ("i.nii: NIfTI of shape (64, 64)", "expected a displacement field", "intent 1007"),
    ),
    Bad("a file that is there", warp_to("mri.png"), ("mri.png exists", "choose another file or pass --overwrite")),
    Bad("a folder to write", warp_to("."), ("is a folder; expected a file to write", "add its name")),
    Bad(
        "a volume to warp",
        lambda f: ["warp", field_file(f), nifti("v.nii", np.ones((64, 48, 5), np.int16))(f), "-o", f / "w.nii.gz"],
        ("v.nii: 3-D volume", "pass slice_index", "--image-slice K"),
    ),
    Bad(
        "labels that are too large",
        lambda f: [
            *("warp", field_file(f), nifti("l.nii", np.full((*SHAPE[::-1], 1), 2**24 + 1, np.int32))(f)),
            *("-o", f / "w.nii.gz", "--labels"),
        ],
        ("l.nii: label 16777217 of int32 would not keep its value", "renumber the labels"),
    ),
    Bad("an unknown suffix", warp_to("w.bmp"), ("w.bmp: cannot write .bmp", "use .png")),
    Bad(
        "Hounsfield units in a picture",
        lambda f: [
            "warp",
            field_file(f),
            nifti("ct.nii.gz", scan(SHAPE).T[..., None].astype(np.int16) - 100)(f),
            "-o",
            f / "w.png",
        ],
        ("w.png: int16 values -100 to 155 do not fit a picture", "write .nii.gz instead"),
    ),
    Bad(
        "folds of slices",
        lambda f: ["evaluate", f / "p.csv", "-o", f / "out", "--folds", "2"],
        ("--folds shapes the trainings of --split-by case", "leave it out, or split by case"),
    ),
    *(
        Bad(
            f"{option} beside folds",
            lambda f, o=option: ["evaluate", f / "p.csv", "-o", f / "out", "--split-by", "case", o, "a=b"],
            ("--split-by case compares its own trainings alone", "add --methods", f"leave {option} out"),
        )
        for option in ("--weights", "--fused", "--python")
    ),
    Bad("no column to train on", training("fixed,moving\na,b\n"), ("no column task (found: fixed, moving)", "add it")),
    Bad("an unknown task to train", training("task,fixed,moving\nx,a,b\n"), ("line 2: unknown task 'x'", "expected")),
    Bad("a missing training image", training("task,fixed,moving\nct-mri,a.png,b.png\n"), ("a.png: no such file in",)),
    Bad("an unknown preset", training(GOOD_PAIR, "--preset", "big"), ("unknown preset 'big'", "default, paper")),
    Bad("an unknown part", training(GOOD_PAIR, "--parts", "half"), ("parts 'half'", "expected one of all")),
    Bad("an unknown option", training(GOOD_PAIR, "--set", "training.depth=3"), ("no option 'depth'", "expected")),
    Bad("a size that does not fit", training(GOOD_PAIR, "--set", "training.side=64"), ("side 64", "working_side 257")),
    Bad("no such device to train on", training(GOOD_PAIR, "--device", "tpu"), ("device 'tpu' is not there", "cpu")),
    Bad("no weights to start from", training(GOOD_PAIR, "--init", "none"), ("no weights 'none'", "expected")),
]


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: bad.name)
def test_a_bad_request_is_one_line_and_leaves_nothing(tmp_path: Path, good: tuple[Path, Path], bad: Bad) -> None:
    arguments = bad.arguments(tmp_path)
    before = snapshot(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("bsafusion: ")
    for part in bad.said:
        assert part in lines[0]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("name", "module"), [("text", False), ("damaged weights", True)])
def test_a_bad_request_as_users_put_it(tmp_path: Path, good: tuple[Path, Path], name: str, module: bool) -> None:
    bad = next(b for b in REFUSED if b.name == name)
    arguments = bad.arguments(tmp_path)
    before = snapshot(tmp_path)
    done = run_outside(*arguments, module=module)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("bsafusion: ")
    assert all(part in done.stderr for part in bad.said)
    assert snapshot(tmp_path) == before


def test_a_traceback_is_there_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSAFUSION_DEBUG", "1")
    done = run_outside("fuse", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("bsafusion: fixed image: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_help_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "bsafusion", "--help"]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, "bsafusion: [Errno 28] No space left on device\n")


def test_a_failure_that_is_not_the_request_s_is_1(
    tmp_path: Path, good: tuple[Path, Path], still: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bsafusion.result.write_deformation", full)
    before = snapshot(tmp_path)
    done = run("fuse", *good, "-o", tmp_path / "out", "--weights", still)
    assert done.exit_code == 1
    assert done.stderr == "bsafusion: [Errno 28] No space left on device\n"
    assert snapshot(tmp_path) == before


# --- warp ---


def shift(folder: Path, dy: float, dx: float, geometry: Geometry | None = None) -> Path:
    displacement = torch.tensor([dy, dx], dtype=torch.float32).view(2, 1, 1).expand(2, *SHAPE).clone()
    field = DeformationField(displacement, geometry or Geometry.picture(SHAPE))
    write_deformation(folder / "shift.nii.gz", field)
    return folder / "shift.nii.gz"


def labels_of(seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Blocks of labels that are far from consecutive."""
    names = np.array([0, 3, 50, 51, 200], dtype=np.uint8)
    blocks = np.random.default_rng(seed).integers(0, len(names), (SHAPE[0] // 9 + 1, SHAPE[1] // 9 + 1))
    return names[np.kron(blocks, np.ones((9, 9), int))[: SHAPE[0], : SHAPE[1]]]


def test_warp_looks_where_the_field_points(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "labels.png", labels_of())
    done = run("warp", shift(tmp_path, 1.0, -2.0), image, "-o", tmp_path / "w.png", "--labels")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'w.png'}\n"
    carried = pixels_of(tmp_path / "w.png")
    np.testing.assert_array_equal(carried[:-1, 2:], labels_of()[1:, :-2])
    assert (carried[-1] == 0).all()
    assert (carried[:, :2] == 0).all()


def test_labels_keep_their_values_between_voxels(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "labels.png", labels_of())
    field = shift(tmp_path, 0.4, 1.3)
    run("warp", field, image, "-o", tmp_path / "near.png", "--labels")
    run("warp", field, image, "-o", tmp_path / "mixed.png")
    near = pixels_of(tmp_path / "near.png")
    assert set(np.unique(near)) <= set(np.unique(labels_of()))
    np.testing.assert_array_equal(near[:-1, :-2], labels_of()[:-1, 1:-1])  # (0.4, 1.3) rounds to (0, 1)
    assert not set(np.unique(pixels_of(tmp_path / "mixed.png"))) <= set(np.unique(labels_of()))


def test_labels_of_any_integer_type_fit_into_a_picture(tmp_path: Path) -> None:
    for dtype, factor, kind in ((np.int16, 1, np.uint8), (np.int32, 300, np.uint16)):
        values = labels_of().astype(dtype) * factor
        image = write_picture(tmp_path / "labels.tif", values.astype(np.int32))
        done = run("warp", shift(tmp_path, 0.0, 0.0), image, "-o", tmp_path / "w.png", "--labels", "--overwrite")
        assert done.exit_code == 0, done.output
        carried = pixels_of(tmp_path / "w.png")
        assert carried.dtype == kind
        np.testing.assert_array_equal(carried, values)


def test_labels_that_are_no_whole_numbers_need_a_volume(tmp_path: Path) -> None:
    values = labels_of().astype(np.float32)
    values[5, 5] = 0.5
    image = write_picture(tmp_path / "labels.tif", values)
    done = run("warp", shift(tmp_path, 0.0, 0.0), image, "-o", tmp_path / "w.png", "--labels")
    assert (done.exit_code, (tmp_path / "w.png").exists()) == (2, False)
    assert "float32 values 0 to 200 do not fit a picture; write .nii.gz instead" in done.stderr


def test_a_slice_without_labels_is_carried(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "labels.png", np.zeros(SHAPE, np.uint8))
    done = run("warp", shift(tmp_path, 1.0, 2.0), image, "-o", tmp_path / "w.png", "--labels")
    assert done.exit_code == 0, done.output
    assert not pixels_of(tmp_path / "w.png").any()
    assert "every pixel is 0" in run("warp", shift(tmp_path, 1.0, 2.0), image, "-o", tmp_path / "v.png").stderr


def test_beyond_a_label_map_there_is_no_label(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "labels.png", np.full(SHAPE, 7, np.uint8))
    run("warp", shift(tmp_path, 0.0, 3.0), image, "-o", tmp_path / "w.png", "--labels")
    carried = pixels_of(tmp_path / "w.png")
    assert (carried[:, :-3] == 7).all()
    assert (carried[:, -3:] == 0).all()


def test_palette_labels_are_carried_as_their_indices(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(labels_of() % 4, "P")
    picture.putpalette([10, 20, 30, 200, 100, 0, 5, 5, 250, 9, 9, 9])
    picture.save(tmp_path / "labels.png")
    run("warp", shift(tmp_path, 0.0, 0.0), tmp_path / "labels.png", "-o", tmp_path / "w.png", "--labels")
    np.testing.assert_array_equal(pixels_of(tmp_path / "w.png"), labels_of() % 4)


def test_warp_keeps_colours(tmp_path: Path) -> None:
    colours = hot(scan(SHAPE, seed=2))
    image = write_picture(tmp_path / "pet.png", colours)
    done = run("warp", shift(tmp_path, -3.0, 4.0), image, "-o", tmp_path / "w.tif")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(pixels_of(tmp_path / "w.tif")[3:, :-4], colours[:-3, 4:])


def test_warp_keeps_sixteen_bits(tmp_path: Path) -> None:
    values = scan(SHAPE).astype(np.uint16) * 200
    image = write_picture(tmp_path / "deep.png", values)
    run("warp", shift(tmp_path, 0.0, 1.0), image, "-o", tmp_path / "w.png")
    carried = pixels_of(tmp_path / "w.png")
    assert carried.dtype == np.uint16
    np.testing.assert_allclose(carried[:, :-1].astype(int), values[:, 1:], atol=1)


def test_sixteen_bit_colours_are_not_cut_to_eight(tmp_path: Path) -> None:
    colours = np.moveaxis(hot(scan(SHAPE)), -1, 0).astype(np.uint16) * 257
    image, field = tmp_path / "deep.png", shift(tmp_path, 0.0, 0.0)
    write_image(image, colours, value_range=(0, 65535), dtype="uint16")
    done = run("warp", field, image, "-o", tmp_path / "made" / "w.nii.gz")
    assert done.exit_code == 2
    assert "w.nii.gz: colours of 16 bit, but those of a NIfTI have 8; expected .png or .tif" in done.stderr
    assert not (tmp_path / "made").exists()
    assert run("warp", field, image, "-o", tmp_path / "w.tif").exit_code == 0
    np.testing.assert_array_equal(read_image(tmp_path / "w.tif").array, colours)


def test_eight_bit_colours_fit_into_a_nifti(tmp_path: Path) -> None:
    colours = hot(scan(SHAPE))
    image = write_picture(tmp_path / "pet.png", colours)
    done = run("warp", shift(tmp_path, 0.0, 0.0), image, "-o", tmp_path / "w.nii.gz")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "w.nii.gz"))), colours)


def test_warp_of_a_label_volume_s_slice_lands_on_the_fixed_geometry(tmp_path: Path) -> None:
    labels = labels_of().T.astype(np.int16) * 100 - 3000
    volume = write_volume(tmp_path / "labels.nii.gz", np.stack([labels, labels[::-1]], axis=-1), AXIAL)
    geometry = Geometry(SHAPE, (1.0, 1.0), (2.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), plane="axial")
    out = tmp_path / "made" / "w.nii.gz"
    done = run("warp", shift(tmp_path, 0.0, 1.0, geometry), volume, "-o", out, "--labels", "--image-slice", "0")
    assert done.exit_code == 0, done.output
    written = sitk.ReadImage(str(out))
    assert written.GetOrigin() == (2.0, 0.0)
    # Column 0 of the fixed grid lies at x = 2 mm and looks 1 mm further: column 3 of the volume.
    expected = labels.T[:, 3:].astype(float)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written)[:, :-3], expected)
    assert written.GetPixelID() == sitk.sitkInt16  # tools for segmentations refuse real numbers


def test_what_is_carried_to_a_slice_lies_where_it_does(tmp_path: Path, still: Path) -> None:
    coronal = np.array([[-1.0, 0, 0, 40], [0, 0, 5.0, -20], [0, 1.2, 0, -38], [0, 0, 0, 1]])
    images = []
    for name, seed in (("mri", 0), ("ct", 5)):
        slices = np.stack([scan((65, 81), seed=seed + k).T for k in range(3)], axis=-1).astype(np.int16)
        images.append(write_volume(tmp_path / f"{name}.nii.gz", slices, coronal))
    done = run("fuse", *images, "-o", tmp_path / "out", "--weights", still, "--fixed-slice", 1, "--moving-slice", 1)
    assert done.exit_code == 0, done.output
    carried = tmp_path / "w.nii.gz"
    run("warp", tmp_path / "out" / "deformation.nii.gz", images[1], "-o", carried, "--labels", "--image-slice", 1)
    whole = sitk.ReadImage(str(images[0]))
    for path in (carried, tmp_path / "out" / "fused.nii.gz", tmp_path / "out" / "aligned.nii.gz"):
        written = sitk.ReadImage(str(path))
        for x, y in ((0, 0), (80, 64)):
            here, there = (
                written.TransformIndexToPhysicalPoint((x, y, 0)),
                whole.TransformIndexToPhysicalPoint((x, y, 1)),
            )
            np.testing.assert_allclose(here, there, atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(carried)))[0], scan((65, 81), seed=6))


def test_warp_says_how_far_its_slice_lies_from_that_of_the_field(tmp_path: Path, still: Path) -> None:
    images = []
    for name, seed in (("mri", 0), ("ct", 5)):
        slices = np.stack([scan((65, 81), seed=seed + k).T for k in range(3)], axis=-1).astype(np.int16)
        images.append(write_volume(tmp_path / f"{name}.nii.gz", slices, np.diag([-1.0, -1.0, 5.0, 1.0])))
    run("fuse", *images, "-o", tmp_path / "out", "--weights", still, "--fixed-slice", 1, "--moving-slice", 0)
    said = []
    for index in (0, 2):
        field, out = tmp_path / "out" / "deformation.nii.gz", tmp_path / f"w{index}.nii.gz"
        done = run("warp", field, images[1], "-o", out, "--image-slice", index)
        assert done.exit_code == 0, done.output
        said.append(done.stderr)
    note = "note: by its position this slice lies 10 mm from the one that the field was made for; check the slice\n"
    assert said == ["", note]


@pytest.mark.parametrize("code", [0, 1])
def test_warp_refuses_labels_without_the_position_of_the_scan(tmp_path: Path, still: Path, code: int) -> None:
    """``code``: of the moving image's qform and sform; the labels have the other."""
    place = np.array([[-0.9, 0, 0, 60], [0, -0.9, 0, 50], [0, 0, 3.0, 20], [0, 0, 0, 1]])
    paths = []
    for name, placed in (("fixed", 1), ("moving", code), ("labels", 1 - code), ("good", code)):
        nifti = nib.Nifti1Image(scan((65, 81)).T[..., None], place)
        nifti.set_qform(place, code=placed)
        nifti.set_sform(place, code=placed)
        paths.append(tmp_path / f"{name}.nii.gz")
        nib.save(nifti, paths[-1])
    run("fuse", *paths[:2], "-o", tmp_path / "out", "--weights", still)
    field = tmp_path / "out" / "deformation.nii.gz"
    done = run("warp", field, paths[2], "-o", tmp_path / "w.nii.gz", "--labels")
    assert done.exit_code == 2
    assert "copy that scan's header (spacing and position) to the image" in done.stderr
    assert not (tmp_path / "w.nii.gz").exists()
    by_itk = tmp_path / "by_itk.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(paths[3])), str(by_itk))
    for path in (paths[3], by_itk):
        done = run("warp", field, path, "-o", tmp_path / "w.nii.gz", "--labels", "--overwrite")
        assert done.exit_code == 0, done.output
        np.testing.assert_array_equal(nib.load(tmp_path / "w.nii.gz").get_fdata().squeeze(), scan((65, 81)).T)


def test_warp_repeats_what_fuse_did(tmp_path: Path, good: tuple[Path, Path]) -> None:
    weights = known_weights(tmp_path / "weights", (2.5, -1.5))
    run("fuse", *good, "-o", tmp_path / "out", "--weights", weights)
    run("warp", tmp_path / "out" / "deformation.nii.gz", good[1], "-o", tmp_path / "again.png")
    again, aligned = pixels_of(tmp_path / "again.png"), pixels_of(tmp_path / "out" / "aligned.png")
    np.testing.assert_allclose(again.astype(int), aligned, atol=1)


def test_warp_replaces_a_file_only_when_asked(tmp_path: Path, good: tuple[Path, Path]) -> None:
    field = field_file(tmp_path)
    (tmp_path / "w.png").write_bytes(b"mine")
    assert run("warp", field, good[1], "-o", tmp_path / "w.png").exit_code == 2
    assert (tmp_path / "w.png").read_bytes() == b"mine"
    assert run("warp", field, good[1], "-o", tmp_path / "w.png", "--overwrite").exit_code == 0
    np.testing.assert_array_equal(pixels_of(tmp_path / "w.png"), pixels_of(good[1]))


# --- train ---


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Two training pairs and one for validation."""
    (tmp_path / "pairs").mkdir()
    rows = []
    for index, split in enumerate(("train", "train", "val")):
        write_picture(tmp_path / f"pairs/{index}-mri.png", scan((65, 65), seed=index))
        write_picture(tmp_path / f"pairs/{index}-pet.png", hot(scan((65, 65), seed=index)))
        rows.append(["pet-mri", f"{index}-mri.png", f"{index}-pet.png", split])
    path = tmp_path / "pairs" / "pairs.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([["task", "fixed", "moving", "split"], *rows])
    return path


SMALL = ("--set", "training.side=65", "--set", "model.working_side=65", "--set", 'training.suites=["paper"]')


def test_train_stops_goes_on_and_ends_where_one_run_ends(tmp_path: Path, pairs_file: Path) -> None:
    def call(out: str, *extra: str) -> Result:
        return run("train", pairs_file, "-o", tmp_path / out, "--steps", "3", "--batch", "2", *SMALL, *extra)

    assert call("whole").exit_code == 0
    stopped = call("parts", "--until", "2")
    assert stopped.exit_code == 0, stopped.output
    assert stopped.stdout == f"{tmp_path / 'parts' / 'last.safetensors'}\n"
    assert json.loads((tmp_path / "parts/last.json").read_text())["steps"] == 2
    done = call("parts")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'parts' / 'best.safetensors'}\n"
    for name in ("last", "best"):
        record = json.loads((tmp_path / f"parts/{name}.json").read_text())
        assert record["steps"] == 3
        assert record["tasks"] == ["pet-mri"]
        assert record["config"]["working_side"] == 65
        assert record["sha256"] == file_sha256(tmp_path / f"whole/{name}.safetensors")


def test_training_counts_the_steps_that_it_was_set_to(tmp_path: Path, pairs_file: Path) -> None:
    settings = ("--set", "training.steps=1", "--set", "training.log_every=1")
    done = run("train", pairs_file, "-o", tmp_path / "run", "--batch", "1", *SMALL, *settings)
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("step 1/1  ")


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_each_preset_is_trained_by_its_own_recipe(
    preset: str, tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainingCfg] = []

    def refuse(*_: object, cfg: TrainingCfg, **__: object) -> Path:
        asked.append(cfg)
        raise ValueError("enough")

    monkeypatch.setattr("bsafusion.training.train", refuse)
    assert run("train", pairs_file, "-o", tmp_path / "run", "--preset", preset, "--lr", "0.5").exit_code == 2
    assert asked == [(TrainingCfg.published if preset == "paper" else TrainingCfg)(lr=0.5)]


def test_what_was_trained_can_be_used(tmp_path: Path, pairs_file: Path, good: tuple[Path, Path]) -> None:
    trained = run("train", pairs_file, "-o", tmp_path / "run", "--steps", "1", "--batch", "1", *SMALL)
    assert trained.exit_code == 0, trained.output
    done = run("fuse", *good, "-o", tmp_path / "out", "--weights", trained.stdout.strip())
    assert done.exit_code == 0, done.output
    options = json.loads((tmp_path / "out/report.json").read_text())["options"]
    assert options["weights_sha256"] == file_sha256(Path(trained.stdout.strip()))


def test_a_run_is_not_resumed_with_other_options(tmp_path: Path, pairs_file: Path) -> None:
    call = ["train", pairs_file, "-o", tmp_path / "run", "--batch", "1", *SMALL, "--until", "1"]
    assert run(*call, "--steps", "3").exit_code == 0
    before = {path: data for path, data in snapshot(tmp_path / "run").items() if not path.startswith("tensorboard")}
    done = run(*call, "--steps", "4")
    assert done.exit_code == 2
    assert "holds a run with other options (steps differ); choose another folder" in done.stderr
    after = {path: data for path, data in snapshot(tmp_path / "run").items() if not path.startswith("tensorboard")}
    assert after == before


def test_files_that_fuse_writes_are_files_that_it_reads(tmp_path: Path, good: tuple[Path, Path], still: Path) -> None:
    run("fuse", *good, "-o", tmp_path / "out", "--weights", still)
    for name in ("fused.png", "aligned.png", "overview.png"):
        assert read_image(tmp_path / "out" / name).dtype == "uint8"
