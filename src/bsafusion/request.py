"""What is asked of a fusion: its options, each a decision of the user."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import numpy as np

from bsafusion.image import TASKS
from bsafusion.io import COLORMAPS
from bsafusion.models.bsafusion import Mirrored
from bsafusion.plain_fusion import FUSIONS
from bsafusion.refinement import MOST_STEPS
from bsafusion.report import ALIGN_AND_FUSE, ALIGN_ONLY, FUSE_ONLY

AUTO = "auto"
NETWORK, NO_COLORMAP, ALWAYS = "network", "none", "always"
CHOICES: dict[str, tuple[str, ...]] = {
    "fusion": (NETWORK, *FUSIONS),
    "blend": ("luminance", "alpha", "none"),
    "colormap": (NO_COLORMAP, *COLORMAPS),
    "mirrored": get_args(Mirrored),
}
"""The options of :class:`FuseOptions` that are names, and the names that they take, the default first."""


class RequestError(ValueError):
    """The request cannot be carried out as it was put."""


def check_task(task: str) -> None:
    """Raise :class:`RequestError` for an unknown task."""
    if task not in (*TASKS, AUTO):
        raise RequestError(f"unknown task {task!r}; expected {', '.join(TASKS)} or {AUTO}")


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """How a pair is aligned and its fused picture made; see ``docs/fusion.md`` and ``docs/refinement.md``.

    Attributes:
        fusion: how two luminances become one: ``network``, or a name of :data:`bsafusion.plain_fusion.FUSIONS`.
        blend: ``luminance``: the fused luminance in the hue of the moving image; ``alpha``: the moving image laid over
            the fixed one, without a fused luminance; ``none``: the fused luminance in grey.
        colormap: ``none``, or a name of :data:`bsafusion.io.COLORMAPS` for a grey moving image.
        weight_fixed: 0 the aligned image, 0.5 the fused picture as it is, 1 the fixed image; see :func:`colour.steer`.
        aligned: the images are aligned already: fuse them as given.
        align_only: make no fused picture.
        refine: steps of :class:`bsafusion.refinement.Refinement` after the network has aligned, 0 to 200.
        mirrored: whether to align the mirror images as well and take the mean of both answers: ``auto``, where the
            network expects a large error; ``always``, a little more exact and slower; or ``never``.

    Raises:
        RequestError: an unknown name, a weight outside [0, 1], something else than a number or True and False where one
            belongs, or options of which one would have no effect.
    """

    fusion: str = NETWORK
    blend: str = "luminance"
    colormap: str = NO_COLORMAP
    weight_fixed: float = 0.5
    aligned: bool = False
    align_only: bool = False
    refine: int = 0
    mirrored: str = "auto"

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, np.generic):  # which JSON does not hold
                object.__setattr__(self, option.name, value.item())
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
        for name in ("aligned", "align_only"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; expected True or False")
        if not _is_number(self.weight_fixed) or not 0 <= self.weight_fixed <= 1:
            told = f"{self.weight_fixed:g}" if _is_number(self.weight_fixed) else repr(self.weight_fixed)
            raise RequestError(
                f"a weight of {told} for the fixed image; expected 0 (the moving image alone) to 1 "
                "(the fixed image alone), 0.5 for the balance that was trained"
            )
        if not _is_number(self.refine) or self.refine % 1 or not 0 <= self.refine <= MOST_STEPS:
            raise RequestError(
                f"{self.refine!r} steps of refinement; expected a whole number, 0 (none) to {MOST_STEPS}"
            )
        object.__setattr__(self, "weight_fixed", float(self.weight_fixed))
        object.__setattr__(self, "refine", int(self.refine))
        for asked, what in ((self.refine, "refine"), (self.mirrored == ALWAYS, "mirror")):
            if asked and self.aligned:
                raise RequestError(
                    f"images that are aligned already are not moved, so there is nothing to {what}; "
                    "leave out one of both"
                )
        others = (option for option in fields(self) if option.name not in ("align_only", "refine", "mirrored"))
        if self.align_only and any(getattr(self, option.name) != option.default for option in others):
            raise RequestError(
                "nothing is to be fused, yet there are options of fusion or the images are said to be aligned; "
                "leave out one or the other"
            )
        if self.blend == "alpha" and self.fusion != NETWORK:
            raise RequestError(
                f"blend alpha lays one image over the other and has no use for the {self.fusion} fusion; choose blend "
                "luminance or none, or leave the fusion out"
            )
        if self.blend == "none" and self.colormap != NO_COLORMAP:
            raise RequestError(
                f"blend none is grey and would not show colour map {self.colormap}; leave one of them out"
            )

    @property
    def mode(self) -> str:
        """One of the keys of :data:`bsafusion.report.MODES`."""
        return ALIGN_ONLY if self.align_only else FUSE_ONLY if self.aligned else ALIGN_AND_FUSE

    @property
    def network_fuses(self) -> bool:
        """Whether the network's own fusion has a part in the result."""
        return bool(self.record()["fusion"] == NETWORK)

    def record(self) -> dict[str, Any]:
        """For the report; None for what had no part in the result."""
        unused: dict[str, None] = {}
        if self.align_only:
            unused = dict.fromkeys(("fusion", "blend", "colormap", "weight_fixed"))
        elif self.blend == "alpha":
            unused = {"fusion": None}
        if self.aligned:
            unused["mirrored"] = None
        return {**asdict(self), **unused}

    def caption(self) -> str:
        """The name of the fused picture, with what differs from the default."""
        parts = [
            "overlay" if self.blend == "alpha" else "grey" if self.blend == "none" else "",
            self.fusion if self.fusion != NETWORK else "",
            self.colormap if self.colormap != NO_COLORMAP else "",
            f"fixed at {self.weight_fixed:g}" if self.weight_fixed != 0.5 else "",
        ]
        told = ", ".join(part for part in parts if part)
        return f"fused ({told})" if told else "fused"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
