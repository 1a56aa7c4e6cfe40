from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from typer.testing import CliRunner

from bsafusion import cli, pipeline
from bsafusion.canonical import canonical
from bsafusion.files import write_json
from bsafusion.image import Geometry, Image
from bsafusion.pipeline import fuse
from bsafusion.refinement import MOST_STEPS
from bsafusion.report_page import render
from bsafusion.request import CHOICES, FuseOptions, RequestError
from bsafusion.result import FusionResult
from bsafusion.viewer import jobs as jobs_module
from bsafusion.viewer import server
from bsafusion.viewer.results import Library, check_root, files_of, read_view, thumbnail, view_of, zip_of
from pairs import hot, known_model, known_weights, scan, write_picture

SHAPE = (81, 65)
SHIFT = (3.0, -2.0)


def picture_bytes(array: Any, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    PILImage.fromarray(array).save(stream, kind)
    return stream.getvalue()


FIXED = picture_bytes(scan(SHAPE))
MOVING = picture_bytes(hot(scan(SHAPE, seed=1)))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> FusionResult:
    folder = tmp_path_factory.mktemp("pair")
    fixed = write_picture(folder / "mri.png", scan(SHAPE))
    moving = write_picture(folder / "pet.png", hot(scan(SHAPE, seed=1)))
    return fuse(fixed, moving, model=known_model(SHIFT))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(known_weights(tmp_path_factory.mktemp("weights"), SHIFT))


def saved(result: FusionResult, folder: Path) -> Path:
    result.save(folder)
    page = render(result.report, result.panels, result.expected_error)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder


@contextmanager
def running(cfg: server.ViewerCfg) -> Iterator[Any]:
    """A client of a viewer that runs in a thread, with the page's own Origin."""
    with server.listen(0) as listener:
        viewer = server.build_server(cfg, listener)
        thread = threading.Thread(target=server.run, args=(viewer, listener))
        thread.start()
        address = server.address(listener).rstrip("/")
        try:
            with httpx.Client(base_url=address, headers={"Origin": address}, timeout=60, trust_env=False) as client:
                yield client
        finally:
            viewer.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def client(weights: str) -> Iterator[Any]:
    with running(server.ViewerCfg(weights=weights, largest_upload=2**20)) as ready:
        yield ready


def put(client: Any, role: str, content: bytes, name: str = "image.png", **query: Any) -> Any:
    return client.post(f"/api/inputs/{role}", params={"name": name, **query}, content=content)


def start(client: Any, fixed: bytes = FIXED, moving: bytes = MOVING, task: str = "auto", **options: Any) -> Any:
    ids = {role: put(client, role, c, f"{role}.png").json()["id"] for role, c in (("fixed", fixed), ("moving", moving))}
    return client.post("/api/jobs", json={**ids, "task": task, "options": options})


def wait(client: Any, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        told: dict[str, Any] = client.get(f"/api/jobs/{job}").json()
        if told["state"] != "running":
            return told
        time.sleep(0.02)
    raise AssertionError("the job did not end")


# --- the page's script, without a browser ---

STATIC = Path(server.__file__).parent / "static"
PAGE_SCRIPT = """
const vm = require("node:vm"), fs = require("node:fs");
const elements = {};
const element = () => {
  const within = (self, name) => (self.parts[name] ||= element());
  const self = {
    parts: {}, dataset: {}, validity: {}, value: "", append() {}, classList: { add() {}, remove() {} },
    querySelector: (selector) => selector.split(" ").reduce(within, self), querySelectorAll: () => [],
  };
  return self;
};
const document = { ...element(), getElementById: (id) => (elements[id] ||= element()), body: element() };
const page = vm.createContext({ document, performance, setTimeout, URLSearchParams, window: {}, console });
for (const name of ["stage.js", "app.js"]) {
  vm.runInContext(fs.readFileSync(`${process.argv[1]}/${name}`, "utf8").replace(/^start\\(\\);$/m, ""), page);
}
vm.runInContext(process.argv[2], page);
"""


def in_page(script: str) -> Any:
    """What ``script`` says, run after the page's own scripts with nothing to draw on."""
    command = ["node", "-e", PAGE_SCRIPT, str(STATIC), f"(async () => {{{script}}})()"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node on the PATH")


@needs_node
@pytest.mark.parametrize("wait", ["", "await sleep(120);"], ids=["at once", "while it runs"])
def test_a_second_pair_does_not_lose_the_result_of_the_first(wait: str) -> None:
    told = in_page(f"""
      const opened = [];
      let asked = 0;
      open = async (key) => opened.push(key);
      call = async (path, options) => {{
        const told = (state) => ({{ json: async () => ({{ id: "a", state, result: "k" }}) }});
        if (!options) return told(asked++ < 5 ? "running" : "done");
        if (state.posted) throw new Error("another pair is being fused");
        state.posted = true;
        return told("running");
      }};
      state.inputs = {{ fixed: {{ id: "f" }}, moving: {{ id: "m" }} }};
      const first = fuse();
      {wait}
      await Promise.all([first, fuse()]);
      console.log(JSON.stringify({{ opened, job: state.job, said: $("job-error").textContent }}));
    """)
    assert (told["opened"], told["job"]) == (["k"], None)
    assert "another pair is being fused" in told["said"]


@needs_node
def test_a_result_that_is_no_longer_wanted_does_not_finish_opening() -> None:
    told = in_page("""
      let go;
      const held = new Promise((resolve) => { go = resolve; });
      resetView = showResult = page = drawNow = () => {};
      choose = () => {};
      call = async (path) => {
        if (path === "/api/results/old/layers/displacement") await held;
        const layers = { fixed: { dtype: "uint8" }, displacement: { dtype: "uint8" } };
        return { json: async () => ({ layers }), arrayBuffer: async () => new ArrayBuffer(1) };
      };
      const old = open("old");
      await sleep(50);
      await open("new");
      go();
      await old;
      console.log(JSON.stringify(document.body.dataset.complete));
    """)
    assert told == "new"


# A server that takes ``waits[slice]`` ms for a volume and 250 ms for a pair, one at a time, of those in ``fused``.
SLOW_SERVER = """
  page = () => {};
  const waits = {}, fused = [], opened = [];
  let running = null;
  open = async (key) => opened.push(key);
  call = async (path, options = {}) => {
    const told = (body) => ({ json: async () => body });
    const [, role, query] = path.match(/inputs[/](.*)[?](.*)/) || [];
    if (role) {
      const slice = new URLSearchParams(query).get("slice_index");
      await sleep(waits[slice] || 0);
      const about = { id: `${options.body.name} ${slice}`, name: options.body.name, slice_index: Number(slice) };
      return told({ ...about, size: [65, 81], modality: "unknown" });
    }
    if (options.method === "POST") {
      await sleep(20);
      if (running) throw new Error("another pair is being fused; wait for it or cancel it first");
      const { fixed, moving } = JSON.parse(options.body);
      running = { id: fused.push(`${fixed}, ${moving}`), state: "running", result: `${fixed}, ${moving}`, polls: 0 };
    } else if (options.method === "DELETE") running.state = "cancelled";
    else if (++running.polls === 5) running.state = "done";
    const job = { ...running };
    if (job.state !== "running") running = null;
    return told(job);
  };
  const [mri, ct] = ["mri", "ct"].map((name) => ({ name: `${name}.nii.gz`, size: 1 }));
  const idle = async () => { do await sleep(100); while (state.job); };
  $("at-once").checked = true;
  await takeAll([ct], "moving", "5");
"""


@needs_node
@pytest.mark.parametrize(
    ("waits", "pause"),
    [({10: 200, 20: 10}, 0), ({10: 200, 20: 10}, 100), ({}, 5), ({}, 30), ({}, 120)],
    ids=["later first", "later first, at rest", "while it is asked for", "as it begins", "while it runs"],
)
def test_the_slice_that_was_chosen_last_is_fused(waits: dict[int, int], pause: int) -> None:
    told = in_page(f"""
      {SLOW_SERVER}
      Object.assign(waits, {json.dumps(waits)});
      const first = takeAll([mri], "fixed", "10");
      await sleep({pause});
      await Promise.all([first, takeAll([mri], "fixed", "20")]);
      await sleep(200);
      await idle();
      const said = $("job-error").textContent, file = zone("fixed").querySelector(".file").textContent;
      console.log(JSON.stringify({{ opened, said, file, id: state.inputs.fixed.id }}));
    """)
    assert told["opened"] == ["mri.nii.gz 20, ct.nii.gz 5"]
    assert (told["said"], told["id"]) == ("", "mri.nii.gz 20")
    assert told["file"] == "mri.nii.gz, slice 20: 65 × 81, grey"


@needs_node
def test_swap_takes_the_slices_along_and_fuses() -> None:
    told = in_page(f"""
      {SLOW_SERVER}
      await takeAll([mri], "fixed", "10");
      await swap();
      const slices = ["fixed", "moving"].map((role) => zone(role).querySelector(".slice input").value);
      console.log(JSON.stringify({{ opened, slices }}));
    """)
    assert told["opened"] == ["mri.nii.gz 10, ct.nii.gz 5", "ct.nii.gz 5, mri.nii.gz 10"]
    assert told["slices"] == ["5", "10"]


@needs_node
def test_what_is_no_file_fuses_nothing_and_cancel_drops_the_job() -> None:
    told = in_page(f"""
      {SLOW_SERVER}
      await takeAll([mri], "fixed", "10");
      await takeAll([], undefined);
      const again = fuse();
      await sleep(60);
      cancel();
      await again;
      console.log(JSON.stringify({{ fused, opened, job: state.job, said: $("job-error").textContent }}));
    """)
    assert len(told["fused"]) == 2
    assert len(told["opened"]) == 1
    assert (told["job"], told["said"]) == (None, "")


# --- fusing through the server ---


def test_two_uploads_become_a_result_with_the_numbers_of_the_package(client: Any, weights: str) -> None:
    told = wait(client, start(client, task="pet-mri").json()["id"])
    assert (told["state"], told["progress"]) == ("done", 1.0)
    shown = client.get(f"/api/results/{told['result']}").json()
    assert shown["report"]["options"]["task"] == "pet-mri"
    assert shown["report"]["inputs"]["fixed"]["file"] == "fixed.png"
    assert shown["name"] == "moving.png on fixed.png"
    layer = {}
    for name, about in shown["layers"].items():
        raw = client.get(f"/api/results/{told['result']}/layers/{name}").content
        layer[name] = np.frombuffer(raw, about["dtype"]).reshape(about["shape"])
    np.testing.assert_array_equal(layer["fixed"][0], scan(SHAPE))
    np.testing.assert_array_equal(layer["moving"].transpose(1, 2, 0), hot(scan(SHAPE, seed=1)))
    # y first, as in the package; the known network moves every pixel by the same.
    np.testing.assert_allclose(layer["displacement"][0], SHIFT[0], atol=1e-3)
    np.testing.assert_allclose(layer["displacement"][1], SHIFT[1], atol=1e-3)
    np.testing.assert_allclose(layer["jacobian"], 1, atol=1e-3)
    np.testing.assert_allclose(layer["expected_error"], 1, atol=1e-3)
    np.testing.assert_allclose(layer["aligned"][:, :-3, 2:], layer["moving"][:, 3:, :-2], atol=0.05)
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"/api/results/{told['result']}/zip").content))
    assert set(archive.namelist()) == {file["name"] for file in shown["files"]}
    assert json.loads(archive.read("report.json")) == shown["report"]
    assert archive.read("fused.png") == client.get(f"/api/results/{told['result']}/files/fused.png").content


def test_one_job_at_a_time_and_cancel(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Semaphore(0), threading.Event()

    def slow(*args: Any, **options: Any) -> FusionResult:
        begun.release()
        go.wait(30)
        return fuse(*args, **options)

    monkeypatch.setattr(jobs_module, "fuse", slow)
    first = start(client).json()
    assert begun.acquire(timeout=60)
    second = start(client)
    assert second.status_code == 409
    assert "wait for it or cancel it" in second.json()["error"]
    assert client.delete(f"/api/jobs/{first['id']}").json()["state"] == "cancelled"
    waiting = start(client).json()
    assert client.delete(f"/api/jobs/{waiting['id']}").json()["state"] == "cancelled"
    third = start(client)
    assert third.status_code == 202
    go.set()
    assert wait(client, third.json()["id"])["state"] == "done"
    assert wait(client, first["id"])["result"] is None
    assert begun.acquire(blocking=False)
    assert not begun.acquire(blocking=False)  # the one that was cancelled before its turn was never begun
    results = {wait(client, job)["result"] for job in (third.json()["id"], start(client).json()["id"])}
    assert len(results) == 2
    assert {client.get(f"/api/results/{key}").status_code for key in results} == {200}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "laplacian", "weight_fixed": 0.3},
        {"blend": "alpha", "colormap": "hot-iron"},
        {"fusion": "maximum", "aligned": True},
        {"align_only": True},
        {"refine": 3, "mirrored": "always"},
    ],
)
def test_options_are_those_of_the_package(client: Any, weights: str, tmp_path: Path, options: dict[str, Any]) -> None:
    grey = picture_bytes(scan(SHAPE, seed=1))
    told = wait(client, start(client, moving=grey, **options).json()["id"])
    shown = client.get(f"/api/results/{told['result']}").json()
    for role, content in (("fixed", FIXED), ("moving", grey)):
        (tmp_path / f"{role}.png").write_bytes(content)
    direct = fuse(tmp_path / "fixed.png", tmp_path / "moving.png", model=pipeline.load_model(weights), **options)
    assert shown["report"]["options"] == direct.report["options"]
    assert shown["report"]["mode"] == direct.report["mode"]
    assert ("fused" in shown["layers"]) == (direct.fused is not None)
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"/api/results/{told['result']}/zip").content))
    folder = direct.save(tmp_path / "direct")
    assert {name: archive.read(name) for name in archive.namelist()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "median"},
        {"blend": "screen"},
        {"colormap": "rainbow"},
        {"weight_fixed": 1.2},
        {"aligned": True, "align_only": True},
        {"fusion": "guided", "align_only": True},
        {"fusion": "guided", "blend": "alpha"},
        {"blend": "none", "colormap": "pet"},
        {"refine": -1},
        {"refine": MOST_STEPS + 1},
        {"refine": 9, "aligned": True},
        {"mirrored": "always", "aligned": True},
    ],
)
def test_options_that_make_no_sense_are_told_as_on_the_command_line(client: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        FuseOptions(**options)
    answer = start(client, **options)
    assert answer.status_code == 422
    assert answer.json()["error"] == str(caught.value)
    assert start(client).status_code == 202  # nothing runs that would be in the way


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"weight_fixed": "much"},
        {"aligned": 7},
        {"fusion": None},
        {"refine": 2.5},
        {"refine": None},
        {"mirrored": 7},
    ],
)
def test_options_of_another_kind_are_refused(client: Any, options: dict[str, Any]) -> None:
    answer = start(client, **options)
    assert answer.status_code == 422
    assert "malformed request" in answer.json()["error"]


def test_a_colour_map_for_a_coloured_image_is_told(client: Any) -> None:
    told = wait(client, start(client, colormap="pet").json()["id"])
    assert told["state"] == "failed"
    assert "has colours of its own; expected a grey one for colour map pet" in told["message"]


def test_the_page_is_told_every_choice_and_the_request_has_every_option(client: Any) -> None:
    state = client.get("/api/state").json()
    choices = state["choices"]
    assert choices == {name: list(known) for name, known in CHOICES.items()}
    assert state["most_steps"] == MOST_STEPS
    defaults = server.OptionsRequest().model_dump()
    assert FuseOptions(**defaults) == FuseOptions()
    assert defaults.keys() == asdict(FuseOptions()).keys()
    assert all(known[0] == defaults[name] for name, known in choices.items())
    page, script = ((server.STATIC / name).read_text(encoding="utf-8") for name in ("index.html", "app.js"))
    for name in defaults:
        assert f"\n  {name}: [" in script
    for name in choices:
        assert f'<select id="{name}"' in page


@pytest.mark.parametrize(
    ("options", "work"),
    [({}, "aligning and fusing"), ({"aligned": True}, "fusing"), ({"align_only": True}, "aligning")],
)
def test_a_job_says_what_it_does(
    client: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], work: str
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(*args: Any, **given: Any) -> FusionResult:
        begun.set()
        go.wait(30)
        return fuse(*args, **given)

    monkeypatch.setattr(jobs_module, "fuse", slow)
    job = start(client, **options).json()["id"]
    assert begun.wait(60)
    told = client.get(f"/api/jobs/{job}").json()
    assert (told["stage"], told["progress"]) == (work, 0.375)  # the middle of the second of four stages
    go.set()
    assert wait(client, job)["stage"] == "done"


def test_a_failing_job_says_why(client: Any) -> None:
    told = wait(client, start(client, fixed=MOVING).json()["id"])
    assert told["state"] == "failed"
    assert "is in colour; expected a grey one (MRI); swap the two images" in told["message"]


def test_a_model_that_does_not_load_is_told(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(jobs_module, "load_model", broken)
    assert wait(client, start(client).json()["id"])["message"] == "no memory"
    state = client.get("/api/state").json()
    assert (state["model"], state["message"]) == ("failed", "no memory")


def test_an_image_makes_room_for_newer_ones(client: Any) -> None:
    ids = [put(client, "fixed", FIXED).json()["id"] for _ in range(5)]
    answer = client.post("/api/jobs", json={"fixed": ids[0], "moving": ids[4]})
    assert answer.status_code == 422
    assert "choose the file again" in answer.json()["error"]


@pytest.mark.parametrize("kept", [2, 4])
def test_the_image_that_the_page_shows_stays_whatever_comes_for_the_other_role(weights: str, kept: int) -> None:
    with running(server.ViewerCfg(weights=weights, inputs_kept=kept)) as client:
        fixed = put(client, "fixed", FIXED).json()["id"]
        uploads = [put(client, "moving", MOVING).json()["id"] for _ in range(6)]
        assert client.post("/api/jobs", json={"fixed": fixed, "moving": uploads[0]}).status_code == 422
        assert client.post("/api/jobs", json={"fixed": fixed, "moving": uploads[-1]}).status_code == 202


def test_an_unknown_task_is_refused(client: Any) -> None:
    answer = start(client, task="xray-mri")
    assert answer.status_code == 422
    assert "unknown task 'xray-mri'" in answer.json()["error"]


# --- bad uploads ---

BAD = {
    "empty": (b"", "empty (0 bytes)"),
    "text": (b"hello, this is no image at all\n", "is a text file"),
    "gif": (picture_bytes(scan((40, 40)), "GIF"), "is a GIF"),
    "cut": (FIXED[: len(FIXED) // 2], "damaged or unsupported PNG"),
    "small": (picture_bytes(scan((20, 60))), "expected at least 32"),
    "wide": (picture_bytes(np.eye(40, 2100, dtype=np.uint8)), "expected at most 2048"),
    "constant": (picture_bytes(np.full((40, 40), 7, np.uint8)), "every pixel is 7"),
    "gzip": (b"\x1f\x8b\x08\x00damaged", "damaged gzip file"),
    "dicom": (b"\0" * 128 + b"DICM" + b"\xff" * 64, "DICOM"),
    "large": (b"\0" * (2**20 + 1), "more than 1 MiB"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_upload_is_one_clear_line(client: Any, kind: str) -> None:
    content, message = BAD[kind]
    answer = put(client, "moving", content)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert message in error
    assert "image.png" in error
    assert "\n" not in error
    assert "/tmp" not in error


def test_a_chunked_upload_that_does_not_announce_its_size_is_cut_off(client: Any) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"\0" * 2**16

    answer = put(client, "fixed", endless())  # type: ignore[arg-type]
    assert answer.status_code == 422
    assert "more than 1 MiB" in answer.json()["error"]


def test_a_picture_bomb_is_refused_by_its_header(client: Any) -> None:
    # 30000 x 30000 pixels in a few bytes: the size stands in the header, the pixels must not be asked for.
    bomb = bytearray(FIXED)
    bomb[16:24] = (30000).to_bytes(4, "big") * 2
    answer = put(client, "fixed", bytes(bomb))
    assert answer.status_code == 422


def test_nothing_that_was_uploaded_stays_on_disk(client: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.listen(0) as listener:
        app = server.create_app(server.ViewerCfg(weights=weights), port=listener.getsockname()[1])
    folder = app.state.temporary
    seen: list[list[Path]] = []
    original = pipeline.read_input
    monkeypatch.setattr(
        server, "read_input", lambda *a, **k: (seen.append(list(folder.rglob("*.png"))), original(*a, **k))[1]
    )

    async def lifespan_and_upload() -> None:
        host = f"127.0.0.1:{listener_port}"
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as inner:
                headers = {"Origin": f"http://{host}"}
                await inner.post("/api/inputs/fixed?name=a.png", content=FIXED, headers=headers)
                await inner.post("/api/inputs/fixed?name=b.png", content=b"bad", headers=headers)
            assert [path for path in folder.rglob("*") if path.is_file()] == []

    listener_port = app.user_middleware[0].kwargs["port"]
    anyio.run(lifespan_and_upload)
    assert [len(found) for found in seen] == [1, 1]  # there while they were decoded
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "a.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\scans\\mri.nii.gz", "mri.nii.gz"),
        ("..", "image"),
        ("", "image"),
        ("a\0b\n.png", "ab.png"),
        (".hidden", "hidden"),
    ],
)
def test_an_upload_keeps_only_its_file_name(name: str, expected: str) -> None:
    assert server.upload_name(name) == expected


@given(st.text())
def test_no_name_leaves_its_folder(name: str) -> None:
    plain = server.upload_name(name)
    assert plain not in ("", ".", "..")
    assert not set(plain) & {"/", "\\", "\0"}
    assert len(plain.encode()) <= 120


def test_a_slice_of_a_volume_is_asked_for_and_taken(client: Any, tmp_path: Path) -> None:
    volume = np.stack([scan(SHAPE, seed=s).T for s in range(3)], axis=-1)
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    answer = put(client, "moving", path.read_bytes(), "ct.nii.gz")
    assert answer.status_code == 422
    assert "pass slice_index" in answer.json()["error"]
    told = put(client, "moving", path.read_bytes(), "ct.nii.gz", slice_index=1).json()
    assert {name: value for name, value in told.items() if name != "id"} == {
        "name": "ct.nii.gz",
        "size": [65, 81],
        "format": "NIfTI",
        "modality": "unknown",
        "colour": False,
        "slice_index": 1,
    }
    assert "expected 0..2" in put(client, "moving", path.read_bytes(), "ct.nii.gz", slice_index=9).json()["error"]


# --- who may call ---


def test_only_its_own_host_and_origin_may_call(client: Any) -> None:
    own = str(client.base_url).rstrip("/")
    port = own.rsplit(":", 1)[1]
    refused: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/", {"Host": f"evil.example:{port}"}),
        ("GET", "/api/state", {"Host": "127.0.0.1"}),
        ("GET", "/api/state", {"Host": f"127.0.0.1:{int(port) ^ 1}"}),
        ("GET", "/api/results", {"Origin": "http://evil.example"}),
        ("GET", "/api/results", {"Origin": "null"}),
        ("GET", "/api/results", {"Sec-Fetch-Site": "cross-site"}),
        ("POST", "/api/jobs", {"Origin": f"http://127.0.0.1:{int(port) ^ 1}"}),
        ("POST", "/api/jobs", {"Origin": own.replace("http", "https")}),
        ("OPTIONS", "/api/jobs", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}),
    ]
    for method, path, headers in refused:
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 403, (method, path, headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    with httpx.Client(base_url=own, trust_env=False) as bare:
        assert bare.get("/api/state").status_code == 200  # a page's own reads carry no Origin
        assert bare.post("/api/jobs", json={}).status_code == 403
        local = f"http://localhost:{port}"
        named = bare.get("/api/state", headers={"Host": f"localhost:{port}", "Origin": local})
        assert named.status_code == 200


def test_every_answer_has_the_strict_policy_and_no_cors(client: Any) -> None:
    for path in ("/", "/static/app.js", "/api/state", "/api/results/none", "/no/such/page"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert not [name for name in headers if name.startswith("access-control")]
    assert "server" not in client.get("/").headers
    assert client.get("/static/app.js").text == (server.STATIC / "app.js").read_text(encoding="utf-8")
    missing = client.get("/no/such/page")
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found"})
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_it_listens_on_the_loopback_address_alone() -> None:
    with server.listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ValueError, match="not free"):
            server.listen(listener.getsockname()[1])
    with pytest.raises(ValueError, match="expected 0"):
        server.listen(70000)


def test_the_page_names_no_other_address() -> None:
    for path in server.STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, path
        assert "https:" not in text, path
        assert "style=" not in text, path  # the policy would not let it act


# --- results in folders ---


def test_a_saved_result_shows_what_was_fused(tmp_path: Path, result: FusionResult) -> None:
    live, stored = view_of(result, "live"), read_view(saved(result, tmp_path / "out"))
    assert stored.report == json.loads(json.dumps(result.report))
    assert stored.note == ""
    assert set(stored.layers) == set(live.layers)
    np.testing.assert_allclose(stored.layers["displacement"].array, live.layers["displacement"].array, atol=1e-4)
    np.testing.assert_allclose(stored.layers["fused"].array, live.layers["fused"].array, atol=1 / 255)
    np.testing.assert_allclose(stored.layers["aligned"].array, live.layers["aligned"].array, atol=0.51)
    error = live.layers["expected_error"]
    np.testing.assert_allclose(stored.layers["expected_error"].array, error.array, atol=error.high / 255)
    shown = (live.layers["fixed"].array - live.layers["fixed"].low) / (
        live.layers["fixed"].high - live.layers["fixed"].low
    )
    np.testing.assert_allclose(stored.layers["fixed"].array / 255, shown, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("direction", "spacing"),
    [
        (((1.0, 0.0), (0.0, -1.0)), (1.0, 1.0)),
        (((0.0, -1.0), (1.0, 0.0)), (1.0, 1.0)),
        (((-1.0, 0.0), (0.0, 1.0)), (0.5, 1.0)),
    ],
)
def test_a_saved_scan_is_upright_in_all_its_layers(
    tmp_path: Path, direction: tuple[tuple[float, float], tuple[float, float]], spacing: tuple[float, float]
) -> None:
    geometry = Geometry((65, 49), spacing, (0.0, 0.0), direction, plane="axial")
    pair = [Image(scan((65, 49), seed=seed)[None].astype(np.float32), geometry) for seed in (0, 1)]
    result = fuse(*pair, model=known_model((2.0, -1.0)))
    live, stored = view_of(result, "live"), read_view(saved(result, tmp_path / "out"))
    assert stored.note == ""
    assert set(stored.layers) == set(live.layers)
    grid = canonical(geometry)
    fixed = grid.see(torch.from_numpy(np.array(pair[0].array))[None])[0].numpy()
    np.testing.assert_allclose(live.layers["fixed"].array, fixed)
    np.testing.assert_allclose(stored.layers["displacement"].array, live.layers["displacement"].array, atol=1e-3)
    for name in ("fused", "aligned", "fixed", "moving"):
        layers = (view.layers[name] for view in (stored, live))
        shown = [np.clip((layer.array - layer.low) / (layer.high - layer.low), 0, 1) for layer in layers]
        assert shown[0].shape == (1, *grid.shape)
        assert np.corrcoef(shown[0].ravel(), shown[1].ravel())[0, 1] > 0.99, name


@pytest.mark.parametrize("option", ["align_only", "aligned"])
def test_a_result_without_a_part_that_was_not_asked_for_misses_nothing(
    tmp_path: Path, result: FusionResult, option: str
) -> None:
    part = fuse(result.fixed, result.moving, model=known_model((2.0, -1.0)), **{option: True})
    live, stored = view_of(part, "live"), read_view(saved(part, tmp_path / "out"))
    assert stored.note == ""
    assert set(stored.layers) == set(live.layers)
    assert ("fused" in live.layers) == (option == "aligned")


def test_a_folder_without_its_page_says_what_is_missing(tmp_path: Path, result: FusionResult) -> None:
    folder = saved(result, tmp_path / "out")
    (folder / "report.html").unlink()
    (folder / "aligned.png").write_bytes(b"damaged")
    view = read_view(folder)
    assert set(view.layers) == {"fused", "displacement", "jacobian"}
    assert "report.html" in view.note
    assert "aligned.png" in view.note


def test_the_rows_of_a_batch_tell_the_bad_ones(tmp_path: Path, result: FusionResult, weights: str) -> None:
    source = saved(result, tmp_path / "source")
    out = tmp_path / "out"
    for name, status in (("good", "ok"), ("bad", "suspect"), ("broken", None)):
        shutil.copytree(source, out / name)
        text = json.dumps({**result.report, "status": status, "reasons": ["why"] * (status == "suspect")})
        (out / name / "report.json").write_text(text if status else "{", encoding="utf-8")
    (out / "nothing").mkdir()
    with running(server.ViewerCfg(roots=(out,), weights=weights)) as client:
        rows = {row["name"]: row for row in client.get("/api/results").json()}
        assert {name: row["status"] for name, row in rows.items()} == {
            "good": "ok",
            "bad": "suspect",
            "broken": "unreadable",
        }
        assert rows["bad"]["reasons"] == ["why"]
        assert rows["good"]["displacement_max"] == result.report["alignment"]["displacement_max"]
        small = PILImage.open(io.BytesIO(client.get(f"/api/results/{rows['good']['key']}/thumbnail").content))
        assert max(small.size) <= 96
        assert client.get(f"/api/results/{rows['broken']['key']}").status_code == 422
        shutil.copytree(source, out / "later")
        assert len(client.get("/api/results").json()) == 4


ODD = {
    "a list": "[]",
    "a text": '"report"',
    "nothing": "null",
    "no status": '{"alignment": {}}',
    "no size": '{"status": "ok", "alignment": {"assessed_error": 1}}',
    "no steps": '{"status": "ok", "alignment": {}, "refinement": {}}',
    "a text for a number": '{"status": "ok", "alignment": {"folded_share": "0"}}',
    "a text for reasons": '{"status": "suspect", "alignment": {}, "reasons": "why"}',
    "a list for a grid": '{"status": "ok", "alignment": {}, "grid": []}',
    "nothing for options": '{"status": "ok", "alignment": {}, "options": null}',
    "a list for a mode": '{"status": "ok", "alignment": {}, "mode": []}',
    "NaN": '{"status": "ok", "alignment": {"expected_error": NaN}}',
    "too large a number": '{"status": "ok", "alignment": {"expected_error": 1' + "0" * 400 + "}}",
    "half a character": r'{"status": "ok", "alignment": {}, "note": "\ud800"}',
    "deeper than it can be read": "[" * 100_000,
}


@pytest.fixture(scope="module")
def odd_client(tmp_path_factory: pytest.TempPathFactory, result: FusionResult, weights: str) -> Iterator[Any]:
    """A viewer of one good result and each of the odd reports."""
    out = tmp_path_factory.mktemp("odd")
    saved(result, out / "good")
    for name, text in ODD.items():
        (out / name).mkdir()
        (out / name / "report.json").write_text(text, encoding="utf-8")
    with running(server.ViewerCfg(roots=(out,), weights=weights)) as client:
        yield client


@pytest.mark.parametrize("name", ODD)
def test_an_odd_report_is_a_row_and_no_error(odd_client: Any, name: str) -> None:
    rows = {row["name"]: row for row in odd_client.get("/api/results").json()}
    assert rows.keys() == {"good", *ODD}
    assert rows["good"]["status"] in ("ok", "suspect")
    answer = odd_client.get(f"/api/results/{rows[name]['key']}")
    assert answer.status_code == 422
    assert f"{name}/report.json is damaged" in answer.json()["error"]
    assert (rows[name]["status"], rows[name]["reasons"]) == ("unreadable", [answer.json()["error"]])


def test_a_report_is_shown_as_deep_as_it_can_be_read(tmp_path: Path, weights: str) -> None:
    (tmp_path / "report.json").write_text(f'{{"status": "ok", "alignment": {{}}, "x": {"[" * 500}{"]" * 500}}}')
    with running(server.ViewerCfg(roots=(tmp_path,), weights=weights)) as client:
        (row,) = client.get("/api/results").json()
        assert (row["status"], client.get(f"/api/results/{row['key']}").status_code) == ("ok", 200)


def test_evidence_does_not_name_a_row(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"status": "ok", "alignment": {"key": 1, "status": 2}}', encoding="utf-8")
    (entry,) = Library((tmp_path,)).scan()
    row = entry.row()
    assert (row["key"], row["status"]) == (entry.key, "ok")


def test_no_path_outside_the_chosen_folders_can_be_read(tmp_path: Path, result: FusionResult, weights: str) -> None:
    folder = saved(result, tmp_path / "chosen" / "case")
    secret = tmp_path / "secret.png"
    secret.write_bytes(FIXED)
    (folder / "link.png").symlink_to(secret)
    (folder / ".hidden").write_text("secret")
    inner = folder / "inner"
    inner.mkdir()
    (inner / "deep.txt").write_text("secret")
    other = saved(result, tmp_path / "other" / "case")
    (tmp_path / "chosen" / "linked").symlink_to(other)
    with running(server.ViewerCfg(roots=(tmp_path / "chosen",), weights=weights)) as client:
        (row,) = client.get("/api/results").json()
        base = f"/api/results/{row['key']}"
        assert client.get(f"{base}/files/report.json").status_code == 200
        tries = [
            f"{base}/files/..%2f..%2f..%2fsecret.png",
            f"{base}/files/../../../secret.png",
            f"{base}/files/%2e%2e%2fsecret.png",
            f"{base}/files/..%5c..%5csecret.png",
            f"{base}/files/{secret}",
            f"{base}/files/%2fetc%2fpasswd",
            f"{base}/files/link.png",
            f"{base}/files/.hidden",
            f"{base}/files/inner",
            f"{base}/files/inner%2fdeep.txt",
            f"{base}/files/report.json%00.png",
            f"{base}/layers/..%2fsecret",
            "/api/results/..%2f..%2fother/files/report.json",
            f"/api/results/{tmp_path}/other/case/files/report.json",
            "/static/..%2f..%2f__init__.py",
            "/static/../server.py",
            "/static/%2e%2e/server.py",
            "/static//etc/passwd",
        ]
        port = int(str(client.base_url).rsplit(":", 1)[1].rstrip("/"))
        for path in tries:
            # By hand: a client library would tidy the path up before sending it.
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
                raw.sendall(request.encode())
                answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
            assert answer.split()[1] in (b"400", b"404", b"405"), path
            assert b"secret" not in answer.partition(b"\r\n\r\n")[2], path
        names = zipfile.ZipFile(io.BytesIO(client.get(f"{base}/zip").content)).namelist()
        assert not set(names) & {"link.png", ".hidden", "inner"}


@pytest.mark.parametrize("parts", ["", "/thumbnail", "/zip", "/files/report.json", "/layers/fused"])
def test_a_result_that_becomes_a_link_or_goes_away_is_not_found(
    tmp_path: Path, result: FusionResult, weights: str, parts: str
) -> None:
    folder = saved(result, tmp_path / "there" / "case")
    other = saved(result, tmp_path / "other")
    (tmp_path / "way").symlink_to(tmp_path / "there")  # a root may be given by a link
    with running(server.ViewerCfg(roots=(tmp_path / "way",), weights=weights)) as client:
        (row,) = client.get("/api/results").json()
        address = f"/api/results/{row['key']}{parts}"
        assert client.get(address).status_code == 200
        shutil.rmtree(folder)
        gone = client.get(address)
        folder.symlink_to(other)
        linked = client.get(address)
    assert (gone.status_code, linked.status_code) == (404, 404)
    assert gone.json() == linked.json() == {"error": "no such result, file or image; reload the page"}


def test_a_link_in_place_of_a_result_file_is_not_followed(tmp_path: Path, result: FusionResult) -> None:
    folder = saved(result, tmp_path / "out")
    for name in ("fused.png", "deformation.nii.gz", "deformation_inverse.nii.gz", "report.html"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert set(read_view(folder).layers) == {"aligned"}
    with pytest.raises(ValueError, match="link"):
        thumbnail(folder)
    assert set(files_of(folder)) == {"aligned.png", "overview.png", "report.json"}


@pytest.mark.parametrize(("kind", "white"), [("uint8", 255), ("uint16", 65535)])
def test_a_dark_picture_has_a_dark_thumbnail(tmp_path: Path, kind: str, white: int) -> None:
    levels = np.zeros((40, 36), dtype=kind)
    levels[20:] = round(0.2 * white)
    write_picture(tmp_path / "fused.png", levels)
    with PILImage.open(io.BytesIO(thumbnail(tmp_path))) as small:
        assert set(np.asarray(small).flat) == {0, 51}


def test_the_same_files_make_the_same_zip(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    first = zip_of(tmp_path)
    os.utime(tmp_path / "a.txt", (1, 1))
    assert zip_of(tmp_path) == first
    assert zipfile.ZipFile(io.BytesIO(first)).namelist() == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: p.mkdir(), "no report.json in it"),
    ],
)
def test_a_root_that_is_no_result_is_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "root")
    with pytest.raises((ValueError, OSError), match=message):
        check_root(tmp_path / "root")


def test_a_single_result_folder_is_a_root(tmp_path: Path, result: FusionResult) -> None:
    folder = saved(result, tmp_path / "case")
    (entry,) = Library((folder,)).scan()
    assert entry.name == "case"
    assert str(tmp_path) not in json.dumps(entry.row())


PICTURE, WIDE = Geometry.picture(SHAPE), Geometry.picture((120, 100))
CORONAL = Geometry(SHAPE, (1.1, 1.2), (-30.0, 60.0), ((1, 0), (0, -1)), plane="coronal")
TURNED = Geometry((120, 100), (0.8, 0.7), (400.0, 10.0), ((0.96, -0.28), (-0.28, -0.96)), plane="coronal")
UNPLACED = replace(WIDE, physical=True, spacing=(0.7, 0.9))


@pytest.mark.parametrize(
    ("fixed", "moving", "method"),
    [
        (PICTURE, WIDE, "centred and scaled"),
        (CORONAL, WIDE, "centred and scaled"),
        (PICTURE, TURNED, "centred and scaled"),
        (CORONAL, UNPLACED, "physical spacing, centred"),
        (CORONAL, TURNED, "physical spacing, centred"),
        (CORONAL, replace(TURNED, origin=(-30.0, 50.0)), "physical"),
    ],
)
def test_a_saved_field_is_shown_without_how_the_grids_were_laid(
    tmp_path: Path, fixed: Geometry, moving: Geometry, method: str
) -> None:
    pair = (Image(scan(grid.shape, seed=seed)[None], grid) for seed, grid in enumerate((fixed, moving)))
    made = fuse(*pair, model=known_model(SHIFT))
    assert made.report["grid"]["method"] == method
    live, stored = view_of(made, "live"), read_view(saved(made, tmp_path / "out"))
    assert stored.note == ""
    for name in ("displacement", "jacobian"):
        np.testing.assert_allclose(stored.layers[name].array, live.layers[name].array, atol=1e-3)
        assert stored.layers[name].high == pytest.approx(live.layers[name].high, abs=1e-3)
    if method == "physical":
        return
    shutil.copy(tmp_path / "out" / "deformation.nii.gz", tmp_path / "out" / "deformation_inverse.nii.gz")
    other = read_view(tmp_path / "out")  # with a field of another grid
    (tmp_path / "out" / "deformation_inverse.nii.gz").unlink()
    for view in (other, read_view(tmp_path / "out")):
        assert set(live.layers) - set(view.layers) == {"displacement", "jacobian"}
        assert view.note.startswith("no arrows, no Jacobian: the field includes how the two grids were laid onto")


def test_a_saved_grey_picture_is_as_bright_as_it_was_made(tmp_path: Path) -> None:
    pair = (Image(scan(SHAPE, seed=seed)[None], CORONAL) for seed in (0, 1))
    made = fuse(*pair, model=known_model(SHIFT))
    stored = read_view(saved(made, tmp_path / "out")).layers["fused"]
    assert (tmp_path / "out" / "fused.nii.gz").exists()
    assert (stored.low, stored.high) == (0, 1)
    np.testing.assert_allclose(stored.array, view_of(made, "live").layers["fused"].array, atol=1e-6)


# --- the command ---


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals to a child process")
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_the_command_ends_well_and_leaves_nothing(tmp_path: Path, weights: str, name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    # Whatever these tests run under may ignore a hangup.
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from bsafusion.cli import main; main()"
    arguments = [sys.executable, "-u", "-c", program, "view", "--port", "0", "--no-browser", "--weights", weights]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("viewer at http://127.0.0.1:")
        assert "Not for clinical use." in line
        page = httpx.get(line.split()[2], timeout=60, trust_env=False)
        assert "bsafusion viewer" in page.text
        assert list(tmp_path.glob("bsafusion-view-*"))
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert errors == ""
    assert not list(tmp_path.glob("bsafusion-view-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port 70000"),
        (["no-such-folder"], "no such folder"),
        (["--weights", "none"], "no weights 'none'"),
        (["--device", "tpu"], "device 'tpu' is not there"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    answer = CliRunner().invoke(cli.app, ["view", "--no-browser", "--port", "0", *arguments])
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_page_opens_unless_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(server, "open_browser", opened.append)
    monkeypatch.setattr(server, "build_server", lambda *_: None)
    monkeypatch.setattr(server, "run", lambda *_: None)
    for option, count in (("--no-browser", 0), ("--browser", 1)):
        answer = CliRunner().invoke(cli.app, ["view", option, "--port", "0"])
        assert answer.exit_code == 0, answer.output
        assert len(opened) == count
    assert f"viewer at {opened[0]} " in answer.stdout


@pytest.mark.parametrize(
    ("platform", "display", "shown"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "w"}, True),
        ("darwin", {}, True),
    ],
)
def test_a_text_browser_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, platform: str, display: dict[str, str], shown: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server.sys, "platform", platform)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in display.items():
        monkeypatch.setenv(name, value)
    server.open_browser("http://127.0.0.1:1/")
    assert opened == ["http://127.0.0.1:1/"] * shown


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bsafusion.viewer.server")
    monkeypatch.setattr("bsafusion.viewer.server", None, raising=False)
    monkeypatch.delattr("bsafusion.viewer.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    answer = CliRunner().invoke(cli.app, ["view"])
    assert answer.exit_code == 2
    assert 'pip install ".[viewer]"' in answer.stderr


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1 and 2"):
        server.ViewerCfg(inputs_kept=1)


def test_values_of_a_scan_are_not_rounded_to_bytes(tmp_path: Path) -> None:
    array = scan(SHAPE).astype(np.float32) * 1.5 - 100
    path = tmp_path / "ct.tif"
    PILImage.fromarray(array).save(path)
    fixed = write_picture(tmp_path / "mri.png", scan(SHAPE))
    live = view_of(fuse(fixed, path, model=known_model()), "x")
    np.testing.assert_allclose(live.layers["moving"].array[0], array, rtol=1e-6)
    assert live.layers["moving"].describe()["dtype"] == "float32"
    assert live.layers["fixed"].describe()["dtype"] == "uint8"
    assert torch.equal(torch.from_numpy(live.layers["displacement"].array).isfinite().all(), torch.tensor(True))


def test_a_result_that_is_made_again_is_read_again(tmp_path: Path, result: FusionResult) -> None:
    folder = saved(result, tmp_path / "out")
    results = Library((tmp_path,))
    (entry,) = results.scan()
    first = results.view(entry.key)
    assert results.view(entry.key) is first
    report = json.loads((folder / "report.json").read_text())
    write_json(folder / "report.json", {**report, "status": "suspect", "reasons": ["another run"]})
    assert results.view(entry.key).report["reasons"] == ["another run"]


def test_a_report_written_by_the_package_is_read_as_it_was(tmp_path: Path, result: FusionResult) -> None:
    write_json(tmp_path / "report.json", result.report)
    assert dict(read_view(tmp_path).report) == json.loads((tmp_path / "report.json").read_text())
