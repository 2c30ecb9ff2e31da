"""The verdict on an encoder that was trained further, and which weights are exported after it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.to_onnx import ExportSettings, export
from training import checkpoint
from training.config import PretrainSettings
from training.data import shapes
from training.data.sources import open_source, with_test_split
from training.evaluation.judge import Verdict, changed_views, found_again, verdict
from training.pretrain import open_pictures, pretrain

RNG = np.random.default_rng(0)


def plain(count: int) -> np.ndarray:
    """Pictures of one colour each: (count, 16, 16, 3) uint8."""
    return np.broadcast_to(RNG.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8), (count, 16, 16, 3)).copy()


def test_changed_views_are_the_same_every_time_and_no_picture_is_left_as_it_is():
    pixels = RNG.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
    views = changed_views(pixels, seed=3)
    assert views.shape == pixels.shape and views.dtype == np.uint8
    np.testing.assert_array_equal(views, changed_views(pixels, seed=3))
    different = (views != pixels).any(axis=-1).mean(axis=(1, 2))
    assert (different > 0.5).all()


def test_a_fifth_of_a_changed_view_is_covered():
    views = changed_views(np.zeros((4, 40, 40, 3), np.uint8), seed=0)
    covered = (np.abs(views.astype(int) - 128) < 40).all(axis=-1).mean(axis=(1, 2))
    np.testing.assert_allclose(covered, 0.2, atol=0.02)


def test_pictures_are_found_again_by_an_encoder_that_knows_them_and_not_by_one_that_is_blind():
    pixels = plain(40)

    def colour(batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.median(batch.reshape(len(batch), -1, 3), axis=1)).float() - 128

    assert found_again(colour, pixels) > 0.8
    swapped = {0: 1, 1: 0, 2: 2}  # the first two pictures look like each other's view, the third like its own
    answers = iter([torch.eye(3), torch.eye(3)[[swapped[i] for i in range(3)]] + 0.1 * torch.eye(3)])
    assert found_again(lambda batch: next(answers), pixels[:3]) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert found_again(lambda batch: torch.from_numpy(RNG.standard_normal((len(batch), 8))), pixels) < 0.2
    for same in (torch.ones(40, 8), torch.zeros(40, 8)):
        assert found_again(lambda batch, h=same: h, pixels) == pytest.approx(1 / 40)


@pytest.mark.parametrize(
    ("before", "after", "better", "sentence"),
    [
        (
            {"knn": 0.5, "found_again": 0.9},
            {"knn": 0.6, "found_again": 0.1, "queries": 1200},
            True,
            "better than lite0 as it was: kNN accuracy on 1,200 pictures 50.0% before, 60.0% after",
        ),
        (
            {"knn": 0.667},
            {"knn": 0.68, "queries": 300},
            True,
            "not distinguishable from lite0 as it was: kNN accuracy on 300 pictures 66.7% before, 68.0% after",
        ),
        (
            {"agreement": 0.557},
            {"agreement": 0.56, "pictures": 60},
            True,
            "not distinguishable from lite0 as it was: share of the ten nearest of each of 60 pictures that are the",
        ),
        (
            {"agreement": 0.61},
            {"agreement": 0.72, "pictures": 700},
            True,
            "better than lite0 as it was: share of the ten nearest of each of 700 pictures that are the teacher's "
            "61.0% before, 72.0% after",
        ),
        (
            {"found_again": 0.35},
            {"found_again": 0.3, "judged": 500, "neighbours_shared": 0.8},
            False,
            "worse than lite0 as it was: score of finding each of 500 pictures by a changed view of it 35.0% before, "
            "30.0% after",
        ),
        (
            {"found_again": 0.3},
            {"found_again": 0.3, "judged": 5, "neighbours_shared": 0.8},
            False,
            "neither better nor worse than lite0 as it was",
        ),
        (
            {"found_again": 0.3},
            {"found_again": 0.4, "judged": 500, "neighbours_shared": 0.11},
            False,
            "too far from lite0 as it was to be trusted without labels: 11% of each picture's ten nearest ones",
        ),
        (
            {"found_again": 0.3},
            {"found_again": 0.4, "judged": 500, "neighbours_shared": 0.8},
            True,
            "better than lite0 as it was: score of finding each of 500 pictures",
        ),
    ],
)
def test_labels_decide_where_there_are_some(before, after, better, sentence):
    found = verdict("lite0", before, after)
    assert found.better == better and sentence in found.sentence


@pytest.mark.slow
def test_a_tenth_of_the_pictures_is_held_out_where_there_is_no_test_split(tmp_path):
    shapes.make(tmp_path / "with", train=100, test=10, size_px=8)
    source = open_source(str(tmp_path / "with"))
    assert with_test_split(source, 500, 0) is source
    alone = replace(source, pictures=[replace(picture, split="train") for picture in source.pictures])
    made = with_test_split(alone, 500, 0)
    assert sum(picture.split == "test" for picture in made.pictures) == 11
    assert [picture.name for picture in made.pictures] == [picture.name for picture in alone.pictures]
    assert made == with_test_split(alone, 500, 0) != with_test_split(alone, 500, 1)
    few = replace(alone, pictures=alone.pictures[:99])
    assert with_test_split(few, 500, 0) is few
    assert sum(picture.split == "test" for picture in with_test_split(alone, 10, 0).pictures) == 10


def test_the_user_sees_how_many_pictures_are_held_out(tmp_path, capsys):
    shapes.make(tmp_path / "all", train=120, test=0, size_px=8)
    settings = PretrainSettings(data=str(tmp_path / "all"), init="lite0", size_px=8)
    train, test = open_pictures(settings, open_source(settings.data), judged=True)
    assert (len(train), len(test)) == (108, 12)
    said = capsys.readouterr().out
    assert said == "12 of 120 pictures are held out, to compare the result with lite0\n"
    open_pictures(settings, open_source(settings.data), judged=False)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("better", [True, False])
def test_the_better_weights_are_exported(small_settings, tmp_path, monkeypatch, capsys, better):
    monkeypatch.chdir(tmp_path)
    earlier = pretrain(small_settings(name="earlier", epochs=1))
    monkeypatch.setattr("training.simclr.verdict", lambda *_: Verdict(better, "as the test says"))
    run = pretrain(small_settings(name="adapted", init=str(earlier), epochs=1))
    assert "the result is as the test says" in capsys.readouterr().out
    saved = checkpoint.load(checkpoint.find(run))
    assert {"knn", "found_again", "judged"} <= saved["facts"]["before"].keys() & saved["facts"]["after"].keys()
    assert 0 < saved["facts"]["after"]["neighbours_shared"] < 1
    assert saved["facts"]["after"]["judged"] == 20 + 64  # held out and trained on: few would make the figure chance
    before, after = saved["facts"]["before"]["knn"], saved["facts"]["after"]["knn"]
    start = {f"encoder.{name}": value for name, value in saved["start"].items()}
    assert not torch.equal(start["encoder.conv1.weight"], saved["state_dict"]["encoder.conv1.weight"])

    content = dict(saved)
    content["state_dict"] = saved["state_dict"] | start
    content["facts"] = {name: value for name, value in saved["facts"].items() if name != "verdict"}
    checkpoint.AtomicCheckpointIO().save_checkpoint(content, tmp_path / "start.ckpt")
    of_start = export(ExportSettings(str(tmp_path / "start.ckpt"), out=tmp_path / "start"))[0].graph.read_bytes()

    exported = export(ExportSettings(str(run)))[0]
    assert (exported.graph.read_bytes() == of_start) == (not better)
    assert exported.card.figures["after"]["knn"] == (after if better else before)
    assert ("exporting earlier as it was; --force" in capsys.readouterr().out) == (not better)
    forced = export(ExportSettings(str(run), force=True))[0]
    assert forced.graph.read_bytes() != of_start


@pytest.mark.slow
def test_a_run_from_before_the_verdict_is_resumed_and_exported_without(small_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    shapes.make(tmp_path / "many", train=120, test=0, size_px=8)
    earlier = pretrain(small_settings(name="earlier", epochs=1))
    settings = small_settings(name="old", init=str(earlier), data=str(tmp_path / "many"), epochs=2)
    monkeypatch.setattr("training.pretrain.with_test_split", lambda source, most, seed: source)
    run = pretrain(replace(settings, max_steps=1))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    path = checkpoint.find(run)
    saved = checkpoint.load(path)
    del saved["start"]
    saved["facts"]["before"] = {"knn": 0.1, "k": 1, "bank": 1, "queries": 1}
    saved["facts"].pop("verdict", None)
    checkpoint.AtomicCheckpointIO().save_checkpoint(saved, path)
    capsys.readouterr()
    pretrain(replace(settings, resume=True))
    assert "the result is" not in capsys.readouterr().out
    assert "verdict" not in checkpoint.load(path)["facts"]
    export(ExportSettings(str(run)))
