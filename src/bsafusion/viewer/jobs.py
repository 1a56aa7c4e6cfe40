"""One pair at a time: a worker thread with the model, and what the page is told while it works."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bsafusion.errors import log
from bsafusion.image import Image
from bsafusion.pipeline import Model, fuse, load_model
from bsafusion.report import ALIGN_AND_FUSE, ALIGN_ONLY, FUSE_ONLY
from bsafusion.request import FuseOptions, check_task
from bsafusion.viewer.results import Library, told, view_of

_STAGES = ("waiting for the model", "{work}", "writing the result", "done")
_WORK = {ALIGN_AND_FUSE: "aligning and fusing", FUSE_ONLY: "fusing", ALIGN_ONLY: "aligning"}


class Busy(RuntimeError):
    """Another pair is being fused."""


class _Cancelled(Exception):
    """The page does not want this result any more."""


@dataclass
class Job:
    """A pair on its way. ``state`` is running, done, failed or cancelled; ``result`` a key of the library."""

    id: str
    options: FuseOptions
    state: str = "running"
    stage: int = 0
    message: str = ""
    result: str | None = None

    def describe(self) -> dict[str, Any]:
        """For the page; ``progress`` is a share."""
        return {
            "id": self.id,
            "state": self.state,
            "stage": _STAGES[self.stage].format(work=_WORK[self.options.mode]),
            "progress": (self.stage + 0.5) / len(_STAGES) if self.state == "running" else 1.0,
            "message": self.message,
            "result": self.result,
        }


class Jobs:
    """Fuses one pair at a time into folders below ``folder``.

    The worker thread loads the model when :meth:`warm` is first called, so that the page has opened by then.
    """

    def __init__(self, library: Library, folder: Path, *, weights: str, device: str) -> None:
        self._library = library
        self._folder = folder
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fuse")
        self._weights, self._device = weights, device
        self._model: Future[Model] | None = None
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._count = 0

    def warm(self) -> Future[Model]:
        """The model, on its way or there."""
        with self._lock:
            if self._model is None:
                self._model = self._worker.submit(load_model, self._weights, device=self._device)
            return self._model

    def model_state(self) -> tuple[str, str]:
        """``loading``, ``ready`` or ``failed``, and why it failed; begins to load it."""
        model = self.warm()
        if not model.done():
            return "loading", ""
        error = model.exception()
        return ("failed", told(error)) if error else ("ready", "")

    def start(self, fixed: Image, moving: Image, task: str, options: FuseOptions) -> Job:
        """Begin with a pair.

        Raises:
            Busy: one is running.
            RequestError: an unknown task.
        """
        check_task(task)
        model = self.warm()
        with self._lock:
            if any(job.state == "running" for job in self._jobs.values()):
                raise Busy("another pair is being fused; wait for it or cancel it first")
            self._count += 1
            job = Job(secrets.token_hex(8), options)
            self._jobs[job.id] = job
            name = f"run-{self._count}"
        self._worker.submit(self._run, model, job, name, fixed, moving, task)
        return job

    def job(self, identifier: str) -> Job:
        """Raise :class:`KeyError` for an unknown one."""
        with self._lock:
            return self._jobs[identifier]

    def cancel(self, identifier: str) -> Job:
        """Drop a job: what the worker has begun it finishes, but nobody sees it."""
        job = self.job(identifier)
        with self._lock:
            if job.state == "running":
                job.state = "cancelled"
        return job

    def close(self) -> None:
        """Drop what is running and wait for the worker."""
        for identifier in list(self._jobs):
            self.cancel(identifier)
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run(self, model: Future[Model], job: Job, name: str, fixed: Image, moving: Image, task: str) -> None:
        try:
            loaded = model.result()
            self._enter(job, 1)
            result = fuse(fixed, moving, task=task, model=loaded, **asdict(job.options))
            self._enter(job, 2)
            folder = result.save(self._folder / name)
            view = view_of(result, f"{moving.source} on {fixed.source}")
            with self._lock:
                if job.state != "running":
                    return
                job.result = self._library.add(folder, view).key
                job.stage, job.state = 3, "done"
        except _Cancelled:
            return
        except Exception as error:  # the thread's edge: whatever went wrong, the page must hear of it
            log.debug("fusing failed", exc_info=error)
            with self._lock:
                if job.state == "running":
                    job.state, job.message = "failed", told(error)

    def _enter(self, job: Job, stage: int) -> None:
        with self._lock:
            if job.state != "running":
                raise _Cancelled
            job.stage = stage
