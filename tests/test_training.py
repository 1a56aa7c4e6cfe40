"""The training loop on small synthetic scans: it learns, resumes exactly, and trains what it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn

from bsafusion import fusion_losses, losses, weights
from bsafusion.datasets import (
    MISALIGNMENTS,
    DatasetError,
    Misalignment,
    Mix,
    PairSet,
    draw_batch,
    read_pairs,
    validation_batch,
)
from bsafusion.losses import LossWeights
from bsafusion.metrics import endpoint_error
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg
from bsafusion.training import (
    Objective,
    TrainingCfg,
    alignment_score,
    fusion_score,
    learning_rate,
    load_checkpoint,
    read_memory,
    save_checkpoint,
    start_from,
    step_generator,
    train,
    validate,
)
from pairs import snapshot

CPU = torch.device("cpu")
EVERY_TERM = tuple(f.name for f in fields(LossWeights) if f.name != "assessment")  # that one comes alone
SHORT = TrainingCfg(
    steps=6,
    batch=2,
    lr=2e-3,
    warmup=2,
    side=65,
    validate_every=3,
    checkpoint_every=2,
    log_every=1,
    suites=("paper",),
    weights=LossWeights(**dict.fromkeys(EVERY_TERM, 1.0)),
)


@pytest.fixture(scope="module")
def held_out(pairs_csv: Path) -> PairSet:
    return PairSet(read_pairs(pairs_csv, split="val"), side=65)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def initial(cfg: BSAFusionCfg, seed: int = 0) -> dict[str, Tensor]:
    """The weights that a run starts from."""
    torch.manual_seed(seed)
    return BSAFusion(cfg).state_dict()


# --- schedule, options, generators ----------------------------------------------------------------


def test_the_learning_rate_by_hand() -> None:
    cfg = TrainingCfg(lr=1.0, warmup=10, steps=110)
    assert [learning_rate(k, cfg) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, cfg) == pytest.approx(1.0)
    assert learning_rate(35, cfg) == pytest.approx(0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(60, cfg) == pytest.approx(0.505)
    assert learning_rate(110, cfg) == pytest.approx(0.01)
    rates = [learning_rate(k, cfg) for k in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(0, TrainingCfg(lr=1.0, warmup=0, steps=5)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "encoder"}, "parts 'encoder'.*all, alignment, fusion"),
        ({"precision": "float16"}, "'float16'.*auto, float32, bfloat16"),
        ({"steps": 0}, "steps 0"),
        ({"batch": 0}, "batch 0"),
        ({"suites": ("huge",)}, "huge.*paper, rigid, large"),
        ({"suites": ()}, "no suites; expected some of paper, rigid, large"),
        ({"validate_every": 0}, "validate_every 0: expected at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every -1"),
        ({"log_every": 0}, "log_every 0"),
        ({"warmup": -1}, "warmup -1: expected at least 0"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"lr": 0.0}, "lr 0.0: expected a number above 0"),
        ({"lr": math.nan}, "lr nan"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"aligned_share": -0.1}, "aligned_share -0.1: expected at least 0"),
        ({"aligned_share": 1.1}, "aligned_share 1.1: expected at most 1"),
        ({"earlier_steps": 1.1}, "earlier_steps 1.1: expected 0 to 1"),
        ({"aligned_share": 0.7}, "aligned_share 0.7: only a run of fusion alone sees the truth"),
        ({"crop": 64, "parts": "assessment"}, "crop 64: the assessment is trained on whole pictures"),
        ({"optimizer": "sgd"}, "'sgd'.*muon or adamw"),
        ({"crop": 100}, "crop 100.*multiple of 16"),
        ({"crop": 512}, "crop 512"),
        ({"fusion_reference": "fused"}, "'fused'.*aligned or truth"),
    ],
)
def test_options_that_make_no_run_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingCfg(**options)


def test_every_step_of_every_process_has_its_own_numbers() -> None:
    def first(*key: int) -> float:
        return float(torch.rand(1, generator=step_generator(*key, CPU), dtype=torch.float64))

    keys = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    assert len({first(*key) for key in keys}) == len(keys)
    assert first(1, 2, 0) == first(1, 2, 0)


def test_a_side_that_the_network_would_resize_is_refused(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    with pytest.raises(ValueError, match="side 256 is not near working_side 65"):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=replace(SHORT, side=256))


# --- the objective --------------------------------------------------------------------------------


def test_the_loss_falls_on_a_batch_seen_again_and_again(pairs_csv: Path, training_cfg: BSAFusionCfg) -> None:
    data = PairSet(read_pairs(pairs_csv, split="train"), side=65)
    mix = Mix(own_contrast=0.5, misalignments=(("rigid", 1.0),), pose=Misalignment())
    batch = draw_batch(data, 4, mix, torch.Generator().manual_seed(1), device=CPU)
    model = BSAFusion(training_cfg).train()
    objective = Objective(model, SHORT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    history: list[dict[str, float]] = []
    for _ in range(40):
        model.representation.refresh_judge()
        terms, figures = objective(batch, truly_aligned=False)
        loss = losses.total_loss(terms, objective.cfg.weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({**figures, "loss": float(loss.detach()), **{k: float(v.detach()) for k, v in terms.items()}})
    assert set(terms) == set(EVERY_TERM)
    first, last = history[0], history[-1]
    for name, share in (("loss", 0.8), ("epe", 0.9), ("ce1", 0.7), ("intensity", 0.9), ("match", 0.9)):
        assert last[name] < share * first[name], name


def test_a_term_of_weight_zero_is_not_there(held_out: PairSet, training_cfg: BSAFusionCfg) -> None:
    batch = validation_batch(held_out, [0, 1], MISALIGNMENTS["paper"], draw=0, device=CPU)
    model = BSAFusion(training_cfg)
    for name in EVERY_TERM:
        cfg = replace(SHORT, weights=replace(SHORT.weights, **{name: 0.0}))
        terms, _ = Objective(model, cfg)(batch, truly_aligned=False)
        assert set(terms) == set(EVERY_TERM) - {name}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("alignment", {"ce1", "ce2", "consistency", "smooth", "field", "match", "error"}),
        (
            "fusion",
            {
                "structure",
                "gradient",
                "intensity",
                "highlight",
                "edge",
                "visibility",
                "salience",
                "information",
                "fidelity",
            },
        ),
    ],
)
def test_each_part_has_its_terms(parts: Any, expected: set[str], held_out: PairSet, training_cfg: BSAFusionCfg) -> None:
    batch = validation_batch(held_out, [0], MISALIGNMENTS["paper"], draw=0, device=CPU)
    terms, figures = Objective(BSAFusion(training_cfg), replace(SHORT, parts=parts))(batch, truly_aligned=False)
    assert set(terms) == expected
    assert ("epe" in figures) == (parts == "alignment")


@pytest.mark.parametrize(("parts", "asked"), [("all", True), ("alignment", True), ("fusion", False)])
def test_the_judge_is_asked_only_where_its_answer_counts(
    parts: Any, asked: bool, held_out: PairSet, training_cfg: BSAFusionCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = validation_batch(held_out, [0], MISALIGNMENTS["paper"], draw=0, device=CPU)
    model = BSAFusion(training_cfg).train()
    calls: list[int] = []
    model.representation.judge.register_forward_hook(lambda *_: calls.append(1))
    Objective(model, replace(SHORT, parts=parts))(batch, truly_aligned=False)
    assert bool(calls) == asked


def test_fusion_learns_to_draw_from_truly_aligned_images(held_out: PairSet, training_cfg: BSAFusionCfg) -> None:
    """With the truth on both sides, the misalignment drawn for the batch changes nothing."""
    cfg = replace(SHORT, parts="fusion")
    model = BSAFusion(training_cfg)
    values = []
    for suite in ("paper", "large"):
        batch = validation_batch(held_out, [0, 1], MISALIGNMENTS[suite], draw=0, device=CPU)
        terms, _ = Objective(model, cfg)(batch, truly_aligned=True)
        values.append({k: float(v.detach()) for k, v in terms.items()})
    assert values[0] == values[1]


def test_mu_follows_the_ratio_of_the_two_structural_terms(held_out: PairSet, training_cfg: BSAFusionCfg) -> None:
    batch = validation_batch(held_out, [0, 1], MISALIGNMENTS["paper"], draw=0, device=CPU)
    objective = Objective(BSAFusion(training_cfg), replace(SHORT, parts="fusion", adapt_mu=True))
    assert objective.mu == 1
    objective(batch, truly_aligned=True)
    out = objective.model.predict(batch.fixed, batch.truth, aligned_already=True)
    unlike_fixed, unlike_moving = (
        (1 - fusion_losses.ssim(s, out.fused)).mean() for s in (batch.fixed, batch.truth[:, :1])
    )
    ratio = unlike_moving / unlike_fixed
    assert objective.mu == pytest.approx(0.999 + 0.001 * float(ratio.clamp(0.2, 5)), abs=1e-5)


def test_the_published_recipe_is_the_papers() -> None:
    published = TrainingCfg.published(steps=5)
    assert published.weights == LossWeights.published()
    assert published == TrainingCfg(
        steps=5, optimizer="adamw", weights=published.weights, fusion_reference="aligned", adapt_mu=True
    )


# --- validation -----------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A network that always says the same field."""

    def __init__(self, field: tuple[float, float]) -> None:
        super().__init__()
        self.field = torch.tensor(field).view(1, 2, 1, 1)

    def predict_alignment(self, fixed: Tensor, moving: Tensor, *, mirrored: str) -> Any:
        assert mirrored == "never"  # validation tells one run from another, as quickly as it can
        displacement = self.field.expand(len(fixed), 2, *fixed.shape[-2:])
        return SimpleNamespace(alignment=SimpleNamespace(displacement=displacement))


def test_an_identity_network_leaves_the_misalignment_as_it_was(held_out: PairSet) -> None:
    figures = validate(Fixed((0, 0)), held_out, ("paper", "rigid"), device=CPU)
    assert set(figures) == {
        f"{suite}/{task}{end}"
        for suite in ("paper", "rigid")
        for task in ("ct-mri", "pet-mri")
        for end in ("", "/before")
    }
    for suite in ("paper", "rigid"):
        for index, task in enumerate(("ct-mri", "pet-mri")):
            batch = validation_batch(held_out, [index], MISALIGNMENTS[suite], draw=0, device=CPU)
            inside = batch.mask[0, 0] > 0
            by_hand = float(batch.known[0].norm(dim=0)[inside].mean())
            assert figures[f"{suite}/{task}"] == pytest.approx(by_hand, rel=1e-5)
            assert figures[f"{suite}/{task}/before"] == pytest.approx(by_hand, rel=1e-5)
    assert alignment_score(figures) == pytest.approx(1)


def test_validation_figures_are_endpoint_errors(held_out: PairSet) -> None:
    shift = (2.5, -1.5)
    figures = validate(Fixed(shift), held_out, ("large",), device=CPU, draws=3, batch=1)
    errors, plain = [], []
    for draw in range(3):
        batch = validation_batch(held_out, [1], MISALIGNMENTS["large"], draw=draw, device=CPU)
        known = batch.known[0].double().numpy()
        moved = np.indices((65, 65)) + np.reshape(shift, (2, 1, 1))
        there = np.stack([ndimage.map_coordinates(k, moved, order=1, mode="nearest") for k in known])
        residual = np.hypot(*(there + np.reshape(shift, (2, 1, 1))))
        mask = batch.mask[0, 0].numpy() > 0
        errors.append(residual[mask].mean())
        constant = np.broadcast_to(np.reshape(shift, (2, 1, 1)), known.shape)
        plain.append(endpoint_error(known, constant)[mask].mean())
    assert figures["large/pet-mri"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert figures["large/pet-mri"] == pytest.approx(np.mean(plain), rel=1e-5)


def test_the_score_is_the_share_that_is_left() -> None:
    figures = {"paper/ct-mri": 1.0, "paper/ct-mri/before": 4.0, "rigid/ct-mri": 3.0, "rigid/ct-mri/before": 4.0}
    assert alignment_score(figures) == pytest.approx(0.5)


# --- the loop -------------------------------------------------------------------------------------


Finished = tuple[Path, Path, list[dict[str, float]]]


@pytest.fixture(scope="module")
def finished(pairs_csv: Path, training_cfg: BSAFusionCfg, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of six steps: its folder, the path it returned, the figures of each step."""
    out = tmp_path_factory.mktemp("run")
    figures: list[dict[str, float]] = []
    best = train(pairs_csv, out, model_cfg=training_cfg, cfg=SHORT, on_step=lambda _, f: figures.append(dict(f)))
    return out, best, figures


def test_a_run_leaves_its_files(finished: Finished) -> None:
    out, best, figures = finished
    assert best == out / "best.safetensors"
    names = {p.name for p in out.iterdir()}
    assert names >= {
        *("best.safetensors", "best.json", "last.safetensors", "last.json", "checkpoint.safetensors", "log.jsonl"),
        *("val_000003.png", "val_000006.png"),
    }
    assert not [n for n in names if n.endswith(".part") or n.startswith(".")]
    assert len(figures) == 6
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in log] == [
        *[("train", k) for k in (1, 2, 3)],
        ("val", 3),
        *[("train", k) for k in (4, 5, 6)],
        ("val", 6),
    ]
    assert log[0]["loss"] == pytest.approx(figures[0]["loss"], abs=1e-4)
    with Image.open(out / "val_000003.png") as picture:
        assert picture.size == (4 * 65, 2 * 65)  # fixed, moving, aligned, fused; a row for each task


def test_the_loss_is_the_weighted_sum_of_the_terms_shown(finished: Finished) -> None:
    _, _, figures = finished
    weight = SHORT.weights
    for step in figures:
        total = sum(getattr(weight, name) * step[name] for name in EVERY_TERM)
        assert step["loss"] == pytest.approx(total, rel=1e-5)


def test_the_best_weights_can_be_loaded(finished: Finished, held_out: PairSet, training_cfg: BSAFusionCfg) -> None:
    out, best, _ = finished
    model, record = weights.load(str(best))
    assert record.sha256 == sha256(best)
    assert record.steps in (3, 6)
    assert record.tasks == ("ct-mri", "pet-mri")
    assert record.data == "6 pairs of pairs.csv"
    assert BSAFusionCfg.from_dict(dict(record.config)) == training_cfg
    measured = validate(model, held_out, ("paper",), device=CPU)
    for name, value in measured.items():
        assert record.figures[name] == pytest.approx(value, rel=1e-3)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert record.figures["fusion_loss"] in [
        pytest.approx(e.get("fusion_loss"), abs=1e-5) for e in log if e["kind"] == "val"
    ]


def test_a_resumed_run_is_the_same_byte_for_byte(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    out, _, figures = finished
    again: list[dict[str, float]] = []

    def keep(_: int, step: dict[str, float]) -> None:
        again.append(dict(step))

    for until in (3, None):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT, until=until, on_step=keep)
    assert [s["loss"] for s in again] == [s["loss"] for s in figures]
    for name in ("last.safetensors", "best.safetensors", "checkpoint.safetensors", "best.json", "val_000006.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_the_dropout_of_a_resumed_assessment_is_the_same(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsafusion.training.assessment_score", lambda *_, **__: 1.0)  # on many draws: slow
    cfg = replace(SHORT, parts="assessment", steps=3, validate_every=3)
    for out, pauses in ((tmp_path / "at once", (None,)), (tmp_path / "with a pause", (1, None))):
        for until in pauses:
            train(pairs_csv, out, model_cfg=training_cfg, cfg=cfg, until=until)
    first, second = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("at once", "with a pause"))
    assert first == second


def test_a_finished_run_is_left_as_it_is(finished: Finished, pairs_csv: Path, training_cfg: BSAFusionCfg) -> None:
    out, best, _ = finished
    before = {p.name: sha256(p) for p in out.glob("*.safetensors")}
    assert train(pairs_csv, out, model_cfg=training_cfg, cfg=SHORT) == best
    assert {p.name: sha256(p) for p in out.glob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_cpu_computes_in_single_precision_unless_asked(
    training_cfg: BSAFusionCfg, precision: Any, dtype: torch.dtype
) -> None:
    objective = Objective(BSAFusion(training_cfg), replace(SHORT, precision=precision))
    with objective.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"steps": 7}, {"mix": Mix(own_contrast=0.1)}, {"parts": "fusion"}])
def test_other_options_in_the_same_folder_are_refused(
    change: dict[str, Any], finished: Finished, pairs_csv: Path, training_cfg: BSAFusionCfg
) -> None:
    out, _, _ = finished
    before = sha256(out / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=rf"other options \({next(iter(change))} differ"):
        train(pairs_csv, out, model_cfg=training_cfg, cfg=replace(SHORT, **change))
    assert sha256(out / "checkpoint.safetensors") == before


def test_another_network_in_the_same_folder_is_refused(
    finished: Finished, pairs_csv: Path, training_cfg: BSAFusionCfg
) -> None:
    out, _, _ = finished
    same_shapes = replace(training_cfg, representation=replace(training_cfg.representation, inject=False))
    with pytest.raises(ValueError, match="model or init differ"):
        train(pairs_csv, out, model_cfg=same_shapes, cfg=SHORT)


def test_a_network_of_other_shapes_in_the_same_folder_is_refused(
    finished: Finished, pairs_csv: Path, training_cfg: BSAFusionCfg
) -> None:
    out, _, _ = finished
    wider = replace(training_cfg, fusion=replace(training_cfg.fusion, hidden=8))
    with pytest.raises(ValueError, match="other options"):
        train(pairs_csv, out, model_cfg=wider, cfg=SHORT)


def copied_pairs(source: Path, folder: Path) -> Path:
    """The same pairs in another place."""
    folder.mkdir()
    for path in source.parent.glob("*.png"):
        shutil.copy(path, folder)
    return shutil.copy(source, folder / "pairs.csv")


def other_image(pairs: Path) -> None:
    (pairs.parent / "0-mri.png").write_bytes((pairs.parent / "2-mri.png").read_bytes())


def other_case(pairs: Path) -> None:
    pairs.write_text(pairs.read_text().replace(",case0,", ",case2,"))


def fewer_held_out(pairs: Path) -> None:
    pairs.write_text(pairs.read_text().replace("7,val,", "7,test,"))


@pytest.mark.parametrize("change", [other_image, other_case, fewer_held_out])
def test_other_data_in_the_same_folder_are_refused(
    change: Callable[[Path], None], finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    out, best, _ = finished
    pairs = copied_pairs(pairs_csv, tmp_path / "elsewhere")
    assert train(pairs, out, model_cfg=training_cfg, cfg=SHORT) == best
    before = snapshot(out)
    change(pairs)
    with pytest.raises(ValueError, match="holds a run that saw other pairs"):
        train(pairs, out, model_cfg=training_cfg, cfg=SHORT)
    assert snapshot(out) == before


def test_a_checkpoint_that_does_not_say_its_data_is_refused(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT, until=1)
    path = tmp_path / "checkpoint.safetensors"
    memory = read_memory(path)
    del memory["pairs_sha256"]
    save_file(load_file(path), path, metadata={"memory": json.dumps(memory)})
    with pytest.raises(ValueError, match="earlier version, which does not say what pairs it saw"):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT)


def test_steps_that_a_crash_lost_are_logged_once(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    """The run dies at step 4, two steps after its last checkpoint, in the middle of a line of its log."""

    class Crash(Exception):
        pass

    def die(step: int, _: dict[str, float]) -> None:
        if step == 4:
            raise Crash

    with pytest.raises(Crash):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT, on_step=die)
    log = tmp_path / "log.jsonl"
    assert '"step": 3' in log.read_text()
    with log.open("a") as handle:
        handle.write('{"kind": "train", "st')
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT)
    told, whole = (
        [(e["kind"], e["step"]) for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
        for folder in (tmp_path, finished[0])
    )
    assert told == whole


def test_another_seed_is_another_run(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    _, _, figures = finished
    other: list[float] = []
    cfg = replace(SHORT, seed=1)
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=cfg, until=1, on_step=lambda _, f: other.append(f["loss"]))
    assert other[0] != figures[0]["loss"]


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        ("alignment", ("encoder.levels.", "representation.", "alignment.steps.", "alignment.descriptors.")),
        ("fusion", ("fusion.",)),
        ("all", ("encoder.", "representation.", "alignment.steps.", "alignment.descriptors.", "fusion.")),
        ("assessment", ("alignment.assessment.",)),
    ],
)
def test_only_the_named_parts_are_trained(
    parts: Any, trained: tuple[str, ...], pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    cfg = replace(SHORT, steps=2, parts=parts, validate_every=100, warmup=0)
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=cfg)
    before, after = initial(training_cfg), load_file(tmp_path / "last.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    stages = {
        "encoder.levels.",
        "representation.",
        "alignment.steps.",
        "alignment.descriptors.",
        "alignment.assessment.",
        "fusion.",
    }
    for stage in stages:
        names = {n for n in before if n.startswith(stage)}
        if stage.startswith(trained):
            assert len(changed & names) > 0.9 * len(names), stage
        else:
            assert not changed & names, stage


def test_the_shallow_features_are_trained_by_whoever_uses_them(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    cfg = replace(SHORT, steps=2, parts="all", validate_every=100, warmup=0)
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=cfg)
    after = load_file(tmp_path / "last.safetensors")
    assert not torch.equal(initial(training_cfg)["encoder.shallow.weight"], after["encoder.shallow.weight"])


def test_fusion_trains_the_shallow_features_that_only_it_uses(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    cfg = replace(SHORT, steps=2, parts="fusion", validate_every=100, warmup=0)
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=cfg)
    after = load_file(tmp_path / "last.safetensors")
    assert not torch.equal(initial(training_cfg)["encoder.shallow.weight"], after["encoder.shallow.weight"])


def test_a_run_starts_from_given_weights(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    out, _, _ = finished
    source = load_file(out / "last.safetensors")
    model = BSAFusion(training_cfg)
    assert start_from(model, str(out / "last.safetensors")) == []
    assert all(torch.equal(v, source[k]) for k, v in model.state_dict().items())
    fewer = replace(
        training_cfg, alignment=replace(training_cfg.alignment, steps=("affine", "1/16"), hidden=(0, 16), radius=(0, 2))
    )
    stays = start_from(BSAFusion(fewer), str(out / "last.safetensors"))
    assert stays
    assert all(name.startswith("alignment.steps.1_16.") for name in stays)
    # Fusion alone, on top of it: the rest is what it was.
    cfg = replace(SHORT, steps=1, parts="fusion", validate_every=100)
    train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=cfg, init=str(out / "last.safetensors"))
    after = load_file(tmp_path / "last.safetensors")
    assert torch.equal(after["encoder.levels.0.0.0.weight"], source["encoder.levels.0.0.0.weight"])
    assert not torch.equal(after["fusion.last.0.weight"], source["fusion.last.0.weight"])


def test_what_weights_do_not_fill_is_told(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    init = str(finished[0] / "last.safetensors")
    told: list[str] = []
    more = replace(training_cfg, fusion=replace(training_cfg.fusion, hidden=training_cfg.fusion.hidden + 2))
    for name, model_cfg in (("same", training_cfg), ("more", more)):
        cfg = replace(SHORT, steps=1, parts="fusion", validate_every=100)
        train(pairs_csv, tmp_path / name, model_cfg=model_cfg, cfg=cfg, init=init, on_note=told.append)
    assert len(told) == 1
    assert re.fullmatch(rf"not filled by {re.escape(init)}, they begin as drawn: fusion\.last\..*", told[0])


def test_weights_of_another_preset_are_refused(finished: Finished, training_cfg: BSAFusionCfg) -> None:
    with pytest.raises(ValueError, match=r"of the preset 'default', this run trains 'paper'"):
        start_from(BSAFusion(replace(training_cfg, preset="paper")), str(finished[0] / "last.safetensors"))


def test_a_larger_network_starts_with_the_answer_of_a_smaller_one(tmp_path: Path, training_cfg: BSAFusionCfg) -> None:
    smaller = replace(
        training_cfg,
        encoder=replace(training_cfg.encoder, colour=False),
        representation=replace(training_cfg.representation, cross_blocks=0),
        alignment=replace(training_cfg.alignment, carry=False, assessment=0),
    )
    source = BSAFusion(smaller)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    weights.save(
        tmp_path, "small", source.state_dict(), preset="default", config=smaller.to_dict(), tasks=(), data="", steps=0
    )
    model = BSAFusion(training_cfg)
    stays = start_from(model, str(tmp_path / "small.safetensors"))
    assert all(name.startswith(("encoder.chroma.", "representation.cross.", "alignment.assessment.")) for name in stays)
    pair = torch.rand(2, 1, 1, 65, 65)
    expected, found = source.predict(*pair), model.predict(*pair)
    torch.testing.assert_close(found.alignment.displacement, expected.alignment.displacement, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.fused, expected.fused, rtol=0, atol=1e-4)
    # Only colours it sees from the start: from nothing, training hardly took them up.
    coloured = model.predict(pair[0], torch.cat([pair[1], 0.3 * torch.rand(1, 2, 65, 65)], dim=1))
    assert (coloured.alignment.displacement - found.alignment.displacement).abs().max() > 1e-2


@pytest.mark.parametrize("change", [{"radius": (0, 3, 2, 2, 1, 1)}, {"context": 32}])
def test_layers_whose_channels_moved_are_not_filled_but_told(
    change: dict[str, Any], tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    cfg = training_cfg.to_dict()
    weights.save(
        tmp_path, "w", BSAFusion(training_cfg).state_dict(), preset="default", config=cfg, tasks=(), data="", steps=0
    )
    model = BSAFusion(replace(training_cfg, alignment=replace(training_cfg.alignment, **change)))
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    stays = start_from(model, str(tmp_path / "w.safetensors"))
    assert "alignment.steps.1_16.body.0.weight" in stays
    assert all(torch.equal(model.state_dict()[name], drawn[name]) for name in stays)


def test_the_score_of_fusion_does_not_follow_the_balance_of_the_run(
    held_out: PairSet, training_cfg: BSAFusionCfg
) -> None:
    objective = Objective(BSAFusion(training_cfg), replace(SHORT, parts="fusion", adapt_mu=True))
    scores = []
    for mu in (1.0, 3.0):
        objective.mu = mu
        scores.append(fusion_score(objective, held_out, device=CPU))
    assert scores[0] == scores[1] > 0
    assert objective.mu == 3.0


def test_a_run_of_another_number_of_processes_is_not_gone_on_with(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    out = tmp_path / "run"
    cfg = replace(SHORT, steps=2)
    train(pairs_csv, out, model_cfg=training_cfg, cfg=cfg, until=1)
    path = out / "checkpoint.safetensors"
    memory = read_memory(path)
    assert memory["processes"] == 1
    weights.write_tensors(path, load_file(path), metadata={"memory": json.dumps({**memory, "processes": 2})})
    with pytest.raises(ValueError, match=r"holds a run of 2 process\(es\), this one has 1"):
        train(pairs_csv, out, model_cfg=training_cfg, cfg=cfg)


def test_the_mean_of_several_steps_is_what_is_kept(pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg) -> None:
    plain = replace(SHORT, steps=4, validate_every=100, checkpoint_every=100)
    averaging = replace(plain, average_every=2, average_from=1)
    ends = []
    for step in (2, 4):
        out = tmp_path / f"to-{step}"
        train(pairs_csv, out, model_cfg=training_cfg, cfg=plain, until=step)
        ends.append(load_file(out / "last.safetensors"))
    train(pairs_csv, tmp_path / "mean", model_cfg=training_cfg, cfg=averaging)
    found = load_file(tmp_path / "mean/last.safetensors")
    moved = 0
    for name, value in found.items():
        if value.is_floating_point() and not name.startswith("representation.judge."):
            torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2, rtol=1e-5, atol=1e-7)
            moved += not torch.equal(ends[0][name], ends[1][name])
    assert moved > 20
    # It goes on from the weights themselves, and from the mean so far.
    train(pairs_csv, tmp_path / "parts", model_cfg=training_cfg, cfg=averaging, until=3)
    train(pairs_csv, tmp_path / "parts", model_cfg=training_cfg, cfg=averaging)
    assert (tmp_path / "parts/last.safetensors").read_bytes() == (tmp_path / "mean/last.safetensors").read_bytes()
    own = load_file(tmp_path / "mean/checkpoint.safetensors")
    assert all(torch.equal(own[f"model.{name}"], value) for name, value in ends[1].items())


def test_without_a_validation_split_the_last_weights_count(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    rows = pairs_csv.read_text().replace(",val,", ",test,")
    path = pairs_csv.with_name("no_val.csv")
    path.write_text(rows)
    result = train(path, tmp_path, model_cfg=training_cfg, cfg=replace(SHORT, steps=1))
    assert result == tmp_path / "last.safetensors"
    assert not (tmp_path / "best.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_cfg: BSAFusionCfg
) -> None:
    monkeypatch.setattr(fusion_losses, "edge_loss", lambda fused, *_: fused.sum() * math.nan)
    with pytest.raises(FloatingPointError, match=r"nan at step 0; .*; train again into another folder"):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT)
    assert not list(tmp_path.glob("*.safetensors"))


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_brings_back_weights_and_moments(tmp_path: Path, training_cfg: BSAFusionCfg) -> None:
    def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()

    model = BSAFusion(training_cfg)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    one_step(model, optimizer)
    memory = {"step": 1, "best": math.inf, "mu": 0.75}
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, memory)
    other = BSAFusion(training_cfg)
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    load_checkpoint(tmp_path / "c.safetensors", other, fresh)
    assert read_memory(tmp_path / "c.safetensors") == memory
    # A second step depends on both moments and on the number of the step.
    for m, o in ((model, optimizer), (other, fresh)):
        one_step(m, o)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_cfg: BSAFusionCfg
) -> None:
    model = BSAFusion(training_cfg)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, model, optimizer, {"step": 1})
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"cannot be written \(no space left\); check the disk"):
        save_checkpoint(path, model, optimizer, {"step": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_another_run_s_best_weights_are_not_this_one_s(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    for ending in (".safetensors", ".json"):
        shutil.copyfile((finished[0] / "last").with_suffix(ending), (tmp_path / "best").with_suffix(ending))
    result = train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=replace(SHORT, validate_every=100), until=1)
    assert result == tmp_path / "last.safetensors"
    assert not list(tmp_path.glob("best.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"until": 0}, "until step 0: expected at least 1"), ({"minutes": math.nan}, "nan minutes: expected 0 or more")],
)
def test_an_end_that_makes_no_sense_is_refused(
    options: dict[str, Any], message: str, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    with pytest.raises(ValueError, match=message):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT, **options)


def test_a_run_does_not_replace_the_weights_that_it_starts_from(
    finished: Finished, pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    for ending in (".safetensors", ".json"):
        shutil.copyfile((finished[0] / "last").with_suffix(ending), (tmp_path / "last").with_suffix(ending))
    with pytest.raises(ValueError, match=r"last\.safetensors lies in .*; choose another folder"):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT, init=str(tmp_path / "last.safetensors"))


def test_pairs_of_other_splits_are_told_and_a_run_without_training_pairs_is_refused(
    pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg
) -> None:
    path = pairs_csv.with_name("other_splits.csv")
    path.write_text(pairs_csv.read_text().replace(",val,", ",validation,"))
    told: list[str] = []
    train(path, tmp_path / "a", model_cfg=training_cfg, cfg=replace(SHORT, steps=1), on_note=told.append)
    assert told == ["pairs that are neither 'train' nor 'val' are left out: 2 of split 'validation'"]
    path.write_text(pairs_csv.read_text().replace(",train,", ",Train,"))
    with pytest.raises(DatasetError, match="no pairs in split 'train'; check the split column"):
        train(path, tmp_path / "b", model_cfg=training_cfg, cfg=SHORT)


# --- several processes ----------------------------------------------------------------------------

SCRIPT = """
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bsafusion import training
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg

torch.set_num_threads(1)
pairs, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
built = []


class Kept(BSAFusion):
    def __init__(self, cfg):
        super().__init__(cfg)
        built.append(self)


training.BSAFusion = Kept
cfg = training.TrainingCfg(steps=2, batch=2, warmup=0, side=65, validate_every=2, suites=("paper",))
training.train(pairs, out, model_cfg=BSAFusionCfg.from_dict(options), cfg=cfg)
save_file(built[0].state_dict(), out / f"rank{os.environ['RANK']}.safetensors")
"""


def test_two_processes_train_one_network(pairs_csv: Path, tmp_path: Path, training_cfg: BSAFusionCfg) -> None:
    out = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(pairs_csv), str(out), json.dumps(training_cfg.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(out / f"rank{rank}.safetensors") for rank in (0, 1))
    start = initial(training_cfg)
    assert all(torch.equal(first[name], second[name]) for name in start)
    assert sum(not torch.equal(first[name], start[name]) for name in start) > 0.8 * len(start)
    last = load_file(out / "last.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in start)
    assert (out / "best.safetensors").is_file()


def test_a_batch_that_cannot_be_shared_is_refused(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_cfg: BSAFusionCfg
) -> None:
    monkeypatch.setattr("bsafusion.training.processes", lambda _: contextlib.nullcontext((0, 4)))
    with pytest.raises(ValueError, match="batch 2 does not divide among 4 processes"):
        train(pairs_csv, tmp_path, model_cfg=training_cfg, cfg=SHORT)
