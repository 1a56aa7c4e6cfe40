"""Luminance alone, or the colours too: what do the chroma channels of PET and SPECT tell alignment?

    OMP_NUM_THREADS=1 python experiments/ablation_colour.py PAIRS.csv -o RUNS

-- results, written by the command --
Not yet run.
-- end of results --
"""

from __future__ import annotations

from pathlib import Path

from ablations import ALIGNMENT, BASELINE, ERRORS, SECOND_SEED, Ablation, Column, Variant, endpoint_errors, main

COLOUR = "model.encoder.colour=true"

ABLATION = Ablation(
    file=Path(__file__),
    base=ALIGNMENT,
    variants=(
        BASELINE,
        SECOND_SEED,
        Variant("colours", (COLOUR,)),
        Variant("colours, seed 1", (COLOUR, "training.seed=1")),
    ),
    measure=endpoint_errors,
    columns=tuple(
        Column(f"{suite}/{task}-mri", f"{suite} {task.upper()}")
        for suite in ("rigid", "paper")
        for task in ("ct", "pet", "spect")
    ),
    notes=f"{ERRORS.replace(', mean over tasks', '')}. CT is grey: what it gains is chance. A layer of "
    "another shape draws other initial weights from the same seed.",
)

if __name__ == "__main__":
    main(ABLATION)
