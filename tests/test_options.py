from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsafusion.models.bsafusion import BSAFusionCfg, default, paper
from bsafusion.options import with_options
from bsafusion.training import TrainingCfg


def changed(*settings: str) -> tuple[TrainingCfg, BSAFusionCfg]:
    return with_options(TrainingCfg(), default(), list(settings))


def test_no_settings_change_nothing() -> None:
    assert changed() == (TrainingCfg(), default())


def test_settings_reach_nested_options_and_leave_the_rest() -> None:
    training, model = changed("training.weights.ce2=0.25", "training.mix.pose.rotation=3.5", "model.fusion.blocks=2")
    assert training.weights.ce2 == 0.25
    assert training.mix.pose.rotation == 3.5
    assert training.mix.pose.scale == TrainingCfg().mix.pose.scale
    assert training.steps == TrainingCfg().steps
    assert model.fusion.blocks == 2
    assert model.alignment == default().alignment


def test_a_preset_is_no_option() -> None:
    with pytest.raises(ValueError, match="a preset is more than its name; choose it with --preset"):
        changed("model.preset=paper")


def test_the_configs_that_came_in_are_left_alone() -> None:
    training, model = TrainingCfg(), paper()
    with_options(training, model, ["training.seed=9", "model.working_side=129"])
    assert (training, model) == (TrainingCfg(), paper())


def test_lists_become_tuples_at_every_depth() -> None:
    training, model = changed(
        'training.mix.misalignments=[["paper", 0.25], ["rigid", 0.75]]', 'model.alignment.steps=["1/16", "1/8"]'
    )
    assert training.mix.misalignments == (("paper", 0.25), ("rigid", 0.75))
    assert model.alignment.steps == ("1/16", "1/8")
    hash(training)
    hash(model)


@pytest.mark.parametrize("text", ["forward", '"forward"'])
def test_a_bare_word_is_a_string(text: str) -> None:
    assert changed(f"model.alignment.direction={text}")[1].alignment.direction == "forward"


def test_a_whole_number_serves_as_a_real_one() -> None:
    value = changed("training.lr=1")[0].lr
    assert value == 1.0
    assert isinstance(value, float)


def test_whole_numbers_serve_as_real_ones_in_lists_and_records() -> None:
    mix = changed("training.mix.tasks=[1, 0, 0.5]", 'training.mix.misalignments=[["rigid", 1]]')[0].mix
    assert (mix.tasks, mix.misalignments) == ((1.0, 0.0, 0.5), (("rigid", 1.0),))


def test_booleans() -> None:
    assert changed("model.representation.inject=false")[1].representation.inject is False


def test_the_last_setting_wins() -> None:
    assert changed("training.seed=1", "training.seed=2")[0].seed == 2


@given(steps=st.integers(1, 10**6), lr=st.floats(1e-9, 1.0))
def test_numbers_arrive_as_written(steps: int, lr: float) -> None:
    training, _ = changed(f"training.steps={steps}", f"training.lr={lr!r}")
    assert (training.steps, training.lr) == (steps, lr)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed=3", "expected training.NAME=VALUE or model.STAGE.NAME=VALUE"),
        ("training.seed", "expected training.NAME=VALUE"),
        ("training=3", "expected training.NAME=VALUE"),
        ("network.seed=3", "expected training.NAME=VALUE"),
        ("training.sead=3", r"no option 'sead'; expected one of .*seed"),
        ("model.alignment.radii=[3]", r"no option 'radii'; expected one of .*radius"),
        ("training.seed.low=3", "'seed' is a value, not a group"),
        ("training.weights=3", r"'weights' is a group of options: .*ce2"),
        ("training.steps=many", "'many' is not of the kind of 20000"),
        ("training.steps=2.5", "2.5 is not of the kind of 20000"),
        ("training.lr=true", "True is not of the kind of 0.002"),
        ("training.lr=null", "None is not of the kind of 0.002"),
        ("training.suites=paper", "'paper' is not of the kind of"),
        ("model.representation.inject=1", "1 is not of the kind of True"),
        ("training.suites=[1]", "is not of the kind of"),
        ("training.mix.misalignments=[paper]", "is not of the kind of"),
        ('training.mix.misalignments=["paper"]', "is not of the kind of"),
        ('training.mix.misalignments=[["paper"]]', "is not of the kind of"),
        ('training.suites=[["paper"]]', "is not of the kind of"),
        ('model.encoder.widths=["wide"]', "is not of the kind of"),
    ],
)
def test_what_does_not_fit_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        changed(setting)
    assert setting in str(caught.value) or repr(setting) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('training.suites=["weird"]', "unknown suites"),
        ("model.alignment.direction=sideways", "direction 'sideways'"),
        ('model.alignment.steps=["1/8", "1/16"]', "coarse to fine"),
        ("training.parts=half", "parts 'half'"),
    ],
)
def test_the_config_s_own_checks_still_hold(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(setting)


NUMBERS = [
    *(f"training.mix.pose.{name}" for name in ("translation", "rotation", "scale", "elastic", "sigma")),
    *(f"training.{name}" for name in ("lr", "clip", "weight_decay")),
]
COUNTS = [
    *(f"model.representation.{name}" for name in ("heads", "mlp_dim", "blocks", "transfer_blocks", "cross_blocks")),
    *("model.representation.position_grid", "model.alignment.layers", "model.alignment.context"),
    "model.encoder.shallow",
]


@pytest.mark.parametrize(
    "setting",
    [
        *(f"{path}={value}" for path in NUMBERS for value in ("NaN", "Infinity", "-1")),
        *(f"{path}=-1" for path in COUNTS),
        "model.representation.heads=0",
        "model.encoder.widths=[-8, 48, 64, 96]",
        "model.alignment.radius=[0, -3, 3, 3, 2, 1]",
        "training.mix.pose.scale=1",
    ],
)
def test_numbers_that_make_no_sense_are_refused(setting: str) -> None:
    name = setting.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"{name} .*(expected|takes)"):
        changed(setting)


@pytest.mark.parametrize("value", ["[" * depth + "]" * depth for depth in (400, 700, 10_000)] + ["1" + "0" * 400])
def test_a_value_that_python_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"--set 'training\.lr="):
        changed(f"training.lr={value}")


def test_every_option_of_both_configs_can_be_named() -> None:
    def paths(cfg: Any, prefix: str) -> list[str]:
        named = []
        for name in cfg.__dataclass_fields__:
            value = getattr(cfg, name)
            group = hasattr(value, "__dataclass_fields__")
            named += paths(value, f"{prefix}.{name}") if group else [f"{prefix}.{name}"]
        return named

    for path in {*paths(TrainingCfg(), "training"), *paths(default(), "model")} - {"model.preset"}:
        with pytest.raises(ValueError, match="kind"):
            changed(f"{path}=null")
