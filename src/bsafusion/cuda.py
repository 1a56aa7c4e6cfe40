"""What keeps a GPU busy in training: batches drawn ahead on a stream of their own, and the kernels of a step recorded
once and replayed.

A step is thousands of small kernels; told one by one, a fast GPU waits for each. Both need a step that never asks the
device for an answer (a test holds it to that).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

Drawn = TypeVar("Drawn")

AHEAD = 2
"""Batches that wait, at most."""

WARM_UP = 3
"""Steps before recording, in which libraries choose their kernels."""


def device_of_process(device: str, local_rank: str | None) -> torch.device:
    """``cuda`` is the first GPU, or under ``torchrun``, which numbers a machine's processes, the one of that number."""
    return torch.device("cuda", int(local_rank or 0)) if device == "cuda" else torch.device(device)


def tensors_of(nested: Any) -> list[Tensor]:
    """The tensors of a tuple of tensors and tuples, in order."""
    return [nested] if isinstance(nested, Tensor) else [t for part in nested for t in tensors_of(part)]


def ahead(draw: Callable[[int], Drawn], steps: Sequence[int], device: torch.device) -> Iterator[Drawn]:
    """``draw(step)`` for each step in turn; on CUDA by a thread of its own while the one before is worked on.

    ``draw`` gives a tuple of tensors and tuples, the same whenever it is called.
    """
    if device.type != "cuda":
        yield from map(draw, steps)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def aside(step: int) -> tuple[Drawn, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            drawn = draw(step)
            return drawn, stream.record_event()

    left = iter(steps)
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(aside, step) for step in islice(left, AHEAD))
        while waiting:
            drawn, ready = waiting.popleft().result()
            waiting.extend(pool.submit(aside, step) for step in islice(left, 1))
            here = torch.cuda.current_stream(device)
            here.wait_event(ready)
            for tensor in tensors_of(drawn):
                if tensor.is_cuda:
                    tensor.record_stream(here)  # not to be overwritten before it was read
            yield drawn


def recorded(
    work: Callable[[Drawn], dict[str, Tensor]], example: Drawn, parameters: list[torch.nn.Parameter]
) -> Callable[[Drawn], dict[str, Tensor]]:
    """``work`` as one CUDA graph, recorded on ``example``.

    Args:
        work: sets the gradients of ``parameters`` (which have none when it is called) and says what came out of it, as
            tensors on the device.
        example: what ``work`` takes; all that the graph is given later has its shapes.

    Returns:
        The same as ``work``, but it says its answer in the same tensors each time.
    """
    drawn: Drawn = _copied(example)
    here = torch.cuda.current_stream()
    seen = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def forget() -> None:
        for p in parameters:
            p.grad = None

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        seen.wait_stream(here)
        with torch.cuda.stream(seen):
            for _ in range(WARM_UP):
                forget()
                work(drawn)
        here.wait_stream(seen)
        forget()
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does is recorded: another draws the next batch meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            answer = work(drawn)
    gradients = [p.grad for p in parameters]

    def replay(given: Drawn) -> dict[str, Tensor]:
        for mine, its in zip(tensors_of(drawn), tensors_of(given), strict=True):
            mine.copy_(its)
        graph.replay()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        return answer

    return replay


def _copied(nested: Any) -> Any:
    return nested.clone() if isinstance(nested, Tensor) else type(nested)(*map(_copied, nested))
