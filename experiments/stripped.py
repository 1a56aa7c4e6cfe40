"""How much does alignment lean on the rim of the head, and on what is faint?

    python experiments/stripped.py PAIRS.csv [--weights default] [--draws 1] [--limit N]

No training: the val pairs, misaligned by fields with fixed seeds, are aligned as they are; with the rim of the head
gone, so many pixels of it, in one image or both, as where the brain was extracted; and without what is faint in the
moving image, so much of its range: the halo of a SPECT, the soft tissue of a CT. What goes is taken from the pair as it
was before it was misaligned.
Writes ``results/stripped.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (dfb5c1f3eb50), 60 val pairs, draws: 1.

                      paper CT  paper PET  paper SPECT  rigid CT  rigid PET  rigid SPECT
before alignment          3.84       3.80         3.72      7.28       8.63         7.58
as they are               2.06       2.02         2.64      1.23       0.68         1.91
MRI without 4 px          2.09       2.06         2.67      1.27       0.76         2.01
MRI without 8 px          2.12       2.11         2.76      1.33       0.84         2.12
MRI without 16 px         2.47       2.41         2.98      1.78       1.33         2.94
moving without 16 px      2.85       2.21         2.90      2.55       0.98         2.32
both without 16 px        2.38       2.26         2.88      1.84       1.32         2.78
moving above 0.1          2.05       2.25         2.78      1.22       1.12         2.02
moving above 0.2          2.06       2.29         3.23      1.20       1.31         2.68
moving above 0.3          2.10       2.33         3.21      1.29       1.38         2.93

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
