import errno
import importlib
import inspect
import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import types
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.artifact import UnreadableImage
from training.data import shapes, sources
from training.data.sources import DataError, open_source


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def make_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def make_tar(path: Path, *names: str) -> Path:
    """Each name is its own content, or `name=content`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            name, _, content = name.partition("=")
            member = tarfile.TarInfo(name)
            member.size = len(content or name)
            archive.addfile(member, io.BytesIO((content or name).encode()))
    return path


def layout(source) -> dict[str, tuple[str, str | None]]:
    return {picture.name: (picture.split, picture.label) for picture in source.pictures}


def layout_of(tmp_path, *names):
    return layout(open_source(str(make_tree(tmp_path / "pile", *names))))


# Layout


def test_a_flat_folder_has_no_labels_and_is_all_train(tmp_path):
    assert layout_of(tmp_path, "b.jpg", "a.png", "c") == {
        "a.png": ("train", None),
        "b.jpg": ("train", None),
        "c": ("train", None),
    }


def test_the_first_level_is_the_label_however_deep_the_file(tmp_path):
    assert layout_of(tmp_path, "cat/1.jpg", "cat/indoors/2.jpg", "dog/a/b/3.jpg", "4.jpg") == {
        "4.jpg": ("train", None),
        "cat/1.jpg": ("train", "cat"),
        "cat/indoors/2.jpg": ("train", "cat"),
        "dog/a/b/3.jpg": ("train", "dog"),
    }


def test_below_split_folders_the_next_level_is_the_label_and_files_next_to_them_are_ignored(tmp_path):
    names = ("Train/cat/1.jpg", "Train/dog/more/2.jpg", "Train/3.jpg", "test/cat/4.jpg", "factors.csv")
    assert layout_of(tmp_path, *names) == {
        "Train/3.jpg": ("train", None),
        "Train/cat/1.jpg": ("train", "cat"),
        "Train/dog/more/2.jpg": ("train", "dog"),
        "test/cat/4.jpg": ("test", "cat"),
    }


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_is_test_only_where_there_is_no_test_folder(tmp_path, name):
    without = layout_of(tmp_path / "a", "training/cat/1.jpg", f"{name}/cat/2.jpg")
    assert [split for split, _ in without.values()] == ["train", "test"]
    with_test = layout_of(tmp_path / "b", "train/1.jpg", f"{name}/2.jpg", "test/3.jpg")
    assert with_test == {"train/1.jpg": ("train", None), f"{name}/2.jpg": ("train", None), "test/3.jpg": ("test", None)}


def test_split_names_among_others_are_classes(tmp_path):
    assert layout_of(tmp_path, "train/1.jpg", "plane/2.jpg") == {
        "plane/2.jpg": ("train", "plane"),
        "train/1.jpg": ("train", "train"),
    }


@pytest.mark.parametrize(
    ("names", "expected", "said"),
    [
        (
            ("train2017/1.jpg", "val2017/2.jpg", "annotations/captions.json"),
            {"train2017/1.jpg": ("train", None), "val2017/2.jpg": ("test", None)},
            "for training: train2017; for testing: val2017; left out: annotations",
        ),
        (
            ("train/cat/1.jpg", "val/cat/2.jpg", "extra/cat/3.jpg"),
            {
                "train/cat/1.jpg": ("train", "cat"),
                "val/cat/2.jpg": ("test", "cat"),
                "extra/cat/3.jpg": ("train", None),
            },
            "for training: train; for testing: val; for training without labels: extra",
        ),
        (
            ("train_images/cat/1.jpg", "test_images/cat/2.jpg", "unlabeled/3.jpg", "loose.jpg"),
            {
                "train_images/cat/1.jpg": ("train", "cat"),
                "test_images/cat/2.jpg": ("test", "cat"),
                "unlabeled/3.jpg": ("train", None),
            },
            "for training: train_images; for testing: test_images; for training without labels: unlabeled",
        ),
        (
            ("images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt", "labels/val/2.txt"),
            {"images/train/1.jpg": ("train", None), "images/val/2.jpg": ("test", None)},
            "for training: train; for testing: val; left out: labels",
        ),
        (
            ("train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt"),
            {"train/images/1.jpg": ("train", None), "valid/images/2.jpg": ("test", None)},
            "for training: train; for testing: valid; left out: labels",
        ),
        (
            ("images/1.jpg", "masks/1.png"),
            {"images/1.jpg": ("train", None)},
            "left out: masks",
        ),
        (
            ("cat/1.jpg", "masks/2.jpg", "testing gloves/3.jpg"),
            {
                "cat/1.jpg": ("train", "cat"),
                "masks/2.jpg": ("train", "masks"),
                "testing gloves/3.jpg": ("train", "testing gloves"),
            },
            "",
        ),
    ],
)
def test_split_folders_are_recognised_beside_others_and_annotations_left_out(tmp_path, names, expected, said):
    assert layout_of(tmp_path, *names) == expected
    assert open_source(str(tmp_path)).layout == said


def test_single_folders_around_everything_are_skipped(tmp_path):
    names = ("archive/readme.txt", "archive/images/train/cat/1.jpg", "archive/images/test/dog/2.jpg")
    assert layout_of(tmp_path, *names) == {
        "archive/images/test/dog/2.jpg": ("test", "dog"),
        "archive/images/train/cat/1.jpg": ("train", "cat"),
    }


def test_a_single_folder_that_holds_all_files_is_not_a_label(tmp_path):
    assert layout_of(tmp_path, "cats/1.jpg", "cats/2.jpg") == {
        "cats/1.jpg": ("train", None),
        "cats/2.jpg": ("train", None),
    }


def test_hidden_files_and_macosx_are_left_out_everywhere(tmp_path):
    names = (".DS_Store", "cat/._1.jpg", "cat/1.jpg", ".git/2.jpg", "__MACOSX/cat/1.jpg", "dog/.thumbs/3.jpg", "dog/4")
    seen = {"cat/1.jpg": ("train", "cat"), "dog/4": ("train", "dog")}
    assert layout_of(tmp_path, *names) == seen
    assert layout(open_source(str(make_zip(tmp_path / "p.zip", *names)))) == seen
    assert layout(open_source(str(make_tar(tmp_path / "p.tar", *names)))) == seen


# Folders


def test_a_picture_in_a_folder_has_its_path_and_reads_its_bytes(tmp_path, monkeypatch):
    make_tree(tmp_path / "pile", "cat/1.jpg", "dog/2.jpg")
    monkeypatch.chdir(tmp_path)
    source = open_source("pile")
    assert source.name == "pile" and len(source) == 2
    assert source.pictures[0].path == tmp_path / "pile" / "cat" / "1.jpg"
    assert source.pictures[0].read() == b"cat/1.jpg"


def test_loops_of_symbolic_links_end_and_linked_folders_are_read_once(tmp_path):
    pile = make_tree(tmp_path / "pile", "cat/1.jpg", "dog/2.jpg")
    outside = make_tree(tmp_path / "outside", "3.jpg")
    (pile / "cat" / "up").symlink_to(pile)
    (pile / "cat" / "self").symlink_to(pile / "cat" / "self")
    (pile / "owl").symlink_to(outside)
    (pile / "owl again").symlink_to(outside)
    names = list(layout(open_source(str(pile))))
    assert names == ["cat/1.jpg", "cat/self", "dog/2.jpg", "owl/3.jpg"]


def test_a_broken_link_is_listed_and_cannot_be_read(tmp_path):
    pile = make_tree(tmp_path / "pile", "1.jpg")
    (pile / "0.jpg").symlink_to(tmp_path / "gone")
    broken, _ = open_source(str(pile)).pictures
    with pytest.raises(UnreadableImage, match="cannot be read: No such file"):
        broken.read()


def test_pipes_are_left_out(tmp_path):
    pile = make_tree(tmp_path / "pile", "1.jpg")
    os.mkfifo(pile / "2.jpg")
    assert list(layout(open_source(str(pile)))) == ["1.jpg"]


def test_a_folder_without_permission_is_listed_as_unreadable(tmp_path, monkeypatch):
    pile = make_tree(tmp_path / "pile", "cat/1.jpg", "dog/2.jpg")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    names = [picture.name for picture in open_source(str(pile)).pictures]
    assert names == ["cat/1.jpg", "dog"]
    with pytest.raises(DataError, match=r"dog cannot be read: Permission denied"):
        open_source(str(pile / "dog"))


def test_names_with_any_bytes_are_read(tmp_path):
    odd = ("a,b\n'c'.jpg", "ü 猫.jpg", "\udcff\udcfe.jpg", "-rf *.jpg")
    source = open_source(str(make_tree(tmp_path / "pile \udcff", *odd)))
    assert [picture.name for picture in source.pictures] == sorted(odd)
    assert all(picture.read() == picture.name.encode("utf-8", "surrogateescape") for picture in source.pictures)
    assert source.name == "pile"


def test_a_file_too_large_for_a_picture_is_not_read_into_memory(tmp_path, monkeypatch):
    pile, archive, shard = make_tree(tmp_path / "pile", "film.mp4"), tmp_path / "film.zip", tmp_path / "film.tar"
    sources = [open_source(str(path)) for path in (pile, make_zip(archive, "film.mp4"), make_tar(shard, "film.mp4"))]
    monkeypatch.setattr("training.data.sources.MAX_FILE_BYTES", 4)
    for source in sources:
        with pytest.raises(UnreadableImage, match="is larger than"):
            source.pictures[0].read()


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    make_tree(tmp_path / "Pictures", "1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("~/Pictures")) == 1


# Zip


def test_a_zip_reads_as_the_folder_that_was_packed(tmp_path):
    names = ("set/train/cat/1.jpg", "set/train/dog/2.jpg", "set/test/cat/3.jpg", "set/notes.txt")
    folder, archive = make_tree(tmp_path / "set", *names), make_zip(tmp_path / "set.zip", *names)
    assert layout(open_source(str(archive))) == layout(open_source(str(folder)))
    source = open_source(str(archive))
    assert source.name == "set"
    assert {picture.read() for picture in source.pictures} == {name.encode() for name in names[:3]}
    assert source.pictures[0].path is None


def test_backslashes_in_a_zip_separate_folders(tmp_path):
    archive = make_zip(tmp_path / "windows.zip", "cat\\1.jpg", "dog\\2.jpg")
    assert [picture.label for picture in open_source(str(archive)).pictures] == ["cat", "dog"]


def test_members_of_a_zip_are_read_whole_from_many_threads(tmp_path):
    path = tmp_path / "many.zip"
    expected = {f"{i}.jpg": os.urandom(20_000) for i in range(40)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in expected.items():
            archive.writestr(name, content)
    pictures = open_source(str(path)).pictures
    with ThreadPoolExecutor(8) as pool:
        for picture, content in zip(pictures * 10, pool.map(lambda p: p.read(), pictures * 10), strict=True):
            assert content == expected[picture.name]


def test_a_damaged_or_locked_member_of_a_zip_harms_only_itself(tmp_path):
    path = make_zip(tmp_path / "p.zip", "good.jpg", "locked.jpg", "wrong.jpg")
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for name in ("locked.jpg", "wrong.jpg"):
            start = archive.getinfo(name).header_offset
            if name == "wrong.jpg":
                raw[start + 30 + len(name) + 1] ^= 0xFF
            else:
                directory = raw.index(name.encode(), archive.start_dir) - 46
                raw[start + 6] |= 1
                raw[directory + 8] |= 1
    path.write_bytes(raw)
    good, locked, wrong = open_source(str(path)).pictures
    assert good.read() == b"good.jpg"
    with pytest.raises(UnreadableImage, match="encrypted"):
        locked.read()
    with pytest.raises(UnreadableImage, match=r"cannot be read from the \.zip"):
        wrong.read()
    assert good.read() == b"good.jpg"


# Tar


def test_webdataset_labels_come_from_cls_files_and_metadata_files_are_not_pictures(tmp_path):
    shard = make_tar(
        tmp_path / "birds.tar",
        "./0001.jpg",
        "./0001.cls=owl\n",
        "0001.json={}",
        "0002.left.jpg",
        "0002.right.jpg",
        "0002.cls=7",
        "0003.png",
        "0003.txt=no label",
    )
    source = open_source(str(shard))
    assert source.name == "birds"
    assert layout(source) == {
        "0001.jpg": ("train", "owl"),
        "0002.left.jpg": ("train", "7"),
        "0002.right.jpg": ("train", "7"),
        "0003.png": ("train", None),
    }
    assert [picture.read() for picture in source.pictures][1:] == [b"0002.left.jpg", b"0002.right.jpg", b"0003.png"]


def test_shards_of_a_glob_keep_their_own_names_and_labels(tmp_path):
    make_tar(tmp_path / "shards" / "b.tar", "0.jpg", "0.cls=dog")
    make_tar(tmp_path / "shards" / "a.tar", "0.jpg", "0.cls=cat")
    source = open_source(str(tmp_path / "shards" / "*.tar"))
    assert source.name == "shards"
    assert layout(source) == {"a.tar/0.jpg": ("train", "cat"), "b.tar/0.jpg": ("train", "dog")}


def test_folders_of_shards_are_splits(tmp_path):
    make_tar(tmp_path / "set" / "train" / "0.tar", "cat/0.jpg")
    make_tar(tmp_path / "set" / "val" / "0.tar", "dog/0.jpg")
    assert layout(open_source(str(tmp_path / "set" / "*" / "*.tar"))) == {
        "train/0.tar/cat/0.jpg": ("train", "cat"),
        "val/0.tar/dog/0.jpg": ("test", "dog"),
    }


@pytest.mark.parametrize("pattern", ["*.tar", "{000..002}.tar", "{000,001,002}.tar", "00[0-2].tar", "."])
@pytest.mark.parametrize("folder", ["shards", "x [1]", "a{1,2}"])
def test_shards_are_found_by_pattern_braces_and_folder_whatever_the_folder_is_called(tmp_path, folder, pattern):
    for i in range(3):
        make_tar(tmp_path / folder / f"00{i}.tar", "0.jpg")
    (tmp_path / folder / "index.json").write_text("{}")
    source = open_source(str(tmp_path / folder / pattern))
    assert list(layout(source)) == ["000.tar/0.jpg", "001.tar/0.jpg", "002.tar/0.jpg"]
    if pattern in ("*.tar", "{000..002}.tar"):
        assert source.name == {"shards": "shards", "x [1]": "x-1", "a{1,2}": "a"}[folder]


def test_numbers_in_braces_are_as_wide_as_they_are_written_and_a_missing_shard_is_named(tmp_path):
    make_tar(tmp_path / "8.tar", "0.jpg")
    make_tar(tmp_path / "10.tar", "0.jpg")
    with pytest.raises(DataError, match=r"/\{8\.\.10\}\.tar names .*/9\.tar, which is not there"):
        open_source(str(tmp_path / "{8..10}.tar"))
    make_tar(tmp_path / "9.tar", "0.jpg")
    assert len(open_source(str(tmp_path / "{8..10}.tar"))) == 3


def test_a_tar_next_to_pictures_is_one_file_of_the_folder(tmp_path):
    make_tree(tmp_path / "pile", "0.jpg")
    make_tar(tmp_path / "pile" / "0.tar", "0.jpg")
    assert list(layout(open_source(str(tmp_path / "pile")))) == ["0.jpg", "0.tar"]


def test_joined_tars_are_read_to_the_end(tmp_path):
    first, second = make_tar(tmp_path / "a.tar", "0.jpg"), make_tar(tmp_path / "b.tar", "1.jpg", "1.cls=cat")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    source = open_source(str(joined))
    assert layout(source) == {"0.jpg": ("train", None), "1.jpg": ("train", "cat")}
    assert [picture.read() for picture in source.pictures] == [b"0.jpg", b"1.jpg"]
    joined.write_bytes(first.read_bytes() + b"something else " * 100)
    with pytest.raises(DataError, match=r"joined\.tar cannot be read as a \.tar"):
        open_source(str(joined))


def test_a_hard_link_in_a_tar_reads_as_its_target(tmp_path):
    path = make_tar(tmp_path / "p.tar", "1.jpg")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        archive.addfile(link)
    assert [picture.read() for picture in open_source(str(path)).pictures] == [b"1.jpg", b"1.jpg"]


@pytest.mark.parametrize("damage", ["cut short", "overwritten in the middle", "not a tar"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    path = make_tar(tmp_path / "good" / "p.tar", *(f"{i}.jpg={'x' * 3000}" for i in range(4)))
    raw = path.read_bytes()  # a member is a header of 512 bytes and 3,072 of content
    damaged = {
        "cut short": raw[: 2 * 3584 + 1000],
        "overwritten in the middle": raw[: 2 * 3584] + b"\x77" * 512 + raw[2 * 3584 + 512 :],
        "not a tar": b"\x77" * 2000,
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"p\.tar cannot be read as a \.tar"):
        open_source(str(path))


# Unusable data


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("nowhere", "there is no folder or file nowhere, and no data set of that name (known: shapes, cifar10,"),
        ("cifar-01", "no data set of that name (nearest: cifar10"),
        ("empty", "empty holds no files"),
        ("hidden", "hidden holds no files"),
        ("note.txt", "note.txt is a file, but not a .zip, .tar or .parquet"),
        ("broken.zip", "broken.zip cannot be read as a .zip"),
        ("cut.zip", "cut.zip cannot be read as a .zip"),
        ("hollow.zip", "hollow.zip holds no files"),
        ("shards/*.tar", "no file matches shards/*.tar"),
        ("note*", "note* matches note.txt, which is not a .tar file"),
        (" ", "no data was given"),
    ],
)
def test_unusable_data_is_named_in_one_sentence(tmp_path, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_tree(tmp_path, "hidden/.DS_Store", "note.txt", "broken.zip")
    make_zip(Path("hollow.zip"))
    Path("cut.zip").write_bytes(make_zip(Path("whole.zip"), "1.jpg", "2.jpg").read_bytes()[:-30])
    with pytest.raises(DataError) as raised:
        open_source(given)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


# Named sets


class FakeSet:
    """Replaces a class of torchvision.datasets and records its instances."""

    classes = ("T-shirt/top", ("bag", "purse"))
    made: list[tuple] = []  # noqa: RUF012

    def __init__(self, root, download=False, **chosen):
        assert download
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / "archive.bin").write_bytes(b"raw")
        self.made.append(tuple(chosen.items()))
        self.labels = [0, 1, -1] if chosen.get("train") or chosen.get("split") == "train+unlabeled" else [1]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i >= len(self.labels):
            raise IndexError(i)
        return Image.new("RGB", (4, 4), (i, 0, 0)), self.labels[i]


@pytest.fixture
def fake_torchvision(monkeypatch):
    """Replace the classes of torchvision.datasets."""

    def install(dataset):
        module = types.ModuleType("torchvision.datasets")
        for class_name, *_ in sources.TORCHVISION.values():
            setattr(module, class_name, dataset)
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.datasets", module)

    monkeypatch.setattr(FakeSet, "made", [])
    return install


def test_a_torchvision_set_is_written_once_and_then_read_as_a_folder(tmp_path, fake_torchvision):
    fake_torchvision(FakeSet)
    cache = tmp_path / "data"
    source = open_source("Fashion-MNIST", cache)
    assert source.name == "fashionmnist"
    assert layout(source) == {
        "test/bag/00000.png": ("test", "bag"),
        "train/00002.png": ("train", None),
        "train/T-shirt-top/00000.png": ("train", "T-shirt-top"),
        "train/bag/00001.png": ("train", "bag"),
    }
    assert source.pictures[0].path == cache / "fashionmnist" / "test" / "bag" / "00000.png"
    assert not list(cache.rglob("archive.bin"))
    assert layout(open_source("fashionmnist", cache)) == layout(source)
    assert len(FakeSet.made) == 2


def test_a_set_whose_writing_was_interrupted_is_written_again(tmp_path, fake_torchvision):
    class Interrupted(FakeSet):
        def __getitem__(self, i):
            if i == 1:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    cache = tmp_path / "data"
    fake_torchvision(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source("cifar10", cache)
    assert not (cache / "cifar10").exists()
    (cache / ".cifar10.part" / "train").mkdir(parents=True)  # as a killed process leaves it
    (cache / ".cifar10.part" / "train" / "99999.png").touch()
    fake_torchvision(FakeSet)
    assert len(open_source("cifar10", cache)) == 4


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("Name or service not known"), RuntimeError("Error\n downloading"), TimeoutError()]
)
def test_without_a_network_the_set_is_named(tmp_path, fake_torchvision, error):
    def unreachable(root, download, **chosen):
        raise error

    fake_torchvision(unreachable)
    with pytest.raises(DataError, match=r"^mnist cannot be downloaded; is there a network\? \(.+\)$"):
        open_source("mnist", tmp_path)
    assert not (tmp_path / "mnist").exists()


def test_a_full_disk_leaves_no_part_of_a_set(tmp_path, fake_torchvision):
    class Full(FakeSet):
        def __getitem__(self, i):
            if i == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().__getitem__(i)

    fake_torchvision(Full)
    with pytest.raises(DataError, match=r"the disk is full: .*cifar100 could not be written"):
        open_source("cifar100", tmp_path)
    assert not list(tmp_path.rglob("*.png"))

    def full(root, download, **chosen):
        raise OSError(errno.ENOSPC, "No space left on device")

    fake_torchvision(full)
    with pytest.raises(DataError, match="the disk is full"):
        open_source("cifar100", tmp_path)


@pytest.mark.slow
def test_every_named_set_exists_in_torchvision_with_these_arguments():
    datasets = importlib.import_module("torchvision.datasets")
    for class_name, *arguments in sources.TORCHVISION.values():
        for chosen in arguments:
            inspect.signature(getattr(datasets, class_name)).bind("root", download=True, **chosen)


def test_shapes_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "make", partial(shapes.make, train=20, test=10, size_px=16))
    source = open_source("shapes", tmp_path)
    assert source.name == "shapes"
    assert {picture.label for picture in source.pictures} == set(shapes.OUTLINES)
    assert [picture.split for picture in source.pictures] == ["test"] * 10 + ["train"] * 20
    monkeypatch.setattr(shapes, "make", None)
    assert len(open_source("shapes", tmp_path)) == 30


def test_an_existing_path_is_preferred_to_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path, "shapes/mine.jpg", "holiday [2020]/beach.jpg")
    assert list(layout(open_source("shapes"))) == ["mine.jpg"]
    assert list(layout(open_source("holiday [2020]"))) == ["beach.jpg"]


@pytest.mark.slow
def test_listing_pictures_needs_no_torch():
    code = "import sys, training.data.store; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_member_of_a_zip_that_holds_more_than_it_claims_is_not_unpacked_whole(tmp_path, method):
    size, claimed = 200 * 2**20, 1000
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", bytes(size))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", claimed)))
    (picture,) = open_source(str(path)).pictures
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="Bad CRC"):
        picture.read()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < size / 2


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_large_member_of_a_zip_is_read_whole(tmp_path, method):
    data = np.random.default_rng(0).bytes(3 * 2**20 + 1)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.png", data)
    (picture,) = open_source(str(tmp_path / "a.zip")).pictures
    assert picture.read() == data


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_folders_that_the_system_shows_of_itself_are_refused(folder):
    with pytest.raises(
        DataError, match=f"{folder} cannot be read: it holds no files, but what the system shows of itself"
    ):
        open_source(folder)


def test_links_to_what_the_system_shows_of_itself_are_not_followed(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "link").symlink_to("/proc")
    assert [picture.name for picture in open_source(str(tmp_path)).pictures] == ["a.png"]
