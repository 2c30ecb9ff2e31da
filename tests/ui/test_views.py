import asyncio
import re

from ui.picture import Chosen
from ui.views import drawn

SETTINGS = {"strength": 0.5, "blur": 0.0, "grey": 0.2, "flip": 0.5}


def test_pairs_stand_side_by_side_with_their_cosine_and_the_mean(fake):
    words, html = asyncio.run(drawn(fake(), Chosen("cat.jpg", id="id1"), 4, 0, 0.08, **SETTINGS))
    assert "these 4 pairs under h: <b>0.38</b>" in words  # of 0, 1/4, 2/4, 3/4
    assert re.findall(r'<span class="score">([^<]*)</span>', html) == ["0.00", "0.25", "0.50", "0.75"]
    assert html.count('alt="One view of the picture"') == html.count('alt="Another view of the picture"') == 4


def test_one_pair_is_not_called_several(fake):
    assert "Mean cosine of this pair" in asyncio.run(drawn(fake(), Chosen("c", id="id1"), 1, 0, 0.08, **SETTINGS))[0]


def test_sliders_reach_the_service_under_the_names_of_the_augmentation(fake):
    client = fake()
    asyncio.run(drawn(client, Chosen("cat.jpg", id="id1"), 2.0, 7.0, 0.3, **SETTINGS))
    assert client.asked[-1] == ("views", b"a thumbnail", 2, 7, {"crop_area": (0.3, 1.0), **SETTINGS})
