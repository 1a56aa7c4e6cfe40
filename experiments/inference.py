"""What do the steps, the colours, a look at the mirror images and a second pass give, with the same weights?

    python experiments/inference.py PAIRS.csv [--weights default] [--draws 1] [--limit N]

No training: the val pairs, misaligned by fields with fixed seeds, are aligned by the first steps alone, by all of them
(what ``fuse`` does), by all of them without the colours of the moving image, by all of them for the images and for
their mirror images (``fuse --mirrored``), and once more after both images were brought to the middle by the first pass;
that second pass is taken whole, or half of it.
Writes ``results/inference.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (9d82c61557b1), 60 val pairs, draws: 1.

                    paper CT  paper PET  paper SPECT  rigid CT  rigid PET  rigid SPECT  large CT  large PET  large SPECT
before alignment        3.84       3.80         3.72      7.28       8.63         7.58     21.37      24.58        22.10
to affine               3.22       3.18         3.50      1.53       1.37         2.45      4.09       4.55         4.77
to 1/16                 2.31       2.34         2.85      1.21       0.73         2.10      2.97       3.35         3.87
to 1/8                  2.17       2.12         2.77      1.22       0.72         1.94      2.62       2.89         3.66
all steps               2.06       2.06         2.76      1.20       0.70         1.93      2.42       2.79         3.63
all steps, in grey      2.06       2.22         3.03      1.20       0.70         2.41      2.42       3.04         4.29
and mirrored            1.99       2.02         2.69      1.14       0.63         1.84      2.34       2.70         3.50
and a second pass       2.17       2.14         2.95      1.35       0.85         2.13      2.46       2.78         3.76
and half of it          2.11       2.08         2.83      1.25       0.74         1.98      2.43       2.75         3.65

Mean endpoint error inside the head, pixels, against the known fields. A second pass is composed with the
first on both sides of the middle.
-- end of results --
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import untrained
from ablations import Column
from torch import Tensor

from bsafusion.datasets import MISALIGNMENTS, Batch
from bsafusion.deformation import compose, invert, resize_field, warp
from bsafusion.image import TASKS
from bsafusion.models.alignment import Alignment, between_images
from bsafusion.models.bsafusion import BSAFusion

COLUMNS = tuple(
    Column(f"{suite}/{task}", f"{suite} {task.removesuffix('-mri').upper()}")
    for suite in MISALIGNMENTS
    for task in TASKS
)
ALL_STEPS, IN_GREY = "all steps", "all steps, in grey"
NOTES = (
    "Mean endpoint error inside the head, pixels, against the known fields. A second pass is composed with the first "
    "on both sides of the middle."
)


def from_middle(alignment: Alignment, shape: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The two fields out of the middle, on the images' own grid."""
    last = alignment.steps[-1]
    return tuple(  # type: ignore[return-value]
        resize_field(field, shape=grid)[..., : shape[0], : shape[1]] for field in (last.field_fixed, last.field_moving)
    )


def ways(network: BSAFusion, fixed: Tensor, moving: Tensor) -> dict[str, Tensor]:
    """The displacement ``1 2 H W`` of every way to align a pair ``1 C H W``."""
    shape = (fixed.shape[-2], fixed.shape[-1])
    first = network.match(fixed, moving).alignment
    grid = (first.displacement.shape[-2], first.displacement.shape[-1])

    def cut(field: Tensor) -> Tensor:
        return field[..., : shape[0], : shape[1]]

    found = {}
    for count, step in enumerate(first.steps[:-1], start=1):
        found[f"to {step.name}"] = cut(between_images(first.steps[:count], grid)[0].displacement)
    found[ALL_STEPS] = cut(first.displacement)
    found[IN_GREY] = cut(network.match(fixed, moving[:, :1]).alignment.displacement)
    found["and mirrored"] = cut(network.match(fixed, moving, mirrored=True).alignment.displacement)
    to_fixed, to_moving = from_middle(first, shape, grid)
    again = network.match(warp(fixed, to_fixed), warp(moving, to_moving, padding="zeros")).alignment
    more_fixed, more_moving = from_middle(again, shape, grid)
    for name, share in (("and a second pass", 1.0), ("and half of it", 0.5)):
        middle_fixed = compose(to_fixed, share * more_fixed)
        found[name] = compose(compose(to_moving, share * more_moving), invert(middle_fixed))
    return found


def run(file: Path, pairs: Path, weights: str, draws: int, limit: int | None) -> None:
    """Measure, then write the results beside ``file`` and into its docstring."""

    def of_batch(network: BSAFusion, b: Batch) -> dict[str, Tensor]:
        return ways(network, b.fixed, b.moving)

    untrained.run(file, pairs, weights, draws, limit, ways=of_batch, columns=COLUMNS, notes=NOTES)


if __name__ == "__main__":
    untrained.command(__doc__, partial(run, Path(__file__)))
