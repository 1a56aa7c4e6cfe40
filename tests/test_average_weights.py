"""The script that takes a point between two weight files."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bsafusion import weights
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg
from pairs import record_of

SCRIPT = Path(__file__).parents[1] / "scripts/average_weights.py"


def saved(folder: Path, name: str, cfg: BSAFusionCfg, cross_blocks: int) -> tuple[Path, dict[str, torch.Tensor]]:
    network = BSAFusion(replace(cfg, representation=replace(cfg.representation, cross_blocks=cross_blocks)))
    record = weights.save(folder, name, network.state_dict(), **record_of(network))
    return folder / record.file, network.state_dict()


def average(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("average_weights", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["average_weights.py", *arguments])
    module.main()


@pytest.mark.parametrize("blocks", [(2, 2), (0, 2)])
def test_a_point_on_the_line_between_a_network_and_what_it_became(
    tmp_path: Path, small_cfg: BSAFusionCfg, monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int]
) -> None:
    (one, first), (other, second) = (
        saved(tmp_path, name, small_cfg, count) for name, count in zip("ab", blocks, strict=True)
    )
    average(monkeypatch, str(one), str(other), "0.25", "-o", str(tmp_path / "mixed.safetensors"))
    mixed = weights.load(str(tmp_path / "mixed.safetensors"))[0].state_dict()
    assert mixed.keys() == second.keys()
    for name, value in mixed.items():
        expected = 0.75 * first[name] + 0.25 * second[name] if name in first else second[name]
        torch.testing.assert_close(value, expected.to(value.dtype))


def test_a_larger_first_network_is_refused(
    tmp_path: Path, small_cfg: BSAFusionCfg, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (one, _), (other, _) = (saved(tmp_path, name, small_cfg, count) for name, count in (("a", 2), ("b", 0)))
    with pytest.raises(SystemExit):
        average(monkeypatch, str(one), str(other), "0.5", "-o", str(tmp_path / "mixed.safetensors"))
    assert "the first file holds a network of another shape" in capsys.readouterr().err
    assert not (tmp_path / "mixed.safetensors").exists()


def test_alignment_alone_is_mixed_with_a_network_of_another_fusion(
    tmp_path: Path, small_cfg: BSAFusionCfg, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = replace(small_cfg, fusion=replace(small_cfg.fusion, hidden=small_cfg.fusion.hidden + 1))
    (one, first), (other, second) = (saved(tmp_path, name, cfg, 2) for name, cfg in (("a", older), ("b", small_cfg)))
    arguments = (str(one), str(other), "0.25", "--parts", "alignment", "-o", str(tmp_path / "mixed.safetensors"))
    average(monkeypatch, *arguments)
    mixed = weights.load(str(tmp_path / "mixed.safetensors"))[0].state_dict()
    stay = ("fusion.", "encoder.shallow.", "alignment.assessment.", "representation.judge.")
    assert all(any(name.startswith(part) for name in mixed) for part in stay)
    for name, value in mixed.items():
        expected = second[name] if name.startswith(stay) else 0.75 * first[name] + 0.25 * second[name]
        torch.testing.assert_close(value, expected.to(value.dtype))
