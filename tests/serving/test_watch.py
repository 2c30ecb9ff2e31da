import csv
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from serving.bulk import BulkSettings, run
from serving.collection.index import Index, IndexProblem, Item, content_id
from serving.collection.undo import changes
from serving.indexing import follow
from serving.indexing.fill import batch_encoder
from serving.indexing.follow import Follower
from training.data.sources import DataError


@pytest.fixture
def folder(tmp_path, picture):
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(4):
        (place / f"{i}.png").write_bytes(picture(i))
    return place


@pytest.fixture
def index(bundle, tmp_path) -> Index:
    return Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)


@pytest.fixture
def start(bundle, folder, index, tmp_path):
    """start() -> a follower that has looked twice, so that the collection is what the folder is."""

    def begin() -> Follower:
        follower = Follower(folder, batch_encoder(bundle), index, tmp_path / "skipped.csv")
        follower.look()
        follower.look()
        assert follower.started
        return follower

    return begin


def look(follower: Follower) -> None:
    """What is different is seen by one look, and taken by the next."""
    follower.look()
    follower.look()


def names(index: Index) -> set[str]:
    return {item.name for item in index.page(100)}


def test_new_changed_and_removed_pictures_are_updated(start, folder, index, picture):
    follower = start()
    (folder / "new").mkdir()
    (folder / "new" / "4.png").write_bytes(picture(4))
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes(picture(5))
    look(follower)
    assert names(index) == {"1.png", "2.png", "3.png", "new/4.png"}
    assert index.ids() == {content_id(picture(i)) for i in (2, 3, 4, 5)}
    assert index.verify() == []
    assert not follower.look()
    assert changes(index)[0].text == "added 2 items, deleted 2 items"


def test_a_file_is_indexed_when_it_no_longer_grows(start, folder, index, picture):
    follower, data = start(), picture(9, size=(300, 200))
    for end in (len(data) // 3, len(data) // 2, len(data)):
        (folder / "9.png").write_bytes(data[:end])
        follower.look()
        assert follower.unsettled
        assert index.count() == 4
    follower.look()
    assert not follower.unsettled
    assert index.get(content_id(data))[0].name == "9.png"


def test_a_renamed_picture_keeps_its_item_under_its_new_name(start, folder, index, picture, monkeypatch):
    follower = start()
    _, before = index.get(content_id(picture(2)))
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
    (folder / "3.png").rename(folder / "dogs" / "3.png")
    (folder / "2.png").rename(folder / "cats" / "two.png")
    monkeypatch.setattr("serving.inference.reading.read_file", lambda *_: pytest.fail("it is decoded again"))
    look(follower)
    item, vector = index.get(content_id(picture(2)))
    assert (item.name, item.label, item.path) == ("cats/two.png", "cats", str(folder / "cats" / "two.png"))
    np.testing.assert_allclose(vector, before, atol=1e-6)
    assert index.count() == 4


def test_an_item_is_deleted_with_the_last_of_equal_files(start, folder, index, picture):
    shutil.copy(folder / "0.png", folder / "copy.png")
    follower = start()
    assert index.count() == 4
    (folder / "0.png").unlink()
    look(follower)
    assert index.get(content_id(picture(0)))[0].name == "copy.png"
    (folder / "copy.png").unlink()
    look(follower)
    assert index.get(content_id(picture(0))) is None


def test_a_start_updates_what_changed_since_the_last_one(start, folder, index, picture):
    start()
    (folder / "0.png").unlink()
    (folder / "1.png").rename(folder / "one.png")
    (folder / "2.png").write_bytes(picture(20))
    start()
    assert names(index) == {"one.png", "2.png", "3.png"}
    assert content_id(picture(2)) not in index.ids()


def test_items_from_elsewhere_are_kept(start, folder, index, picture, bundle, tmp_path):
    elsewhere = tmp_path / "pictures-more"  # its path begins with the folder's
    elsewhere.mkdir()
    (elsewhere / "7.png").write_bytes(picture(7))
    run(BulkSettings(data=str(elsewhere), encoder=str(bundle.folder), index=index.store.uri))
    index.upsert([Item("f" * 32, "uploaded", None, None, 1, 1)], np.ones((1, index.dimension)), {"f" * 32: b"jpeg"})
    (folder / "7.png").write_bytes(picture(7))
    follower = start()
    (folder / "7.png").unlink()
    look(follower)
    assert names(index) == {"0.png", "1.png", "2.png", "3.png", "7.png", "uploaded"}


def test_a_broken_file_is_listed_until_it_is_repaired(start, folder, index, picture, tmp_path):
    (folder / "5.png").write_text("no picture")
    follower = start()
    with open(tmp_path / "skipped.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["5.png", "is not an image in a supported format"]]
    (folder / "5.png").write_bytes(picture(5))
    look(follower)
    assert not (tmp_path / "skipped.csv").exists()
    assert index.count() == 5


def test_a_picture_that_becomes_broken_loses_its_item(start, folder, index):
    follower = start()
    (folder / "0.png").write_text("no picture")
    look(follower)
    assert names(index) == {"1.png", "2.png", "3.png"}


@pytest.mark.parametrize("begun", [True, False])
def test_a_folder_that_is_temporarily_unreadable_keeps_its_items(start, folder, index, picture, monkeypatch, begun):
    (folder / "sub").mkdir()
    (folder / "sub" / "8.png").write_bytes(picture(8))
    follower = start()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if begun:
        look(follower)
    else:
        follower = start()
    assert index.count() == 5
    monkeypatch.undo()
    look(follower)
    assert index.count() == 5


@pytest.mark.parametrize("begun", [True, False])
def test_a_file_that_is_temporarily_unreadable_keeps_its_item(start, folder, index, monkeypatch, begun):
    follower, getsize = start(), os.path.getsize

    def refuse(path):
        if str(path).endswith("0.png"):
            raise PermissionError(13, "Permission denied")
        return getsize(path)

    monkeypatch.setattr(os.path, "getsize", refuse)
    os.utime(folder / "0.png", (0, 0))
    if begun:
        look(follower)
    else:
        follower = start()
    assert index.count() == 4
    monkeypatch.undo()
    (folder / "0.png").unlink()
    look(follower)
    assert index.count() == 3


def test_an_item_is_kept_while_its_last_file_is_unreadable(start, folder, index, monkeypatch):
    (folder / "sub").mkdir()
    shutil.copy(folder / "0.png", folder / "sub" / "0.png")
    follower, scandir = start(), os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (folder / "0.png").unlink()
    look(follower)
    assert index.count() == 4


def test_a_removed_drive_deletes_nothing(start, folder, index):
    follower = start()
    folder.rename(folder.with_name("away"))
    with pytest.raises(DataError, match="nothing was deleted"):
        follower.look()
    folder.mkdir()  # where it was mounted
    with pytest.raises(DataError, match="has been replaced by another folder; nothing was deleted"):
        follower.look()
    start()
    assert index.count() == 4


def test_all_files_can_be_removed_while_the_folder_is_followed(start, folder, index):
    follower = start()
    for path in folder.iterdir():
        path.unlink()
    look(follower)
    assert index.count() == 0


def test_after_an_error_of_the_index_no_change_is_lost(start, folder, index, picture, monkeypatch):
    follower = start()
    (folder / "0.png").unlink()
    (folder / "4.png").write_bytes(picture(4))

    def fail(*arguments):
        raise IndexProblem("the disk is full")

    monkeypatch.setattr(Index, "delete", fail)
    follower.look()
    with pytest.raises(IndexProblem):
        follower.look()
    monkeypatch.undo()
    look(follower)
    assert names(index) == {"1.png", "2.png", "3.png", "4.png"}


@pytest.mark.slow
def test_following_reacts_to_notifications_and_ends_with_its_event(
    bundle, folder, index, picture, tmp_path, monkeypatch, capfd, wait_until
):
    monkeypatch.setattr(follow, "SETTLED_S", 0.3)
    monkeypatch.setattr(follow, "LOOK_ANYWAY_S", 1e6)  # no look without a notification
    stop = threading.Event()
    thread = threading.Thread(
        target=follow.follow, args=(folder, batch_encoder(bundle), index, tmp_path / "skipped.csv", stop)
    )
    thread.start()

    def wait(count: int) -> None:
        wait_until(lambda: index.count() == count, f"the collection does not hold {count}")

    try:
        wait(4)
        (folder / "new").mkdir()
        (folder / "new" / "4.png").write_bytes(picture(4))
        wait(5)
        shutil.rmtree(folder / "new")
        wait(4)
    finally:
        stop.set()
        thread.join()
    assert "indexed 4, already there 0, skipped 0" in capfd.readouterr().out


@pytest.fixture
def following(bundle, folder, index, tmp_path, monkeypatch):
    """Follows the folder in a thread, with no look at all of it after the start."""
    monkeypatch.setattr(follow, "SETTLED_S", 0.3)
    monkeypatch.setattr(follow, "LOOK_ANYWAY_S", 1e6)
    stop, options = threading.Event(), (folder, batch_encoder(bundle), index, tmp_path / "skipped.csv")
    thread = threading.Thread(target=follow.follow, args=(*options, stop))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.fixture
def folders(folder, picture):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(picture(10 + ord(name)))
    return folder


@pytest.mark.slow
def test_only_folders_with_changes_are_listed(folders, index, picture, monkeypatch, wait_until, following):
    wait_until(lambda: index.count() == 6, "the collection does not hold 6")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(str(place)) or scandir(place))
    (folders / "a" / "1.png").write_bytes(picture(50))
    wait_until(lambda: index.count() == 7, "the collection does not hold 7")
    assert {place for place in listed if place.startswith(str(folders))} == {str(folders / "a")}


@pytest.mark.slow
def test_many_notifications_are_a_reason_to_look_at_all(folder, index, picture, monkeypatch, wait_until, following):
    """The system may have dropped others."""
    wait_until(lambda: index.count() == 4, "the collection does not hold 4")
    monkeypatch.setattr(follow, "MOST_CHANGED", 1)
    (folder / "a").mkdir()
    looks, look = [], Follower.look
    monkeypatch.setattr(Follower, "look", lambda self, changed: looks.append(changed) or look(self, changed))
    for i in range(3):
        (folder / "a" / f"{i}.png").write_bytes(picture(50 + i))
    wait_until(lambda: index.count() == 7, "the collection does not hold 7")
    assert None in looks


@pytest.mark.slow
def test_a_name_that_is_not_utf8_does_not_end_the_following(folder, index, picture, wait_until, following):
    wait_until(lambda: index.count() == 4, "the collection does not hold 4")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(picture(50))
    wait_until(lambda: index.count() == 5, "the collection does not hold 5")
    (folder / "5.png").write_bytes(picture(5))
    wait_until(lambda: index.count() == 6, "the collection does not hold 6")


def test_a_file_that_still_grows_is_looked_at_again(start, folder, index, picture):
    follower, data = start(), picture(9, size=(300, 200))
    (folder / "a").mkdir()
    place = folder / "a" / "9.png"
    place.write_bytes(data[:100])
    follower.look([str(folder / "a")])
    assert follower.unsettled == [str(place)]
    place.write_bytes(data)
    follower.look(follower.unsettled)
    assert index.count() == 4
    follower.look(follower.unsettled)
    assert (index.count(), follower.unsettled) == (5, [])
    place.unlink()
    follower.look([str(place)])
    assert follower.unsettled == [str(place)]
    follower.look(follower.unsettled)
    assert (index.count(), follower.unsettled) == (4, [])


@pytest.mark.slow
def test_the_command_follows_until_ctrl_c(bundle, folder, index):
    arguments = ["--data", str(folder), "--encoder", str(bundle.folder), "--index", index.store.uri, "--watch"]
    command = [sys.executable, "serving/bulk.py", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if "following" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate()
    finally:
        process.kill()
    assert f"stopped following {folder}; run the same command again to resume" in rest
    assert process.returncode == 0
    assert index.count() == 4


@pytest.mark.parametrize(
    ("data", "others", "sentence"),
    [
        ("pictures.zip", {}, "--watch needs a folder, and .*pictures.zip is not one"),
        ("pictures", {"ray": True}, "--watch cannot be combined with"),
    ],
)
def test_sources_that_cannot_be_followed_are_refused(bundle, folder, tmp_path, data, others, sentence):
    with pytest.raises(DataError, match=sentence):
        run(
            BulkSettings(
                data=str(tmp_path / data),
                encoder=str(bundle.folder),
                index=str(tmp_path / "index"),
                watch=True,
                **others,
            )
        )
