"""Rows of pictures in one axes: where the pictures and their words are."""

import numpy as np
from matplotlib.figure import Figure

from training.evaluation import tiles


def drawn(rows, words, **more):
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    tiles.draw(axis, rows, words, (3, 4), **more)
    figure.savefig("/dev/null", format="raw")
    return axis


def test_words_stand_above_their_own_picture_and_below_the_row_before():
    one, other = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    axis = drawn([[one, other], [other]], [["a", "b"], ["c"]], above=0.4)
    assert [image.get_array()[0, 0, 0] for image in axis.images] == [0, 255, 255]
    places = [image.get_extent() for image in axis.images]  # left, right, bottom, top; y points down
    assert places[0][1] < places[1][0] and places[0][2] < places[2][3] and places[0][0] == places[2][0]
    for (left, right, _, top), text in zip(places, axis.texts, strict=True):
        x, y = text.get_position()
        assert left < x < right and y < top
        height = text.get_window_extent().height / np.ptp(axis.transData.transform([(0, 0), (0, 1)])[:, 1])
        assert height < 0.4
    assert [text.get_text() for text in axis.texts] == ["a", "b", "c"]
    assert axis.texts[2].get_position()[1] - 0.4 > places[0][2] - tiles.GAP


def test_few_pictures_are_as_large_as_many():
    picture = np.zeros((2, 2, 3), np.uint8)
    few, many = drawn([[picture]], [[""]]), drawn([[picture] * 4] * 3, [[""] * 4] * 3)
    assert few.get_xlim() == many.get_xlim() and few.get_ylim() == many.get_ylim()
    right, bottom = many.images[-1].get_extent()[1:3]
    assert right <= many.get_xlim()[1] and bottom <= many.get_ylim()[0]


def test_no_pictures_at_all_are_drawn():
    assert not drawn([], []).images
