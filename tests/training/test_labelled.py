"""Shares of labels are taken of every class, are the same for the same seed, and errors say what would work."""

import numpy as np
import pytest

from training.data.labelled import check_classes, choose_labelled, hold_out, single_picture_classes
from training.data.sources import DataError

CLASSES = ["cat", "dog", "owl"]
LABELS = np.repeat([0, 1, 2, -1], [200, 40, 10, 30])[np.random.default_rng(0).permutation(280)]


def counts(rows):
    return np.bincount(LABELS[rows], minlength=3).tolist()


def test_a_share_is_taken_of_every_class_but_not_of_the_unlabelled():
    assert counts(choose_labelled(LABELS, CLASSES, 0.1, None, seed=0)) == [20, 4, 1]
    assert counts(choose_labelled(LABELS, CLASSES, 1.0, None, seed=0)) == [200, 40, 10]
    assert counts(choose_labelled(LABELS, CLASSES, 1.0, 7, seed=0)) == [7, 7, 7]


def test_a_larger_share_contains_the_smaller_one_of_the_same_seed():
    small, large = (set(choose_labelled(LABELS, CLASSES, share, None, seed=5)) for share in (0.1, 0.3))
    assert small < large
    assert small != set(choose_labelled(LABELS, CLASSES, 0.1, None, seed=6))


def test_a_share_that_leaves_a_class_empty_is_refused_and_the_least_possible_is_named():
    with pytest.raises(
        DataError, match=r"--label-share 0.04 leaves no picture of class owl, which has 10 pictures"
    ) as e:
        choose_labelled(LABELS, CLASSES, 0.04, None, seed=0)
    assert "Give --label-share 0.05 or more" in str(e.value)


@pytest.mark.parametrize("n", [1, 3, 7, 23, 611, 10_000])
def test_the_least_share_named_in_the_message_leaves_a_picture(n):
    labels = np.zeros(n, np.int64)
    with pytest.raises(DataError) as e:
        choose_labelled(labels, CLASSES, 0.49 / n, None, seed=0)
    least = float(str(e.value).partition("Give --label-share ")[2].split()[0])
    assert len(choose_labelled(labels, CLASSES, least, None, seed=0)) == 1


def test_more_labels_than_a_class_has_are_refused():
    with pytest.raises(
        DataError, match=r"--labels-per-class 11: class owl has 10 pictures. Give --labels-per-class 10"
    ):
        choose_labelled(LABELS, CLASSES, 1.0, 11, seed=0)


def test_held_out_and_kept_pictures_are_all_the_labelled_and_cover_every_class():
    kept, held = hold_out(LABELS, 0.01, seed=0)
    assert sorted([*kept, *held]) == np.flatnonzero(LABELS >= 0).tolist()
    assert counts(held) == [2, 1, 1]
    assert counts(hold_out(LABELS, 0.999, seed=0)[0]) == [1, 1, 1]


def test_a_class_of_one_picture_is_kept_whole():
    labels = np.array([0, 0, 0, 1])
    kept, held = hold_out(labels, 0.5, seed=0)
    assert 3 in kept and len(held) == 2
    assert single_picture_classes(labels, CLASSES) == ["dog"]


def test_classes_of_the_test_split_without_training_pictures_are_named():
    check_classes(np.array([0, 1, 2]), np.array([0, -1]), CLASSES, "pets")
    with pytest.raises(DataError, match="pets has pictures of owl in its split test and none of it in train"):
        check_classes(np.array([0, 1, -1]), np.array([0, 2]), CLASSES, "pets")
    with pytest.raises(DataError, match="pets has only the class dog"):
        check_classes(np.array([1, 1]), None, CLASSES, "pets")
    with pytest.raises(DataError, match="pets has no labels"):
        check_classes(np.array([-1]), None, CLASSES, "pets")
