"""Train the default preset in one call: alignment, fusion, assessment; then measure it on ``val``.

    python scripts/train_default.py PAIRS.csv -o RUN [--init default] [--device cuda] [--minutes 30]

Every stage starts from the best weights of the one before and is kept in a folder of its own. With ``--minutes`` the
call ends in time, with a checkpoint; the same command goes on from there. When all is trained, RUN/default.safetensors
holds the result, and RUN/summary.json tells the mean endpoint errors on ``val`` (pixels, one draw with a fixed seed) of
the weights it started from and of its own, where the CSV has such pairs. Alignment is trained much as in run 29 of the
shipped weights, on a GPU, with what runs 33 and after added for heads without their rim; fusion once, with the terms of
its last run; the assessment as in its last runs (experiments/shipped_weights). Nothing is averaged. On a CPU give
``--batch 8`` and fewer steps.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from bsafusion import weights
from bsafusion.datasets import MISALIGNMENTS, Misalignment, Mix, PairSet, read_pairs
from bsafusion.files import write_json
from bsafusion.losses import LossWeights
from bsafusion.pipeline import check_device
from bsafusion.training import TrainingCfg, read_memory, train, validate

POSE = Misalignment(translation=8, rotation=10, scale=0.12, elastic=550, sigma=24)
ONLY_PAPER = Mix(own_contrast=0.0, tasks=(0.8, 1.0, 1.2), misalignments=(("paper", 1.0),), contrast=0.1)
STAGES = {
    "alignment": TrainingCfg(
        parts="alignment",
        steps=6200,
        batch=64,
        lr=2e-3,
        warmup=100,
        validate_every=3100,
        mix=Mix(
            own_contrast=0.2,
            tasks=(0.9, 1.0, 1.4),
            misalignments=(("paper", 0.55), ("rigid", 0.17), ("large", 0.28)),
            milder=0.5,
            pose=POSE,
            between=0.4,
            contrast=0.2,
            shade=0.2,
            cut=0.2,
            recolour=0.15,
            faint=0.2,
            strip=0.15,
        ),
        weights=LossWeights(ce2=0.0),
    ),
    "fusion": TrainingCfg(
        parts="fusion",
        steps=1900,
        batch=32,
        lr=2e-3,
        warmup=50,
        validate_every=950,
        aligned_share=0.7,
        mix=ONLY_PAPER,
        weights=LossWeights(
            information=2.6, fidelity=1.4, structure=7.0, visibility=1.2, edge=5.3, intensity=1.5, highlight=24.0
        ),
    ),
    "assessment": TrainingCfg(
        parts="assessment",
        steps=240,
        batch=32,
        lr=1.5e-3,
        optimizer="adamw",
        weight_decay=1e-2,
        warmup=20,
        validate_every=240,
        mix=Mix(
            own_contrast=0.1,
            misalignments=(("paper", 0.3), ("rigid", 0.2), ("large", 0.5)),
            milder=0.3,
            between=0.2,
            contrast=0.1,
            recolour=0.1,
            faint=0.1,
            strip=0.1,
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--init", default=weights.DEFAULT, help="weights to start from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--minutes", type=float, help="end after so many, with a checkpoint")
    parser.add_argument("--batch", type=int, help="pairs a step in every stage")
    parser.add_argument("--seed", type=int, default=0)
    for name, cfg in STAGES.items():
        parser.add_argument(f"--{name}-steps", type=int, default=cfg.steps)
    args = parser.parse_args()
    check_device(args.device)
    started, init = time.perf_counter(), args.init
    for name, cfg in STAGES.items():
        cfg = replace(
            cfg,
            steps=getattr(args, f"{name}_steps"),
            batch=args.batch or cfg.batch,
            precision=args.precision,
            seed=args.seed,
        )
        left = None if args.minutes is None else args.minutes - (time.perf_counter() - started) / 60
        if left is not None and left <= 0:
            print(f"{name}: not begun; run the same command again")
            return
        folder = args.out / name
        best = train(args.pairs, folder, cfg=cfg, device=args.device, init=init, minutes=left)
        step = read_memory(folder / "checkpoint.safetensors")["step"]
        print(f"{name}: step {step} of {cfg.steps}, {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
        if step < cfg.steps:
            print("stopped with a checkpoint; run the same command again")
            return
        init = str(best)
    for ending in (".safetensors", ".json"):
        shutil.copyfile(Path(init).with_suffix(ending), args.out / f"default{ending}")
    held_out = [pair for pair in read_pairs(args.pairs) if pair.split == "val"]
    if not held_out:
        print(f"{args.pairs}: no pairs of split val to measure on")
        return
    device, data = torch.device(args.device), PairSet(held_out)
    summary = {
        name: validate(weights.load(path)[0].to(device), data, tuple(MISALIGNMENTS), device=device)
        for name, path in (("start", args.init), ("trained", init))
    }
    write_json(args.out / "summary.json", summary)
    for key, before in summary["start"].items():
        print(f"{key:24} {before:6.2f} -> {summary['trained'][key]:6.2f}")


if __name__ == "__main__":
    main()
