"""What do the steps, the colours, a look at the mirror images and a second pass give, with the same weights?

    python experiments/inference.py PAIRS.csv [--weights default] [--draws 1] [--limit N]

No training: the val pairs, misaligned by fields with fixed seeds, are aligned by the first steps alone, by all of them
(``fuse --mirrored never``), by all of them without the colours of the moving image, by all of them for the images and
their mirror images, where the network expects an error above some threshold (what ``fuse`` does, by ``look_again`` of
``models/alignment.py``) or for all pairs (``fuse --mirrored always``), and once more after both images were brought to
the middle by the first pass; that second pass is taken whole, or half of it.
Writes ``results/inference.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (dfb5c1f3eb50), 60 val pairs, draws: 1.

                    paper CT  paper PET  paper SPECT  rigid CT  rigid PET  rigid SPECT  large CT  large PET  large SPECT
before alignment        3.84       3.80         3.72      7.28       8.63         7.58     21.37      24.58        22.10
to affine               3.20       3.17         3.56      1.62       1.47         2.39      4.05       4.65         4.68
to 1/16                 2.29       2.31         2.78      1.23       0.75         2.06      2.94       3.41         3.74
to 1/8                  2.16       2.08         2.68      1.26       0.70         1.92      2.59       2.91         3.58
all steps               2.04       2.02         2.66      1.23       0.68         1.91      2.40       2.81         3.55
all steps, in grey      2.04       2.21         3.05      1.23       0.70         2.42      2.40       3.10         4.28
mirrored above 2        1.96       1.97         2.60      1.23       0.68         1.90      2.32       2.69         3.38
mirrored above 2.5      2.01       1.99         2.61      1.23       0.68         1.91      2.32       2.69         3.38
mirrored above 3        2.06       2.02         2.64      1.23       0.68         1.91      2.34       2.69         3.38
mirrored above 3.5      2.04       2.02         2.63      1.23       0.68         1.91      2.39       2.75         3.43
mirrored                1.96       1.97         2.60      1.13       0.59         1.84      2.32       2.69         3.38
and a second pass       2.15       2.10         2.90      1.38       0.87         2.16      2.43       2.81         3.74
and half of it          2.09       2.04         2.75      1.27       0.72         1.98      2.40       2.77         3.59

Mean endpoint error inside the head, pixels, against the known fields. A second pass is composed with the
first on both sides of the middle. Mirrored above: where that many pixels are expected, averaged over the
middle grid.
-- end of results --
"""

from __future__ import annotations

from dataclasses import replace
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
    "on both sides of the middle. Mirrored above: where that many pixels are expected, averaged over the middle grid."
)


def from_middle(alignment: Alignment, shape: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The two fields out of the middle, on the images' own grid."""
    last = alignment.steps[-1]
    return tuple(  # type: ignore[return-value]
        resize_field(field, shape=grid)[..., : shape[0], : shape[1]] for field in (last.field_fixed, last.field_moving)
    )


def ways(network: BSAFusion, fixed: Tensor, moving: Tensor) -> dict[str, Tensor]:
    """The displacement ``1 2 H W`` of every way to align a pair ``1 C H W``."""
    shape, cfg = (fixed.shape[-2], fixed.shape[-1]), network.cfg
    first = network.match(fixed, moving, mirrored="never").alignment
    grid = (first.displacement.shape[-2], first.displacement.shape[-1])

    def cut(field: Tensor) -> Tensor:
        return field[..., : shape[0], : shape[1]]

    found = {}
    for count, step in enumerate(first.steps[:-1], start=1):
        found[f"to {step.name}"] = cut(between_images(first.steps[:count], grid)[0].displacement)
    found[ALL_STEPS] = cut(first.displacement)
    found[IN_GREY] = cut(network.match(fixed, moving[:, :1], mirrored="never").alignment.displacement)
    for above in (2.0, 2.5, 3.0, 3.5):
        network.cfg = replace(cfg, alignment=replace(cfg.alignment, look_again=above))
        found[f"mirrored above {above:g}"] = cut(network.match(fixed, moving).alignment.displacement)
    network.cfg = cfg
    found["mirrored"] = cut(network.match(fixed, moving, mirrored="always").alignment.displacement)
    to_fixed, to_moving = from_middle(first, shape, grid)
    middle = (warp(fixed, to_fixed), warp(moving, to_moving, padding="zeros"))
    again = network.match(*middle, mirrored="never").alignment
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
