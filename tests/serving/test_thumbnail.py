import io

import numpy as np
import pytest
from PIL import Image

from export.artifact import Preprocessing, UnreadableImage, read_image, read_pixels
from serving.inference.thumbnail import THUMBNAIL_PX, read_picture, thumbnail


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    """Coloured stripes, which show whether the picture is cropped or turned."""
    row, column = np.ogrid[:height, :width]
    pixels = np.stack(np.broadcast_arrays(255 * row // height, 255 * column // width, (row + column) % 256), -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("size_px", [8, 32, 96, 224])
@pytest.mark.parametrize("size", [(500, 375), (3000, 2001), (90, 60), (17, 4000)])
def test_pixels_equal_those_of_read_pixels_bit_for_bit(size_px, size):
    data, preprocessing = jpeg(*size), Preprocessing(size_px)
    assert (read_picture(data, preprocessing).pixels == read_pixels(data, preprocessing)).all()


@pytest.mark.parametrize(("orientation", "size"), [(1, (1201, 800)), (3, (1201, 800)), (6, (800, 1201))])
def test_the_size_is_that_of_the_whole_upright_picture_even_if_decoded_at_a_smaller_scale(orientation, size):
    found = read_picture(jpeg(1201, 800, orientation), Preprocessing(32))
    assert (found.width, found.height) == size
    small = Image.open(io.BytesIO(found.thumbnail)).size
    assert (small[0] > small[1]) == (size[0] > size[1])


@pytest.mark.parametrize("size", [(500, 375), (257, 100), (600, 700), (4000, 30), (1025, 1025)])
@pytest.mark.parametrize("size_px", [8, 224])
def test_a_thumbnails_size_does_not_depend_on_the_encoders(size, size_px):
    found = Image.open(io.BytesIO(read_picture(jpeg(*size), Preprocessing(size_px)).thumbnail))
    assert THUMBNAIL_PX * 7 / 8 <= max(found.size) <= THUMBNAIL_PX
    assert found.width / found.height == pytest.approx(size[0] / size[1], rel=0.02 if min(found.size) > 50 else 1)


def test_a_thumbnail_shows_the_picture():
    image = read_image(jpeg(512, 512))
    small = np.asarray(Image.open(io.BytesIO(thumbnail(image))), float)
    for (y, x), (red, green) in {(0, 0): (0, 0), (0, 255): (0, 255), (255, 0): (255, 0)}.items():
        assert small[y, x, :2] == pytest.approx([red, green], abs=12)


def test_a_small_picture_is_its_own_thumbnail():
    assert Image.open(io.BytesIO(read_picture(jpeg(40, 30), Preprocessing(32)).thumbnail)).size == (40, 30)


def test_a_file_that_is_no_picture_is_refused():
    with pytest.raises(UnreadableImage):
        read_picture(b"no picture", Preprocessing(32))
