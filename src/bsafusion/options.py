"""Options by name: ``--set PATH=JSON`` onto the frozen dataclasses of training and network."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

from bsafusion.models.bsafusion import BSAFusionCfg
from bsafusion.training import TrainingCfg


def with_options(training: TrainingCfg, model: BSAFusionCfg, settings: list[str]) -> tuple[TrainingCfg, BSAFusionCfg]:
    """Both configs with settings such as ``model.alignment.direction="forward"`` or ``training.weights.ce2=0``.

    Raises:
        ValueError: no such option, or a value that it does not take.
    """
    for setting in settings:
        try:
            training, model = _with_option(training, model, setting)
        except (RecursionError, OverflowError) as error:
            raise ValueError(
                f"--set {setting[:40]!r}...: nested too deeply, or too large a number; expected less"
            ) from error
    return training, model


def _with_option(training: TrainingCfg, model: BSAFusionCfg, setting: str) -> tuple[TrainingCfg, BSAFusionCfg]:
    path, sign, text = setting.partition("=")
    owner, _, rest = path.partition(".")
    if not sign or owner not in ("training", "model") or not rest:
        raise ValueError(f"--set {setting!r}: expected training.NAME=VALUE or model.STAGE.NAME=VALUE")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string
    if path == "model.preset":
        raise ValueError(f"--set {setting!r}: a preset is more than its name; choose it with --preset")
    if owner == "training":
        return _replaced(training, rest.split("."), _frozen(value), setting), model
    return training, _replaced(model, rest.split("."), _frozen(value), setting)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _replaced(cfg: Any, path: list[str], value: Any, setting: str) -> Any:
    names = [f.name for f in fields(cfg)]
    if path[0] not in names:
        raise ValueError(f"--set {setting!r}: no option {path[0]!r}; expected one of {', '.join(names)}")
    current = getattr(cfg, path[0])
    if get_type_hints(type(cfg))[path[0]] is float:
        # Whole numbers stand for real ones, in a default as in a setting.
        current, value = float(current), float(value) if type(value) is int else value
    if len(path) > 1:
        if not is_dataclass(current):
            raise ValueError(f"--set {setting!r}: {path[0]!r} is a value, not a group of options")
        value = _replaced(current, path[1:], value, setting)
    elif is_dataclass(current):
        inside = ", ".join(f.name for f in fields(current))
        raise ValueError(f"--set {setting!r}: {path[0]!r} is a group of options: {inside}")
    elif not _same_kind(value, current):
        raise ValueError(f"--set {setting!r}: {value!r} is not of the kind of {current!r}")
    return replace(cfg, **{path[0]: value})


def _same_kind(value: Any, current: Any) -> bool:
    """Whether ``value`` can stand in for ``current``: a list for a list of the same kind of entries."""
    if isinstance(current, tuple) and isinstance(value, tuple):
        if len({type(entry) for entry in current}) > 1:  # not a list but a record, such as a name and its share
            return len(value) == len(current) and all(map(_same_kind, value, current))
        return not current or all(_same_kind(entry, current[0]) for entry in value)
    return type(value) is type(current) or (isinstance(current, float) and type(value) is int)
