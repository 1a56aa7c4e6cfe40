"""Classical registration methods to compare with, each in worker processes of its own.

A worker (``competitor_worker.py``) is run by an interpreter in which the method's library is installed: this one, or
one that the caller names, since ANTs and elastix pin libraries of their own. It stays alive over many pairs, computes
in one thread, and what it answers depends on nothing but the two images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bsafusion.competitor_worker import METHODS

Array = NDArray[np.float32]

COMPETITORS = tuple(METHODS)
"""Names of the methods; ``competitor_worker.PARAMETERS`` holds what each is given."""

_WORKER = Path(__file__).with_name("competitor_worker.py")
_INSTALL = {
    "elastix": "python -m venv E && E/bin/pip install itk-elastix, then --python elastix=E/bin/python",
    "ants": "python -m venv E && E/bin/pip install antspyx, then --python ants=E/bin/python",
}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


class CompetitorError(ValueError):
    """A method is unknown or cannot be run here; the message says how to install it."""


class RegistrationError(RuntimeError):
    """A method failed on one pair."""


@dataclass(frozen=True)
class Registration:
    """``displacement``: ``2 H W`` float32, pull-back, voxels, ``(y, x)``; ``seconds`` of CPU time."""

    displacement: Array
    seconds: float


class Competitor:
    """A worker process for one method; a context manager.

    Args:
        name: from :data:`COMPETITORS`.
        python: the interpreter that has the method's library; this one when left out.

    Raises:
        CompetitorError: an unknown name, no such interpreter, or one without the library.
    """

    def __init__(self, name: str, python: str | Path | None = None) -> None:
        if name not in COMPETITORS:
            raise CompetitorError(f"no competitor is called {name!r}; choose from {', '.join(COMPETITORS)}")
        # The process works in a folder of its own, so a path to the interpreter must not be relative.
        named = str(python or sys.executable)
        self.name, self.python = name, str(Path(named).absolute()) if os.sep in named else named
        self._folder = tempfile.TemporaryDirectory(prefix="bsafusion-")
        self._complaints = Path(self._folder.name) / "stderr.txt"
        self._process: subprocess.Popen[str] | None = None
        answer = self._ask({"method": name})
        if "versions" not in answer:
            self.close()
            advice = _INSTALL.get(name, "reinstall bsafusion")
            raise CompetitorError(f"{name} is not installed for {self.python} ({answer['error']}); {advice}")
        self.versions: dict[str, str] = answer["versions"]
        self.parameters: dict[str, Any] = answer["parameters"]

    def register(self, fixed: Array, moving: Array) -> Registration:
        """Align ``moving`` to ``fixed``, both ``H W`` float32 in [0, 1] on one grid.

        Raises:
            RegistrationError: the method failed; the next pair may do well.
        """
        folder = Path(self._folder.name)
        files = {role: str(folder / f"{role}.npy") for role in ("fixed", "moving", "out")}
        for role, image in (("fixed", fixed), ("moving", moving)):
            np.save(files[role], np.ascontiguousarray(image, dtype=np.float32))
        answer = self._ask({"method": self.name, **files})
        if "error" in answer:
            raise RegistrationError(f"{self.name}: {answer['error']}")
        field: Array = np.load(files["out"], allow_pickle=False)
        return Registration(field, float(answer["seconds"]))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:  # it crashed: the next request starts another
            code = process.wait()
            self._stop()
            said = self._complaints.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((f": {line.strip()[:200]}" for line in reversed(said) if line.strip()), "")
            return {"error": f"its process ended with exit code {code}{last}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {**os.environ, **dict.fromkeys(_THREADS, "1")}
            try:
                with self._complaints.open("wb") as complaints:
                    self._process = subprocess.Popen(
                        # -I: the folder of this package, where io/ lies, must not come before the standard library.
                        [self.python, "-I", str(_WORKER)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=complaints,
                        text=True,
                        encoding="utf-8",
                        env=environment,
                        cwd=self._folder.name,  # elastix leaves files where it works
                    )
            except OSError as error:
                self._folder.cleanup()
                raise CompetitorError(
                    f"{self.python} cannot be run ({error.strerror}); expected a Python interpreter with {self.name}"
                ) from error
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes both pipes, also those of a dead worker, and waits
            self._process = None

    def close(self) -> None:
        """End the process; its end of input tells it to."""
        self._stop()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
