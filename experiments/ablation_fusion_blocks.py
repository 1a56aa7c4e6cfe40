"""How many FusionBLKs: what do one to four scales of fused features add to the fused image?

    OMP_NUM_THREADS=1 python experiments/ablation_fusion_blocks.py PAIRS.csv -o RUNS

-- results, written by the command --
Budget: 960 pairs seen in each run, 120 steps of 8; 0.7 min a run (threads: 1).

                      Q_AB/F    Q_CV  Q_SSIM   VIFF
1 FusionBLK            0.642  1568.6   1.400  0.436
2 FusionBLKs           0.612  1497.8   1.386  0.470
3 FusionBLKs           0.583  1555.3   1.381  0.451
4 FusionBLKs           0.590  1558.4   1.381  0.459
4 FusionBLKs, seed 1   0.593  1552.9   1.384  0.454

Reference: truth, the moving image before it was deformed. On the val pairs misaligned as in the paper, one
draw; means over the pairs of a task and over tasks, of Q_CV (lower is better) the medians. Encoder, MDF-FR
and BSFA are those of the shipped weights, fusion is trained from nothing; one block works at 1/16, four reach
1/2.
-- end of results --
"""

from __future__ import annotations

from pathlib import Path

from ablations import Ablation, Column, Variant, fusion_quality, main

ABLATION = Ablation(
    file=Path(__file__),
    base=(
        "training.parts=fusion",
        "training.batch=8",
        "training.crop=96",
        "training.precision=bfloat16",
        "training.lr=1e-3",
        "training.warmup=20",
        "training.log_every=25",
        "training.checkpoint_every=100",
        "training.mix.own_contrast=0",
        'training.mix.misalignments=[["paper",1.0]]',
        # The terms of the paper: by those of the measures, a fusion trained from nothing first shows the MRI alone.
        "training.weights.gradient=8",
        "training.weights.intensity=0.5",
        *(f"training.weights.{name}=0" for name in ("edge", "visibility", "salience", "information", "fidelity")),
    ),
    variants=(
        *(Variant(f"{n} FusionBLK{'s' * (n > 1)}", (f"model.fusion.blocks={n}",)) for n in (1, 2, 3, 4)),
        Variant("4 FusionBLKs, seed 1", ("training.seed=1",)),
    ),
    measure=fusion_quality,
    columns=(
        Column("qabf", "Q_AB/F", 3),
        Column("qcv", "Q_CV", 1),
        Column("qssim", "Q_SSIM", 3),
        Column("viff", "VIFF", 3),
    ),
    notes="Reference: truth, the moving image before it was deformed. On the val pairs misaligned as in the paper, one "
    "draw; means over the pairs of a task and over tasks, of Q_CV (lower is better) the medians. Encoder, MDF-FR and "
    "BSFA are those of the shipped weights, fusion is trained from nothing; one block works at 1/16, four reach 1/2.",
    init="default",
)

if __name__ == "__main__":
    main(ABLATION)
