"""Does injecting the MFRH of each image into the other help alignment, with and without L_ce2?

    OMP_NUM_THREADS=1 python experiments/ablation_injection.py PAIRS.csv -o RUNS

-- results, written by the command --
Budget: 3200 pairs seen in each run, 400 steps of 8; 4.9 min a run (threads: 1).

                        rigid, px  paper, px  read from MFRH  read after transfer
before alignment             7.83       3.78
baseline                     6.35       3.74            0.52                 0.50
baseline, seed 1             6.47       3.60            0.55                 0.50
no L_ce2                     6.44       3.65            0.50                 0.50
no injection                 6.25       3.61            0.50                 0.50
no injection, no L_ce2       6.21       3.68            0.50                 0.50

Mean endpoint error inside the head on the val pairs, mean over tasks, one draw each of the suites rigid (8
degrees, 8 px) and paper; the baseline injects and has L_ce2. Read: the share of the images whose modality the
classifier names, from the MFRH and from the tokens after transfer, where L_ce2 aims at 0.5 within a pair.
-- end of results --
"""

from __future__ import annotations

from pathlib import Path

from ablations import (
    ALIGNMENT,
    BASELINE,
    ERRORS,
    PAPER,
    RIGID,
    SECOND_SEED,
    Ablation,
    Column,
    Variant,
    main,
    modality_read,
)

NO_INJECTION, NO_CE2 = "model.representation.inject=false", "training.weights.ce2=0"

ABLATION = Ablation(
    file=Path(__file__),
    base=ALIGNMENT,
    variants=(
        BASELINE,
        SECOND_SEED,
        Variant("no L_ce2", (NO_CE2,)),
        Variant("no injection", (NO_INJECTION,)),
        Variant("no injection, no L_ce2", (NO_INJECTION, NO_CE2)),
    ),
    measure=modality_read,
    columns=(RIGID, PAPER, Column("classifier", "read from MFRH"), Column("judge", "read after transfer")),
    notes=f"{ERRORS}; the baseline injects and has L_ce2. Read: the share of the images whose modality the "
    "classifier names, from the MFRH and from the tokens after transfer, where L_ce2 aims at 0.5 within a pair.",
)

if __name__ == "__main__":
    main(ABLATION)
