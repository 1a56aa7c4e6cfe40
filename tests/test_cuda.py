"""A step that a GPU need not be waited for: drawn ahead, recorded, replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsafusion import cuda
from bsafusion.datasets import Batch, PairSet, read_pairs
from bsafusion.failures import Doubtful
from bsafusion.losses import LossWeights
from bsafusion.models.bsafusion import PRESETS, BSAFusion, BSAFusionCfg
from bsafusion.training import Gradients, Objective, TrainingCfg, draw, is_trained, step_generator

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class CopiesFromTheHost(TorchDispatchMode):
    """Counts tensors made of Python numbers: on a GPU each is a copy that is waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "lift_fresh" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "parts"),
    [(preset, parts) for preset in PRESETS for parts in ("alignment", "fusion")] + [("default", "assessment")],
)
def test_a_step_never_asks_the_device(preset: str, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whoever asks for one gets an error."""
    monkeypatch.setattr(Objective, "autocast", lambda *_: torch.autocast("cpu", enabled=False))
    if preset == "paper":
        cfg = TrainingCfg.published(parts=parts, adapt_mu=False)  # which asks, and is not recorded
    else:
        cfg = TrainingCfg(parts=parts, weights=LossWeights(gradient=1))
    model = BSAFusion(PRESETS[preset]()).to("meta").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, parts))
    objective = Objective(model, cfg)

    def images(channels: int) -> Tensor:
        return torch.empty(2, channels, 256, 256, device="meta")

    numbers = torch.zeros(2, dtype=torch.long, device="meta")
    batch = Batch(images(1), images(3), images(3), images(2), images(1), numbers, numbers, numbers)
    drawn = Doubtful(batch, numbers > 0) if parts == "assessment" else batch
    with CopiesFromTheHost() as copies:
        said = objective.backward(drawn, truly_aligned=False)
    assert copies.count == 0
    assert said["loss"].device.type == "meta"
    assert all(p.grad is not None for n, p in model.named_parameters() if is_trained(n, parts) and "chroma" not in n)


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("cuda", None, "cuda:0"),
        ("cuda", "0", "cuda:0"),
        ("cuda", "3", "cuda:3"),
        ("cuda:1", "3", "cuda:1"),
        ("cpu", "3", "cpu"),
        ("mps", None, "mps"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(device: str, local_rank: str | None, expected: str) -> None:
    assert str(cuda.device_of_process(device, local_rank)) == expected


def test_a_step_of_the_cpu_is_drawn_when_it_is_wanted() -> None:
    drawn: list[int] = []

    def numbers(step: int) -> tuple[Tensor]:
        drawn.append(step)
        return (torch.tensor(step),)

    steps: Iterator[tuple[Tensor]] = cuda.ahead(numbers, range(3, 6), torch.device("cpu"))
    assert int(next(steps)[0]) == 3
    assert drawn == [3]
    assert [int(step[0]) for step in steps] == [4, 5]


def test_the_tensors_of_a_doubtful_batch_come_in_order() -> None:
    parts = [torch.tensor(i) for i in range(9)]
    assert [int(t) for t in cuda.tensors_of(Doubtful(Batch(*parts[:8]), parts[8]))] == list(range(9))


# --- where there is one ---------------------------------------------------------------------------


@needs_cuda
def test_what_is_drawn_ahead_is_what_would_have_been_drawn(pairs_csv: Path) -> None:
    device = torch.device("cuda")
    data = PairSet(read_pairs(pairs_csv, split="train"), side=65).to(device)

    def of(step: int) -> Batch | Doubtful:
        return draw(TrainingCfg(side=65), data, 4, step_generator(0, step, 0, device))

    for step, batch in enumerate(cuda.ahead(of, range(6), device)):
        for mine, its in zip(cuda.tensors_of(batch), cuda.tensors_of(of(step)), strict=True):
            torch.testing.assert_close(mine, its)


@needs_cuda
@pytest.mark.parametrize("parts", ["alignment", "fusion", "assessment"])
def test_a_recording_gives_the_gradients_of_the_step_itself(
    parts: Any, pairs_csv: Path, training_cfg: BSAFusionCfg
) -> None:
    device = torch.device("cuda")
    data = PairSet(read_pairs(pairs_csv, split="train"), side=65).to(device)
    cfg = TrainingCfg(parts=parts, side=65, precision="float32")
    model = BSAFusion(training_cfg).to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, parts))
    parameters = [p for p in model.parameters() if p.requires_grad]
    eagerly = Gradients(Objective(model, replace(cfg, record=False)), parameters, device)
    recorded = Gradients(Objective(model, cfg), parameters, device)
    for step in (0, 60, 1, 61):  # fusion sees the truth in the first half of each hundred
        batch = draw(cfg, data, 2, step_generator(0, step, 0, device))
        wanted = eagerly(batch, step)
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        said = recorded(batch, step)
        for name, value in wanted.items():
            torch.testing.assert_close(said[name], value, rtol=1e-3, atol=1e-4)
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                assert p.grad is not None
                torch.testing.assert_close(p.grad, gradient, rtol=1e-2, atol=1e-3)
