"""How far ``suspect`` can be trusted: measure draws, choose by what to judge, fit the calibration, report.

    python benchmarks/trust.py measure PAIRS.csv   # predictions -> benchmarks/results/trust.csv
    python benchmarks/trust.py choose              # which numbers of the evidence tell best: a list, nothing written
    python benchmarks/trust.py fit                 # trust.csv -> NAME.trust.json beside the weights
    python benchmarks/trust.py report              # trust.csv -> docs/trust_curve.svg, the figures of docs/trust.md

Kinds of draws, all with fixed seeds: ``paper``, ``rigid`` and ``large``: pairs deformed by these families;
``unrelated``: the fixed image of one patient with the moving image of another at another level (a quarter of the scan
away, or more); ``same level``: of another patient at about the same level; ``noise``; ``photograph``: a sample picture
of scikit-image as the moving image; ``half cut``: half of the moving head is black; ``unseen``: a modality that no
training showed, made of the moving image (its edges under speckle, somewhat like ultrasound), these two deformed as
``rigid``; ``elastic``: deformed by smooth noise of 6 to 12 px on average, past what was trained for. A result is wrong
where the images do not belong together or half of the head is cut off, else where its mean error exceeds 5 px.

The fit uses draws of the ``train`` split; by what to judge is chosen on draw 1 of ``val``, the threshold on draws 1 and
3; what is reported is draw 2.
"""

from __future__ import annotations

import argparse
import csv
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
import skimage.transform
import torch
from numpy.typing import NDArray
from scipy import integrate, ndimage, optimize
from torch import Tensor

from bsafusion import weights
from bsafusion.colour import split_colour
from bsafusion.datasets import MISALIGNMENTS, Pair, PairSet, read_pairs, smooth_noise, validation_batch
from bsafusion.deformation import warp
from bsafusion.evidence import Evidence, measure_evidence
from bsafusion.files import write_between, write_whole
from bsafusion.metrics import endpoint_error, summarise
from bsafusion.pipeline import load_model
from bsafusion.report import Limits, verdict
from bsafusion.trust import OFF, SAID, Calibration, alignment_sha256, calibration_file, compared

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks/results/trust.csv"
CURVE = ROOT / "docs/trust_curve.svg"
PAGE = ROOT / "docs/trust.md"
SIDE = 256
FEATURES = ("assessed_error", "disagreement")
"""By what ``choose`` prints: of the sets that catch most, the smallest whose loss is within a standard error of that of
the best of them (the rule of one standard error; Breiman et al., Classification and Regression Trees, 1984, 3.4.3).
Before there was an assessment, others were tried and did not pay: quantiles of the expected error, size and roughness
of the whole field, entropy of the matching, overlap of the heads, mutual information, correlation of edges, the
modality classifier's logits."""
RIDGE = 1.0  # of the weights per spread: keeps them finite where classes separate
FALSE_ALARMS = 0.05
"""How many results of ``paper`` may be flagged though they are right, as a share of the suite; on the draws that choose
the threshold."""

CPU = torch.device("cpu")
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "moon", "page", "rocket", "text",
)  # fmt: skip
PLAN: dict[tuple[str, int], dict[str, int]] = {
    ("train", 1): {
        "paper": 40, "rigid": 24, "large": 90, "unrelated": 60, "same level": 20, "half cut": 24, "unseen": 12,
        "noise": 6, "elastic": 40,
    },
    ("val", 1): {
        "paper": 60, "rigid": 60, "large": 60, "unrelated": 30, "same level": 12, "half cut": 12, "unseen": 20,
        "photograph": 6, "noise": 4, "elastic": 40,
    },
    ("val", 2): {
        "paper": 60, "rigid": 60, "large": 60, "unrelated": 60, "same level": 30, "half cut": 30, "unseen": 20,
        "photograph": 12, "noise": 8, "elastic": 40,
    },
    ("val", 3): {"paper": 60},
}  # fmt: skip
"""Draws by split and seed: to fit, to choose by what to judge and the threshold, to report, and more for the threshold:
of 60 results 5 % are no more than 3."""
FIT, CHOOSE, REPORT, MORE = PLAN

ELASTIC = (6.0, 12.0)
"""Pixels: mean size of the deformations of kind ``elastic`` inside the head."""

CLOSE = 3.0
"""Pixels: a right result that is off by more is close to being wrong."""

LEVEL = 0.25
"""Share of the scan between two levels that count as different."""


class Draw(NamedTuple):
    """Two images ``1 1 H W`` in [0, 1]; ``known`` and ``mask`` where the truth is known."""

    kind: str
    name: str
    fixed: Tensor
    moving: Tensor
    known: Tensor | None = None
    mask: Tensor | None = None


def levels(pairs: Sequence[Pair]) -> dict[tuple[str, str], float]:
    """Place of each slice among those of its task and case, 0 the first, 1 the last; by ``(task, id)``."""
    members: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        members.setdefault((pair.task, pair.case), []).append(pair.id)
    return {
        (task, name): index / max(len(names) - 1, 1)
        for (task, _), names in members.items()
        for index, name in enumerate(sorted(names))
    }


def deformed(data: PairSet, kind: str, family: str, indices: Sequence[int], draw: int) -> Iterator[Draw]:
    for index in indices:
        batch = validation_batch(data, [index], MISALIGNMENTS[family], draw=draw, device=CPU)
        moving = batch.moving
        seed = np.random.default_rng((draw, index, 7))
        if kind == "half cut":
            moving = half_cut(moving, batch.mask, angle=float(seed.uniform(0, 2 * np.pi)))
        elif kind == "unseen":
            moving = speckled_edges(moving, seed)
        pair = data.pairs[index]
        yield Draw(kind, f"{pair.task}/{pair.id}/{draw}", batch.fixed, moving, batch.known, batch.mask)


def strongly_deformed(data: PairSet, indices: Sequence[int], draw: int) -> Iterator[Draw]:
    for index in indices:
        (fixed, truth, mask), pair = data.pictures([index]), data.pairs[index]
        noise = smooth_noise(1, (SIDE, SIDE), 16.0, torch.Generator().manual_seed(100_003 * draw + index))
        size = float(np.random.default_rng((draw, index, 17)).uniform(*ELASTIC))
        known = noise * (size / noise.norm(dim=1)[mask[:, 0] > 0].mean())
        yield Draw("elastic", f"{pair.task}/{pair.id}/{draw}", fixed, warp(truth, known), known, mask)


def half_cut(image: Tensor, mask: Tensor, *, angle: float) -> Tensor:
    """Black beyond a straight line through the middle of the head, at ``angle`` (radians)."""
    rows, columns = (grid - grid[mask[0, 0] > 0].float().mean() for grid in np_indices(image))
    return image * (rows * np.sin(angle) + columns * np.cos(angle) < 0)


def np_indices(image: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in image.shape[-2:]), indexing="ij")
    return rows, columns


def speckled_edges(image: Tensor, random: np.random.Generator) -> Tensor:
    """Edges of the smoothed image under Rayleigh speckle, as an ultrasound of it might show."""
    edges = ndimage.gaussian_gradient_magnitude(image[0, 0].numpy(), 2.0)
    speckle = ndimage.gaussian_filter(random.rayleigh(1.0, edges.shape), 0.7)
    picture = np.sqrt(edges / edges.max()) * speckle
    return torch.from_numpy(np.clip(picture / np.quantile(picture, 0.995), 0, 1).astype(np.float32))[None, None]


def mismatched(
    data: PairSet, kind: str, indices: Sequence[int], draw: int, level: dict[tuple[str, str], float]
) -> Iterator[Draw]:
    for index in indices:
        pair = data.pairs[index]
        own = level[pair.task, pair.id]

        def fits(other: Pair, pair: Pair = pair, own: float = own) -> bool:
            apart = abs(level[other.task, other.id] - own)
            near = apart >= LEVEL if kind == "unrelated" else apart <= LEVEL / 3
            return other.task == pair.task and other.case != pair.case and near

        others = [i for i, other in enumerate(data.pairs) if fits(other)]
        if not others:
            continue
        other = int(np.random.default_rng((draw, index, 11)).choice(others))
        name = f"{pair.task}/{pair.id}+{data.pairs[other].id}/{draw}"
        fixed, moving = data.pictures([index])[0], data.pictures([other])[1]
        yield Draw(kind, name, fixed, moving)


def foreign(data: PairSet, kind: str, indices: Sequence[int], draw: int) -> Iterator[Draw]:
    for place, index in enumerate(indices):
        fixed = data.pictures([index])[0]
        shape = (fixed.shape[-2], fixed.shape[-1])
        name = PHOTOGRAPHS[place % len(PHOTOGRAPHS)]
        if kind == "noise":
            random, name = np.random.default_rng((draw, index, 13)), "noise"
            picture = random.random(shape)
            if place % 2:  # every other one is smooth
                picture = ndimage.gaussian_filter(picture, 4.0)
                picture = (picture - picture.min()) / np.ptp(picture)
        else:
            picture = np.asarray(getattr(skimage.data, name)(), dtype=np.float64) / 255
            side = min(picture.shape[:2])
            picture = skimage.transform.resize(picture[:side, :side], shape, anti_aliasing=True).clip(0, 1)
        seen = picture[None] if picture.ndim == 2 else np.concatenate(split_colour(np.moveaxis(picture, -1, 0)))
        moving = torch.from_numpy(seen.astype(np.float32))[None]
        yield Draw(kind, f"{data.pairs[index].id}+{name}/{draw}", fixed, moving)


def draws(data: PairSet, every: Sequence[Pair], counts: dict[str, int], draw: int) -> Iterator[Draw]:
    """``counts`` draws of each kind, the pairs spread evenly over the split; ``every``: all pairs, for their levels."""
    level = levels(every)
    for kind, count in counts.items():
        # Each kind starts at another pair, so that a small count does not see the same ones every time.
        spread = np.unique((np.arange(count) * len(data) / count + draw + len(kind)).astype(int) % len(data))
        chosen: list[int] = spread.tolist()
        if kind in MISALIGNMENTS:
            yield from deformed(data, kind, kind, chosen, draw)
        elif kind in ("half cut", "unseen"):
            yield from deformed(data, kind, "rigid", chosen, draw)
        elif kind == "elastic":
            yield from strongly_deformed(data, chosen, draw)
        elif kind in ("unrelated", "same level"):
            yield from mismatched(data, kind, chosen, draw, level)
        else:
            yield from foreign(data, kind, chosen, draw)


# --- measure ---

NUMBERS = tuple(field.name for field in fields(Evidence))
HEADER = ("alignment_sha256", "split", "draw", "kind", "name", "error", *NUMBERS)


class Row(NamedTuple):
    """One measured draw; ``error``: mean inside the head, pixels, None where the images do not belong together."""

    split: str
    draw: int
    kind: str
    name: str
    error: float | None
    evidence: Evidence

    @property
    def off(self) -> bool:
        """Whether the error is known, and too large."""
        return self.error is not None and self.error > OFF * SIDE

    @property
    def wrong(self) -> bool:
        """Whether the result is not to be believed: of half a head the unseen half is a guess, however good."""
        return self.off or self.error is None or self.kind == "half cut"


def measure(path: Path, name: str) -> None:
    """Predict every draw of :data:`PLAN` and write its evidence."""
    model, every = load_model(name), read_pairs(path)
    sha256 = alignment_sha256(model.network)
    with write_whole(MEASURED) as aside, aside.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(HEADER)
        for (split, draw), counts in PLAN.items():
            data = PairSet(read_pairs(path, split=split), side=SIDE)
            for one in draws(data, every, counts, draw):
                out = model.network.predict_alignment(one.fixed, one.moving)
                aligned = warp(one.moving[:, :1], out.alignment.displacement, padding="zeros")
                evidence = measure_evidence(out.alignment, one.fixed[0, 0].numpy(), aligned[0, 0].numpy())
                error = None
                if one.known is not None and one.mask is not None:
                    residual = endpoint_error(one.known[0].numpy(), out.alignment.displacement[0].numpy())
                    error = summarise(residual, one.mask[0, 0].numpy() > 0).mean
                numbers = [None if value is None else f"{value:.6g}" for value in asdict(evidence).values()]
                told = None if error is None else f"{error:.6g}"
                table.writerow((sha256, split, draw, one.kind, one.name, told, *numbers))


def read_measured(sha256: str) -> list[Row]:
    """The rows of :data:`MEASURED`; refuses those of other weights."""
    with MEASURED.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if {row["alignment_sha256"] for row in rows} != {sha256}:
        raise SystemExit(f"{MEASURED}: measured with other weights; run `python benchmarks/trust.py measure PAIRS.csv`")
    return [
        Row(
            row["split"],
            int(row["draw"]),
            row["kind"],
            row["name"],
            float(row["error"]) if row["error"] else None,
            Evidence(**{name: float(row[name]) if row[name] else None for name in NUMBERS}),  # type: ignore[arg-type],
        )
        for row in rows
    ]


def of(rows: Sequence[Row], part: tuple[str, int]) -> list[Row]:
    return [row for row in rows if (row.split, row.draw) == part]


def in_view(rows: Sequence[Row]) -> list[Row]:
    """What is left to the calibration: a limit flags heads that are cut in half."""
    return [row for row in rows if row.evidence.cut_share <= Limits().cut_share]


# --- fit ---


def regress(values: NDArray[np.float64], wrong: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """Weights and bias of a logistic regression of ``wrong`` (``N``) on ``values`` (``N K``, standardised)."""
    signs = np.where(wrong, 1.0, -1.0)

    def loss(parameters: NDArray[np.float64]) -> float:
        odds = values @ parameters[1:] + parameters[0]
        return float(np.logaddexp(0, -signs * odds).sum() + RIDGE / 2 * (parameters[1:] ** 2).sum())

    best = optimize.minimize(loss, np.zeros(values.shape[1] + 1), method="BFGS").x
    return best[1:], float(best[0])


def lowest_threshold(right: Sequence[float], alarms: int) -> float:
    """The lowest probability from which results are suspect that flags no more than ``alarms`` of the ``right``.

    A little above the first that is not flagged, so that no rounding decides.
    """
    falling = [1.0, *sorted(right, reverse=True), 0.0]
    return min(falling[alarms + 1] + 0.005, (falling[alarms] + falling[alarms + 1]) / 2)


class Regression(NamedTuple):
    """``bias + weight . (value - usual) / spread`` are the log odds of a wrong result; what is NaN counts as usual."""

    usual: NDArray[np.float64]
    spread: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: float

    def odds(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of values ``N K`` from :func:`compared_values`."""
        return np.asarray(standardised(values, self.usual, self.spread) @ self.weight + self.bias, dtype=np.float64)


def standardised(
    values: NDArray[np.float64], usual: NDArray[np.float64], spread: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.nan_to_num((values - usual) / spread)


def compared_values(rows: Sequence[Row], features: Sequence[str]) -> NDArray[np.float64]:
    """``N K``: the evidence as calibrations compare it, NaN where it has no number."""

    def of_row(row: Row, name: str) -> float:
        value = getattr(row.evidence, name)
        return math.nan if value is None else compared(name, value, SIDE)

    return np.array([[of_row(row, name) for name in features] for row in rows])


def regression(rows: Sequence[Row], features: Sequence[str]) -> Regression:
    """Of wrong results on these numbers of the evidence."""
    values, wrong = compared_values(rows, features), np.array([row.wrong for row in rows])
    usual, spread = np.nanmean(values[~wrong], axis=0), np.nanstd(values[~wrong], axis=0)
    return Regression(usual, spread, *regress(standardised(values, usual, spread), wrong))


class Choice(NamedTuple):
    """A set of numbers to judge by: how many it would let pass of what :func:`caught` counts, its mean log loss on
    :data:`CHOOSE` and the standard error of that mean."""

    missed: int
    loss: float
    error: float
    features: tuple[str, ...]


def choose(rows: Sequence[Row], sha256: str) -> list[Choice]:
    """All sets of numbers of the evidence, fitted on :data:`FIT`; the best first."""
    fitted, chosen = in_view(of(rows, FIT)), in_view(of(rows, CHOOSE))
    signs = np.where([row.wrong for row in chosen], 1.0, -1.0)
    found = []
    for count in range(1, len(SAID) + 1):
        for features in combinations(SAID, count):
            odds = regression(fitted, features).odds(compared_values(chosen, features))
            suspect, there = caught(rows, fit(rows, sha256, features))
            losses = np.logaddexp(0, -signs * odds)
            error = float(losses.std(ddof=1) / math.sqrt(len(losses)))
            found.append(Choice(there - suspect, float(losses.mean()), error, features))
    return sorted(found)


def fit(rows: Sequence[Row], sha256: str, features: Sequence[str] = FEATURES) -> Calibration:
    """Fit on :data:`FIT`; the threshold from the right results of ``paper`` in :data:`CHOOSE` and :data:`MORE`."""
    fitted, chosen = in_view(of(rows, FIT)), [*of(rows, CHOOSE), *of(rows, MORE)]
    usual, spread, weight, bias = regression(fitted, features)
    wrong = sum(row.wrong for row in fitted)

    def named(numbers: NDArray[np.float64]) -> dict[str, float]:
        return {name: round(float(number), 5) for name, number in zip(features, numbers, strict=True)}

    calibration = Calibration(
        alignment_sha256=sha256,
        usual=named(usual),
        spread=named(spread),
        weight=named(weight),
        bias=round(bias, 5),
        threshold=0.5,
        origin=f"logistic regression on {len(fitted)} results of the training pairs, {wrong} of them wrong; "
        f"threshold: the lowest with at most {FALSE_ALARMS:.0%} false alarms on paper, on val",
    )
    paper = [row for row in chosen if row.kind == "paper"]
    # What the limit on cut heads flags is an alarm, too.
    right = [probability(calibration, row) if in_view([row]) else 1.0 for row in paper if not row.wrong]
    threshold = lowest_threshold(right, int(FALSE_ALARMS * len(paper) + 1e-9))
    return replace(calibration, threshold=round(threshold, 3), least_similarity=round(least_similarity(chosen), 3))


def least_similarity(rows: Sequence[Row]) -> float:
    """What all but a few unrelated pairs stay below as given, and all but a few pairs under ``paper`` exceed.

    Aligned pairs are more alike than those under ``paper``: it need not be higher than the unrelated ask for.
    """

    def as_given(kind: str) -> list[float]:
        values = [row.evidence.similarity_before for row in rows if row.kind == kind]
        return [value for value in values if value is not None]

    alike = float(np.quantile(as_given("paper"), FALSE_ALARMS))
    unrelated = float(np.quantile(as_given("unrelated"), 1 - FALSE_ALARMS))
    return min(alike, unrelated)


def probability(calibration: Calibration, row: Row) -> float:
    value = calibration.probability(asdict(row.evidence), SIDE)
    assert value is not None, row.name  # the networks measured here give all evidence
    return value


# --- report ---


class Judged(NamedTuple):
    """A result and whether its verdict, hard limits included, is ``suspect``."""

    row: Row
    suspect: bool


def judge(rows: Sequence[Row], calibration: Calibration) -> list[Judged]:
    return [Judged(row, verdict(row.evidence, SIDE, trust=calibration)[0] == "suspect") for row in rows]


def caught(rows: Sequence[Row], calibration: Calibration) -> tuple[int, int]:
    """How many results of :data:`CHOOSE` and :data:`MORE` that are off by too much are suspect, and how many there are.

    Those whose error is not known are left out.
    """
    off = [one for one in judge([*of(rows, CHOOSE), *of(rows, MORE)], calibration) if one.row.off]
    return sum(one.suspect for one in off), len(off)


def table(judged: Sequence[Judged]) -> str:
    """Markdown: what was flagged, by kind."""
    lines = [
        "| draws | n | suspect | wrong | of these suspect | right | of these suspect |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]

    def share(members: Sequence[Judged]) -> str:
        count = sum(one.suspect for one in members)
        return f"{count} ({percent(count, len(members))}%)" if members else "-"

    def line(name: str, members: Sequence[Judged]) -> str:
        wrong, right = ([one for one in members if one.row.wrong is which] for which in (True, False))
        cells = (name, len(members), share(members), len(wrong), share(wrong), len(right), share(right))
        return f"| {' | '.join(map(str, cells))} |"

    for kind in dict.fromkeys(one.row.kind for one in judged):
        lines.append(line(kind, of_kind(judged, kind)))
    lines.append(line("paper, rigid and large together", of_kind(judged, *MISALIGNMENTS)))
    lines.append(line("all whose error is known", [one for one in judged if one.row.error is not None]))
    return "\n".join([*lines, line("all", judged)])


def of_kind(judged: Sequence[Judged], *kinds: str) -> list[Judged]:
    return [one for one in judged if one.row.kind in kinds]


def percent(part: int, whole: int) -> int:
    """Rounded; 0 and 100 only where they are exact."""
    exact = part in (0, whole)
    return round(100 * part / whole) if exact else min(max(round(100 * part / whole), 1), 99)


def counted(part: int, whole: int, noun: str = "") -> str:
    """``none of 54``, ``3 of 60 (5 %)``, ``all 30``; with a noun ``3 of 60 pairs (5 %)``."""
    among = f"{whole} {noun}".rstrip()
    if part == 0:
        return f"none of {among}"
    return f"all {among}" if part == whole else f"{part} of {among} ({percent(part, whole)} %)"


def flagged(judged: Sequence[Judged]) -> str:
    return counted(sum(one.suspect for one in judged), len(judged))


def pixels(errors: Sequence[float]) -> str:
    """``5.1 to 6.5 px``, or ``5.1 px`` where both ends are printed alike."""
    ends = dict.fromkeys(f"{end:.1f}" for end in (min(errors), max(errors)))
    return f"{' to '.join(ends)} px"


def wrong_results(judged: Sequence[Judged]) -> str:
    """A bullet: how many of the results whose error is known to be too large were flagged, and which were not."""
    limit = f"{OFF * SIDE:g} px"
    off = [(one, one.row.error) for one in judged if one.row.error is not None and one.row.off]
    if not off:
        return f"No result whose error is known is off by more than {limit} in these draws."
    text = [f"Of the results whose error is known to exceed {limit}, {flagged([one for one, _ in off])} were flagged."]
    missed = [error for one, error in off if not one.suspect]
    if missed:
        all_from = math.ceil(max(missed))
        beyond = sum(error > all_from for _, error in off)
        if beyond:
            end = f"the {beyond} off by more than {all_from} px {'was' if beyond == 1 else 'were all'} flagged"
        else:
            end = f"no result at all is off by more than {all_from} px"
        others = "The other one is" if len(missed) == 1 else f"The other {len(missed)} are"
        text.append(f"{others} off by {pixels(missed)}; {end}.")
    usual = [one for one, _ in off if one.row.kind != "elastic"]
    if usual:
        text.append(f"Without the strong elastic deformations it is {flagged(usual)}.")
    return " ".join(text)


def false_alarms(judged: Sequence[Judged]) -> str:
    """A bullet: how many right results of the known families were flagged."""
    right = {kind: [one for one in of_kind(judged, kind) if not one.row.wrong] for kind in MISALIGNMENTS}
    told = ", ".join(f"{flagged(members)} of `{kind}`" for kind, members in right.items() if members)
    paper = of_kind(judged, "paper")
    text = f"Of the results of the `paper` suite {flagged(paper)} are flagged. Right results that are flagged: {told}."
    cut = sum(one.suspect and not in_view([one.row]) for one in right["paper"])
    if cut:
        text += f" In {cut} of those of `paper` about half of the head is out of view, which is a hard limit."
    alarms = [one for one in right["large"] if one.suspect]
    others = [one for kind, members in right.items() if kind != "large" for one in members]
    if alarms:
        near = sum(one.row.error is not None and one.row.error > CLOSE for one in alarms)
        text += f" Of those of `large`, {counted(near, len(alarms))} are off by {CLOSE:g} to {OFF * SIDE:g} px"
        often = len(alarms) / len(right["large"])
        usual = sum(one.suspect for one in others) / max(len(others), 1)
        far_more = often > max(2 * usual, FALSE_ALARMS)
        text += ": the verdict is careful where the images had to be moved far." if far_more else "."
    return text


def same_level(judged: Sequence[Judged]) -> str:
    """A bullet: how many pairs of two patients at one level passed."""
    pairs = of_kind(judged, "same level")
    passed = sum(not one.suspect for one in pairs)
    lead = "may pass" if passed else "did not pass here, which is no promise"
    return (
        f"**Two patients at the same level {lead}:** {counted(passed, len(pairs), 'such pairs')} were called `ok`. "
        "Their heads do match; no evidence used here knows whose they are. Compare the names, not the verdict."
    )


def half_heads(judged: Sequence[Judged]) -> str:
    """A bullet: how pairs fared whose moving image shows half of the head."""
    results = of_kind(judged, "half cut")
    near = counted(sum(not one.row.off for one in results), len(results))
    return (
        f"Of half a head, {flagged(results)} were flagged, though {near} are within {OFF * SIDE:g} px over the whole "
        "head: there is nothing to see by which the other half could be known to be right."
    )


def unseen(judged: Sequence[Judged]) -> str:
    """A bullet: how the modality fared that no training showed."""
    results = of_kind(judged, "unseen")
    passed = [one for one in results if not one.suspect]
    right = [one for one in results if not one.row.wrong]
    text = (
        "An unseen modality is flagged by the same evidence as any other, not for being unseen: "
        f"{counted(len(passed), len(results))} passed"
    )
    if passed:
        good = sum(not one.row.wrong for one in passed)
        which = "all" if good == len(passed) else good or "none"
        text += f", {which} of them right within {OFF * SIDE:g} px"
    if right:
        text += f". Of the right ones {flagged(right)} were flagged"
    return (
        f"{text}. MRI against MRI of another contrast is such a case; the verdicts on the MR pairs that ship stand in "
        "the [README](../README.md#how-well-it-works)."
    )


def paragraph(text: str, *, bullet: bool = False) -> str:
    """Wrapped as the pages are; spaces and hyphens inside of words stay."""
    return textwrap.fill(
        text,
        120,
        initial_indent="- " if bullet else "",
        subsequent_indent="  " if bullet else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def page_figures(rows: Sequence[Row], calibration: Calibration, name: str) -> dict[str, str]:
    """What :data:`PAGE` says in figures, by the name of its mark; ``name``: of the weights."""
    fitted, judged = in_view(of(rows, FIT)), judge(of(rows, REPORT), calibration)
    fitted_wrong = sum(row.wrong for row in fitted)
    known = of_kind(judged, *MISALIGNMENTS)
    tasks = [task for task, _ in dict.fromkeys(tuple(one.row.name.split("/")[:2]) for one in known)]
    pairs = ", ".join(f"{tasks.count(task)} {task.upper()}" for task in dict.fromkeys(tasks))
    split, draw = REPORT
    measured = (
        f"`{split}` split of the atlas pairs ({len(tasks)} pairs: {pairs}), weights `{name}`, draw {draw}, "
        f'n = {len(judged)}. "Wrong" are results off by more than {OFF * SIDE:g} px, all results of images that do not '
        "belong together, and all of half a head: where nothing is seen, the field is a guess."
    )
    mix = (
        f"The chance is that of the mix of draws on which it was fitted ({fitted_wrong} of {len(fitted)} wrong), on "
        "pictures of one atlas. Elsewhere its order stays meaningful; its percentage need not."
    )
    patients = "`train` and `val` are other slices of the same patients. For a new patient all of this may be worse."
    bullets = (
        wrong_results(judged),
        false_alarms(judged),
        same_level(judged),
        half_heads(judged),
        unseen(judged),
        mix,
        patients,
    )
    made = (
        f"A logistic regression with {len(FEATURES)} weights and a bias (ridge {RIDGE:g} per standard deviation) on "
        f"{len(fitted)} results of the `{FIT[0]}` split, {fitted_wrong} of them wrong; what the limit on cut heads "
        f"flags is left out. The threshold is the lowest with at most {100 * FALSE_ALARMS:g} % false alarms, those of "
        f"that limit included, among all results of `paper` on `{CHOOSE[0]}`, draws {CHOOSE[1]} and {MORE[1]}; the "
        f"table is draw {draw}: the same pairs under other deformations, with other partners. Every draw has a fixed "
        "seed."
    )
    commands = (
        "```text\n"
        f"python benchmarks/trust.py measure PAIRS.csv   # {len(rows)} predictions -> benchmarks/results/trust.csv\n"
        "python benchmarks/trust.py choose              # which numbers of the evidence tell best\n"
        f"python benchmarks/trust.py fit                 # -> {name}.trust.json, beside the weights\n"
        "python benchmarks/trust.py report              # the figures of this page, docs/trust_curve.svg\n"
        "```"
    )
    return {
        "threshold": paragraph(
            f"By the calibration of the weights `{name}` a result is `suspect` from a chance of "
            f"{100 * calibration.threshold:.0f} % on."
        ),
        "measured": f"{paragraph(measured)}\n\n{table(judged)}",
        "meaning": "\n".join(paragraph(text, bullet=True) for text in bullets),
        "made": f"{commands}\n\n{paragraph(made)}",
    }


class Curve(NamedTuple):
    """Falling thresholds: the shares of right and of wrong results that each flags; ``area`` under the curve."""

    false_alarms: NDArray[np.float64]
    caught: NDArray[np.float64]
    area: float


def roc(values: NDArray[np.float64], wrong: NDArray[np.bool_]) -> Curve:
    """Receiver operating characteristic of ``values`` (``N``) as a test for ``wrong`` (``N``)."""
    levels_ = np.concatenate([[np.inf], np.unique(values)[::-1]])
    caught = np.array([(values[wrong] >= level).mean() for level in levels_])
    false_alarms = np.array([(values[~wrong] >= level).mean() for level in levels_])
    return Curve(false_alarms, caught, float(integrate.trapezoid(caught, false_alarms)))


def bins(
    values: NDArray[np.float64], wrong: NDArray[np.bool_], edges: Sequence[float]
) -> list[tuple[float, float, int]]:
    """Mean probability, share that was wrong and number of results between neighbouring ``edges``; no empty ones."""
    place = np.digitize(values, edges[1:-1])
    kept = (place == index for index in range(len(edges) - 1))
    return [(float(values[k].mean()), float(wrong[k].mean()), int(k.sum())) for k in kept if k.any()]


def draw_curve(curve: Curve, at: tuple[float, float], reliability: Sequence[tuple[float, float, int]]) -> str:
    """Two panels as SVG: the curve with the chosen threshold, and what probabilities came true."""
    side, left, top, gap = 260, 56, 34, 86

    def x(panel: int, value: float) -> float:
        return left + panel * (side + gap) + value * side

    def y(value: float) -> float:
        return top + (1 - value) * side

    def points(panel: int, pairs: Iterator[tuple[float, float]]) -> str:
        return " ".join(f"{x(panel, a):.1f},{y(b):.1f}" for a, b in pairs)

    width, height = left + 2 * side + gap + 20, top + side + 52
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    titles = (
        (f"wrong against right results (area {curve.area:.3f})", "right results flagged", "wrong results flagged"),
        ("estimated against observed (results)", "estimated probability", "share that was wrong"),
    )
    for panel, (title, across, up) in enumerate(titles):
        parts.append(f'<text x="{x(panel, 0)}" y="{top - 14}" font-weight="bold">{title}</text>')
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            parts.append(
                f'<path d="M{x(panel, tick)} {y(0)}V{y(1)}M{x(panel, 0)} {y(tick)}H{x(panel, 1)}" stroke="#ddd"/>'
                f'<text x="{x(panel, tick)}" y="{y(0) + 16}" text-anchor="middle">{tick:.0%}</text>'
                f'<text x="{x(panel, 0) - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:.0%}</text>'
            )
        middle = (x(panel, 0) - 42, y(0.5))
        parts.append(
            f'<text x="{x(panel, 0.5)}" y="{y(0) + 36}" text-anchor="middle">{across}</text>'
            f'<text x="{middle[0]}" y="{middle[1]}" text-anchor="middle" '
            f'transform="rotate(-90 {middle[0]} {middle[1]})">{up}</text>'
        )
    steps = points(0, zip(curve.false_alarms.tolist(), curve.caught.tolist(), strict=True))
    parts.append(f'<polyline points="{steps}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
    parts.append(
        f'<circle cx="{x(0, at[0]):.1f}" cy="{y(at[1]):.1f}" r="5" fill="#c8401e"/>'
        f'<text x="{x(0, at[0]) + 10:.1f}" y="{y(at[1]) + 18:.1f}">chosen: {at[1]:.0%} at {at[0]:.0%}</text>'
    )
    parts.append(f'<path d="M{x(1, 0)} {y(0)}L{x(1, 1)} {y(1)}" stroke="#999" stroke-dasharray="4 4"/>')
    line = points(1, ((estimated, observed) for estimated, observed, _ in reliability))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
    for estimated, observed, count in reliability:
        # Below the line to its right, and clear of the frame.
        at_end, low = estimated > 0.9, observed < 0.08
        beside = (x(1, estimated) + (-10 if at_end else 8), y(observed) + (4 if at_end else -12 if low else 16))
        parts.append(
            f'<circle cx="{x(1, estimated):.1f}" cy="{y(observed):.1f}" r="4" fill="#1f5fa8"/>'
            f'<text x="{beside[0]:.1f}" y="{beside[1]:.1f}" text-anchor="{"end" if at_end else "start"}">{count}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def report(rows: Sequence[Row], calibration: Calibration, name: str) -> None:
    """Write the figures of :data:`REPORT` into :data:`PAGE` and draw :data:`CURVE`; ``name``: of the weights."""
    reported = of(rows, REPORT)
    values = np.array([probability(calibration, row) for row in reported])
    wrong = np.array([row.wrong for row in reported])
    suspect = values >= calibration.threshold
    curve = roc(values, wrong)
    at = (float(suspect[~wrong].mean()), float(suspect[wrong].mean()))
    picture = draw_curve(curve, at, bins(values, wrong, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)))
    for mark, told in page_figures(rows, calibration, name).items():
        write_between(PAGE, f"<!-- figures:{mark} -->", "<!-- /figures -->", told)
    with write_whole(CURVE) as aside:
        aside.write_text(picture, encoding="utf-8")
    print(f"area under the curve {curve.area:.3f}; threshold {calibration.threshold}; n={len(reported)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "choose", "fit", "report"))
    parser.add_argument("pairs", type=Path, nargs="?", help="pairs CSV; for measure")
    parser.add_argument("--weights", default=weights.DEFAULT)
    args = parser.parse_args()
    if args.what == "measure":
        if args.pairs is None:
            parser.error("measure needs a pairs CSV")
        measure(args.pairs, args.weights)
        return
    network, _ = weights.load(args.weights)
    sha256 = alignment_sha256(network)
    rows, path = read_measured(sha256), calibration_file(weights.find(args.weights)[1])
    if args.what == "choose":
        for choice in choose(rows, sha256)[:16]:
            print(f"{choice.missed} missed  loss {choice.loss:.4f} ± {choice.error:.4f}  {', '.join(choice.features)}")
    elif args.what == "fit":
        calibration = fit(rows, sha256)
        with write_whole(path) as aside:
            aside.write_text(calibration.to_json(), encoding="utf-8")
        print(f"{path.name}: weights {dict(calibration.weight)}, threshold {calibration.threshold}")
    else:
        model = load_model(args.weights)
        known = model.trust
        if known is None:
            parser.error(f"there is no calibration {path.name} for these weights; run `python benchmarks/trust.py fit`")
        report(rows, known, model.record.name)


if __name__ == "__main__":
    main()
