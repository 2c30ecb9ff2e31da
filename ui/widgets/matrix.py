"""A small batch as NT-Xent compares it: the cosine of each view with each other, and the softmax of each row.

Row i belongs to the anchor, view i. The share of view k is exp(sim_ik / tau) divided by the sum over all views but i,
and the loss is -log of the positive's share. matrix.js computes both again when the user sets the temperature.
"""

import json
from html import escape

import numpy as np

from serving.client import Matrix

TEMPERATURE = 0.2  # if the encoder's card has none
MANY = 16  # from so many views on, the cells have no room for numbers


def matrix_html(matrix: Matrix, temperature: float) -> str:
    """Both tables at this temperature, with a slider for others."""
    n = len(matrix.pictures)
    names = [f"{picture.name.rpartition('/')[2]}, view {v}" for picture in matrix.pictures for v in (1, 2)]
    images = [view for picture in matrix.pictures for view in picture.views]
    cosines = {"h": matrix.h} | ({} if matrix.z is None else {"z": matrix.z})
    data = {space: json.dumps(values.tolist()) for space, values in cosines.items()} | {"views": json.dumps(names)}
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    views = "".join(f"--view{i}:url('{view}');" for i, view in enumerate(images))  # each is sent once
    shares = np.exp(matrix.log_weights(temperature))
    spaces = [("z", "z = g(h), as the loss does")] * (matrix.z is not None) + [("h", "h, which is served")]
    choice = "".join(
        f'<label><input type="radio" class="space" name="space" value="{value}"{" checked" * (i == 0)}>{words}</label>'
        for i, (value, words) in enumerate(spaces)
    )
    return (
        f'<div class="batch{" many" * (2 * n >= MANY)}" {attributes} style="{escape(views)}">'
        '<div class="tuning"><label>Temperature <input class="tau" type="range" min="0.02" max="1" step="0.01" '
        f'value="{temperature:g}" aria-label="Temperature"><span class="tau-value">{temperature:.2f}</span></label>'
        f'<fieldset aria-label="What is compared">{choice}</fieldset>'
        f'<p>NT-Xent of this batch: <b class="loss">{matrix.loss(temperature):.3f}</b>; '
        f"if all {2 * n} views were equal, {matrix.chance:.3f}.</p></div>"
        '<div class="sides">'
        + _table("cosines", "<b>Cosine</b> of each view with each other", matrix.cosines, names)
        + _table("shares", "<b>Share</b> in the softmax of its row: ideally 1 where outlined", shares, names)
        + '</div><p class="readout" aria-live="polite">Outlined: the positive, the other view of the same picture. All '
        "others of a row are negatives. Point at a cell to read it.</p></div>"
    )


def _table(kind: str, caption: str, values: np.ndarray, names: list[str]) -> str:
    head = "".join(f'<th scope="col">{_image(name, k)}</th>' for k, name in enumerate(names))
    body = "".join(
        f'<tr><th scope="row">{_image(names[i], i)}</th>'
        + "".join(_cell(value, i, k) for k, value in enumerate(row))
        + "</tr>"
        for i, row in enumerate(values)
    )
    return (
        f'<table class="{kind}"><caption>{caption}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _image(name: str, number: int) -> str:
    label = escape(name)
    return f'<span role="img" aria-label="{label}" title="{label}" style="background-image:var(--view{number})"></span>'


def _cell(value: float, i: int, k: int) -> str:
    if i == k:
        return '<td class="self" aria-label="itself"></td>'
    kinds = {"positive": k == i ^ 1, "minus": value < 0, "strong": abs(value) > 0.5}
    classes = " ".join(kind for kind, holds in kinds.items() if holds)
    text = f"{value:.2f}".replace("0.", ".", 1)
    return f'<td class="{classes}" style="--v:{abs(value):.4f}">{text}</td>'
