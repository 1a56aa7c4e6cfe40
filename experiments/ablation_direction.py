"""Both directions against forward only, reverse only and a single step: what does each buy?

    OMP_NUM_THREADS=1 python experiments/ablation_direction.py PAIRS.csv -o RUNS

-- results, written by the command --
Budget: 3200 pairs seen in each run, 400 steps of 8; 3.9 min a run (threads: 1).

                  rigid, px  paper, px
before alignment       7.83       3.78
baseline               6.35       3.74
baseline, seed 1       6.47       3.60
forward                7.01       4.11
reverse                7.18       4.29
one step, affine       7.78       3.79
one step, 1/16         7.74       3.80
one step, 1/4          6.25       3.56

Mean endpoint error inside the head on the val pairs, mean over tasks, one draw each of the suites rigid (8
degrees, 8 px) and paper. The baseline moves both images in four steps; forward moves the moving image only,
reverse the fixed one only; the single steps move both.
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
        Variant("forward", ("model.alignment.direction=forward",)),
        Variant("reverse", ("model.alignment.direction=reverse",)),
        Variant("one step, affine", ('model.alignment.steps=["affine"]',)),
        Variant("one step, 1/16", ('model.alignment.steps=["1/16"]',)),
        Variant("one step, 1/4", ('model.alignment.steps=["1/4"]',)),
    ),
    measure=endpoint_errors,
    columns=(RIGID, PAPER),
    notes=f"{ERRORS}. The baseline moves both images in four steps; forward moves the moving image only, "
    "reverse the fixed one only; the single steps move both.",
)

if __name__ == "__main__":
    main(ABLATION)
