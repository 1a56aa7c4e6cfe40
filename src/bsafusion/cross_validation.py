"""New patients beside known ones: cross-validation over cases, beside the split that a pairs CSV states.

The paper splits slices, so that slices of one volume stand on both sides. Here each test pair is aligned twice,
misaligned in the same way: by a network that was trained on the file's own training split (``same-patients``), and by
one that never saw a slice of this patient (``new-patients``, one network a fold). Training sets differ in size as well:
a fold lacks the slices of its patients. Networks are taken as they are after the last step: no test pair chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bsafusion.benchmark import Benchmark, EvaluationError
from bsafusion.datasets import Pair, case_folds, read_pairs
from bsafusion.evaluation import Method, claim_folder, open_method, predict_method
from bsafusion.files import write_csv
from bsafusion.models.bsafusion import BSAFusionCfg
from bsafusion.training import TrainingCfg, pairs_sha256, train
from bsafusion.weights import file_sha256

SAME, NEW = "same-patients", "new-patients"
METHODS = (NEW, SAME)
"""The first is compared with the other."""
OnStep = Callable[[str, int, dict[str, float]], None]


@dataclass(frozen=True)
class Folds:
    """Weights by training set: ``slices`` for the file's own split, and one per fold of held-out cases."""

    slices: Path
    folds: tuple[Path, ...]
    of_case: Mapping[str, int]


def train_folds(
    pairs: Path,
    out: Path,
    count: int,
    *,
    cfg: TrainingCfg,
    model_cfg: BSAFusionCfg,
    split: str = "val",
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Folds:
    """Train ``count + 1`` networks alike, below ``out/folds``; runs that are there are resumed.

    Args:
        split: whose pairs will be aligned.
        on_step: called after every step with the run's name, the step and its figures.

    Raises:
        EvaluationError: pairs without a case, a pair whose patient has none in ``train``, a fold that leaves none of a
            task to train on that it would be tested on, or ``out/folds`` holds another number of folds or folds of
            other pairs, whose networks have seen patients that they would be tested on.
        ValueError: fewer cases than folds in a task, or what ``training.train`` raises.
    """
    if split == "train":
        raise EvaluationError("split 'train' holds the pairs that are trained on; test another one, such as 'val'")
    everything = read_pairs(pairs)
    nameless = next((pair for pair in everything if not pair.case), None)
    if nameless is not None:
        raise EvaluationError(f"{pairs}: {nameless.task} {nameless.id} has no case; name the patient in column case")
    of_case = case_folds(everything, count)
    training = [pair for pair in everything if pair.split == "train"]
    runs = {"slices": training}
    for fold in range(count):
        runs[f"fold-{fold + 1}"] = [pair for pair in training if of_case[pair.case] != fold]
    _check_patients(pairs, [pair for pair in everything if pair.split == split], runs, of_case)
    claim_folder(out / "folds", {"folds": count, "pairs_sha256": pairs_sha256(everything)})
    weights = {}
    for name, members in runs.items():
        folder = out / "folds" / name
        folder.mkdir(parents=True, exist_ok=True)
        _write_pairs(folder / "pairs.csv", members)

        def show(step: int, figures: dict[str, float], name: str = name) -> None:
            if on_step:
                on_step(name, step, figures)

        weights[name] = train(folder / "pairs.csv", folder, model_cfg=model_cfg, cfg=cfg, device=device, on_step=show)
    slices, *folds = weights.values()
    return Folds(slices, tuple(folds), of_case)


def _check_patients(
    path: Path, tested: Sequence[Pair], runs: Mapping[str, Sequence[Pair]], of_case: Mapping[str, int]
) -> None:
    """Raise where a network would not be what its name says: one that saw the patient, one that knows the task."""
    known = {pair.case for pair in runs["slices"]}
    for pair in tested:
        if pair.case not in known:
            raise EvaluationError(
                f"{path}: {pair.task} {pair.id} is of case {pair.case}, of which no pair is in split 'train', so no "
                f"network would be one of {SAME}; expected a split of slices, with every patient in 'train'"
            )
        name = f"fold-{of_case[pair.case] + 1}"
        if not any(member.task == pair.task for member in runs[name]):
            raise EvaluationError(
                f"{path}: without the cases of {name} no {pair.task} pair is left to train on, but {pair.id} is tested "
                "there; expected training pairs of each task from more patients; add some, or take more folds"
            )


def _write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    lines = ([p.id, p.task, p.case, p.split, p.fixed.resolve(), p.moving.resolve()] for p in pairs)
    write_csv(path, ["id", "task", "case", "split", "fixed", "moving"], lines)


def predict_folds(
    benchmark: Benchmark, out: Path, folds: Folds, *, device: str = "cpu", on_case: Callable[[], None] | None = None
) -> list[Method]:
    """Predictions of both; each pair of ``new-patients`` comes from the network that does not know its patient.

    Returns:
        The two methods, to be scored.
    """
    draws = benchmark.cfg.draws
    cases = benchmark.cases(draws)
    known = {"weights_sha256": [file_sha256(path) for path in folds.folds]}
    for index, path in enumerate((folds.slices, *folds.folds)):
        name = NEW if index else SAME
        chosen = [c for c in cases if not index or folds.of_case[benchmark.pair(c).case] == index - 1]
        with open_method(Method(name, "network", str(path)), device=device) as (predictor, settings):
            made_with = {**settings, **known} if index else settings
            predict_method(benchmark, out, name, predictor, made_with, cases=chosen, on_case=on_case)
    return [Method(name, "network", "") for name in METHODS]
