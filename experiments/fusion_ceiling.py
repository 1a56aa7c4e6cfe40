"""How much better could the fused image be: the network's, and the same changed on each pair until the loss is low?

    python experiments/fusion_ceiling.py PAIRS.csv [--weights default] [--limit 4]

No training: ``val`` pairs as the atlas has them, spread over each task, are fused as given. Then every pixel of the
fused image is moved down the gradient of the loss that fusion was trained with (its weights in run 43 of
``shipped_weights``), and of the same with three times the weight on structure: what a network could gain at best, near
the image that this one gives. A pixel that is black in both images stays black.
Writes ``results/fusion_ceiling.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (dfb5c1f3eb50), 12 val pairs.

                             Q_AB/F  Q_CV  Q_SSIM   VIFF  VIF_sum    Q_S
CT network                    0.636   525   1.482  0.503    0.711  0.852
CT and on                     0.665   430   1.483  0.505    0.726  0.852
CT and on, 3 x structure      0.632   452   1.505  0.506    0.668  0.852
PET network                   0.782    56   1.402  0.633    0.853  0.929
PET and on                    0.815    49   1.400  0.635    0.852  0.927
PET and on, 3 x structure     0.791    49   1.412  0.625    0.846  0.928
SPECT network                 0.730    71   1.505  0.678    0.792  0.911
SPECT and on                  0.762    40   1.498  0.718    0.770  0.908
SPECT and on, 3 x structure   0.738    44   1.526  0.664    0.734  0.914

Means over pairs, 8-bit luminance, against both images as they are. 'And on': the network's fused image after
120 steps of its pixels down the loss.
-- end of results --
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import untrained
from ablations import Column, Figures, table, write_results
from torch import Tensor

from bsafusion.benchmark import spaced
from bsafusion.datasets import PairSet, read_pairs
from bsafusion.image import TASKS
from bsafusion.losses import LossWeights, total_loss
from bsafusion.metrics import fusion_metrics
from bsafusion.models.bsafusion import BSAFusion
from bsafusion.pipeline import load_model
from bsafusion.training import Objective, TrainingCfg

COLUMNS = (
    Column("qabf", "Q_AB/F", 3),
    Column("qcv", "Q_CV", 0),
    Column("qssim", "Q_SSIM", 3),
    Column("viff", "VIFF", 3),
    Column("vif_sum", "VIF_sum", 3),
    Column("qs", "Q_S", 3),
)
TRAINED = LossWeights(
    structure=7, intensity=1.5, edge=5.3, highlight=24, information=2.6, fidelity=1.4, visibility=1.2, salience=1
)
"""What run 43 asked for, the last that trained fusion."""
NETWORK = "network"
WAYS = {"and on": TRAINED, "and on, 3 x structure": replace(TRAINED, structure=3 * TRAINED.structure)}
STEPS, RATE = 120, 0.004  # of Adam, in units of the range
NOTES = (
    "Means over pairs, 8-bit luminance, against both images as they are. 'And on': the network's fused image after "
    f"{STEPS} steps of its pixels down the loss."
)


def improved(fused: Tensor, fixed: Tensor, moving: Tensor, objective: Objective) -> Tensor:
    """``fused`` after the steps, ``1 1 H W`` in [0, 1]."""
    highest = (fixed + moving).clamp(max=1)
    pixels = fused.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for _ in range(STEPS):
        shown = torch.minimum(pixels.clamp(min=0), highest)
        optimizer.zero_grad()
        loss = total_loss(objective.fusion_terms(shown, fixed, moving), objective.cfg.weights)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return torch.minimum(pixels.detach().clamp(min=0), highest)


def score(fused: Tensor, fixed: Tensor, moving: Tensor) -> dict[str, float]:
    """The measures of :data:`COLUMNS`."""
    a, b, f = (255 * image[0, 0].numpy().astype(np.float64) for image in (fixed, moving, fused))
    return fusion_metrics(a, b, np.round(f), [column.key for column in COLUMNS])


def measure(network: BSAFusion, data: PairSet, limit: int) -> tuple[dict[str, Figures], int]:
    """``task way -> measures``, means over at most ``limit`` pairs a task, and the number of pairs in all."""
    objectives = {
        name: Objective(network, TrainingCfg(parts="fusion", weights=weights)) for name, weights in WAYS.items()
    }
    rows: dict[str, Figures] = {}
    counted = 0
    for task in TASKS:
        chosen = spaced(data.indices(task), limit)
        found: dict[str, list[dict[str, float]]] = {}
        for index in chosen:
            pictures = data.pictures([index])[:2]
            with torch.inference_mode():
                fused = network.predict(*pictures, aligned_already=True).fused
            pair = (pictures[0][:, :1], pictures[1][:, :1])
            images = {NETWORK: fused}
            images |= {name: improved(fused, *pair, objective) for name, objective in objectives.items()}
            for name, image in images.items():
                found.setdefault(f"{task.removesuffix('-mri').upper()} {name}", []).append(score(image, *pair))
        for name, scores in found.items():
            rows[name] = {key: statistics.fmean(s[key] for s in scores) for key in scores[0]}
            print(name, *(f"{key} {value:.4g}" for key, value in rows[name].items()), flush=True)
        counted += len(chosen)
    return rows, counted


def run(file: Path, pairs: Path, weights: str, limit: int) -> None:
    """Measure, then write the results beside ``file`` and into its docstring."""
    model = load_model(weights)
    rows, counted = measure(model.network.eval(), PairSet(read_pairs(pairs, split="val")), limit)
    told = [f"{name} {figures['qabf']:.3f} / {figures['qssim']:.3f}" for name, figures in rows.items()]
    results = {
        "budget": f"no training; weights {model.record.name} ({model.record.sha256[:12]}), {counted} val pairs",
        "summary": "Q_AB/F / Q_SSIM: " + "; ".join(told),
        "table": table(COLUMNS, rows),
        "figures": rows,
    }
    write_results(file, results, NOTES)


def main() -> None:
    parser = untrained.options(__doc__)
    parser.add_argument("--limit", type=int, default=4, help="at most so many pairs a task; %(default)s")
    given = parser.parse_args()
    run(Path(__file__), given.pairs, given.weights, given.limit)


if __name__ == "__main__":
    main()
