"""Fusion alone: the network and the plain fusions on pairs that are aligned as the atlas has them.

    python benchmarks/fusion.py PAIRS.csv [--split val] [--weights default] [-o OUT.json]

No deformation and no alignment (``--aligned`` of ``bsafusion fuse``): mean over the pairs of a task of each fusion
metric of the paper, against both images as they are. ``wins``: in how many of the six the network beats every plain
fusion but the guided filter, and every one. How well alignment and fusion work together is what ``bsafusion evaluate``
measures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from bsafusion.datasets import PairSet, read_pairs
from bsafusion.image import TASKS
from bsafusion.metrics import PAPER_METRICS, fusion_metrics
from bsafusion.pipeline import load_model
from bsafusion.plain_fusion import FUSIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", default="default")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    model = load_model(args.weights)
    data = PairSet(read_pairs(args.pairs, split=args.split))
    found: dict[str, dict[str, dict[str, float]]] = {}
    wins: dict[str, dict[str, int]] = {}
    for task in TASKS:
        if not data.indices(task):
            continue
        rows: dict[str, list[list[float]]] = {}
        for index in data.indices(task):
            pictures = data.pictures([index])[:2]
            out = model.network.predict(*pictures, aligned_already=True)
            fixed, moving = (picture[0, 0].numpy() for picture in pictures)
            fused = {"network": out.fused[0, 0].numpy()}
            fused |= {name: fuse(fixed, moving) for name, fuse in FUSIONS.items()}
            a, b = (255 * image.astype(np.float64) for image in (fixed, moving))
            for name, image in fused.items():
                f = np.round(255 * image.astype(np.float64))
                rows.setdefault(name, []).append(list(fusion_metrics(a, b, f, PAPER_METRICS).values()))
        means = {
            name: dict(zip(PAPER_METRICS, np.mean(values, axis=0).tolist(), strict=True))
            for name, values in rows.items()
        }

        def beaten(metric: str, others: list[str], means: dict[str, dict[str, float]] = means) -> bool:
            sign = -1 if metric == "qcv" else 1
            return all(sign * means["network"][metric] > sign * means[other][metric] for other in others)

        plain = [name for name in FUSIONS if name != "guided"]
        wins[task] = {
            "maximum, average, laplacian": sum(beaten(metric, plain) for metric in PAPER_METRICS),
            "all": sum(beaten(metric, list(FUSIONS)) for metric in PAPER_METRICS),
        }
        found[task] = means
        for name, values in means.items():
            cells = "  ".join(f"{metric} {value:.4g}" for metric, value in values.items())
            print(f"{task:10} n={len(rows[name])} {name:10} {cells}", flush=True)
        print(f"{task:10} the network wins {wins[task]} of {len(PAPER_METRICS)}", flush=True)
    if args.out:
        record = {"pairs": args.pairs.name, "split": args.split, "sha256": model.record.sha256}
        text = json.dumps(record | {"wins": wins, "means": found}, indent=2)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
