"""What do the steps, the colours, a look at the mirror images and a second pass give, with the same weights?

    python experiments/inference.py PAIRS.csv [--weights default] [--draws 1] [--limit N]

No training: the val pairs, misaligned by fields with fixed seeds, are aligned by the first steps alone, by all of them
(``fuse --mirrored never``), by all of them without the colours of the moving image, by all of them for the images and
their mirror images, where the network expects an error above some threshold (what ``fuse`` does, by ``look_again`` of
``models/alignment.py``) or for all pairs (``fuse --mirrored always``), and once more after both images were brought to
the middle by the first pass; that second pass is taken whole, or half of it.
Writes ``results/inference.json`` beside this file.

-- results, written by the command --
Budget: no training; weights default (a32829b47f72), 60 val pairs, draws: 1.

                    paper CT  paper PET  paper SPECT  rigid CT  rigid PET  rigid SPECT  large CT  large PET  large SPECT
before alignment        3.84       3.80         3.72      7.28       8.63         7.58     21.37      24.58        22.10
to affine               3.23       3.18         3.56      1.61       1.37         2.47      4.06       4.51         4.66
to 1/16                 2.30       2.31         2.84      1.24       0.68         2.10      2.93       3.28         3.84
to 1/8                  2.16       2.10         2.76      1.22       0.67         1.96      2.59       2.84         3.66
all steps               2.04       2.04         2.75      1.19       0.65         1.95      2.37       2.75         3.63
all steps, in grey      2.04       2.21         3.04      1.19       0.64         2.35      2.37       3.03         4.26
mirrored above 2        1.96       1.99         2.68      1.19       0.65         1.89      2.30       2.64         3.45
mirrored above 2.5      1.99       2.01         2.69      1.19       0.65         1.91      2.30       2.64         3.45
mirrored above 3        2.05       2.04         2.72      1.19       0.65         1.90      2.31       2.66         3.45
mirrored above 3.5      2.04       2.04         2.70      1.19       0.65         1.90      2.35       2.69         3.49
mirrored                1.96       1.99         2.68      1.14       0.60         1.85      2.30       2.64         3.45
and a second pass       2.15       2.12         2.99      1.35       0.83         2.21      2.41       2.79         3.82
and half of it          2.09       2.06         2.84      1.24       0.70         2.03      2.38       2.73         3.68

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
