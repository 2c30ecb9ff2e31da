import os
import random
import shutil
from pathlib import Path

import pytest

from training.data.folder import FolderListing


@pytest.fixture
def scanned(monkeypatch):
    """Names of the folders that were listed."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: seen.append(Path(place).name) or scandir(place))
    return seen


def whole(root: Path) -> dict:
    listing = FolderListing(root)
    listing.list()
    return {file.inside: file for file in listing.files()}


def change(root: Path, chance: random.Random, number: int) -> list[Path]:
    """Changes something at random; returns the paths that the system would name."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    place, inner = chance.choice(folders), folders[1:]
    new = place / f"{number}"
    what = chance.randrange(6)
    if what == 0:
        (new / "deep").mkdir(parents=True)
        (new / "deep" / "file").write_text("x")
        return [new]
    if what == 1 and inner:
        shutil.rmtree(gone := chance.choice(inner))
        return [gone]
    if what == 2 and inner:
        moved = chance.choice(inner)
        if moved not in (place, *place.parents):
            moved.rename(new)
            return [moved, new]
    if what == 3 and inner:  # another folder of the same name
        again = chance.choice(inner)
        again.rename(root / f".{number}")
        again.mkdir()
        (again / "other").write_text("x" * number)
        return [again]
    if what == 4 and (files := [path for path in place.iterdir() if path.is_file()]):
        chance.choice(files).write_text("x" * number)
        return files[:1] + files
    new.write_text("x" * number)
    return [new]


@pytest.mark.parametrize("seed", range(8))
def test_what_has_changed_is_listed_like_the_whole(tmp_path, seed):
    chance, listing = random.Random(seed), FolderListing(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    listing.list()
    for round in range(60):
        changed = [path for i in range(chance.randint(1, 3)) for path in change(tmp_path, chance, 10 * round + i + 1)]
        listing.list_again(map(str, chance.sample(changed, len(changed))))
        assert {file.inside: file for file in listing.files()} == whole(tmp_path)


def test_only_folders_that_changed_are_listed_again(tmp_path, scanned):
    for name in "abc":
        (tmp_path / name / "deep").mkdir(parents=True)
    listing = FolderListing(tmp_path)
    listing.list()
    assert len(scanned) == 7
    scanned.clear()
    (tmp_path / "a" / "1.png").write_text("x")
    listing.list_again([str(tmp_path / "a" / "1.png")])
    assert scanned == ["a"]
    scanned.clear()
    (tmp_path / "b" / "new" / "er").mkdir(parents=True)
    listing.list_again([str(tmp_path / "b" / "new"), str(tmp_path / "b" / "new" / "er")])
    assert scanned == ["b", "new", "er"]
    scanned.clear()
    listing.list_again([str(tmp_path / ".hidden" / "x"), str(tmp_path.parent / "x")])
    assert scanned == []


def test_a_folder_of_two_names_is_listed_under_the_one_that_is_left(tmp_path):
    elsewhere = tmp_path.with_name("elsewhere")
    for folder in (elsewhere, tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    (elsewhere / "1.png").write_text("x")
    for name in "ab":
        (tmp_path / name / "link").symlink_to(elsewhere)
    listing = FolderListing(tmp_path)
    listing.list()
    assert [file.inside for file in listing.files()] == [("a", "link", "1.png")]
    (tmp_path / "a" / "link").unlink()
    listing.list_again([str(tmp_path / "a" / "link")])
    assert [file.inside for file in listing.files()] == [("b", "link", "1.png")]


def test_another_folder_of_the_same_name_is_listed_with_all_in_it(tmp_path):
    for name, file in (("a", "1.png"), (".b", "2.png")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / file).write_text("x")
    listing = FolderListing(tmp_path)
    listing.list()
    (tmp_path / "a").rename(tmp_path / ".c")
    (tmp_path / ".b").rename(tmp_path / "a")
    listing.list_again([str(tmp_path / "a")])
    assert [file.inside for file in listing.files()] == [("a", "deep", "2.png")]


def test_a_folder_whose_rights_have_changed_is_listed_again(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").write_text("x")
    listing, scandir = FolderListing(tmp_path), os.scandir
    listing.list()

    def refuse(place):
        if place == tmp_path / "a" / "b":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        listing.list_again([str(tmp_path / "a" / "b")])
    assert [file.stamp for file in listing.files()] == ["unreadable folder"]
    listing.list_again([str(tmp_path / "a" / "b")])
    assert [file.inside for file in listing.files()] == [("a", "b", "1.png")]


def test_after_an_error_nothing_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("x")
    listing = FolderListing(tmp_path)
    listing.list()

    def refuse(place):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(os, "scandir", refuse)
        listing.list_again([str(tmp_path / "2.png")])
    listing.list_again([str(tmp_path / "2.png")])
    assert [file.inside for file in listing.files()] == [("a", "1.png")]
