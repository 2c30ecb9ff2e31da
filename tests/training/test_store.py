import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.artifact import Preprocessing, read_pixels
from training.data import store
from training.data.sources import DataError, open_source

EIGHT = Preprocessing(8)


def png(seed: int, width: int = 20, height: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


@pytest.fixture
def pile(tmp_path) -> str:
    """Six pictures, two of them in the test split, and two files that are not pictures."""
    files = {f"train/{kind}/{i}.png": png(i) for i, kind in enumerate(("cat", "dog", "cat"))}
    files |= {"train/3.png": png(3), "test/dog/4.png": png(4), "test/owl/5.png": png(5)}
    files |= {"train/cat/empty.png": b"", "train/dog/cut.png": png(6)[:300]}
    return write(tmp_path / "pile", files)


def test_the_store_holds_what_read_pixels_gives(pile, tmp_path):
    source = open_source(pile)
    train = store.load(source, EIGHT, "train", tmp_path)
    assert train.names == ["train/3.png", "train/cat/0.png", "train/cat/2.png", "train/dog/1.png"]
    assert train.pixels.dtype == np.uint8 and train.pixels.shape == (4, 8, 8, 3)
    for name, pixels in zip(train.names, train.pixels, strict=True):
        assert np.array_equal(pixels, read_pixels((Path(pile) / name).read_bytes(), EIGHT))
    assert len(train) == 4


def test_labels_mean_the_same_in_both_splits_and_are_minus_one_for_unlabelled_pictures(pile, tmp_path):
    source = open_source(pile)
    train, test = (store.load(source, EIGHT, split, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [-1, 0, 0, 1] and train.labels.dtype == np.int64
    assert test.labels.tolist() == [1, 2]


def test_a_broken_picture_is_listed_and_the_others_are_kept(pile, tmp_path, capsys):
    train = store.load(open_source(pile), EIGHT, "train", tmp_path)
    assert train.skipped == [
        ("train/cat/empty.png", "is empty"),
        ("train/dog/cut.png", "is truncated: its end is missing"),
    ]
    with open(train.folder / "skipped.csv", newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [("name", "reason"), *train.skipped]
    sentence = f"skipped 2 of 6 files (listed in {train.folder / 'skipped.csv'})\n"
    assert capsys.readouterr().out == sentence
    store.load(open_source(pile), EIGHT, "train", tmp_path)
    assert capsys.readouterr().out == sentence


def test_nothing_is_printed_if_no_file_was_skipped(pile, tmp_path, capsys):
    test = store.load(open_source(pile), EIGHT, "test", tmp_path)
    assert test.skipped == [] and capsys.readouterr().out == ""
    assert not (test.folder / "skipped.csv").exists()


def test_the_store_is_read_only(pile, tmp_path):
    pixels = store.load(open_source(pile), EIGHT, "test", tmp_path).pixels
    assert isinstance(pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


def test_a_second_load_decodes_nothing(pile, tmp_path, monkeypatch):
    first = store.load(open_source(pile), EIGHT, "train", tmp_path)
    monkeypatch.setattr(store, "read_pixels", None)
    again = store.load(open_source(pile), EIGHT, "train", tmp_path)
    assert np.array_equal(first.pixels, again.pixels)
    assert (first.names, first.skipped, first.folder) == (again.names, again.skipped, again.folder)


def test_a_changed_time_name_size_or_preprocessing_makes_a_new_store(pile, tmp_path):
    def folder(preprocessing=EIGHT) -> Path:
        return store.load(open_source(pile), preprocessing, "test", tmp_path).folder

    folders = [folder(), folder(Preprocessing(9)), folder(Preprocessing(8, crop=0.9))]
    picture = Path(pile) / "test" / "owl" / "5.png"
    os.utime(picture, ns=(1, 1))
    folders.append(folder())
    picture.write_bytes(png(7, width=30))
    os.utime(picture, ns=(1, 1))
    folders.append(folder())
    picture.rename(picture.with_name("6.png"))
    folders.append(folder())
    assert len(set(folders)) == len(folders)


def test_a_copy_of_a_zip_uses_the_same_store(tmp_path):
    archive = tmp_path / "a" / "p.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("1.png", png(1))
    copy = tmp_path / "b" / "p.zip"
    copy.parent.mkdir()
    copy.write_bytes(archive.read_bytes())
    first, second = (store.load(open_source(str(path)), EIGHT, "train", tmp_path) for path in (archive, copy))
    assert first.folder == second.folder


def test_pictures_of_a_zip_are_stored_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PER_TASK", 3)
    monkeypatch.setattr(store, "AHEAD", 2)
    contents = {f"{i:03d}.png": png(i) if i % 5 else b"junk" for i in range(41)}
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in contents.items():
            file.writestr(name, content)
    loaded = store.load(open_source(str(tmp_path / "p.zip")), EIGHT, "train", tmp_path)
    assert len(loaded.skipped) == 9 and loaded.pixels.shape == (32, 8, 8, 3)
    for name, pixels in zip(loaded.names, loaded.pixels, strict=True):
        assert np.array_equal(pixels, read_pixels(contents[name], EIGHT))


def test_a_broken_picture_with_any_name_is_listed(tmp_path):
    files = {"ok.png": png(0), "\udcff,\n.png": b"junk"}
    loaded = store.load(open_source(write(tmp_path / "pile", files)), EIGHT, "train", tmp_path)
    assert loaded.skipped[0][0] == "\udcff,\n.png"
    with open(loaded.folder / "skipped.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1][0] == "\\udcff,\n.png"


def test_if_no_file_is_a_picture_the_source_and_one_reason_are_named(tmp_path):
    source = open_source(write(tmp_path / "notes", {"a.txt": b"hello", "b.txt": b"world"}))
    with pytest.raises(DataError, match=r"no file of notes is a readable picture: a\.txt is not an image"):
        store.load(source, EIGHT, "train", tmp_path)
    assert not [path for path in (tmp_path / "store").iterdir() if path.is_dir()]


def test_a_split_without_pictures_is_named(tmp_path):
    source = open_source(write(tmp_path / "flat", {"1.png": png(1)}))
    with pytest.raises(DataError, match="flat has no pictures in its split test; there are 1 in train"):
        store.load(source, EIGHT, "test", tmp_path)


def test_a_store_of_one_picture(tmp_path):
    loaded = store.load(open_source(write(tmp_path / "one", {"1.png": png(1)})), EIGHT, "train", tmp_path)
    assert loaded.pixels.shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_a_process_killed_while_decoding_leaves_no_store(pile, tmp_path):
    code = """if True:
        import os, pathlib, signal, sys
        from export.artifact import Preprocessing
        from training.data import store
        from training.data.sources import open_source
        write_header = store._write_header
        def write_header_then_die(file, count, shape):
            write_header(file, count, shape)
            if count == 4:  # all decoded, two skipped
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        store._write_header = write_header_then_die
        store.load(open_source(sys.argv[1]), Preprocessing(8), "train", pathlib.Path(sys.argv[2]))
    """
    killed = subprocess.run([sys.executable, "-c", code, pile, str(tmp_path)], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("pixels.npy"))  # it had begun
    assert store.load(open_source(pile), EIGHT, "train", tmp_path).pixels.shape == (4, 8, 8, 3)
    assert len(list(tmp_path.rglob("pixels.npy"))) == 1


def test_a_failed_write_gives_one_sentence_and_leaves_nothing(tmp_path):
    source = open_source(write(tmp_path / "pile", {f"{i}.png": png(i) for i in range(40)}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # of 122,880 bytes
    try:
        with pytest.raises(DataError, match="cannot be written: File too large"):
            store.load(source, Preprocessing(32), "train", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("pixels.npy"))
    assert store.load(source, Preprocessing(32), "train", tmp_path).pixels.shape == (40, 32, 32, 3)


def test_a_full_disk_is_reported_before_anything_is_decoded(pile, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(6 * 192 - 1))
    monkeypatch.setattr(store, "read_pixels", None)
    with pytest.raises(DataError, match="the disk is full: pile needs 0 MiB in"):
        store.load(open_source(pile), EIGHT, "train", tmp_path)
    assert not list(tmp_path.rglob("pixels.npy"))


def test_two_simultaneous_loads_decode_once(pile, tmp_path, monkeypatch):
    source, decoded = open_source(pile), Counter()
    pictures = [
        replace(picture, read=lambda picture=picture: decoded.update([picture.name]) or picture.read())
        for picture in source.pictures
    ]
    source = replace(source, pictures=pictures)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: store.load(source, EIGHT, "train", tmp_path), range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert set(decoded.values()) == {1}


@pytest.mark.parametrize("file", ["pixels.npy", "facts.json"])
def test_a_damaged_store_is_named(pile, tmp_path, file):
    folder = store.load(open_source(pile), EIGHT, "train", tmp_path).folder
    (folder / file).write_bytes((folder / file).read_bytes()[:150])
    with pytest.raises(DataError, match=f"{folder.name} is damaged; delete it"):
        store.load(open_source(pile), EIGHT, "train", tmp_path)


def test_the_facts_describe_the_source_and_preprocessing(pile, tmp_path):
    facts = json.loads((store.load(open_source(pile), EIGHT, "train", tmp_path).folder / "facts.json").read_text())
    assert facts["source"] == "pile" and facts["split"] == "train" and facts["pictures"] == 4
    assert facts["preprocessing"] == {"size_px": 8, "crop": None, "interpolation": "bicubic"}
