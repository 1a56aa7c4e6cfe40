"""Pairs spoilt on purpose, and the head that learns to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bsafusion import failures
from bsafusion.datasets import MISALIGNMENTS, Misalignment, Mix, PairSet, read_pairs
from bsafusion.deformation import warp
from bsafusion.failures import BEYOND, HALF, Doubtful, draw_doubtful
from bsafusion.losses import assessment_loss
from bsafusion.models.alignment import Alignment, AlignmentCfg
from bsafusion.models.assessment import WORST, Assessment
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg
from bsafusion.training import Objective, TrainingCfg, assessment_score

CPU = torch.device("cpu")
PLAIN = Mix(own_contrast=0.0, misalignments=(("rigid", 1.0),), pose=Misalignment())


@pytest.fixture(scope="module")
def data(pairs_csv: Path) -> PairSet:
    pairs = read_pairs(pairs_csv)
    return PairSet([replace(pair, case=str(index)) for index, pair in enumerate(pairs)], side=65)


def drawn(data: PairSet, monkeypatch: pytest.MonkeyPatch, kind: str, size: int = 8) -> Doubtful:
    monkeypatch.setattr(failures, "SHARES", {name: float(name == kind) for name in failures.SHARES})
    return draw_doubtful(data, size, PLAIN, torch.Generator().manual_seed(5), device=CPU)


def test_the_truth_is_kept_whatever_the_deformation(data: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("as drawn", "deformed"):
        batch, hopeless = drawn(data, monkeypatch, kind)
        torch.testing.assert_close(batch.moving, warp(batch.truth, batch.known))
        assert not hopeless.any()


def test_deformed_goes_past_what_alignment_is_trained_for(data: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, beyond = (drawn(data, monkeypatch, kind, 24).batch for kind in ("as drawn", "deformed"))
    assert torch.equal(usual.fixed, beyond.fixed)
    assert beyond.known.norm(dim=1).mean() > 1.5 * usual.known.norm(dim=1).mean()


def test_every_family_goes_past_what_alignment_is_trained_for() -> None:
    for family in BEYOND:
        assert any(getattr(family, f.name) > 1.5 * getattr(MISALIGNMENTS["large"], f.name) for f in fields(family))


def test_another_patient_of_the_same_task(data: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, hopeless = drawn(data, monkeypatch, "other patient", 16)
    own = warp(batch.truth, batch.known)
    assert hopeless.sum() > 8
    pairs = [data.pairs[index] for index in batch.pair.tolist()]
    for index in range(16):
        if not hopeless[index]:  # none of its task and another case in this batch
            torch.testing.assert_close(batch.moving[index], own[index])
            continue
        partner = next(i for i in range(16) if torch.equal(batch.moving[index], own[i]))
        assert pairs[partner].task == pairs[index].task
        assert pairs[partner].case != pairs[index].case


def test_without_another_patient_a_pair_stays_as_drawn(data: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, hopeless = drawn(data, monkeypatch, "other patient", 1)
    assert not hopeless.any()
    torch.testing.assert_close(batch.moving, warp(batch.truth, batch.known))


def test_a_cut_image_lacks_what_it_says(data: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, hopeless = drawn(data, monkeypatch, "cut", 24)
    whole = warp(batch.truth, batch.known)
    head = warp(batch.mask, batch.known) > 0.5
    gone = (batch.moving[:, :1] == 0) & head & (whole[:, :1] > 0)
    share = gone.sum((1, 2, 3)) / (head & (whole[:, :1] > 0)).sum((1, 2, 3))
    kept = (batch.moving[:, :1] > 0).expand_as(whole)
    assert torch.equal(batch.moving[kept], whole[kept])
    assert 0.05 < share.min() < 0.25
    assert 0.55 < share.max() < 0.75
    assert (share[hopeless] > HALF - 0.08).all()
    assert (share[~hopeless] < HALF + 0.08).all()


def test_textures_fill_the_range_and_the_frame(data: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, hopeless = drawn(data, monkeypatch, "texture")
    assert hopeless.all()
    for picture in batch.moving[:, 0]:
        assert picture.min() == 0
        assert picture.max() == 1
    assert len({float(p.std()) for p in batch.moving[:, 0]}) == 8
    assert not batch.moving[:, 1:].any()


def test_a_seed_gives_the_same_batch_again(data: PairSet) -> None:
    first, again = (draw_doubtful(data, 6, PLAIN, torch.Generator().manual_seed(2), device=CPU) for _ in range(2))
    assert torch.equal(first.batch.moving, again.batch.moving)
    assert torch.equal(first.hopeless, again.hopeless)


# --- the head -------------------------------------------------------------------------------------


def seen(count: int = 3) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """What the head looks at, for images of 65 px."""
    correlations = {s: torch.randn(count, 49, 64 // s + 1, 64 // s + 1) for s in (8, 16)}
    return correlations, torch.rand(count, 1, 65, 65) * 5, torch.randn(count, 2, 65, 65)


def test_the_head_looks_at_everything_it_is_shown() -> None:
    head = Assessment((8, 16), 16).eval()
    correlations, error, field = seen()
    said = head(correlations, error, field)
    assert said.shape == (3,)
    assert ((said > 0) & (said <= WORST)).all()
    others = [
        head({**correlations, 8: correlations[8] + 1}, error, field),
        head({**correlations, 16: correlations[16] + 1}, error, field),
        head(correlations, error * 2, field),
        head(correlations, error, field * 2),
    ]
    assert all((other - said).abs().max() > 1e-4 for other in others)
    # A shift of the whole field says nothing of how good it is.
    torch.testing.assert_close(head(correlations, error, field + 3), said)


def test_the_head_can_learn_what_it_sees() -> None:
    head = Assessment((8, 16), 16).train()
    correlations, error, field = seen(16)
    target = torch.linspace(1, 10, 16)
    error = target.view(-1, 1, 1, 1).expand(-1, 1, 65, 65)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(60):
        loss = (head(correlations, error, field).log() - target.log()).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = head.eval()(correlations, error, field)
    assert torch.corrcoef(torch.stack([said.log(), target.log()]))[0, 1] > 0.9


def test_the_loss_compares_with_the_error_inside_the_head() -> None:
    """A field that is 3 px off on the left, where the head is, and 9 px on the right."""
    known = torch.zeros(2, 2, 65, 65)
    field = torch.zeros(2, 2, 65, 65)
    field[:, 0, :, :33], field[:, 0, :, 33:] = 3, 9
    mask = torch.zeros(2, 1, 65, 65)
    mask[..., 4:60, 4:30] = 1
    hopeless = torch.tensor([False, True])

    def loss(*said: float) -> float:
        alignment = Alignment(field, -field, (), assessed_error=torch.tensor(said))
        return float(assessment_loss(alignment, known, mask, hopeless))

    assert loss(3.0, WORST) == pytest.approx(0, abs=1e-6)
    assert loss(3.0, 3.0) > 0.3
    assert loss(9.0, WORST) > 0.3
    with pytest.raises(ValueError, match="no assessment"):
        assessment_loss(Alignment(field, -field, ()), known, mask, hopeless)


def test_nothing_is_said_before_training_and_what_is_said_scales_with_the_image(small_cfg: BSAFusionCfg) -> None:
    model = BSAFusion(small_cfg).eval()
    image = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6), size=(81, 81), mode="bicubic").clamp(0, 1)
    assert model.predict(image, image).alignment.assessed_error is None
    model.alignment.start_assessing()
    small = model.predict(image, image).alignment.assessed_error
    larger = torch.nn.functional.interpolate(image, size=(161, 161), mode="bilinear", align_corners=True)
    large = model.predict(larger, larger).alignment.assessed_error
    assert small.shape == (1,)
    assert float(large) == pytest.approx(2 * float(small), rel=0.05)
    assert model.predict(image, image, aligned_already=True).alignment.assessed_error is None


def test_the_assessment_trains_nothing_but_itself(small_cfg: BSAFusionCfg) -> None:
    model = BSAFusion(small_cfg).train()
    model.alignment.start_assessing()
    model.match(*torch.rand(2, 1, 1, 65, 65)).alignment.assessed_error.sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(name.startswith("alignment.assessment.") for name in reached)


def test_validation_of_the_head_is_without_dropout(
    data: PairSet, training_cfg: BSAFusionCfg, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    model = BSAFusion(training_cfg)
    randomise(model).train()
    objective = Objective(model, TrainingCfg(parts="assessment", side=65))
    scores = {assessment_score(objective, data, device=CPU, batches=1) for _ in range(2)}
    assert len(scores) == 1
    assert model.training


@pytest.mark.parametrize("options", [{"assessment": 0}, {"steps": ("affine",)}])
def test_a_network_without_the_head_cannot_train_it(small_cfg: BSAFusionCfg, options: dict[str, object]) -> None:
    alignment: AlignmentCfg = replace(small_cfg.alignment, **options)  # type: ignore[arg-type]
    model = BSAFusion(replace(small_cfg, alignment=alignment))
    assert model.predict(*torch.rand(2, 1, 1, 81, 81)).alignment.assessed_error is None
    with pytest.raises(ValueError, match="no assessment"):
        model.alignment.start_assessing()
