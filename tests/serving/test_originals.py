import pyarrow as pa
import pyarrow.parquet
import pytest

from export.artifact import UnreadableImage
from serving.indexing.originals import open_originals
from training.data.sources import DataError


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
    count, each = open_originals(path)
    first, second = each
    assert count == 2
    assert (first.name, first.label, first.path) == ("A", "3", str(tmp_path / "a.png"))
    assert (first.metadata, first.read()) == ({"price": 1.5, "sold": True}, b"a")
    assert (second.name, second.label, second.metadata) == (str(tmp_path / "b.png"), None, {"price": 2.0})
    with pytest.raises(UnreadableImage, match="No such file"):
        second.read()


def test_images_in_the_list_are_read_as_hugging_face_writes_them(write):
    _, each = open_originals(write(image=[{"bytes": b"x", "path": "x.jpg"}, {"bytes": None, "path": None}]))
    first, second = each
    assert (first.name, first.path, first.read()) == ("x.jpg", None, b"x")
    assert second.name == "list.parquet, row 2"
    with pytest.raises(UnreadableImage, match="neither a path nor an image"):
        second.read()


def test_images_in_the_list_may_be_plain_bytes(write):
    _, (only,) = open_originals(write(image=[b"x"], id=["z"], width=[7]))
    assert (only.read(), only.metadata) == (b"x", {})


def test_several_lists_follow_each_other_and_dates_become_text(write, tmp_path):
    import datetime

    for name in ("one", "two"):
        write(f"{name}.parquet", path=[f"{name}.png"], taken=[datetime.date(2024, 5, 17)])
    count, each = open_originals(str(tmp_path / "*.parquet"))
    assert (count, [one.name for one in each]) == (2, ["one.png", "two.png"])
    _, (first, _) = open_originals(str(tmp_path / "*.parquet"))
    assert first.metadata == {"taken": "2024-05-17"}


def test_one_split_of_a_list(write):
    path = write(path=["a", "b", "c"], split=["train", "test", "train"])
    assert open_originals(path, "train").count == 2
    assert [one.name for one in open_originals(path, "test").files] == ["b"]


@pytest.mark.parametrize(
    ("columns", "split", "sentence"),
    [
        ({"file": ["a"]}, "all", "has no column path or image; its columns are file"),
        ({"path": ["a"], "boxes": [[1, 2]]}, "all", "the column boxes holds list<.*>, which cannot be metadata"),
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
