"""Put measured figures into README.md, the pages of docs and onto the weights' card, from what the benchmarks wrote.

    python benchmarks/alignment.py PAIRS.csv --samples -o benchmarks/results/alignment.json
    python benchmarks/speed.py -o benchmarks/results/speed.json
    python benchmarks/fusion.py PAIRS.csv -o benchmarks/results/fusion.json
    bsafusion evaluate PAIRS.csv -o OUT --weights default --weights paper-preset=... --python elastix=... --python ants=...
    bsafusion evaluate PAIRS.csv -o TRAIN --split train --limit 20 --suites paper --methods bsafusion --fusions maximum
    bsafusion evaluate PAIRS.csv -o CASES --split-by case ...   # in full in docs/evaluation.md
    python scripts/write_figures.py

The ``summary.csv`` of the evaluations are kept in ``benchmarks/results``: OUT's as ``evaluation.csv``, TRAIN's as
``evaluation_train.csv``, CASES' as ``evaluation_cases.csv``. ``experiments/stripped.py`` keeps its own.
``docs/trust.md`` and ``docs/refinement.md`` are written by ``benchmarks/trust.py`` and ``benchmarks/refine.py``.
"""

from __future__ import annotations

import csv
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from bsafusion.io import write_between
from bsafusion.weights import FOLDER, WeightsRecord

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = ROOT / "experiments" / "results"
END = "<!-- /figures -->"  # after each "<!-- figures:NAME -->"
TASKS = ("ct-mri", "pet-mri", "spect-mri")
SUITES = {
    "paper": "the paper's recipe",
    "rigid": "±8°, ±8 px",
    "large": "±20°, 0.9 to 1.1, ±24 px, elastic 4 px",
    "self": "an MRI against itself, the paper's recipe",
}


def suites_table(found: dict[str, Any]) -> str:
    lines = [
        "| misalignment | CT-MRI | PET-MRI | SPECT-MRI | consistency | folds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for suite, words in SUITES.items():
        rows = [found["suites"][f"{suite}/{task}"] for task in TASKS]
        cells = [f"{row['before']:.2f} → **{row['error']:.2f}** ({row['seen']:.2f})" for row in rows]
        consistency = sum(row["consistency"] for row in rows) / len(rows)
        folded = max(row["folds"] for row in rows)
        lines.append(f"| `{suite}`: {words} | {' | '.join(cells)} | {consistency:.2f} | {folded:.2%} |")
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
    """Error of the fields by suite and method, a column a task, with CPU seconds."""
    lines = [
        "| misalignment | method | CT-MRI | PET-MRI | SPECT-MRI | folds | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    pairs = dict.fromkeys((key[2], key[0]) for key in rows if key[4] == "error")
    for suite, method in sorted(pairs, key=lambda pair: ["paper", "rigid", "large", "corrupted"].index(pair[0])):
        cells = []
        for task in TASKS:
            row = rows[method, "", suite, task, "error"]
            cells.append(f"**{float(row['mean']):.2f}**{_interval(row)}")
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
--python ants=...` on the Harvard Whole Brain Atlas pairs, split `val` ({count} pairs a task; 3 draws of each for the
networks and identity, 1 for the slower methods), 256x256, fixed seeds. Mean endpoint error inside the head in pixels with
its 95 % bootstrap interval over pairs; seconds of one CPU thread.

{errors_table(rows)}

Fusion in the same run, after the `paper` misalignment, against the truth (the moving image before it was deformed).
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
Measured on the atlas (`val`, {rows[NEW, "", "paper", "ct-mri", "error"]["n"]} pairs a task, 3 draws, two folds of the 24 patients), mean error in pixels:

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
    return "\n".join([*lines, "", textwrap.fill(told, 120, break_long_words=False, break_on_hyphens=False)])


def write_train_gap(train: Path, val: Path) -> None:
    """The end of docs/training.md."""
    rows, of_val = _read_rows(train), _read_rows(val)
    counts = " and ".join(
        f"{found['bsafusion', '', 'paper', 'ct-mri', 'error']['n']} of `{split}`"
        for split, found in (("train", rows), ("val", of_val))
    )
    text = f"""\
Mean endpoint error of the shipped weights in pixels, with its 95 % interval, on {counts} a task:

{train_gap(rows, of_val)}

`bsafusion evaluate pairs.csv -o OUT --split train --limit 20 --suites paper --methods bsafusion --fusions maximum`; its
`summary.csv` is kept as `benchmarks/results/evaluation_train.csv`, `val` is [that of all methods](evaluation.md#measured).
"""
    write_between(ROOT / "docs" / "training.md", "<!-- figures:train -->", END, text)


def write_stripped(before: Path, now: Path) -> None:
    """The table of heads without their rim in docs/training.md."""
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
    write_between(ROOT / "docs" / "training.md", "<!-- figures:stripped -->", END, text)


def write_fusion(results: Path) -> None:
    """The table of docs/fusion.md."""
    found = json.loads(results.read_text(encoding="utf-8"))
    lines = ["| task | fused by | " + " | ".join(METRICS.values()) + " |", "| --- " * (2 + len(METRICS)) + "|"]
    for task, means in found["means"].items():
        for name, values in means.items():
            cells = " | ".join(f"{values[metric]:.{0 if metric == 'qcv' else 3}f}" for metric in METRICS)
            lines.append(f"| {task.upper()} | {name} | {cells} |")
    wins = ", ".join(f"{task.upper()} {won['maximum, average, laplacian']}" for task, won in found["wins"].items())
    text = f"""\
`python benchmarks/fusion.py PAIRS.csv -o benchmarks/results/fusion.json`: the pairs of the Harvard Whole Brain Atlas as they
are (split `{found["split"]}`, 20 a task), without deformation and with no alignment (`--aligned`); means, 8-bit luminance.

{chr(10).join(lines)}

Of the six metrics the network is better than maximum, average and Laplacian pyramid in: {wins}. What deformation and
alignment make of it is in [Comparing methods](evaluation.md).
"""
    write_between(ROOT / "docs" / "fusion.md", "<!-- figures:fusion -->", END, text)


def main() -> None:
    write_evaluation(RESULTS / "evaluation.csv")
    write_cases(RESULTS / "evaluation_cases.csv")
    write_train_gap(RESULTS / "evaluation_train.csv", RESULTS / "evaluation.csv")
    write_stripped(EXPERIMENTS / "stripped_run32.json", EXPERIMENTS / "stripped.json")
    write_fusion(RESULTS / "fusion.json")
    alignment = json.loads((RESULTS / "alignment.json").read_text(encoding="utf-8"))
    speed = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    seconds, peak = speed["seconds"], speed["peak_mb"]
    text = f"""\
Mean endpoint error inside the head in pixels, before → **after** (after, where the moving image shows anything at all: a
PET slice often fills only a part of the head, and nothing can be seen of the rest); {alignment["draws"]} draws of each of the 20 `{alignment["split"]}` pairs
a task, 256x256, fixed seeds, reference: the moving image before it was deformed. The atlas pairs themselves are aligned
to about 1 to 3 px only, which is a floor of this figure; *consistency* is the mean distance of a pair's draws from their
mean, which that misalignment does not enter. Train and `val` are other slices of the same patients, as in the paper;
how those trained on fare stands in [experiments/limits.py](experiments/limits.py).

{suites_table(alignment)}
{no_gain(alignment)}
The shipped pairs against their known transforms (`mr-rigid` is ITK's `R10X13Y17`: 10° and a shift of 13, 16 px; the MR
contrasts were never trained on):

{samples_table(alignment)}

`python benchmarks/alignment.py PAIRS.csv --samples -o benchmarks/results/alignment.json`

One 256x256 pair after loading, as the commands run it, on {speed["threads"]} CPU threads: {seconds["default"]:.3f} s and {peak["default"]:.0f} MB (whole
process); the published network's shape takes {seconds["paper"]:.3f} s and {peak["paper"]:.0f} MB in the same run,
{seconds["paper"] / seconds["default"]:.1f} times as long. The whole `fuse` command, cold: {speed["cold_fuse_seconds"]:.1f} s.

`python benchmarks/speed.py -o benchmarks/results/speed.json`
"""
    write_between(ROOT / "README.md", "<!-- figures:begin -->", "<!-- figures:end -->", text)
    card = FOLDER / "default.json"
    record = WeightsRecord.read(card)
    if record.sha256 != alignment["sha256"]:
        raise SystemExit("benchmarks/results/alignment.json was measured with other weights; run it again")
    figures: dict[str, Any] = {
        "measured": f"mean endpoint error inside the head, px; {alignment['split']}, {alignment['draws']} draws",
        **{key: row["error"] for key, row in alignment["suites"].items()},
    }
    card.write_text(replace(record, figures=figures).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
