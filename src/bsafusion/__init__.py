"""Align and fuse two unaligned medical images in one network. Research use only; not for clinical use.

>>> import bsafusion
>>> result = bsafusion.fuse("mri.png", "ct.png")
>>> result.fused, result.status
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from bsafusion.deformation import DeformationField, warp
    from bsafusion.image import Geometry, Image, Modality
    from bsafusion.io import read_deformation, read_image
    from bsafusion.models.bsafusion import BSAFusion
    from bsafusion.pipeline import fuse, load_model
    from bsafusion.result import FusionResult
    from bsafusion.samples import load_samples

# Loaded when first used: ``bsafusion --help`` and ``bsafusion info`` need no torch.
_HOME = {
    "BSAFusion": "models.bsafusion",
    "DeformationField": "deformation",
    "FusionResult": "result",
    "Geometry": "image",
    "Image": "image",
    "Modality": "image",
    "fuse": "pipeline",
    "load_model": "pipeline",
    "load_samples": "samples",
    "read_deformation": "io",
    "read_image": "io",
    "warp": "deformation",
}

__all__ = [
    "BSAFusion",
    "DeformationField",
    "FusionResult",
    "Geometry",
    "Image",
    "Modality",
    "fuse",
    "load_model",
    "load_samples",
    "read_deformation",
    "read_image",
    "warp",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from bsafusion.about import version_of

        return version_of("bsafusion")
    if name not in _HOME:
        raise AttributeError(f"module 'bsafusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bsafusion.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
