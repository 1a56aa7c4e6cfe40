"""Predict to files, score the files: known answers, resuming, and refusing to mix settings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bsafusion import evaluation
from bsafusion.benchmark import OWN, Benchmark, Case, EvaluationCfg, EvaluationError, Inputs
from bsafusion.cli import app
from bsafusion.competitors import COMPETITORS, RegistrationError
from bsafusion.deformation import invert
from bsafusion.evaluation import (
    COLUMNS,
    Method,
    Prediction,
    Predictor,
    Row,
    align,
    choose_methods,
    fused_file,
    open_method,
    predict_method,
    predict_methods,
    read_fields,
    score_methods,
    write_inputs,
)
from bsafusion.io import read_image, write_image
from bsafusion.metrics import PAPER_METRICS, endpoint_error, head_mask, summarise
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg
from bsafusion.plain_fusion import FUSIONS
from bsafusion.scoring import score_one
from bsafusion.trust import Calibration, alignment_sha256, calibration_file
from bsafusion.weights import save
from conftest import SIDE
from pairs import known_network, known_weights, record_of, snapshot

CFG = EvaluationCfg(side=SIDE, suites=("paper", "corrupted"), draws=2, fusions=("maximum", "average"))
MINE = Method("mine", "registration", "")
IDENTITY = Method("identity", "registration", "")


@pytest.fixture(scope="module")
def benchmark(pairs_csv: Path) -> Benchmark:
    return Benchmark(pairs_csv, CFG)


def still(inputs: Inputs) -> Prediction:
    return Prediction(np.zeros((2, *inputs.fixed.shape), np.float32))


def knowing(benchmark: Benchmark) -> Predictor:
    """A method that finds the field that undoes the known one, and gives that as its inverse."""
    answers = {}
    for case in benchmark.cases(2):
        inputs = benchmark.inputs(case)
        answers[inputs.fixed.tobytes(), inputs.moving.tobytes()] = inputs.known

    def predict(inputs: Inputs) -> Prediction:
        known = answers[inputs.fixed.tobytes(), inputs.moving.tobytes()]
        undone = invert(torch.from_numpy(known)[None], tolerance=1e-4)[0].numpy()
        return Prediction(undone, inverse=known, status="ok", expected_error=0.25)

    return predict


def predict(
    benchmark: Benchmark, out: Path, predictor: Predictor = still, name: str = "mine", **settings: object
) -> int:
    return predict_method(benchmark, out, name, predictor, settings, cases=benchmark.cases(benchmark.cfg.draws))


def rows_of(benchmark: Benchmark, out: Path, *methods: Method) -> list[Row]:
    return score_methods(benchmark, out, methods or (MINE,))


# --- scores ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thorough(pairs_csv: Path) -> Benchmark:
    """All draws for methods that count as slow ones, too."""
    return Benchmark(pairs_csv, replace(CFG, competitor_draws=CFG.draws))


def test_what_undoes_the_deformation_has_no_error_and_standing_still_all_of_it(
    thorough: Benchmark, tmp_path: Path
) -> None:
    predict(thorough, tmp_path, knowing(thorough), "mine")
    predict(thorough, tmp_path, still, "identity")
    for row in rows_of(thorough, tmp_path, MINE):
        assert row["before"] > 1
        assert row["error"] < 0.05  # what interpolation and the rounding of stored fields leave
        assert row["error"] <= row["error_p95"] < 0.2
        assert row["seen"] < 0.05
        assert row["inverse"] < 0.05
        assert row["consistency"] < 0.05
        assert (row["folds"], row["status"], row["expected_error"]) == (0, "ok", 0.25)
    for row in rows_of(thorough, tmp_path, IDENTITY):
        assert row["error"] == row["before"]
        assert row["inverse"] is None


def test_errors_are_those_inside_the_head(thorough: Benchmark, tmp_path: Path) -> None:
    predict(thorough, tmp_path, still, "identity")
    rows = {
        tuple(row[name] for name in ("suite", "task", "id", "draw")): row
        for row in rows_of(thorough, tmp_path, IDENTITY)
    }
    for case in thorough.cases(2):
        inputs, row = thorough.inputs(case), rows[case.suite, case.task, case.id, case.draw]
        length = np.linalg.norm(inputs.known, axis=0)
        inside, seen = length[inputs.mask], inputs.mask & head_mask(thorough.data.moving[case.index, 0].numpy())
        assert inside.mean() != pytest.approx(length.mean(), rel=1e-3)
        assert [row[name] for name in ("before", "error", "error_median", "error_p95", "seen")] == pytest.approx(
            [inside.mean(), inside.mean(), np.median(inside), np.percentile(inside, 95), length[seen].mean()], rel=1e-4
        )


def test_a_field_that_is_off_by_a_pixel_is_off_by_a_pixel(thorough: Benchmark, tmp_path: Path) -> None:
    right = knowing(thorough)

    def shifted(inputs: Inputs) -> Prediction:
        # Two errors in a row: first one pixel down on the fixed grid, then the way that is right from there.
        field = right(inputs).displacement
        return Prediction(np.roll(field, -1, axis=1) + np.float32([[[1]], [[0]]]))

    predict(thorough, tmp_path, shifted)
    for row in rows_of(thorough, tmp_path):
        assert row["error_median"] == pytest.approx(1, abs=0.05)
        assert row["consistency"] < 0.1  # wrong in every draw alike


def test_there_is_a_row_for_every_method_fusion_pair_and_draw(thorough: Benchmark, tmp_path: Path) -> None:
    predict(thorough, tmp_path)
    rows = rows_of(thorough, tmp_path)
    keys = [tuple(row[k] for k in ("method", "fusion", "suite", "task", "id", "draw")) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 2  # fusions, suites, pairs, draws
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {row["case"] for row in rows} == {"case6", "case7"}
    assert {bool(row["corruption"]) for row in rows if row["suite"] == "corrupted"} == {True}
    assert {row["corruption"] for row in rows if row["suite"] == "paper"} == {""}


def test_fusion_metrics_are_those_that_bsafusion_metrics_gives_for_the_files(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    predict(benchmark, tmp_path)
    case = next(case for case in benchmark.cases(1) if case.task == "pet-mri" and case.suite == "paper")
    pair, folder = benchmark.pair(case), tmp_path / "predictions" / "mine" / case.folder
    row = next(
        r
        for r in rows_of(benchmark, tmp_path)
        if (r["suite"], r["id"], r["draw"], r["fusion"]) == ("paper", case.id, case.draw, "average")
    )
    assert row["reference"] == "truth"
    assert {name: row[name] for name in PAPER_METRICS} == score_one(
        pair.fixed, pair.moving, fused_file(folder, "average")
    ).values


def test_the_aligned_reference_judges_the_fusion_alone(pairs_csv: Path, tmp_path: Path) -> None:
    aligned = Benchmark(pairs_csv, replace(CFG, reference="aligned", suites=("paper",)))
    predict(aligned, tmp_path)
    case = aligned.cases(1)[0]
    row = next(r for r in rows_of(aligned, tmp_path) if r["id"] == case.id and r["draw"] == 0)
    assert row["reference"] == "aligned"
    moved = tmp_path / "aligned.png"  # nothing was moved, so the aligned image is the moving one as it came
    write_image(moved, aligned.inputs(case).moving[None], value_range=(0, 1))
    folder = tmp_path / "predictions" / "mine" / case.folder
    expected = score_one(aligned.pair(case).fixed, moved, fused_file(folder, row["fusion"])).values
    assert {name: row[name] for name in PAPER_METRICS} == expected


def test_scores_are_kept_until_their_files_change(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(benchmark, tmp_path)
    first = rows_of(benchmark, tmp_path)
    scored: list[str] = []
    measure = evaluation.fusion_metrics

    def counting(*arguments: object) -> dict[str, float]:
        scored.append("")
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "fusion_metrics", counting)
    assert rows_of(benchmark, tmp_path) == first
    assert not scored
    case = benchmark.cases(1)[0]
    write_fused(fused_file(tmp_path / "predictions" / "mine" / case.folder, "average"))
    changed = rows_of(benchmark, tmp_path)
    differing = [a for a, b in zip(first, changed, strict=True) if a != b]
    assert [(r["fusion"], r["suite"], r["id"], r["draw"]) for r in differing] == [("average", case.suite, case.id, 0)]
    assert len(scored) == 2  # both fusions of this pair, of its one draw


def test_without_plain_fusions_a_registration_keeps_its_errors(pairs_csv: Path, tmp_path: Path) -> None:
    bare = Benchmark(pairs_csv, replace(CFG, fusions=()))
    predict(bare, tmp_path)
    rows = rows_of(bare, tmp_path)
    assert {(r["suite"], r["id"]) for r in rows} == {(c.suite, c.id) for c in bare.cases(1)}
    assert all(row["fusion"] == "" and row["error"] > 0 and row["qabf"] is None for row in rows)


def test_processes_score_as_one_does(pairs_csv: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    predict(benchmark, tmp_path)
    alone = rows_of(benchmark, tmp_path)
    shutil.rmtree(tmp_path / "scores")
    assert score_methods(Benchmark(pairs_csv, replace(CFG, jobs=2)), tmp_path, [MINE]) == alone


# --- predictions -------------------------------------------------------------------------------------


def test_prediction_files_hold_the_field_and_its_fusions(thorough: Benchmark, tmp_path: Path) -> None:
    predict(thorough, tmp_path, knowing(thorough))
    case = thorough.cases(1)[0]
    folder, inputs = tmp_path / "predictions" / "mine" / case.folder, thorough.inputs(case)
    assert {path.name for path in folder.iterdir()} == {
        "field.npz",
        "fused-average.png",
        "fused-maximum.png",
        "prediction.json",
    }
    displacement, inverse = read_fields(folder)
    assert displacement.dtype == np.float32
    assert np.array_equal(displacement * 256, np.round(displacement * 256))
    assert inverse is not None
    assert np.abs(inverse - inputs.known).max() <= 0.5 / 256
    fused = FUSIONS["average"](inputs.fixed, align(inputs.moving, displacement))
    assert np.array_equal(read_image(fused_file(folder, "average")).array[0], np.rint(fused * 255))


def test_what_is_there_is_kept_and_what_is_missing_is_added(
    pairs_csv: Path, benchmark: Benchmark, tmp_path: Path
) -> None:
    calls: list[int] = []

    def counting(inputs: Inputs) -> Prediction:
        calls.append(0)
        return still(inputs)

    cases = benchmark.cases(CFG.draws)
    one = predict_method(benchmark, tmp_path, "mine", counting, {}, cases=cases[:1])
    assert (one, len(calls)) == (1, 1)
    assert predict(benchmark, tmp_path, counting) == len(cases) - 1
    before = snapshot(tmp_path)
    more = Benchmark(pairs_csv, replace(CFG, fusions=("maximum", "laplacian")))
    assert predict(more, tmp_path, counting) == 0
    assert len(calls) == len(cases)
    after = snapshot(tmp_path)
    assert before.items() <= after.items()
    assert {Path(name).name for name in after.keys() - before.keys()} == {"fused-laplacian.png"}


def test_jobs_change_no_byte(
    pairs_csv: Path,
    benchmark: Benchmark,
    tmp_path: Path,
    small_cfg: BSAFusionCfg,
    randomise: Callable[[nn.Module], nn.Module],
) -> None:
    network: Any = randomise(BSAFusion(small_cfg))
    save(tmp_path, "random", network.state_dict(), **record_of(network))
    with open_method(Method("ours", "network", str(tmp_path / "random.safetensors"))) as (predictor, _):

        def timeless(inputs: Inputs) -> Prediction:
            return predictor(inputs)._replace(seconds=1.0)

        predict(benchmark, tmp_path / "one", timeless)
        predict(Benchmark(pairs_csv, replace(CFG, jobs=3)), tmp_path / "three", timeless)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "three")
    fields = [read_fields(path.parent)[0] for path in (tmp_path / "one").rglob("field.npz")]
    assert len({field.tobytes() for field in fields}) == len(fields)  # what a network sees, its field depends on


def test_predictions_made_with_other_settings_are_refused_by_name(
    pairs_csv: Path, benchmark: Benchmark, tmp_path: Path
) -> None:
    predict(benchmark, tmp_path, iterations=100)
    with pytest.raises(EvaluationError, match=r"mine was made with other settings \(iterations: 100 there, 200 now\)"):
        predict(benchmark, tmp_path, iterations=200)
    train = Benchmark(pairs_csv, replace(CFG, split="train"))
    with pytest.raises(EvaluationError, match=r"split: val there, train now"):
        predict(train, tmp_path, iterations=100)
    with pytest.raises(EvaluationError, match=r"split: val there, train now"):
        rows_of(train, tmp_path)


def test_a_folder_of_something_else_is_left_alone(benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "predictions" / "mine").mkdir(parents=True)
    (tmp_path / "predictions" / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(EvaluationError, match=r"holds files but no settings\.json"):
        predict(benchmark, tmp_path)


def test_a_field_of_another_size_is_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"a field of shape \(2, 3, 3\); expected \(2, 65, 65\)"):
        predict(benchmark, tmp_path, lambda inputs: Prediction(np.zeros((2, 3, 3), np.float32)))


def test_a_network_s_own_fusion_field_and_verdict_are_stored(benchmark: Benchmark, tmp_path: Path) -> None:
    weights = known_weights(tmp_path, (2.0, -1.0), expected_error=30.0)
    method = Method("ours", "network", str(weights))
    assert predict_methods(benchmark, tmp_path / "out", [method]) == {}
    settings = json.loads((tmp_path / "out" / "predictions" / "ours" / "settings.json").read_text())
    assert settings["weights_sha256"] == evaluation.file_sha256(weights)
    rows = rows_of(benchmark, tmp_path / "out", method)
    assert {row["fusion"] for row in rows} == {"network", "maximum", "average"}
    for row in rows:
        case = next(c for c in benchmark.cases(2) if (c.suite, c.id, c.draw) == (row["suite"], row["id"], row["draw"]))
        inputs = benchmark.inputs(case)
        # Where it expects to be far off it looks at the mirror images, too, and goes the same way in these.
        field = np.broadcast_to(np.float32([[[2]], [[0]]]), inputs.known.shape)
        expected = summarise(endpoint_error(inputs.known, field), inputs.mask).mean
        assert row["error"] == pytest.approx(expected, abs=0.02)
        assert row["status"] == "suspect"  # it expects to be far off
        assert row["expected_error"] == pytest.approx(30, rel=0.01)
        assert row["seconds"] > 0


def test_predictions_of_another_device_are_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    method = Method("ours", "network", str(known_weights(tmp_path)))
    predict_methods(benchmark, tmp_path / "out", [method])
    path = tmp_path / "out" / "predictions" / "ours" / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "device": "cuda"}))
    with pytest.raises(EvaluationError, match=r"other settings \(device: cuda there, cpu now\)"):
        predict_methods(benchmark, tmp_path / "out", [method])


def test_a_network_sees_the_colours_that_are_not_damaged(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    predict = BSAFusion.predict

    def watched(network: BSAFusion, *pictures: torch.Tensor) -> Any:
        seen.extend(picture[0] for picture in pictures)
        return predict(network, *pictures)

    monkeypatch.setattr(BSAFusion, "predict", watched)
    case = next(c for c in benchmark.cases(1) if (c.suite, c.task) == ("paper", "pet-mri"))
    inputs = benchmark.inputs(case)
    with open_method(Method("ours", "network", str(known_weights(tmp_path)))) as (predictor, _):
        predictor(inputs)
    assert np.array_equal(seen[0], inputs.fixed[None])
    assert np.array_equal(seen[1], np.concatenate([inputs.moving[None], inputs.chroma]))
    assert np.abs(inputs.chroma).max() > 0.1


def test_another_calibration_of_the_same_weights_counts_as_other_settings(benchmark: Benchmark, tmp_path: Path) -> None:
    weights = known_weights(tmp_path)
    method, out = Method("ours", "network", str(weights)), tmp_path / "out"
    calibration = Calibration(alignment_sha256(known_network()), {}, {}, {}, -9.0, 0.5, "made up")

    def predicted_with(trust: Calibration) -> dict[str, str]:
        calibration_file(weights).write_text(trust.to_json(), encoding="utf-8")
        return predict_methods(benchmark, out, [method])

    predicted_with(calibration)
    settings = json.loads((out / "predictions" / "ours" / "settings.json").read_text())
    assert settings["calibration_sha256"] == calibration.sha256
    predicted_with(calibration)
    stricter = replace(calibration, threshold=1e-6)
    told = rf"calibration_sha256: {calibration.sha256[:12]}… there, {stricter.sha256[:12]}… now"
    with pytest.raises(EvaluationError, match=told):
        predicted_with(stricter)
    calibration_file(weights).unlink()
    with pytest.raises(EvaluationError, match=r"calibration_sha256: \w+… there, nothing now"):
        predict_methods(benchmark, out, [method])


def test_a_registration_that_fails_is_scored_as_no_registration(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RegistrationError("identity: no overlap")

    monkeypatch.setattr(evaluation.Competitor, "register", fail)
    assert predict_methods(benchmark, tmp_path, [IDENTITY]) == {}
    for row in rows_of(benchmark, tmp_path, IDENTITY):
        assert row["status"] == "failed"
        assert row["error"] == row["before"]
    record = next((tmp_path / "predictions").rglob("prediction.json"))
    assert json.loads(record.read_text())["reasons"] == ["identity: no overlap"]


def test_a_competitor_that_is_not_installed_is_left_out(benchmark: Benchmark, tmp_path: Path) -> None:
    left_out = predict_methods(benchmark, tmp_path, [Method("ants", "registration", "/no/python"), IDENTITY])
    assert list(left_out) == ["ants"]
    assert "/no/python cannot be run" in left_out["ants"]
    assert {row["method"] for row in rows_of(benchmark, tmp_path, Method("ants", "registration", ""), IDENTITY)} == {
        "identity"
    }


def test_inputs_for_other_programs_are_what_methods_see(pairs_csv: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    root = write_inputs(benchmark, tmp_path)
    case = benchmark.cases(2)[1]
    moving = read_image(root / case.folder / "moving.png").array[0]
    assert np.array_equal(moving, np.rint(benchmark.inputs(case).moving.astype(np.float64) * 255))
    assert len(list(root.rglob("fixed.png"))) == len(benchmark.cases(2))
    assert write_inputs(benchmark, tmp_path) == root  # again
    other = Benchmark(pairs_csv, replace(CFG, split="train"))
    with pytest.raises(EvaluationError, match=r"inputs was made with other settings \(.*split: val there, train now"):
        write_inputs(other, tmp_path)


# --- fused images of others --------------------------------------------------------------------------


def write_fused(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.linspace(0, 1, SIDE, dtype=np.float32)[None, None].repeat(SIDE, 1), value_range=(0, 1))


@pytest.mark.parametrize("place", [lambda c: f"{c.id}.png", lambda c: f"{c.task.upper()}/{c.id}.png"])
def test_fused_images_from_inputs_of_their_own_get_fusion_metrics_only(
    benchmark: Benchmark, tmp_path: Path, place: Callable[[Case], str]
) -> None:
    for case in benchmark.cases(1):
        write_fused(tmp_path / "theirs" / place(case))
    rows = rows_of(benchmark, tmp_path, Method("theirs", "fused", str(tmp_path / "theirs")))
    assert [(row["suite"], row["id"], row["draw"]) for row in rows] == [(OWN, "6", 0), (OWN, "7", 0)]
    assert all(row["error"] is None and row["qabf"] > 0 for row in rows)


def test_a_fused_image_of_another_size_than_its_sources_is_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    for case in benchmark.cases(1):
        path = tmp_path / "theirs" / f"{case.id}.png"
        write_fused(path)
        write_image(path, read_image(path).array[..., 5:], value_range=(0, 255))
    with pytest.raises(
        EvaluationError, match=r"6\.png: \(60, 65\) pixels; expected \(65, 65\), the size of its sources"
    ):
        rows_of(benchmark, tmp_path, Method("theirs", "fused", str(tmp_path / "theirs")))


def test_an_id_with_dots_finds_its_file(benchmark: Benchmark, tmp_path: Path) -> None:
    case = replace(benchmark.cases(1)[0], suite=OWN, id="1.2.840")
    for name in ("1.2.840.png", "1.2.841.png", "1.png"):
        write_fused(tmp_path / case.task / name)
    assert evaluation._third_party_file(benchmark, tmp_path, case).name == "1.2.840.png"


def test_fused_images_from_the_benchmark_s_inputs_stand_in_its_suites(benchmark: Benchmark, tmp_path: Path) -> None:
    for case in benchmark.cases(2):
        write_fused(tmp_path / "theirs" / case.folder.with_suffix(".png"))
    rows = rows_of(benchmark, tmp_path, Method("theirs", "fused", str(tmp_path / "theirs")))
    assert [(r["suite"], r["id"], r["draw"]) for r in rows] == [(c.suite, c.id, c.draw) for c in benchmark.cases(2)]


def test_a_missing_fused_image_is_named(benchmark: Benchmark, tmp_path: Path) -> None:
    write_fused(tmp_path / "theirs" / "6.png")
    with pytest.raises(EvaluationError, match=r"no fused image of pet-mri 7; expected 7\.png"):
        rows_of(benchmark, tmp_path, Method("theirs", "fused", str(tmp_path / "theirs")))


# --- methods -----------------------------------------------------------------------------------------


def test_without_names_everything_is_compared(tmp_path: Path) -> None:
    found = choose_methods(weights=["a.safetensors", "paper=b.safetensors"], fused=[f"theirs={tmp_path}"])
    assert [method.name for method in found] == ["bsafusion", "paper", "theirs", *COMPETITORS]
    assert found[1] == Method("paper", "network", "b.safetensors")


def test_names_choose_and_order(tmp_path: Path) -> None:
    chosen = choose_methods("ants,bsafusion", pythons=["ants=/x/python"])
    assert chosen == [Method("ants", "registration", "/x/python"), Method("bsafusion", "network", "default")]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("demons", {}, r"no method is called demons; choose from bsafusion, identity"),
        (None, {"weights": ["a", "b"]}, r"a name stands twice"),
        (None, {"weights": ["identity=a"]}, r"a name stands twice"),
        (None, {"weights": ["../x=a"]}, r"'\.\./x' cannot be the name of a folder"),
        (None, {"fused": ["theirs"]}, r"expected NAME=FOLDER"),
        (None, {"fused": ["theirs=/no/folder"]}, r"expected NAME=FOLDER of a folder that is there"),
        (None, {"pythons": ["/usr/bin/python"]}, r"expected NAME=INTERPRETER of identity"),
        (None, {"pythons": ["demons=/usr/bin/python"]}, r"expected NAME=INTERPRETER of identity"),
    ],
)
def test_methods_that_make_no_sense_are_refused(names: str | None, options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        choose_methods(names, **options)  # type: ignore[arg-type]


def test_slow_methods_take_fewer_draws() -> None:
    cfg = replace(CFG, draws=3, competitor_draws=1)
    assert [Method(n, "registration", "").draws(cfg) for n in ("identity", "ants")] == [3, 1]
    assert Method("bsafusion", "network", "").draws(cfg) == 3


def test_there_is_nothing_to_predict_in_a_folder_of_fused_images() -> None:
    with pytest.raises(EvaluationError, match="nothing to predict"), open_method(Method("x", "fused", "x")):
        pass


# --- command -----------------------------------------------------------------------------------------


def test_the_page_s_function_of_one_s_own_is_scored(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pairs_csv.parent, tmp_path, dirs_exist_ok=True)
    text = code[1].replace("EvaluationCfg()", f'EvaluationCfg(side={SIDE}, suites=("rigid",), fusions=())')
    scope: dict[str, Any] = {"my_field": lambda fixed, moving: np.zeros((2, *fixed.shape), np.float32)}
    exec(text, scope)
    assert [row["error"] for row in scope["rows"]] == pytest.approx([row["before"] for row in scope["rows"]])


@pytest.mark.parametrize(("levels", "refused"), [(0.6, True), (0.7, False)])
def test_a_picture_whose_levels_are_not_what_methods_see_is_refused(
    levels: float, refused: bool, pairs_csv: Path, tmp_path: Path
) -> None:
    shutil.copytree(pairs_csv.parent, tmp_path, dirs_exist_ok=True)
    full = read_image(tmp_path / "6-mri.png")
    dim = np.round(levels * 255 * (full.array - full.array.min()) / np.ptp(full.array)).astype(np.uint8)
    write_image(tmp_path / "6-mri.png", dim, value_range=(0, 255))
    if not refused:
        Benchmark(tmp_path / "pairs.csv", CFG)
        return
    with pytest.raises(EvaluationError, match=r"6-mri\.png: its levels 0 to 153 are less than two thirds of 0 to 255"):
        Benchmark(tmp_path / "pairs.csv", CFG)
    Benchmark(tmp_path / "pairs.csv", replace(CFG, side=SIDE - 1))  # resampled: scored as methods see it


def test_a_dim_picture_that_is_not_looked_at_is_in_nobodys_way(pairs_csv: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs_csv.parent, tmp_path, dirs_exist_ok=True)
    whole = replace(CFG, split="train")
    limit = replace(whole, limit=1)
    looked_at = {case.index for case in Benchmark(tmp_path / "pairs.csv", limit).cases(1)}
    pairs = Benchmark(tmp_path / "pairs.csv", whole).data.pairs
    other = next(pair for index, pair in enumerate(pairs) if index not in looked_at)
    full = read_image(other.fixed)
    dim = np.round(0.5 * 255 * (full.array - full.array.min()) / np.ptp(full.array)).astype(np.uint8)
    write_image(other.fixed, dim, value_range=(0, 255))
    assert Benchmark(tmp_path / "pairs.csv", limit).cases(1)
    with pytest.raises(EvaluationError, match="less than two thirds"):
        Benchmark(tmp_path / "pairs.csv", whole)


def test_the_command_predicts_scores_and_writes_the_tables(pairs_csv: Path, tmp_path: Path) -> None:
    weights = known_weights(tmp_path)
    arguments = ["evaluate", pairs_csv, "-o", tmp_path / "out", "--weights", weights, "--methods", "bsafusion,identity"]
    arguments += ["--side", SIDE, "--suites", "paper", "--draws", 1, "--fusions", "average"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    for name in ("per_image.csv", "summary.csv", "paired.csv", "summary.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "| `paper` | bsafusion |" in result.output
    before = snapshot(tmp_path / "out")
    assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code == 0
    assert snapshot(tmp_path / "out") == before


def test_files_of_others_are_left_alone(pairs_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("of a fusion")
    result = CliRunner().invoke(app, ["evaluate", str(pairs_csv), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "holds report.html, which no evaluation has written" in result.output
    assert snapshot(tmp_path / "out") == {"report.html": b"of a fusion"}


def test_damaged_files_of_an_earlier_run_are_named(pairs_csv: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", pairs_csv, "-o", tmp_path / "out", "--methods", "identity", "--side", SIDE]
    arguments += ["--suites", "paper", "--draws", 1, "--fusions", "average", "--limit", 1]

    def run() -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    assert run().exit_code == 0
    scores = sorted((tmp_path / "out/scores").rglob("*.json"))
    before = snapshot(tmp_path / "out")
    for path in scores:
        path.write_text("")
    assert run().exit_code == 0
    assert snapshot(tmp_path / "out") == before
    for name in ("field.npz", "prediction.json", "fused-average.png", "settings.json"):
        path = next((tmp_path / "out/predictions").rglob(name))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for kept in scores:
            kept.unlink(missing_ok=True)
        result = run()
        assert result.exit_code == 2, name
        assert result.output.startswith(f"bsafusion: {path} cannot be read ("), result.output
        assert result.output.count("\n") == 1
        path.write_bytes(whole)
    assert run().exit_code == 0
    assert snapshot(tmp_path / "out") == before


def test_the_command_passes_every_option_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = EvaluationCfg("train", ("rigid", "large"), 5, 2, ("average",), "aligned", 128, 7, 3)
    assert all(getattr(cfg, f.name) != f.default for f in fields(cfg))
    made: list[Any] = []

    def make(*arguments: Any) -> Benchmark:
        made.extend(arguments)
        raise EvaluationError("that is enough")

    monkeypatch.setattr("bsafusion.benchmark.Benchmark", make)
    given = [
        f"--{name.replace('_', '-')}={','.join(value) if isinstance(value, tuple) else value}"
        for name, value in vars(cfg).items()
    ]
    result = CliRunner().invoke(app, ["evaluate", "pairs.csv", "-o", str(tmp_path / "out"), *given])
    assert result.output == "bsafusion: that is enough\n"
    assert made == [Path("pairs.csv"), cfg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "demons"], "no method is called demons"),
        (["--suites", "huge"], "choose from paper, rigid, large, corrupted"),
        (["--split-by", "moon"], "expected slice or case"),
        (["--set", "training.steps=1"], "--set shapes the trainings of --split-by case"),
        (["--weights", "nothing", "--methods", "bsafusion"], "no weights 'nothing'"),
        (["--weights", "nothing", "--methods", "identity"], "bsafusion: not among methods identity"),
        (["--python", "ants=x", "--methods", "identity"], "ants: not among methods identity"),
        (["--inputs-only", "--weights", "nothing"], "leave --weights out"),
        (["--inputs-only", "--predict-only"], "leave --predict-only out"),
        (["--side", "16"], "side 16: expected 32 to 2048 pixels"),
    ],
)
def test_the_command_refuses_in_one_line(pairs_csv: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(pairs_csv), "-o", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
