"""Weight files and their records: found, checked, loaded, refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bsafusion import weights
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg
from bsafusion.weights import WeightsError, WeightsRecord, file_sha256, find, load, save, shipped, write_tensors

CARD: dict[str, Any] = {"preset": "default", "tasks": ("ct-mri",), "data": "synthetic", "steps": 7}


@pytest.fixture
def model(small_cfg: BSAFusionCfg) -> BSAFusion:
    return BSAFusion(small_cfg).eval()


@pytest.fixture
def saved(model: BSAFusion, tmp_path: Path) -> Path:
    save(tmp_path, "mine", model.state_dict(), config=model.cfg.to_dict(), figures={"epe": 1.5}, **CARD)
    return tmp_path / "mine.safetensors"


def rewrite(card: Path, **changes: Any) -> None:
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))


def test_saved_weights_come_back(model: BSAFusion, saved: Path) -> None:
    loaded, record = load(str(saved))
    assert not loaded.training
    assert loaded.cfg == model.cfg
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    # In the memory format that loading chooses: other kernels round otherwise.
    same = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pair = torch.rand(2, 1, 1, 65, 81).unbind(0)
    torch.testing.assert_close(loaded.predict(*pair).fused, same.predict(*pair).fused, rtol=0, atol=1e-6)
    assert (record.name, record.steps, record.tasks, record.figures) == ("mine", 7, ("ct-mri",), {"epe": 1.5})
    assert "Not for clinical use" in record.use


def test_the_record_names_its_file_by_its_hash(saved: Path) -> None:
    record = WeightsRecord.read(saved.with_suffix(".json"))
    assert record.file == saved.name
    assert record.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest() == file_sha256(saved)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["mine.json", "mine.safetensors"]
    assert find(str(saved)) == (record, saved)


def test_a_record_survives_json(saved: Path) -> None:
    card = saved.with_suffix(".json")
    record = WeightsRecord.read(card)
    assert record.to_json() == card.read_text()
    assert BSAFusionCfg.from_dict(dict(record.config)) == load(str(saved))[0].cfg


def test_weights_that_cannot_be_written_leave_what_was_there(
    model: BSAFusion, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(WeightsRecord, "to_json", full)
    with pytest.raises(OSError, match="no space"):
        save(saved.parent, "mine", model.state_dict(), config=model.cfg.to_dict(), **CARD | {"steps": 8})
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_saving_again_replaces_both_files(model: BSAFusion, saved: Path) -> None:
    before = saved.read_bytes()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    save(saved.parent, "mine", state, config=model.cfg.to_dict(), **CARD)
    assert saved.read_bytes() != before
    loaded, _ = load(str(saved))
    assert torch.equal(loaded.state_dict()["fusion.last.0.bias"], state["fusion.last.0.bias"])


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(model: BSAFusion, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path, "mine", model.state_dict(), config=model.cfg.to_dict(), **CARD)
        write_tensors(tmp_path / "state.safetensors", model.state_dict())
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_weights_that_are_no_numbers_are_refused(model: BSAFusion, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["fusion.last.0.bias"][0] = torch.nan
    save(tmp_path, "mine", state, config=model.cfg.to_dict(), **CARD)
    with pytest.raises(WeightsError, match=r"mine\.safetensors: fusion\.last\.0\.bias holds NaN or infinite values"):
        load(str(tmp_path / "mine.safetensors"))


def test_a_damaged_file_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1  # one bit of one weight
    saved.write_bytes(content)
    with pytest.raises(WeightsError, match=r"mine\.safetensors: sha256 is .*its record says .*fetch the file again"):
        load(str(saved))


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="sha256"):
        find(str(saved))


def test_a_file_without_its_record_is_refused(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    with pytest.raises(WeightsError, match=r"its record mine\.json is missing; keep the two files together"):
        load(str(saved))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000, '{"name": "mine", "tasks": []}', "\xff"])
def test_what_is_no_record_is_refused(content: str, saved: Path) -> None:
    saved.with_suffix(".json").write_bytes(content.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"mine\.json: not a weights record"):
        load(str(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, "not a weights record"),
        ({"config": []}, "not a weights record"),
        ({"config": {"encoder": None}}, "does not fit"),
        ({"config": {"working_side": 0}}, "does not fit .*working_side 0: expected a whole number"),
        ({"config": {"working_side": "x"}}, "does not fit"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], message: str, model: BSAFusion, saved: Path) -> None:
    if isinstance(change.get("config"), dict):
        change = {"config": {**model.cfg.to_dict(), **change["config"]}}
    rewrite(saved.with_suffix(".json"), **change)
    with pytest.raises(WeightsError, match=message):
        load(str(saved))


def test_a_record_of_another_network_is_refused(model: BSAFusion, saved: Path, small_cfg: BSAFusionCfg) -> None:
    other = replace(small_cfg, fusion=replace(small_cfg.fusion, widths=(8, 8, 8, 16)))
    rewrite(saved.with_suffix(".json"), config=other.to_dict())
    with pytest.raises(WeightsError, match="does not fit the network that its record describes"):
        load(str(saved))
    rewrite(saved.with_suffix(".json"), config={**model.cfg.to_dict(), "colour": True})
    with pytest.raises(WeightsError, match="does not fit"):
        load(str(saved))


def test_an_unknown_name_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        WeightsError, match=r"no weights 'nothing': expected a \.safetensors file or one of the shipped"
    ):
        find("nothing")
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="shipped: none"):
        find("nothing")


def test_shipped_weights_are_found_by_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FOLDER", saved.parent)
    assert [r.name for r in shipped()] == ["mine"]
    assert find("mine")[1] == saved
    assert load("mine")[1].sha256 == file_sha256(saved)
    saved.unlink()
    with pytest.raises(WeightsError, match="the file of weights 'mine' is missing; reinstall"):
        find("mine")


def test_every_shipped_file_is_the_one_its_record_names() -> None:
    for record in shipped():
        _, path = find(record.name)
        cfg = BSAFusionCfg.from_dict(dict(record.config))
        with torch.device("meta"):
            expected = {name: value.shape for name, value in BSAFusion(cfg).state_dict().items()}
        assert {name: value.shape for name, value in load_file(path).items()} == expected
        assert "clinical" in record.use


def test_records_are_read_without_torch() -> None:
    code = "import sys; from bsafusion.weights import shipped; shipped(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
