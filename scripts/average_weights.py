"""A point on the line between two weight files of one shape: ``(1 - SHARE) A + SHARE B``.

    python scripts/average_weights.py A.safetensors B.safetensors SHARE -o OUT.safetensors [--parts alignment]

Where B was trained on from A with other weights of the loss, the point between them is a compromise of both aims that
costs no training (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022). Parameters that only B has, of a
network that grew, are B's. With ``--parts`` only what such a run trains (``TrainingCfg``) is mixed, the rest is B's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from bsafusion import weights
from bsafusion.training import Parts, is_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("share", type=float)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--parts", choices=get_args(Parts), help="mix these alone; everything by default")
    args = parser.parse_args()
    (one, record), (other, _) = weights.load(args.first), weights.load(args.second)
    target = other.state_dict()
    state = {k: v for k, v in one.state_dict().items() if args.parts is None or is_trained(k, args.parts)}
    if any(name not in target or target[name].shape != value.shape for name, value in state.items()):
        parser.error("the first file holds a network of another shape; expected that of the second, or a smaller one")
    mixed = {
        name: state[name].lerp(value, args.share) if name in state and value.is_floating_point() else value
        for name, value in target.items()
    }
    weights.save(
        args.out.parent,
        args.out.stem,
        mixed,
        preset=other.cfg.preset,
        config=other.cfg.to_dict(),
        tasks=record.tasks,
        data=record.data,
        steps=record.steps,
    )


if __name__ == "__main__":
    main()
