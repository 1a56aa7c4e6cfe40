"""Versions are those that are installed, and their absence stops nothing."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import pytest

import bsafusion
from bsafusion.about import version_of, versions


def test_versions_are_those_that_are_installed() -> None:
    assert bsafusion.__version__ == importlib.metadata.version("bsafusion")
    found = versions()
    assert found["python"] == platform.python_version()
    assert {name: importlib.metadata.version(name) for name in found if name != "python"}.items() <= found.items()
    assert {"bsafusion", "torch", "numpy", "SimpleITK"} <= found.keys()


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Versions are remembered, as they do not change while a program runs."""
    version_of.cache_clear()
    yield
    version_of.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_package_that_is_only_on_the_path_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_of("bsafusion-that-nobody-has") == "not installed"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert bsafusion.__version__ == "not installed"
    assert set(versions().values()) == {platform.python_version(), "not installed"}
