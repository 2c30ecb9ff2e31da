"""Rows of pictures with words above each, in one axes. An axes for each picture takes seconds to lay out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

GAP = 0.08  # between pictures, as a share of their side


def draw(
    axis: Axes,
    rows: Sequence[Sequence[np.ndarray] | np.ndarray],
    words: Sequence[Sequence[str]],
    room: tuple[int, int],
    above: float = 0.2,
    font_pt: float = 8,
) -> None:
    """Draw each row of pictures from the left.

    rows   pictures of equal sides, uint8 (S, S, 3) or floats in [0, 1]; an array (n, S, S, 3) is a row too
    words  above each picture
    room   rows and columns that there is room for
    above  height of the words, as a share of a picture's side
    """
    for y, (pictures, names) in enumerate(zip(rows, words, strict=True)):
        top = above + y * (1 + above + GAP)
        for x, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            left = x * (1 + GAP)
            axis.imshow(picture, extent=(left, left + 1, top + 1, top))
            axis.text(left + 0.5, top - GAP / 2, name, ha="center", va="bottom", fontsize=font_pt)
    height, width = room
    axis.set(xlim=(0, width * (1 + GAP)), ylim=(height * (1 + above + GAP), 0), aspect="equal")
    axis.axis("off")
