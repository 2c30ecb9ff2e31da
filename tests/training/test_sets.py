"""Each row of docs/formats.md about sets of pictures: such a set is made, and listed as the table says."""

import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from training.data.sources import DataError, open_source

TABLE = Path(__file__).parents[2] / "docs" / "formats.md"
TREE = ("a/1.jpg", "b/2.png", ".hidden.jpg", "b/.cache/3.jpg", "__MACOSX/a/1.jpg")


def names(given: Path | str) -> list[str]:
    """The names of the pictures, each of which is its own content."""
    pictures = open_source(str(given)).pictures
    assert [picture.read() for picture in pictures] == [
        picture.name.rpartition("/")[2].encode() for picture in pictures
    ]
    return sorted(picture.name for picture in pictures)


def tree(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file.rpartition("/")[2])
    return folder


def tar(path: Path, *files: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for file in files:
            member = tarfile.TarInfo(file)
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file.encode()))
    return path


def a_folder(tmp: Path) -> None:
    folder = tree(tmp / "pile", *TREE)
    tree(tmp / "elsewhere", "4.jpg")
    (folder / "c").symlink_to(tmp / "elsewhere")
    assert names(folder) == ["a/1.jpg", "b/2.png", "c/4.jpg"]


def a_zip(tmp: Path) -> None:
    folder = tree(tmp / "pile", *TREE)
    with zipfile.ZipFile(tmp / "pile.zip", "w") as archive:
        for file in TREE:
            archive.write(folder / file, file)
    assert names(tmp / "pile.zip") == names(folder) == ["a/1.jpg", "b/2.png"]


def tars(tmp: Path) -> None:
    for i in range(3):
        tar(tmp / "shards" / f"{i:03}.tar", f"{i}.jpg")
    assert names(tmp / "shards" / "001.tar") == ["1.jpg"]
    for given in ("*.tar", "{000..002}.tar", ""):
        assert names(tmp / "shards" / given) == ["000.tar/0.jpg", "001.tar/1.jpg", "002.tar/2.jpg"]


def names_like_patterns(tmp: Path) -> None:
    for name in ("x [1]", "a{1,2}"):
        assert names(tree(tmp / name, "1.jpg")) == ["1.jpg"]
        tar(tmp / f"{name} shards" / "0.tar", "0.jpg")
        assert names(tmp / f"{name} shards" / "*.tar") == ["0.jpg"]


def joined_tars(tmp: Path) -> None:
    joined = b"".join(tar(tmp / f"{i}.tar", f"{i}.jpg").read_bytes() for i in range(3))
    (tmp / "joined.tar").write_bytes(joined)
    assert names(tmp / "joined.tar") == ["0.jpg", "1.jpg", "2.jpg"]


def a_missing_shard(tmp: Path) -> None:
    for i in (0, 2):
        tar(tmp / f"{i:03}.tar", f"{i}.jpg")
    with pytest.raises(DataError, match=re.escape(os.path.join(str(tmp), "001.tar"))):
        open_source(str(tmp / "{000..002}.tar"))


def table(*files: str) -> pa.Table:
    return pa.table({"image": [{"bytes": file.encode(), "path": file} for file in files]})


def contents(given: Path | str) -> dict[str, bytes]:
    return {picture.name: picture.read() for picture in open_source(str(given)).pictures}


def a_saved_data_set(tmp: Path) -> None:
    import datasets  # takes a second

    splits = {name: datasets.Dataset(table(f"{name}.jpg")) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp / "saved")
    assert contents(tmp / "saved") == {"train/0-train.jpg": b"train.jpg", "test/0-test.jpg": b"test.jpg"}
    assert {picture.split for picture in open_source(str(tmp / "saved")).pictures} == {"train", "test"}


def parquet_files(tmp: Path) -> None:
    (tmp / "data").mkdir()
    for i in range(2):
        pyarrow.parquet.write_table(table(f"{i}.jpg"), tmp / "data" / f"{i}.parquet")
    assert contents(tmp / "data" / "1.parquet") == {"0-1.jpg": b"1.jpg"}
    for given in ("*.parquet", ""):
        assert contents(tmp / "data" / given) == {"0.parquet/0-0.jpg": b"0.jpg", "1.parquet/0-1.jpg": b"1.jpg"}


def a_data_set_of_hugging_face(tmp: Path) -> None:
    a_saved_data_set(tmp)
    given = f"hf:{tmp / 'saved'}"
    assert contents(f"{given}:test") == contents(f"{given}:test:image") == {"test/0-test.jpg": b"test.jpg"}
    assert contents(given) == contents(f"{given}::image") == contents(tmp / "saved")


CHECKS: dict[str, Callable[[Path], None]] = {
    "a folder": a_folder,
    "a `.zip`": a_zip,
    "a `.tar`, `'shards/*.tar'`, `'shards/{000..119}.tar'`, or a folder of `.tar` files only": tars,
    "a folder called `x [1]` or `a{1,2}`": names_like_patterns,
    "a folder that `datasets` wrote with `save_to_disk`": a_saved_data_set,
    "a `.parquet`, `'data/*.parquet'`, or a folder of `.parquet` files only": parquet_files,
    "`hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:SPLIT:COLUMN`, `hf:NAME::COLUMN`": a_data_set_of_hugging_face,
    "several `.tar` files joined by `cat`": joined_tars,
    "a shard that is named by braces and is not there": a_missing_shard,
}


def test_the_table_and_the_checks_name_the_same_sets():
    section = TABLE.read_text().partition("## Sets of pictures")[2].partition("## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert [row for row in rows if row != "given"] == list(CHECKS)


@pytest.mark.parametrize("row", CHECKS, ids=str)
def test_a_set_is_read_as_the_table_says(row, tmp_path):
    CHECKS[row](tmp_path)
