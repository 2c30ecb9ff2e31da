"""Runs that cannot work say so; those that can do not."""

from types import SimpleNamespace

import pytest
import torch

from training.config import PRESETS, PretrainSettings
from training.pretrain import pretrain
from training.watch import RunProblem, Watch, lr_sentence


@pytest.fixture
def said():
    return []


@pytest.fixture
def look(said):
    """look(step, loss, spread): what a watch with 20 steps of warm-up says at N = 128, where chance is 5.541."""
    watch = Watch(warmup_steps=20)

    def call(step: int, loss: float, spread: float = 1.0) -> None:
        bar = SimpleNamespace(print=said.append)
        trainer = SimpleNamespace(global_step=step, is_global_zero=True, progress_bar_callback=bar)
        values = {"loss_value": torch.tensor(loss), "spread": torch.tensor(spread)}
        watch.look(trainer, SimpleNamespace(settings=PretrainSettings(batch_size=128), **values))

    return call


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(look, loss):
    with pytest.raises(RunProblem, match=rf"the loss is {loss} at step 300, .* Try a lower --lr than 0\.075"):
        look(300, loss)


def test_a_loss_at_chance_is_reported_once_and_not_before_it_had_time(look, said):
    look(100, 5.53)
    look(300, 5.0)
    assert said == []
    look(300, 5.53)
    look(400, 5.53)
    assert len(said) == 1
    assert "is still at its chance level log(2N - 1) = 5.541" in said[0]


def test_collapse_is_reported_at_once(look, said):
    look(10, 5.541, spread=0.01)
    assert len(said) == 1 and "the encoder is collapsing" in said[0]


def test_a_learning_rate_out_of_range_is_named_with_how_it_came_about():
    settings = PretrainSettings(lr=3.0, lr_scaling="linear", batch_size=4096)
    assert "the peak learning rate is 48 (--lr 3 with --lr-scaling linear at batch size 4096)" in lr_sentence(settings)
    assert lr_sentence(PretrainSettings(lr=0.0001)) is not None
    for _, preset in PRESETS.values():
        assert lr_sentence(preset) is None


def test_a_run_of_a_hundredfold_rate_is_warned_of_and_one_that_breaks_ends_in_words(
    small_settings, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunProblem, match=r"the loss is nan at step \d+"):
        pretrain(small_settings(optimizer="sgd", lr=1e30, warmup=0.0, epochs=5, lr_scaling="none"))
    assert "the peak learning rate is 1e+30" in capsys.readouterr().out + capsys.readouterr().err
