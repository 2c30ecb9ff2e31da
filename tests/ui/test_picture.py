import asyncio
from dataclasses import replace

import pytest

from ui.search.crop import Box
from ui.search.picture import Picture, UploadFailed, clicked, notice, read, uploaded
from ui.widgets.well import well_html

HOSTILE = "a/<script>alert(1)</script>\"'${1}{{x}}`.jpg"


def test_an_uploaded_file_is_taken_with_its_own_name(uploads, event):
    (uploads / "3f").mkdir()
    (uploads / "3f/cat.jpg").write_bytes(b"...")
    chosen, other = uploaded(event(paths=[str(uploads / "3f/cat.jpg")] * 2))
    assert (chosen.name, chosen.file) == ("cat.jpg", uploads / "3f/cat.jpg") and other == chosen
    assert chosen.url == f"gradio_api/file={uploads}/3f/cat.jpg"


def test_no_file_is_read_that_was_not_uploaded(uploads, event, tmp_path):
    (tmp_path / "secret").write_text("...")
    (uploads / "link").symlink_to(tmp_path / "secret")
    for path in (tmp_path / "secret", uploads / "../secret", uploads / "link", uploads / "absent", uploads):
        with pytest.raises(UploadFailed, match="not uploaded here"):
            uploaded(event(paths=[str(path)]))
    for data in ({}, {"paths": []}, {"paths": [None]}):
        with pytest.raises(UploadFailed):
            uploaded(event(**data))


def test_a_failed_upload_says_why(event):
    with pytest.raises(UploadFailed, match=r"^The camera is gone"):
        uploaded(event(failure="The camera is gone; connect it, then try again."))


def test_a_deleted_upload_is_asked_for_again(fake, uploads):
    with pytest.raises(UploadFailed, match=r"^cat\.jpg is no longer stored here"):
        asyncio.run(read(fake(), Picture("cat.jpg", file=uploads / "cat.jpg")))


def test_the_picture_of_an_item_is_its_thumbnail(fake):
    assert asyncio.run(read(fake(), Picture("cat.jpg", id="id1"))) == b"a thumbnail"


def test_a_part_that_cannot_be_cut_is_reported(fake, uploads):
    (uploads / "notes.jpg").write_text("no picture")
    for chosen in (Picture("notes.jpg", file=uploads / "notes.jpg"), Picture("notes.jpg", id="id1")):
        with pytest.raises(UploadFailed, match=r"^notes\.jpg cannot be cropped: it is not an image"):
            asyncio.run(read(fake(), replace(chosen, box=Box(0, 0, 0.5, 0.5))))


def test_a_clicked_tile_carries_its_picture(event):
    assert clicked(event(id="id1", name="a/cat.jpg", label="cat")) == Picture("a/cat.jpg", "cat", id="id1")
    of_others = Picture("cat.jpg", None, id="id1", collection="others")
    assert clicked(event(id="id1", name="cat.jpg", collection="others")) == of_others
    assert of_others.url == "../collections/others/items/id1/thumbnail"


def test_the_well_describes_its_picture():
    assert 'alt="The current picture: a/cat.jpg, cat"' in well_html(Picture("a/cat.jpg", "cat", id="id1"))
    assert "<img" not in well_html(None)


def test_the_well_marks_the_part_and_takes_it_away():
    whole = Picture("a/cat.jpg", id="id1")
    part = well_html(replace(whole, box=Box(0.1, 0, 0.5, 1)))
    assert 'data-box="0.1,0,0.5,1"' in part and "data-whole" in part
    assert 'data-box=""' in well_html(whole) and "data-whole" not in well_html(whole)


def test_a_name_is_only_text():
    html = well_html(Picture(HOSTILE, HOSTILE, id=HOSTILE))
    assert "<script" not in html and "&lt;script" in html
    assert '"../collections/pictures/items/a%2F%3Cscript%3E' in html


def test_code_in_a_notice_stands_out():
    assert notice("Run `python <it>` now.") == (
        '<p class="notice" role="status">Run <code>python &lt;it&gt;</code> now.</p>'
    )
