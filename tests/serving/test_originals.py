import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from export.artifact import UnreadableImage
from serving.indexing.originals import open_originals
from training.data.sources import DataError, read_file


@pytest.fixture
def write(tmp_path):
    """write(name, **columns) -> the path of a Parquet list."""

    def put(name: str = "list.parquet", /, **columns) -> str:
        pa.parquet.write_table(pa.table(columns), tmp_path / name)
        return str(tmp_path / name)

    return put


def test_a_list_of_paths_has_names_labels_and_metadata(write, tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    path = write(
        path=["a.png", str(tmp_path / "b.png")], name=["A", None], label=[3, None], price=[1.5, 2.0], sold=[True, None]
    )
    count, each, *_ = open_originals(path)
    first, second = each
    assert count == 2
    assert (first.name, first.label, first.path) == ("A", "3", str(tmp_path / "a.png"))
    assert (first.metadata, first.read()) == ({"price": 1.5, "sold": True}, b"a")
    assert (second.name, second.label, second.metadata) == (str(tmp_path / "b.png"), None, {"price": 2.0})
    with pytest.raises(UnreadableImage, match="No such file"):
        second.read()


def test_images_in_the_list_are_read_as_hugging_face_writes_them(write):
    _, each, *_ = open_originals(write(image=[{"bytes": b"x", "path": "x.jpg"}, {"bytes": None, "path": None}]))
    first, second = each
    assert (first.name, first.path, first.read()) == ("x.jpg", None, b"x")
    assert second.name == "list.parquet, row 2"
    with pytest.raises(UnreadableImage, match="neither a path nor an image"):
        second.read()


def test_images_in_the_list_may_be_plain_bytes(write):
    _, (only,), *_ = open_originals(write(image=[b"x"], id=["z"], width=[7]))
    assert (only.read(), only.metadata) == (b"x", {})


def test_a_list_names_files_below_its_own_folder_and_the_given_ones_only(write, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "more").mkdir()
    for name in ("secret.png", "more/b.png", "lists/a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "lists" / "link.png").symlink_to(tmp_path / "secret.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "/dev/zero", "a\0b"]
    path = write("lists/list.parquet", path=["a.png", "../more/b.png", *outside])
    count, files, folders, *_ = open_originals(path, folders=[str(tmp_path / "more")])
    assert (count, folders) == (7, [str(tmp_path / "lists"), str(tmp_path / "more")])
    first, second, *others = files
    assert first.read() == second.read() == b"x"
    for one in others:
        with pytest.raises(UnreadableImage, match=r"is outside the folders that may be read|path is not allowed"):
            one.read()
    with pytest.raises(UnreadableImage, match="is outside the folders"):
        list(open_originals(path).files)[1].read()


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "folder", "a\0b"])
def test_only_regular_files_are_read(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnreadableImage, match=r"is not a file|cannot be read: its name is not allowed"):
        read_file(tmp_path / path)


def test_several_lists_follow_each_other_and_dates_become_text(write, tmp_path):
    import datetime

    for name in ("one", "two"):
        write(f"{name}.parquet", path=[f"{name}.png"], taken=[datetime.date(2024, 5, 17)])
    count, each, *_ = open_originals(str(tmp_path / "*.parquet"))
    assert (count, [one.name for one in each]) == (2, ["one.png", "two.png"])
    _, (first, _), *_ = open_originals(str(tmp_path / "*.parquet"))
    assert first.metadata == {"taken": "2024-05-17"}


def test_columns_of_any_name_and_kind_are_kept_renamed_or_left_out(write):
    import datetime

    path = write(
        path=["a", "b"],
        label=[1.0, float("nan")],
        **{"unit price": [float("nan"), 2.5], "sku-id": ["x", "y"], "größe": [3, None], "inf": [float("inf"), 1.0]},
        at=[datetime.time(8, 30), None],
        took=[datetime.timedelta(seconds=90), None],
        boxes=[[1, 2], None],
        parts=[{"a": 1}, None],
        mask=[b"x", None],
        nothing=pa.nulls(2),
    )
    found = open_originals(path)
    first, second = found.files
    assert first.metadata == {"sku_id": "x", "größe": 3, "at": "08:30:00", "took": "0:01:30"}
    assert second.metadata == {"unit_price": 2.5, "sku_id": "y", "inf": 1.0}
    assert (first.label, second.label) == ("1.0", None)
    assert found.kinds == {"unit_price": float, "sku_id": str, "größe": int, "inf": float, "at": str, "took": str}
    assert found.notes == [
        "stored under other names: unit price as unit_price, sku-id as sku_id",
        "left out: boxes (list<element: int64>), parts (struct<a: int64>), mask (binary)",
    ]


def test_one_split_of_a_list(write):
    path = write(path=["a", "b", "c"], split=["train", "test", "train"])
    assert open_originals(path, "train").count == 2
    assert [one.name for one in open_originals(path, "test").files] == ["b"]


@pytest.mark.parametrize(
    ("columns", "split", "sentence"),
    [
        ({"file": ["a"]}, "all", "has no column path or image; its columns are file"),
        ({"path": [1]}, "all", "the column path holds int64, not text"),
        ({"image": ["a"]}, "all", "the column image holds string, not files' bytes"),
        ({"path": ["a"], "a b": [1], "a-b": [1]}, "all", "the columns a b and a-b would both be the metadata a_b"),
        ({"path": ["a"]}, "test", "has no column split"),
        ({"path": ["a"], "split": ["train"]}, "test", "has no test split"),
    ],
)
def test_a_list_that_cannot_be_used_is_explained(write, columns, split, sentence):
    with pytest.raises(DataError, match=sentence):
        open_originals(write(**columns), split)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "list.parquet").write_text("path\na.png")
    with pytest.raises(DataError, match=r"list\.parquet cannot be read as Parquet"):
        open_originals(str(tmp_path / "list.parquet"))
    with pytest.raises(DataError, match="there is no file"):
        open_originals(str(tmp_path / "none.parquet"))


def test_without_data_the_error_lists_the_sources():
    with pytest.raises(DataError, match="no data was given"):
        open_originals(None)
