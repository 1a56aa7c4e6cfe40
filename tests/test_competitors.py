"""Classical registration in worker processes: conventions, repeatability, and what happens when it fails."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bsafusion.competitor_worker import LIBRARIES, METHODS, PARAMETERS
from bsafusion.competitors import COMPETITORS, Competitor, CompetitorError, RegistrationError
from bsafusion.deformation import affine_field, warp
from bsafusion.metrics import endpoint_error, head_mask, summarise
from pairs import scan

SHAPE = (120, 104)  # not square: swapped axes show


def opened(name: str) -> Competitor:
    """A competitor; ELASTIX_PYTHON and ANTS_PYTHON name interpreters that have these libraries."""
    try:
        return Competitor(name, os.environ.get(f"{name.upper()}_PYTHON"))
    except CompetitorError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rigid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scan, its contrast-inverted copy moved by a known rigid field, and that field ``2 H W``."""
    original = torch.from_numpy(scan(SHAPE).astype(np.float32) / 255)[None, None]
    angle = math.radians(6)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 5.0], [math.sin(angle), math.cos(angle), -3.0]])
    known = affine_field(matrix[None], shape=SHAPE)
    inside = torch.from_numpy(head_mask(original[0, 0].numpy())).float()[None, None]
    inverted = warp(inside * (1.2 - original), known).clamp(0, 1)
    return original[0, 0].numpy(), inverted[0, 0].numpy(), known[0].numpy()


@pytest.fixture(scope="module")
def worker() -> Iterator[Competitor]:
    with opened("sitk-rigid") as competitor:
        yield competitor


@pytest.mark.parametrize("name", [name for name in COMPETITORS if name != "identity"])
def test_a_known_rigid_motion_is_recovered_across_contrasts(
    name: str, rigid: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    fixed, moving, known = rigid
    mask = head_mask(fixed)
    with opened(name) as competitor:
        found = competitor.register(fixed, moving)
    before = summarise(endpoint_error(known, np.zeros_like(known)), mask).mean
    assert before > 5
    assert summarise(endpoint_error(known, found.displacement), mask).mean < 0.5
    assert found.displacement.dtype == np.float32
    assert found.seconds > 0


def test_the_same_images_give_the_same_field(
    worker: Competitor, rigid: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    fixed, moving, _ = rigid
    first = worker.register(fixed, moving).displacement
    worker.register(moving, fixed)  # nothing is carried over from pair to pair
    assert worker.register(fixed, moving).displacement.tobytes() == first.tobytes()


def test_identity_moves_nothing() -> None:
    with opened("identity") as competitor:
        assert not competitor.register(np.zeros(SHAPE), np.ones(SHAPE)).displacement.any()
        assert competitor.versions == {}


def test_versions_and_parameters_are_known_before_any_pair(worker: Competitor) -> None:
    assert set(worker.versions) == {"SimpleITK"}
    assert worker.parameters == PARAMETERS["sitk-rigid"]
    assert set(METHODS) == set(PARAMETERS) == set(LIBRARIES)


def test_a_pair_that_fails_does_not_stop_the_next(worker: Competitor, rigid: tuple[np.ndarray, ...]) -> None:
    fixed, moving, _ = rigid
    with pytest.raises(RegistrationError, match="sitk-rigid: "):
        worker.register(fixed[:, :1], moving[:1, :1])
    assert np.abs(worker.register(fixed, moving).displacement).max() > 1


def test_a_worker_that_dies_is_started_anew(rigid: tuple[np.ndarray, ...]) -> None:
    with opened("identity") as competitor:
        process = competitor._started()
        process.kill()
        process.wait()
        with pytest.raises(RegistrationError, match="ended with exit code"):
            competitor.register(rigid[0], rigid[1])
        assert not competitor.register(rigid[0], rigid[1]).displacement.any()


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nread request\necho 'no libregistration.so' >&2\nexit 3\n")
    interpreter.chmod(0o755)
    with pytest.raises(CompetitorError, match=r"ended with exit code 3: no libregistration.so"):
        Competitor("identity", interpreter)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CompetitorError, match=r"no competitor is called 'demons'; choose from identity"):
        Competitor("demons")


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(CompetitorError, match=r"/no/python cannot be run"):
        Competitor("ants", "/no/python")


@pytest.mark.skipif(importlib.util.find_spec("ants") is not None, reason="antspyx is installed here")
def test_a_missing_library_says_how_to_install_it() -> None:
    with pytest.raises(CompetitorError, match=r"pip install antspyx, then --python ants="):
        Competitor("ants", sys.executable)
