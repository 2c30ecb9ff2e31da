import io

import pytest
from PIL import Image

from ui.search.crop import Box, cut


def quarters(orientation: int = 1) -> bytes:
    """40 x 20: red, green above blue, white."""
    image = Image.new("RGB", (40, 20))
    for at, colour in {(0, 0): "red", (20, 0): "lime", (0, 10): "blue", (20, 10): "white"}.items():
        image.paste(colour, (*at, at[0] + 20, at[1] + 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def part(picture, box: Box) -> Image.Image:
    return Image.open(io.BytesIO(cut(picture, box)))


def test_a_part_is_what_lies_inside_of_the_box():
    cut_out = part(quarters(), Box(0.5, 0, 1, 0.5))
    assert cut_out.size == (20, 10) and cut_out.getcolors() == [(200, (0, 255, 0))]


def test_the_box_refers_to_the_upright_picture():
    turned = part(quarters(orientation=6), Box(0.5, 0, 1, 0.5))  # a quarter clockwise: red has come to the right
    assert turned.size == (10, 20) and turned.getcolors() == [(200, (255, 0, 0))]


def test_every_kind_of_picture_can_be_cut(tmp_path):
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16"):
        Image.new(mode, (30, 30)).save(tmp_path / "it.tif")
        assert part(tmp_path / "it.tif", Box(0, 0, 0.5, 0.5)).size == (15, 15), mode


def test_the_smallest_part_of_a_small_picture_is_a_pixel():
    assert part(quarters(), Box(0.98, 0.98, 0.99, 0.99)).size == (1, 1)


def test_a_file_that_is_not_a_picture_cannot_be_cut(tmp_path):
    (tmp_path / "notes.png").write_bytes(quarters()[:60])
    for picture in (b"no picture", tmp_path / "notes.png", tmp_path / "absent.png"):
        with pytest.raises(OSError):
            cut(picture, Box(0, 0, 1, 1))


def test_a_picture_of_too_many_pixels_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="exceeds limit"):
        cut(quarters(), Box(0, 0, 0.5, 0.5))


def test_a_box_is_clipped_to_the_picture_and_its_text_reads_back():
    box = Box.from_edges([-0.2, "0.25", 0.71234567, 3])
    assert box == Box(0, 0.25, 0.7123, 1) and Box.from_edges(str(box).split(",")) == box


@pytest.mark.parametrize("edges", [[0.5, 0, 0.5, 1], [0.9, 0, 0.1, 1], [0, 0, 1], ["nan"] * 4, ["a"] * 4, 7])
def test_edges_that_form_no_box_are_refused(edges):
    with pytest.raises((ValueError, TypeError)):
        Box.from_edges(edges)
