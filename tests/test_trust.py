from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bsafusion import pipeline, weights
from bsafusion.evidence import Evidence, measure_evidence
from bsafusion.models.bsafusion import FUSION_PREFIXES, BSAFusion, BSAFusionCfg
from bsafusion.report import describe_trust, verdict
from bsafusion.report_page import words
from bsafusion.trust import (
    NOT_FOR_ALIGNMENT,
    OFF,
    Calibration,
    alignment_sha256,
    calibration_file,
    judged_error,
    read_calibration,
)
from bsafusion.weights import WeightsError
from pairs import known_network

SIDE = 256
CALIBRATION = Calibration(
    alignment_sha256="ab",
    usual={"expected_error": 2.0, "similarity_low": 0.3},
    spread={"expected_error": 0.5, "similarity_low": 0.1},
    weight={"expected_error": 1.0, "similarity_low": -2.0},
    bias=-1.0,
    threshold=0.5,
    origin="made up",
)
USUAL = Evidence(0.3, 0.5, 2.0, 3.0, 12.0, 0.0, 0.0, similarity_low=0.3)


def probability(evidence: Evidence, side: int = SIDE, calibration: Calibration = CALIBRATION) -> float:
    value = calibration.probability(asdict(evidence), side)
    assert value is not None
    return value


# --- the number ---


def test_where_the_mirror_images_were_not_looked_at_the_disagreement_counts_as_usual() -> None:
    mean, spread, weight = ({"disagreement": number} for number in (0.0, 0.5, 2.0))  # usual: exp(0) = 1 px
    calibration = replace(CALIBRATION, usual=mean, spread=spread, weight=weight)
    unseen, usual, apart = (replace(USUAL, disagreement=pixels) for pixels in (None, 1.0, math.e))
    assert probability(unseen, SIDE, calibration) == probability(usual, SIDE, calibration)
    assert probability(apart, SIDE, calibration) == pytest.approx(1 / (1 + math.exp(1 - 4)))
    assert calibration.reason(asdict(unseen), SIDE) is None
    said = "disagreement with the answer for the mirror images 2.7 px (usual: 1.0)"
    assert str(calibration.reason(asdict(apart), SIDE)).endswith(said)
    assert CALIBRATION.probability(asdict(replace(USUAL, expected_error=None)), SIDE) is None  # others are needed


def test_the_assessed_error_counts_by_its_logarithm() -> None:
    calibration = Calibration(
        alignment_sha256="ab",
        usual={"assessed_error": math.log(2.0)},
        spread={"assessed_error": math.log(2.0)},
        weight={"assessed_error": 1.0},
        bias=0.0,
        threshold=0.5,
        origin="made up",
    )
    for error, side, odds in ((2.0, SIDE, 0), (4.0, SIDE, 1), (1.0, SIDE, -1), (8.0, 2 * SIDE, 1)):
        evidence = asdict(replace(USUAL, assessed_error=error))
        assert probability(replace(USUAL, assessed_error=error), side, calibration) == pytest.approx(
            1 / (1 + math.exp(-odds))
        )
    reason = calibration.reason(evidence, 2 * SIDE)
    assert reason is not None
    assert "error as judged from the aligned pair 8.0 px (usual: 4.0)" in reason
    assert calibration.probability(asdict(USUAL), SIDE) is None


def test_where_all_is_usual_the_bias_alone_decides() -> None:
    assert probability(USUAL) == pytest.approx(1 / (1 + math.e))
    even = replace(CALIBRATION, bias=0.0)  # a chance of exactly a half, from which a result is suspect
    assert verdict(USUAL, SIDE, trust=even)[0] == "suspect"
    assert verdict(USUAL, SIDE, trust=replace(even, threshold=0.5 + 1e-9))[0] == "ok"


def test_each_number_counts_by_its_weight_in_spreads() -> None:
    assert probability(replace(USUAL, expected_error=2.5)) == pytest.approx(0.5)
    assert probability(replace(USUAL, similarity_low=0.2)) == pytest.approx(1 / (1 + math.exp(-1)))
    parts = CALIBRATION.contributions(asdict(replace(USUAL, expected_error=3.0, similarity_low=0.4)), SIDE)
    assert parts == pytest.approx({"expected_error": 2.0, "similarity_low": -2.0})


@pytest.mark.parametrize("side", [128, 512, 2048])
def test_lengths_are_compared_at_one_size(side: int) -> None:
    at_side = replace(USUAL, expected_error=3.0 * side / SIDE)
    assert probability(at_side, side) == pytest.approx(probability(replace(USUAL, expected_error=3.0)))


@pytest.mark.parametrize(("error", "expected"), [(1e9, 1.0), (-1e9, 0.0)])
def test_extremes_do_not_overflow(error: float, expected: float) -> None:
    assert probability(replace(USUAL, expected_error=error)) == expected


def test_nothing_is_estimated_of_evidence_that_is_not_there() -> None:
    skipped = asdict(replace(USUAL, similarity_low=None))
    assert CALIBRATION.probability(skipped, SIDE) is None
    assert CALIBRATION.reason(skipped, SIDE) is None


# --- what is said of it ---


def test_a_reason_names_what_speaks_against_the_result_strongest_first() -> None:
    bad = replace(USUAL, expected_error=3.0, similarity_low=0.1)
    assert CALIBRATION.reason(asdict(bad), SIDE) == (
        "the chance that the result is off by more than 5 px is put at 99.3% (suspect from 50.0%): descriptor "
        "similarity that a tenth of the head falls short of 0.100 (usual: 0.300); expected error 3.0 px (usual: 2.0)"
    )


def test_what_speaks_for_the_result_is_no_reason_against_it() -> None:
    reason = CALIBRATION.reason(asdict(replace(USUAL, expected_error=6.0, similarity_low=0.4)), 2 * SIDE)
    assert reason is None
    reason = CALIBRATION.reason(asdict(replace(USUAL, expected_error=9.0, similarity_low=0.35)), 2 * SIDE)
    assert reason is not None
    assert "off by more than 10 px" in reason
    assert "expected error 9.0 px (usual: 4.0)" in reason
    assert "similarity" not in reason


@pytest.mark.parametrize(("side", "most"), [(256, 12.0), (200, 12.0), (512, 12 * 511 / 256)])
def test_an_error_beyond_what_is_told_apart_is_not_told_as_measured(side: int, most: float) -> None:
    assert judged_error(most, side) == f"{most:.1f} px or more"
    assert judged_error(0.9 * most, side) == f"{0.9 * most:.1f} px"


def test_the_calibrated_chance_takes_the_place_of_the_soft_limits() -> None:
    over = replace(USUAL, expected_error=4.5, similarity_low=0.9, similarity_after=0.2)
    assert len(verdict(over, SIDE)[1]) == 3
    assert verdict(over, SIDE, trust=CALIBRATION) == ("ok", [])
    under = replace(USUAL, similarity_low=0.0)
    assert verdict(under, SIDE) == ("ok", [])
    status, reasons = verdict(under, SIDE, trust=CALIBRATION)
    assert status == "suspect"
    assert reasons == [CALIBRATION.reason(asdict(under), SIDE)]


def test_hard_limits_speak_beside_the_chance_and_soft_ones_where_there_is_none() -> None:
    folded = replace(USUAL, folded_share=0.5)
    assert verdict(folded, SIDE, trust=CALIBRATION) == ("suspect", ["the field folds in 50.00% of the pixels"])
    skipped = replace(USUAL, similarity_before=0.1, similarity_after=None, similarity_low=None, expected_error=None)
    assert verdict(skipped, SIDE, trust=CALIBRATION) == verdict(skipped, SIDE)
    assert verdict(skipped, SIDE, trust=CALIBRATION)[0] == "suspect"


REFINED = {"steps": 2, "objective_before": 1.5, "objective_after": 1.25}


def test_the_report_carries_the_chance_of_an_ok_result_too() -> None:
    told = describe_trust(USUAL, SIDE, trust=CALIBRATION, note="made up")
    assert told == {"probability_off": 0.2689, "off_from_px": 5.0, "suspect_from": 0.5, "note": "made up"}
    sentences = dict(words({"status": "ok", "alignment": asdict(USUAL), "trust": told}))
    assert sentences["Chance of being wrong"].startswith(
        "The chance that the result is off by more than 5 px is put at 26.9%; from 50.0% on"
    )
    refined = {"status": "ok", "alignment": asdict(USUAL), "trust": told, "refinement": REFINED}
    refined["options"] = {"refine": 2, "mirrored": "auto"}
    assert dict(words(refined))["Chance of being wrong"].endswith("It was fitted to results without refinement.")
    assert "fitted" not in sentences["Chance of being wrong"]
    refined["options"] = {"refine": 2, "mirrored": "never"}
    assert dict(words(refined))["Chance of being wrong"].endswith(
        "fitted to results without refinement and whose mirror images were looked at in doubt alone."
    )


def test_the_report_says_why_nothing_was_estimated() -> None:
    none = describe_trust(USUAL, SIDE, trust=None, note="no calibration")
    assert (none["probability_off"], none["suspect_from"], none["note"]) == (None, None, "no calibration")
    skipped = describe_trust(replace(USUAL, similarity_low=None), SIDE, trust=CALIBRATION, note="made up")
    assert skipped["probability_off"] is skipped["suspect_from"] is None
    assert "nothing was aligned" in str(skipped["note"])
    assert "Chance of being wrong" not in dict(words({"status": "ok", "alignment": asdict(USUAL), "trust": none}))


# --- which weights it is for ---


def test_the_hash_survives_another_training_of_the_fusion_only() -> None:
    network = known_network()
    before = alignment_sha256(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(FUSION_PREFIXES):
                parameter.add_(1)
    assert alignment_sha256(network) == before
    with torch.no_grad():
        next(p for n, p in network.named_parameters() if n.startswith("alignment.")).add_(1e-3)
    assert alignment_sha256(network) != before


def test_the_hash_does_not_depend_on_the_memory_format() -> None:
    network: Any = known_network()
    assert alignment_sha256(network.to(memory_format=torch.channels_last)) == alignment_sha256(known_network())


def test_no_evidence_depends_on_what_the_hash_leaves_out(
    small_cfg: BSAFusionCfg, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    network: Any = randomise(BSAFusion(small_cfg))
    network.alignment.start_assessing()
    pair = torch.rand(2, 1, 1, 65, 65)

    def evidence() -> dict[str, Tensor]:
        found = network.predict(*pair).alignment
        maps = {name: getattr(found, name) for name in ("displacement", "inverse", "expected_error", "assessed_error")}
        return {**maps, "similarity": found.similarity[1]}

    def raise_all(chosen: Callable[[str], bool]) -> None:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if chosen(name):
                    parameter.add_(1)

    before = evidence()
    assert before["displacement"].std() > 0.1
    raise_all(lambda name: name.startswith(NOT_FOR_ALIGNMENT))
    after = evidence()
    assert all(torch.equal(before[name], after[name]) for name in before)
    raise_all(lambda name: not name.startswith(NOT_FOR_ALIGNMENT))
    assert not any(torch.equal(before[name], value) for name, value in evidence().items())


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.safetensors"
    calibration_file(path).write_text(text, encoding="utf-8")
    return path


def test_a_calibration_is_read_back_for_its_own_network_alone(tmp_path: Path) -> None:
    network = known_network()
    own = replace(CALIBRATION, alignment_sha256=alignment_sha256(network))
    path = written(tmp_path, own.to_json())
    assert calibration_file(path).name == "mine.trust.json"
    assert read_calibration(path, network) == (own, "made up")
    calibration, note = read_calibration(path, known_network((1.0, 0.0)))
    assert calibration is None
    assert "fitted for other weights" in note
    calibration, note = read_calibration(tmp_path / "other.safetensors", network)
    assert calibration is None
    assert "no calibration" in note


def test_a_calibration_read_back_has_the_same_hash_and_another_has_another(tmp_path: Path) -> None:
    network = known_network()
    own = replace(CALIBRATION, alignment_sha256=alignment_sha256(network))
    found, _ = read_calibration(written(tmp_path, own.to_json()), network)
    assert found is not None
    assert found.sha256 == own.sha256
    others = (
        replace(own, threshold=0.4),
        replace(own, usual={**own.usual, "expected_error": 2.1}),
        replace(own, origin="made up again"),
    )
    assert len({own.sha256, *(other.sha256 for other in others)}) == 4


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({**asdict(CALIBRATION), "bias": 10**400}),
        json.dumps({**asdict(CALIBRATION), "threshold": 1.5}),
        json.dumps({**asdict(CALIBRATION), "bias": math.nan}),
        json.dumps({**asdict(CALIBRATION), "spread": {"expected_error": 0.0, "similarity_low": 1.0}}),
        json.dumps({**asdict(CALIBRATION), "usual": {"expected_error": 1.0}}),
        json.dumps({**asdict(CALIBRATION), **{key: {"luck": 1.0} for key in ("usual", "spread", "weight")}}),
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(WeightsError, match=r"mine\.trust\.json: not a calibration"):
        read_calibration(written(tmp_path, text), known_network())


def test_a_calibration_is_no_record_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, CALIBRATION.to_json())
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert weights.shipped() == []


def test_images_taken_as_aligned_are_held_against_the_calibrations_own_similarity() -> None:
    given = Evidence(0.6, None, None, 0.0, 0.0, 0.0, 0.0)
    assert verdict(given, SIDE, trust=replace(CALIBRATION, least_similarity=0.5)) == ("ok", [])
    status, reasons = verdict(given, SIDE, trust=replace(CALIBRATION, least_similarity=0.7))
    assert status == "suspect"
    assert "have a descriptor similarity of 0.600; at least 0.700 is expected" in reasons[0]
    with pytest.raises(ValueError, match="a least similarity of 1"):
        replace(CALIBRATION, least_similarity=1.5)


def test_the_shipped_weights_have_a_calibration_that_flags_noise_and_passes_its_own_image() -> None:
    model = pipeline.load_model()
    assert model.trust is not None, model.trust_note
    assert 0 < model.trust.threshold < 1
    assert OFF * SIDE == 5
    usual = replace(USUAL, **model.trust.usual)
    assert verdict(usual, SIDE, trust=model.trust) == ("ok", [])
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 1, 128, 128), dtype=np.float32))
    rows, columns = np.indices((128, 128)) - 64
    head = np.where(np.hypot(rows, columns) < 50, 0.5 + 0.4 * np.sin(rows / 9) * np.cos(columns / 7), 0)
    fixed = torch.from_numpy(head.astype(np.float32))[None, None]
    out = model.network.predict(fixed, noise)
    evidence = measure_evidence(out.alignment, fixed[0, 0].numpy(), out.aligned[0, 0].numpy())
    assert verdict(evidence, 128, trust=model.trust)[0] == "suspect"
