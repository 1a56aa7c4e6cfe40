"""The benchmark that anybody can check: methods predict to files, then the files are scored.

The cases come from ``benchmark``. :func:`predict_method` writes what a method makes of them; :func:`score_methods`
reads those files, and nothing else of the method, and gives one row per method, fusion, suite, pair and draw. Both go
on where they stopped, and neither mixes what was made with different settings.

Below ``OUT``::

    predictions/METHOD/settings.json
    predictions/METHOD/SUITE/TASK/draw-D/ID/   field.npz, fused-FUSION.png, prediction.json
    scores/METHOD/SUITE/TASK/ID.json           rows, kept as long as the files they came from do not change

``field.npz`` holds ``displacement`` (and ``inverse``, where the method gives one), ``2 H W`` float32 in the package's
one convention, rounded to 1/256 px; the plain fusions are made with the rounded field.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import queue
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsafusion.about import version_of
from bsafusion.benchmark import (
    OWN,
    PROTOCOL,
    SUITES,
    Benchmark,
    Case,
    EvaluationCfg,
    EvaluationError,
    Inputs,
    draw_corruption,
)
from bsafusion.competitors import COMPETITORS, Competitor, CompetitorError, RegistrationError
from bsafusion.deformation import warp
from bsafusion.errors import one_line
from bsafusion.evidence import measure_evidence
from bsafusion.files import atomic_folder, write_json
from bsafusion.io import read_image, write_image
from bsafusion.metrics import (
    PAPER_METRICS,
    draw_consistency,
    endpoint_error,
    endpoint_residual,
    folds,
    fusion_metrics,
    head_mask,
    inverse_consistency,
    summarise,
)
from bsafusion.pipeline import Model, load_model
from bsafusion.plain_fusion import FUSIONS
from bsafusion.report import verdict
from bsafusion.scoring import grey_levels, image_name
from bsafusion.weights import DEFAULT, file_sha256

Array = NDArray[np.float32]
Kind = Literal["network", "registration", "fused"]
Row = dict[str, Any]

NETWORK_FUSION = "network"
REGISTRATION_METRICS = ("error", "error_median", "error_p95", "seen", "consistency", "inverse", "folds", "before")
COLUMNS = (
    *("method", "fusion", "suite", "task", "id", "case", "draw", "corruption", "reference"),
    *("status", "seconds", "expected_error", *REGISTRATION_METRICS, *PAPER_METRICS),
)
"""Of a row of :func:`score_methods`; None where a method has no such figure."""

_STEPS_PER_PIXEL = 256  # of a stored field

# --- methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A name and what stands behind it: weights, the interpreter of a competitor, or a folder of fused images."""

    name: str
    kind: Kind
    source: str

    def draws(self, cfg: EvaluationCfg) -> int:
        slow = self.kind == "registration" and self.name != "identity"
        return min(cfg.draws, cfg.competitor_draws) if slow else cfg.draws


def choose_methods(
    names: str | None = None,
    *,
    weights: Sequence[str] = (),
    fused: Sequence[str] = (),
    pythons: Sequence[str] = (),
) -> list[Method]:
    """The methods of an evaluation.

    Args:
        names: separated by commas; all that the other arguments and ``COMPETITORS`` give if left out.
        weights: ``NAME=WEIGHTS``, or ``WEIGHTS`` once, which is then called ``bsafusion``; the shipped default weights
            if left out.
        fused: ``NAME=FOLDER`` of a third party's fused images.
        pythons: ``COMPETITOR=INTERPRETER``.

    Raises:
        EvaluationError: a name is used twice, is not a folder's name or unknown, or a folder is missing.
    """
    found: list[Method] = []
    for given in weights or (DEFAULT,):
        name, sign, source = given.partition("=")
        found.append(Method(name, "network", source) if sign else Method("bsafusion", "network", given))
    for given in fused:
        name, sign, source = given.partition("=")
        if not sign or not Path(source).is_dir():
            raise EvaluationError(f"fused images {given!r}: expected NAME=FOLDER of a folder that is there")
        found.append(Method(name, "fused", source))
    interpreters = dict(given.split("=", 1) for given in pythons if "=" in given)
    if len(interpreters) < len(pythons) or set(interpreters) - set(COMPETITORS):
        raise EvaluationError(f"python {', '.join(pythons)}: expected NAME=INTERPRETER of {', '.join(COMPETITORS)}")
    found += [Method(name, "registration", interpreters.get(name, "")) for name in COMPETITORS]
    by_name = {method.name: method for method in found}
    if len(by_name) < len(found):
        raise EvaluationError(
            f"methods {', '.join(m.name for m in found)}: a name stands twice; give each its own with NAME=..."
        )
    for name in by_name:
        if not name or Path(name).name != name or name.startswith("."):
            raise EvaluationError(f"method {name!r} cannot be the name of a folder; choose another name")
    if names is None:
        return found
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise EvaluationError(f"no method is called {', '.join(unknown)}; choose from {', '.join(by_name)}")
    asked = [m.name for m in found if m.kind == "fused" or (m.kind == "network" and weights)] + list(interpreters)
    if unused := [name for name in asked if name not in wanted]:
        raise EvaluationError(f"{', '.join(unused)}: not among methods {names}; add it there, or leave it out")
    return [by_name[name] for name in dict.fromkeys(wanted)]


class Prediction(NamedTuple):
    """What a method makes of two images; fields ``2 H W`` float32, pull-back, voxels, ``(y, x)``.

    ``fused`` is a fusion of the method's own, ``H W`` in [0, 1]; ``status`` is ``ok``, ``suspect``, ``failed`` or empty
    where a method says nothing of itself; ``seconds`` are CPU time in one thread where the method knows it (on an
    accelerator: on the clock); where None they are taken from the clock around the call.
    """

    displacement: Array
    inverse: Array | None = None
    fused: Array | None = None
    status: str = ""
    reasons: tuple[str, ...] = ()
    expected_error: float | None = None
    seconds: float | None = None


Predictor = Callable[[Inputs], Prediction]
"""From what a method sees of :class:`~bsafusion.benchmark.Inputs`; called from several threads."""


@contextmanager
def open_method(method: Method, *, jobs: int = 1, device: str = "cpu") -> Iterator[tuple[Predictor, dict[str, Any]]]:
    """The predictor of a network or a competitor, and the settings that shape its predictions.

    Raises:
        CompetitorError, WeightsError, RequestError: it is not there.
    """
    if method.kind == "network":
        model = load_model(method.source, device=device)
        yield (
            _network(model),
            {
                "kind": method.kind,
                **model.identity(),
                "versions": {name: version_of(name) for name in ("bsafusion", "torch")},
            },
        )
        return
    if method.kind == "fused":
        raise EvaluationError(f"{method.name} is a folder of fused images; there is nothing to predict")
    workers = [Competitor(method.name, method.source or None) for _ in range(jobs)]
    free: queue.SimpleQueue[Competitor] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def register(inputs: Inputs) -> Prediction:
        worker = free.get()
        try:
            found = worker.register(inputs.fixed, inputs.moving)
        except RegistrationError as error:  # the user is left with what he had
            return Prediction(np.zeros((2, *inputs.fixed.shape), np.float32), status="failed", reasons=(str(error),))
        finally:
            free.put(worker)
        return Prediction(found.displacement, seconds=found.seconds)

    try:
        yield register, {"kind": method.kind, "versions": workers[0].versions, "parameters": workers[0].parameters}
    finally:
        for worker in workers:
            worker.close()


def _network(model: Model) -> Predictor:
    def predict(inputs: Inputs) -> Prediction:
        fixed = inputs.fixed
        pictures = (fixed[None], np.concatenate([inputs.moving[None], inputs.chroma]))
        tensors = [torch.from_numpy(picture)[None].to(model.device) for picture in pictures]
        clock = time.thread_time if model.device == "cpu" else time.perf_counter
        started = clock()
        out = model.network.predict(*tensors)
        fused = out.fused[0, 0].float().cpu().numpy()
        seconds = clock() - started
        evidence = measure_evidence(out.alignment, fixed, out.aligned[0, 0].float().cpu().numpy())
        status, reasons = verdict(evidence, max(fixed.shape), trust=model.trust)
        alignment = out.alignment
        return Prediction(
            alignment.displacement[0].float().cpu().numpy(),
            inverse=alignment.inverse[0].float().cpu().numpy(),
            fused=np.clip(fused, 0, 1),
            status=status,
            reasons=tuple(reasons),
            expected_error=evidence.expected_error,
            seconds=seconds,
        )

    return predict


# --- predict -----------------------------------------------------------------------------------------


def predict_method(
    benchmark: Benchmark,
    out: Path,
    name: str,
    predictor: Predictor,
    settings: Mapping[str, Any],
    *,
    cases: Sequence[Case],
    on_case: Callable[[], None] | None = None,
) -> int:
    """Write the predictions of one method below ``out/predictions/NAME``; what is there already is kept.

    Args:
        settings: whatever else shapes the predictions: versions, parameters, weights.
        on_case: called after every case.

    Returns:
        How many cases were predicted anew.

    Raises:
        EvaluationError: the folder holds predictions made with other settings.
    """
    root = out / "predictions" / name
    claim_folder(root, {"method": name, **benchmark.settings(), **settings})

    def one(case: Case) -> bool:
        new = _predict_case(benchmark, root, case, predictor)
        if on_case:
            on_case()
        return new

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # jobs share the cores, and a field must not depend on their number
    try:
        with ThreadPoolExecutor(benchmark.cfg.jobs) as pool:
            return sum(pool.map(one, cases))
    finally:
        torch.set_num_threads(threads)


def claim_folder(root: Path, settings: Mapping[str, Any]) -> None:
    """Make ``root`` the folder of results with these settings, unless it is that of others.

    Raises:
        EvaluationError: it holds results with other settings; the message names what differs.
    """
    path = root / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if path.is_file():
        there = _flat(_read_json(path))
        here = _flat(wanted)
        differing = [
            f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} now"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ]
        if differing:
            raise EvaluationError(
                f"{root} was made with other settings ({'; '.join(differing)}); give the method another name, "
                "choose another folder, or remove this one"
            )
        return
    if root.is_dir() and any(root.iterdir()):
        raise EvaluationError(f"{root} holds files but no settings.json; choose another folder or remove this one")
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, part in tree.items() for k, v in _flat(part, f"{path}.{key}" if path else key).items()}


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _predict_case(benchmark: Benchmark, root: Path, case: Case, predictor: Predictor) -> bool:
    folder = root / case.folder
    fusions = benchmark.cfg.fusions
    if (folder / "prediction.json").is_file():
        missing = [name for name in fusions if not fused_file(folder, name).is_file()]
        if missing:
            displacement, _ = read_fields(folder)
            _write_fusions(folder, benchmark.inputs(case), displacement, missing)
        return False
    inputs = benchmark.inputs(case)
    started = time.perf_counter()
    prediction = predictor(inputs)
    seconds = time.perf_counter() - started if prediction.seconds is None else prediction.seconds
    displacement = _rounded(prediction.displacement, inputs.known.shape)
    with atomic_folder(folder) as aside:
        if prediction.inverse is None:
            np.savez_compressed(aside / "field.npz", displacement=displacement)
        else:
            inverse = _rounded(prediction.inverse, inputs.known.shape)
            np.savez_compressed(aside / "field.npz", displacement=displacement, inverse=inverse)
        if prediction.fused is not None:
            write_image(fused_file(aside, NETWORK_FUSION), prediction.fused[None], value_range=(0, 1))
        _write_fusions(aside, inputs, displacement, fusions)
        record = {
            "status": prediction.status,
            "reasons": list(prediction.reasons),
            "expected_error": prediction.expected_error,
            "seconds": round(seconds, 4),
            "corruption": None if inputs.corruption is None else asdict(inputs.corruption),
        }
        write_json(aside / "prediction.json", record)
    return True


def _rounded(field: Array, shape: tuple[int, ...]) -> Array:
    field = np.asarray(field, dtype=np.float32)
    if field.shape != shape or not np.isfinite(field).all():
        raise EvaluationError(f"a method gave a field of shape {field.shape}; expected {shape}, finite")
    return np.round(field * _STEPS_PER_PIXEL) / np.float32(_STEPS_PER_PIXEL)


def fused_file(folder: Path, fusion: str) -> Path:
    return folder / f"fused-{fusion}.png"


def read_fields(folder: Path) -> tuple[Array, Array | None]:
    """``displacement`` and ``inverse`` of a prediction."""
    path = folder / "field.npz"
    with _telling_what_is_damaged(path), path.open("rb") as file, np.load(file, allow_pickle=False) as fields:
        return fields["displacement"], fields.get("inverse")


@contextmanager
def _telling_what_is_damaged(path: Path) -> Iterator[None]:
    """An error in reading a file of an earlier run names it, and says how to go on."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"{path} cannot be read ({one_line(error)}); remove its folder and run again to make it anew"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    with _telling_what_is_damaged(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found


def _read_fused(path: Path) -> NDArray[np.float64]:
    """Levels ``H W`` of a fused image."""
    with _telling_what_is_damaged(path):
        return grey_levels(read_image(path))[0]


def align(moving: Array, displacement: Array) -> Array:
    """``H W`` pulled back through ``2 H W``; beyond the moving frame there is background."""
    pulled = warp(torch.from_numpy(moving)[None, None], torch.from_numpy(displacement)[None], padding="zeros")
    aligned: Array = pulled[0, 0].clamp(0, 1).numpy()
    return aligned


def _write_fusions(folder: Path, inputs: Inputs, displacement: Array, names: Iterable[str]) -> None:
    aligned = align(inputs.moving, displacement)
    for name in names:
        write_image(fused_file(folder, name), FUSIONS[name](inputs.fixed, aligned)[None], value_range=(0, 1))


def write_inputs(benchmark: Benchmark, out: Path) -> Path:
    """What methods see, for programs of others: ``out/inputs/SUITE/TASK/draw-D/ID/{fixed,moving}.png``, 8 bit."""
    root = out / "inputs"
    claim_folder(root, benchmark.settings())
    for case in benchmark.cases(benchmark.cfg.draws):
        inputs, folder = benchmark.inputs(case), root / case.folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in (("fixed", inputs.fixed), ("moving", inputs.moving)):
            write_image(folder / f"{name}.png", image[None], value_range=(0, 1))
    return root


# --- score -------------------------------------------------------------------------------------------


def score_methods(
    benchmark: Benchmark,
    out: Path,
    methods: Sequence[Method],
    *,
    on_pair: Callable[[], None] | None = None,
) -> list[Row]:
    """One row per method, fusion, suite, pair and draw that has a prediction, with the keys :data:`COLUMNS`.

    Raises:
        EvaluationError: predictions were made with other settings, or a folder of fused images does not fit.
    """
    wanted = benchmark.settings()
    for method in methods:
        path = out / "predictions" / method.name / "settings.json"
        if method.kind != "fused" and path.is_file():
            claim_folder(path.parent, {**_read_json(path), **wanted})
    pairs = [(method, list(cases)) for method in methods for cases in _by_pair(_cases_of(benchmark, method)).values()]
    rows: list[Row] = []
    with _scorers(benchmark) as (scorers, score):
        for found in scorers.map(score, repeat(out), [method for method, _ in pairs], [cases for _, cases in pairs]):
            rows += found
            if on_pair:
                on_pair()
    return rows


def _cases_of(benchmark: Benchmark, method: Method) -> list[Case]:
    cases = benchmark.cases(method.draws(benchmark.cfg))
    if method.kind != "fused" or any((Path(method.source) / suite).is_dir() for suite in SUITES):
        return cases
    first = cases[0].suite
    return [replace(case, suite=OWN) for case in cases if case.suite == first and case.draw == 0]


def _by_pair(cases: Iterable[Case]) -> dict[tuple[str, int], list[Case]]:
    pairs: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        pairs.setdefault((case.suite, case.index), []).append(case)
    return pairs


ScorePair = Callable[[Path, Method, Sequence[Case]], list[Row]]

_benchmark: Benchmark | None = None  # of a process that :func:`_scorers` started


@contextmanager
def _scorers(benchmark: Benchmark) -> Iterator[tuple[Executor, ScorePair]]:
    """Processes that hold the benchmark, and what they are to do; a thread where there is one job, which needs no
    start."""
    jobs = benchmark.cfg.jobs
    if jobs == 1:
        with ThreadPoolExecutor(1) as threads:
            yield threads, partial(score_pair, benchmark)
        return
    context, arguments = multiprocessing.get_context("spawn"), (benchmark.path, benchmark.cfg)
    with ProcessPoolExecutor(jobs, context, initializer=_start_scorer, initargs=arguments) as processes:
        yield processes, _score_pair


def _start_scorer(path: Path, cfg: EvaluationCfg) -> None:
    global _benchmark
    torch.set_num_threads(1)
    _benchmark = Benchmark(path, cfg)


def _score_pair(out: Path, method: Method, cases: Sequence[Case]) -> list[Row]:
    assert _benchmark is not None
    return score_pair(_benchmark, out, method, cases)


def score_pair(benchmark: Benchmark, out: Path, method: Method, cases: Sequence[Case]) -> list[Row]:
    """The rows of one method and pair, from its files or as they were computed from the same files before."""
    files = {case: _files(benchmark, out, method, case) for case in cases}
    files = {case: found for case, found in files.items() if found}
    if not files:
        return []
    cfg = benchmark.cfg
    first = cases[0]
    digest = hashlib.sha256(
        json.dumps([PROTOCOL, cfg.reference, cfg.fusions, PAPER_METRICS, cfg.side, cfg.split]).encode()
    )
    pair = benchmark.pair(first)
    paths = [pair.fixed, pair.moving, *(path for found in files.values() for path in found)]
    for path in paths:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    digest.update(json.dumps([astuple(case) for case in files]).encode())
    key = digest.hexdigest()
    kept = out / "scores" / method.name / first.suite / first.task / f"{first.id}.json"
    if kept.is_file():
        with suppress(ValueError, KeyError, TypeError):  # one that is damaged is made anew
            earlier = json.loads(kept.read_text(encoding="utf-8"))
            if earlier["key"] == key:
                return list(earlier["rows"])
    if method.kind == "fused":
        rows = [_score_fused(benchmark, method, case, found[0]) for case, found in files.items()]
    else:
        rows = _score_predictions(benchmark, out / "predictions" / method.name, method, list(files))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"key": key, "rows": rows})
    return rows


def _files(benchmark: Benchmark, out: Path, method: Method, case: Case) -> list[Path]:
    """The files that the rows of a case come from; none where there is no prediction."""
    if method.kind == "fused":
        return [_third_party_file(benchmark, Path(method.source), case)]
    folder = out / "predictions" / method.name / case.folder
    if not (folder / "prediction.json").is_file():
        return []
    fused = [path for name in (NETWORK_FUSION, *benchmark.cfg.fusions) if (path := fused_file(folder, name)).is_file()]
    return [folder / "prediction.json", folder / "field.npz", *fused]


def _third_party_file(benchmark: Benchmark, root: Path, case: Case) -> Path:
    """``SUITE/TASK/draw-D/ID.*``, or of inputs of its own ``TASK/ID.*`` or ``ID.*`` where one task has that id."""
    if case.suite != OWN:
        folders = [root / case.folder.parent]
    else:
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() == case.task]
        if sum(pair.id == case.id for pair in benchmark.data.pairs) == 1:
            folders.append(root)
    for folder in folders:
        found = [path for path in sorted(folder.glob("*")) if path.is_file() and image_name(path) == case.id]
        if len(found) == 1:
            return found[0]
        if found:
            raise EvaluationError(f"{folder}: {', '.join(p.name for p in found)} have one id; keep one of them")
    places = " or ".join(str(folder) for folder in folders) or f"{root / case.task}"
    raise EvaluationError(
        f"{root}: no fused image of {case.task} {case.id}; expected {case.id}.png in {places}; "
        "add it, or evaluate fewer suites"
    )


def _score_fused(benchmark: Benchmark, method: Method, case: Case, path: Path) -> Row:
    fixed, moving = benchmark.sources(case)
    fused, _ = grey_levels(read_image(path))
    if fused.shape != fixed.shape:
        raise EvaluationError(
            f"{path}: {fused.shape[::-1]} pixels; expected {fixed.shape[::-1]}, the size of its sources"
        )
    return {**_empty_row(benchmark, method, case), **fusion_metrics(fixed, moving, fused, PAPER_METRICS)}


def _empty_row(benchmark: Benchmark, method: Method, case: Case) -> Row:
    corruption = draw_corruption(case.index, case.draw) if case.suite == "corrupted" else ""
    return dict.fromkeys(COLUMNS) | {
        "method": method.name,
        "fusion": "",
        "suite": case.suite,
        "task": case.task,
        "id": case.id,
        "case": benchmark.pair(case).case,
        "draw": case.draw,
        "corruption": str(corruption),
        "reference": "truth" if method.kind == "fused" else benchmark.cfg.reference,
        "status": "",
    }


def _score_predictions(benchmark: Benchmark, root: Path, method: Method, cases: list[Case]) -> list[Row]:
    rows: list[Row] = []
    residuals = []
    mask = benchmark.data.mask[cases[0].index, 0].numpy() > 0
    seen = mask & head_mask(benchmark.data.moving[cases[0].index, 0].numpy())
    fixed, truth = benchmark.sources(cases[0])
    for case in cases:
        folder, inputs = root / case.folder, benchmark.inputs(case)
        record = _read_json(folder / "prediction.json")
        displacement, inverse = read_fields(folder)
        error = endpoint_error(inputs.known, displacement)
        inside = summarise(error, mask)
        residuals.append(endpoint_residual(inputs.known, displacement))
        moving = truth
        if benchmark.cfg.reference == "aligned":
            moving = np.rint(255 * align(inputs.moving, displacement).astype(np.float64))
        of_field = _empty_row(benchmark, method, case) | {
            **{name: record[name] for name in ("status", "seconds", "expected_error")},
            "error": inside.mean,
            "error_median": inside.median,
            "error_p95": inside.p95,
            "seen": summarise(error, seen).mean if seen.any() else None,
            "before": summarise(endpoint_error(inputs.known, np.zeros_like(displacement)), mask).mean,
            "inverse": None if inverse is None else inverse_consistency(displacement, inverse, mask).mean,
            "folds": folds(displacement).share,
        }
        files = {name: fused_file(folder, name) for name in (NETWORK_FUSION, *benchmark.cfg.fusions)}
        there = {name: path for name, path in files.items() if path.is_file()}
        for fusion, path in there.items():
            values = fusion_metrics(fixed, moving, _read_fused(path), PAPER_METRICS)
            rows.append({**of_field, "fusion": fusion, **values})
        if not there:  # a registration, and no plain fusion is asked for
            rows.append(of_field)
    if len(residuals) > 1:
        consistency = draw_consistency(residuals, mask)
        rows = [{**row, "consistency": consistency} for row in rows]
    return rows


def predict_methods(
    benchmark: Benchmark,
    out: Path,
    methods: Sequence[Method],
    *,
    device: str = "cpu",
    on_case: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Predictions of all methods that can run here; a competitor that cannot is left out.

    Returns:
        Why methods were left out, by name.
    """
    left_out = {}
    for method in methods:
        if method.kind == "fused":
            continue
        cases = benchmark.cases(method.draws(benchmark.cfg))

        def done(name: str = method.name) -> None:
            if on_case:
                on_case(name)

        try:
            with open_method(method, jobs=benchmark.cfg.jobs, device=device) as (predictor, settings):
                predict_method(benchmark, out, method.name, predictor, settings, cases=cases, on_case=done)
        except CompetitorError as error:
            left_out[method.name] = str(error)
    return left_out
