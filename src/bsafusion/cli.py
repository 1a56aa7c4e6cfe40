"""The command line. Heavy imports happen inside the commands, so that ``--help`` and ``info`` answer at once.

Exit codes: 0 done, 1 a result is missing or failed, 2 the request was wrong.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Align and fuse two unaligned medical images. Research use only. Not for clinical use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Task = Annotated[str, typer.Option(help="ct-mri, pet-mri, spect-mri or auto.")]
Weights = Annotated[str, typer.Option(help="Name of shipped weights (see info) or a .safetensors file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the library raises becomes one line on stderr and an exit code."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(130) from None
    except (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        _complain(error)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        _complain(error)
        raise typer.Exit(1) from error


def _complain(error: BaseException) -> None:
    typer.echo(f"bsafusion: {' '.join(str(error).split()) or type(error).__name__}", err=True)


@app.command()
def fuse(
    fixed: Annotated[Path, typer.Argument(help="Image whose grid everything lands on (MRI).", show_default=False)],
    moving: Annotated[Path, typer.Argument(help="Image to be aligned (CT, PET, SPECT).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Result folder.", show_default=False)],
    task: Task = "auto",
    weights: Weights = "default",
    device: Device = "cpu",
    fixed_slice: Annotated[int | None, typer.Option(help="Slice of a 3-D fixed NIfTI.")] = None,
    moving_slice: Annotated[int | None, typer.Option(help="Slice of a 3-D moving NIfTI.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
) -> None:
    """Align MOVING to FIXED and fuse both into the folder OUT."""
    with _one_line_errors():
        _refuse_existing(out, overwrite)
        from bsafusion import pipeline

        pipeline.check_task(task)
        image_fixed = pipeline.read_input(fixed, "fixed", slice_index=fixed_slice)
        image_moving = pipeline.read_input(moving, "moving", slice_index=moving_slice)
        model = pipeline.load_model(weights, device=device)
        started = time.perf_counter()
        result = pipeline.fuse(image_fixed, image_moving, task=task, model=model)
        result.save(out, overwrite=overwrite)
        _say(result.status, result.reasons, out, time.perf_counter() - started)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    """Before any work, not after it."""
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")


def _say(status: str, reasons: list[str], out: Path, seconds: float) -> None:
    if status != "ok":
        for reason in reasons:
            typer.echo(f"bsafusion: suspect: {reason}", err=True)
    typer.echo(f"{status} in {seconds:.2f} s: {out / 'overview.png'}")


@app.command()
def batch(
    manifest: Annotated[Path, typer.Argument(help="CSV with columns id,fixed,moving[,task].", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result folders.", show_default=False)],
    weights: Weights = "default",
    device: Device = "cpu",
) -> None:
    """Fuse every pair of MANIFEST into OUT/<id>. Run it again to go on where it stopped."""
    with _one_line_errors():
        from bsafusion.batch import read_manifest, run_batch
        from bsafusion.pipeline import load_model

        rows = read_manifest(manifest)
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"{out} is a file; expected a folder for the results; choose another path")
        model = load_model(weights, device=device)

        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        results = list(
            track(
                run_batch(rows, out, model),
                "fusing",
                total=len(rows),
                console=console,
                disable=not console.is_terminal,
            )
        )
        count = {kind: sum(r.outcome == kind for r in results) for kind in ("ok", "suspect", "skipped", "failed")}
        typer.echo(", ".join(f"{number} {kind}" for kind, number in count.items()) + f": {out}")
        for result in results:
            if result.outcome in ("suspect", "failed"):
                typer.echo(f"{result.outcome}: {result.id}: {result.message}", err=True)
        if count["failed"]:
            raise typer.Exit(1)


@app.command()
def warp(
    deformation: Annotated[Path, typer.Argument(help="deformation.nii.gz of a result.", show_default=False)],
    image: Annotated[Path, typer.Argument(help="Any image in the moving image's space.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .png, .tif or .nii.gz.", show_default=False)],
    labels: Annotated[bool, typer.Option("--labels", help="A label map: nearest neighbour, values kept.")] = False,
    image_slice: Annotated[int | None, typer.Option(help="Slice of a 3-D NIfTI.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Carry IMAGE to the fixed grid along DEFORMATION."""
    with _one_line_errors():
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists; choose another file or pass --overwrite")
        from bsafusion.io import read_deformation, read_image, write_image
        from bsafusion.preprocessing import apply_field

        field = read_deformation(deformation)
        source = read_image(image, slice_index=image_slice)
        carried = apply_field(field, source, nearest=labels)
        if out.name.lower().endswith(".nii.gz"):
            colour = (0.0, 255.0) if len(carried) == 3 else None
            write_image(out, carried, geometry=field.geometry, value_range=colour)
        else:
            depth: Any = "uint16" if source.dtype == "uint16" else "uint8"
            if source.dtype not in ("uint8", "uint16"):
                raise ValueError(f"{out.name}: {source.dtype} values do not fit a picture; write .nii.gz instead")
            write_image(out, carried, value_range=(0, 65535 if depth == "uint16" else 255), dtype=depth)
        typer.echo(str(out))


@app.command()
def train(
    pairs: Annotated[Path, typer.Argument(help="CSV with columns task,fixed,moving,split.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the run; resumed if it holds one.", show_default=False),
    ],
    preset: Annotated[str, typer.Option(help="default or paper.")] = "default",
    parts: Annotated[str, typer.Option(help="all, alignment or fusion (the rest frozen).")] = "all",
    steps: Annotated[int, typer.Option(help="Optimizer steps of the whole run.")] = 20_000,
    batch: Annotated[int, typer.Option(help="Pairs a step, over all processes.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    init: Annotated[str | None, typer.Option(help="Weights to start from.")] = None,
    until: Annotated[int | None, typer.Option(help="Stop after this step; run again to go on.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other option as PATH=JSON, e.g. model.alignment.direction='\"forward\"' or training.weights.ce2=0.",
        ),
    ] = None,
) -> None:
    """Train on PAIRS; on several processes with torchrun -m bsafusion train ..."""
    with _one_line_errors():
        import os

        from bsafusion.models.bsafusion import PRESETS
        from bsafusion.options import with_options
        from bsafusion.training import TrainingCfg
        from bsafusion.training import train as run

        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
        cfg: Any = TrainingCfg(parts=parts, steps=steps, batch=batch, lr=lr, seed=seed, precision=precision)  # type: ignore[arg-type]
        cfg, model_cfg = with_options(cfg, PRESETS[preset](), set_ or [])

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        quiet = os.environ.get("RANK", "0") != "0"
        console = Console(stderr=True, quiet=quiet)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
            bar = progress.add_task("", total=min(steps, until or steps))

            def show(step: int, figures: dict[str, float]) -> None:
                line = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
                progress.update(bar, completed=step, description=line)
                if not console.is_terminal and step % cfg.log_every == 0:
                    console.print(f"step {step}/{steps}  {line}", highlight=False, soft_wrap=True)

            best = run(pairs, out, model_cfg=model_cfg, cfg=cfg, device=device, init=init, on_step=show, until=until)
        if not quiet:
            typer.echo(str(best))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions, shipped weights and samples."""
    with _one_line_errors():
        import importlib.metadata
        from dataclasses import asdict

        from bsafusion.weights import shipped

        samples = Path(__file__).parent / "samples"
        listed = {
            "version": importlib.metadata.version("bsafusion"),
            "torch": importlib.metadata.version("torch"),
            "weights": [{k: v for k, v in asdict(r).items() if k != "config"} for r in shipped()],
            "samples": str(samples),
            "use": "Research use only. Not for clinical use.",
        }
        if as_json:
            typer.echo(json.dumps(listed, indent=2))
            return
        typer.echo(f"bsafusion {listed['version']}, torch {listed['torch']}. {listed['use']}")
        for record in shipped():
            typer.echo(
                f"\nweights {record.name}: {record.preset} preset, {', '.join(record.tasks)}, {record.steps} steps"
            )
            typer.echo(
                f"  file    {record.file}\n  sha256  {record.sha256}\n  data    {record.data}\n  use     {record.use}"
            )
            for name, value in record.figures.items():
                typer.echo(f"  {name}  {value}")
        typer.echo(f"\nsamples {samples}")


def main() -> None:
    """Entry point of the ``bsafusion`` command."""
    app(prog_name="bsafusion")


if __name__ == "__main__":
    main()
