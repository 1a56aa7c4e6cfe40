"""The calibrated part of the verdict: how probable it is that a result is wrong.

A logistic regression over a few numbers of the evidence, fitted for one set of weights by ``benchmarks/trust.py`` and
kept beside them as ``NAME.trust.json``. It is bound to the parameters that serve alignment: other parameters give other
evidence, so a calibration made for them says nothing. Parameters of fusion may change.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from bsafusion.models.assessment import WORST
from bsafusion.models.bsafusion import FUSION_PREFIXES, JUDGE_PREFIX, BSAFusionCfg, working_shape
from bsafusion.weights import CALIBRATION, WeightsError

OFF = 5.0 / 256
"""A result is wrong when its mean error inside the head exceeds this share of the longer side: 5 px of 256."""

NOT_FOR_ALIGNMENT = (*FUSION_PREFIXES, JUDGE_PREFIX)
"""How the names of the parameters begin that no field depends on."""

LENGTHS = ("expected_error", "assessed_error", "nonaffine_mean", "disagreement")
"""Pixels in the evidence; compared as if the longer side had 256."""

LOGARITHMS = ("assessed_error", "disagreement")
"""What is compared on a log scale: a doubling counts the same at any size."""

WHERE_IN_DOUBT = ("disagreement",)
"""What is known only where the network looked at the mirror images; elsewhere it counts as usual."""

SAID = {
    "similarity_after": ("descriptor similarity", ".3f"),
    "similarity_spread": ("unevenness of the descriptor similarity", ".3f"),
    "similarity_low": ("descriptor similarity that a tenth of the head falls short of", ".3f"),
    "expected_error": ("expected error", ".1f px"),
    "assessed_error": ("error as judged from the aligned pair", ".1f px"),
    "nonaffine_mean": ("deformation beyond an affine map", ".1f px"),
    "disagreement": ("disagreement with the answer for the mirror images", ".1f px"),
}
"""How a number of the evidence is called in a reason, and how it is printed."""


def compared(name: str, value: float, longer_side: int) -> float:
    """A number of the evidence as calibrations compare it: see :data:`LENGTHS` and :data:`LOGARITHMS`."""
    scaled = value * 256 / longer_side if name in LENGTHS else value
    return math.log(max(scaled, 0.01)) if name in LOGARITHMS else scaled


def judged_error(pixels: float, longer_side: int) -> str:
    """``assessed_error`` of a result of this size in words: from ``WORST`` of the working size on it tells no more."""
    working = max(working_shape((longer_side, longer_side), BSAFusionCfg.working_side))
    most = WORST * (longer_side - 1) / (working - 1)
    return f"{pixels:.1f} px{' or more' if pixels > 0.999 * most else ''}"


@dataclass(frozen=True)
class Calibration:
    """A logistic regression and the probability from which a result is ``suspect``.

    Attributes:
        alignment_sha256: of the parameters it was fitted for, see :func:`alignment_sha256`.
        usual: mean of each number of the evidence over right results; lengths in pixels at a longer side of 256, the
            mean of logarithms for :data:`LOGARITHMS`.
        spread: its standard deviation.
        weight: log odds of a wrong result for each ``spread`` above ``usual``.
        bias: log odds of a wrong result where everything is usual.
        threshold: probability from which a result is suspect.
        origin: what it was fitted on, how many draws, and how the threshold was chosen.
        least_similarity: of the descriptors of images that were taken as aligned already; below it they are not
            believed to be of one head. How alike descriptors are differs from one training to the next.
    """

    alignment_sha256: str
    usual: Mapping[str, float]
    spread: Mapping[str, float]
    weight: Mapping[str, float]
    bias: float
    threshold: float
    origin: str
    least_similarity: float = 0.35

    def __post_init__(self) -> None:
        unknown = sorted(self.weight.keys() - SAID.keys())
        if unknown or not self.usual.keys() == self.spread.keys() == self.weight.keys():
            raise ValueError(
                f"usual {sorted(self.usual)}, spread {sorted(self.spread)}, weight {sorted(self.weight)}; "
                f"expected the same names in all three, of {', '.join(SAID)}"
            )
        numbers = [self.bias, self.threshold, *self.usual.values(), *self.spread.values(), *self.weight.values()]
        if not all(map(math.isfinite, numbers)) or min(self.spread.values(), default=1) <= 0:
            raise ValueError("a number is not finite, or a spread is not above 0; fit the calibration again")
        if not -1 < self.least_similarity < 1:
            raise ValueError(f"a least similarity of {self.least_similarity:g}; expected a cosine between -1 and 1")
        if not 0 < self.threshold < 1:
            raise ValueError(f"a threshold of {self.threshold:g}; expected a probability between 0 and 1")

    def contributions(self, evidence: Mapping[str, float | None], longer_side: int) -> dict[str, float] | None:
        """What each number adds to the log odds of a wrong result; None where the evidence lacks one of them."""
        parts = {}
        for name, weight in self.weight.items():
            value = evidence[name]
            if value is None:
                if name not in WHERE_IN_DOUBT:
                    return None
                parts[name] = 0.0
                continue
            parts[name] = weight * (compared(name, value, longer_side) - self.usual[name]) / self.spread[name]
        return parts

    def probability(self, evidence: Mapping[str, float | None], longer_side: int) -> float | None:
        """That the result is wrong (see :data:`OFF`); None where the evidence lacks a number it needs."""
        parts = self.contributions(evidence, longer_side)
        if parts is None:
            return None
        odds = self.bias + sum(parts.values())
        return 1 / (1 + math.exp(-odds)) if odds > -500 else 0.0

    def reason(self, evidence: Mapping[str, float | None], longer_side: int) -> str | None:
        """Why a result is suspect, and the numbers that speak against it, strongest first; None where it is not."""
        parts, probability = self.contributions(evidence, longer_side), self.probability(evidence, longer_side)
        if parts is None or probability is None or probability < self.threshold:
            return None
        # What raised the odds by less than a tenth (a factor of exp(0.1)) explains nothing.
        against = sorted((name for name, part in parts.items() if part > 0.1), key=lambda name: -parts[name])
        facts = "; ".join(self._fact(name, evidence[name], longer_side) for name in against)
        return (
            f"the chance that the result is off by more than {OFF * longer_side:.3g} px is put at {probability:.1%} "
            f"(suspect from {self.threshold:.1%}){f': {facts}' if facts else ''}"
        )

    def _fact(self, name: str, value: float | None, longer_side: int) -> str:
        phrase, form = SAID[name]
        number, _, unit = form.partition(" ")
        unit = f" {unit}" if unit else ""
        usual = math.exp(self.usual[name]) if name in LOGARITHMS else self.usual[name]
        usual *= longer_side / 256 if name in LENGTHS else 1
        told = f"{value:{number}}{unit}"
        if name == "assessed_error" and value is not None:
            told = judged_error(value, longer_side)
        return f"{phrase} {told} (usual: {usual:{number}})"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """Of :meth:`to_json`: tells one calibration from another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def alignment_sha256(network: nn.Module) -> str:
    """Of names and values of all parameters that a field depends on: survives another training of the fusion."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not name.startswith(NOT_FOR_ALIGNMENT):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibration_file(weights: Path) -> Path:
    """Where the calibration of a weight file lies: ``NAME.trust.json`` beside it."""
    return weights.with_suffix(CALIBRATION)


def read_calibration(weights: Path, network: nn.Module) -> tuple[Calibration | None, str]:
    """The calibration of ``network``, whose parameters came from the file ``weights``, and a word on it.

    None where there is none, or where it was fitted for other parameters: then the word says so, and only plain limits
    judge a result.

    Raises:
        WeightsError: the file is there but is no calibration.
    """
    path = calibration_file(weights)
    if not path.is_file():
        return None, "these weights have no calibration; only plain limits judge the result"
    try:
        calibration = Calibration(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise WeightsError(
            f"{path}: not a calibration ({error}); remove it, or fit it again with benchmarks/trust.py"
        ) from error
    if calibration.alignment_sha256 != alignment_sha256(network):
        return None, f"{path.name} was fitted for other weights; only plain limits judge the result"
    return calibration, calibration.origin
