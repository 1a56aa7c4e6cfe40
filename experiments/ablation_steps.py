"""How many steps: endpoint error and inference time for K = 1 to 5?

    OMP_NUM_THREADS=1 python experiments/ablation_steps.py PAIRS.csv -o RUNS

-- results, written by the command --
Not yet run.
-- end of results --
"""

from __future__ import annotations

import json
from pathlib import Path

from ablations import ALIGNMENT, PAPER, RIGID, SECOND_SEED, Ablation, Column, Variant, endpoint_errors, main

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
    notes="Mean endpoint error inside the head on the val pairs, mean over tasks, one draw each of the suites rigid "
    "(8 degrees, 8 px) and paper. Seconds: median of seven whole predictions (alignment and fusion) of a 256x256 pair "
    "on one CPU thread, the variants one after another. The baseline is K = 4.",
    timed=True,
)

if __name__ == "__main__":
    main(ABLATION)
