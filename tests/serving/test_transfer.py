"""Parquet and back; from a folder to an object store and back."""

import errno
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from serving.collection import exchange
from serving.collection.exchange import FileProblem
from serving.collection.index import Index, IndexProblem, Item, WrongEncoder, collections, content_id
from serving.collection.undo import changes, undo
from serving.indexing import transfer
from serving.protocol.filters import Filter

ROOT = Path(__file__).parents[2]
JPEG = b"\xff\xd8 a thumbnail"


def items_of(n: int) -> list[Item]:
    """With metadata of all types, and every third without."""
    return [
        Item(
            content_id(b"%d" % i),
            f"a/{i}.png",
            "ab"[i % 2] if i % 4 else None,
            f"/pictures/{i}.png" if i % 2 else None,
            40,
            30 + i,
            1000 + i,
            {} if i % 3 == 0 else {"colour": "röt", "stock": i, "price": i / 2, "sold": i % 2 == 0},
        )
        for i in range(n)
    ]


def vectors_of(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def held(index: Index) -> dict[str, tuple[str, np.ndarray]]:
    """All facts as text, so that 3, 3.0 and True differ."""
    return {
        item.id: (repr(replace(item, metadata=dict(sorted(item.metadata.items())))), vector)
        for items, vectors in index.scan()
        for item, vector in zip(items, vectors, strict=True)
    }


def assert_equal(a: Index, b: Index) -> None:
    ours, theirs = held(a), held(b)
    assert {id: facts for id, (facts, _) in ours.items()} == {id: facts for id, (facts, _) in theirs.items()}
    for id, (_, vector) in ours.items():
        np.testing.assert_allclose(vector, theirs[id][1], atol=1e-6)


@pytest.fixture
def index(tmp_path) -> Index:
    """50 items with a thumbnail each."""
    index, items = Index(tmp_path / "index", "enc-a", 8), items_of(50)
    index.upsert(items, vectors_of(50), {item.id: JPEG + item.id.encode() for item in items})
    return index


@pytest.fixture
def other(tmp_path) -> Index:
    return Index(tmp_path / "other", "enc-a", 8)


@pytest.fixture
def small_portions(monkeypatch):
    monkeypatch.setattr(transfer, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(exchange, "ROWS_AT_ONCE", 7)


@pytest.mark.slow
def test_export_and_import_keep_values_and_types(index, other, tmp_path, small_portions):
    assert transfer.export(index, tmp_path / "v.parquet") == 50
    contents = exchange.contents(tmp_path / "v.parquet")
    assert (contents.encoder, contents.collection, contents.dimension, contents.count) == ("enc-a", "pictures", 8, 50)
    assert str(transfer.import_(contents, other)) == "50 sent, 0 already there"
    assert_equal(index, other)


def test_a_file_is_plain_parquet_in_row_groups(index, tmp_path, small_portions):
    transfer.export(index, tmp_path / "v.parquet")
    file = pyarrow.parquet.ParquetFile(tmp_path / "v.parquet")
    assert file.metadata.num_row_groups >= 7
    schema = file.schema_arrow
    assert schema.names[:7] == ["id", "name", "label", "path", "width", "height", "bytes"]
    assert sorted(schema.names[7:]) == ["colour", "price", "sold", "stock", "vector"]
    assert schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert schema.field("stock").type == pa.int64() and schema.field("sold").type == pa.bool_()
    assert schema.metadata[b"twinview.encoder"] == b"enc-a" and schema.metadata[b"twinview.collection"] == b"pictures"


def test_a_part_of_a_collection_can_be_exported(index, tmp_path):
    assert transfer.export(index, tmp_path / "v.parquet", Filter.parse({"stock": {"gte": 40}})) == 7
    assert min(pyarrow.parquet.read_table(tmp_path / "v.parquet")["stock"].to_pylist()) == 40


def test_a_failed_export_leaves_the_old_file(index, tmp_path, monkeypatch, small_portions):
    path = tmp_path / "v.parquet"
    path.write_text("before")
    scan = Index.scan

    def broken(self, *arguments, **named):
        yield next(scan(self, *arguments, **named))
        raise IndexProblem("broken")

    monkeypatch.setattr(Index, "scan", broken)
    with pytest.raises(IndexProblem, match="broken"):
        transfer.export(index, path)
    assert path.read_text() == "before" and [p.name for p in tmp_path.glob("v.*")] == ["v.parquet"]


@pytest.mark.slow
def test_an_import_sends_only_missing_and_changed_items(index, other, tmp_path, small_portions):
    transfer.export(index, tmp_path / "v.parquet")
    contents = exchange.contents(tmp_path / "v.parquet")
    items, vectors = items_of(50), vectors_of(50)
    other.upsert(items[:20], vectors[:20])
    other.upsert([replace(items[3], label="changed")], vectors[3:4])
    other.upsert([items[4]], vectors[5:6])
    other.upsert([replace(items[5], metadata={**items[5].metadata, "stock": 6})], vectors[5:6])
    assert str(transfer.import_(contents, other)) == "33 sent, 17 already there"
    assert str(transfer.import_(contents, other)) == "0 sent, 50 already there"
    assert_equal(index, other)


def test_a_disk_that_is_full_at_the_first_byte_leaves_no_file(tmp_path, monkeypatch):
    def full(path, *_, **options):
        path.write_bytes(b"PAR")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter", full)
    with (
        pytest.raises(FileProblem, match="No space left on device"),
        exchange.ParquetWriter(tmp_path / "v.parquet", "enc-a", 8),
    ):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


def test_an_import_makes_thumbnails_from_unchanged_originals(other, picture, tmp_path):
    files = {name: picture(seed) for seed, name in enumerate(["there.png", "gone.png", "another.png"])}
    items = [
        Item(content_id(data), name, None, str(tmp_path / name), 40, 30, len(data)) for name, data in files.items()
    ]
    (tmp_path / "there.png").write_bytes(files["there.png"])
    (tmp_path / "another.png").write_bytes(picture(9, size=(90, 90)))
    with exchange.ParquetWriter(tmp_path / "v.parquet", "enc-a", 8) as file:
        file.write(items, vectors_of(3))
    transfer.import_(exchange.contents(tmp_path / "v.parquet"), other, [str(tmp_path)])
    made = [other.read_thumbnail(item.id) for item in items]
    assert made[0].startswith(b"\xff\xd8") and made[1:] == [None, None]
    (tmp_path / "gone.png").write_bytes(files["gone.png"])
    assert transfer.import_(exchange.contents(tmp_path / "v.parquet"), other, [str(tmp_path)]).sent == 0
    assert other.read_thumbnail(items[1].id).startswith(b"\xff\xd8")


def test_an_import_reads_no_file_outside_the_given_folders(twinview, other, picture, tmp_path):
    given, data = tmp_path / "given", picture(1)
    given.mkdir()
    (tmp_path / "secret.png").write_bytes(data)
    (given / "link.png").symlink_to(tmp_path / "secret.png")
    (given / "mine.png").write_bytes(data)
    paths = [tmp_path / "secret.png", given / "link.png", given / ".." / "secret.png", "/dev/zero", given / "mine.png"]
    size = len(data)
    items = [Item(f"id{i}", "a", None, str(path), 1, 1, size) for i, path in enumerate(paths)]
    with exchange.ParquetWriter(tmp_path / "v.parquet", "enc-a", 8) as file:
        file.write(items, vectors_of(5))
    for folders, made in (((), []), (("--pictures", given), ["id4"])):
        twinview("index", "import", tmp_path / "v.parquet", "--index", other.store.uri, *folders)
        assert [item.id for item in items if other.read_thumbnail(item.id)] == made
    assert other.folders() == [str(given)]


def test_the_first_row_of_an_id_is_imported(other, tmp_path, small_portions):
    items = items_of(12)
    with exchange.ParquetWriter(tmp_path / "v.parquet", "enc-a", 8) as file:
        file.write([*items[:10], replace(items[2], name="again", metadata={})], vectors_of(11))
        file.write([replace(items[1], name="again", metadata={})], vectors_of(1))
    assert transfer.import_(exchange.contents(tmp_path / "v.parquet"), other).sent == 10
    assert {item.name for item in other.page(100)} == {item.name for item in items[:10]}


def test_vectors_of_another_encoder_are_not_imported(index, tmp_path):
    transfer.export(index, tmp_path / "v.parquet")
    third = Index(tmp_path / "third", "enc-b", 8)
    third.upsert(items_of(1), vectors_of(1))
    with pytest.raises(WrongEncoder, match="holds vectors of enc-b, and this is enc-a"):
        transfer.import_(exchange.contents(tmp_path / "v.parquet"), Index(tmp_path / "third", "enc-a", 8))
    assert third.count() == 1


VECTOR = pa.list_(pa.float32(), 4)


def table(**columns) -> pa.Table:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8, np.float32)), 4)
    whole = {"id": ["0" * 32, "1" * 32], "name": ["a", "b"], "vector": vector} | columns
    whole = {name: column for name, column in whole.items() if column is not None}
    return pa.table(whole).replace_schema_metadata({"twinview.encoder": "enc-a"})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "no.parquet cannot be read as Parquet: No such file"),
        (b"some text", "no.parquet cannot be read as Parquet: Parquet magic bytes not found"),
        (table(name=None), "has no column name; its columns are id, vector"),
        (table(vector=["a", "b"]), "the column vector has the type string, not a list of numbers"),
        (table(vector=[[1.0], [1.0, 2.0]]), "the vectors are not all of the length 1"),
        (table(vector=pa.array([None, None], pa.list_(pa.float32()))), "has no vectors"),
        (table(id=[1, 2]), "the column id has the type int64, which is not allowed"),
        (table(width=["a", "b"]), "the column width has the type string, which is not allowed"),
        (table(**{"a b": [1, 2], "a-b": [1, 2]}), "the columns a b and a-b would both be the metadata a_b"),
        (table(id=["0" * 32, None]), "has a row without an id or a name"),
        (
            table(vector=pa.array([[1.0] * 4, None], pa.list_(pa.float32(), 4))),
            f"the vector of {'1' * 32} is zero or not finite",
        ),
        (
            table(vector=pa.array([[1.0] * 4, [np.nan] * 4], pa.list_(pa.float32(), 4))),
            "the vector of 1+ is zero or not finite",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_reason(given, sentence, tmp_path):
    path = tmp_path / "no.parquet"
    if isinstance(given, bytes):
        path.write_bytes(given)
    elif given is not None:
        pyarrow.parquet.write_table(given, path)
    with pytest.raises(FileProblem, match=sentence) as problem:
        list(exchange.contents(path).rows())
    assert str(path) in str(problem.value)


@pytest.mark.parametrize("lossy", [False, True])
def test_an_export_that_pandas_has_read_and_written_is_imported(index, other, tmp_path, lossy):
    transfer.export(index, tmp_path / "v.parquet")
    frame = pd.read_parquet(tmp_path / "v.parquet")
    frame.loc[0, ["label", "width"]] = None  # makes the whole numbers of this column floats
    frame["taken at"] = pd.Timestamp("2024-05-17")
    frame["tags"] = [["a"]] * len(frame)
    frame = frame[frame.index % 2 == 0] if lossy else frame  # with an index as a column
    frame.to_parquet(tmp_path / "frame.parquet")
    contents = exchange.contents(tmp_path / "frame.parquet")
    assert (contents.encoder, contents.dimension, contents.count) == (None, index.dimension, len(frame))
    assert contents.metadata.notes == [
        "stored under other names: taken at as taken_at",
        "left out: tags (list<element: string>)",
    ]
    transfer.import_(contents, other)
    first = frame["id"][0]
    item, vector = other.get(first)
    assert (item.label, item.width, item.metadata["taken_at"][:10]) == (None, 0, "2024-05-17")
    before = index.get(first)
    assert item.metadata.keys() - {"taken_at"} == before[0].metadata.keys()
    np.testing.assert_allclose(vector, before[1], atol=1e-6)
    assert other.count() == len(frame)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_documents_lines_give_the_vectors_and_a_changed_table_is_imported(
    index, other, tmp_path, monkeypatch, library
):
    monkeypatch.chdir(tmp_path)
    transfer.export(index, Path("vectors.parquet"))
    document = (ROOT / "docs" / "integrations.md").read_text().partition("## pandas and Polars")[2]
    programs = re.findall(r"^```python\n(.*?)^```$", document.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    (program,) = [program for program in programs if f"import {library}" in program]
    names: dict = {}
    exec(program, names)
    table, vectors = names["table"], names["vectors"]
    held_there = {item.id: vector for items, part in index.scan() for item, vector in zip(items, part, strict=True)}
    assert (type(vectors), vectors.shape, vectors.dtype) == (np.ndarray, (50, 8), np.float32)
    np.testing.assert_allclose(vectors, [held_there[id] for id in table["id"]], atol=1e-6)
    assert {"name", "label", "path", "width", "height", "bytes", "colour", "price"} < set(table.columns)
    if library == "pandas":
        table.assign(label="new").to_parquet("changed.parquet")
    else:
        table.with_columns(label=names["pl"].lit("new")).write_parquet("changed.parquet")
    contents = exchange.contents(Path("changed.parquet"))
    assert contents.encoder is None
    transfer.import_(contents, other)
    assert other.count(Filter.parse({"label": "new"})) == 50
    np.testing.assert_allclose(other.get(table["id"][0])[1], held_there[table["id"][0]], atol=1e-6)


def test_missing_values_and_any_column_names_are_imported(other, tmp_path):
    columns = {"unit price": [1.5, np.nan], "sku-id": ["x", None], "größe": [3, 4], "2nd": [True, False]}
    pyarrow.parquet.write_table(table(**columns, far=[np.inf, 1.0]), tmp_path / "v.parquet")
    (rows,) = exchange.contents(tmp_path / "v.parquet").rows()
    first, second = rows[0]
    assert first.metadata == {"unit_price": 1.5, "sku_id": "x", "größe": 3, "_2nd": True}
    assert second.metadata == {"größe": 4, "_2nd": False, "far": 1.0}


def test_a_file_that_cannot_be_written_is_named(index, tmp_path):
    with pytest.raises(FileProblem, match=r"v\.parquet cannot be written: Not a directory|File exists"):
        (tmp_path / "file").touch()
        transfer.export(index, tmp_path / "file" / "v.parquet")


def test_a_metadata_key_may_have_the_name_of_a_column(other, tmp_path):
    item = replace(items_of(1)[0], metadata={"vector": "v", "meta_x": 1})
    other.upsert([item], vectors_of(1))
    transfer.export(other, tmp_path / "v.parquet")
    ((items, _),) = exchange.contents(tmp_path / "v.parquet").rows()
    assert items == [item]


def copy(source, target, collection=None) -> list[transfer.TransferCounts]:
    return [transfer.copy(*pair) for pair in transfer.tables_to_copy(str(source), str(target), collection)]


@pytest.mark.slow
def test_a_copy_has_all_collections_and_encoders_and_thumbnails(index, tmp_path):
    Index(tmp_path / "index", "enc-b", 4).upsert(items_of(50), vectors_of(50, 4), allow_other_encoder=True)
    Index(tmp_path / "index", "enc-a", 8, "parts").upsert(items_of(3), vectors_of(3))
    copy(tmp_path / "index", tmp_path / "other")
    assert {(f.name, f.encoder, f.count) for f in collections(tmp_path / "other")} == {
        ("pictures", "enc-a", 50),
        ("pictures", "enc-b", 50),
        ("parts", "enc-a", 3),
    }
    assert_equal(index, Index(tmp_path / "other", "enc-a", 8))
    for item in items_of(50):
        assert Index(tmp_path / "other", "enc-a", 8).read_thumbnail(item.id) == JPEG + item.id.encode()
    assert [sent.sent for sent in copy(tmp_path / "index", tmp_path / "other")] == [0, 0, 0]


def test_one_collection_can_be_copied_alone(index, tmp_path):
    Index(tmp_path / "index", "enc-a", 8, "parts").upsert(items_of(3), vectors_of(3))
    copy(tmp_path / "index", tmp_path / "other", "parts")
    assert [facts.name for facts in collections(tmp_path / "other")] == ["parts"]


def test_a_missing_thumbnail_is_sent_although_its_row_is_present(index, other, tmp_path):
    copy(tmp_path / "index", tmp_path / "other")
    id = items_of(1)[0].id
    other.store.delete([other.thumbnail_path(id)])
    assert copy(tmp_path / "index", tmp_path / "other")[0].sent == 0
    assert other.read_thumbnail(id) == JPEG + id.encode()


def test_a_second_copy_takes_over_deletions_and_replaced_thumbnails(index, other, tmp_path):
    copy(tmp_path / "index", tmp_path / "other")
    gone, resized, repainted = items_of(3)
    index.delete([gone.id])
    index.store.write(index.thumbnail_path(resized.id), b"another size")
    index.upsert([repainted], -vectors_of(3)[2:], {repainted.id: b"x" * len(JPEG + repainted.id.encode())})
    assert transfer.only_in(other, index) == [gone.id]
    assert copy(tmp_path / "index", tmp_path / "other")[0].sent == 1
    assert_equal(index, other)
    for item in (gone, resized, repainted):
        assert other.read_thumbnail(item.id) == index.read_thumbnail(item.id)
    assert other.verify() == index.verify() == []


@pytest.mark.slow
def test_a_copy_deletes_from_the_table_of_its_encoder_only(index, other, tmp_path):
    ours, theirs = (Index(tmp_path / name, "enc-b", 4) for name in ("index", "other"))
    ours.upsert(items_of(50), vectors_of(50, 4), allow_other_encoder=True)
    copy(tmp_path / "index", tmp_path / "other")
    id = items_of(1)[0].id
    index.delete([id], of_all_encoders=False)
    transfer.copy(index, other)
    assert (id in other.ids(), id in theirs.ids()) == (False, True)
    assert theirs.read_thumbnail(id) == ours.read_thumbnail(id) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda other: other.upsert(items_of(51)[50:], vectors_of(51)[50:]),
            "index does not have 1 item of pictures in .*other",
        ),
        (
            lambda other: other.store.write(other.thumbnail_path(items_of(8)[7].id), b"old"),
            "is not the same in .*other after the copy",
        ),
        (
            lambda other: other.delete([items_of(8)[7].id]),
            "1 of 50 items of pictures are not in .*other",
        ),
        (lambda other: other.upsert(items_of(50), vectors_of(50, seed=1)), "is not the same in .*other after the copy"),
        (
            lambda other: other.upsert([replace(item, label="x") for item in items_of(50)], vectors_of(50)),
            "is not the same in .*other after the copy",
        ),
    ],
)
def test_a_copy_that_is_not_equal_is_reported(index, other, harm, sentence):
    transfer.copy(index, other)
    harm(other)
    with pytest.raises(IndexProblem, match=sentence):
        transfer.compare(index, other)


def test_a_collection_is_not_copied_onto_one_of_another_encoder(index, tmp_path):
    Index(tmp_path / "other", "enc-b", 8).upsert(items_of(1), vectors_of(1))
    with pytest.raises(WrongEncoder, match=r"pictures holds vectors of enc-b in .*other, and of enc-a in .*index"):
        copy(tmp_path / "index", tmp_path / "other")


def test_an_index_is_not_copied_onto_itself(index, tmp_path):
    with pytest.raises(IndexProblem, match="are the same index"):
        copy(tmp_path / "index", f"{tmp_path}/nowhere/../index/")


@pytest.mark.slow
def test_a_copy_to_an_object_store_resumes_after_kill_9_and_is_equal_when_copied_back(index, s3, tmp_path):
    program = f"""
import itertools, time
from serving.indexing import transfer
from serving.collection.index import Index
transfer.ROWS_AT_ONCE = 10
upsert = Index.upsert
def send(self, *given):
    upsert(self, *given)
    print("sent", flush=True)
    if next(portions) == 2:
        time.sleep(1000)  # until it is killed
portions = itertools.count(1)
Index.upsert = send
((source, target),) = transfer.tables_to_copy({str(tmp_path / "index")!r}, {s3!r})
transfer.copy(source, target)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert [process.stdout.readline() for _ in range(2)] == [b"sent\n"] * 2
        process.kill()
    there = Index(s3, "enc-a", 8)
    left = there.count()
    assert left == 20
    assert [vars(sent) for sent in copy(tmp_path / "index", s3)] == [{"sent": 50 - left, "present": left}]
    assert_equal(index, there)
    copy(s3, tmp_path / "back")
    back = Index(tmp_path / "back", "enc-a", 8)
    assert_equal(index, back)
    assert all(back.read_thumbnail(item.id) == JPEG + item.id.encode() for item in items_of(50))


def test_an_import_and_a_copy_are_one_change_each(index, other, small_portions, twinview, tmp_path):
    file = tmp_path / "v.parquet"
    assert transfer.export(index, file) == 50
    transfer.import_(exchange.contents(file), other)
    assert other.version() > 3, "it made several commits"
    assert [one.text for one in changes(other)] == ["added 50 items"]
    Index(tmp_path / "index", "enc-b", 4).upsert(items_of(20), vectors_of(20, 4), allow_other_encoder=True)
    index.delete(sorted(index.ids())[:2])
    other.delete(sorted(other.ids())[5:9])
    twinview("index", "copy", tmp_path / "index", tmp_path / "other", "--yes")
    copied = changes(other)[0]
    assert set(copied.change.tables) == {"pictures.enc-a", "pictures.enc-b"}
    assert (copied.change.added, copied.change.deleted) == (24, 2)
    undo(other)
    assert (other.count(), Index(tmp_path / "other", "enc-b", 4).count()) == (46, 0)
