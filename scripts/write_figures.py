"""Put measured figures into README.md, the pages of docs and onto the weights' card, from what the benchmarks wrote.

Rewrites in place what stands between the marks ``<!-- figures:NAME -->`` of README.md, docs/evaluation.md, docs/fusion.md,
docs/training.md and experiments/shipped_weights/README.md, and the figures of the card
src/bsafusion/pretrained/default.json. It measures nothing; what it reads is written by

    python benchmarks/alignment.py PAIRS.csv --samples -o benchmarks/results/alignment.json
    python benchmarks/speed.py --rounds 9 -o benchmarks/results/speed.json
    python benchmarks/fusion.py PAIRS.csv -o benchmarks/results/fusion.json
    bsafusion evaluate PAIRS.csv -o OUT --weights default --weights paper-preset=... --python elastix=... --python ants=...
    bsafusion evaluate PAIRS.csv -o TRAIN --split train --limit 20 --suites paper --methods bsafusion --fusions maximum
    bsafusion evaluate PAIRS.csv -o CASES --split-by case ...   # in full in docs/evaluation.md
    python benchmarks/trust.py measure PAIRS.csv                # trust.csv, judged here by the calibration that ships
    python experiments/breaking_point.py PAIRS.csv
    python experiments/stripped.py PAIRS.csv

The ``summary.csv`` of the evaluations are kept in ``benchmarks/results``: OUT's as ``evaluation.csv``, TRAIN's as
``evaluation_train.csv``, CASES' as ``evaluation_cases.csv``. The experiments keep their own. ``docs/trust.md`` and
``docs/refinement.md`` are written by ``benchmarks/trust.py`` and ``benchmarks/refine.py``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bsafusion.files import write_between
from bsafusion.pipeline import load_model
from bsafusion.trust import alignment_sha256
from bsafusion.weights import FOLDER, WeightsRecord

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = ROOT / "experiments" / "results"
END = "<!-- /figures -->"  # after each "<!-- figures:NAME -->"
TASKS = ("ct-mri", "pet-mri", "spect-mri")
PATIENTS, PATIENTS_OF = 24, {"ct-mri": 10, "pet-mri": 3, "spect-mri": 15}
"""Different values of ``case`` among the training pairs of the atlas, in all and for each task."""
VAL_PATIENTS, VAL_PATIENTS_OF = 19, {"ct-mri": 10, "pet-mri": 3, "spect-mri": 10}
"""Those among its ``val`` pairs."""
SUITES = {
    "paper": "the paper's recipe",
    "rigid": "±8°, ±8 px",
    "large": "±20°, 0.9 to 1.1, ±24 px, elastic 4 px",
    "self": "an MRI against itself, the paper's recipe",
}


def wrapped(text: str, *, bullet: bool = False) -> str:
    """As the pages are; commands, hyphens inside of words and ``7 %`` stay whole."""
    lead = ("- ", "  ") if bullet else ("", "")
    whole = re.sub(r"`[^`]*`|\d %", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.fill(
        whole, 120, initial_indent=lead[0], subsequent_indent=lead[1], break_long_words=False, break_on_hyphens=False
    )
    return lines.replace("\0", " ")


def suites_table(found: dict[str, Any]) -> str:
    lines = [
        "| misalignment | CT-MRI | PET-MRI | SPECT-MRI | consistency | folds | looked at twice |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for suite, words in SUITES.items():
        rows = [found["suites"][f"{suite}/{task}"] for task in TASKS]
        cells = [f"{row['before']:.2f} → **{row['error']:.2f}** ({row['seen']:.2f})" for row in rows]
        consistency = _mean_of_tasks(found, suite, "consistency")
        folded = max(row["folds"] for row in rows)
        twice = _mean_of_tasks(found, suite, "twice")
        lines.append(f"| `{suite}`: {words} | {' | '.join(cells)} | {consistency:.2f} | {folded:.2%} | {twice:.0%} |")
    return "\n".join(lines)


def no_gain(found: dict[str, Any]) -> str:
    """A sentence on what alignment does not make better."""
    worse = [
        f"{task.upper()} under `{suite}`"
        for suite in SUITES
        for task in TASKS
        if found["suites"][f"{suite}/{task}"]["error"] >= found["suites"][f"{suite}/{task}"]["before"]
    ]
    return f"\nNo better on average than doing nothing: {', '.join(worse)}.\n" if worse else ""


def cost(found: dict[str, Any], speed: dict[str, Any]) -> str:
    """Sentences on time and memory."""
    seconds, peak = speed["seconds"], speed["peak_mb"]
    twice = {suite: _mean_of_tasks(found, suite, "twice") for suite in ("paper", "rigid", "large")}
    usual = (1 - twice["paper"]) * seconds["default"] + twice["paper"] * seconds["twice"]
    return (
        "The network alone, loaded, on random 256x256 images, without reading or writing files, on "
        f"{speed['threads']} CPU threads ({speed['capability']}): {seconds['default']:.3f} s a pair and "
        f"{peak['default']:.0f} MB (whole process); the published network's shape takes {seconds['paper']:.3f} s and "
        f"{peak['paper']:.0f} MB in the same run, {seconds['paper'] / seconds['default']:.1f} times as long. A pair "
        f"whose mirror images are looked at as well, because a large error is expected, takes {seconds['twice']:.3f} s "
        f"and {peak['twice']:.0f} MB: {twice['paper']:.0%} of the results of `paper`, {twice['rigid']:.0%} of `rigid` "
        f"and {twice['large']:.0%} of `large`; with that share a pair of `paper` takes {usual:.3f} s on average, the "
        f"published shape {seconds['paper'] / usual:.1f} times as long. `--mirrored never` does without. The whole "
        f"`fuse` command on a sample pair, start, files and report included: {speed['cold_fuse_seconds']:.1f} s."
    )


def _mean_of_tasks(found: dict[str, Any], suite: str, name: str) -> float:
    return float(sum(found["suites"][f"{suite}/{task}"][name] for task in TASKS) / len(TASKS))


def identical(found: dict[str, Any]) -> str:
    """A sentence on images that are given twice."""
    return (
        f"Identical images, {found['identical']['n']} MRIs each with itself as it is, are given a field of at most "
        f"{found['identical']['max']:.2g} px at any pixel."
    )


def samples_table(found: dict[str, Any]) -> str:
    lines = ["| shipped pair | before | error | p95 | status |", "| --- | --- | --- | --- | --- |"]
    for name, row in found["samples"].items():
        lines.append(
            f"| `{name}` | {row['before']:.2f} | **{row['error']:.2f}** | {row['p95']:.2f} | {row['status']} |"
        )
    return "\n".join(lines)


METRICS = {
    "qabf": "Q_AB/F ↑",
    "qcv": "Q_CV ↓",
    "qssim": "Q_SSIM ↑",
    "viff": "VIFF ↑",
    "vif_sum": "VIF_sum ↑",
    "qs": "Q_S ↑",
}
SHOWN_FUSIONS = ("network", "maximum")
"""The rest is in the results."""
Rows = dict[tuple[str, str, str, str, str], dict[str, str]]  # method, fusion, suite, task, metric


def _read_rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as handle:
        keys = ("method", "fusion", "suite", "task", "metric")
        return {tuple(row[k] for k in keys): row for row in csv.DictReader(handle)}  # type: ignore[misc]


def _interval(row: dict[str, str]) -> str:
    return f" [{float(row['ci95_low']):.2f}, {float(row['ci95_high']):.2f}]" if row["ci95_low"] else ""


def _mean(row: dict[str, str]) -> str:
    return f"{float(row['mean']):.2f}{_interval(row)}"


def errors_table(rows: Rows) -> str:
    """Error of the fields by suite and method, one column per task, with CPU seconds; the best of each in bold."""
    lines = [
        "| misalignment | method | CT-MRI | PET-MRI | SPECT-MRI | folds | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    pairs = dict.fromkeys((key[2], key[0]) for key in rows if key[4] == "error")
    means = {key: f"{float(row['mean']):.2f}" for key, row in rows.items() if key[4] == "error"}
    for suite, method in sorted(pairs, key=lambda pair: ["paper", "rigid", "large", "corrupted"].index(pair[0])):
        cells = []
        for task in TASKS:
            key = (method, "", suite, task, "error")
            best = min((mean for other, mean in means.items() if other[2:] == key[2:]), key=float)
            bold = "**" if means[key] == best else ""
            cells.append(f"{bold}{means[key]}{bold}{_interval(rows[key])}")
        folds, seconds = (float(rows[method, "", suite, "all", name]["mean"]) for name in ("folds", "seconds"))
        lines.append(f"| `{suite}` | {method} | {' | '.join(cells)} | {folds:.2%} | {seconds:.2f} |")
    return "\n".join(lines)


def fusion_table(rows: Rows) -> str:
    """Published outputs in the paper's order of metrics, ours and the plain fusions beside them."""
    published: dict[tuple[str, str], dict[str, str]] = {}
    with (RESULTS / "published_outputs.csv").open(newline="", encoding="utf-8") as handle:
        published = {(row["task"].lower(), row["metric"]): row for row in csv.DictReader(handle)}
    lines = ["| task | fused by | n | " + " | ".join(METRICS.values()) + " |", "| --- " * (3 + len(METRICS)) + "|"]

    def cell(row: dict[str, str], metric: str) -> str:
        digits = 0 if metric == "qcv" else 3
        median = f" ({float(row['median']):.0f})" if metric == "qcv" else ""
        return f"{float(row['mean']):.{digits}f}{median}"

    for task in TASKS:
        count = published[task, "qabf"]["n"]
        cells = " | ".join(cell(published[task, name], name) for name in METRICS)
        lines.append(f"| {task.upper()} | published outputs, test split | {count} | {cells} |")
        fused = dict.fromkeys((k[0], k[1]) for k in rows if k[2] == "paper" and k[3] == task and k[4] == "qabf")
        for method, fusion in fused:
            if fusion not in SHOWN_FUSIONS:
                continue
            found = {name: rows[method, fusion, "paper", task, name] for name in METRICS}
            cells = " | ".join(cell(found[name], name) for name in METRICS)
            lines.append(f"| {task.upper()} | {method}, {fusion}, val split | {found['qabf']['n']} | {cells} |")
    return "\n".join(lines)


def write_evaluation(results: Path) -> None:
    """The tables of docs/evaluation.md."""
    rows = _read_rows(results)
    count = max(int(row["n"]) for key, row in rows.items() if key[3] == "ct-mri")
    text = f"""\
`bsafusion evaluate PAIRS.csv -o OUT --weights default --weights paper-preset=runs/p2/last.safetensors --python elastix=...
--python ants=...` on the Harvard Whole Brain Atlas pairs, split `val` ({count} pairs per task; 3 draws of each for the
networks and identity, 1 for the slower methods), 256x256, fixed seeds. Mean endpoint error inside the head in pixels with
its 95 % bootstrap interval over pairs, the lowest of each column and misalignment in bold; seconds of one CPU thread.
*paper-preset* was trained briefly (below). The rows of bsafusion are measured anew with each of its weights, the others
were once, on another day: compare their seconds roughly (elastix' under `paper` have a part of loading its library).

{errors_table(rows)}

Fusion in the same runs, after the `paper` misalignment, against the truth (the moving image before it was deformed).
*Published outputs*: the fused images that the authors of BSAFusion published of the official **test** split, scored with
the same definitions; ours and all others are of the **`val`** split, other slices, so the rows compare only roughly.
Q_CV: mean (median). The average and the Laplacian pyramid of every method are in `benchmarks/results/evaluation.csv`.

{fusion_table(rows)}

"""
    write_between(ROOT / "docs" / "evaluation.md", "<!-- figures:evaluate -->", END, text)


NEW, SAME = "new-patients", "same-patients"  # the methods of ``bsafusion evaluate --split-by case``


def cases_table(rows: Rows) -> str:
    """Error by suite for patients that a network never saw and for those it did, and the ratio of both."""
    lines = ["| misalignment | network | CT-MRI | PET-MRI | SPECT-MRI |", "| --- | --- | --- | --- | --- |"]
    errors = {(key[0], key[2], key[3]): row for key, row in rows.items() if key[4] == "error"}
    methods = dict.fromkeys(method for method, _, _ in errors)
    for suite in dict.fromkeys(suite for _, suite, _ in errors):
        for method in methods:
            found = [errors[method, suite, task] for task in TASKS]
            lines.append(f"| `{suite}` | {method} | {' | '.join(map(_mean, found))} |")
        means = [[float(errors[method, suite, task]["mean"]) for task in TASKS] for method in (NEW, SAME)]
        ratios = [f"{new / same:.2f}" for new, same in zip(*means, strict=True)]
        lines.append(f"| `{suite}` | ratio | {' | '.join(ratios)} |")
    return "\n".join(lines)


def write_cases(results: Path) -> None:
    """The table of new patients in docs/evaluation.md."""
    rows = _read_rows(results)
    text = f"""\
Measured on the atlas (`val`, {rows[NEW, "", "paper", "ct-mri", "error"]["n"]} pairs per task, 3 draws, two folds of the {PATIENTS} patients), mean error in pixels, of an earlier and smaller default preset (21 November
2026):

{cases_table(rows)}
"""
    write_between(ROOT / "docs" / "evaluation.md", "<!-- figures:cases -->", END, text)


def train_gap(train: Rows, val: Rows) -> str:
    """Errors of pairs that were trained on against those of ``val``, with what the difference says."""
    lines = ["| `paper` | CT-MRI | PET-MRI | SPECT-MRI | all |", "| --- | --- | --- | --- | --- |"]
    columns = (*TASKS, "all")
    for name, rows in (("train", train), ("val", val)):
        found = [rows["bsafusion", "", "paper", task, "error"] for task in columns]
        lines.append(f"| `{name}` | {' | '.join(map(_mean, found))} |")
    seen, unseen = (rows["bsafusion", "", "paper", "all", "error"] for rows in (train, val))
    if float(seen["ci95_high"]) < float(unseen["ci95_low"]):
        told = (
            "The pairs that were trained on are ahead, and over all tasks the intervals do not meet: the network seems to have "
            "begun to remember its slices, and more training on these pairs alone will help new ones less."
        )
    elif float(unseen["ci95_high"]) < float(seen["ci95_low"]):
        told = "The pairs of `val` are ahead; under `paper` nothing shows that the network remembers its slices."
    else:
        told = (
            "Over all tasks the intervals overlap; under `paper` nothing shows that the network remembers its slices."
        )
    return "\n".join([*lines, "", wrapped(told)])


def write_train_gap(train: Path, val: Path) -> None:
    """What the shipped weights know by heart, in docs/training.md."""
    rows, of_val = _read_rows(train), _read_rows(val)
    counts = " and ".join(
        f"{found['bsafusion', '', 'paper', 'ct-mri', 'error']['n']} of `{split}`"
        for split, found in (("train", rows), ("val", of_val))
    )
    text = f"""\
Mean endpoint error of the shipped weights in pixels, with its 95 % interval, on {counts} per task:

{train_gap(rows, of_val)}

`bsafusion evaluate pairs.csv -o OUT --split train --limit 20 --suites paper --methods bsafusion --fusions maximum`; its
`summary.csv` is kept as `benchmarks/results/evaluation_train.csv`, `val` is [that of all methods](evaluation.md#measured).
"""
    write_between(ROOT / "docs" / "training.md", "<!-- figures:train -->", END, text)


def write_stripped(before: Path, now: Path) -> None:
    """The table of heads without their rim beside the logs of the shipped weights."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, now))
    columns = [f"paper/{task}" for task in TASKS]
    lines = ["| `paper` | CT-MRI | PET-MRI | SPECT-MRI |", "| --- | --- | --- | --- |"]
    for name, row in new["errors"].items():
        cells = " | ".join(
            f"{row[key]:.2f}" if name == "before alignment" else f"{old['errors'][name][key]:.2f} → {row[key]:.2f}"
            for key in columns
        )
        lines.append(f"| {name} | {cells} |")
    text = f"""\
Mean endpoint error inside the head in pixels, weights of run 32 → weights that ship; one draw of each `val` pair:

{chr(10).join(lines)}

`python experiments/stripped.py PAIRS.csv`; what it gave with `--weights runs/32/last.safetensors` is kept as
`experiments/results/stripped_run32.json`.
"""
    write_between(ROOT / "experiments/shipped_weights/README.md", "<!-- figures:stripped -->", END, text)


def fusion_wins(found: dict[str, Any]) -> str:
    """In how many metrics the network is the best of all, and which fusion is better elsewhere."""
    wins = ", ".join(f"{task.upper()} {won['all']}" for task, won in found["wins"].items())
    ahead: dict[str, list[str]] = {}
    for task, means in found["means"].items():
        ours = means["network"]
        for metric, name in METRICS.items():
            sign, digits = (-1, 0) if metric == "qcv" else (1, 3)
            for other, values in means.items():
                if sign * values[metric] > sign * ours[metric]:
                    told = f"{name[:-2]} {values[metric]:.{digits}f} against {ours[metric]:.{digits}f} ({task.upper()})"
                    ahead.setdefault(other, []).append(told)
    text = f"Of the six metrics the network is better than all four plain fusions in: {wins}."
    for other, where in ahead.items():
        text += f" `{other}` is ahead of it in {', '.join(where)}."
    return text


def write_fusion(results: Path) -> None:
    """The table of docs/fusion.md."""
    found = json.loads(results.read_text(encoding="utf-8"))
    lines = ["| task | fused by | " + " | ".join(METRICS.values()) + " |", "| --- " * (2 + len(METRICS)) + "|"]
    for task, means in found["means"].items():
        for name, values in means.items():
            cells = " | ".join(f"{values[metric]:.{0 if metric == 'qcv' else 3}f}" for metric in METRICS)
            lines.append(f"| {task.upper()} | {name} | {cells} |")
    text = f"""\
`python benchmarks/fusion.py PAIRS.csv -o benchmarks/results/fusion.json`: the pairs of the Harvard Whole Brain Atlas as they
are (split `{found["split"]}`, 20 per task), without deformation and with no alignment (`--aligned`); means, 8-bit luminance.

{chr(10).join(lines)}

{wrapped(fusion_wins(found) + " What deformation and alignment make of it is in [Comparing methods](evaluation.md).")}
"""
    write_between(ROOT / "docs" / "fusion.md", "<!-- figures:fusion -->", END, text)


def load_trust() -> ModuleType:
    """``benchmarks/trust.py``, which knows what a wrong result is."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks_trust", Path(__file__).parent.parent / "benchmarks/trust.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def breaking_points(found: dict[str, Any]) -> str:
    """A bullet: how far a rotation and an elastic deformation are undone."""
    told, missed = [], []
    forms = {
        "rotation": ("rotations about the middle up to", "°", ""),
        "elastic": ("elastic deformations up to", " px", " on average"),
    }
    for kind, (name, unit, measure) in forms.items():
        points = {int(amount): row for amount, row in found["points"][kind].items()}
        few = list(itertools.takewhile(lambda point: point[1]["off"] <= 0.1, points.items()))
        most = max((row["off"] for _, row in few), default=0.0)
        text = f"at most {100 * most:.0f} % for {name} {few[-1][0] if few else 0}{unit}{measure}"
        broken = next((f", {100 * row['off']:.0f} % at {n}{unit}" for n, row in points.items() if row["off"] > 0.5), "")
        told.append(text + broken)
        amount, row = max(points.items(), key=lambda point: point[1]["missed"])
        missed.append(f"{100 * row['missed']:.0f} % ({amount}{unit})")
    return (
        f"**Large misalignments.** Off by more than 5 px after alignment are, of all pairs, {'; '.join(told)}. Off and still `ok` are "
        f"{' and '.join(missed)} at worst. `python experiments/breaking_point.py PAIRS.csv`"
    )


def weakest_task(found: dict[str, Any]) -> str:
    """A bullet: the task with the largest errors, and the errors of the others."""
    suites = ("paper", "rigid", "large")
    errors = {task: [found["suites"][f"{suite}/{task}"]["error"] for suite in suites] for task in TASKS}
    worst = max(errors, key=lambda task: sum(errors[task]))
    cells = ", ".join(
        f"{errors[worst][place]:.2f} px under `{suite}` "
        f"({' and '.join(f'{errors[task][place]:.2f}' for task in TASKS if task != worst)})"
        for place, suite in enumerate(suites)
    )
    others = " and ".join(task.upper() for task in TASKS if task != worst)
    return f"**{worst.upper()} is the weakest task**: {cells}; in brackets {others}. The command is that of the table above."


def one_without_skull(found: dict[str, Any]) -> str:
    """A bullet: what is left where only one image has lost its rim."""
    before, whole, moving, fixed, both = (
        found["errors"][name]["paper/ct-mri"]
        for name in (
            *("before alignment", "as they are", "moving without 16 px", "MRI without 16 px"),
            "both without 16 px",
        )
    )
    return (
        f"**Only one image skull-stripped.** Of {before:.2f} px (CT-MRI, `paper`) {moving:.2f} px are left where the CT "
        f"has lost the outer 16 px of the head, {fixed:.2f} where the MRI has, {both:.2f} where both have, {whole:.2f} "
        "where neither has. `python experiments/stripped.py PAIRS.csv`"
    )


def no_proof() -> str:
    """A bullet: how many wrong results pass as ``ok``, by the draws that ``benchmarks/trust.py`` reports."""
    trust, model = load_trust(), load_model()
    rows = trust.of(trust.read_measured(alignment_sha256(model.network)), trust.REPORT)
    judged = trust.judge(rows, model.trust)

    def passed(members: list[Any], noun: str = "") -> str:
        return trust.counted(sum(not one.suspect for one in members), len(members), noun)

    wrong = [one for one in judged if one.row.wrong]
    off = [one for one in wrong if one.row.off]
    usual = trust.of_kind(wrong, "paper", "rigid", "large")
    right = [one for one in judged if not one.row.wrong]
    alarms = trust.counted(sum(one.suspect for one in right), len(right), "right results")
    return (
        "**`ok` is no proof.** In the draws of [docs/trust.md](docs/trust.md), many of them spoilt on purpose, "
        f"{passed(wrong, 'wrong results')} passed as `ok`, among them {passed(off)} whose error is known to exceed 5 px (of `paper`, "
        f"`rigid` and `large` alone {passed(usual)}), and {passed(trust.of_kind(judged, 'same level'), 'pairs')} of two "
        f"patients at the same level. On the other side {alarms} were flagged. `python benchmarks/trust.py report`"
    )


def one_atlas(record: WeightsRecord) -> str:
    """A bullet: what training and figures rest on."""
    trained, tested = (
        ", ".join(f"{task.upper()} {count}" for task, count in of.items()) for of in (PATIENTS_OF, VAL_PATIENTS_OF)
    )
    return (
        f"**One atlas, few patients.** The weights were trained on {record.data.split(' (')[0]} of {PATIENTS} patients "
        f"({trained}; some in two tasks) of the Harvard Whole Brain Atlas, and these figures come from `val` pairs of "
        f"{VAL_PATIENTS} of them ({tested}), 8-bit pictures of 256x256 pixels. A new patient or another scanner may fare worse "
        "([what was measured of that](docs/evaluation.md#new-patients))."
    )


def write_limits(alignment: dict[str, Any], record: WeightsRecord) -> None:
    """Where it fails, in README.md."""
    broken, stripped = (
        json.loads((EXPERIMENTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("breaking_point", "stripped")
    )
    bullets = (
        breaking_points(broken),
        weakest_task(alignment),
        one_without_skull(stripped),
        one_atlas(record),
        no_proof(),
    )
    text = "\n".join(wrapped(bullet, bullet=True) for bullet in bullets)
    write_between(ROOT / "README.md", "<!-- figures:limits -->", END, text)


def main() -> None:
    """Write all of them."""
    write_evaluation(RESULTS / "evaluation.csv")
    write_cases(RESULTS / "evaluation_cases.csv")
    write_train_gap(RESULTS / "evaluation_train.csv", RESULTS / "evaluation.csv")
    write_stripped(EXPERIMENTS / "stripped_run32.json", EXPERIMENTS / "stripped.json")
    write_fusion(RESULTS / "fusion.json")
    alignment = json.loads((RESULTS / "alignment.json").read_text(encoding="utf-8"))
    speed = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    text = f"""\
Mean endpoint error inside the head in pixels, before → **after** (after, where the moving image shows anything at all: a
PET slice often fills only a part of the head, and nothing can be seen of the rest); {alignment["draws"]} draws of each of the 20 `{alignment["split"]}` pairs
per task, 256x256, fixed seeds, reference: the moving image before it was deformed. The atlas pairs themselves are aligned
to about 1 to 3 px only, which is a floor of this figure; *consistency* is the mean distance of a pair's draws from their
mean, which that misalignment does not enter.

`val` is no untouched test set: which runs were kept, in which proportion the weights of several were mixed, from which
expected error on mirror images are looked at, the settings of fusion and the threshold of the verdict were chosen on draws
of these pairs; `mr-bspline` below helped to choose six mixtures, `mr-rigid` one. Train and `val` are other slices of the same patients, as in the paper; how those trained on fare stands in
[experiments/limits.py](experiments/limits.py).

{suites_table(alignment)}
{no_gain(alignment)}
{wrapped(identical(alignment))}

The shipped pairs against their known transforms (`mr-rigid` is ITK's `R10X13Y17`: 10° and a shift of 13, 16 px; the MR
contrasts were never trained on):

{samples_table(alignment)}

`python benchmarks/alignment.py PAIRS.csv --samples -o benchmarks/results/alignment.json`

{wrapped(cost(alignment, speed))}

`python benchmarks/speed.py --rounds 9 -o benchmarks/results/speed.json`
"""
    write_between(ROOT / "README.md", "<!-- figures:begin -->", "<!-- figures:end -->", text)
    card = FOLDER / "default.json"
    record = WeightsRecord.read(card)
    if record.sha256 != alignment["sha256"]:
        raise SystemExit("benchmarks/results/alignment.json was measured with other weights; run it again")
    write_limits(alignment, record)
    figures: dict[str, Any] = {
        "measured": f"mean endpoint error inside the head, px; {alignment['split']}, {alignment['draws']} draws",
        **{key: row["error"] for key, row in alignment["suites"].items()},
    }
    card.write_text(replace(record, figures=figures).to_json(), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
