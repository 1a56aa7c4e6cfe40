"""How well the colours of PET and SPECT survive fusion, for each blend and fusion.

    python benchmarks/colour.py PAIRS.csv [--split val] [--weights default] [--limit N]

The split's coloured pairs as they are; means over the pairs of a task. ``hue``: median angle in degrees between the
hues of the fused and of the aligned moving picture, in 8 bits, where the latter's saturation is above 0.2; ``lost``:
share of those pixels that are grey in the fused picture; ``chroma``: mean length of the fused chroma as a share of the
aligned one's, over those pixels; ``clipped``: share of all pixels with a channel more than half a level beyond [0, 1].
``luminance, cut``: the same luma and chroma joined without fitting the chroma into the cube, channels clipped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsafusion.colour import SATURATED, check_hue, join_colour, split_colour
from bsafusion.datasets import read_pairs
from bsafusion.pipeline import CLIPPED, fuse, load_model, read_input
from bsafusion.plain_fusion import FUSIONS
from bsafusion.preprocessing import fit_intensity

VARIANTS: dict[str, dict[str, Any]] = {
    "luminance": {},
    **{f"luminance, {name}": {"fusion": name} for name in FUSIONS},
    "luminance, fixed at 0.75": {"weight_fixed": 0.75},
    "alpha": {"blend": "alpha"},
}


def measure(fused: NDArray[Any], aligned: NDArray[np.float32], clipped: float) -> list[float]:
    """Hue error, lost, clipped and chroma of a fused picture in [0, 1]."""
    hue = check_hue(fused, aligned)
    saturated = np.ptp(aligned, axis=0) > SATURATED * aligned.max(axis=0)
    lengths = [np.hypot(*split_colour(image[:, saturated])[1]) for image in (fused, aligned)]
    return [
        np.nan if hue.error_median is None else hue.error_median,
        np.nan if hue.lost_share is None else hue.lost_share,
        clipped,
        float((lengths[0] / lengths[1]).mean()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--limit", type=int, help="pairs a task, evenly spread")
    args = parser.parse_args()
    model = load_model(args.weights)
    by_task = defaultdict(list)
    for pair in read_pairs(args.pairs, split=args.split):
        by_task[pair.task].append(pair)
    for task, pairs in by_task.items():
        every = len(pairs) / min(args.limit or len(pairs), len(pairs))
        rows: dict[str, list[list[float]]] = defaultdict(list)
        for pair in [pairs[int(index * every)] for index in range(round(len(pairs) / every))]:
            fixed, moving = read_input(pair.fixed, "fixed"), read_input(pair.moving, "moving")
            if len(moving.array) == 1:
                continue
            for name, options in VARIANTS.items():
                result = fuse(fixed, moving, model=model, **options)
                assert result.fused is not None
                aligned = np.clip(fit_intensity(moving).to_unit(result.aligned), 0, 1)
                rows[name].append(measure(result.fused, aligned, result.report["colour"]["clipped_share"]))
                if name == "luminance":
                    cut = join_colour(split_colour(result.fused)[0], split_colour(aligned)[1])
                    inside = np.clip(cut, 0, 1)
                    share = float((np.abs(cut - inside) > CLIPPED).any(axis=0).mean())
                    rows["luminance, cut"].append(measure(inside, aligned, share))
        for name, values in rows.items():
            hue, lost, clipped, chroma = np.nanmean(values, axis=0)
            print(
                f"{task:10} {name:26} n={len(values)}  hue {hue:5.2f}°  lost {lost:6.2%}  clipped {clipped:6.2%}  "
                f"chroma {chroma:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
