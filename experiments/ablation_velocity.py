"""Steps as velocity fields that are integrated, or as displacements: does it matter where composed steps do not fold?

    OMP_NUM_THREADS=1 python experiments/ablation_velocity.py PAIRS.csv -o RUNS

-- results, written by the command --
Budget: 3200 pairs seen in each run, 400 steps of 8; 2.6 min a run (threads: 1).

                              rigid, px  paper, px
before alignment                   7.83       3.78
baseline                           6.56       3.69
baseline, seed 1                   6.22       3.60
velocity fields, 5 squarings       6.26       3.63
velocity fields, seed 1            6.37       3.65

Mean endpoint error inside the head on the val pairs, mean over tasks, one draw each of the suites rigid (8
degrees, 8 px) and paper. The baseline composes each step as a displacement; with velocity fields each local
step is integrated by scaling and squaring first.
-- end of results --
"""

from __future__ import annotations

from pathlib import Path

from ablations import ALIGNMENT, BASELINE, ERRORS, PAPER, RIGID, SECOND_SEED, Ablation, Variant, endpoint_errors, main

ABLATION = Ablation(
    file=Path(__file__),
    base=ALIGNMENT,
    variants=(
        BASELINE,
        SECOND_SEED,
        Variant("velocity fields, 5 squarings", ("model.alignment.squarings=5",)),
        Variant("velocity fields, seed 1", ("model.alignment.squarings=5", "training.seed=1")),
    ),
    measure=endpoint_errors,
    columns=(RIGID, PAPER),
    notes=f"{ERRORS}. The baseline composes each step as a displacement; with velocity fields each local "
    "step is integrated by scaling and squaring first.",
)

if __name__ == "__main__":
    main(ABLATION)
