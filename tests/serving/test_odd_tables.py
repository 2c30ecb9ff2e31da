"""Parquet files with values that Python does not know, and with two columns of one name."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from export.artifact import UnreadableImage
from serving.collection import exchange
from serving.collection.exchange import FileProblem
from serving.indexing.originals import open_originals
from training.data.sources import DataError

VECTOR = pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))
FAR = {
    "timestamp": pa.array([2**62], pa.timestamp("us")),
    "date": pa.array([2**31 - 1], pa.date32()),
    "time zone": pa.array([0], pa.timestamp("us", "Nowhere/City")),
}


@pytest.fixture
def write(tmp_path):
    def put(*columns: tuple[str, object]) -> str:
        names, values = zip(*columns, strict=True)
        arrays = [value if isinstance(value, pa.Array) else pa.array(value) for value in values]
        pa.parquet.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "odd.parquet")
        return str(tmp_path / "odd.parquet")

    return put


@pytest.mark.parametrize("value", FAR.values(), ids=FAR)
def test_a_date_that_python_does_not_know_is_named(write, tmp_path, value):
    message = r"odd.parquet: a value of the column when \(.*\) is no date that can be read"
    write(("id", ["a"]), ("name", ["a"]), ("vector", VECTOR), ("when", value))
    with pytest.raises(FileProblem, match=message):
        list(exchange.contents(tmp_path / "odd.parquet").rows())
    with pytest.raises(DataError, match=message):
        list(open_originals(write(("image", [b"x"]), ("when", value))).files)


@pytest.mark.parametrize("name", ["id", "name", "vector", "price"])
def test_two_columns_of_one_name_are_refused(write, tmp_path, name):
    columns = [("id", ["a"]), ("name", ["a"]), ("vector", VECTOR), ("price", [1])]
    write(*columns, next(column for column in columns if column[0] == name))
    with pytest.raises(FileProblem, match=rf"odd.parquet: there are 2 columns {name}; rename one of them"):
        exchange.contents(tmp_path / "odd.parquet")


@pytest.mark.parametrize("name", ["path", "image", "price"])
def test_two_columns_of_one_name_are_refused_in_a_list(write, name):
    columns = [("path", ["a"]), ("image", [b"x"]), ("price", [1])]
    with pytest.raises(DataError, match=rf"odd.parquet: there are 2 columns {name}; rename one of them"):
        open_originals(write(*columns, next(column for column in columns if column[0] == name)))


def test_an_empty_vector_is_refused(write, tmp_path):
    write(("id", ["a"]), ("name", ["a"]), ("vector", pa.array([[]], pa.list_(pa.float32()))))
    with pytest.raises(FileProblem, match=r"odd.parquet has an empty vector"):
        exchange.contents(tmp_path / "odd.parquet")


def test_what_is_no_picture_in_a_list_is_skipped_and_a_label_of_bytes_is_text(write):
    (only,) = open_originals(write(("image", [{"bytes": 3, "path": "a"}]), ("label", [b"\xff"]))).files
    assert only.label == r"b'\xff'"
    with pytest.raises(UnreadableImage, match="neither a path nor an image"):
        only.read()
