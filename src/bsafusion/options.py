"""Options by name: ``--set PATH=JSON`` onto the frozen dataclasses of training and network."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

from bsafusion.models.bsafusion import BSAFusionCfg
from bsafusion.training import TrainingCfg


def with_options(training: TrainingCfg, model: BSAFusionCfg, settings: list[str]) -> tuple[TrainingCfg, BSAFusionCfg]:
    """Both configs with settings such as ``model.alignment.direction="forward"`` or ``training.weights.ce2=0``.

    Raises:
        ValueError: no such option, or a value that it does not take.
    """
    for setting in settings:
        path, sign, text = setting.partition("=")
        owner, _, rest = path.partition(".")
        if not sign or owner not in ("training", "model") or not rest:
            raise ValueError(f"--set {setting!r}: expected training.NAME=VALUE or model.STAGE.NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text  # a bare word is a string
        if owner == "training":
            training = _replaced(training, rest.split("."), _frozen(value), setting)
        else:
            model = _replaced(model, rest.split("."), _frozen(value), setting)
    return training, model


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _replaced(cfg: Any, path: list[str], value: Any, setting: str) -> Any:
    names = [f.name for f in fields(cfg)]
    if path[0] not in names:
        raise ValueError(f"--set {setting!r}: no option {path[0]!r}; expected one of {', '.join(names)}")
    current = getattr(cfg, path[0])
    if len(path) > 1:
        if not is_dataclass(current):
            raise ValueError(f"--set {setting!r}: {path[0]!r} is a value, not a group of options")
        value = _replaced(current, path[1:], value, setting)
    elif is_dataclass(current):
        inside = ", ".join(f.name for f in fields(current))
        raise ValueError(f"--set {setting!r}: {path[0]!r} is a group of options: {inside}")
    elif type(value) is not type(current) and not (isinstance(current, float) and type(value) is int):
        raise ValueError(f"--set {setting!r}: {value!r} is not of the kind of {current!r}")
    return replace(cfg, **{path[0]: float(value) if isinstance(current, float) else value})
