import asyncio
import re

import numpy as np
import pytest

from serving.client import Matrix, MatrixPicture
from ui.widgets.matrix import matrix_html


@pytest.fixture
def found(fake) -> Matrix:
    return asyncio.run(fake().matrix(count=3))


def cells(html: str, kind: str) -> list[list[tuple[str, str]]]:
    """(classes, text) of each cell of a table's body."""
    body = re.search(rf'<table class="{kind}">.*?<tbody>(.*?)</tbody>', html)[1]
    return [re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)</td>', row) for row in body.split("</tr>")[:-1]]


def test_positives_are_outlined_next_to_the_diagonal(found):
    for kind in ("cosines", "shares"):
        rows = cells(matrix_html(found, 0.2), kind)
        outlined = [(i, k) for i, row in enumerate(rows) for k, (classes, _) in enumerate(row) if "positive" in classes]
        assert outlined == [(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)]
        assert [row[i] for i, row in enumerate(rows)] == [("self", "")] * 6


def test_the_loss_and_the_shares_are_those_of_eq_1(found):
    """Of each anchor, whose positive is at 0.5 and the four negatives at 0.25."""
    html = matrix_html(found, 0.25)
    share = np.exp(2) / (np.exp(2) + 4 * np.exp(1))
    assert f'<b class="loss">{-np.log(share):.3f}</b>' in html
    assert f"if all 6 views were equal, {np.log(5):.3f}" in html
    rows = cells(html, "shares")
    assert rows[0][1][1] == f"{share:.2f}".removeprefix("0")
    assert rows[0][2][1] == f"{(1 - share) / 4:.2f}".removeprefix("0")


def test_a_colder_softmax_looks_at_the_hardest_alone(found):
    sharp, mild = found.loss(0.02), found.loss(10.0)
    assert sharp < 1e-3 and mild == pytest.approx(np.log(5), abs=0.03)


def test_each_view_is_sent_once_and_named_wherever_it_is_shown(found):
    html = matrix_html(found, 0.2)
    assert html.count("data:1A") == 1
    assert html.count('aria-label="cat 1.jpg, view 1"') == 4  # both edges of both tables


def test_z_is_shown_if_it_is_known_and_h_otherwise(found):
    assert "z = g(h)" not in matrix_html(found, 0.2)
    html = matrix_html(Matrix("m", found.pictures, found.h, -found.h), 0.2)
    assert 'value="z" checked' in html and 'value="h">' in html
    assert cells(html, "cosines")[0][1] == ("positive minus", "-.50")


def test_a_name_is_only_text(found):
    hostile = "<img src=x onerror=alert(1)>${1}\"'.png"
    pictures = [MatrixPicture(hostile, None, ("data:a", "data:b")), *found.pictures[1:]]
    html = matrix_html(Matrix("m", pictures, found.h, None), 0.2)
    assert "<img" not in html
