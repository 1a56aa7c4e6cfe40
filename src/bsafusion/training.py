"""Training: one loop, the same on CPU, CUDA and MPS, in one process or under ``torchrun``.

Everything random in step ``k`` is drawn from generators seeded by (seed, k, rank), so a run that is resumed
from a checkpoint goes on as if it had never stopped, on a CPU byte for byte. Checkpoints are safetensors: weights,
optimizer moments and, in the header, the step and what else the loop remembers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bsafusion import cuda, datasets, fusion_losses, losses, weights
from bsafusion.datasets import MISALIGNMENTS, Batch, Mix, Pair, PairSet
from bsafusion.deformation import warp
from bsafusion.failures import Doubtful, draw_doubtful
from bsafusion.files import write_whole
from bsafusion.image import TASKS
from bsafusion.io import write_image
from bsafusion.losses import LossWeights
from bsafusion.metrics import endpoint_error, summarise
from bsafusion.models.alignment import AlignmentCfg
from bsafusion.models.bsafusion import (
    ASSESSMENT_PREFIX,
    FUSION_PREFIXES,
    JUDGE_PREFIX,
    PRESETS,
    BSAFusion,
    BSAFusionCfg,
    working_shape,
)
from bsafusion.optimizer import Muon

Parts = Literal["all", "alignment", "fusion", "assessment"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainingCfg:
    """Options of a run.

    Attributes:
        parts: what is trained: ``alignment`` (encoder, MDF-FR, BSFA), ``fusion`` (MMFF alone), both (``all``), or the
            ``assessment`` of an alignment that was trained before.
        steps: optimizer steps; ``batch`` pairs each, over all processes.
        optimizer: ``muon`` (see ``optimizer``) or ``adamw``.
        lr: peak learning rate, reached after ``warmup`` steps, then a cosine down to ``lr / 100``.
        crop: side of a random window of the ``side`` x ``side`` images that a step sees; 0 for all of them (the
            assessment always sees all).
        precision: ``auto`` is bfloat16 autocast on CUDA and float32 elsewhere.
        record: on CUDA, replay the kernels of a step as one recorded graph (not with ``adapt_mu``).
        validate_every, checkpoint_every, log_every: in steps.
        average_every, average_from: every so many steps, from that one on, the weights enter a mean, and the mean is
            what is measured and kept (stochastic weight averaging; Izmailov et al., UAI 2018); 0 for none. It wants a
            rate that stays high: a large ``steps``, and an end before it.
        suites: misalignments validated on.
        aligned_share: share of the steps that see the truth instead of the network's own alignment, where ``fusion``
            alone is trained.
        fusion_reference: what the fused image is held against: the ``aligned`` image that it was made of, or the
            ``truth``, the moving image before it was deformed.
        adapt_mu: balance the two structural terms as published, instead of counting both alike.
        earlier_steps: what the field of each step of the alignment counts against that of the step after it.
    """

    parts: Parts = "all"
    steps: int = 20_000
    batch: int = 8
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0
    seed: int = 0
    side: int = 256
    crop: int = 0
    precision: Precision = "auto"
    record: bool = True
    validate_every: int = 1000
    checkpoint_every: int = 500
    log_every: int = 50
    average_every: int = 0
    average_from: int = 0
    suites: tuple[str, ...] = ("paper", "rigid", "large")
    aligned_share: float = 0.5
    fusion_reference: Literal["aligned", "truth"] = "truth"
    adapt_mu: bool = False
    earlier_steps: float = 0.7
    mix: Mix = field(default_factory=Mix)
    weights: LossWeights = field(default_factory=LossWeights)

    @classmethod
    def published(cls, **options: Any) -> TrainingCfg:
        """What the paper trains by; ``options``: any others."""
        published = {"optimizer": "adamw", "weights": LossWeights.published()}
        return cls(**{**published, "fusion_reference": "aligned", "adapt_mu": True, **options})

    def __post_init__(self) -> None:
        if self.parts not in get_args(Parts) or self.precision not in get_args(Precision):
            raise ValueError(
                f"parts {self.parts!r}, precision {self.precision!r}: expected one of "
                f"{', '.join(get_args(Parts))} and one of {', '.join(get_args(Precision))}"
            )
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer!r}: expected muon or adamw")
        if self.crop % 16 or not 0 <= self.crop <= self.side:
            raise ValueError(f"crop {self.crop}: expected a multiple of 16 up to side {self.side}, or 0 for no crop")
        if self.crop and self.parts == "assessment":
            raise ValueError(f"crop {self.crop}: the assessment is trained on whole pictures; leave crop out")
        if self.fusion_reference not in ("aligned", "truth"):
            raise ValueError(f"fusion_reference {self.fusion_reference!r}: expected aligned or truth")
        counts = ("steps", "batch", "validate_every", "checkpoint_every", "log_every")
        least = dict.fromkeys(counts, 1)
        least |= dict.fromkeys(("warmup", "weight_decay", "aligned_share", "average_every", "average_from"), 0)
        for name, value in least.items():
            if not value <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {value}, and finite")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number above 0, and finite")
        if not 0 <= self.earlier_steps <= 1:
            raise ValueError(f"earlier_steps {self.earlier_steps}: expected 0 to 1")
        if self.aligned_share > 1:
            raise ValueError(f"aligned_share {self.aligned_share}: expected at most 1")
        if self.aligned_share != TrainingCfg.aligned_share and self.parts != "fusion":
            raise ValueError(
                f"aligned_share {self.aligned_share}: only a run of fusion alone sees the truth; leave it out, or "
                "train alignment first and fusion after it"
            )
        unknown = set(self.suites) - set(MISALIGNMENTS)
        if unknown or not self.suites:
            wrong = f"unknown suites {sorted(unknown)}" if unknown else "no suites"
            raise ValueError(f"{wrong}; expected some of {', '.join(MISALIGNMENTS)}")


def learning_rate(step: int, cfg: TrainingCfg) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``lr / 100``."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    part = (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1)
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * part))))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what is random in one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) % 2**63


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The generator of one step of one process."""
    return torch.Generator(device=device).manual_seed(step_seed(seed, step, rank))


# --- processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Rank and number of processes; joins the group that ``torchrun`` has set up, if it has."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    """Mean of the gradients over all processes, in one exchange."""
    if world == 1:
        return
    reached = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in reached if p.grad is not None])
    dist.all_reduce(flat)
    flat /= world
    for p, g in zip(reached, torch.split(flat, [p.numel() for p in reached]), strict=True):
        p.grad = g.view_as(p)


def mean_over_processes(value: Tensor) -> float:
    """The mean of one number over all processes, the same on each."""
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return float(value)


def any_process(value: bool, device: torch.device) -> bool:
    """Whether it holds on any process, the same answer on each."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    return mean_over_processes(torch.tensor(float(value), device=device)) > 0


# --- one step -------------------------------------------------------------------------------------


def is_trained(name: str, parts: Parts) -> bool:
    """Whether the parameter of this name learns in a run of ``parts``."""
    if name.startswith(JUDGE_PREFIX):
        return False
    if name.startswith(ASSESSMENT_PREFIX):
        return parts == "assessment"
    return parts in ("all", "fusion" if name.startswith(FUSION_PREFIXES) else "alignment")


class Objective:
    """The named loss terms of a batch; remembers ``mu``, the balance of the two structural terms.

    Raises:
        ValueError: the assessment is to be trained of a network that has none.
    """

    def __init__(self, model: BSAFusion, cfg: TrainingCfg) -> None:
        self.model, self.cfg, self.mu = model, cfg, 1.0
        self.wanted = losses.active(cfg.weights)
        self.aligning, self.fusing = cfg.parts in ("all", "alignment"), cfg.parts in ("all", "fusion")
        model.representation.judging = self.aligning and "ce2" in self.wanted
        if cfg.parts == "assessment":
            model.alignment.start_assessing()

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of the run."""
        bfloat16 = self.cfg.precision == "bfloat16" or (self.cfg.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)

    def assess(self, doubtful: Doubtful) -> Tensor:
        """The term of the assessment."""
        batch = doubtful.batch
        with self.autocast(batch.fixed.device):
            alignment = self.model.match(batch.fixed, batch.moving, mirrored="never").alignment
        return losses.assessment_loss(alignment, batch.known, batch.mask, doubtful.hopeless)

    def backward(self, drawn: Batch | Doubtful, *, truly_aligned: bool) -> dict[str, Tensor]:
        """Gradients, added to what there is; returns the loss, its terms and figures to be shown, on the device."""
        figures: dict[str, Tensor] = {}
        if isinstance(drawn, Doubtful):
            terms = {"assessment": self.assess(drawn)}
        else:
            self.model.representation.refresh_judge()
            terms, figures = self(drawn, truly_aligned=truly_aligned)
        loss = losses.total_loss(terms, self.cfg.weights)
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: value.detach() for name, value in {"loss": loss, **terms, **figures}.items()}

    def __call__(self, batch: Batch, *, truly_aligned: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms to be weighted and summed, and figures to be shown; ``truly_aligned``: fusion sees the truth."""
        cfg, model = self.cfg, self.model
        moving = batch.truth if truly_aligned else batch.moving
        with self.autocast(batch.fixed.device):
            with contextlib.nullcontext() if self.aligning else torch.no_grad():
                matched = model.match(batch.fixed, moving, aligned_already=truly_aligned)
            alignment = matched.alignment
            if self.fusing:
                if not self.aligning:  # with gradients: the shallow features of the default preset serve fusion alone
                    matched = model.see_again(batch.fixed, moving, matched)
                fused, aligned = model.fuse(batch.fixed, moving, matched, alignment.displacement)
        terms: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        if self.aligning:
            weight = batch.mask * 0.98 + 0.02  # outside the head the field follows, but hardly counts
            terms["field"], error = losses.field_loss(alignment, batch.known, weight, decay=cfg.earlier_steps)
            figures["epe"] = error
            terms["smooth"] = losses.smooth_loss(alignment)
            terms["ce1"], terms["ce2"] = losses.modality_losses(
                matched.representation, batch.modality_fixed, batch.modality_moving, confuse="ce2" in self.wanted
            )
            if "match" in self.wanted and any(s.match_logits is not None for s in alignment.steps):
                terms["match"] = losses.match_loss(alignment, batch.known, batch.mask)
            if "error" in self.wanted:
                terms["error"] = losses.error_loss(alignment, batch.known, batch.mask)
            if "consistency" in self.wanted:
                height, width = moving.shape[-2:]
                warped = warp(moving[:, :1], alignment.displacement[..., :height, :width])
                terms["consistency"] = losses.consistency_loss(warped, batch.truth[:, :1])
        if self.fusing:
            shown = batch.truth[:, :1] if cfg.fusion_reference == "truth" else aligned.detach()
            terms |= self.fusion_terms(fused, batch.fixed, shown)
        return {name: term for name, term in terms.items() if name in self.wanted}, figures

    def fusion_terms(
        self, fused: Tensor, fixed: Tensor, moving: Tensor, *, mu: float | None = None
    ) -> dict[str, Tensor]:
        """What the weights ask for of the fused image, against its two sources; ``mu``: in place of the run's own."""
        sources, wanted = (fixed, moving), self.wanted
        terms: dict[str, Tensor] = {}
        if "structure" in wanted:
            unlike_fixed, unlike_moving = fusion_losses.structure_losses(fused, *sources)
            terms["structure"] = unlike_fixed + (self.mu if mu is None else mu) * unlike_moving
            if self.cfg.adapt_mu and fused.requires_grad:
                ratio = mean_over_processes(unlike_moving.detach() / unlike_fixed.detach().clamp(min=1e-6))
                self.mu = 0.999 * self.mu + 0.001 * min(max(ratio, 0.2), 5.0)
        if {"information", "fidelity"} & wanted:
            terms["information"], terms["fidelity"] = fusion_losses.information_losses(fused, *sources)
        for name in ("gradient", "intensity", "highlight", "edge", "visibility", "salience"):
            if name in wanted:
                terms[name] = getattr(fusion_losses, f"{name}_loss")(fused, *sources)
        return terms


def draw(cfg: TrainingCfg, data: PairSet, size: int, generator: torch.Generator) -> Batch | Doubtful:
    """What a step sees."""
    device = generator.device
    if cfg.parts == "assessment":  # whole pictures: what is judged is the result as a user gets it
        return draw_doubtful(data, size, cfg.mix, generator, device=device)
    batch = datasets.draw_batch(data, size, cfg.mix, generator, device=device)
    return datasets.crop_batch(batch, cfg.crop, generator) if cfg.crop else batch


class Gradients:
    """The gradients of a batch, by :meth:`Objective.backward` or, on CUDA, by a recording of it."""

    def __init__(self, objective: Objective, parameters: list[torch.nn.Parameter], device: torch.device) -> None:
        cfg = objective.cfg
        self.objective, self.parameters = objective, parameters
        self.recording = device.type == "cuda" and cfg.record and not cfg.adapt_mu
        self.recordings: dict[bool, Callable[[Batch | Doubtful], dict[str, Tensor]]] = {}

    def __call__(self, drawn: Batch | Doubtful, step: int) -> dict[str, Tensor]:
        """Of the step's batch alone; returns what :meth:`Objective.backward` does."""
        cfg = self.objective.cfg
        truly = cfg.parts == "fusion" and step % 100 < 100 * cfg.aligned_share
        if not self.recording:
            for p in self.parameters:
                p.grad = None
            return self.objective.backward(drawn, truly_aligned=truly)
        if truly not in self.recordings:

            def work(given: Batch | Doubtful) -> dict[str, Tensor]:
                return self.objective.backward(given, truly_aligned=truly)

            self.recordings[truly] = cuda.recorded(work, drawn, self.parameters)
        return self.recordings[truly](drawn)


# --- validation: predictions put the network in evaluation mode ----------------------------------


@torch.inference_mode()
def validate(
    model: BSAFusion,
    data: PairSet,
    suites: tuple[str, ...],
    *,
    device: torch.device,
    draws: int = 1,
    batch: int = 4,
) -> dict[str, float]:
    """Mean endpoint error inside the head, pixels: keys ``SUITE/TASK`` and ``SUITE/TASK/before``."""
    figures: dict[str, float] = {}
    for suite in suites:
        for task in TASKS:
            indices = data.indices(task)
            errors, before = [], []
            for draw in range(draws):
                for start in range(0, len(indices), batch):
                    b = datasets.validation_batch(
                        data, indices[start : start + batch], MISALIGNMENTS[suite], draw=draw, device=device
                    )
                    found = model.predict_alignment(b.fixed, b.moving, mirrored="never").alignment
                    fields = found.displacement.float().cpu().numpy()
                    known, mask = b.known.cpu().numpy(), b.mask.cpu().numpy() > 0.5
                    for i in range(len(fields)):
                        errors.append(summarise(endpoint_error(known[i], fields[i]), mask[i, 0]).mean)
                        before.append(summarise(endpoint_error(known[i], 0 * fields[i]), mask[i, 0]).mean)
            if indices:
                figures[f"{suite}/{task}"] = float(np.mean(errors))
                figures[f"{suite}/{task}/before"] = float(np.mean(before))
    return figures


def alignment_score(figures: dict[str, float]) -> float:
    """What is left of the misalignment, mean over suites and tasks; the smaller the better."""
    shares = [value / figures[f"{key}/before"] for key, value in figures.items() if not key.endswith("/before")]
    return float(np.mean(shares))


@torch.inference_mode()
def fusion_score(objective: Objective, data: PairSet, *, device: torch.device) -> float:
    """The weighted fusion loss on the validation pairs, misaligned as in the paper; smaller is better.

    Both structural terms count alike: by the run's own balance, which moves, one validation would not compare with the
    next.
    """
    model, values = objective.model, []
    for start in range(0, len(data), 4):
        indices = list(range(start, min(start + 4, len(data))))
        b = datasets.validation_batch(data, indices, MISALIGNMENTS["paper"], draw=0, device=device)
        out = model.predict(b.fixed, b.moving, mirrored="never")
        shown = b.truth[:, :1] if objective.cfg.fusion_reference == "truth" else out.aligned
        terms = objective.fusion_terms(out.fused, b.fixed, shown, mu=1.0)
        values.append(losses.total_loss(terms, objective.cfg.weights))
    return float(torch.stack(values).mean())


@torch.inference_mode()
def assessment_score(objective: Objective, data: PairSet, *, device: torch.device, batches: int = 24) -> float:
    """The assessment's loss on fixed draws of validation pairs, spoilt like those of training; smaller is better."""
    was_training, values = objective.model.training, []
    objective.model.eval()
    for index in range(batches):
        doubtful = draw_doubtful(data, 8, objective.cfg.mix, step_generator(0, index, 0, device), device=device)
        values.append(objective.assess(doubtful))
    objective.model.train(was_training)
    return float(torch.stack(values).mean())


@torch.inference_mode()
def picture_grid(model: BSAFusion, data: PairSet, *, device: torch.device, rows: int = 2) -> Tensor:
    """``rows`` pairs of each task as fixed, moving, aligned, fused side by side: ``H W`` in [0, 1]."""
    lines = []
    for task in TASKS:
        indices = data.indices(task)
        indices = indices[:: max(len(indices) // rows, 1)][:rows]
        if indices:
            b = datasets.validation_batch(data, indices, MISALIGNMENTS["rigid"], draw=0, device=device)
            out = model.predict(b.fixed, b.moving, mirrored="never")
            panels = torch.cat([b.fixed, b.moving[:, :1], out.aligned, out.fused], dim=3).float().cpu()
            lines.append(panels.flatten(0, 2))
    return torch.cat(lines)


# --- checkpoints ----------------------------------------------------------------------------------


class Average:
    """The mean of a network's trained weights at several steps; its other values are the network's own."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters, self.count = parameters, 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self) -> None:
        """The weights as they are now."""
        self.count += 1
        for name, value in self.parameters.items():
            mean = self.mean.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
            mean += (value - mean) / self.count

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The network has the mean, if there is one, in place of its own weights."""
        own = {name: self.parameters[name].clone() for name in self.mean}
        for name, mean in self.mean.items():
            self.parameters[name].copy_(mean)
        yield
        for name, value in own.items():
            self.parameters[name].copy_(value)


def save_checkpoint(
    path: Path,
    model: BSAFusion,
    optimizer: torch.optim.Optimizer,
    memory: dict[str, Any],
    mean: Mapping[str, Tensor] | None = None,
) -> None:
    """Weights, their ``mean``, moments and ``memory`` (JSON) in one safetensors file, written whole."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"mean.{k}": v for k, v in (mean or {}).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    with write_whole(path) as aside:
        weights.write_tensors(aside, tensors, metadata={"memory": json.dumps(memory)})


def _open_checkpoint(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a checkpoint ({error}); remove it to start the run anew") from error


def read_memory(path: Path) -> dict[str, Any]:
    """What the loop remembered. Raises ``ValueError`` for a file that is damaged or no checkpoint."""
    with _open_checkpoint(path) as file:
        metadata = file.metadata() or {}
    if "memory" not in metadata:
        raise ValueError(f"{path}: not a checkpoint (no memory in it); remove it to start the run anew")
    memory: dict[str, Any] = json.loads(metadata["memory"])
    return memory


def load_checkpoint(path: Path, model: BSAFusion, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Fill model and optimizer from :func:`save_checkpoint`'s file; returns the mean."""
    with _open_checkpoint(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return {k.removeprefix("mean."): v for k, v in tensors.items() if k.startswith("mean.")}


def _appended(name: str, mine: AlignmentCfg, theirs: AlignmentCfg) -> int:
    """How many channels the layer of this parameter sees after those that it saw with the options ``theirs``.

    Only what a local step is handed by those before it comes last; a larger window, say, moves all other channels.
    """
    found = re.fullmatch(r"alignment\.steps\.(\w+)\.body\.0\.weight", name)
    if found is None:
        return 0
    step = found[1].replace("_", "/")
    alike = [(cfg.of(cfg.radius, step), cfg.context) for cfg in (mine, theirs) if step in cfg.steps]
    return mine.carried(step) - theirs.carried(step) if alike[:1] == alike[1:] else 0


def start_from(model: BSAFusion, path: str) -> list[str]:
    """Fill what fits from another weight file (a stage trained before); returns what stays as drawn.

    A step that is handed more by those before it than it was there gives the new channels no weight.

    Raises:
        ValueError: the weights are of another preset.
    """
    source, record = weights.load(path)
    if record.preset != model.cfg.preset:
        raise ValueError(
            f"{path} holds weights of the preset {record.preset!r}, this run trains {model.cfg.preset!r}, whose layers "
            "are others; give weights of the same preset, or none"
        )
    mine, theirs = model.state_dict(), source.state_dict()
    fitting = {}
    for name, values in theirs.items():
        more = _appended(name, model.cfg.alignment, source.cfg.alignment)
        if more > 0:
            nothing = values.new_zeros(values.shape[0], more, *values.shape[2:])
            values = torch.cat([values, nothing], dim=1)
        if name in mine and mine[name].shape == values.shape:
            fitting[name] = values
    model.load_state_dict({**mine, **fitting})
    return sorted(set(mine) - set(fitting))


# --- the loop -------------------------------------------------------------------------------------


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """Of what pairs show and how they are told apart, in their order; where their files lie does not count."""
    digest = hashlib.sha256()
    for pair in pairs:
        files = [weights.file_sha256(path) for path in (pair.fixed, pair.moving)]
        digest.update(json.dumps([pair.task, pair.id, pair.split, pair.case, *files]).encode())
    return digest.hexdigest()


Report = Callable[[int, dict[str, float]], None]


def _tell_new(names: Sequence[str], init: str) -> str:
    """In one line, which layers ``init`` did not fill."""
    layers = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return f"not filled by {init}, they begin as drawn: {', '.join(layers[:8])}{more}"


def train(
    pairs: Path,
    out: Path,
    *,
    model_cfg: BSAFusionCfg | None = None,
    cfg: TrainingCfg | None = None,
    device: str = "cpu",
    init: str | None = None,
    on_step: Report | None = None,
    on_note: Callable[[str], None] | None = None,
    until: int | None = None,
    minutes: float | None = None,
) -> Path:
    """Train on ``split == train`` of a pairs CSV, validate on ``val``, keep the best weights.

    Args:
        pairs: see ``datasets.read_pairs``.
        out: folder of the run: ``checkpoint.safetensors`` (a run found there is resumed),
            ``best.safetensors`` with its record, ``last.safetensors``, ``log.jsonl``, ``val_NNNNNN.png`` and
            tensorboard events.
        init: weights to start from.
        on_step: called after every step with the step's number and its figures (on CUDA the latest that were read).
        on_note: told which layers ``init`` does not fill and how many pairs are of other splits, if there are any.
        until: stop (with a checkpoint) after this step, at least 1; the schedule still runs to ``cfg.steps``.
        minutes: stop likewise, at the end of the step in which they are over.

    Returns:
        The path of the best weights, or of the last ones where there is no validation split.

    Raises:
        ValueError: the run found in ``out`` has other options or saw other data, ``init`` is of another preset or one
            of its own results, or there is no pair to train on.
        FloatingPointError: the loss is not finite any more.
    """
    cfg, model_cfg = cfg or TrainingCfg(), model_cfg or PRESETS["default"]()
    _check_arguments(out, model_cfg, cfg, init=init, until=until, minutes=minutes)
    where, started = cuda.device_of_process(device, os.environ.get("LOCAL_RANK")), time.perf_counter()
    if where.type == "cuda":
        torch.cuda.set_device(where)  # for what takes the current one: NCCL, recording
    with processes(where) as (rank, world):
        if cfg.batch % world:
            raise ValueError(f"batch {cfg.batch} does not divide among {world} processes; choose a multiple")
        model = _new_model(model_cfg, cfg, init, on_note).to(where).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        method = {"muon": Muon, "adamw": torch.optim.AdamW}[cfg.optimizer]
        optimizer: torch.optim.Optimizer = method(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)
        objective = Objective(model, cfg)
        average = Average({name: p for name, p in model.named_parameters() if p.requires_grad})
        data, val = _read_splits(pairs, cfg.side, where, on_note)

        checkpoint = out / "checkpoint.safetensors"
        options = json.loads(json.dumps({"training": asdict(cfg), "model": model_cfg.to_dict(), "init": init}))
        seen = pairs_sha256([*data.pairs, *(val.pairs if val else ())])
        step, best = 0, float("inf")
        if checkpoint.is_file():
            memory = read_memory(checkpoint)
            _check_same_run(out, memory, options, seen, world)
            mean = load_checkpoint(checkpoint, model, optimizer)
            average.mean = {name: value.to(where) for name, value in mean.items()}
            average.count = memory.get("averaged", 0)
            step, best, objective.mu = memory["step"], memory["best"], memory["mu"]
        elif rank == 0:  # an earlier run's best weights are not this one's
            for ending in (".safetensors", ".json"):
                (out / f"best{ending}").unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        board = _Board(out, step) if rank == 0 else None

        def keep(name: str, figures: dict[str, float]) -> None:
            weights.save(
                out,
                name,
                model.state_dict(),
                preset=model_cfg.preset,
                config=model_cfg.to_dict(),
                tasks=tuple(t for t in TASKS if data.indices(t)),
                data=f"{len(data)} pairs of {pairs.name}",
                steps=step,
                figures=figures,
            )

        last = cfg.steps if until is None else min(cfg.steps, until)
        first, first_started = step, time.perf_counter()
        gradients = Gradients(objective, parameters, where)
        # Reading a figure waits for the device: on CUDA not at every step.
        read_every = 1 if where.type == "cpu" else 20
        figures: dict[str, float] = {}
        draws = cuda.ahead(
            lambda step: draw(cfg, data, cfg.batch // world, step_generator(cfg.seed, step, rank, where)),
            range(step, last),
            where,
        )
        for drawn in draws:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            torch.manual_seed(step_seed(cfg.seed, step, rank))  # of dropout
            said = gradients(drawn, step)
            step += 1
            if minutes is not None and any_process(time.perf_counter() - started > 60 * minutes, where):
                last = step
            times = (cfg.log_every, cfg.validate_every, cfg.checkpoint_every, read_every)
            if step in (cfg.steps, last) or any(step % every == 0 for every in times):
                figures = {name: float(value) for name, value in said.items()}
                if not np.isfinite(figures["loss"]):
                    raise FloatingPointError(
                        f"the loss is {figures['loss']} at step {step - 1}; expected a finite one; "
                        f"train again into another folder than {out}, with a smaller lr"
                    )
                figures["pairs_per_second"] = cfg.batch * (step - first) / (time.perf_counter() - first_started)
            average_gradients(parameters, world)
            torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
            optimizer.step()
            if cfg.average_every and step >= cfg.average_from and step % cfg.average_every == 0:
                average.add()
            if board is not None:
                if on_step:
                    on_step(step, figures)
                if step % cfg.log_every == 0:
                    board.log("train", step, figures)
                if val is not None and (step % cfg.validate_every == 0 or step == cfg.steps):
                    with average.in_place():
                        measured, score = _scored(objective, val, where)
                        board.log("val", step, measured)
                        board.picture(step, picture_grid(model, val, device=where))
                        if score < best:
                            best = score
                            keep("best", measured)
                    model.train()
                if step % cfg.checkpoint_every == 0 or step == last:
                    memory = {"options": options, "pairs_sha256": seen, "processes": world}
                    memory |= {"step": step, "best": best, "mu": objective.mu, "averaged": average.count}
                    save_checkpoint(checkpoint, model, optimizer, memory, average.mean)
            if world > 1:
                dist.barrier()  # the others wait while the first validates
            if step == last:
                break
        if board is not None:
            with average.in_place():
                keep("last", {})
            board.close()
        return out / ("best.safetensors" if (out / "best.safetensors").is_file() else "last.safetensors")


def _check_arguments(
    out: Path, model_cfg: BSAFusionCfg, cfg: TrainingCfg, *, init: str | None, until: int | None, minutes: float | None
) -> None:
    if working_shape((cfg.side, cfg.side), model_cfg.working_side) != (cfg.side, cfg.side):
        raise ValueError(
            f"side {cfg.side} is not near working_side {model_cfg.working_side}; train at the working size"
        )
    if until is not None and until < 1:
        raise ValueError(f"until step {until}: expected at least 1")
    if init and Path(init).resolve() in ((out / f"{name}.safetensors").resolve() for name in ("best", "last")):
        raise ValueError(f"init {init} lies in {out}, whose weights the run replaces; choose another folder for it")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"{minutes} minutes: expected 0 or more")


def _new_model(
    model_cfg: BSAFusionCfg, cfg: TrainingCfg, init: str | None, on_note: Callable[[str], None] | None
) -> BSAFusion:
    """As it begins, drawn from the seed or from ``init``; only what ``cfg.parts`` trains asks for gradients."""
    torch.manual_seed(cfg.seed)
    model = BSAFusion(model_cfg)
    if init:
        new = start_from(model, init)
        if new and on_note:
            on_note(_tell_new(new, init))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, cfg.parts))
    return model


def _read_splits(
    pairs: Path, side: int, where: torch.device, on_note: Callable[[str], None] | None
) -> tuple[PairSet, PairSet | None]:
    """The training pairs, and those of validation if there are any."""
    everything = datasets.read_pairs(pairs)
    others = Counter(p.split for p in everything if p.split not in ("train", "val"))
    if others and on_note:
        counts = ", ".join(f"{count} of split {name!r}" for name, count in others.items())
        on_note(f"pairs that are neither 'train' nor 'val' are left out: {counts}")
    data = PairSet(datasets.read_pairs(pairs, split="train"), side=side).to(where)
    held_out = [p for p in everything if p.split == "val"]
    return data, PairSet(held_out, side=side).to(where) if held_out else None


def _scored(objective: Objective, val: PairSet, where: torch.device) -> tuple[dict[str, float], float]:
    """What is measured on the validation pairs, and the one number by which weights are chosen; less is better."""
    measured: dict[str, float] = {}
    score = 0.0
    if objective.aligning:
        measured = validate(objective.model, val, objective.cfg.suites, device=where)
        score = alignment_score(measured)
    if objective.fusing:
        measured["fusion_loss"] = fusion_score(objective, val, device=where)
        score += measured["fusion_loss"]
    if objective.cfg.parts == "assessment":
        score = measured["assessment_loss"] = assessment_score(objective, val, device=where)
    return measured, score


def _check_same_run(out: Path, memory: dict[str, Any], options: dict[str, Any], seen: str, world: int) -> None:
    """Raise ``ValueError`` unless the run in ``out``, of which ``memory`` tells, has these options, pairs and number of
    processes."""
    there, here = memory["options"], options
    if there != here:
        changed = sorted(k for k in here["training"] if there["training"].get(k) != here["training"][k])
        raise ValueError(
            f"{out} holds a run with other options ({', '.join(changed) or 'model or init'} differ); "
            "choose another folder or the same options"
        )
    if "pairs_sha256" not in memory:
        raise ValueError(
            f"{out} holds a run of an earlier version, which does not say what pairs it saw; choose another folder"
        )
    if memory["pairs_sha256"] != seen:
        raise ValueError(
            f"{out} holds a run that saw other pairs (rows of train and val, or the bytes of their images, differ); "
            "choose another folder or the same pairs"
        )
    if memory.get("processes", world) != world:  # each draws pairs of its own
        raise ValueError(
            f"{out} holds a run of {memory['processes']} process(es), this one has {world}; expected as many, for the "
            "same pairs to be drawn; choose another folder or go on with as many"
        )


class _Board:
    """Where figures go: a JSON line each, and tensorboard where it is installed.

    What is told there of steps after ``step``, from where the run goes on, is dropped: they come again.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.out = out
        log = out / "log.jsonl"
        if log.is_file():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            with write_whole(log) as aside:
                aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def log(self, kind: str, step: int, figures: dict[str, float]) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(
                json.dumps({"kind": kind, "step": step, **{k: round(v, 5) for k, v in figures.items()}}) + "\n"
            )
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def picture(self, step: int, grid: Tensor) -> None:
        write_image(self.out / f"val_{step:06d}.png", grid.numpy()[None], value_range=(0, 1))
        if self.writer is not None:
            self.writer.add_image("val/fixed, moving, aligned, fused", grid[None], step)


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite for one that a crash has cut short."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
