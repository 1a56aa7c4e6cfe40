"""What the package says of itself: its version, those of what its numbers depend on, and what it is not for."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

NOT_CLINICAL = "Research use only. Not for clinical use."


@functools.cache
def version_of(package: str) -> str:
    """As it was installed; ``not installed`` where it was not, as of a source tree that is only on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Of Python, this package and what its numbers depend on."""
    names = ("bsafusion", "torch", "numpy", "SimpleITK", "nibabel", "pydicom", "pillow")
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}
