"""Put measured figures into README.md and onto the weights' card, from what the benchmarks wrote.

python benchmarks/alignment.py PAIRS.csv --samples -o benchmarks/results/alignment.json
python benchmarks/speed.py -o benchmarks/results/speed.json
python scripts/write_figures.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bsafusion.weights import FOLDER, WeightsRecord

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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


def samples_table(found: dict[str, Any]) -> str:
    lines = ["| shipped pair | before | error | p95 | status |", "| --- | --- | --- | --- | --- |"]
    for name, row in found["samples"].items():
        lines.append(
            f"| `{name}` | {row['before']:.2f} | **{row['error']:.2f}** | {row['p95']:.2f} | {row['status']} |"
        )
    return "\n".join(lines)


def main() -> None:
    alignment = json.loads((RESULTS / "alignment.json").read_text(encoding="utf-8"))
    speed = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    seconds, peak = speed["seconds"], speed["peak_mb"]
    text = f"""\
Mean endpoint error inside the head in pixels, before → **after** (after, where the moving image shows anything at all: a
PET slice often fills only a part of the head, and nothing can be seen of the rest); {alignment["draws"]} draws of each of the 20 `{alignment["split"]}` pairs
a task, 256x256, fixed seeds, reference: the moving image before it was deformed. The atlas pairs themselves are aligned
to about 1 to 3 px only, which is a floor of this figure; *consistency* is the mean distance of a pair's draws from their
mean, which that misalignment does not enter. Train and `val` are other slices of the same patients, as in the paper.

{suites_table(alignment)}

The shipped pairs against their known transforms (`mr-rigid` is ITK's `R10X13Y17`: 10° and a shift of 13, 16 px; the MR
contrasts were never trained on):

{samples_table(alignment)}

`python benchmarks/alignment.py PAIRS.csv --samples -o benchmarks/results/alignment.json`

One 256x256 pair after loading, on {speed["threads"]} CPU threads: {seconds["default"]:.3f} s and {peak["default"]:.0f} MB (whole
process); the published network's shape takes {seconds["paper"]:.3f} s and {peak["paper"]:.0f} MB in the same run,
{seconds["paper"] / seconds["default"]:.1f} times as long. The whole `fuse` command, cold: {speed["cold_fuse_seconds"]:.1f} s.

`python benchmarks/speed.py -o benchmarks/results/speed.json`
"""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    marked = f"<!-- figures:begin -->\n{text}<!-- figures:end -->"
    readme.write_text(
        re.sub(r"<!-- figures:begin -->.*<!-- figures:end -->", lambda _: marked, old, flags=re.S), encoding="utf-8"
    )
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
