"""Time and peak memory of one 256x256 pair, default against paper preset in one run; and the cold command.

Of the default preset, too, for a pair whose mirror images it looks at as well (``--mirrored``).

    python benchmarks/speed.py [--threads 2] [--runs 15] [--rounds 3]

Each preset runs in a process of its own, in turn, several times over; medians and the ratio of medians are printed. The
weights are random: time does not depend on them. Freed memory is kept, as by the commands of the package
(``bsafusion.memory``). Peak memory is the process's own maximum, libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = {"default": ("default", "never"), "twice": ("default", "always"), "paper": ("paper", "never")}
"""What is timed: the preset, and whether it looks at the mirror images as well."""


def child(kind: str, threads: int, runs: int) -> None:
    """Print the median time of one pair and the process's peak memory as JSON."""
    import torch

    from bsafusion.memory import keep_freed_memory
    from bsafusion.models.bsafusion import PRESETS, BSAFusion

    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    preset, mirrored = KINDS[kind]
    model = BSAFusion(PRESETS[preset]()).eval().to(memory_format=torch.channels_last)
    fixed, moving = torch.rand(1, 1, 256, 256), torch.rand(1, 3, 256, 256)  # a moving image in colour
    times = []
    for run in range(runs + 2):
        started = time.perf_counter()
        model.predict(fixed, moving, mirrored=mirrored)
        if run >= 2:
            times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"seconds": statistics.median(times), "peak_mb": peak, "capability": capability}))


def cold_fuse() -> float:
    """Seconds of the whole ``bsafusion fuse`` command on a shipped pair."""
    from bsafusion.samples import load_samples

    sample = next(s for s in load_samples() if s.id == "ct-mri")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "bsafusion", "fuse", sample.fixed, sample.moving, "-o", Path(folder) / "out"]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.threads, args.runs)
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, rows in found.items():
            command = [
                sys.executable,
                __file__,
                "--child",
                kind,
                "--threads",
                str(args.threads),
                "--runs",
                str(args.runs),
            ]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    seconds = {kind: statistics.median(row["seconds"] for row in rows) for kind, rows in found.items()}
    peak = {kind: max(row["peak_mb"] for row in rows) for kind, rows in found.items()}
    cold = statistics.median(cold_fuse() for _ in range(args.rounds))
    for kind in found:
        print(f"{kind:8} {seconds[kind]:.3f} s a pair, peak memory {peak[kind]:.0f} MB")
    for kind in ("default", "twice"):
        print(f"{kind} is {seconds['paper'] / seconds[kind]:.2f} times faster")
    print(f"bsafusion fuse, cold: {cold:.2f} s")
    if args.out:
        capability = found["default"][0]["capability"]
        result = {"threads": args.threads, "capability": capability, "seconds": seconds, "peak_mb": peak}
        result |= {"cold_fuse_seconds": cold}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
