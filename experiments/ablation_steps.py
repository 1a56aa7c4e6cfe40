"""How many steps: endpoint error and inference time for K = 1 to 5?

    OMP_NUM_THREADS=1 python experiments/ablation_steps.py PAIRS.csv -o RUNS

-- results, written by the command --
Budget: 3200 pairs seen in each run, 400 steps of 8; 4.0 min a run (threads: 1).

                  rigid, px  paper, px  seconds a pair
before alignment       7.83       3.78
K = 1, to affine       7.78       3.79           0.073
K = 2, to 1/16         7.71       3.77           0.081
K = 3, to 1/8          7.74       3.83           0.085
K = 4, to 1/4          6.35       3.74           0.108
K = 5, to 1/2          6.15       3.73           0.155
baseline, seed 1       6.47       3.60           0.104

Mean endpoint error inside the head on the val pairs, mean over tasks, one draw each of the suites rigid (8
degrees, 8 px) and paper. Seconds: median of seven whole predictions (alignment and fusion) of a 256x256 pair
on one CPU thread, the variants one after another. The baseline is K = 4.
-- end of results --
"""

from __future__ import annotations

import json
from pathlib import Path

from ablations import ALIGNMENT, ERRORS, PAPER, RIGID, SECOND_SEED, Ablation, Column, Variant, endpoint_errors, main

STEPS = ("affine", "1/16", "1/8", "1/4", "1/2")

ABLATION = Ablation(
    file=Path(__file__),
    base=ALIGNMENT,
    variants=(
        *(
            Variant(f"K = {count}, to {STEPS[count - 1]}", (f"model.alignment.steps={json.dumps(STEPS[:count])}",))
            for count in range(1, 1 + len(STEPS))
        ),
        SECOND_SEED,
    ),
    measure=endpoint_errors,
    columns=(RIGID, PAPER, Column("seconds", "seconds a pair", 3)),
    notes=f"{ERRORS}. Seconds: median of seven whole predictions (alignment and fusion) of a 256x256 pair "
    "on one CPU thread, the variants one after another. The baseline is K = 4.",
    timed=True,
)

if __name__ == "__main__":
    main(ABLATION)
