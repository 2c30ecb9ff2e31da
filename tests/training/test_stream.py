import io
import tarfile
import threading
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.artifact import Preprocessing
from tests.conftest import PATIENCE_S
from training.data import store, stream
from training.data.sources import DataError, open_source
from training.data.store import map_ahead
from training.data.stream import Stream, StreamedRows, too_large

EIGHT = Preprocessing(8)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def make_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_shards(root: Path, broken: tuple[int, ...] = (), count: int = 40) -> str:
    """`count` samples of three classes in two shards; those in `broken` are not pictures."""
    for shard in range(2):
        files = {}
        for i in range(shard, count, 2):
            files[f"{i:03d}.jpg"] = b"junk" if i in broken else jpeg(i)
            files[f"{i:03d}.cls"] = ("cat", "owl", "dog")[i % 3].encode()
        make_shard(root / "set" / f"{shard}.tar", files)
    return str(root / "set" / "*.tar")


def streamed(data: str, tmp_path: Path, split: str = "train") -> Stream:
    return stream.load(open_source(data), EIGHT, split, tmp_path / "data", stream=True)


# The same as a store


def make_folder(root: Path) -> str:
    for i, place in enumerate(("train/owl", "train/cat", "train", "test/dog", "train/cat")):
        (root / "pile" / place).mkdir(parents=True, exist_ok=True)
        (root / "pile" / place / f"{i}.jpg").write_bytes(jpeg(i))
    return str(root / "pile")


@pytest.mark.parametrize("make", [make_shards, make_folder])
def test_a_stream_gives_what_the_store_gives_bit_for_bit(tmp_path, make):
    source = open_source(make(tmp_path))
    for split in sorted({picture.split for picture in source.pictures}):
        stored = store.load(source, EIGHT, split, tmp_path / "data")
        other = stream.load(source, EIGHT, split, tmp_path / "data", stream=True)
        assert isinstance(other, Stream)
        assert other.pixels.shape == stored.pixels.shape and len(other) == len(stored) == len(other.pixels)
        assert other.labels.tolist() == stored.labels.tolist() and other.labels.dtype == stored.labels.dtype
        assert (other.source, other.classes, other.names) == (stored.source, stored.classes, stored.names)
        for some in ([-1, 0, 0], np.arange(len(stored)), slice(None), slice(1, 3), slice(0, 0), 0, -1):
            assert np.array_equal(other.pixels[some], stored.pixels[some])
            assert other.pixels[some].dtype == np.uint8
        with pytest.raises(IndexError):
            other.pixels[len(other)]


def test_an_epoch_in_any_order_reads_every_picture_once(tmp_path, monkeypatch):
    opened = streamed(make_shards(tmp_path), tmp_path)
    everything = opened.pixels[:]
    asked = []
    decode = opened.pixels._decode
    monkeypatch.setattr(opened.pixels, "_decode", lambda row, pixels: asked.append(row) or decode(row, pixels))
    order = np.random.default_rng(0).permutation(40)
    batches = list(map_ahead(opened.pixels.__getitem__, np.split(order, 5), 2))
    assert sorted(asked) == list(range(40))
    assert np.array_equal(np.concatenate(batches), everything[order])


def test_streamed_rows_decode_only_the_requested_pictures(tmp_path):
    pixels = streamed(make_shards(tmp_path, broken=(0,)), tmp_path).pixels
    rows = StreamedRows(pixels, np.arange(39, -1, -1))
    assert len(rows) == 40
    assert np.array_equal(rows[3:6], pixels[[36, 35, 34]])
    assert not pixels.unreadable
    rows[39:40]
    assert len(pixels.unreadable) == 1


# Unreadable pictures


def test_an_unreadable_picture_is_always_replaced_by_the_same_one_of_its_batch(tmp_path):
    data = make_shards(tmp_path, broken=(0, 6))  # rows 0 and 3
    first, second = (streamed(data, tmp_path).pixels for _ in range(2))
    batch = np.arange(20)
    pixels = first[batch]
    second[5:30]  # what was read before does not matter
    assert np.array_equal(second[batch], pixels)
    assert np.array_equal(pixels[[0, 3]], pixels[[1, 2]])
    kept = [row for row in range(20) if row not in (0, 3)]
    assert np.array_equal(pixels[kept], first[kept])
    assert len(np.unique(pixels[kept], axis=0)) == 18


def test_a_single_unreadable_picture_is_replaced_by_a_following_one(tmp_path):
    pixels = streamed(make_shards(tmp_path, broken=(38, 39)), tmp_path).pixels
    assert np.array_equal(pixels[39], pixels[0])  # the last of the set: the first follows
    assert np.array_equal(pixels[19], pixels[20])


def test_unreadable_pictures_are_listed_once_with_their_reason(tmp_path):
    opened = streamed(make_shards(tmp_path, broken=(7, 2, 3)), tmp_path)
    assert opened.skipped == []
    for _ in range(3):
        list(map_ahead(opened.pixels.__getitem__, [np.arange(20, 40), np.arange(20)], 2))
    reason = "is not an image in a supported format"
    assert opened.skipped == [("0.tar/002.jpg", reason), ("1.tar/003.jpg", reason), ("1.tar/007.jpg", reason)]


def test_a_file_that_vanishes_while_streaming_is_listed(tmp_path):
    data = make_folder(tmp_path)
    opened = streamed(data, tmp_path)
    (Path(data) / "train" / "2.jpg").unlink()
    assert opened.pixels[:].shape == (4, 8, 8, 3)
    assert opened.skipped == [("train/2.jpg", "cannot be read: No such file or directory")]


def test_half_of_a_batch_may_be_unreadable_and_not_more(tmp_path):
    broken = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)  # rows 0 to 9
    pixels = streamed(make_shards(tmp_path, broken), tmp_path).pixels
    assert np.array_equal(pixels[:20][:10], pixels[10:20])
    with pytest.raises(DataError, match=r"^10 files of 19 are not readable pictures: 0\.tar/000\.jpg is not an image"):
        pixels[:19]


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_set_without_pictures_is_refused(tmp_path, count):
    for i in range(count):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / f"{i:02d}.txt").write_text("hello")
    with pytest.raises(DataError, match=r"are not readable pictures: 00\.txt is not an image"):
        streamed(str(tmp_path / "notes"), tmp_path).pixels[:]


# Ahead of the step


class Watched:
    """Takes the place of pixels: signals when a batch is begun, and can be paused or made to fail."""

    def __init__(self, fails_at: int = -1):
        self.began = [threading.Event() for _ in range(20)]
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.fails_at = fails_at

    def __getitem__(self, i: int) -> int:
        self.began[i].set()
        assert self.may_go_on.wait(PATIENCE_S)
        if i == self.fails_at:
            raise DataError(f"batch {i}")
        return i * i


def test_batches_come_in_order():
    class Uneven(Watched):
        def __getitem__(self, i):
            if i % 2 == 0 and i + 1 < len(self.began):  # not before the one after it
                assert self.began[i + 1].wait(PATIENCE_S)
            return super().__getitem__(i)

    assert list(map_ahead(Uneven().__getitem__, range(20), 2)) == [i * i for i in range(20)]


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_only_the_next_batches_are_computed_ahead(batches):
    pixels, asked = Watched(), []
    indices = (asked.append(i) or i for i in range(20))
    for i, _ in enumerate(map_ahead(pixels.__getitem__, indices, batches)):
        for after in pixels.began[i : i + batches + 1]:
            assert after.wait(PATIENCE_S)
        assert len(asked) == min(20, i + batches + 1)
    assert len(asked) == 20


def test_batches_of_a_store_are_read_ahead_too(tmp_path):
    stored = store.load(open_source(make_shards(tmp_path)), EIGHT, "train", tmp_path / "data")
    batches = np.random.default_rng(1).permutation(40).reshape(4, 10)
    for batch, pixels in zip(batches, map_ahead(stored.pixels.__getitem__, batches, 2), strict=True):
        assert np.array_equal(pixels, stored.pixels[batch])


def test_an_error_is_raised_in_place_of_its_batch():
    batches = map_ahead(Watched(fails_at=3).__getitem__, range(20), 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(DataError, match="batch 3"):
        next(batches)


def test_an_error_of_the_items_is_passed_on():
    def indices():
        yield 1
        raise KeyError("order")

    with pytest.raises(KeyError, match="order"):
        list(map_ahead(Watched().__getitem__, indices(), 2))


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "failed", "interrupted"])
def test_no_thread_is_left_however_it_ends(end):
    before = set(threading.enumerate())
    pixels = Watched(fails_at=2 if end == "failed" else -1)
    batches = map_ahead(pixels.__getitem__, range(20), 2)
    assert next(batches) == 0
    assert set(threading.enumerate()) - before
    if end == "exhausted":
        assert len(list(batches)) == 19
    elif end == "closed":
        pixels.may_go_on.clear()
        release = threading.Timer(0.05, pixels.may_go_on.set)  # it waits for what is being made
        release.start()
        batches.close()
        release.join()
    elif end == "dropped":
        del batches
    elif end == "failed":
        with pytest.raises(DataError):
            list(batches)
    else:
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    assert not set(threading.enumerate()) - before
    assert pixels.began[5].is_set() == (end == "exhausted")


# When a set is streamed


@pytest.mark.parametrize(
    ("pictures", "size_px", "free_bytes", "too_much"),
    [
        (1_281_167, 224, 500 * 2**30, False),
        (1_281_167, 224, 300 * 2**30, True),
        (100, 10, 60_000, False),  # exactly half
        (100, 10, 59_999, True),
        (1, 1, 0, True),
        (0, 224, 0, False),
    ],
)
def test_a_set_is_too_large_when_its_store_would_take_more_than_half_of_the_free_disk(
    pictures, size_px, free_bytes, too_much
):
    assert bool(too_large(pictures, size_px, free_bytes)) is too_much


def test_the_reason_contains_the_sizes():
    assert too_large(1_281_167, 224, 300 * 2**30) == (
        "stored, they would take 179.6 GiB of the 300.0 GiB that are free on the disk"
    )


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free on every disk."""

    def set_free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(count))

    return set_free


def test_a_set_that_does_not_fit_is_streamed_with_one_sentence_and_one_that_fits_is_stored(tmp_path, free, capsys):
    source, cache = open_source(make_shards(tmp_path)), tmp_path / "not yet" / "data"
    capsys.readouterr()
    free(40 * 192 * 2 - 1)
    assert isinstance(stream.load(source, EIGHT, "train", cache), Stream)
    assert not cache.exists()
    said = capsys.readouterr().out
    assert said.startswith("decoding the 40 pictures of set (train) in every epoch: stored, they would take 0.0")
    assert said.count("\n") == 1
    free(40 * 192 * 2)
    assert isinstance(stream.load(source, EIGHT, "train", cache), store.PixelStore)
    assert capsys.readouterr().out == ""


def test_a_set_that_is_already_decoded_is_not_streamed(tmp_path, free):
    source = open_source(make_shards(tmp_path))
    free(2**40)
    stream.load(source, EIGHT, "train", tmp_path)
    free(0)
    assert isinstance(stream.load(source, EIGHT, "train", tmp_path), store.PixelStore)


def test_the_option_overrides_the_free_space(tmp_path, free, capsys):
    source = open_source(make_shards(tmp_path))
    free(2**40)
    assert isinstance(stream.load(source, EIGHT, "train", tmp_path, stream=True), Stream)
    assert capsys.readouterr().out.endswith("in every epoch: --stream was given\n")
    free(40 * 192)
    assert isinstance(stream.load(source, EIGHT, "train", tmp_path, stream=False), store.PixelStore)


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_split_without_pictures_is_named(tmp_path, asked):
    with pytest.raises(DataError, match="set has no pictures in its split test"):
        stream.load(open_source(make_shards(tmp_path)), EIGHT, "test", tmp_path, stream=asked)


# Memory


@pytest.mark.slow
def test_a_listed_picture_takes_less_than_100_bytes(tmp_path):
    count = 20_000
    for shard in range(4):
        files = {f"n{i % 100:08d}/n{i % 100:08d}_{i}.JPEG": b"" for i in range(count // 4)}
        make_shard(tmp_path / f"imagenet-{shard}.tar", files)
    tracemalloc.start()
    try:
        source = open_source(str(tmp_path / "*.tar"))
        listed = tracemalloc.get_traced_memory()[0]
        opened = stream.load(source, EIGHT, "train", tmp_path, stream=True)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(opened) == count and len(opened.classes) == 100
    assert listed / count < 100
    assert held / count < 120
