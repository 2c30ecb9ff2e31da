from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol.pack import BrokenPack, pack, unpack

HOW = r"(ends within its length|says \d+ bytes and ends after \d+)"
IMAGES = st.lists(st.binary(max_size=300), max_size=8)


@given(IMAGES)
def test_a_pack_holds_what_was_put_in(images):
    assert list(unpack(pack(images))) == images


def test_the_format_is_the_one_that_is_written_down():
    assert pack([b"ab", b""]) == b"\x00\x00\x00\x02ab\x00\x00\x00\x00"


@given(IMAGES.filter(bool), st.data())
def test_a_pack_that_is_cut_anywhere_but_between_images_is_broken_at_that_image(images, data):
    whole = pack(images)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [len(pack(images[:i])) for i in range(len(images) + 1)]
    if cut in ends:
        assert list(unpack(whole[:cut])) == images[: ends.index(cut)]
        return
    hit = next(i for i, (start, end) in enumerate(pairwise(ends)) if start < cut < end)
    got = []
    with pytest.raises(BrokenPack, match=rf"^images\[{hit}\]: the pack {HOW}$") as broken:
        for image in unpack(whole[:cut]):
            got.append(image)
    assert broken.value.image == f"images[{hit}]"
    assert got == images[:hit]


def test_a_length_that_is_a_lie_takes_no_memory():
    with pytest.raises(BrokenPack, match=r"says 4294967295 bytes and ends after 3"):
        list(unpack(b"\xff\xff\xff\xffabc"))
