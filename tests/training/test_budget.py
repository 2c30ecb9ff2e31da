"""--minutes, by clocks that advance only with the work that a test lets a run do."""

import csv
import itertools
import math
import re

import pytest
import torch
from torch import nn

from training import budget, checkpoint, distil, report
from training.budget import Budget
from training.evaluation import knn
from training.pretrain import pretrain
from training.schedule import cosine_schedule
from training.simclr import SimCLR


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def during(self, function, *seconds: float):
        """The function, which then takes so many seconds: the first time, the second, and the last from then on."""
        costs = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def takes(*arguments, **options):
            self.now += next(costs)
            return function(*arguments, **options)

        return takes


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = Clock()
    monkeypatch.setattr(budget, "clock", made)
    monkeypatch.setattr(budget, "EXIT_S", 0.5)  # which these tests do not let depend on the pace
    return made


def steps_of(clock: Clock, limited: Budget, costs) -> list[float]:
    """The share after each step, until no other fits."""
    limited.start()
    shares = []
    for cost in costs:
        clock.now += cost
        limited.step()
        shares.append(limited.share)
        if limited.is_over:
            break
    return shares


@pytest.mark.parametrize(
    ("name", "costs"),
    [
        ("even", itertools.repeat(1.0)),
        ("three times slower midway", itertools.chain([1.0] * 50, itertools.repeat(3.0))),
        ("faster midway", itertools.chain([3.0] * 15, itertools.repeat(1.0))),
        ("a pause", itertools.chain([1.0] * 20, [30.0], itertools.repeat(1.0))),
    ],
)
def test_a_run_ends_in_time_and_its_share_reaches_1(clock, name, costs):
    slower = 3 if "slower" in name else 1 / 3 if "faster" in name else 1
    limited = Budget(2.0, began=clock.now - 12)  # of importing
    with limited.ending("measuring"):
        clock.now += 6
    shares = steps_of(clock, limited, costs)
    assert shares == sorted(shares) and shares[-1] > 0.9
    clock.now += 6 * slower**budget.EXPONENT + budget.EXIT_S  # what was measured before now changes, too
    assert 0.9 * 120 <= limited.used_s <= 120
    assert limited.outcome() == f"done in {limited.used_s / 60:.1f} min"


def test_how_much_less_than_steps_the_end_is_slowed_down_is_learned(clock):
    """Steps use all cores, and wait for the slowest one; measuring takes twice as long when they take four times."""
    limited = Budget(4.0)
    with limited.ending("measuring"):
        clock.now += 10
    steps_of(clock, limited, [0.5] * 40)
    steps_of(clock, limited, [2.0] * 3)
    with limited.ending("measuring"):
        clock.now += 20
    shares = steps_of(clock, limited, itertools.chain([2.0] * 20, itertools.repeat(8.0)))
    clock.now += 40 + budget.EXIT_S
    assert shares[-1] > 0.9
    assert 0.95 * 240 <= limited.used_s <= 1.02 * 240


@pytest.mark.parametrize(("at_first", "later"), [(4.0, 1.0), (1.0, 4.0)])
def test_the_time_kept_for_the_end_follows_the_machine_both_ways(clock, at_first, later):
    """Other programs end, or begin, after the work at the start was timed."""
    limited = Budget(2.0)
    with limited.ending("measuring"):
        clock.now += 5 * at_first
    steps_of(clock, limited, itertools.chain([at_first] * 5, itertools.repeat(later)))
    clock.now += 5 * at_first * (later / at_first) ** 0.7 + budget.EXIT_S
    assert 0.95 * 120 <= limited.used_s <= 1.03 * 120


def test_slow_first_steps_do_not_make_the_end_seem_shorter(clock):
    """A process that has just started is slow, on a machine that is as fast as later."""
    limited = Budget(2.0)
    with limited.ending("measuring"):
        clock.now += 20
    steps_of(clock, limited, itertools.chain([3.0] * 2, itertools.repeat(1.0)))
    clock.now += 20 + budget.EXIT_S
    assert 0.95 * 120 <= limited.used_s <= 120


def test_a_pause_just_before_the_end_does_not_end_the_run_early(clock):
    limited = Budget(2.0)
    with limited.ending("measuring"):
        clock.now += 10
    steps_of(clock, limited, itertools.chain([1.0] * 80, [9.0], itertools.repeat(1.0)))
    clock.now += 10 + budget.EXIT_S
    assert 0.95 * 120 <= limited.used_s <= 120


def test_a_few_quick_steps_do_not_make_the_end_seem_longer(clock):
    """On a machine whose other programs pause for a moment."""
    limited = Budget(2.0)
    with limited.ending("measuring"):
        clock.now += 20
    steps_of(clock, limited, itertools.chain([2.0] * 10, [0.5] * 5, itertools.repeat(2.0)))
    clock.now += 20 + budget.EXIT_S
    assert 0.95 * 120 <= limited.used_s <= 120


def test_the_share_of_an_even_run_is_that_of_the_time(clock):
    limited = Budget(1.0)
    shares = steps_of(clock, limited, itertools.repeat(1.0))
    training_s = 60 - budget.EXIT_S
    assert shares == pytest.approx([step / training_s for step in range(1, len(shares) + 1)])
    assert len(shares) == int(training_s)


def test_a_resumed_run_has_the_time_that_was_left_and_continues_its_share(clock):
    limited = Budget(2.0)
    with limited.ending("measuring"):
        clock.now += 5
    steps_of(clock, limited, [1.0] * 40)
    saved = limited.state()
    clock.now += 10_000
    again = Budget(2.0, saved=saved)
    assert again.left_s == limited.left_s + 10_000 == 120 - 45 - 5 - budget.EXIT_S
    shares = steps_of(clock, again, itertools.repeat(1.0))
    assert saved["share"] < shares[0] and shares[-1] > 0.9
    assert 110 < again.used_s < 120


def test_a_run_whose_time_is_over_before_it_trains_takes_one_step_and_says_so(clock):
    limited = Budget(0.1)
    clock.now += 90
    assert len(steps_of(clock, limited, [1.0] * 5)) == 1
    assert limited.outcome() == "done in 1.5 min, longer than --minutes 0.1: training could begin after 1.5 min"


def test_the_learning_rate_follows_the_share(clock):
    limited = Budget(1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine_schedule(optimizer, 0.2, 7, limited)
    for share, rate in ((0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.5), (1.0, 0.0)):
        limited.share = share
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * rate, abs=1e-12)


def test_without_minutes_nothing_is_limited(clock):
    limited = Budget(None)
    assert len(steps_of(clock, limited, [1e9] * 20)) == 20
    assert (limited.left_s, limited.affordable(0.1, 1.0, 7000)) == (math.inf, 7000)


def test_so_many_are_measured_as_fit_into_a_part_of_the_time(clock):
    assert Budget(2.0).affordable(0.1, 0.01, most=50_000) == 1200
    assert Budget(2.0).affordable(0.1, 1e-6, most=50_000) == 50_000
    assert Budget(2.0).affordable(0.1, 10.0, most=50_000) == 100


@pytest.mark.slow
@pytest.mark.parametrize(("slower", "loading_s"), [(1.0, 8), (3.0, 8), (1.0, 40)])
def test_pretraining_ends_in_time_with_everything_counted_in(
    small_settings, clock, monkeypatch, capsys, slower, loading_s
):
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)  # otherwise it depends on the real clock how often is saved
    steps, factor = [], lambda: slower if len(steps) > 12 else 1.0

    def after(function, seconds):
        def takes(*arguments, **options):
            clock.now += seconds * factor()
            return function(*arguments, **options)

        return takes

    monkeypatch.setattr(SimCLR, "loss", after(SimCLR.loss, 3.0))
    monkeypatch.setattr(SimCLR, "training_step", count(SimCLR.training_step, steps))
    monkeypatch.setattr(knn, "metrics", after(knn.metrics, 4.0))
    monkeypatch.setattr(report, "write", after(report.write, 5.0))
    monkeypatch.setattr(
        checkpoint.AtomicCheckpointIO, "save_checkpoint", after(checkpoint.AtomicCheckpointIO.save_checkpoint, 1.0)
    )
    run = pretrain(small_settings(minutes=2.0, knn_epochs=4, batch_size=16), began=clock.now - loading_s)
    used_s = float(clock.now - 1000 + loading_s + budget.EXIT_S)
    assert 0.9 * 120 <= used_s <= 1.1 * 120
    assert "done in" in capsys.readouterr().out
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    rates = [float(row["lr"]) for row in rows]
    assert rates[-1] < 0.1 * max(rates)
    assert len(steps) == int(rows[-1]["step"]) and rows[-1]["knn"]
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["facts"]["epochs"] == saved["settings"]["epochs"] == len(rows)
    assert pretrain(small_settings(minutes=2.0, knn_epochs=4, batch_size=16, resume=True)) == run
    assert "is finished" in capsys.readouterr().out


def count(function, calls: list):
    return lambda *arguments: calls.append(1) or function(*arguments)


@pytest.mark.slow
def test_pretraining_that_was_interrupted_has_its_time_left(small_settings, clock, monkeypatch):
    steps, loss = [], SimCLR.loss

    def stop(*arguments):
        steps.append(1)
        clock.now += 3
        if len(steps) == 8:
            raise ValueError("stopped")
        return loss(*arguments)

    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(SimCLR, "loss", stop)
    with pytest.raises(ValueError, match="stopped"):
        pretrain(small_settings(minutes=1.0))
    config = (pretrain_folder := checkpoint.find(checkpoint.Path("runs/small")).parent.parent) / "config.json"
    assert int(re.search(r'"epochs": (\d+)', config.read_text())[1]) > 4  # what the page shows while it runs
    clock.now += 10_000
    pretrain(small_settings(minutes=1.0, resume=True))
    saved = checkpoint.load(checkpoint.find(pretrain_folder))
    assert 15 <= saved["global_step"] <= 19
    assert saved["history"][-1]["lr"] < 0.2 * max(row["lr"] for row in saved["history"])


@pytest.mark.slow
def test_a_head_that_is_trained_first_takes_a_fifth_of_the_time_at_most(small_settings, clock, monkeypatch):
    trained, loss = [], SimCLR.loss

    def takes(self, *arguments):
        clock.now += 3
        trained.append(self.encoder.conv1.weight.requires_grad)
        return loss(self, *arguments)

    monkeypatch.setattr(SimCLR, "loss", takes)
    pretrain(small_settings(minutes=1.0, head_first=100))
    assert trained.index(True) == pytest.approx(0.2 * len(trained), abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("teacher_s", [0.01, 0.2])
def test_distilling_ends_in_time_also_with_a_teacher_that_takes_long(
    small_settings, clock, monkeypatch, capsys, teacher_s
):
    teacher = pretrain(small_settings(name="teacher", epochs=1))
    opened = distil.open_teacher(str(teacher))

    def encode(pixels):
        clock.now += teacher_s * len(pixels)
        return opened.encoder.encode(pixels)

    slow = distil.dataclasses.replace(opened, encoder=distil.dataclasses.replace(opened.encoder, encode=encode))
    monkeypatch.setattr(distil, "open_teacher", lambda name: slow)
    monkeypatch.setattr(distil.DistilStep, "__call__", after_two_seconds(clock, distil.DistilStep.__call__))
    monkeypatch.setattr(budget, "LEAST", 8)
    monkeypatch.setattr("training.teacher.images_per_s", lambda *_: 1)  # repeats a batch for half a second
    monkeypatch.setattr(distil, "TEACHING", 0.1)
    began = clock.now
    settings = distil.DistilSettings(
        teacher=str(teacher), data=small_settings().data, name="student", size_px=16, batch_size=16, minutes=2.0
    )
    run = distil.distil(settings)
    minutes = (clock.now - began) / 60
    assert 0.9 * 2 <= minutes <= 1.1 * 2
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["history"][-1]["lr"] < 0.01 and saved["distillation"]["settings"]["epochs"] == len(saved["history"])
    assert ("the teacher encodes" in capsys.readouterr().out) == (64 * teacher_s > 0.1 * 2 * 60)


def after_two_seconds(clock: Clock, function):
    def takes(*arguments):
        clock.now += 2
        return function(*arguments)

    return takes
