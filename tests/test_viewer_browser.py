"""The viewer and the report page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from bsafusion.pipeline import fuse, load_model
from bsafusion.refinement import MOST_STEPS
from bsafusion.report_page import render, words
from bsafusion.request import FuseOptions, RequestError
from bsafusion.samples import load_samples
from bsafusion.viewer import server
from pairs import known_model, known_weights, pixels_of, scan, write_volume
from test_viewer import BAD, SHAPE, picture_bytes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120_000  # ms; a loaded machine is slow, not wrong
SAMPLE = next(sample for sample in load_samples() if sample.id == "pet-mri")

DROP = """([target, files]) => {
  const transfer = new DataTransfer();
  for (const [name, data] of files)
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
  document.querySelector(target).dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: transfer }));
}"""

# The canvas as the browser shows it, at image pixel (x, y) of the only pane.
SHOWN = """([x, y]) => {
  drawNow();
  const { left, top, scale } = placement(panes()[0]);
  const ratio = window.devicePixelRatio;
  const at = [left + scale * (x + 0.5), top + scale * (y + 0.5)].map((v) => Math.floor(v * ratio));
  return [...$("canvas").getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """``serve(*roots)`` starts a viewer with the shipped weights and gives its address."""
    started: list[tuple[Any, threading.Thread, Any]] = []

    def begin(*roots: Path, **options: Any) -> str:
        listener = server.listen(0)
        viewer = server.build_server(server.ViewerCfg(roots=roots, **options), listener)
        thread = threading.Thread(target=server.run, args=(viewer, listener))
        thread.start()
        started.append((viewer, thread, listener))
        return server.address(listener)

    yield begin
    for viewer, thread, listener in started:
        viewer.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def new_page(browser: Any, serve: Callable[..., str]) -> Iterator[Callable[..., Any]]:
    """Pages that remember what they asked for and what went wrong on them; a problem fails the test.

    They close before the viewers that they look at, hence ``serve``.
    """
    contexts, problems, asked = [], [], []

    def build(**options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        # A request that the server refuses is a message on the page, and no fault of it.
        page.on(
            "console",
            lambda said: said.type == "error" and "status of 4" not in said.text and problems.append(said.text),
        )
        page.on("request", lambda request: asked.append(request.url))
        page.asked = asked
        return page

    yield build
    for context in contexts:
        context.close()
    assert problems == []


def drop(page: Any, target: str, *files: tuple[str, bytes]) -> None:
    page.evaluate(DROP, [target, [[name, base64.b64encode(content).decode()] for name, content in files]])


def shown(page: Any, x: int, y: int) -> list[int]:
    colour: list[int] = page.evaluate(SHOWN, [x, y])
    return colour


def slide(page: Any, name: str, value: int) -> None:
    page.get_by_label(name, exact=True).fill(str(value))


def close(colour: list[int], expected: Any, tolerance: int = 3) -> bool:
    return bool(np.abs(np.array(colour) - np.broadcast_to(expected, 3)).max() <= tolerance)


def test_drop_a_pair_look_at_it_and_take_it_home(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    address = serve()
    page = new_page()
    page.goto(address)
    page.get_by_text("model ready").wait_for()
    # In the wrong order: the names say which is which.
    drop(page, "#stage-box", *((path.name, path.read_bytes()) for path in (SAMPLE.moving, SAMPLE.fixed)))
    page.locator("body[data-complete]").wait_for()
    direct = fuse(SAMPLE.fixed, SAMPLE.moving, model=load_model())
    verdict = page.locator("#verdict")
    assert direct.status in verdict.inner_text().lower()
    for reason in direct.reasons:
        assert reason in verdict.inner_text()
    assert ("suspect" in (verdict.get_attribute("class") or "")) == (direct.status == "suspect")
    assert float(page.evaluate("document.body.dataset.seconds")) > 0

    fixed = pixels_of(SAMPLE.fixed)
    fixed = fixed if fixed.ndim == 2 else fixed[..., 0]
    aligned = np.rint(direct.aligned.transpose(1, 2, 0))
    x, y = 60, 120
    assert not close(aligned[y, x].tolist(), fixed[y, x], 20)  # a place where the two can be told apart

    # A pixel's values, read under the pointer.
    page.keyboard.press("5")
    box = page.locator("#canvas").bounding_box()
    left, top, scale = page.evaluate("(({ left, top, scale }) => [left, top, scale])(placement(panes()[0]))")
    page.mouse.move(box["x"] + left + scale * (x + 0.5), box["y"] + top + scale * (y + 0.5))
    values = page.locator("#pixel").inner_text()
    assert f"x {x} y {y}" in re.sub(r"\s+", " ", values)
    assert f"fixed {fixed[y, x]}" in values
    said = [float(v) for v in re.search(r"aligned ([\d./]+)", values)[1].split("/")]  # type: ignore[index]
    np.testing.assert_allclose(said, direct.aligned[:, y, x], rtol=1e-3, atol=0.05)
    assert direct.expected_error is not None
    assert f"expected error {direct.expected_error[y, x]:.1f} px" in values
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] - 2)

    # The blend from one image to the other, through both ends. The canvas smooths, so neighbours mix in a little.
    slide(page, "Alpha", 0)
    only_fixed = shown(page, x, y)
    slide(page, "Alpha", 100)
    only_aligned = shown(page, x, y)
    assert close(only_fixed, fixed[y, x], 12)
    assert close(only_aligned, aligned[y, x], 12)
    slide(page, "Alpha", 50)
    assert close(shown(page, x, y), (np.array(only_fixed) + only_aligned) / 2)

    # The swipe, by its slider and by its divider.
    page.keyboard.press("3")
    slide(page, "Divider", 95)
    assert close(shown(page, x, y), only_fixed)
    slide(page, "Divider", 5)
    assert close(shown(page, x, y), only_aligned)
    at = page.evaluate("dividerX(panes()[0])")
    page.mouse.move(box["x"] + at, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + left + scale * fixed.shape[1] * 0.9, box["y"] + 200, steps=4)
    page.mouse.up()
    assert float(page.get_by_label("Divider", exact=True).input_value()) == pytest.approx(90, abs=1)
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    assert close(shown(page, x, y), only_fixed)

    # The grid changes many pixels, and goes again.
    count = """() => { drawNow(); const c = $('canvas');
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      let sum = 0;
      for (let i = 0; i < d.length; i += 4) sum += d[i + 2] > d[i] + 40;
      return sum; }"""
    before = page.evaluate(count)
    page.keyboard.press("g")
    assert page.evaluate(count) > before + 2000
    assert page.locator("[data-overlay=grid]").get_attribute("aria-pressed") == "true"
    page.keyboard.press("g")
    assert page.evaluate(count) == before
    for key, overlay in (("a", "arrows"), ("c", "confidence"), ("j", "jacobian")):
        page.keyboard.press(key)
        assert page.locator(f"[data-overlay={overlay}]").get_attribute("aria-pressed") == "true"
        assert page.locator("#legend-text").is_visible()
    page.keyboard.press("j")

    # Zoom keeps the pixel under the pointer; 0 brings everything back. Space blinks.
    page.mouse.move(box["x"] + left + scale * (x + 0.5), box["y"] + top + scale * (y + 0.5))
    page.mouse.wheel(0, -400)
    page.mouse.move(box["x"] + left + scale * (x + 0.5) + 0.1, box["y"] + top + scale * (y + 0.5))
    assert f"x {x} y {y}" in re.sub(r"\s+", " ", page.locator("#pixel").inner_text())
    assert page.evaluate("state.zoom") == pytest.approx(np.e, rel=1e-3)
    page.keyboard.press("0")
    assert page.evaluate("state.zoom") == 1
    page.keyboard.press(" ")
    assert page.evaluate("state.view") == "blink"
    page.keyboard.press(" ")
    assert page.evaluate("state.view") == "swipe"

    # Window and level by dragging: wider and brighter is darker.
    page.keyboard.down("Shift")
    page.mouse.move(box["x"] + left + scale * 20, box["y"] + 300)
    page.mouse.down()
    page.mouse.move(box["x"] + left + scale * 20 + 200, box["y"] + 300, steps=2)
    page.mouse.up()
    page.keyboard.up("Shift")
    assert page.evaluate("state.windows.fixed.width") == pytest.approx(np.e, rel=0.02)
    assert page.evaluate("state.windows.moving.width") == 1
    assert "fixed window" in page.locator("#pixel").inner_text()

    with page.expect_download() as waiting:
        page.get_by_role("link", name="All as zip").click()
    waiting.value.save_as(tmp_path / "all.zip")
    direct.save(tmp_path / "direct")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        files = {path.name for path in (tmp_path / "direct").iterdir()}
        assert set(archive.namelist()) == files
        report = json.loads(archive.read("report.json"))
        assert report["inputs"]["moving"]["sha256"] == direct.moving.sha256
        assert report["status"] == direct.status
        assert archive.read("fused.png") == (tmp_path / "direct" / "fused.png").read_bytes()
    assert {urlsplit(url).netloc for url in page.asked if not url.startswith("blob:")} == {urlsplit(address).netloc}


def make_batch(out: Path, count: int) -> dict[str, float]:
    """``count`` copies of one result with other numbers; the expected error of each."""
    result = fuse(SAMPLE.fixed, SAMPLE.moving, model=load_model())
    source = out.parent / "source"
    result.save(source)
    page = render(result.report, result.panels, result.expected_error)
    (source / "report.html").write_text(page, encoding="utf-8")
    errors = np.random.default_rng(0).permutation(np.linspace(0.5, 9.5, count))
    for index, error in enumerate(errors):
        folder = out / f"case-{index:02d}"
        shutil.copytree(source, folder)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        report["status"], report["reasons"] = ("suspect", ["too far off"]) if index % 7 == 0 else ("ok", [])
        report["alignment"]["expected_error"] = float(error)
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return {f"case-{index:02d}": float(error) for index, error in enumerate(errors)}


def test_a_batch_of_60_shows_the_bad_ones_first_and_sorts(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    errors = make_batch(tmp_path / "batch", 60)
    address = serve(tmp_path / "batch")
    page = new_page()
    page.goto(address)
    page.locator("#table tbody tr").nth(59).wait_for()

    def names() -> list[str]:
        found: list[str] = page.locator("#table tbody td button").all_inner_texts()
        return found

    worst = sorted(errors, key=errors.__getitem__, reverse=True)
    suspect = [name for name in worst if int(name[-2:]) % 7 == 0]
    assert names() == suspect + [name for name in worst if name not in suspect]
    assert "60 of 60 shown, 9 not ok" in page.locator("#summary").inner_text()
    page.get_by_role("button", name="Expected error").click()
    assert names() == worst
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Expected error")
    page.get_by_role("button", name="Expected error").click()
    assert names() == worst[::-1]
    page.get_by_role("button", name="Name").click()
    assert names() == sorted(errors)
    page.locator("#filter").fill("suspect")
    assert sorted(names()) == sorted(suspect)
    page.wait_for_function("[...document.querySelectorAll('td img')].some((i) => i.complete && i.naturalWidth > 20)")
    page.get_by_role("button", name="case-07").click()
    page.locator("body[data-complete]").wait_for()
    playwright.expect(page.locator("#canvas")).to_be_focused()  # the button that was pressed is hidden
    assert "too far off" in page.locator("#verdict").inner_text()
    assert page.title().startswith("SUSPECT: case-07")
    page.keyboard.press("5")
    slide(page, "Alpha", 0)
    fixed = pixels_of(SAMPLE.fixed)
    grey = float(fixed[120, 60] if fixed.ndim == 2 else fixed[120, 60, 0])
    stretched = (grey - fixed.min()) / np.ptp(fixed) * 255
    assert close(shown(page, 60, 120), stretched, 12)  # the fixed image comes out of report.html
    assert {urlsplit(url).netloc for url in page.asked} == {urlsplit(address).netloc}


def test_every_bad_upload_is_told_where_it_was_dropped(new_page: Callable[..., Any], serve: Callable[..., str]) -> None:
    page = new_page()
    page.goto(serve(largest_upload=2**20))
    page.locator("#version", has_text="bsafusion").wait_for()
    error = page.locator(".drop[data-role=moving] .error")
    for kind, (content, message) in BAD.items():
        drop(page, ".drop[data-role=moving]", (f"../{kind}.png", content))
        told = "expected at most 1.00 MiB" if kind == "large" else message
        playwright.expect(error).to_contain_text(told, timeout=PATIENCE)
        playwright.expect(error).to_contain_text(f"{kind}.png", timeout=PATIENCE)
        assert page.get_by_role("button", name="Fuse", exact=True).is_disabled()
    drop(page, "#stage-box", *((f"{i}.png", b"x") for i in range(3)))
    playwright.expect(page.locator("#job-error")).to_contain_text("expected two images")
    # What follows a bad file is not spoilt by it; and a colour image in the fixed place is told, with a way out.
    drop(page, ".drop[data-role=fixed]", ("a.png", SAMPLE.moving.read_bytes()))
    drop(page, ".drop[data-role=moving]", ("b.png", SAMPLE.fixed.read_bytes()))
    playwright.expect(page.locator("#job-error")).to_contain_text("swap the two images", timeout=PATIENCE)
    page.get_by_role("button", name="swap").click()
    page.locator("body[data-complete]").wait_for()


def volume(folder: Path, name: str, seed: int) -> tuple[str, bytes]:
    slices = np.stack([scan(SHAPE, seed=seed + index).T for index in range(4)], axis=-1)
    path = write_volume(folder / name, slices, np.diag([1.0, 1.0, 1.0, 1.0]))
    return name, path.read_bytes()


def test_slices_of_volumes_are_chosen_named_and_swapped(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(serve(weights=str(known_weights(tmp_path, (1.0, 2.0)))))
    page.locator("#version", has_text="bsafusion").wait_for()
    drop(page, "#stage-box", volume(tmp_path, "mri.nii.gz", 0), volume(tmp_path, "ct.nii.gz", 10))
    page.get_by_label("Slice of the moving volume").fill("1")
    page.get_by_label("Slice of the moving volume").press("Tab")
    fixed = page.get_by_label("Slice of the fixed volume")
    fixed.fill("2")
    for key in ("ArrowUp", "ArrowDown", "ArrowUp"):  # each is a change
        fixed.press(key)
    shown = page.locator("#pair-name")
    playwright.expect(shown).to_contain_text("ct.nii.gz on mri.nii.gz; fixed slice 3; moving slice 1", timeout=PATIENCE)
    playwright.expect(page.locator(".drop[data-role=fixed] .file")).to_contain_text("mri.nii.gz, slice 3: 65 × 81")
    playwright.expect(page.get_by_role("button", name="Fuse", exact=True)).to_be_enabled(timeout=PATIENCE)
    assert page.locator("#job-error").inner_text() == ""
    upright = scan(SHAPE, seed=3)[::-1, ::-1]  # the volume is stored in RAS order
    np.testing.assert_array_equal(page.evaluate("[...state.layers.get('fixed').data]"), upright.astype(float).ravel())
    page.get_by_role("button", name="swap").click()
    playwright.expect(shown).to_contain_text("mri.nii.gz on ct.nii.gz; fixed slice 1; moving slice 3", timeout=PATIENCE)


def test_window_and_divider_follow_the_pointer(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(serve(weights=str(known_weights(tmp_path))))
    page.locator("#version", has_text="bsafusion").wait_for()
    drop(page, "#stage-box", *((f"{name}.png", picture_bytes(scan(SHAPE, seed=len(name)))) for name in ("mri", "pet1")))
    page.locator("body[data-complete]").wait_for()
    box = page.locator("#canvas").bounding_box()

    def windowed(x: float, y: float) -> list[str]:
        """Which windows change where Shift is held and image point ``(x, y)`` is dragged."""
        page.keyboard.press("0")
        left, top, scale = page.evaluate("(({ left, top, scale }) => [left, top, scale])(placement(panes()[0]))")
        at = box["x"] + left + scale * x, box["y"] + top + scale * y
        page.keyboard.down("Shift")
        page.mouse.move(*at)
        page.mouse.down()
        page.mouse.move(at[0] + 9, at[1])
        page.mouse.up()
        page.keyboard.up("Shift")
        changed: list[str] = page.evaluate("Object.keys(state.windows).filter((k) => state.windows[k].width !== 1)")
        return changed

    page.keyboard.press("4")
    slide(page, "Squares", 5)  # of 13 pixels
    shown = [[windowed(x, y) for x in (6, 19, 32)] for y in (6, 19)]
    assert shown == [[["fixed"], ["moving"], ["fixed"]], [["moving"], ["fixed"], ["moving"]]]
    page.get_by_label("Compare with").select_option("fused")
    assert windowed(19, 6) == ["fused"]
    page.keyboard.press("5")
    for alpha, name in ((0, "fixed"), (40, "fixed"), (60, "fused"), (100, "fused")):
        slide(page, "Alpha", alpha)
        assert windowed(32, 40) == [name]

    page.keyboard.press("3")
    page.keyboard.press("0")
    for _ in range(6):
        page.keyboard.press("+")
    page.mouse.move(box["x"] + page.evaluate("dividerX(panes()[0])"), box["y"] + 200)
    page.mouse.down()
    for x in (401.0, 404.0, 407.0):
        page.mouse.move(box["x"] + x, box["y"] + 200)
        assert page.evaluate("dividerX(panes()[0])") == pytest.approx(x, abs=0.1)
    page.mouse.up()
    # What is read out: the canvas is a picture, and the values under the pointer do not interrupt.
    assert page.get_by_role("img", name="The images").get_attribute("id") == "canvas"
    assert page.locator("#pixel").get_attribute("aria-live") == "off"


def test_a_result_of_aligned_images_speaks_of_no_alignment(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    pair = [tmp_path / name for name in ("mri.png", "ct.png")]
    for seed, path in enumerate(pair):
        path.write_bytes(picture_bytes(scan(SHAPE, seed=seed)))
    for name, aligned in (("given", True), ("moved", False)):
        folder = fuse(*pair, model=known_model(), aligned=aligned).save(tmp_path / "out" / name)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        (folder / "report.json").write_text(json.dumps({**report, "status": "suspect", "reasons": ["why"]}))
    page = new_page()
    page.goto(serve(tmp_path / "out"))
    partner = page.locator("#partner option[value=aligned]")
    for name, said, called in (
        ("given", "Do not trust that the images lie on each other without", "moving, taken as aligned"),
        ("moved", "Do not trust this alignment without", "moving, aligned"),
    ):
        page.get_by_role("button", name="Results").click()
        page.get_by_role("button", name=name, exact=True).click()
        playwright.expect(page.locator("#verdict")).to_contain_text(said, timeout=PATIENCE)
        assert partner.text_content() == called


def test_a_single_result_that_cannot_be_opened_does_not_stop_the_page(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{")
    page = new_page()
    page.goto(serve(tmp_path / "out"))
    page.get_by_text("model ready").wait_for()
    assert "out/report.json is damaged" in page.locator("#job-error").inner_text()


def test_a_page_cannot_climb_out_of_a_result(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    fuse(SAMPLE.fixed, SAMPLE.moving, model=load_model()).save(tmp_path / "result")
    (tmp_path / "secret.png").write_bytes((tmp_path / "result" / "fused.png").read_bytes())
    page = new_page()
    page.goto(serve(tmp_path / "result"))
    status = "async (path) => (await fetch(path)).status"
    key = page.evaluate("async () => (await (await fetch('/api/results')).json())[0].key")
    files = f"/api/results/{key}/files"
    assert page.evaluate(status, f"{files}/fused.png") == 200
    for name in ("..%2fsecret.png", "%2e%2e%2fsecret.png", "..%5csecret.png", "%2fetc%2fpasswd"):
        assert page.evaluate(status, f"{files}/{name}") in (400, 404), name
    for path in ("/static/..%2fserver.py", "/static/%2e%2e%2fserver.py", "/api/results/..%2f..%2fetc/files/passwd"):
        assert page.evaluate(status, path) in (400, 404), path


def test_a_page_of_another_origin_reaches_nothing(new_page: Callable[..., Any], serve: Callable[..., str]) -> None:
    victim, other = serve(), serve()
    page = new_page()
    page.goto(other)
    attempt = "async (url) => { try { return (await fetch(url)).status; } catch { return 'refused'; } }"
    # The policy of the viewer's own page stops it at once; so ask from a page that has none.
    blank = page.context.new_page()
    blank.route("http://evil.example/", lambda route: route.fulfill(body="<p>hello", content_type="text/html"))
    blank.goto("http://evil.example/")
    assert blank.evaluate(attempt, f"{victim}api/results") == "refused"
    assert blank.evaluate(attempt, f"{victim}static/icon.svg") == "refused"


def test_options_by_keyboard_are_used_and_shown(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(serve())
    page.get_by_text("model ready").wait_for()
    options, chosen = page.locator("#options"), page.locator("#chosen")
    assert not options.evaluate("(e) => e.open")
    assert chosen.inner_text() == ""
    options.locator("summary").focus()
    page.keyboard.press(" ")  # opens the options: it does not blink
    assert options.evaluate("(e) => e.open")
    assert page.evaluate("state.view") == "four"
    for name in ("Fusion", "Blend", "Colour map", "Weight of the fixed image"):
        page.keyboard.press("Tab")
        playwright.expect(page.get_by_label(name, exact=True)).to_be_focused()
        if name == "Fusion":
            page.keyboard.press("l")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert page.get_by_label("Weight of the fixed image").input_value() == "0.3"
    assert chosen.inner_text() == "laplacian fusion, fixed image at 0.3"

    pair = [(path.name, path.read_bytes()) for path in (SAMPLE.fixed, SAMPLE.moving)]
    drop(page, "#stage-box", *pair)
    page.locator("body[data-complete]").wait_for()
    shown_options = "laplacian fusion, blend luminance, colour map none, fixed image at 0.3."
    assert page.locator("#words dt:text-is('Options') + dd").inner_text() == shown_options
    with page.expect_download() as waiting:
        page.get_by_role("link", name="All as zip").click()
    waiting.value.save_as(tmp_path / "all.zip")
    direct = fuse(SAMPLE.fixed, SAMPLE.moving, model=load_model(), fusion="laplacian", weight_fixed=0.3)
    direct.save(tmp_path / "direct")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        recorded = json.loads(archive.read("report.json"))["options"]
        assert (recorded["fusion"], recorded["weight_fixed"]) == ("laplacian", 0.3)
        assert archive.read("fused.png") == (tmp_path / "direct" / "fused.png").read_bytes()

    # What makes no sense is refused as on the command line, and what is shown stays.
    earlier = page.locator("body").get_attribute("data-complete")
    page.get_by_label("Align only").check()
    page.get_by_role("button", name="Fuse", exact=True).click()
    refused = page.locator("#job-error")
    playwright.expect(refused).to_contain_text("nothing is to be fused, yet there are options", timeout=PATIENCE)
    assert page.locator("body").get_attribute("data-complete") == earlier
    page.get_by_role("button", name="Defaults").click()
    assert chosen.inner_text() == ""
    assert not page.get_by_label("Align only").is_checked()

    page.get_by_label("Align only").check()
    page.get_by_role("button", name="Fuse", exact=True).click()
    page.wait_for_function("(key) => document.body.dataset.complete !== key", arg=earlier)
    assert refused.inner_text() == ""
    assert "fused.png" not in page.locator("#files").inner_text()
    assert page.locator("#words dt:text-is('Options') + dd").inner_text() == "align only."
    assert page.locator("#partner option[value=fused]").evaluate("(e) => e.disabled")


def test_refinement_and_mirror_images_are_used_and_shown(
    new_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path
) -> None:
    page = new_page()
    page.goto(serve())
    page.get_by_text("model ready").wait_for()
    chosen, refused = page.locator("#chosen"), page.locator("#job-error")
    page.locator("#options summary").click()
    steps, fuse_button = page.get_by_label("Refinement steps"), page.get_by_role("button", name="Fuse", exact=True)
    assert (steps.input_value(), steps.get_attribute("max")) == ("0", str(MOST_STEPS))
    page.get_by_label("Weight of the fixed image").focus()
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_label("Mirror images")).to_be_focused()
    page.keyboard.press("Tab")
    playwright.expect(steps).to_be_focused()
    page.keyboard.press("ArrowUp")
    assert chosen.inner_text() == "1 step of refinement"
    page.keyboard.press("ArrowUp")  # digits would choose a view elsewhere; here they are the number
    assert page.evaluate("state.view") == "four"
    page.get_by_label("Mirror images").select_option("always")
    assert page.locator("#about-mirrored").inner_text() == "aligned as well: slower"
    assert chosen.inner_text() == "2 steps of refinement, mirror images too"

    drop(page, "#stage-box", *((path.name, path.read_bytes()) for path in (SAMPLE.fixed, SAMPLE.moving)))
    page.locator("body[data-complete]").wait_for()
    asked = page.locator("#words dt:text-is('Options') + dd").inner_text()
    assert asked.endswith("fixed image at 0.5, 2 steps of refinement, mirror images too.")
    direct = fuse(SAMPLE.fixed, SAMPLE.moving, model=load_model(), refine=2, mirrored="always")
    said = dict(words(direct.report))
    for name in ("Mirror images", "Refinement"):
        assert page.locator(f"#words dt:text-is('{name}') + dd").inner_text() == said[name]
    with page.expect_download() as waiting:
        page.get_by_role("link", name="All as zip").click()
    waiting.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        report, told = json.loads(archive.read("report.json")), archive.read("report.html").decode()
    assert (report["options"]["refine"], report["options"]["mirrored"]) == (2, "always")
    for name in ("refinement", "alignment"):
        assert report[name] == direct.report[name]
    assert all(escape(said[name]) in told for name in ("Mirror images", "Refinement"))

    # What the command line refuses is refused with its words, and what is no whole number does not become one.
    earlier = page.locator("body").get_attribute("data-complete")
    with pytest.raises(RequestError) as caught:
        FuseOptions(refine=MOST_STEPS + 1)
    for number, message in (
        (str(MOST_STEPS + 1), str(caught.value)),
        ("2.5", f"steps of refinement: expected a whole number, 0 (none) to {MOST_STEPS}"),
    ):
        steps.fill(number)
        fuse_button.click()
        playwright.expect(refused).to_have_text(message, timeout=PATIENCE)
    assert page.locator("body").get_attribute("data-complete") == earlier
    page.get_by_role("button", name="Defaults").click()
    assert steps.input_value() == "0"
    assert chosen.inner_text() == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700])
def test_the_page_fits_and_can_be_read(
    new_page: Callable[..., Any], serve: Callable[..., str], scheme: str, width: int
) -> None:
    page = new_page(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(serve())
    page.locator("#version", has_text="bsafusion").wait_for()
    page.locator("#options summary").click()
    page.get_by_role("button", name="Defaults").scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    card = page.locator("#inputs").bounding_box()
    for control in page.locator("#options").locator("select, input, button, output").all():
        box = control.bounding_box()
        assert card["x"] <= box["x"] <= box["x"] + box["width"] <= card["x"] + card["width"]
    assert page.locator("footer").inner_text().startswith("Research use only. Not for clinical use.")
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b, 0)"
    assert (page.evaluate(brightness) > 380) == (scheme == "light")
    other = "dark" if scheme == "light" else "light"
    while page.evaluate("document.documentElement.dataset.theme") != other:
        page.locator("#theme").click()
    assert (page.evaluate(brightness) > 380) == (other == "light")


def test_the_report_page_swipes_without_asking_anybody(new_page: Callable[..., Any], tmp_path: Path) -> None:
    result = fuse(SAMPLE.fixed, SAMPLE.moving, model=load_model())
    path = tmp_path / "report.html"
    path.write_text(render(result.report, result.panels, result.expected_error), encoding="utf-8")
    page = new_page()
    page.goto(path.as_uri())
    assert page.locator(".verdict").inner_text().lower().startswith(result.status)
    over = page.locator(".pair .over")
    for value, expected in ((30, "inset(0px 70% 0px 0px)"), (100, "inset(0px 0% 0px 0px)")):
        page.get_by_label("Divider").fill(str(value))
        assert over.evaluate("(e) => getComputedStyle(e).clipPath") == expected
    box = page.locator(".pair").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] * 0.8)  # the upper part may be scrolled away
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] * 0.8)
    page.mouse.up()
    assert page.get_by_label("Divider").input_value() == "25"
    page.get_by_label("on the right").select_option("fused")
    assert page.locator(".pair img").first.get_attribute("src") == page.locator("#fused").get_attribute("src")
    assert all(url.startswith(("file:", "data:")) for url in page.asked)
    page.emulate_media(media="print")
    assert not page.locator("#swipe").is_visible()
    assert page.locator("#fused").is_visible()
