from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol.pack import BrokenPack, pack, unpack

HOW = r"(the pack ends within the 4 bytes of its length|its length is \d+ bytes, but the pack ends after \d+)"
IMAGES = st.lists(st.binary(max_size=300), max_size=8)


@given(IMAGES)
def test_a_pack_unpacks_to_the_same_images(images):
    assert list(unpack(pack(images))) == images


def test_the_format_is_the_documented_one():
    assert pack([b"ab", b""]) == b"\x00\x00\x00\x02ab\x00\x00\x00\x00"


@given(IMAGES.filter(bool), st.data())
def test_a_pack_cut_within_an_image_is_broken_at_that_image(images, data):
    whole = pack(images)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [len(pack(images[:i])) for i in range(len(images) + 1)]
    if cut in ends:
        assert list(unpack(whole[:cut])) == images[: ends.index(cut)]
        return
    hit = next(i for i, (start, end) in enumerate(pairwise(ends)) if start < cut < end)
    got = []
    with pytest.raises(BrokenPack, match=rf"^images\[{hit}\]: {HOW}$") as broken:
        for image in unpack(whole[:cut]):
            got.append(image)
    assert broken.value.image == f"images[{hit}]"
    assert got == images[:hit]


def test_a_wrong_length_allocates_no_memory():
    with pytest.raises(BrokenPack, match=r"is 4294967295 bytes, but the pack ends after 3"):
        list(unpack(b"\xff\xff\xff\xffabc"))
