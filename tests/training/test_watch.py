"""Runs that cannot work are warned of or ended; those that can are not."""

from types import SimpleNamespace

import pytest
import torch

from training.config import PRESETS, PretrainSettings
from training.pretrain import pretrain
from training.watch import RunProblem, Watch, lr_warning

DEFAULTS = PretrainSettings(batch_size=128)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def check(warnings):
    """check(step, loss, spread): a watch with 20 steps of warm-up, at N = 128, where NT-Xent's chance is 5.541."""
    watch = Watch(warmup_steps=20)

    def call(step: int, loss: float, spread: float = 1.0, settings: PretrainSettings = DEFAULTS) -> None:
        watch.check(trainer(step, warnings), module(loss, spread, settings))

    return call


def trainer(step: int, warnings: list[str]) -> SimpleNamespace:
    bar = SimpleNamespace(print=warnings.append)
    return SimpleNamespace(global_step=step, is_global_zero=True, progress_bar_callback=bar)


def module(loss: float, spread: float = 1.0, settings: PretrainSettings = DEFAULTS) -> SimpleNamespace:
    return SimpleNamespace(settings=settings, loss_value=torch.tensor(loss), spread=torch.tensor(spread))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(check, loss):
    with pytest.raises(RunProblem, match=rf"the loss is {loss} at step 300, .* Try a lower --lr than 0\.075"):
        check(300, loss)


def test_a_loss_at_chance_is_reported_once_and_not_before_it_had_time(check, warnings):
    check(100, 5.53)
    check(300, 5.0)
    assert warnings == []
    check(300, 5.53)
    check(400, 5.53)
    assert len(warnings) == 1
    assert "is still at its chance level 5.541" in warnings[0]


@pytest.mark.parametrize("learns", [True, False])
def test_one_batch_does_not_decide_whether_the_loss_is_at_chance(warnings, learns):
    watch, usual, other = Watch(warmup_steps=20), 4.8 if learns else 5.54, 5.6 if learns else 4.8
    for step in range(1, 301):
        watch.on_train_batch_end(trainer(step, warnings), module(other if step == 300 else usual), None, None, 0)
    assert len(warnings) == (not learns)


@pytest.mark.parametrize(("loss", "chance"), [("nt_xent", "1.099"), ("dcl", "0.693")])
def test_the_chance_level_is_that_of_the_loss(check, warnings, loss, chance):
    settings = PretrainSettings(loss=loss, batch_size=2)
    check(300, 0.98 * float(chance) - 0.001, settings=settings)
    assert warnings == []
    check(300, 0.98 * float(chance) + 0.001, settings=settings)
    assert len(warnings) == 1 and f"chance level {chance}" in warnings[0]


def test_collapse_is_reported_at_once(check, warnings):
    check(10, 5.541, spread=0.01)
    assert len(warnings) == 1 and "the encoder is collapsing" in warnings[0]


def test_a_learning_rate_out_of_range_is_named_with_the_settings_that_give_it():
    settings = PretrainSettings(lr=3.0, lr_scaling="linear", batch_size=4096)
    assert "the peak learning rate is 48 (--lr 3 with --lr-scaling linear at batch size 4096)" in lr_warning(settings)
    assert lr_warning(PretrainSettings(lr=0.0001)) is not None
    assert lr_warning(PretrainSettings(optimizer="adamw", lr=0.075)) is not None
    for _, preset in PRESETS.values():
        assert lr_warning(preset) is None


@pytest.mark.slow
def test_a_run_with_an_extreme_learning_rate_prints_a_warning_and_ends_with_a_message(
    small_settings, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunProblem, match=r"the loss is nan at step \d+"):
        pretrain(small_settings(optimizer="sgd", lr=1e30, warmup=0.0, epochs=5, lr_scaling="none"))
    assert "the peak learning rate is 1e+30" in capsys.readouterr().out + capsys.readouterr().err
