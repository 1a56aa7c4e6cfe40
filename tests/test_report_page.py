from __future__ import annotations

import base64
import hashlib
import html.parser
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bsafusion.pipeline import fuse
from bsafusion.report_page import LONGEST_SIDE, pictures, render, words
from bsafusion.result import FusionResult
from pairs import hot, known_model, scan, write_picture

SHAPE = (81, 65)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> FusionResult:
    folder = tmp_path_factory.mktemp("pair")
    fixed = write_picture(folder / "mri.png", scan(SHAPE))
    moving = write_picture(folder / "pet.png", hot(scan(SHAPE, seed=1)))
    return fuse(fixed, moving, model=known_model((3.0, -2.0)))


def page_of(result: FusionResult, **changes: Any) -> str:
    return render({**result.report, **changes}, result.panels, result.expected_error)


class Reader(html.parser.HTMLParser):
    """Tags, addresses and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(result: FusionResult) -> None:
    page = page_of(result)
    reader = Reader(page)
    assert reader.addresses
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert "link" not in reader.tags
    assert "style" not in reader.attributes  # the policy would not let it act
    assert not re.search(r"https?:|@import|url\(", page)


def test_its_policy_allows_its_own_style_and_script_and_nothing_else(result: FusionResult) -> None:
    page = page_of(result)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_the_same_result_gives_the_same_bytes(result: FusionResult) -> None:
    assert page_of(result) == page_of(replace(result))


def test_the_pictures_come_back(result: FusionResult) -> None:
    found = pictures(page_of(result))
    assert list(found) == [*result.panels, "expected-error"]
    for name, (_, panel) in result.panels.items():
        levels = np.asarray(found[name][0])
        expected = np.round(panel * 255).astype(np.uint8)
        np.testing.assert_array_equal(
            levels if levels.ndim == 3 else levels[..., None],
            expected.transpose(1, 2, 0)[..., : levels.shape[2] if levels.ndim == 3 else 1],
        )
    assert found["fixed"][0].mode == "L"
    assert found["fused"][0].mode == "RGB"
    picture, largest = found["expected-error"]
    assert result.expected_error is not None
    assert largest == pytest.approx(float(result.expected_error.max()), rel=1e-5)
    # The palette's indices are the values, so the picture is read as it is, not as it looks.
    error = np.asarray(picture) * (largest / 255)
    np.testing.assert_allclose(error, result.expected_error, atol=largest / 255)


def test_an_image_larger_than_the_page_takes_is_reduced(result: FusionResult) -> None:
    wide = {
        identifier: (name, np.repeat(np.repeat(panel, 20, axis=1), 20, axis=2))
        for identifier, (name, panel) in result.panels.items()
    }
    found = pictures(render(result.report, wide, None))
    assert max(found["fixed"][0].size) == LONGEST_SIDE
    assert "expected-error" not in found


def test_suspect_cannot_be_missed(result: FusionResult) -> None:
    reader = Reader(page_of(result, status="suspect", reasons=["the field folds in 3.00% of the pixels"]))
    assert "the field folds in 3.00% of the pixels" in reader.text
    assert "Do not trust this alignment" in reader.text
    page = page_of(result, status="suspect", reasons=["x"])
    assert "<title>suspect: " in page
    assert page.index('class="verdict suspect"') < page.index("<img")
    fine = page_of(result, status="ok", reasons=[])
    assert 'class="verdict ok"' in fine
    assert 'class="verdict suspect"' not in fine


def test_evidence_settings_versions_and_use_are_on_it(result: FusionResult) -> None:
    text = Reader(page_of(result)).text
    report = result.report
    assert text.count("Not for clinical use.") >= 2
    for role in ("fixed", "moving"):
        assert report["inputs"][role]["sha256"] in text
    assert report["options"]["weights_sha256"] in text
    assert report["versions"]["torch"] in text
    assert report["grid"]["note"] in text
    for _, sentence in words(report):
        assert sentence in text


def test_what_a_file_is_called_cannot_become_markup(result: FusionResult) -> None:
    bad = '"><script>alert(1)</script>.png'
    inputs = {**result.report["inputs"], "moving": {**result.report["inputs"]["moving"], "file": bad}}
    reader = Reader(page_of(result, inputs=inputs, reasons=[bad], status="suspect"))
    assert reader.tags.count("script") == 1
    assert bad in reader.text


def test_words_say_what_was_measured() -> None:
    evidence = {
        "similarity_before": 0.5,
        "similarity_after": 0.4,
        "expected_error": 2.25,
        "assessed_error": 3.14,
        "displacement_mean": 3.0,
        "displacement_max": 10.0,
        "folded_share": 0.0125,
        "outside_share": 0.1,
    }
    inputs = {"fixed": {"size": [256, 200]}}
    said = dict(words({"status": "ok", "alignment": evidence, "inputs": inputs}))
    assert "2.2 px" in said["Expected error"]
    assert "off by 3.1 px" in said["Judged error"]
    assert "fell: 0.500 before alignment, 0.400 after" in said["Similarity"]
    assert "3.0 px on average" in said["Movement"]
    assert "10.0 px at most" in said["Movement"]
    assert said["Folds"] == "The field folds in 1.25% of the pixels."
    assert said["Coverage"] == "10.0% of the head lies outside the moving image."
    evidence |= {"outside_share": 0.0, "cut_share": 0.5, "assessed_error": 12.0}
    cut = dict(words({"status": "suspect", "alignment": evidence, "inputs": inputs}))
    assert "off by 12.0 px or more" in cut["Judged error"]
    assert cut["Coverage"] == (
        "No part of the head lies outside the moving image. "
        "The moving image ends at a straight line beyond which 50% of the head lies."
    )


def test_words_leave_out_what_a_preset_does_not_measure() -> None:
    evidence = {"similarity_before": None, "similarity_after": None, "expected_error": None, "folded_share": 0.0}
    assert words({"status": "ok", "alignment": evidence}) == [("Folds", "The field folds nowhere.")]


@pytest.mark.parametrize("report", [{}, {"status": "ok"}, {"alignment": {}}, {"status": 3, "alignment": {}}])
def test_words_refuse_what_is_no_report(report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a report of bsafusion"):
        words(report)


def test_too_few_panels_are_refused(result: FusionResult) -> None:
    with pytest.raises(ValueError, match="panels fixed; expected fixed, moving and what else"):
        render(result.report, {"fixed": result.panels["fixed"]}, None)


def test_a_page_tells_that_nothing_was_aligned(result: FusionResult) -> None:
    images = (result.fixed, result.moving)
    given = fuse(*images, model=known_model((3.0, -2.0)), aligned=True)
    page = page_of(given, status="ok", reasons=[])
    text = Reader(page).text
    assert "Alignment was skipped as asked: the images were taken as aligned already." in text
    assert "No check found a reason to doubt that the images lie on each other." in text
    said = dict(words(given.report))
    assert "as given" in said["Similarity"]
    assert not {"Movement", "Folds", "Coverage", "Expected error"} & said.keys()
    assert 'id="aligned"' not in page
    assert "moving, taken as aligned" in text
    doubtful = Reader(page_of(given, status="suspect", reasons=["why"])).text
    assert "Do not trust that the images lie on each other" in doubtful


def test_a_page_tells_that_nothing_was_fused(result: FusionResult) -> None:
    only = fuse(result.fixed, result.moving, model=known_model((3.0, -2.0)), align_only=True)
    page = page_of(only)
    assert "Nothing was fused, as asked." in Reader(page).text
    assert 'id="fused"' not in page
    assert "Colour" not in dict(words(only.report))
    assert {"Movement", "Folds"} <= dict(words(only.report)).keys()


def test_words_say_what_became_of_the_colours(result: FusionResult) -> None:
    colour = {"hue_error_median_deg": 0.51, "clipped_share": 0.0025}
    said = dict(words({"status": "ok", "alignment": {}, "colour": colour}))
    assert "differs by 0.51° (median); 0.25% of the pixels are clipped" in said["Colour"]
    assert "Colour" in dict(words(result.report))


def test_words_say_that_mirror_images_were_asked_and_how_far_the_answers_differ() -> None:
    report = {"status": "ok", "alignment": {"disagreement": 0.75163}}
    ((name, sentence),) = words(report)
    assert name == "Mirror images"
    assert "the mean of the network's answers for the two images and for their mirror images" in sentence
    assert "each lies 0.75 px from that mean, on average inside the head" in sentence


@pytest.mark.parametrize(
    ("steps", "after", "expected"),
    [
        (10, 1.25, "by 10 gradient steps; their objective (lower is better) fell: 1.500 before, 1.250 after."),
        (
            1,
            1.50049,
            "by 1 gradient step; their objective (lower is better) did not change: 1.500 before, 1.500 after.",
        ),
        (2, 1.75, "by 2 gradient steps; their objective (lower is better) rose: 1.500 before, 1.750 after."),
    ],
)
def test_words_say_what_a_refinement_did(steps: int, after: float, expected: str) -> None:
    refinement = {"steps": steps, "objective_before": 1.5, "objective_after": after}
    ((name, sentence),) = words({"status": "ok", "alignment": {}, "refinement": refinement})
    assert name == "Refinement"
    assert sentence.endswith(expected)


def test_a_page_tells_of_refinement_and_mirror_images_only_where_they_were_used(result: FusionResult) -> None:
    asked = {"Mirror images", "Refinement"}
    assert not asked & dict(words(result.report)).keys()
    more = fuse(result.fixed, result.moving, model=known_model((3.0, -2.0)), refine=2, mirrored="always")
    said = dict(words(more.report))
    assert asked <= said.keys()
    assert "refined by 2 gradient steps" in said["Refinement"]
    # The known network answers the mirror images with the same field, which goes the other way along x when mirrored
    # back: 2 px to the left and 2 px to the right.
    assert "each lies 2.00 px from that mean" in said["Mirror images"]
    text = Reader(page_of(more)).text
    assert all(said[name] in text for name in asked)


def test_a_damaged_picture_is_refused() -> None:
    page = '<img id="fixed" alt="" src="data:image/png;base64,iVBORw0KGgoAAAAN"'
    with pytest.raises(ValueError, match="picture fixed of the report page is damaged"):
        pictures(page)


def test_a_page_of_something_else_has_no_pictures(tmp_path: Path) -> None:
    assert pictures('<img src="http://example.org/a.png">') == {}
