"""What the ablations share: a variant is a list of options, all see the same budget, the command writes the table.

A run lives in a folder named by the hash of all that shapes it (options, pairs, weights it starts from): one that two
ablations share is trained once, an interrupted one goes on and a finished one is kept. Results in the headers of the
experiments, ``results/NAME.json`` and the index in ``README.md`` are written from what was measured, never by hand.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bsafusion import weights
from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.files import write_between, write_json
from bsafusion.image import TASKS
from bsafusion.metrics import fusion_metrics
from bsafusion.models.bsafusion import FUSION_PREFIXES, BSAFusion, BSAFusionCfg, default
from bsafusion.options import with_options
from bsafusion.training import TrainingCfg, train

SAMPLES = 6000
CPU = torch.device("cpu")
BEGIN, END = "-- results, written by the command --", "-- end of results --"
Figures = dict[str, float]

ALIGNMENT = (
    "training.parts=alignment",
    "training.batch=8",
    "training.crop=96",
    "training.precision=bfloat16",
    "training.lr=2e-3",
    "training.warmup=50",
    "training.log_every=25",
    "training.checkpoint_every=100",
    'training.suites=["rigid","paper"]',
    "training.mix.own_contrast=0.5",
    'training.mix.misalignments=[["rigid",0.7],["paper",0.3]]',
    "model.encoder.colour=false",
    "model.representation.cross_blocks=0",
    "model.alignment.carry=false",
)
"""Options of every alignment run, chosen so that the budget suffices to see the network learn. The network is the
simplest one that aligns: what came after these runs is off."""


@dataclass(frozen=True)
class Variant:
    """One row of the table: its options come after those of the ablation."""

    name: str
    settings: tuple[str, ...] = ()


BASELINE, SECOND_SEED = Variant("baseline"), Variant("baseline, seed 1", ("training.seed=1",))
"""The second seed shows what chance alone changes: smaller differences between variants mean nothing."""


@dataclass(frozen=True)
class Column:
    """A figure shown in the table."""

    key: str
    heading: str
    digits: int = 2


RIGID, PAPER = Column("rigid", "rigid, px"), Column("paper", "paper, px")
ERRORS = (
    "Mean endpoint error inside the head on the val pairs, mean over tasks, one draw each of the suites rigid "
    "(8 degrees, 8 px) and paper"
)
"""What these two columns are, for the notes."""


@dataclass(frozen=True)
class Run:
    """A variant with all its options and the folder that they name; ``init``: weights to start from."""

    variant: Variant
    training: TrainingCfg
    model: BSAFusionCfg
    init: str | None
    folder: Path


@dataclass(frozen=True)
class Ablation:
    """An experiment: its variants and what is measured of each.

    Attributes:
        file: the experiment's own file, whose docstring gets the table.
        base: options of all variants.
        measure: the figures of a finished run on the ``val`` pairs of the CSV.
        notes: what the figures are, for the header.
        init: weights whose encoder, MDF-FR and BSFA every variant starts from; None: all drawn.
        timed: the inference time is measured too, one variant after another (column ``seconds``).
    """

    file: Path
    base: tuple[str, ...]
    variants: tuple[Variant, ...]
    measure: Callable[[Run, Path], Figures]
    columns: tuple[Column, ...]
    notes: str
    init: str | None = None
    timed: bool = False


# --- one run --------------------------------------------------------------------------------------


def plan(ablation: Ablation, variant: Variant, pairs: Path, runs: Path, samples: int) -> Run:
    """All options of a variant; ``samples`` is the number of pairs seen in training."""
    network, digest_of_init = default(), None
    if ablation.init:
        record, _ = weights.find(ablation.init)
        network, digest_of_init = BSAFusionCfg.from_dict(dict(record.config)), record.sha256
    training, model = with_options(TrainingCfg(), network, [*ablation.base, *variant.settings])
    steps = samples // training.batch
    if steps < 1:
        raise ValueError(f"--samples {samples}: expected at least one batch, {training.batch}")
    training = replace(training, steps=steps, validate_every=steps)
    shaping = [asdict(training), model.to_dict(), weights.file_sha256(pairs), digest_of_init]
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    return Run(variant, training, model, ablation.init, runs / digest[:12])


def carry_out(run: Run, pairs: Path) -> None:
    """Train what is left to train of a run."""

    def say(step: int, figures: dict[str, float]) -> None:
        if step % run.training.log_every == 0 or step == run.training.steps:
            shown = "  ".join(f"{k} {figures[k]:.3g}" for k in ("loss", "pairs_per_second"))
            print(f"{run.variant.name}: step {step}/{run.training.steps}  {shown}", flush=True)

    init = None if run.init is None else _without_fusion(run)
    train(pairs, run.folder, model_cfg=run.model, cfg=run.training, init=init, on_step=say)


def _without_fusion(run: Run) -> str:
    """The weights to start from with fusion drawn anew: trained blocks would fit into some variants only."""
    assert run.init is not None
    torch.manual_seed(run.training.seed)
    mine = BSAFusion(run.model).state_dict()
    source, record = weights.load(run.init)
    kept = {k: v for k, v in source.state_dict().items() if not k.startswith(FUSION_PREFIXES)}
    config = run.model.to_dict()
    weights.save(
        run.folder,
        "init",
        {**mine, **kept},
        preset=run.model.preset,
        config=config,
        tasks=record.tasks,
        data=record.data,
        steps=0,
    )
    return str(run.folder / "init.safetensors")


def measured(ablation: Ablation, run: Run, pairs: Path) -> dict[str, Any]:
    """The figures of a run and how fast it was trained; trains and measures it unless that is done."""
    path = run.folder / f"{ablation.measure.__name__}.json"
    if not path.is_file():
        carry_out(run, pairs)
        lines = map(json.loads, (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
        rates = [line["pairs_per_second"] for line in lines if line["kind"] == "train"]
        figures = ablation.measure(run, pairs)
        rate = rates[-1] if rates else None  # a run shorter than log_every logs none
        write_json(path, {"figures": figures, "pairs_per_second": rate, "threads": torch.get_num_threads()})
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# --- what is measured -----------------------------------------------------------------------------


def endpoint_errors(run: Run, pairs: Path) -> Figures:
    """Mean endpoint error inside the head, pixels, as the run validated itself at its end: for each suite and task, the
    mean over tasks, and before alignment."""
    figures: Figures = dict(weights.WeightsRecord.read(run.folder / "best.json").figures)
    for suite in run.training.suites:
        for end in ("", "/before"):
            tasks = [figures[f"{suite}/{task}{end}"] for task in TASKS if f"{suite}/{task}{end}" in figures]
            figures[suite + end] = statistics.fmean(tasks)
    return figures


@torch.inference_mode()
def modality_read(run: Run, pairs: Path) -> Figures:
    """:func:`endpoint_errors`, and the share of images whose modality is read: by the classifier from the MFRH, and by
    the same classifier (the judge) from the transferred tokens."""
    model, _ = weights.load(str(run.folder / "best.safetensors"))
    stage = model.representation
    stage.refresh_judge()
    data = PairSet(read_pairs(pairs, split="val"), side=run.training.side)
    right: dict[str, list[bool]] = {"classifier": [], "judge": []}
    for index in range(len(data)):
        batch = validation_batch(data, [index], MISALIGNMENTS["paper"], draw=0, device=CPU)
        found = model.match(batch.fixed, batch.moving, mirrored="never").representation
        tokens = torch.cat([t.flatten(2).transpose(1, 2) for t in found.matched])
        modality = torch.cat([batch.modality_fixed, batch.modality_moving])
        right["classifier"] += (torch.cat(found.logits).argmax(1) == modality).tolist()
        right["judge"] += (stage.judge(tokens)[2].argmax(1) == modality).tolist()
    return endpoint_errors(run, pairs) | {name: statistics.fmean(values) for name, values in right.items()}


QUALITY = ("qabf", "qssim", "viff", "qcv")


def fusion_quality(run: Run, pairs: Path) -> Figures:
    """Fusion metrics against the truth under the paper's misalignment, one draw: means over the pairs of a task and
    over tasks; of the heavy-tailed Q_CV the medians."""
    model, _ = weights.load(str(run.folder / "best.safetensors"))
    data = PairSet(read_pairs(pairs, split="val"), side=run.training.side)
    figures: Figures = {}
    for task in TASKS:
        scores = []
        for index in data.indices(task):
            batch = validation_batch(data, [index], MISALIGNMENTS["paper"], draw=0, device=CPU)
            fused = model.predict(batch.fixed, batch.moving, mirrored="never").fused
            fixed, truth, drawn = ((255 * t[0, 0]).round().numpy() for t in (batch.fixed, batch.truth, fused))
            scores.append(fusion_metrics(fixed, truth, drawn, QUALITY))
        for name in QUALITY if scores else ():
            middle = statistics.median if name == "qcv" else statistics.fmean
            figures[f"{name}/{task}"] = middle([score[name] for score in scores])
    for name in QUALITY:
        figures[name] = statistics.fmean(value for key, value in figures.items() if key.startswith(f"{name}/"))
    return figures


def inference_seconds(run: Run, *, repeats: int = 7) -> float:
    """Median time of ``predict`` for one pair of the run's size on one thread."""
    model, _ = weights.load(str(run.folder / "best.safetensors"))
    fixed, moving = torch.rand(2, 1, 1, run.training.side, run.training.side)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(2 + repeats):
        started = time.perf_counter()
        model.predict(fixed, moving, mirrored="never")
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return statistics.median(seconds[2:])


# --- what is written ------------------------------------------------------------------------------


def collect(ablation: Ablation, runs: list[Run], pairs: Path) -> dict[str, Any]:
    """The content of ``results/NAME.json``, and the table with it."""
    rows = {run.variant.name: measured(ablation, run, pairs) for run in runs}
    if ablation.timed:
        for run in runs:
            rows[run.variant.name]["figures"]["seconds"] = inference_seconds(run)
    training = runs[0].training
    samples = training.steps * training.batch
    rates = [row["pairs_per_second"] for row in rows.values() if row["pairs_per_second"]]
    threads = sorted({row["threads"] for row in rows.values()})
    budget = f"{samples} pairs seen in each run, {training.steps} steps of {training.batch}"
    if rates:
        budget += f"; {samples / statistics.median(rates) / 60:.1f} min a run (threads: {', '.join(map(str, threads))})"
    shown = ablation.columns[:2]
    summary = "; ".join(
        f"{name} " + " / ".join(f"{row['figures'][c.key]:.{c.digits}f}" for c in shown) for name, row in rows.items()
    )
    return {
        "budget": budget,
        "summary": f"{' / '.join(c.heading for c in shown)}: {summary}",
        "table": table(ablation.columns, {name: row["figures"] for name, row in rows.items()}),
        "base": list(ablation.base),
        "runs": {run.variant.name: run.folder.name for run in runs},
        "variants": {
            run.variant.name: {"settings": list(run.variant.settings), **rows[run.variant.name]} for run in runs
        },
    }


def table(columns: Sequence[Column], rows: dict[str, Figures]) -> list[str]:
    """Lines of a plain table; figures that have a value before alignment get a first row with it."""
    first = next(iter(rows.values()))
    before = {c.key: first[f"{c.key}/before"] for c in columns if f"{c.key}/before" in first}
    named = {**({"before alignment": before} if before else {}), **rows}
    lines = [["", *(c.heading for c in columns)]]
    for name, figures in named.items():
        lines.append([name, *(f"{figures[c.key]:.{c.digits}f}" if c.key in figures else "" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *(map(str.rjust, line[1:], widths[1:]))]).rstrip() for line in lines]


def write_results(file: Path, results: dict[str, Any], notes: str) -> None:
    """``results/NAME.json`` beside the experiment's file, the block in its docstring, and the index."""
    block = [f"Budget: {results['budget']}.", "", *results["table"], "", *textwrap.wrap(notes, 110)]
    write_between(file, BEGIN, END, "\n".join(block))
    (file.parent / "results").mkdir(exist_ok=True)
    write_json(file.parent / "results" / f"{file.stem}.json", results)
    write_index(file.parent)


def write_index(folder: Path) -> None:
    """The table in ``README.md`` of all experiments in ``folder``, from their docstrings and results."""
    readme = folder / "README.md"
    lines = ["| file | question | budget | result |", "| --- | --- | --- | --- |"]
    for file in sorted(folder.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if BEGIN not in docstring:
            continue
        path = folder / "results" / f"{file.stem}.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        cells = (docstring.splitlines()[0], results.get("budget", ""), results.get("summary", "not yet run"))
        lines.append(f"| [{file.name}]({file.name}) | {' | '.join(cells)} |")
    write_between(readme, "<!-- index:begin -->", "<!-- index:end -->", "\n".join(lines))


# --- the command ----------------------------------------------------------------------------------


def check_budget(runs: Path, samples: int, pairs: Path) -> None:
    """A folder holds runs of one budget and one list of pairs; raises ``ValueError`` for another."""
    path, budget = runs / "budget.json", {"samples": samples, "pairs": weights.file_sha256(pairs)}
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != budget:
            raise ValueError(
                f"{runs} holds runs of {there['samples']} pairs seen, this call asks for {samples}"
                f"{'' if there['pairs'] == budget['pairs'] else ' of another list of pairs'}; "
                "variants compare under one budget only: choose another folder or the same budget"
            )
        return
    runs.mkdir(parents=True, exist_ok=True)
    write_json(path, budget)


def conduct(ablation: Ablation, pairs: Path, runs: Path, *, samples: int, only: Sequence[str] = ()) -> None:
    """Train and measure what is missing; write the results unless only some variants were asked for.

    Raises:
        ValueError: unknown variants, another budget than the runs there are, or pairs without ``train`` or ``val``.
    """
    names = [variant.name for variant in ablation.variants]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"no variant {', '.join(map(repr, unknown))}; expected some of {', '.join(map(repr, names))}")
    for split in ("train", "val"):
        read_pairs(pairs, split=split)
    planned = [plan(ablation, variant, pairs, runs, samples) for variant in ablation.variants]
    check_budget(runs, samples, pairs)
    if only:
        for run in planned:
            if run.variant.name in only:
                print(f"{run.variant.name}: {json.dumps(measured(ablation, run, pairs)['figures'])}")
        return
    path = ablation.file.parent / "results" / f"{ablation.file.stem}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if results.get("runs") != {run.variant.name: run.folder.name for run in planned}:
        results = collect(ablation, planned, pairs)
        write_results(ablation.file, results, ablation.notes)
    print(f"Budget: {results['budget']}.", *results["table"], sep="\n")


def main(ablation: Ablation, arguments: Sequence[str] | None = None) -> None:
    """The command of an experiment."""
    docstring = ast.get_docstring(ast.parse(ablation.file.read_text(encoding="utf-8")))
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pairs", type=Path, metavar="PAIRS.csv")
    parser.add_argument("-o", "--runs", type=Path, required=True, help="folder of the runs, shared by all ablations")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="pairs seen in each run (%(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="VARIANT",
        help="train these variants and write no table, so that several calls may share the work: "
        + "; ".join(variant.name for variant in ablation.variants),
    )
    given = parser.parse_args(arguments)
    try:
        conduct(ablation, given.pairs, given.runs, samples=given.samples, only=given.only)
    except ValueError as error:
        parser.error(str(error))
