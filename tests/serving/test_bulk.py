import csv
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from export.artifact import read_pixels
from serving import bulk
from serving.bulk import BulkSettings, run
from serving.encoder import Encoder
from serving.index import Index, content_id
from training.data import DataError


@pytest.fixture
def pictures(tmp_path, picture):
    """pictures(n) -> a folder of them, picture(i) at train/<a or b>/<i>.png."""

    def make(n: int):
        for i in range(n):
            path = tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i))
        return tmp_path / "pictures"

    return make


@pytest.fixture
def settings(bundle, tmp_path):
    def make(data, **others) -> BulkSettings:
        return BulkSettings(data=str(data), encoder=str(bundle.folder), index=tmp_path / "index", **others)

    return make


@pytest.fixture
def index(bundle, tmp_path) -> Index:
    return Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)


def test_pictures_are_found_with_their_facts_vectors_and_thumbnails(pictures, settings, index, bundle, picture, capsys):
    folder = pictures(70)
    tally = run(settings(folder))
    assert (tally.indexed, tally.present, tally.skipped) == (70, 0, [])
    item, vector = index.get(content_id(picture(33)))
    assert (item.name, item.label) == ("train/b/033.png", "b")
    assert (item.path, item.width, item.height) == (str(folder / "train/b/033.png"), 40, 30)
    h = Encoder(bundle)(read_pixels(picture(33), bundle.card.preprocessing)[None])[0]
    np.testing.assert_allclose(vector, h / np.linalg.norm(h), atol=1e-6)
    assert index.thumbnail(item.id).read_bytes().startswith(b"\xff\xd8")
    assert "indexed 70, already there 0, skipped 0; the index holds 70" in capsys.readouterr().out


def test_indexing_again_adds_what_is_new_and_one_row_for_equal_files(pictures, settings, index, picture):
    folder = pictures(40)
    run(settings(folder))
    for name, seed in (("copy", 2), ("new", 100), ("newer", 100)):
        (folder / "train" / "a" / f"{name}.png").write_bytes(picture(seed))
    tally = run(settings(folder))
    assert (tally.indexed, tally.present) == (1, 42)
    assert index.count() == 41


def test_what_is_there_already_is_not_decoded_again(pictures, settings, monkeypatch):
    folder, decoded = pictures(20), []
    run(settings(folder))
    monkeypatch.setattr(bulk, "read_pixels", lambda *arguments: decoded.append(1) or read_pixels(*arguments))
    assert run(settings(folder)).present == 20
    assert decoded == []


def test_broken_files_are_listed_and_the_others_are_kept(pictures, settings, index, picture, tmp_path):
    folder = pictures(10)
    (folder / "train" / "a" / "cat.txt").write_text("no picture")
    (folder / "train" / "a" / "cut.jpg").write_bytes(picture(50, format="JPEG", size=(90, 90))[:-200])
    (folder / "train" / "a" / "empty.png").touch()
    assert run(settings(folder)).indexed == 10
    with open(tmp_path / "index" / "skipped.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["name", "reason"],
            ["train/a/cat.txt", "is not an image of a format this reads"],
            ["train/a/cut.jpg", "is truncated or damaged"],
            ["train/a/empty.png", "is empty"],
        ]


def test_one_split_of_a_zip_is_indexed_and_its_items_have_no_path(pictures, settings, index, picture, tmp_path):
    folder = pictures(6)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
        archive.writestr("test/a/other.png", picture(200))
    tally = run(settings(tmp_path / "pictures.zip", split="test"))
    assert tally.indexed == 1
    item, _ = index.get(content_id(picture(200)))
    assert (item.name, item.label, item.path) == ("test/a/other.png", "a", None)


def test_a_split_that_is_not_there_is_named(pictures, settings):
    with pytest.raises(DataError, match="has no test split"):
        run(settings(pictures(3), split="test"))


@pytest.mark.skipif(sys.platform == "win32" or sys.platform == "darwin", reason="names there are always text")
def test_a_name_that_is_no_text_is_kept_readable(pictures, settings, index, picture):
    folder = pictures(2)
    (folder / "train" / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(60))
    run(settings(folder))
    assert index.get(content_id(picture(60)))[0].name == "train/a/caf\N{REPLACEMENT CHARACTER}.png"


def test_ctrl_c_keeps_what_is_embedded_and_says_how_much(pictures, settings, index, monkeypatch, capsys):
    folder, calls = pictures(100), []
    encode = Encoder.__call__

    def interrupted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 5:  # the first two warm up
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "__call__", interrupted)
    monkeypatch.setattr(sys, "argv", ["bulk.py", "--data", str(folder), "--encoder", str(settings("x").encoder)])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--index", str(index.folder)])
    with pytest.raises(SystemExit) as stopped:
        bulk.main()
    assert stopped.value.code == 130
    assert index.count() == 64
    assert (
        "stopped: indexed 64, already there 0, skipped 0; the same command goes on from here" in capsys.readouterr().out
    )


def test_after_kill_9_the_same_command_completes_without_duplicates(pictures, settings, index):
    """Killed as soon as some of the rows are on the disk, in a process that commits often."""
    folder = pictures(200)
    program = f"""
import pathlib, time
from serving import bulk
from serving.encoder import Encoder
encode = Encoder.__call__
Encoder.__call__ = lambda self, pixels: time.sleep(0.1) or encode(self, pixels)
bulk.ROWS_PER_UPSERT = 32
bulk.run(bulk.BulkSettings({str(folder)!r}, {settings("x").encoder!r}, pathlib.Path({str(index.folder)!r})))
"""
    environment = {**os.environ, "PYTHONPATH": sys.path[0]}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while index.count() < 64 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = index.count()
    assert 64 <= left < 200
    tally = run(settings(folder))
    assert (tally.present, tally.indexed) == (left, 200 - left)
    assert index.count() == len(index.ids()) == 200
    assert all(index.thumbnail(id) for id in index.ids())
