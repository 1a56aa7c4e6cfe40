"""The ablations' driver on small synthetic scans, and that every experiment asks for runs that exist."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bsafusion import weights
from bsafusion.datasets import MISALIGNMENTS, PairSet, read_pairs, validation_batch
from bsafusion.io import read_image
from bsafusion.losses import total_loss
from bsafusion.models.bsafusion import BSAFusion, BSAFusionCfg, default
from bsafusion.options import with_options
from bsafusion.training import Objective, TrainingCfg
from bsafusion.trust import NOT_FOR_ALIGNMENT
from pairs import scan

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FILES = (
    "ablation_injection",
    "ablation_direction",
    "ablation_steps",
    "ablation_velocity",
    "ablation_fusion_blocks",
)
SMALL = (
    "training.side=65",
    "training.crop=64",
    "training.batch=2",
    "training.warmup=1",
    "training.log_every=1",
    'training.suites=["rigid"]',
    "model.working_side=65",
    "model.encoder.shallow=4",
    "model.encoder.widths=[8,8,8,16]",
    "model.representation.heads=2",
    "model.representation.mlp_dim=16",
    "model.representation.blocks=1",
    "model.representation.transfer_blocks=1",
    'model.alignment.steps=["affine","1/16"]',
    "model.alignment.layers=1",
    "model.alignment.hidden=[0,8]",
    "model.alignment.residual=[0,0]",
    "model.alignment.descriptors=8",
    "model.alignment.radius=[0,2]",
    "model.fusion.widths=[8,8,8,8]",
    "model.fusion.hidden=4",
)
DOCSTRING = '''"""Does it matter?

-- results, written by the command --
Not yet run.
-- end of results --
"""

KEPT = 1
'''
README = "# Experiments\n<!-- index:begin -->\n<!-- index:end -->\nKept.\n"


@pytest.fixture(scope="module", autouse=True)
def _on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(EXPERIMENTS))
    yield
    sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return importlib.import_module("ablations")


@pytest.fixture
def small(ablations: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """An ablation of two variants in a folder of its own, starting from a small network."""
    # Tokens and encoder are widened together, which options alone, one after another, cannot do.
    start = default()
    wide = replace(
        start,
        encoder=replace(start.encoder, widths=(8, 8, 8, 16)),
        representation=replace(start.representation, dim=16, heads=2),
    )
    monkeypatch.setattr(ablations, "default", lambda: wide)
    file = tmp_path / "experiments" / "small.py"
    file.parent.mkdir()
    file.write_text(DOCSTRING, encoding="utf-8")
    (file.parent / "README.md").write_text(README, encoding="utf-8")
    forward = ablations.Variant("forward", ("model.alignment.direction=forward",))
    return ablations.Ablation(
        file=file,
        base=("training.parts=alignment", *SMALL),
        variants=(ablations.BASELINE, forward),
        measure=ablations.modality_read,
        columns=(ablations.RIGID, ablations.Column("judge", "read after transfer")),
        notes="What the figures are.",
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the driver -----------------------------------------------------------------------------------


def test_two_variants_are_trained_collected_and_written_once(ablations, small, pairs_csv: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    runs = tmp_path / "runs"
    command = [str(pairs_csv), "-o", str(runs), "--samples", "5"]
    ablations.main(small, [*command, "--only", "forward"])
    assert small.file.read_text(encoding="utf-8") == DOCSTRING  # one variant is no comparison
    ablations.main(small, command)

    results = json.loads((small.file.parent / "results" / "small.json").read_text(encoding="utf-8"))
    assert list(results["variants"]) == ["baseline", "forward"]
    assert results["budget"].startswith("4 pairs seen in each run, 2 steps of 2")
    folders = list(results["runs"].values())
    assert len(set(folders)) == 2
    for name, folder in results["runs"].items():
        log = [json.loads(line) for line in (runs / folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2]
        validated = [line for line in log if line["kind"] == "val"][-1]
        figures = results["variants"][name]["figures"]
        # Two tasks are in the CSV, and both count alike.
        expected = (validated["rigid/ct-mri"] + validated["rigid/pet-mri"]) / 2
        assert figures["rigid"] == pytest.approx(expected, abs=1e-4)
        assert 0 <= figures["judge"] <= 1
    before = {row["figures"]["rigid/before"] for row in results["variants"].values()}
    assert len(before) == 1  # the same misalignment for each

    text = small.file.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert text.endswith("KEPT = 1\n")
    for variant in results["variants"].values():
        assert f"{variant['figures']['rigid']:.2f}" in docstring
    assert "Not yet run." not in docstring
    assert "What the figures are." in docstring
    readme = (small.file.parent / "README.md").read_text(encoding="utf-8")
    assert f"| [small.py](small.py) | Does it matter? | {results['budget']} | {results['summary']} |" in readme
    assert readme.endswith("Kept.\n")

    there = contents(tmp_path)
    ablations.main(small, command)
    assert contents(tmp_path) == there


def test_variants_of_one_seed_see_the_same_batches(ablations, small, pairs_csv: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The hash of the options names the run: the same options the same run, whatever the variant is called."""
    again = replace(small, variants=(ablations.Variant("under another name"), ablations.SECOND_SEED))
    first, second = (
        [ablations.plan(ablation, variant, pairs_csv, tmp_path, 4) for variant in ablation.variants]
        for ablation in (small, again)
    )
    assert first[0].folder == second[0].folder
    assert len({run.folder for run in (*first, *second)}) == 3
    assert first[0].training == first[1].training  # seed, steps and mix; only the network differs
    assert second[1].training == replace(first[0].training, seed=1)
    longer = ablations.plan(small, ablations.BASELINE, pairs_csv, tmp_path, 8)
    assert longer.training.steps == 2 * first[0].training.steps
    assert longer.folder != first[0].folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "6"], "holds runs of 4 pairs seen, this call asks for 6"),
        (["--samples", "1"], "--samples 1: expected at least one batch, 2"),
        (["--samples", "4", "--only", "backward"], "no variant 'backward'; expected some of 'baseline', 'forward'"),
    ],
)
def test_what_cannot_be_compared_is_refused(  # type: ignore[no-untyped-def]
    ablations,
    small,
    pairs_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    runs = tmp_path / "runs"
    ablations.check_budget(runs, 4, pairs_csv)
    with pytest.raises(SystemExit) as caught:
        ablations.main(small, [str(pairs_csv), "-o", str(runs), *arguments])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert small.file.read_text(encoding="utf-8") == DOCSTRING
    assert [path.name for path in runs.iterdir()] == ["budget.json"]


def test_a_file_without_a_place_for_results_is_left_alone(ablations, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "bare.py"
    file.write_text('"""Nothing."""\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"bare.py has no line .{ablations.BEGIN}. with .{ablations.END}. after it"):
        ablations.write_results(file, {"budget": "b", "table": ["t"]}, "n")
    assert [path.name for path in tmp_path.iterdir()] == ["bare.py"]


def test_fusion_starts_from_nothing_the_rest_from_the_weights(  # type: ignore[no-untyped-def]
    ablations, small, pairs_csv: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    run = ablations.plan(small, ablations.BASELINE, pairs_csv, tmp_path, 4)
    network = BSAFusion(run.model)
    card = {"preset": "default", "config": run.model.to_dict(), "tasks": ("ct-mri",), "data": "none", "steps": 0}
    record = weights.save(tmp_path, "source", network.state_dict(), **card)
    blocks = ("training.parts=fusion", "model.fusion.blocks=2", "training.side=65", "training.crop=64")
    ablation = replace(
        small,
        base=("training.batch=2", "training.log_every=1"),
        variants=(ablations.Variant("two", blocks),),
        measure=ablations.fusion_quality,
        init=str(tmp_path / record.file),
    )
    run = ablations.plan(ablation, ablation.variants[0], pairs_csv, tmp_path / "runs", 4)
    figures = ablations.measured(ablation, run, pairs_csv)["figures"]
    assert {"qabf", "qssim", "viff", "qcv", "qabf/ct-mri", "qabf/pet-mri"} <= figures.keys()
    assert figures["qssim"] == pytest.approx((figures["qssim/ct-mri"] + figures["qssim/pet-mri"]) / 2)
    start, _ = weights.load(str(run.folder / "init.safetensors"))
    trained, _ = weights.load(str(run.folder / "best.safetensors"))
    assert len(trained.fusion.blocks) == 2
    for name, value in network.state_dict().items():
        if not name.startswith(NOT_FOR_ALIGNMENT):
            assert torch.equal(trained.state_dict()[name], value), name
    block = "fusion.blocks.0.body.0.weight"
    assert start.state_dict()[block].shape == network.state_dict()[block].shape  # it would have fitted
    assert not torch.equal(start.state_dict()[block], network.state_dict()[block])


def test_the_table_by_hand(ablations) -> None:  # type: ignore[no-untyped-def]
    columns = (ablations.Column("a", "error", 1), ablations.Column("b", "share"))
    rows = {"one": {"a": 1.25, "a/before": 8.0, "b": 0.5}, "second": {"a": 12.0, "a/before": 8.0}}
    assert ablations.table(columns, rows) == [
        "                  error  share",
        "before alignment    8.0",
        "one                 1.2   0.50",
        "second             12.0",
    ]


# --- the experiments ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_variant_is_a_run_that_exists(ablations, name: str) -> None:  # type: ignore[no-untyped-def]
    ablation = importlib.import_module(name).ABLATION
    assert ablation.file == EXPERIMENTS / f"{name}.py"
    names = [variant.name for variant in ablation.variants]
    assert len(set(names)) == len(names)
    configs = []
    for variant in ablation.variants:
        training, model = with_options(TrainingCfg(), default(), [*ablation.base, *variant.settings])
        assert training.crop
        configs.append((training, model))
    assert len(set(map(str, configs))) == len(configs)  # no two variants are the same run
    docstring = ast.get_docstring(ast.parse(ablation.file.read_text(encoding="utf-8"))) or ""
    assert ablations.BEGIN in docstring
    assert ablations.END in docstring


def test_the_index_lists_every_experiment() -> None:
    readme = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    for name in (*FILES, "breaking_point", "fusion_ceiling", "inference", "limits", "stripped"):
        assert f"[{name}.py]({name}.py)" in readme


# --- how much better a fused image could be ---------------------------------------------------------


def test_a_fused_image_is_moved_down_the_loss_and_black_stays_black() -> None:
    ceiling = importlib.import_module("fusion_ceiling")
    fixed, moving = (torch.from_numpy(scan((64, 64), seed=seed) / 255.0).float()[None, None] for seed in (1, 2))
    objective = Objective(BSAFusion(default()), TrainingCfg(parts="fusion", weights=ceiling.TRAINED))

    def loss(fused: torch.Tensor) -> float:
        return float(total_loss(objective.fusion_terms(fused, fixed, moving), ceiling.TRAINED))

    start = (fixed + moving) / 2
    end = ceiling.improved(start, fixed, moving, objective)
    assert loss(end) < 0.95 * loss(start)
    assert not end[(fixed + moving) == 0].any()
    assert 0 <= float(end.min()) <= float(end.max()) <= 1
    before, after = (ceiling.score(fused, fixed, moving) for fused in (start, end))
    assert after["qabf"] > before["qabf"] + 0.02


def test_what_can_be_gained_is_a_table_of_every_task(pairs_csv: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from pairs import known_weights

    ceiling = importlib.import_module("fusion_ceiling")
    monkeypatch.setattr(ceiling, "STEPS", 2)
    file = tmp_path / "fusion_ceiling.py"
    file.write_text(DOCSTRING, encoding="utf-8")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    ceiling.run(file, pairs_csv, str(known_weights(tmp_path)), 1)
    figures = json.loads((tmp_path / "results/fusion_ceiling.json").read_text(encoding="utf-8"))["figures"]
    assert figures.keys() == {f"{task} {way}" for task in ("CT", "PET") for way in ("network", *ceiling.WAYS)}
    assert figures["CT network"] != figures["CT and on"]
    assert "CT and on, 3 x structure" in file.read_text(encoding="utf-8")


# --- where alignment breaks -----------------------------------------------------------------------


def test_known_fields_have_the_size_they_are_asked_for() -> None:
    breaking = importlib.import_module("breaking_point")
    mask = torch.zeros(65, 65, dtype=torch.bool)
    mask[10:50, 20:60] = True
    turned = breaking.known_field("rotation", 30, 1, mask)[0].numpy()
    # A point d from the middle moves along the chord 2 d sin(angle / 2).
    assert np.linalg.norm(turned[:, 32, 52]) == pytest.approx(2 * 20 * math.sin(math.radians(15)), abs=1e-4)
    assert np.allclose(
        breaking.known_field("rotation", 30, 2, mask)[0, :, 52, 32].flip(0), turned[:, 32, 52], atol=1e-4
    )
    small, large = (breaking.known_field("elastic", amount, 3, mask)[0] for amount in (2, 8))
    assert float(small.norm(dim=0)[mask].mean()) == pytest.approx(2, rel=1e-5)
    assert torch.allclose(large, 4 * small, rtol=1e-4, atol=1e-5)
    assert not breaking.known_field("elastic", 0, 3, mask).any()


def test_the_sweep_of_a_network_that_never_moves(pairs_csv: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from pairs import known_weights

    breaking = importlib.import_module("breaking_point")
    monkeypatch.setattr(breaking, "AMOUNTS", {"rotation": (0, 45), "elastic": (0, 8)})
    file = tmp_path / "breaking_point.py"
    file.write_text(DOCSTRING, encoding="utf-8")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    breaking.run(file, pairs_csv, str(known_weights(tmp_path)), 1)
    rows = (tmp_path / "results" / "breaking_point.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "kind,amount,task,before,error,off,suspect,missed,folded"
    assert len(rows) == 1 + 2 * 2 * 2  # kinds, amounts, tasks
    results = json.loads((tmp_path / "results" / "breaking_point.json").read_text(encoding="utf-8"))
    still, far = results["points"]["rotation"]["0"], results["points"]["rotation"]["45"]
    assert still["error"] == pytest.approx(0, abs=1e-3)
    assert still["off"] == 0
    assert far["error"] == pytest.approx(far["before"], abs=1e-3)  # nothing was done about it
    assert far["off"] == 1
    assert far["missed"] == 1 - far["suspect"]
    assert results["points"]["elastic"]["8"]["before"] == pytest.approx(8, rel=0.01)
    assert "rotation breaks at 45 degrees" in results["summary"]
    drawing = ElementTree.parse(tmp_path / "results" / "breaking_point.svg")
    lines = drawing.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * (2 + 1 + 2)  # for each kind: two tasks, before; off, suspect


# --- ways to align with the same weights ----------------------------------------------------------


def test_ways_to_align(small_cfg: BSAFusionCfg, randomise: Callable[[BSAFusion], BSAFusion]) -> None:
    inference = importlib.import_module("inference")
    network = randomise(BSAFusion(small_cfg)).eval()
    fixed, moving = torch.rand(2, 1, 1, 60, 77, generator=torch.Generator().manual_seed(3)).unbind(0)
    with torch.inference_mode():
        found = inference.ways(network, fixed, moving)
        stay = inference.ways(network, fixed, fixed)
    assert torch.allclose(
        found["all steps"], network.predict(fixed, moving, mirrored="never").alignment.displacement, atol=1e-3
    )
    assert torch.equal(found["all steps, in grey"], found["all steps"])  # it was grey
    for way, asked in (("mirrored above 3", "auto"), ("mirrored", "always")):
        mirrored = network.predict(fixed, moving, mirrored=asked).alignment.displacement
        assert torch.allclose(found[way], mirrored, atol=1e-3)
    half, whole = found["and half of it"], found["and a second pass"]
    # Half a second pass lies halfway to the whole one, to first order.
    part = ((half - found["all steps"]).norm() / (whole - found["all steps"]).norm()).item()
    assert part == pytest.approx(0.5, abs=0.1)
    assert all(field.abs().max() < 1e-3 for field in stay.values())


@pytest.mark.parametrize(
    ("name", "suites"), [("inference", ("paper", "rigid", "large")), ("stripped", ("paper", "rigid"))]
)
def test_no_way_helps_a_network_that_never_moves(
    pairs_csv: Path, tmp_path: Path, name: str, suites: tuple[str, ...]
) -> None:
    from pairs import known_weights

    file = tmp_path / f"{name}.py"
    file.write_text(DOCSTRING, encoding="utf-8")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    importlib.import_module(name).run(file, pairs_csv, str(known_weights(tmp_path)), 1, 1)
    results = json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8"))
    before = results["errors"]["before alignment"]
    assert before.keys() == {f"{s}/{t}" for s in suites for t in ("ct-mri", "pet-mri")}
    assert len(results["errors"]) > 5
    for row in results["errors"].values():
        assert row == pytest.approx(before, abs=1e-3)
    assert f"| [{name}.py]({name}.py) |" in (tmp_path / "README.md").read_text(encoding="utf-8")


# --- heads without their rim ----------------------------------------------------------------------


def test_a_pair_is_spoilt_in_one_image_or_both() -> None:
    stripped = importlib.import_module("stripped")
    fixed, moving = torch.rand(2, 1, 1, 96, 96, generator=torch.Generator().manual_seed(5)) + 0.05
    mask = torch.zeros(1, 1, 96, 96)
    mask[..., 10:86, 10:86] = 1
    found = stripped.spoilt(fixed * mask, moving * mask, mask)
    whole = found.pop(stripped.AS_IT_IS)
    left = {name: [int((image > 0).sum()) for image in pair] for name, pair in found.items()}
    full = [int((image > 0).sum()) for image in whole]
    assert left["MRI without 4 px"][0] > left["MRI without 8 px"][0] > left["MRI without 16 px"][0]
    assert left["both without 16 px"] == [left["MRI without 16 px"][0], left["moving without 16 px"][1]]
    assert left["moving above 0.1"][1] > left["moving above 0.2"][1] > left["moving above 0.3"][1]
    for name, counts in left.items():
        changed = [name.startswith(("MRI", "both")), name.startswith(("moving", "both"))]
        assert [count < all_ for count, all_ in zip(counts, full, strict=True)] == changed


def test_the_network_sees_the_spoilt_pairs_misaligned(
    small_cfg: BSAFusionCfg, randomise: Callable[[BSAFusion], BSAFusion], pairs_csv: Path
) -> None:
    stripped = importlib.import_module("stripped")
    network = randomise(BSAFusion(small_cfg)).eval()
    data = PairSet(read_pairs(pairs_csv, split="val"), side=64)
    b = validation_batch(data, [0], MISALIGNMENTS["rigid"], draw=0, device=torch.device("cpu"))
    with torch.inference_mode():
        found = stripped.ways(network, b)
        plain = network.match(b.fixed, b.moving).alignment.displacement[..., :64, :64]
    assert torch.allclose(found.pop(stripped.AS_IT_IS), plain, atol=1e-4)
    assert all((field - plain).abs().max() > 1e-3 for field in found.values())


# --- what is left ---------------------------------------------------------------------------------


def test_parts_of_residuals_that_are_known() -> None:
    limits = importlib.import_module("limits")
    mask = np.ones((8, 9), dtype=bool)
    mask[0] = False
    shared, swing = np.zeros((2, 8, 9)), np.zeros((2, 8, 9))
    shared[0], shared[1], swing[0] = 3.0, 4.0, 0.5
    shared[:, 0] = 100.0  # outside the head
    same = {"error": 5, "rms": 25, "common": 25, "own": 0, "shift": 5}
    opposite = {"error": 0.5, "rms": 0.25, "common": -0.25, "own": 0.5, "shift": 0}
    assert limits.parts([shared, shared], mask) == pytest.approx(same)
    assert limits.parts([swing, -swing], mask) == pytest.approx(opposite)
    assert limits.mean_of([same, opposite]) == pytest.approx(
        {"error": 2.75, "rms": 12.625**0.5, "common": 12.375**0.5, "own": 0.5, "shift": 2.5}
    )
    assert limits.mean_of([opposite])["common"] == 0  # below 0 by chance
    turned = np.stack([np.where(np.arange(9) < 4, 1.0, -1.0) * np.ones((8, 1)), np.zeros((8, 9))])
    found = limits.parts([turned, turned], mask)
    assert found["common"] == pytest.approx(1)
    assert found["shift"] == pytest.approx(1 / 9)  # five columns against four


@pytest.mark.parametrize("draws", [2, 3, 8])
def test_few_draws_do_not_make_what_each_has_of_its_own_smaller(draws: int) -> None:
    limits = importlib.import_module("limits")
    chance, mask = np.random.default_rng(0), np.ones((100, 100), dtype=bool)
    common = np.stack([np.full((100, 100), 3.0), np.zeros((100, 100))])
    residuals = [common + chance.normal(0, 2, common.shape) for _ in range(draws)]
    found = limits.mean_of([limits.parts(residuals, mask)])
    assert found["common"] == pytest.approx(3, rel=0.05)
    assert found["own"] == pytest.approx(8**0.5, rel=0.05)  # 2 in each direction


def test_slices_are_compared_with_the_next_of_their_case(pairs_csv: Path) -> None:
    limits = importlib.import_module("limits")
    pair = read_pairs(pairs_csv)[0]
    of = {"3": "a", "0": "b", "1": "a", "2": "a", "4": ""}
    data = PairSet([replace(pair, id=name, case=case) for name, case in of.items()], side=64)
    assert limits.neighbours(data) == [(2, 3), (3, 0)]


def test_a_slice_that_the_atlas_puts_elsewhere_than_the_next_is_seen(pairs_csv: Path) -> None:
    from bsafusion.pipeline import load_model
    from bsafusion.samples import load_samples

    limits = importlib.import_module("limits")
    sample = next(s for s in load_samples() if s.id == "ct-mri")
    data = PairSet(read_pairs(pairs_csv)[:2])
    for stack, file in ((data.fixed, sample.fixed), (data.moving, sample.original)):
        image = read_image(file)
        grey = torch.from_numpy(np.round(255 * image.luma() / image.luma().max())).byte()
        stack.zero_()
        stack[:, 0, : grey.shape[0], : grey.shape[1]] = grey[:256, :256]
    data.chroma.zero_()
    data.moving[1] = data.moving[1].roll((0, 3), (-2, -1))
    network = load_model().network.eval()
    with torch.inference_mode():
        assert limits.atlas_differs(network, data, 0, 0) < 0.01
        assert limits.atlas_differs(network, data, 0, 1) == pytest.approx(3, abs=0.5)


def test_mutual_information_finds_a_shift_in_another_contrast_and_what_it_confirms(pairs_csv: Path) -> None:
    from pairs import known_network

    limits = importlib.import_module("limits")
    data = PairSet(read_pairs(pairs_csv, split="val"), side=65)
    fixed, moving, mask = data.pictures([0])
    shifted = moving.roll((-3, 2), (-2, -1))
    inside = mask[0, 0].numpy() > 0
    assert limits.best_shift(fixed[0, 0].numpy(), shifted[0, 0].numpy(), inside).tolist() == [-3, 2]
    data.moving[0] = (255 * shifted[0, :1]).round().byte()
    for shift, confirmed in (((-3.0, 2.0), 1), ((3.0, -2.0), -1), ((2.0, 3.0), 0)):
        moved, share = limits.without_deformation(known_network(shift), data, [0])
        assert moved == pytest.approx(13**0.5, abs=0.05)
        assert share == pytest.approx(confirmed, abs=0.03)


def test_what_a_network_that_never_moves_leaves(pairs_csv: Path, tmp_path: Path) -> None:
    from pairs import known_weights

    limits = importlib.import_module("limits")
    file = tmp_path / "limits.py"
    file.write_text(DOCSTRING, encoding="utf-8")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    limits.run(file, pairs_csv, str(known_weights(tmp_path)), 2, 1)
    rows = json.loads((tmp_path / "results" / "limits.json").read_text(encoding="utf-8"))["pixels"]
    for suite in ("paper", "rigid"):
        key = f"{suite}/ct-mri"
        for split in ("train", "val"):
            error, rms, common, own, shift = (
                rows[f"{name}, {split}"][key] for name in ("error", "rms", "common", "own", "shift")
            )
            assert rms > error > shift > 0
            # What two draws share by chance is less than nothing for some fields: then nothing is common.
            assert own**2 + common**2 == pytest.approx(rms**2) if common else own > rms
        assert rows["known image, val"][key] > 1
    assert "| [limits.py](limits.py) |" in (tmp_path / "README.md").read_text(encoding="utf-8")
