"""A sheet to look at: fixed, moving, aligned, fused, and the maximum of fixed and truth, a row a pair.

    python benchmarks/sheet.py PAIRS.csv -o SHEET.png [--split val] [--weights default] [--each 4]

The moving images are deformed by the recipe of the paper with fixed seeds. Per task: pairs evenly spaced in the split,
and the one whose fused image has the lowest Q_S against the truth. The sheet shows the images of the pairs: it is as
confidential as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.image import TASKS
from bsafusion.io import write_image
from bsafusion.metrics import qs
from bsafusion.pipeline import Model, load_model
from bsafusion.plain_fusion import FUSIONS

Array = NDArray[np.float32]


def row(model: Model, data: PairSet, index: int) -> tuple[float, Array]:
    """Q_S against the truth, and the five pictures side by side, ``H 5W``."""
    batch = validation_batch(data, [index], MISALIGNMENTS["paper"], draw=0, device=torch.device("cpu"))
    out = model.network.predict(batch.fixed, batch.moving)
    fixed, moving, truth, aligned, fused = (
        t[0, 0].numpy() for t in (batch.fixed, batch.moving, batch.truth, out.aligned, out.fused)
    )
    value = qs(255 * fixed, 255 * truth, np.round(255 * fused))
    return value, np.concatenate([fixed, moving, aligned, fused, FUSIONS["maximum"](fixed, truth)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--each", type=int, default=4, help="pairs a task, the worst among them")
    args = parser.parse_args()
    model = load_model(args.weights)
    data = PairSet(read_pairs(args.pairs, split=args.split))
    lines = []
    for task in TASKS:
        indices = data.indices(task)
        if not indices:
            continue
        rows = {index: row(model, data, index) for index in indices}
        worst = min(rows, key=lambda index: rows[index][0])
        others = [i for i in indices if i != worst]
        chosen = [others[k * len(others) // max(args.each - 1, 1)] for k in range(args.each - 1)] + [worst]
        for index in chosen:
            print(f"{task} {data.pairs[index].id}: Q_S {rows[index][0]:.3f}{' (worst)' if index == worst else ''}")
            lines.append(rows[index][1])
    write_image(args.out, np.concatenate(lines)[None], value_range=(0, 1))


if __name__ == "__main__":
    main()
