"""Time of the paper's metrics on one 256x256 triple: median of 20 runs on one core.

OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/metrics_speed.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
from scipy import ndimage

from bsafusion.metrics import ALL_METRICS, PAPER_METRICS, fusion_metrics

SIDE = 256
RUNS = 20


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rng = np.random.default_rng(0)
    smooth = [ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 4) for _ in range(2)]
    fixed, moving = (np.round((image - image.min()) * 255 / np.ptp(image)) for image in smooth)
    fused = np.maximum(fixed, moving)
    print(f"{SIDE}x{SIDE}, {os.cpu_count()} cores, numpy {np.__version__}, median of {RUNS} runs")
    for label, names in (("paper", PAPER_METRICS), ("all", ALL_METRICS)):
        fusion_metrics(fixed, moving, fused, names)
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            fusion_metrics(fixed, moving, fused, names)
            seconds.append(time.perf_counter() - start)
        print(f"{label:>6}: {1000 * statistics.median(seconds):6.1f} ms for {len(names)} metrics")


if __name__ == "__main__":
    main()
