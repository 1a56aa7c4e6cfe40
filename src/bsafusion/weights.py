"""Weight files: safetensors with a record beside each, never pickle. Records are read without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsafusion.about import NOT_CLINICAL
from bsafusion.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from bsafusion.models.bsafusion import BSAFusion

FOLDER = Path(__file__).parent / "pretrained"
DEFAULT = "default"
CALIBRATION = ".trust.json"
"""Ending of the calibration that may lie beside weights; see ``trust``."""


class WeightsError(ValueError):
    """A weight file is missing, damaged or of another network."""


@dataclass(frozen=True)
class WeightsRecord:
    """The card of a weight file.

    Attributes:
        name: what ``--weights`` takes.
        file: file name in the folder of the record.
        sha256: of the file.
        preset: of the network.
        config: ``BSAFusionCfg.to_dict()``.
        tasks: what it was trained on.
        data: origin of the training data and its terms.
        steps: training steps.
        figures: measured values, each with what it was measured on.
        use: what it may be used for.
    """

    name: str
    file: str
    sha256: str
    preset: str
    config: Mapping[str, Any]
    tasks: tuple[str, ...]
    data: str
    steps: int
    figures: Mapping[str, Any] = field(default_factory=dict)
    use: str = NOT_CLINICAL

    @classmethod
    def read(cls, path: Path) -> WeightsRecord:
        """Read a record (``NAME.json``); raises :class:`WeightsError` when it is not one."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            record = cls(**{**values, "tasks": tuple(values["tasks"])})
            if not isinstance(record.sha256, str) or not isinstance(record.config, Mapping):
                raise TypeError("sha256 is no text or config no group of options")
            return record
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, RecursionError) as error:
            raise WeightsError(
                f"{path}: not a weights record ({error}); expected the .json beside a .safetensors"
            ) from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def shipped() -> list[WeightsRecord]:
    """The records of the weights in this package, by name."""
    cards = (path for path in sorted(FOLDER.glob("*.json")) if not path.name.endswith(CALIBRATION))
    return [WeightsRecord.read(path) for path in cards]


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def find(name_or_path: str) -> tuple[WeightsRecord, Path]:
    """The record and the file behind ``--weights``: a shipped name, or a ``.safetensors`` with its record.

    Raises:
        WeightsError: neither, or the file is not the one that the record names.
    """
    for record in shipped():
        if record.name == name_or_path:
            path = FOLDER / record.file
            break
    else:
        path = Path(name_or_path)
        if not path.is_file():
            names = ", ".join(r.name for r in shipped()) or "none"
            raise WeightsError(
                f"no weights {name_or_path!r}: expected a .safetensors file or one of the shipped: {names}"
            )
        card = path.with_suffix(".json")
        if not card.is_file():
            raise WeightsError(f"{path}: its record {card.name} is missing; keep the two files together")
        record = WeightsRecord.read(card)
    if not path.is_file():
        raise WeightsError(f"{path}: the file of weights {record.name!r} is missing; reinstall the package")
    if (found := file_sha256(path)) != record.sha256:
        raise WeightsError(
            f"{path}: sha256 is {found[:12]}…, its record says {record.sha256[:12]}…; fetch the file again"
        )
    return record, path


def load(name_or_path: str = DEFAULT, *, device: str = "cpu") -> tuple[BSAFusion, WeightsRecord]:
    """Build the network of a weight file and fill it; in evaluation mode, on ``device``."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg

    record, path = find(name_or_path)
    try:
        model = BSAFusion(BSAFusionCfg.from_dict(dict(record.config)))
        state = load_file(path)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(f"{path}: does not fit the network that its record describes ({first})") from error
    if broken := next((name for name, values in state.items() if not torch.isfinite(values).all()), None):
        raise WeightsError(
            f"{path}: {broken} holds NaN or infinite values; expected finite ones; train or fetch it again"
        )
    # Convolutions on a CPU are faster with the channels last.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return model.eval().to(device), record


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises :class:`OSError` where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # of a new file by the umask; safetensors makes it readable by its owner alone
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.parent}: weights cannot be written ({error}); check the disk") from error
    path.chmod(mode)


def save(folder: Path, name: str, state: Mapping[str, Tensor], **card: Any) -> WeightsRecord:
    """Write ``NAME.safetensors`` and its record into ``folder``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    with write_whole(path.with_suffix(".json")) as card_aside, write_whole(path) as aside:
        write_tensors(aside, state)
        record = WeightsRecord(name=name, file=path.name, sha256=file_sha256(aside), **card)
        card_aside.write_text(record.to_json(), encoding="utf-8")
    return record
