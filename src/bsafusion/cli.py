"""The command line. Heavy imports happen inside the commands, so that ``--help`` and ``info`` answer at once.

Exit codes: 0 done, 1 a result is missing or failed, 2 the request was wrong, 129, 130 or 143 interrupted.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bsafusion.about import NOT_CLINICAL, version_of
from bsafusion.errors import log, one_line, show_tracebacks
from bsafusion.memory import keep_freed_memory

if TYPE_CHECKING:
    from bsafusion.result import FusionResult

T = TypeVar("T")

app = typer.Typer(
    help=f"Align and fuse two unaligned medical images. {NOT_CLINICAL}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Task = Annotated[str, typer.Option(help="ct-mri, pet-mri, spect-mri or auto.")]
Weights = Annotated[str, typer.Option(help="Name of shipped weights (see info) or a .safetensors file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
FusionName = Annotated[str, typer.Option(help="network, or without one: maximum, average, laplacian or guided.")]
Blend = Annotated[
    str,
    typer.Option(
        help="luminance (fused, in the moving image's hue), alpha (moving laid over fixed) or none (fused, grey)."
    ),
]
Colormap = Annotated[
    str,
    typer.Option(
        help="For a grey moving image, of DICOM: hot-iron, pet, hot-metal-blue, pet-20-step, spring, summer, fall, "
        "winter; or none."
    ),
]
WeightFixed = Annotated[
    float, typer.Option(help="0: the moving image alone, 0.5: the balance that was trained, 1: the fixed image alone.")
]
Aligned = Annotated[bool, typer.Option("--aligned", help="The images are aligned already: fuse them as given.")]
NoFuse = Annotated[bool, typer.Option("--no-fuse", help="Align only.")]
Refine = Annotated[
    int,
    typer.Option(metavar="N", help="Gradient steps on the alignment of each pair, at most 200; docs/refinement.md."),
]

Mirrored = Annotated[
    str,
    typer.Option(
        help="Align the mirror images as well: auto (where the network expects a large error), always (a little more "
        "exact, slower) or never."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bsafusion {version_of('bsafusion')}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What holds before any command."""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the library raises becomes one line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:  # a RuntimeError to Python, a plain exit code to us
        raise
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(130) from None
    except (
        ValueError,
        FileExistsError,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        _complain(error)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        _complain(error)
        raise typer.Exit(1) from error


def _all_of(results: Iterable[T], doing: str, total: int) -> list[T]:
    """The results of a long work, with a bar on a terminal while it lasts."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return list(track(results, doing, total=total, console=console, disable=not console.is_terminal))


def _complain(error: BaseException) -> None:
    log.debug("ended", exc_info=error)
    typer.echo(f"bsafusion: {one_line(error)}", err=True)


@app.command()
def fuse(
    fixed: Annotated[Path, typer.Argument(help="Image whose grid everything lands on (MRI).", show_default=False)],
    moving: Annotated[Path, typer.Argument(help="Image to be aligned (CT, PET, SPECT).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Result folder.", show_default=False)],
    task: Task = "auto",
    fusion: FusionName = "network",
    blend: Blend = "luminance",
    colormap: Colormap = "none",
    weight_fixed: WeightFixed = 0.5,
    aligned: Aligned = False,
    no_fuse: NoFuse = False,
    refine: Refine = 0,
    mirrored: Mirrored = "auto",
    weights: Weights = "default",
    device: Device = "cpu",
    fixed_slice: Annotated[int | None, typer.Option(help="Slice of a 3-D fixed NIfTI.")] = None,
    moving_slice: Annotated[int | None, typer.Option(help="Slice of a 3-D moving NIfTI.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
) -> None:
    """Align MOVING to FIXED and fuse both into the folder OUT."""
    with _one_line_errors():
        _check_folder(out)
        if out.name in ("", ".."):
            raise ValueError(
                f"{out} is no folder of the result's own; expected a new one; give it a name: {out / 'result'}"
            )
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise FileExistsError(f"{out} exists and is not empty; choose another folder or pass --overwrite")
        from dataclasses import asdict

        from bsafusion import pipeline
        from bsafusion.files import check_replaceable
        from bsafusion.preprocessing import slices_apart
        from bsafusion.request import FuseOptions, check_task
        from bsafusion.result import FILES

        check_replaceable(out, overwrite=overwrite, holds=FILES)
        check_task(task)
        options = FuseOptions(
            fusion=fusion,
            blend=blend,
            colormap=colormap,
            weight_fixed=weight_fixed,
            aligned=aligned,
            align_only=no_fuse,
            refine=refine,
            mirrored=mirrored,
        )
        image_fixed = pipeline.read_input(fixed, "fixed", slice_index=fixed_slice)
        image_moving = pipeline.read_input(moving, "moving", slice_index=moving_slice)
        model = pipeline.load_model(weights, device=device)
        started = time.perf_counter()
        result = pipeline.fuse(image_fixed, image_moving, task=task, model=model, **asdict(options))
        result.save(out, overwrite=overwrite)
        _say(result, out, time.perf_counter() - started)
        apart = slices_apart(image_fixed, image_moving)
        _say_apart(apart, "by their positions the two slices are up to {:.0f} mm apart")


def _say_apart(millimetres: float | None, told: str) -> None:
    if millimetres is not None and millimetres > 1:
        typer.echo(f"note: {told.format(millimetres)}; check the slice", err=True)


def _check_folder(out: Path) -> None:
    """Before any work, not after it: whether ``out`` is a folder or can become one."""
    from bsafusion.files import check_writable

    check_writable(out)


def _say(result: FusionResult, out: Path, seconds: float) -> None:
    from bsafusion.report import MODES

    for reason in result.reasons:
        typer.echo(f"bsafusion: suspect: {reason}", err=True)
    note = MODES[result.options.mode]
    typer.echo(f"{result.status} in {seconds:.2f} s{f' ({note})' if note else ''}: {out / 'overview.png'}")


@app.command()
def batch(
    manifest: Annotated[Path, typer.Argument(help="CSV with columns id,fixed,moving[,task].", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result folders.", show_default=False)],
    fusion: FusionName = "network",
    blend: Blend = "luminance",
    colormap: Colormap = "none",
    weight_fixed: WeightFixed = 0.5,
    aligned: Aligned = False,
    no_fuse: NoFuse = False,
    refine: Refine = 0,
    mirrored: Mirrored = "auto",
    weights: Weights = "default",
    device: Device = "cpu",
) -> None:
    """Fuse every pair of MANIFEST into OUT/<id>. Run it again to go on where it stopped."""
    with _one_line_errors():
        from bsafusion.batch import read_manifest, run_batch
        from bsafusion.pipeline import check_options, load_model
        from bsafusion.request import FuseOptions

        options = FuseOptions(
            fusion=fusion,
            blend=blend,
            colormap=colormap,
            weight_fixed=weight_fixed,
            aligned=aligned,
            align_only=no_fuse,
            refine=refine,
            mirrored=mirrored,
        )
        rows = read_manifest(manifest)
        _check_folder(out)
        model = load_model(weights, device=device)
        check_options(model, options)

        results = _all_of(run_batch(rows, out, model, options), "fusing", len(rows))
        count = {kind: sum(r.outcome == kind for r in results) for kind in ("ok", "suspect", "skipped", "failed")}
        typer.echo(", ".join(f"{number} {kind}" for kind, number in count.items()) + f": {out}")
        for result in results:
            if result.message:
                outcome = "suspect, made before" if result.outcome == "skipped" else result.outcome
                typer.echo(f"{outcome}: {result.id}: {result.message}", err=True)
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
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder; expected a file to write: .png, .tif or .nii.gz; add its name")
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists; choose another file or pass --overwrite")
        _check_folder(out.parent)
        from bsafusion.io import read_deformation, read_image, write_like
        from bsafusion.preprocessing import apply_field, slice_astray

        field = read_deformation(deformation)
        source = read_image(image, slice_index=image_slice, labels=labels)
        carried = apply_field(field, source, nearest=labels)
        told = "by its position this slice lies {:.0f} mm from the one that the field was made for"
        _say_apart(slice_astray(field, source), told)
        write_like(out, carried, source, geometry=field.geometry)
        typer.echo(str(out))


@app.command()
def metrics(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="FIXED MOVING FUSED | TABLE",
            help="Three images, three folders with the same file names, or a CSV: id,fixed,moving,fused[,task].",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the values and their summary.", show_default=False)
    ] = None,
    names: Annotated[
        str | None, typer.Option(help="Metrics, separated by commas; those of the paper if left out.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every metric there is.")] = False,
    reference: Annotated[
        str,
        typer.Option(
            help="What MOVING is: truth (before it was deformed) or aligned (by a method). Recorded with the values."
        ),
    ] = "truth",
    fixed_slice: Annotated[int | None, typer.Option(help="Slice of 3-D fixed NIfTI.")] = None,
    moving_slice: Annotated[int | None, typer.Option(help="Slice of 3-D moving NIfTI.")] = None,
    fused_slice: Annotated[int | None, typer.Option(help="Slice of 3-D fused NIfTI.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier tables in OUT.")] = False,
) -> None:
    """Score fused images, made by this program or any other."""
    with _one_line_errors():
        from bsafusion import scoring

        checked: Any = reference
        cfg = scoring.ScoringCfg(scoring.choose_metrics(names, every), checked)
        slices: Any = {"fixed": fixed_slice, "moving": moving_slice, "fused": fused_slice}
        rows = scoring.find_rows(images)
        if len(images) == 3 and not images[0].is_dir() and out is None:
            fixed, moving, fused = images
            _say_score(scoring.score_one(fixed, moving, fused, cfg, slices=slices), cfg, as_json)
            return
        if out is not None:
            _check_folder(out)
            earlier = [name for name in scoring.OUTPUTS if (out / name).exists()]
            if earlier and not overwrite:
                raise FileExistsError(f"{out} holds {', '.join(earlier)}; choose another folder or pass --overwrite")

        scores = _all_of(scoring.score_table(rows, cfg, slices=slices), "scoring", len(rows))
        summary = scoring.describe_scores(scores, cfg)
        if out is not None:
            scoring.write_scores(out, scores, summary)
        _say_summary(summary, as_json)
        for failed in summary["failed"]:
            typer.echo(f"failed: {failed['id']}: {failed['message']}", err=True)
        if summary["failed"]:
            raise typer.Exit(1)


def _better(name: str) -> str:
    from bsafusion.metrics import DIRECTIONS

    return {"up": "higher is better", "down": "lower is better"}[DIRECTIONS[name]]


def _say_score(score: Any, cfg: Any, as_json: bool) -> None:
    if as_json:
        from bsafusion.scoring import json_number

        values = {name: json_number(value) for name, value in score.values.items()}
        typer.echo(json.dumps({**values, "reference": cfg.reference, "scaling": score.scaling}, indent=2))
        return
    for name, value in score.values.items():
        typer.echo(f"{name:<8} {value:12.4f}  {_better(name)}")
    typer.echo(f"reference: {cfg.reference}")
    for role, rule in score.scaling.items():
        typer.echo(f"{role}: {rule}")


def _say_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return

    def number(value: float | None) -> str:
        return f"{value:.4f}" if value is not None else "inf"

    for group, figures in summary["groups"].items():
        n = next(iter(figures.values()))["n"]
        typer.echo(f"{group}: n = {n}, reference: {summary['settings']['reference']}")
        for name, of in figures.items():
            interval = "" if of["ci95"] is None else f" [{number(of['ci95'][0])}, {number(of['ci95'][1])}]"
            mean = f"mean {number(of['mean'])}{interval}"
            typer.echo(f"  {name:<8} {mean:<42} median {number(of['median'])}  {_better(name)}")


@app.command()
def evaluate(
    pairs: Annotated[Path, typer.Argument(help="CSV with columns task,fixed,moving,split[,case].", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of predictions, scores and tables; resumed.", show_default=False)
    ],
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Weights, called bsafusion, or NAME=WEIGHTS; several times. [default: default]"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas; all weights, competitors and --fused if left out."),
    ] = None,
    suites: Annotated[str, typer.Option(help="Misalignments, separated by commas.")] = "paper,rigid,large,corrupted",
    draws: Annotated[int, typer.Option(help="Misalignments of each pair.")] = 3,
    competitor_draws: Annotated[int, typer.Option(help="The same for the slower classical methods.")] = 1,
    fusions: Annotated[
        str, typer.Option(help="Plain fusions of every method's alignment: maximum, average, laplacian, guided.")
    ] = "maximum,average,laplacian",
    fused: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a third party's fused images; several times.")
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="NAME=INTERPRETER in which elastix or ants is installed; several times."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the pairs.")] = "val",
    side: Annotated[int, typer.Option(help="Pixels a side that pairs are brought to.")] = 256,
    limit: Annotated[int | None, typer.Option(help="At most so many pairs a task.")] = None,
    jobs: Annotated[int, typer.Option(help="Workers, one thread each.")] = 1,
    reference: Annotated[
        str, typer.Option(help="Moving image of the fusion metrics: truth (before it was deformed) or aligned.")
    ] = "truth",
    device: Device = "cpu",
    split_by: Annotated[
        str, typer.Option(help="slice: the split of PAIRS; case: also train without the patients that are tested.")
    ] = "slice",
    folds: Annotated[
        int | None, typer.Option(help="Of the patients, with --split-by case. [default: 3]", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --split-by case: an option of its trainings as PATH=VALUE, as in train."),
    ] = None,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Predict to files, score later.")] = False,
    inputs_only: Annotated[
        bool, typer.Option("--inputs-only", help="Write the misaligned images for other programs, nothing else.")
    ] = False,
) -> None:
    """Compare weights and classical registration on PAIRS, misaligned by known fields. Run it again to go on."""
    with _one_line_errors():
        others = {"--weights": weights, "--fused": fused, "--python": python}
        _check_split_by(split_by, folds, set_, methods, others)
        from bsafusion import evaluation
        from bsafusion.benchmark import Benchmark, EvaluationCfg
        from bsafusion.evaluation_tables import check_folder

        cfg = EvaluationCfg(
            split=split,
            suites=_listed(suites),
            draws=draws,
            competitor_draws=competitor_draws,
            fusions=_listed(fusions),
            reference=reference,  # type: ignore[arg-type]
            side=side,
            limit=limit,
            jobs=jobs,
        )
        _check_inputs_only(inputs_only, {**others, "--methods": methods, "--predict-only": predict_only})
        chosen = evaluation.choose_methods(methods, weights=weights or (), fused=fused or (), pythons=python or ())
        _check_folder(out)
        check_folder(out)
        benchmark = Benchmark(pairs, cfg)
        if inputs_only:
            typer.echo(str(evaluation.write_inputs(benchmark, out)))
            return
        if split_by == "case":
            # Long trainings: what else is compared has to be asked for.
            chosen = [] if methods is None else chosen

        from rich.console import Console
        from rich.progress import Progress, TimeElapsedColumn

        console = Console(stderr=True)
        columns = ("{task.description}", "{task.completed:.0f}", TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            advance = _counters(progress)
            notes = []
            of_folds = []
            if split_by == "case":
                count = 3 if folds is None else folds
                of_folds = _predict_folds(benchmark, out, count, set_ or [], device, advance)
            left_out = evaluation.predict_methods(benchmark, out, chosen, device=device, on_case=advance)
            chosen = [*of_folds, *chosen]
            for name, reason in left_out.items():
                notes.append(f"{name} was not run: {reason}")
                typer.echo(f"bsafusion: {notes[-1]}", err=True)
            if predict_only:
                typer.echo(str(out / "predictions"))
                return
            rows = evaluation.score_methods(benchmark, out, chosen, on_pair=lambda: advance("scoring"))

        from bsafusion.evaluation_page import write_report

        typer.echo(write_report(benchmark, out, chosen, rows, notes))
        typer.echo(f"\n{out / 'report.html'}")


def _check_split_by(
    split_by: str, folds: int | None, set_: list[str] | None, methods: str | None, others: dict[str, list[str] | None]
) -> None:
    """Refuse options of ``evaluate`` that would have no effect; ``others`` name what is compared beside the folds."""
    if split_by not in ("slice", "case"):
        raise ValueError(f"--split-by {split_by!r}: expected slice or case")
    for option, given in (("--set", bool(set_)), ("--folds", folds is not None)):
        if given and split_by != "case":
            raise ValueError(f"{option} shapes the trainings of --split-by case; leave it out, or split by case")
    unused = [option for option, given in others.items() if given]
    if unused and split_by == "case" and methods is None:
        raise ValueError(
            "--split-by case compares its own trainings alone unless --methods names others; add --methods, or leave "
            f"{', '.join(unused)} out"
        )


def _check_inputs_only(inputs_only: bool, others: dict[str, Any]) -> None:
    """Refuse ``others`` beside ``--inputs-only``, which they would have no effect on."""
    unused = [option for option, given in others.items() if given]
    if inputs_only and unused:
        raise ValueError(f"--inputs-only writes the inputs and nothing else; leave {', '.join(unused)} out")


def _counters(progress: Any) -> Callable[[str], None]:
    """Counts under names, each shown from when it is first heard of; lines now and then where there is no terminal."""
    tasks: dict[str, Any] = {}

    def advance(name: str) -> None:
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=None)
        progress.advance(tasks[name])
        done = int(progress.tasks[tasks[name]].completed)
        if not progress.console.is_terminal and done % 20 == 0:
            progress.console.print(f"{name}: {done}", highlight=False)

    return advance


def _predict_folds(
    benchmark: Any, out: Path, folds: int, settings: list[str], device: str, advance: Callable[[str], None]
) -> Any:
    from bsafusion.cross_validation import METHODS, predict_folds, train_folds
    from bsafusion.models.bsafusion import PRESETS
    from bsafusion.options import with_options
    from bsafusion.training import TrainingCfg

    cfg, model_cfg = with_options(TrainingCfg(), PRESETS["default"](), settings)
    trained = train_folds(
        *(benchmark.path, out, folds),
        cfg=cfg,
        model_cfg=model_cfg,
        split=benchmark.cfg.split,
        device=device,
        on_step=lambda run, _step, _figures: advance(f"training {run}"),
    )
    return predict_folds(benchmark, out, trained, device=device, on_case=lambda: advance(METHODS[-1]))


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


@app.command()
def train(
    pairs: Annotated[Path, typer.Argument(help="CSV with columns task,fixed,moving,split.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the run; resumed if it holds one.", show_default=False),
    ],
    preset: Annotated[str, typer.Option(help="default or paper.")] = "default",
    parts: Annotated[str, typer.Option(help="all, alignment, fusion or assessment (the rest frozen).")] = "all",
    steps: Annotated[int, typer.Option(help="Optimizer steps of the whole run.")] = 20_000,
    batch: Annotated[int, typer.Option(help="Pairs a step, over all processes.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    init: Annotated[str | None, typer.Option(help="Weights to start from.")] = None,
    until: Annotated[int | None, typer.Option(help="Stop after this step; run again to go on.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes; run again to go on.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other option as PATH=VALUE, e.g. model.alignment.direction=forward or training.weights.ce2=0.",
        ),
    ] = None,
) -> None:
    """Train on PAIRS; on several processes with torchrun -m bsafusion train ..."""
    with _one_line_errors():
        import os

        from bsafusion.models.bsafusion import PRESETS
        from bsafusion.options import with_options
        from bsafusion.pipeline import check_device
        from bsafusion.training import TrainingCfg
        from bsafusion.training import train as run

        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
        check_device(device)
        _check_folder(out)
        given: Any = {"parts": parts, "steps": steps, "batch": batch, "lr": lr, "seed": seed, "precision": precision}
        cfg = TrainingCfg.published(**given) if preset == "paper" else TrainingCfg(**given)
        cfg, model_cfg = with_options(cfg, PRESETS[preset](), set_ or [])

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        quiet = os.environ.get("RANK", "0") != "0"
        console = Console(stderr=True, quiet=quiet)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
            bar = progress.add_task("", total=min(cfg.steps, until or cfg.steps))

            def show(step: int, figures: dict[str, float]) -> None:
                line = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
                progress.update(bar, completed=step, description=line)
                if not console.is_terminal and step % cfg.log_every == 0:
                    console.print(f"step {step}/{cfg.steps}  {line}", highlight=False, soft_wrap=True)

            best = run(
                pairs,
                out,
                model_cfg=model_cfg,
                cfg=cfg,
                device=device,
                init=init,
                on_step=show,
                on_note=lambda note: console.print(f"bsafusion: {note}", highlight=False, markup=False, soft_wrap=True),
                until=until,
                minutes=minutes,
            )
        if not quiet:
            typer.echo(str(best))


@app.command()
def view(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RESULT]...", help="Result folders, or the OUT of a batch.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option(help="On the loopback address; 0 takes any free one.")] = 8765,
    weights: Weights = "default",
    device: Device = "cpu",
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open the viewer in the browser: fuse two images and see, or look through RESULTs. Ctrl-C ends it."""
    with _one_line_errors():
        try:
            from bsafusion.viewer import server
        except ModuleNotFoundError as error:
            raise ValueError(f'{error.name} is not installed; pip install ".[viewer]" in the clone') from error

        cfg = server.ViewerCfg(roots=tuple(results or ()), weights=weights, device=device)
        with server.listen(port) as listener:
            viewer = server.build_server(cfg, listener)
            typer.echo(f"viewer at {server.address(listener)} (Ctrl-C ends it). {NOT_CLINICAL}")
            if browser:
                server.open_browser(server.address(listener))
            hangup = getattr(signal, "SIGHUP", None)
            if hangup is not None and signal.getsignal(hangup) is _terminated:
                signal.signal(hangup, viewer.handle_exit)  # as on Ctrl-C; the server takes no notice of this one
            server.run(viewer, listener)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions, shipped weights and samples."""
    with _one_line_errors():
        from dataclasses import asdict

        from bsafusion.weights import shipped

        samples = Path(__file__).parent / "samples"
        listed = {
            "version": version_of("bsafusion"),
            "torch": version_of("torch"),
            "weights": [{k: v for k, v in asdict(r).items() if k != "config"} for r in shipped()],
            "samples": str(samples),
            "use": NOT_CLINICAL,
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


def _terminated(number: int, _frame: Any) -> None:
    """End as on an interruption, so that what is half written is removed; the code is the one a shell shows."""
    signal.signal(number, signal.SIG_IGN)  # it may come twice, and the second is not to end the cleaning up
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the ``bsafusion`` command."""
    keep_freed_memory()
    show_tracebacks()
    for name in ("SIGTERM", "SIGHUP"):  # the latter where a terminal was closed; Windows has none
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup is obeyed
            signal.signal(number, _terminated)
    try:
        app(prog_name="bsafusion")
    except OSError as error:  # of the help text, which is printed outside of any command
        _complain(error)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
