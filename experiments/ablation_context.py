"""What do cross-attention between the images and a memory from step to step give?

    OMP_NUM_THREADS=1 python experiments/ablation_context.py PAIRS.csv -o RUNS

-- results, written by the command --
-- end of results --
"""

from __future__ import annotations

from pathlib import Path

from ablations import ALIGNMENT, BASELINE, ERRORS, PAPER, RIGID, SECOND_SEED, Ablation, Variant, endpoint_errors, main

CROSS, CARRY = "model.representation.cross_blocks=2", "model.alignment.carry=true"

ABLATION = Ablation(
    file=Path(__file__),
    base=ALIGNMENT,
    variants=(
        BASELINE,
        SECOND_SEED,
        Variant("two cross blocks", (CROSS,)),
        Variant("steps carry", (CARRY,)),
        Variant("both", (CROSS, CARRY)),
        Variant("both, seed 1", (CROSS, CARRY, "training.seed=1")),
    ),
    measure=endpoint_errors,
    columns=(RIGID, PAPER),
    notes=f"{ERRORS}. In the baseline the tokens of each image know of the other through the injected MFRH alone, and "
    "a local step sees the descriptors as the steps before it have placed them, nothing else. Cross blocks: the tokens "
    "of each image attend to those of the other. Carry: each local step sees the field so far and the features of the "
    "local step before it.",
)

if __name__ == "__main__":
    main(ABLATION)
