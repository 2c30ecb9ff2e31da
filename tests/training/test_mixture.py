"""Several sources with weights."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from training import checkpoint
from training.data.mixture import Mixture, open_mixture
from training.data.sources import DataError
from training.pretrain import pretrain


def make_pictures(folder, *names: str) -> str:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i * 30, 0, 0)).save(folder / name)
    return str(folder)


def test_pictures_carry_the_name_of_their_source_and_keep_label_and_split(tmp_path):
    one = make_pictures(tmp_path / "one", "train/cat/1.png", "test/cat/2.png")
    other = make_pictures(tmp_path / "deep" / "one", "3.png")
    source, mixture = open_mixture(one, (f"{other}=2.5",))
    assert {picture.name: (picture.label, picture.split) for picture in source.pictures} == {
        "one/train/cat/1.png": ("cat", "train"),
        "one/test/cat/2.png": ("cat", "test"),
        "one-2/3.png": (None, "train"),
    }
    assert mixture.weights == {"one": 1.0, "one-2": 2.5}
    assert source.name == "one+one-2"
    assert "one: for training: train; for testing: test" in source.layout


def test_a_folder_with_an_equals_sign_is_a_folder_and_a_bad_weight_is_named(tmp_path):
    one = make_pictures(tmp_path / "a=b", "1.png")
    assert open_mixture(one, (one,))[1].weights == {"a-b": 1.0, "a-b-2": 1.0}
    for weight in ("0", "-1", "nan", "101"):
        with pytest.raises(DataError, match=re.escape(f"--also {one}={weight}: the weight must be above 0")):
            open_mixture(one, (f"{one}={weight}",))


def test_an_epoch_takes_each_source_as_often_as_its_weight_says():
    names = [f"a/{i}" for i in range(100)] + [f"b/{i}" for i in range(40)] + [f"c/{i}" for i in range(20)]
    store = SimpleNamespace(pixels=names, names=names)
    mixture = Mixture({"a": 0.25, "b": 1.0, "c": 2.5})
    assert mixture.images_per_epoch(store) == 25 + 40 + 50
    first, second = (mixture.order(store, np.random.default_rng(seed)) for seed in (0, 1))
    assert len(first) == 115
    counts = np.bincount(first, minlength=160)
    assert sorted(np.unique(counts[:100])) == [0, 1] and counts[:100].sum() == 25
    assert counts[100:140].tolist() == [1] * 40
    assert counts[140:].sum() == 50 and set(counts[140:]) == {2, 3}
    assert set(first[first < 100]) != set(second[second < 100])
    assert not (np.sort(first) == first).all()
    assert Mixture({"a": 0.001, "b": 1.0, "c": 1.0}).images_per_epoch(store) == 1 + 40 + 20
    # all sources occur in all parts of the epoch, and a picture's repetitions lie in different parts
    for part in np.array_split(first, 5):
        assert (part < 100).any() and ((part >= 100) & (part < 140)).any() and (part >= 140).any()
    places = [np.flatnonzero(first == row) for row in range(140, 160)]
    assert np.median([np.diff(place).min() for place in places]) > 20


def test_a_single_source_has_numpys_permutation():
    store = SimpleNamespace(pixels=range(4))
    expected = np.random.default_rng(7).permutation(4)
    assert np.array_equal(Mixture({}).order(store, np.random.default_rng(7)), expected)
    assert Mixture({}).images_per_epoch(store) == 4


@pytest.mark.slow
def test_a_run_trains_on_all_sources_and_is_resumed(small_settings, small_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    also = (f"{make_pictures(tmp_path / 'more', *(f'{i}.png' for i in range(8)))}=4",)
    run = pretrain(small_settings(also=also, batch_size=16, epochs=2, max_steps=6))
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["global_step"] == 6 and saved["facts"]["images"] == 72  # (64 + 4 * 8) // 16 steps an epoch
    pretrain(small_settings(also=also, batch_size=16, epochs=2, resume=True))
    assert checkpoint.load(checkpoint.find(run))["global_step"] == 12


@pytest.mark.slow
def test_the_batch_counts_the_pictures_that_an_epoch_takes(small_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    also = (f"{make_pictures(tmp_path / 'more', *(f'{i}.png' for i in range(80)))}=0.1",)
    run = pretrain(small_settings(also=also, batch_size=100, epochs=1))
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["settings"]["batch_size"] == 72 and saved["global_step"] == 1  # of 64 + 80 pictures, 64 + 8
