"""How much does alignment lean on the rim of the head, and on what is faint?

    python experiments/stripped.py PAIRS.csv [--weights default] [--draws 1] [--limit N]

No training: the val pairs, misaligned by fields with fixed seeds, are aligned as they are; with the rim of the head
gone, so many pixels of it, in one image or both, as where the brain was extracted; and without what is faint in the
moving image, so much of its range: the halo of a SPECT, the soft tissue of a CT. What goes is taken from the pair as it
was before it was misaligned.
Writes ``results/stripped.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (9d82c61557b1), 60 val pairs, draws: 1.

                      paper CT  paper PET  paper SPECT  rigid CT  rigid PET  rigid SPECT
before alignment          3.84       3.80         3.72      7.28       8.63         7.58
as they are               2.06       2.06         2.76      1.20       0.70         1.93
MRI without 4 px          2.11       2.11         2.77      1.25       0.81         1.97
MRI without 8 px          2.18       2.18         2.86      1.32       0.89         2.07
MRI without 16 px         2.73       2.43         3.21      2.16       1.49         3.12
moving without 16 px      3.26       2.26         3.07      2.86       1.03         2.64
both without 16 px        2.43       2.37         3.00      1.66       1.44         2.92
moving above 0.1          2.05       2.32         2.93      1.18       1.24         2.03
moving above 0.2          2.06       2.37         3.42      1.17       1.43         2.83
moving above 0.3          2.11       2.42         3.52      1.24       1.52         3.11

Mean endpoint error inside the head, pixels, against the known fields, with the head as it was before.
-- end of results --
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import untrained
from ablations import Column
from torch import Tensor

from bsafusion.datasets import Batch, strip_head, without_faint
from bsafusion.deformation import warp
from bsafusion.image import TASKS
from bsafusion.models.bsafusion import BSAFusion

SUITES = ("paper", "rigid")
COLUMNS = tuple(
    Column(f"{suite}/{task}", f"{suite} {task.removesuffix('-mri').upper()}") for suite in SUITES for task in TASKS
)
AS_IT_IS = "as they are"
NOTES = "Mean endpoint error inside the head, pixels, against the known fields, with the head as it was before."


def spoilt(fixed: Tensor, moving: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A pair ``1 C H W`` that is aligned, as it is and in every way in which it is spoilt."""

    def stripped(image: Tensor, depth: float) -> Tensor:
        return strip_head(image, mask, torch.tensor([depth]))

    found = {AS_IT_IS: (fixed, moving)}
    for depth in (4, 8, 16):
        found[f"MRI without {depth} px"] = (stripped(fixed, depth), moving)
    found["moving without 16 px"] = (fixed, stripped(moving, 16))
    found["both without 16 px"] = (stripped(fixed, 16), stripped(moving, 16))
    for level in (0.1, 0.2, 0.3):
        found[f"moving above {level}"] = (fixed, without_faint(moving, torch.tensor([level])))
    return found


def ways(network: BSAFusion, b: Batch) -> dict[str, Tensor]:
    """The displacement ``1 2 H W`` that the network finds for the one pair of a batch, as it is and spoilt."""
    height, width = b.known.shape[-2:]
    return {
        name: network.match(fixed, warp(truth, b.known)).alignment.displacement[..., :height, :width]
        for name, (fixed, truth) in spoilt(b.fixed, b.truth, b.mask).items()
    }


def run(file: Path, pairs: Path, weights: str, draws: int, limit: int | None) -> None:
    """Measure, then write the results beside ``file`` and into its docstring."""
    untrained.run(file, pairs, weights, draws, limit, ways=ways, columns=COLUMNS, notes=NOTES)


if __name__ == "__main__":
    untrained.command(__doc__, partial(run, Path(__file__)))
