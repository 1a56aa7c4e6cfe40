"""The script that trains all stages in one call."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from bsafusion import weights

SCRIPT = Path(__file__).parents[1] / "scripts/train_default.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_default", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, cfg in module.STAGES.items():
        monkeypatch.setitem(module.STAGES, name, replace(cfg, validate_every=100, suites=("paper",)))
    monkeypatch.setattr("bsafusion.training.assessment_score", lambda *_, **__: 1.0)  # on many draws: slow
    monkeypatch.setattr(module, "MISALIGNMENTS", {"paper": module.MISALIGNMENTS["paper"]})
    return module


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, pairs: Path, out: Path, *options: str) -> None:
    steps = [f"--{name}-steps=2" for name in script.STAGES]
    monkeypatch.setattr(sys, "argv", ["train_default.py", str(pairs), "-o", str(out), "--batch=1", *steps, *options])
    script.main()


def test_all_stages_in_turn_with_an_end_in_between(
    script: ModuleType,
    pairs_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call(script, monkeypatch, pairs_csv, tmp_path, "--minutes=0.0001")
    assert "alignment: step 1 of 2" in capsys.readouterr().out
    assert not (tmp_path / "fusion").exists()
    call(script, monkeypatch, pairs_csv, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["start"].keys() == summary["trained"].keys()
    assert summary["start"]["paper/ct-mri/before"] == summary["trained"]["paper/ct-mri/before"]
    network, record = weights.load(str(tmp_path / "default.safetensors"))
    assert record.sha256 == weights.file_sha256(tmp_path / "default.safetensors")
    assert int(network.alignment.assessment.trained) == 1
    start, _ = weights.load("default")
    for part in ("alignment.steps.1_4.out.weight", "fusion.last.0.weight"):
        assert not network.state_dict()[part].equal(start.state_dict()[part])


def test_without_pairs_to_measure_on_the_result_is_kept_all_the_same(
    script: ModuleType,
    pairs_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = pairs_csv.with_name("train_only.csv")
    bare.write_text(pairs_csv.read_text().replace(",val,", ",test,"))
    call(script, monkeypatch, bare, tmp_path)
    assert "no pairs of split val" in capsys.readouterr().out
    assert weights.load(str(tmp_path / "default.safetensors"))[1].steps == 2
    assert not (tmp_path / "summary.json").exists()
