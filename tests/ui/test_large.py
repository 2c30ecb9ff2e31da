import asyncio

from serving.client import Item, ServiceError
from ui.widgets.large import facts_html, look_up

HOSTILE = "<img src=x onerror=alert(1)>"


def told(client, id: str, encoder: str | None = None) -> str:
    return asyncio.run(look_up(client, id, "pets", encoder))


def test_the_facts_are_label_size_metadata_and_path():
    item = Item("id0", "pets/cat.jpg", "cat", "/p/pets/cat.jpg", 4000, 3000, 2_345_678, {"price": 3.5, "own": True})
    html = facts_html(item).replace("<wbr>", "")
    rows = [("Label", "cat"), ("Size", "4,000 × 3,000 pixels, 2.3 MB"), ("price", "3.5"), ("own", "True")]
    for title, text in [*rows, ("File", "/p/pets/cat.jpg")]:
        assert f"<dt>{title}</dt><dd>{text}</dd>" in html


def test_what_is_not_known_is_left_out_and_a_small_file_has_a_size():
    assert facts_html(Item("id0", "cat.jpg", None, None)) == ""
    assert "9 × 9 pixels, 1 kB" in facts_html(Item("id0", "cat.jpg", None, None, 9, 9, 70))
    assert "<dt>Name</dt>" in facts_html(Item("id0", "pets/cat.jpg", None, None))


def test_every_fact_is_escaped():
    html = facts_html(Item("id0", HOSTILE, HOSTILE, f"/{HOSTILE}", 1, 1, 1, {"note": HOSTILE}))
    assert "<img" not in html and html.count("&lt;img") == 3


def test_the_item_of_the_encoder_is_looked_up(fake):
    client = fake()
    assert "<dd>cat</dd>" in told(client, "id7", "other")
    assert client.asked[0][-2:] == ("pets", "other")


def test_an_item_that_has_gone_and_a_service_that_fails_are_said(fake):
    assert "It has been deleted" in told(fake(), "gone")
    assert "the service is busy" in told(fake(failure=ServiceError("the service is busy")), "id1")
