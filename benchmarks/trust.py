"""How often a result is called ``suspect``, on pairs that belong together and on pairs that do not.

    python benchmarks/trust.py PAIRS.csv [--split val] [--weights default]

``paper``, ``rigid`` and ``large``: the split's pairs, deformed; the share of results called suspect, among all and
among those off by more than 5 px. ``unrelated``: the MRI of one patient with the moving image of another; ``noise``: an
MRI with uniform noise. Fixed seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.metrics import endpoint_error, summarise
from bsafusion.pipeline import Model, load_model, measure_evidence
from bsafusion.report import verdict

CPU = torch.device("cpu")


def is_suspect(model: Model, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[bool, torch.Tensor]:
    out = model.network.predict(fixed, moving)
    evidence = measure_evidence(out, fixed[0, 0].numpy())
    status, _ = verdict(evidence, max(fixed.shape[-2:]))
    return status == "suspect", out.alignment.displacement[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--unrelated", type=int, default=40)
    args = parser.parse_args()
    model = load_model(args.weights)
    data = PairSet(read_pairs(args.pairs, split=args.split))
    for suite, misalignment in MISALIGNMENTS.items():
        flags, off = [], []
        for index in range(len(data)):
            batch = validation_batch(data, [index], misalignment, draw=1, device=CPU)
            flag, field = is_suspect(model, batch.fixed, batch.moving)
            error = endpoint_error(batch.known[0].numpy(), field.numpy())
            flags.append(flag)
            off.append(summarise(error, batch.mask[0, 0].numpy() > 0).mean > 5)
        wrong = [flag for flag, is_off in zip(flags, off, strict=True) if is_off]
        caught = f"{sum(wrong)} of {len(wrong)} off by more than 5 px" if wrong else "none is off by more than 5 px"
        print(f"{suite:10} n={len(flags)}  suspect {np.mean(flags):.0%}  ({caught})", flush=True)
    random = np.random.default_rng(0)
    flags = []
    for _ in range(args.unrelated):
        one = int(random.integers(len(data)))
        others = [i for i, p in enumerate(data.pairs) if p.case != data.pairs[one].case]
        other = int(random.choice(others))
        fixed, moving = data.fixed[one : one + 1].float() / 255, data.moving[other : other + 1].float() / 255
        flags.append(is_suspect(model, fixed, moving)[0])
    print(f"{'unrelated':10} n={len(flags)}  suspect {np.mean(flags):.0%}", flush=True)
    noise = torch.rand(8, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    flags = [is_suspect(model, data.fixed[i : i + 1].float() / 255, noise[i : i + 1])[0] for i in range(len(noise))]
    print(f"{'noise':10} n={len(flags)}  suspect {np.mean(flags):.0%}")


if __name__ == "__main__":
    main()
